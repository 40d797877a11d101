//! Slots, shared beginnings, and what they cost.

use super::fixture::{Parts, all_logits, assert_close, exact, forward, row, tokens};
use crate::model::forward::Transformer;
use crate::model::{LogitsWanted, Model};
use crate::units::SlotId;

const BOUND: f32 = 2e-5;
const VOCAB: usize = 512;

fn tiny(slots: usize) -> Transformer {
    Parts::tiny(false).open(&exact(slots))
}

#[test]
fn rows_of_a_batch_do_not_disturb_each_other() {
    let mut alone = tiny(1);
    let mut model = tiny(4);
    let texts: Vec<Vec<u32>> = (0..4).map(|s| tokens(s, 40 + 17 * s as usize, 512)).collect();
    let wanted: Vec<Vec<f32>> = texts.iter().map(|text| all_logits(&mut alone, text)).collect();
    // Pieces of different lengths, rows that begin and end at different times.
    let mut found = vec![Vec::new(); 4];
    let mut done = [0; 4];
    let steps = [1, 5, 13, 1];
    for step in 0.. {
        let ready: Vec<usize> = (0..4).filter(|&s| step >= s && done[s] < texts[s].len()).collect();
        if ready.is_empty() {
            break;
        }
        let from = done;
        let piece = |s: usize| from[s]..(from[s] + steps[(s + step) % 4]).min(texts[s].len());
        let batch =
            ready.iter().map(|&s| row(s as u16, &texts[s][piece(s)], LogitsWanted::All)).collect();
        let logits = forward(&mut model, batch);
        let mut rest = logits.as_slice();
        for &s in &ready {
            let (own, others) = rest.split_at(piece(s).len() * VOCAB);
            rest = others;
            found[s].extend_from_slice(own);
            done[s] = piece(s).end;
        }
        assert!(rest.is_empty());
    }
    for (slot, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
        assert_close(found, wanted, BOUND, &format!("slot {slot}"));
        assert_eq!(model.len(SlotId(slot as u16)), texts[slot].len());
    }
}

#[test]
fn only_wanted_logits_come() {
    let mut model = tiny(3);
    let text = tokens(9, 50, 512);
    let all = all_logits(&mut tiny(1), &text);
    let logits = forward(
        &mut model,
        vec![
            row(0, &text, LogitsWanted::None),
            row(1, &text, LogitsWanted::Last),
            row(2, &text[..2], LogitsWanted::All),
        ],
    );
    assert_eq!(logits.len(), 3 * VOCAB);
    assert_close(&logits[..VOCAB], &all[49 * VOCAB..], BOUND, "last");
    assert_close(&logits[VOCAB..], &all[..2 * VOCAB], BOUND, "all of two");
}

#[test]
fn a_shared_prefix_equals_recomputation() {
    let text = tokens(4, 120, 512);
    let wanted = all_logits(&mut tiny(1), &text);
    // The source holds 100 tokens, so of its local chunks of 32 the one from 96 is there.
    for (asked, held) in
        [(0, 0), (1, 0), (31, 0), (32, 32), (50, 32), (96, 96), (97, 97), (999, 100)]
    {
        let mut model = tiny(2);
        forward(&mut model, vec![row(0, &text[..100], LogitsWanted::None)]);
        assert_eq!(model.share_prefix(SlotId(0), SlotId(1), asked), held, "{asked}");
        assert_eq!(model.len(SlotId(1)), held);
        // Another text in the copy first: the source must not notice.
        forward(&mut model, vec![row(1, &tokens(5, 10, 512), LogitsWanted::None)]);
        let source = forward(&mut model, vec![row(0, &text[100..], LogitsWanted::All)]);
        assert_close(&source, &wanted[100 * VOCAB..], BOUND, "source");

        model.clear(SlotId(0));
        forward(&mut model, vec![row(0, &text[..100], LogitsWanted::None)]);
        model.share_prefix(SlotId(0), SlotId(1), asked);
        model.clear(SlotId(0));
        let copy = forward(&mut model, vec![row(1, &text[held..], LogitsWanted::All)]);
        assert_close(&copy, &wanted[held * VOCAB..], BOUND, &format!("prefix of {asked}"));
    }
}

#[test]
fn a_slot_can_be_cut() {
    let text = tokens(6, 100, 512);
    let wanted = all_logits(&mut tiny(1), &text);
    let mut model = tiny(1);
    forward(&mut model, vec![row(0, &text[..64], LogitsWanted::None)]);
    forward(&mut model, vec![row(0, &tokens(7, 20, 512), LogitsWanted::None)]);
    let slot = SlotId(0);
    assert_eq!(model.share_prefix(slot, slot, 64), 64);
    let logits = forward(&mut model, vec![row(0, &text[64..90], LogitsWanted::All)]);
    assert_close(&logits, &wanted[64 * VOCAB..90 * VOCAB], BOUND, "after the cut");
    assert_eq!(model.share_prefix(slot, slot, 70), 70);
    let logits = forward(&mut model, vec![row(0, &text[70..], LogitsWanted::All)]);
    assert_close(&logits, &wanted[70 * VOCAB..], BOUND, "after the second cut");
}

#[test]
fn models_without_chunks_share_any_prefix() {
    let parts = Parts::random("llama");
    let text = tokens(8, 150, 96);
    let wanted = all_logits(&mut parts.open(&exact(1)), &text);
    let mut model = parts.open(&exact(2));
    forward(&mut model, vec![row(0, &text[..140], LogitsWanted::None)]);
    for length in [1, 63, 64, 65, 139] {
        assert_eq!(model.share_prefix(SlotId(0), SlotId(1), length), length);
        let logits = forward(&mut model, vec![row(1, &text[length..], LogitsWanted::Last)]);
        assert_close(&logits, &wanted[149 * 96..], BOUND, &format!("prefix of {length}"));
    }
}

#[test]
fn pages_in_use_are_what_the_spec_says() {
    let mut model = tiny(3);
    for count in [1, 31, 32, 33, 64, 100, 160] {
        forward(&mut model, vec![row(0, &tokens(1, count, 512), LogitsWanted::None)]);
        assert_eq!(model.kv_bytes_in_use(), model.spec().kv_bytes(count as u32), "{count} tokens");
        model.clear(SlotId(0));
        assert_eq!(model.kv_bytes_in_use(), 0);
    }
    forward(&mut model, vec![row(0, &tokens(1, 90, 512), LogitsWanted::None)]);
    let one = model.kv_bytes_in_use();
    model.share_prefix(SlotId(0), SlotId(1), 90);
    model.share_prefix(SlotId(0), SlotId(2), 64);
    assert_eq!(model.kv_bytes_in_use(), one, "shared pages count once");
    model.clear(SlotId(0));
    assert_eq!(model.kv_bytes_in_use(), one, "the others still hold them");
    forward(&mut model, vec![row(2, &[1], LogitsWanted::None)]);
    let local_and_global_page = model.spec().kv_bytes(1);
    assert_eq!(model.kv_bytes_in_use(), one + local_and_global_page);
    model.clear(SlotId(1));
    model.clear(SlotId(2));
    assert_eq!(model.kv_bytes_in_use(), 0);
}
