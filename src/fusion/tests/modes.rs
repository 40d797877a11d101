//! Debate, extractive merge, and the ways around the panel.

use std::sync::Arc;

use super::stubs::{Act, Pool, Stub, member, ms, pool, pool_of, question, report};
use crate::chat::{
    AnswerForm, Backend, ChatError, FaultReason, FusionMode, Include, MergeStyle, ModeUsed,
    ModelName, Origin, Tool,
};
use crate::fusion::{Calibration, Form, Health, Tier, arithmetic};

fn debaters(before: [&'static str; 3], after: [&'static str; 3]) -> Pool {
    pool(
        (0..3)
            .map(|index| {
                Stub::acts(move |number, _| {
                    let said = if number == 0 { before } else { after };
                    Act::Says(ms(100 + 10 * index as u64), said[index].to_owned())
                })
            })
            .collect(),
    )
}

fn number(options: &mut crate::chat::FusionRequest) {
    options.mode = FusionMode::Debate;
    options.answer = AnswerForm::Number;
}

#[tokio::test(start_paused = true)]
async fn a_debate_is_one_round_of_answers_and_a_vote() {
    let pool = debaters(["4", "5", "6"], ["4", "4", "6"]);
    let reply = pool.ask(number).await;
    assert_eq!((reply.text.as_str(), report(&reply).mode_used), ("4", ModeUsed::Debate));
    let prompts = pool.seen[1].prompts.lock().expect("no panic").clone();
    assert_eq!((prompts.len(), prompts[0].len(), prompts[1].len()), (2, 1, 3));
    let told = &prompts[1][2].content;
    assert!(told.contains("\n4\n") && told.contains("\n6\n") && !told.contains("m0"), "{told}");
    assert_eq!(prompts[1][1].content, "5");
    let mut ids: Vec<_> = report(&reply).members.iter().map(|m| m.id.as_str()).collect();
    ids.sort_unstable();
    assert_eq!(ids, ["m0", "m0@1", "m1", "m1@1", "m2", "m2@1"]);
}

#[tokio::test(start_paused = true)]
async fn there_is_no_debate_where_nothing_is_contested() {
    let agreed = debaters(["4", "4", "4"], ["9", "9", "9"]).ask(number).await;
    let told = report(&agreed);
    assert_eq!((told.mode_used, told.mode_reason), (ModeUsed::Vote, Some("unanimous")));
    let majority = debaters(["4", "5", "4"], ["9", "9", "9"]).ask(number).await;
    assert_eq!((majority.text.as_str(), report(&majority).mode_reason), ("4", Some("decided")));
}

#[tokio::test(start_paused = true)]
async fn a_merge_takes_sentences_that_two_have() {
    let pool = pool(vec![
        Stub::says(100, "The tower is in Paris. It was built in 1889 for a fair."),
        Stub::says(200, "The tower is in Paris. It is made of wrought iron."),
        Stub::says(300, "It is made of wrought iron. The tower is in Rome, some say."),
    ]);
    let reply = pool
        .ask(|options| {
            options.mode = FusionMode::Merge;
            options.style = MergeStyle::Extractive;
            options.include = Include::Sentences;
            options.analysis = true;
        })
        .await;
    let told = report(&reply);
    assert_eq!(told.mode_used, ModeUsed::MergeExtractive);
    assert!(reply.text.contains("The tower is in Paris.") || reply.text.contains("iron"));
    for sentence in &told.sentences {
        let said = |from: &String| !from.is_empty() && from != "judge";
        assert!(sentence.from.iter().all(said), "{sentence:?}");
    }
    let analysis = told.analysis.as_ref().expect("it was asked for");
    assert!(analysis.consensus.iter().any(|s| s.text == "It is made of wrought iron."));
    assert!(analysis.blind_spots.is_empty());
}

#[tokio::test(start_paused = true)]
async fn tools_and_single_answers_go_around_the_panel() {
    let make =
        || pool(vec![Stub::says(100, "one"), Stub::says(50, "two"), Stub::says(200, "three")]);
    let pool = make();
    let mut parts = question(|_| {});
    parts.tools = vec![Tool { name: "light".to_owned(), description: None, parameters: None }];
    let reply = pool.reply(parts).await.expect("answered");
    assert_eq!(report(&reply).mode_reason, Some("tools"));
    let asked: usize = pool.seen.iter().map(|s| s.prompts.lock().expect("no panic").len()).sum();
    assert_eq!(asked, 1);

    let reply = make().ask(|options| options.n = Some(1)).await;
    assert_eq!((report(&reply).mode_used, report(&reply).degraded), (ModeUsed::Single, false));

    let alone = super::stubs::pool(vec![Stub::says(10, "alone")]);
    let reply = alone.ask(|_| {}).await;
    assert_eq!(report(&reply).mode_reason, Some("degraded"));
    assert!(report(&reply).degraded);
}

#[tokio::test(start_paused = true)]
async fn a_single_answer_is_taken_over_before_its_first_word() {
    let pool = pool(vec![
        Stub::does(Act::Fails(ms(10), FaultReason::Http5xx(502))),
        Stub::says(50, "two"),
    ]);
    let reply = pool.ask(|options| options.n = Some(1)).await;
    assert_eq!(reply.text, "two");
    let states: Vec<_> = report(&reply).members.iter().map(|m| m.state.as_str()).collect();
    assert_eq!(states, ["http_5xx", "ok"]);
}

#[tokio::test(start_paused = true)]
async fn a_fusion_does_not_ask_a_fusion() {
    let pool = pool(vec![Stub::says(1, "a"), Stub::says(1, "a")]);
    let mut parts = question(|_| {});
    parts.origin = Origin::Fusion { depth: 1 };
    let error = pool.reply(parts).await.expect_err("refused");
    assert!(matches!(&error, ChatError::Invalid { param: Some(p), .. } if p == "model"), "{error}");
    let name = |name: &str| pool.fusion.card(&ModelName::new(name)).is_some();
    for known in ["fusion", "fusion:latest", "fusion:default", "openrouter/fusion"] {
        assert!(name(known), "{known}");
    }
    assert!(!name("fusion:other") && !name("nano") && !name(""));
}

#[tokio::test(start_paused = true)]
async fn who_is_not_asked_is_told_why() {
    let mut members = Vec::new();
    for index in 0..6 {
        let stub = Stub::says(100, "yes");
        let seen = Arc::clone(&stub.seen);
        let mut one = member(index, stub);
        match index {
            1 => one.vitals.health = Health::Open,
            2 => one.vitals.hot = true,
            3 => one.tier = Some(Tier::Tiny),
            4 => one.digest = Some("digest 0".into()),
            _ => {}
        }
        members.push((one, seen));
    }
    let pool = pool_of(members, Calibration::default());
    let reply = pool.ask(|_| {}).await;
    let told: Vec<_> = report(&reply)
        .members
        .iter()
        .map(|m| (m.id.as_str(), m.reason.map_or("", FaultReason::as_str)))
        .collect();
    let expected = [
        ("m0", ""),
        ("m5", ""),
        ("m1", "breaker_open"),
        ("m2", "hot"),
        ("m3", "weak_beside_strong"),
    ];
    assert_eq!(told, expected, "m4 has the same file as m0 and would repeat it");
}

#[tokio::test(start_paused = true)]
async fn calibration_asks_everybody_and_learns_from_truth() {
    let right = |number: usize| arithmetic(3, 10)[number].truth.clone();
    let pool = pool(vec![
        Stub::acts(move |number, _| Act::Says(ms(10), right(number))),
        Stub::acts(move |number, _| {
            let text = if number % 2 == 0 { right(number) } else { "12345".to_owned() };
            Act::Says(ms(10), format!("It is {text}."))
        }),
        Stub::does(Act::Hangs),
    ]);
    for item in arithmetic(3, 10) {
        pool.fusion.calibrate(&item, &Form::Number, ms(1000)).await.expect("numbers");
    }
    let learned = pool.fusion.calibration();
    let score = |model: &str| {
        let score = learned.models[model]["number"];
        (score.right, score.asked)
    };
    assert_eq!(score("digest 0"), (10, 10));
    assert_eq!(score("digest 1"), (5, 10));
    assert_eq!(score("digest 2"), (0, 10));
}
