//! What the engine does when memory is tight, and that all of it is undone.

use proptest::prelude::*;

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

/// What a random step of a day does.
#[derive(Clone, Debug)]
enum Op {
    Ask { prompt: usize, tokens: u32 },
    Read(usize),
    Leave(usize),
    Rung(u8),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0..60_usize, 1..30_u32).prop_map(|(prompt, tokens)| Op::Ask { prompt, tokens }),
        4 => any::<usize>().prop_map(Op::Read),
        2 => any::<usize>().prop_map(Op::Leave),
        1 => (0..5_u8).prop_map(Op::Rung),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Admissions, cancels, finishes and rungs in any order: never more is promised than may be, every stream ends,
    /// and at the end every byte is back.
    #[test]
    fn whatever_happens_the_ledger_holds(ops in proptest::collection::vec(op(), 1..60)) {
        let bench = Bench::new(small(), babbles);
        let at_rest = bench.ledger.promised();
        // Room for two or three of the longest at ten bytes a token.
        let budget = at_rest.saturating_add(Bytes(2000));
        bench.ledger.set_headroom(budget);
        let mut streams = Vec::new();
        let set = |rung: Rung| {
            bench.ledger.set_closed(rung >= Rung::Red);
            bench.conditions.set(rung, false);
        };
        for op in ops {
            match op {
                Op::Ask { prompt: letters, tokens } => {
                    let mut parts = prompt(&"abcdefgh".repeat(8)[..=letters]);
                    parts.max_tokens = Some(tokens);
                    streams.push(bench.chat(parts));
                }
                // On critical an answer may stand still, so nobody waits for one.
                Op::Read(which) if !streams.is_empty() && bench.conditions.rung() < Rung::Critical => {
                    let which = which % streams.len();
                    if streams[which].blocking_next().is_none() {
                        streams.swap_remove(which);
                    }
                }
                Op::Leave(which) if !streams.is_empty() => {
                    drop(streams.swap_remove(which % streams.len()));
                }
                Op::Rung(rung) => set(Rung::from_number(rung)),
                Op::Read(_) | Op::Leave(_) => {}
            }
            prop_assert!(bench.ledger.promised() <= budget);
        }
        set(Rung::Green);
        for mut stream in streams {
            while let Some(event) = stream.blocking_next() {
                let refused = matches!(
                    event,
                    Err(ChatError::NoHeadroom { .. } | ChatError::QueueFull { .. })
                );
                prop_assert!(event.is_ok() || refused, "{event:?}");
            }
        }
        prop_assert!(bench.local.drain(LONG));
        // Two changes of rung in a row may be one to the engine: the first must be seen before the next.
        let given = bench.acts("smaller_pieces");
        bench.wait_for_act("full_pieces", given);
        set(Rung::Orange);
        bench.wait_for_act("smaller_pieces", given + 1);
        let start = std::time::Instant::now();
        while bench.ledger.promised() != at_rest {
            prop_assert!(start.elapsed() < LONG, "{:?}", bench.ledger.table());
            std::thread::yield_now();
        }
    }
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
