//! Any bytes as another server's streamed answer: cut the same way whatever pieces they come in, within bounds, and
//! read as pieces of an answer or refused; and as what scoutd nodes tell each other.

#![no_main]

use libfuzzer_sys::fuzz_target;
use scoutd::peer::{Frames, Framing};
use scoutd::wire::upstream::{
    MemberBody, ScoreBody, node_report, read_node_report, read_ollama_models, read_ollama_piece,
    read_openai_piece, read_score_reply, read_top_logprobs,
};

fuzz_target!(|bytes: &[u8]| {
    let Some((&step, bytes)) = bytes.split_first() else { return };
    let step = usize::from(step).max(1);
    for framing in [Framing::Events, Framing::Lines, Framing::Whole] {
        let (whole, cut) = (frames(framing, bytes, bytes.len().max(1)), frames(framing, bytes, step));
        assert_eq!(whole, cut, "{framing:?} in pieces of {step}");
        for frame in &whole {
            for piece in [read_openai_piece(frame), read_ollama_piece(frame)].into_iter().flatten() {
                assert!(piece.text.len() <= frame.len());
                assert!(piece.calls.iter().all(|call| call.index < 64));
            }
        }
    }
    if let Some(report) = read_node_report(bytes) {
        assert!(read_node_report(&node_report(&report)).is_some());
    }
    let _ = (read_ollama_models(bytes), read_top_logprobs(bytes), read_score_reply(bytes, 2));
    for error in [MemberBody::parse(bytes).err(), ScoreBody::parse(bytes).err()].into_iter().flatten() {
        assert!(error.public_message().len() < 1000);
    }
});

fn frames(framing: Framing, bytes: &[u8], step: usize) -> Vec<Vec<u8>> {
    let mut frames = Frames::new(framing);
    let mut out = Vec::new();
    for piece in bytes.chunks(step) {
        frames.push(piece, &mut out).expect("an input is smaller than any bound");
    }
    frames.finish(&mut out).expect("an input is smaller than any bound");
    out
}
