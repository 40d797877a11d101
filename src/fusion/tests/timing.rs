//! F1, F2, F4, and what a client that goes away leaves behind.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::stubs::{Act, Stub, by_quality, ms, pool, question, report};
use crate::chat::{
    AnswerForm, Backend, ChatRequest, FaultReason, FinishReason, FusionMode, MemberState, ModeUsed,
};

fn on_off() -> AnswerForm {
    AnswerForm::Choice(vec!["on".to_owned(), "off".to_owned()])
}

#[tokio::test(start_paused = true)]
async fn f1_a_vote_takes_as_long_as_its_slowest_vote() {
    let pool = pool(vec![Stub::says(300, "on"), Stub::says(500, "off"), Stub::says(900, "on")]);
    let began = Instant::now();
    let reply = pool.ask(|options| options.answer = on_off()).await;
    let took = began.elapsed();
    let report = report(&reply);
    assert_eq!((reply.text.as_str(), report.mode_used), ("on", ModeUsed::Vote));
    assert!(took <= ms(920), "{took:?}");
    let ratio = report.timing.overhead_ratio().expect("it took time");
    assert!(ratio <= 1.03, "{ratio}");
    assert_eq!(report.votes, [("on".to_owned(), 2), ("off".to_owned(), 1)]);
    assert_eq!(report.quorum.usable, 3);
    println!("F1: vote over 300, 500, 900 ms: {took:?}, ratio {ratio:.3}");
}

#[tokio::test(start_paused = true)]
async fn f2_two_that_agree_do_not_wait_for_the_third() {
    let pool = pool(vec![Stub::says(300, "on"), Stub::says(500, "on"), Stub::says(5000, "off")]);
    let began = Instant::now();
    let reply = pool.ask(|options| options.answer = on_off()).await;
    let took = began.elapsed();
    assert!(took <= ms(550), "{took:?}");
    sleep(ms(100)).await;
    let closed = pool.seen[2].closed.lock().expect("no panic").clone();
    assert_eq!(closed.len(), 1, "the third's stream is closed");
    assert!(closed[0] - began <= took + ms(100));
    let third = &report(&reply).members[2];
    assert_eq!(third.state, MemberState::Cancelled);
    assert_eq!(third.reason, Some(FaultReason::EarlyStop));
    println!("F2: decided after {took:?}, third closed after {:?}", closed[0] - began);
}

#[tokio::test(start_paused = true)]
async fn f4_the_deadline_holds_whatever_members_do() {
    let drip = || Stub::does(Act::Drips(ms(70), "It is on. And so"));
    let pool = pool(vec![drip(), Stub::does(Act::Hangs), drip()]);
    let began = Instant::now();
    let reply = pool.ask(|options| options.deadline = Some(ms(1000))).await;
    let took = began.elapsed();
    assert!(took <= ms(1050), "{took:?}");
    assert!(reply.text.ends_with("It is on."), "{}", reply.text);
    assert_eq!(reply.completion.finish, FinishReason::Deadline);
    let report = report(&reply);
    assert!(report.degraded);
    let states: Vec<_> = report.members.iter().map(|m| (m.state, m.reason)).collect();
    let partial = (MemberState::Partial, Some(FaultReason::Deadline));
    let timeout = (MemberState::Timeout, Some(FaultReason::Deadline));
    assert_eq!(states, [partial, timeout, partial]);
    println!("F4: D = 1 s, members that ignore it: answered after {took:?}");
}

#[tokio::test(start_paused = true)]
async fn dropping_the_stream_stops_every_member_and_frees_the_place() {
    let pool = pool(vec![
        Stub::does(Act::Hangs),
        Stub::does(Act::Drips(ms(50), "a ")),
        Stub::says(60_000, "b"),
    ]);
    let request = ChatRequest::try_from(question(|_| {})).expect("valid");
    let stream = pool.fusion.chat(request);
    sleep(ms(200)).await;
    assert_eq!(pool.fusion.running(), 1);
    let dropped = Instant::now();
    drop(stream);
    sleep(ms(100)).await;
    for seen in &pool.seen {
        let closed = seen.closed.lock().expect("no panic").clone();
        assert!(closed.len() == 1 && closed[0] - dropped <= ms(100));
    }
    assert_eq!(pool.fusion.running(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_strong_member_gets_patience_and_a_weak_one_only_grace() {
    let quick = "Quite a long answer of more than five words.";
    let other = "Another long answer of more than five words.";
    for (strong, expected) in [(true, 3), (false, 2)] {
        let stubs = vec![
            Stub::says(1000, quick),
            Stub::says(1200, other),
            Stub::says(4000, "The best answer that there is, in full."),
        ];
        let members = stubs.into_iter().enumerate().map(|(index, stub)| {
            let seen = std::sync::Arc::clone(&stub.seen);
            let mut member = super::stubs::member(index, stub);
            if strong && index == 2 {
                member.tier = Some(crate::fusion::Tier::Large);
            }
            (member, seen)
        });
        let pool = super::stubs::pool_of(members.collect(), crate::fusion::Calibration::default());
        let reply = pool.ask(|options| options.deadline = Some(Duration::from_secs(30))).await;
        assert_eq!(report(&reply).quorum.usable, expected);
    }
}

/// Lognormal times by the sum of twelve uniform draws, the same on every machine.
struct Draws(u64);

impl Draws {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn lognormal(&mut self, sigma: f64) -> f64 {
        let normal: f64 = (0..12).map(|_| self.uniform()).sum::<f64>() - 6.0;
        (normal * sigma).exp()
    }
}

/// Mean time in units of the slowest used answer, with and without overlap, over `runs` fusions of three answers of
/// `tokens` tokens that a judge of the same speed scores.
async fn overhead(runs: u32, tokens: f64, sigma: f64, patient: bool) -> (f64, f64) {
    let (prefill, decode, prompt) = (25.0, 5.0, 60.0);
    let mut draws = Draws(42);
    let (mut overlapped, mut in_turn) = (0.0, 0.0);
    for run in 0..runs {
        let takes = prompt / prefill + tokens / decode;
        let stub = |index: usize, draws: &mut Draws| {
            let takes = Duration::from_secs_f64(takes * draws.lognormal(sigma));
            let text = format!("Answer number {index} of run {run}, in more than five words.");
            Stub::does(Act::Says(takes, text))
        };
        let phrasing = f64::max(15.0 / prefill, 1.0 / decode);
        let judge = Stub::does(Act::Hangs).judging(move |request, number| {
            let quality = by_quality(
                |text| text.as_bytes().get(14).map_or(0.0, |c| f64::from(*c)),
                Duration::ZERO,
            );
            let odds = quality(request, number).1;
            // The first phrasing reads the answer, the second finds it read; an empty answer is not there to read.
            let empty = super::stubs::answers_in(request).iter().all(String::is_empty);
            let reads = number % 2 == 0 && !empty;
            let seconds = phrasing + if reads { tokens / prefill } else { 0.0 };
            (Duration::from_secs_f64(seconds), odds)
        });
        let stubs = vec![stub(0, &mut draws), stub(1, &mut draws), stub(2, &mut draws)];
        let mut stubs = stubs;
        stubs.push(judge);
        let pool = pool(stubs);
        let reply = pool
            .ask(|options| {
                options.mode = FusionMode::BestOf;
                options.members = vec!["m0".to_owned(), "m1".to_owned(), "m2".to_owned()];
                options.judge.model = "m3".to_owned();
                options.grace = patient.then(|| Duration::from_secs(200));
            })
            .await;
        let report = report(&reply);
        assert_eq!(report.mode_used, ModeUsed::BestOf);
        overlapped += report.timing.overhead_ratio().expect("it took time");
        let judged = *pool.seen[3].judged.lock().expect("no panic");
        let slowest = report.timing.slowest_used;
        in_turn += (slowest + judged).as_secs_f64() / slowest.as_secs_f64();
    }
    (overlapped / f64::from(runs), in_turn / f64::from(runs))
}

#[tokio::test(start_paused = true)]
async fn f1b_a_judge_that_works_while_others_write_costs_little() {
    println!("F1b: mean R over 200 runs, n = 3, 25 and 5 tokens/s, scores by logits");
    println!("| L | sigma | overlapped | in turn | overlapped, default grace |");
    println!("|---|---|---|---|---|");
    for (tokens, sigma) in [(200.0, 0.1), (200.0, 0.3), (200.0, 0.5), (64.0, 0.3), (32.0, 0.3)] {
        let (overlapped, in_turn) = overhead(200, tokens, sigma, true).await;
        let (grace, _) = overhead(200, tokens, sigma, false).await;
        println!("| {tokens} | {sigma} | {overlapped:.3} | {in_turn:.3} | {grace:.3} |");
        assert!(overlapped < in_turn);
        if tokens == 200.0 && sigma == 0.3 {
            assert!(overlapped <= 1.30, "{overlapped}");
        }
    }
}
