//! The plan alone: random events, random orders, and how often a vote is right.

mod accuracy;

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::chat::{AnswerForm, FinishReason, MergeStyle, NoQuorum, OutputFormat};
use crate::fusion::{Form, Tier};

pub(super) fn form(asked: &AnswerForm) -> Form {
    Form::new(asked, &OutputFormat::Text).expect("valid")
}

/// A pool of members with these weights that nobody judges.
pub(super) fn setup(weights: &[u32], form: Form) -> Setup {
    let ask = |(member, weight): (usize, &u32)| Ask {
        member,
        id: format!("m{member}"),
        weight: *weight,
        tier: Tier::Small,
        local: false,
        fallback: false,
    };
    Setup {
        mode: FusionMode::Auto,
        style: MergeStyle::Auto,
        rounds: 1,
        quorum: 2,
        deadline: Duration::from_secs(100),
        grace: Some(Duration::from_secs(90)),
        on_no_quorum: NoQuorum::BestAvailable,
        form,
        method: JudgeMethod::Auto,
        swap: true,
        judge: Judge::Absent("no_judge"),
        asks: weights.iter().enumerate().map(ask).collect(),
        spares: Vec::new(),
        analysis: false,
    }
}

/// What is decided when the answers come in the order of `order`, a second apart.
pub(super) fn decided(setup: Setup, answers: &[String], order: &[usize]) -> Decision {
    let (mut plan, _) = Plan::begin(setup);
    for (second, &attempt) in order.iter().enumerate() {
        let now = Duration::from_secs(second as u64 + 1);
        let text = answers[attempt].clone();
        plan.step(Event::Text { attempt, text }, now);
        for action in plan.step(Event::Ended { attempt, finish: FinishReason::Stop }, now) {
            if let Action::Decide(decision) = action {
                return *decision;
            }
        }
    }
    panic!("all have answered and nothing is decided")
}

/// The order that sorting by these keys gives.
fn order(keys: &[u64], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by_key(|index| keys[*index]);
    order
}

#[derive(Clone, Debug)]
enum Happens {
    Says(usize, &'static str),
    Ends(usize),
    Fails(usize),
    Judged(i64),
    JudgeFails,
    Waits(u64),
}

fn happens() -> impl Strategy<Value = Happens> {
    prop_oneof![
        (
            0..6_usize,
            prop::sample::select(vec!["yes", "no", " ", "A longer answer to all that. ", "4"])
        )
            .prop_map(|(who, text)| Happens::Says(who, text)),
        (0..6_usize).prop_map(Happens::Ends),
        (0..6_usize).prop_map(Happens::Fails),
        (-3000..3000_i64).prop_map(Happens::Judged),
        Just(Happens::JudgeFails),
        (0..8000_u64).prop_map(Happens::Waits),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Early stop changes which answers are waited for, never which one wins.
    #[test]
    fn the_order_of_arrival_does_not_choose(
        cast in prop::collection::vec((0..3_u8, 1..3000_u32), 2..7),
        one in prop::collection::vec(any::<u64>(), 7),
        other in prop::collection::vec(any::<u64>(), 7),
    ) {
        let answers: Vec<String> = cast.iter().map(|(key, _)| format!("{key}")).collect();
        let weights: Vec<u32> = cast.iter().map(|(_, weight)| *weight).collect();
        let run = |keys: &[u64]| {
            let setup = setup(&weights, form(&AnswerForm::Number));
            decided(setup, &answers, &order(keys, answers.len())).text
        };
        prop_assert_eq!(run(&one), run(&other));
    }

    /// Whatever happens, there is exactly one end, not after the deadline, and nothing follows it.
    #[test]
    fn there_is_one_end_and_in_time(
        mode in prop::sample::select(vec![
            FusionMode::Auto, FusionMode::BestOf, FusionMode::Merge, FusionMode::Debate,
        ]),
        judge in prop::sample::select(vec![Judge::Strong, Judge::Weaker, Judge::Absent("none")]),
        policy in prop::sample::select(vec![
            NoQuorum::BestAvailable, NoQuorum::Local, NoQuorum::Error,
        ]),
        fallback in any::<bool>(),
        events in prop::collection::vec(happens(), 0..60),
    ) {
        let mut setup = setup(&[700, 700, 1200], form(&AnswerForm::Text));
        setup.mode = mode;
        setup.judge = judge;
        setup.on_no_quorum = policy;
        setup.grace = None;
        let spare = Ask { member: 4, id: "m4".to_owned(), ..setup.asks[0].clone() };
        if fallback {
            setup.asks.push(Ask { fallback: true, local: true, id: "local".to_owned(), ..spare.clone() });
        }
        setup.spares.push(spare);
        let deadline = setup.deadline;
        let (mut plan, mut actions) = Plan::begin(setup);
        let mut now = Duration::ZERO;
        let mut ends = 0;
        let mut scoring = std::collections::VecDeque::new();
        let (mut comparing, mut writing) = (0, false);
        let mut note = |actions: Vec<Action>, now: Duration, scoring: &mut std::collections::VecDeque<String>, comparing: &mut u32, writing: &mut bool| {
            for action in actions {
                if ends > 0 {
                    return Err(TestCaseError::fail(format!("after the end: {action:?}")));
                }
                match action {
                    Action::Score { hash, .. } => scoring.push_back(hash),
                    Action::Compare { .. } => *comparing += 1,
                    Action::Write { .. } => *writing = true,
                    Action::Decide(_) | Action::Refuse(_) => {
                        ends += 1;
                        prop_assert!(now <= deadline);
                    }
                    _ => {}
                }
            }
            Ok(ends)
        };
        note(std::mem::take(&mut actions), now, &mut scoring, &mut comparing, &mut writing)?;
        for event in events.into_iter().map(Some).chain([None]) {
            let event = match event {
                Some(Happens::Says(attempt, text)) => Event::Text { attempt, text: text.to_owned() },
                Some(Happens::Ends(attempt)) => Event::Ended { attempt, finish: FinishReason::Stop },
                Some(Happens::Fails(attempt)) => {
                    Event::Failed { attempt, reason: FaultReason::ConnectRefused }
                }
                Some(Happens::Judged(milli)) => match (scoring.pop_front(), comparing) {
                    (Some(hash), _) => Event::Scored { hash, milli },
                    (None, 1..) => {
                        comparing -= 1;
                        Event::Compared { milli }
                    }
                    (None, 0) if writing => Event::Written {
                        text: "Written.".to_owned(),
                        finish: FinishReason::Stop,
                    },
                    (None, 0) => Event::Tick,
                },
                Some(Happens::JudgeFails) => Event::JudgeFailed { reason: "judge_failed" },
                Some(Happens::Waits(ms)) => {
                    now = (now + Duration::from_millis(ms)).min(plan.wake().unwrap_or(now).max(now));
                    Event::Tick
                }
                None => Event::Tick,
            };
            let more = plan.step(event, now);
            note(more, now, &mut scoring, &mut comparing, &mut writing)?;
        }
        // Nothing happens any more but time.
        for _ in 0..16 {
            let Some(wake) = plan.wake() else { break };
            now = now.max(wake);
            let more = plan.step(Event::Tick, now);
            let stops = more.contains(&Action::StopWriting);
            note(more, now, &mut scoring, &mut comparing, &mut writing)?;
            if stops {
                let more = plan.step(Event::NotWritten, now);
                note(more, now, &mut scoring, &mut comparing, &mut writing)?;
            }
        }
        prop_assert_eq!(note(Vec::new(), now, &mut scoring, &mut comparing, &mut writing)?, 1);
    }
}

#[test]
fn a_debate_that_makes_the_vote_less_clear_does_not_count() {
    let mut setup = setup(&[700, 700, 700, 700, 700], form(&AnswerForm::Number));
    setup.mode = FusionMode::Debate;
    let (mut plan, _) = Plan::begin(setup);
    let mut last = Vec::new();
    for (attempt, text) in ["4", "4", "5", "6", "7", "4", "5", "5", "4", "8"].iter().enumerate() {
        let now = Duration::from_secs(attempt as u64 + 1);
        // The second five are the first five's after the debate, in canonical order.
        plan.step(Event::Text { attempt, text: (*text).to_owned() }, now);
        last = plan.step(Event::Ended { attempt, finish: FinishReason::Stop }, now);
    }
    let Some(Action::Decide(decision)) = last.last() else { panic!("{last:?}") };
    assert_eq!((decision.text.as_str(), decision.mode_used), ("4", ModeUsed::Vote));
    assert_eq!(decision.mode_reason, Some("margin_fell"));
}

#[test]
fn the_time_is_divided() {
    let mut setup = setup(&[700, 700, 700], form(&AnswerForm::Text));
    setup.judge = Judge::Weaker;
    let (mut plan, _) = Plan::begin(setup);
    assert_eq!(plan.panel_end(), Duration::from_secs(95), "nobody has an answer to judge");
    for attempt in 0..2 {
        let text = format!("Answer number {attempt} of more than five words.");
        plan.step(Event::Text { attempt, text }, Duration::from_secs(1));
        plan.step(Event::Ended { attempt, finish: FinishReason::Stop }, Duration::from_secs(1));
    }
    assert_eq!(plan.panel_end(), Duration::from_secs(70), "the judge needs its share");
}

#[test]
fn cut_off_answers_wait_for_a_whole_one() {
    let (mut plan, _) = Plan::begin(setup(&[700, 700, 700], form(&AnswerForm::Text)));
    let now = Duration::from_secs(1);
    for attempt in 0..2 {
        let text = "The lamp is on. And it".to_owned();
        plan.step(Event::Text { attempt, text }, now);
        let actions = plan.step(Event::Failed { attempt, reason: FaultReason::Reset }, now);
        assert!(!actions.iter().any(|action| matches!(action, Action::Decide(_))), "{actions:?}");
    }
    let text = "The lamp is off.".to_owned();
    plan.step(Event::Text { attempt: 2, text: text.clone() }, now);
    let actions = plan.step(Event::Ended { attempt: 2, finish: FinishReason::Stop }, now);
    let Some(Action::Decide(decision)) = actions.last() else { panic!("{actions:?}") };
    assert_eq!(decision.text, text);
}
