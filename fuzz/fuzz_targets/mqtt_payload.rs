//! Any bytes as a payload on a request topic: a request that backends may get, or a refusal that can be paired and
//! written; never a panic.

#![no_main]

use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use scoutd::chat::{ChatError, ChatRequest, Origin, RequestId};
use scoutd::wire::Caller;
use scoutd::wire::mqtt::{self, Answer, Echo};
use scoutd::wire::openai::ChatBody;

fuzz_target!(|payload: &[u8]| {
    let (pairing, command) = mqtt::read_chat(payload);
    let id = pairing.request_id().unwrap_or_else(RequestId::random);
    let echo = Echo {
        id: pairing.id.clone().unwrap_or_else(|| id.as_str().into()),
        transaction: pairing.transaction.clone(),
    };
    let now = Instant::now();
    let request = command.and_then(|command| {
        let default = Duration::from_secs(300);
        let deadline = mqtt::earliest_deadline(now, None, command.deadline, default);
        assert!(deadline > now && deadline <= now + default);
        let origin = Origin::Mqtt { topic: "scoutd/pi5/request/chat".to_owned() };
        let caller = Caller { id: id.clone(), origin, client: "fuzz".into(), deadline };
        ChatRequest::try_from(ChatBody::parse(&command.body)?.into_parts(&caller)?)
    });
    match request {
        Ok(request) => assert_eq!(*request.id(), id),
        Err(error) => {
            let shown = mqtt::final_error(&echo, &error, &Answer::default());
            let shown = String::from_utf8(shown).expect("JSON is UTF-8");
            assert!(shown.starts_with("{\"type\":\"final\",\"id\":"), "{shown}");
            assert!(shown.contains(error.code()), "{shown}");
            assert!(!matches!(error, ChatError::Internal(_)), "{error}");
        }
    }
    let (plain, read) = mqtt::read_plain(payload);
    assert!(read.is_ok() || plain.id.is_none() || !payload.is_empty());
    let (_, cancel) = mqtt::read_cancel(payload);
    assert!(cancel.is_err() || plain.request_id().is_some());
});
