//! What the engine does when memory is tight, and that all of it is undone.

use super::{
    Bench, ChatError, ChatEvent, Config, FinishReason, LONG, Purpose, babbles, collect, prompt,
    small, wait_for_text,
};
use crate::memory::Rung;
use crate::units::Bytes;

impl Bench {
    fn acts(&self, act: &str) -> u64 {
        self.metrics.memory_acts.with_label_values(&[act]).get()
    }

    /// Waits until the engine has done something so many times.
    fn wait_for_act(&self, act: &str, times: u64) {
        let start = std::time::Instant::now();
        while self.acts(act) < times {
            assert!(start.elapsed() < LONG, "{act} does not come");
            std::thread::yield_now();
        }
    }
}

#[test]
fn orange_gives_prefixes_back_and_keeps_no_new_ones() {
    let bench = Bench::new(small(), babbles);
    let mut parts = prompt("a prompt that is long enough to be kept");
    parts.max_tokens = Some(5);
    bench.text(parts.clone());
    assert!(bench.ledger.promised_for(Purpose::Prefix) > Bytes(0));
    bench.conditions.set(Rung::Orange, false);
    bench.wait_for_act("drop_prefixes", 1);
    assert_eq!(bench.ledger.promised_for(Purpose::Prefix), Bytes(0));
    bench.text(parts.clone());
    assert_eq!(bench.ledger.promised_for(Purpose::Prefix), Bytes(0));
    assert!(bench.stage.seen().held.is_empty());
    bench.conditions.set(Rung::Green, false);
    bench.wait_for_act("full_pieces", 1);
    bench.text(parts);
    assert!(bench.ledger.promised_for(Purpose::Prefix) > Bytes(0));
}

#[test]
fn yellow_keeps_no_more_than_there_is() {
    let bench = Bench::new(small(), babbles);
    let ask = |text: &str| {
        let mut parts = prompt(text);
        parts.max_tokens = Some(3);
        bench.text(parts);
        bench.stage.seen().held.len()
    };
    assert_eq!(ask("one beginning that is kept"), 1);
    bench.conditions.set(Rung::Yellow, false);
    assert_eq!(ask("another beginning that takes its place"), 1);
    bench.conditions.set(Rung::Green, false);
    assert_eq!(ask("a third that is kept beside it"), 2);
}

#[test]
fn pieces_of_prompts_are_smaller_when_tight_or_hot() {
    let config = Config { prefill_tokens_max: 64, resting_slots: 0, ..small() };
    for (rung, hot) in [(Rung::Orange, false), (Rung::Green, true)] {
        let bench = Bench::new(config.clone(), babbles);
        bench.conditions.set(rung, hot);
        bench.wait_for_act("smaller_pieces", 1);
        let mut parts = prompt(&"long ".repeat(30));
        parts.max_tokens = Some(4);
        let narrow = bench.text(parts.clone());
        assert_eq!(bench.stage.seen().tokens_max, 16);
        bench.conditions.set(Rung::Green, false);
        bench.wait_for_act("full_pieces", 1);
        // What is computed does not depend on the pieces.
        assert_eq!(bench.text(parts), narrow);
        assert_eq!(bench.stage.seen().tokens_max, 64);
    }
}

#[test]
fn red_refuses_what_is_new_and_finishes_what_runs() {
    let bench = Bench::new(small(), babbles);
    bench.stage.allow(3);
    let mut parts = prompt("this one was admitted before");
    parts.max_tokens = Some(20);
    let mut running = bench.chat(parts.clone());
    wait_for_text(&mut running);
    bench.ledger.set_closed(true);
    bench.conditions.set(Rung::Red, false);
    let error = bench.refusal(parts.clone());
    assert!(matches!(error, ChatError::NoHeadroom { .. }), "{error}");
    assert!(error.retry_after().is_some());
    bench.stage.allow_all();
    let reply = collect(running).expect("what was admitted finishes");
    assert_eq!(reply.completion.usage.completion_tokens, 20);
    bench.ledger.set_closed(false);
    bench.conditions.set(Rung::Green, false);
    bench.text(parts);
}

#[test]
fn critical_pauses_in_mid_answer_and_nothing_is_lost() {
    let mut parts = prompt("an answer that is interrupted");
    parts.max_tokens = Some(40);
    let undisturbed = Bench::new(small(), babbles).text(parts.clone());
    let bench = Bench::new(small(), babbles);
    bench.stage.allow(6);
    let mut running = bench.chat(parts);
    let mut text = wait_for_text(&mut running);
    bench.ledger.set_closed(true);
    bench.conditions.set(Rung::Critical, false);
    bench.stage.allow_all();
    bench.wait_for_act("release_weights", 1);
    assert_eq!((bench.acts("pause"), bench.stage.seen().released), (1, 1));
    let forwards = bench.stage.seen().forwards;
    // The doors are open: a new request gets its refusal while the model stands still.
    assert!(matches!(bench.refusal(prompt("now")), ChatError::NoHeadroom { .. }));
    assert_eq!(bench.stage.seen().forwards, forwards);
    assert!(bench.ledger.promised_for(Purpose::Kv) > Bytes(0), "its pages are kept");
    bench.conditions.set(Rung::Red, false);
    let rest = collect_text(running);
    text.push_str(&rest.0);
    assert_eq!((text, rest.1), (undisturbed, FinishReason::Length));
    assert_eq!(bench.acts("resume"), 1);
}

/// The rest of an answer, and how it ended.
fn collect_text(mut stream: crate::chat::ChatStream) -> (String, FinishReason) {
    let mut text = String::new();
    loop {
        match stream.blocking_next().expect("the answer ends properly") {
            Ok(ChatEvent::Delta { text: piece, .. }) => text.push_str(&piece),
            Ok(ChatEvent::Done(done)) => return (text, done.finish),
            Ok(_) => {}
            Err(error) => panic!("{error}"),
        }
    }
}
