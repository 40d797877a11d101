//! The engine with the built-in model: what it says does not depend on what else runs.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use scoutd::chat::{
    Backend, ChatRequest, ChatRequestParts, ChatStream, FinishReason, Input, Message, Origin,
    Reply, Role, Tool,
};
use scoutd::engine::{Config, EngineParts, Local, start};
use scoutd::gguf::{Gguf, Mapping};
use scoutd::memory::{Conditions, Ledger, Purpose};
use scoutd::metrics::Metrics;
use scoutd::model::{self, ModelOptions};
use scoutd::template::ChatTemplate;
use scoutd::tokenizer::Tokenizer;
use scoutd::units::Bytes;

use crate::doubles::card;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/scout-nano-q4_0.gguf");
const CONTEXT_TOKENS: u32 = 1024;

/// An engine that runs scout-nano, and its ledger.
fn engine(config: Config) -> (Local, Arc<Ledger>) {
    let mapping =
        Arc::new(Mapping::open(Path::new(MODEL)).expect("the model is in the repository"));
    let options = ModelOptions {
        slots: usize::from(EngineParts::slots_needed(&config)),
        ..ModelOptions::default()
    };
    let (tokenizer, template) = {
        let gguf = Gguf::parse(mapping.bytes()).expect("the model is a GGUF file");
        let tokenizer =
            Arc::new(Tokenizer::from_gguf(gguf.metadata()).expect("it has a tokenizer"));
        let template = ChatTemplate::from_gguf(gguf.metadata(), Arc::clone(&tokenizer));
        (tokenizer, template.expect("it has a template"))
    };
    let model = model::open(mapping, &options).expect("the model can be run");
    assert_eq!(model.spec().vocab_len as usize, tokenizer.vocab_len());
    let ledger = Ledger::new(Bytes(1 << 30));
    let mut card = card("scout-nano");
    card.context_tokens = CONTEXT_TOKENS;
    let metrics = Arc::new(Metrics::new());
    let (conditions, engine_ledger) = (Conditions::new(), Arc::clone(&ledger));
    let parts =
        EngineParts { model, template, card, ledger: engine_ledger, metrics, conditions, config };
    (start(parts).expect("the engine starts"), ledger)
}

/// A question in the form the model was trained on.
fn question(client: usize, text: &str) -> ChatRequestParts {
    let system = "You are scout.\nNow: Sunday 23:22\nDevices:\n\
                  light.garage_floor_lamp_1: garage floor lamp 1, on\n\
                  switch.mia_s_pump: mia's pump, on";
    let messages = vec![Message::text(Role::System, system), Message::text(Role::User, text)];
    let deadline = Instant::now() + Duration::from_secs(600);
    let client = format!("client {client}");
    let mut parts =
        ChatRequestParts::new(Origin::Terminal, &client, Input::Messages(messages), deadline);
    parts.sampling.temperature = 0.0;
    parts.max_tokens = Some(64);
    parts.logprobs = Some(0);
    parts
}

fn ask(local: &Local, parts: ChatRequestParts) -> ChatStream {
    local.chat(ChatRequest::try_from(parts).expect("the request is valid"))
}

#[tokio::test]
async fn four_at_once_say_what_each_says_alone() {
    let questions = [
        "Change the garage floor lamp 1 to the other state",
        "is mia's pump on?",
        "hi, 3 minutes for the cake please, and tell me when it is over",
        "hello",
    ];
    let alone_config = Config { slots: 1, resting_slots: 0, ..Config::default() };
    let (alone, _) = engine(alone_config);
    let (together, ledger) = engine(Config {
        prefill_tokens_max: 32,
        prefill_tokens_beside_decode: 16,
        ..Config::default()
    });
    let mut expected: Vec<Reply> = Vec::new();
    for (client, question) in questions.iter().enumerate() {
        expected.push(
            ask(&alone, self::question(client, question)).collect().await.expect("it is answered"),
        );
    }
    // Twice: the second time prefixes are already there.
    for round in 0..2 {
        let streams: Vec<ChatStream> = questions
            .iter()
            .enumerate()
            .map(|(client, question)| ask(&together, self::question(client, question)))
            .collect();
        for (stream, expected) in streams.into_iter().zip(&expected) {
            let reply = stream.collect().await.expect("it is answered");
            assert!(reply.completion.usage.completion_tokens > 0);
            assert_eq!(reply.text, expected.text);
            let (got, wanted): (Vec<_>, Vec<_>) = (
                reply.logprobs.iter().map(|token| token.logprob).collect(),
                expected.logprobs.iter().map(|token| token.logprob).collect(),
            );
            assert_eq!(got, wanted, "the very same numbers");
            if round == 1 {
                assert!(reply.completion.usage.cached_tokens > 0);
            }
        }
    }
    assert!(together.drain(Duration::from_secs(60)));
    assert_eq!(ledger.promised_for(Purpose::Kv), Bytes(0));
}

#[tokio::test]
async fn the_built_in_model_calls_a_tool() {
    let (local, _) = engine(Config::default());
    let mut parts = question(0, "Change the garage floor lamp 1 to the other state");
    parts.tools =
        vec![Tool { name: "light.toggle".to_owned(), description: None, parameters: None }];
    let reply = ask(&local, parts).collect().await.expect("it is answered");
    assert_eq!((reply.text.as_str(), reply.tool_calls.len()), ("", 1));
    assert_eq!(reply.completion.finish, FinishReason::ToolCalls);
    assert_eq!(reply.tool_calls[0].name, "light.toggle");
    assert_eq!(reply.tool_calls[0].arguments["entity_id"], "light.garage_floor_lamp_1");
}
