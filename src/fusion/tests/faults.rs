//! F3: members that fail in every way, in every number.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::stubs::{Act, Stub, local, member, ms, pool, pool_of, question, report};
use crate::chat::{ChatError, FaultReason, MemberState, ModeUsed, NoQuorum};
use crate::fusion::Calibration;

const ANSWERS: [&str; 5] = ["yes", "yes", "yes", "yes", "yes"];

fn faults() -> Vec<(Act, FaultReason, MemberState)> {
    let fails = |reason: FaultReason| (Act::Fails(ms(30), reason), reason, reason.state());
    let mut all: Vec<_> = [
        FaultReason::ConnectRefused,
        FaultReason::ConnectTimeout,
        FaultReason::FirstByteTimeout,
        FaultReason::Http5xx(500),
        FaultReason::Busy,
        FaultReason::BadJson,
        FaultReason::WrongModel,
        FaultReason::Redirect,
        FaultReason::WanAddress,
    ]
    .map(fails)
    .to_vec();
    let says = |text: &str| Act::Says(ms(30), text.to_owned());
    all.extend([
        (Act::Hangs, FaultReason::Deadline, MemberState::Timeout),
        (Act::Breaks(ms(30), "", FaultReason::Reset), FaultReason::Reset, MemberState::Reset),
        (says(""), FaultReason::NoText, MemberState::Empty),
        (says(" \n"), FaultReason::Whitespace, MemberState::Empty),
        (says("<think>hm</think>"), FaultReason::ReasoningOnly, MemberState::Empty),
        (Act::Floods, FaultReason::TooLarge, MemberState::TooLarge),
    ]);
    all
}

#[tokio::test(start_paused = true)]
async fn f3_whoever_fails_there_is_an_answer_in_time_and_each_fault_has_its_name() {
    let deadline = Duration::from_secs(5);
    let mut runs = 0;
    for (act, reason, state) in faults() {
        for n in [3_usize, 5] {
            for dead in 0..=n {
                let mut members = Vec::new();
                for (index, answer) in ANSWERS.iter().enumerate().take(n) {
                    let stub = match index < dead {
                        true => Stub::does(act.clone()),
                        false => Stub::says(200, answer),
                    };
                    let seen = Arc::clone(&stub.seen);
                    members.push((member(index, stub), seen));
                }
                let home = Stub::says(900, "perhaps");
                let seen = Arc::clone(&home.seen);
                members.push((local(home), seen));
                let pool = pool_of(members, Calibration::default());
                let began = Instant::now();
                let reply = pool
                    .ask(|options| {
                        options.members = vec!["m*".to_owned()];
                        options.n = Some(n as u8);
                        options.deadline = Some(deadline);
                    })
                    .await;
                let took = began.elapsed();
                assert!(took <= deadline + ms(50), "{reason}: {dead} of {n} took {took:?}");
                let report = report(&reply);
                let expected = if dead == n { "perhaps" } else { "yes" };
                assert_eq!(reply.text, expected, "{reason}: {dead} of {n}");
                assert_eq!(report.degraded, n - dead < 2, "{reason}: {dead} of {n}");
                let failed: Vec<_> = report
                    .members
                    .iter()
                    .filter(|member| member.reason == Some(reason) && member.state == state)
                    .collect();
                // A hung member is dropped when the others agree.
                let early = matches!(act, Act::Hangs) && n - dead >= 2;
                assert_eq!(failed.len(), if early { 0 } else { dead }, "{reason}: {dead} of {n}");
                if dead == n {
                    assert_eq!(report.winner.as_deref(), Some("local/nano"));
                }
                runs += 1;
            }
        }
    }
    println!("F3: {runs} runs: an answer before the deadline in each");
}

#[tokio::test(start_paused = true)]
async fn below_the_quorum_the_client_chooses_what_happens() {
    let make = || {
        let mut members = Vec::new();
        for (index, stub) in [
            Stub::says(100, "yes"),
            Stub::does(Act::Fails(ms(10), FaultReason::Busy)),
            Stub::does(Act::Fails(ms(10), FaultReason::Reset)),
        ]
        .into_iter()
        .enumerate()
        {
            let seen = Arc::clone(&stub.seen);
            members.push((member(index, stub), seen));
        }
        let home = Stub::says(300, "local says no");
        let seen = Arc::clone(&home.seen);
        members.push((local(home), seen));
        pool_of(members, Calibration::default())
    };
    let with = |policy: NoQuorum| {
        question(move |options| {
            options.members = vec!["m*".to_owned()];
            options.on_no_quorum = policy;
        })
    };
    let best = make().reply(with(NoQuorum::BestAvailable)).await.expect("answered");
    assert_eq!(best.text, "yes");
    assert_eq!(report(&best).mode_reason, Some("no_quorum"));
    let home = make().reply(with(NoQuorum::Local)).await.expect("answered");
    assert_eq!((home.text.as_str(), report(&home).mode_used), ("local says no", ModeUsed::Single));
    let error = make().reply(with(NoQuorum::Error)).await.expect_err("refused");
    let ChatError::Upstream(fault) = &error else { panic!("{error}") };
    assert_eq!(fault.reason, FaultReason::NoQuorum);
    assert!(fault.detail.contains("m1: busy, m2: reset"), "{}", fault.detail);
    assert!(error.retry_after().is_some());
}

#[tokio::test(start_paused = true)]
async fn who_cannot_be_reached_is_replaced_once() {
    let pool = pool(vec![
        Stub::says(100, "yes"),
        Stub::does(Act::Fails(ms(20), FaultReason::ConnectRefused)),
        Stub::does(Act::Fails(ms(20), FaultReason::Http5xx(500))),
        Stub::says(100, "yes"),
        Stub::says(100, "no"),
    ]);
    let reply = pool.ask(|_| {}).await;
    assert_eq!(reply.text, "yes");
    let asked: Vec<usize> =
        pool.seen.iter().map(|seen| seen.prompts.lock().expect("no panic").len()).collect();
    assert_eq!(asked, [1, 1, 1, 1, 0]);
    let metrics = pool.metrics.render();
    let fault = "scoutd_fusion_member_faults_total{member=\"m1\",reason=\"connect_refused\"} 1";
    assert!(metrics.contains(fault), "{metrics}");
}
