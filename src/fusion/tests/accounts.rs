//! F11, F12: what it cost, and how much at once.

use super::stubs::{Act, Stub, by_quality, ms, pool, question, report};
use crate::chat::{Backend, ChatError, ChatRequest, Usage};

#[tokio::test(start_paused = true)]
async fn f11_every_token_is_counted_and_guesses_are_marked() {
    let pool = pool(vec![
        Stub::says(100, "A first answer with more than five words.").reporting(11, 7),
        Stub::says(200, "A second answer with more than five words.").reporting(13, 5),
        Stub::says(300, "A third and silent answer of twelve words."),
        Stub::does(Act::Drips(ms(100), "word ")).reporting(99, 99),
        Stub::does(Act::Hangs).judging(by_quality(|text| text.len() as f64, ms(10))),
    ]);
    let reply = pool
        .ask(|options| {
            options.members = ["m0", "m1", "m2", "m3"].map(str::to_owned).to_vec();
            options.n = Some(4);
            options.judge.model = "m4".to_owned();
            options.deadline = Some(ms(20_000));
        })
        .await;
    let told = report(&reply);
    let of = |id: &str| {
        let used = told.usage_by_member.iter().find(|used| used.id == id).expect("it is listed");
        (used.usage.prompt_tokens, used.usage.completion_tokens, used.estimated)
    };
    assert_eq!(of("m0"), (11, 7, false));
    assert_eq!(of("m1"), (13, 5, false));
    let prompt = "Is the lamp on?".len().div_ceil(4) as u32;
    let silent = "A third and silent answer of twelve words.".len().div_ceil(4) as u32;
    assert_eq!(of("m2"), (prompt, silent, true));
    assert!(of("m3").1 > 0 && of("m3").2, "a cancelled member wrote something: {:?}", of("m3"));
    let judged = pool.seen[4].scored.lock().expect("no panic").len() as u32;
    assert_eq!(of("m4"), (50 * judged, 0, false));
    let sum = told.usage_by_member.iter().fold(Usage::default(), |sum, used| Usage {
        prompt_tokens: sum.prompt_tokens + used.usage.prompt_tokens,
        cached_tokens: 0,
        completion_tokens: sum.completion_tokens + used.usage.completion_tokens,
    });
    assert_eq!(reply.completion.usage, sum);
    let estimated: Vec<_> = told.members.iter().map(|m| m.tokens_estimated).collect();
    assert_eq!(estimated, [false, false, true, true]);
}

#[tokio::test(start_paused = true)]
async fn f12_more_fusions_than_the_bound_are_refused() {
    let pool = pool(vec![Stub::does(Act::Hangs), Stub::does(Act::Hangs)]);
    let ask = || pool.fusion.chat(ChatRequest::try_from(question(|_| {})).expect("valid"));
    let held: Vec<_> = (0..4).map(|_| ask()).collect();
    let refused = ask().collect().await.expect_err("four run");
    assert!(matches!(refused, ChatError::QueueFull { .. }), "{refused}");
    drop(held);
    tokio::time::sleep(ms(10)).await;
    assert_eq!(pool.fusion.running(), 0);
}

/// Arrivals at exponential gaps around the bound: below it all are fused, above it the rest are answered by one.
#[tokio::test(start_paused = true)]
async fn f12_above_the_bound_one_member_answers() {
    // Each of three members needs 2 s, so the bound is 0.8 / 2 s = 0.4 fusions a second.
    for (per_s, least, most) in [(0.1, 1.0, 1.0), (1.5, 0.0, 0.5)] {
        let texts = [
            "first answer in this panel of ours",
            "second answer in this panel of ours",
            "third answer in this panel of ours",
        ];
        let pool = pool(texts.iter().map(|text| Stub::says(2000, text)).collect());
        let mut state = 5_u64;
        let mut gap = || {
            state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
            let u = ((state >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
            std::time::Duration::from_secs_f64(-u.ln() / per_s)
        };
        let (mut fused, mut single, mut refused, mut most_running) = (0, 0, 0, 0);
        let mut tasks = tokio::task::JoinSet::new();
        for arrival in 0..400 {
            tokio::time::sleep(gap()).await;
            let request = ChatRequest::try_from(question(|_| {})).expect("valid");
            let stream = pool.fusion.chat(request);
            most_running = most_running.max(pool.fusion.running());
            tasks.spawn(async move { (arrival >= 100, stream.collect().await) });
        }
        while let Some(done) = tasks.join_next().await {
            let (counts, reply) = done.expect("no panic");
            if !counts {
                continue;
            }
            match reply {
                Ok(reply) => match report(&reply).mode_reason {
                    Some("load") => single += 1,
                    _ => fused += 1,
                },
                Err(ChatError::QueueFull { .. }) => refused += 1,
                Err(error) => panic!("{error}"),
            }
        }
        let share = f64::from(fused) / f64::from(fused + single + refused);
        println!(
            "F12: {per_s} a second: {fused} fused, {single} single, {refused} refused; at most {most_running} at once"
        );
        assert!(most_running <= 4);
        assert!((least..=most).contains(&share), "{share}");
    }
}
