//! Tokens and prompts of a real model against `tokenizers`, llama.cpp and jinja2, where `SCOUTD_SMOLLM2` names its
//! file: `tests/peers/smollm2/run` brings it and runs this.

use std::path::Path;
use std::sync::Arc;

use scoutd::chat::{Message, Role, Tool};
use scoutd::gguf::{Gguf, Mapping};
use scoutd::template::{ChatTemplate, RenderOptions};
use scoutd::tokenizer::{Specials, Tokenizer};
use scoutd::units::TokenId;
use serde_json::Value;

/// Runs a check with the model's tokenizer and template, where there is a file.
fn with_model(check: impl FnOnce(&ChatTemplate, &Value)) {
    let Some(path) = std::env::var_os("SCOUTD_SMOLLM2") else {
        println!("skipped: SCOUTD_SMOLLM2 names no file, see tests/peers/smollm2");
        return;
    };
    let mapping = Mapping::open(Path::new(&path)).expect("the model file");
    let gguf = Gguf::parse(mapping.bytes()).expect("a good file");
    let tokenizer = Tokenizer::from_gguf(gguf.metadata()).expect("a known vocabulary");
    let template =
        ChatTemplate::from_gguf(gguf.metadata(), Arc::new(tokenizer)).expect("a good template");
    let golden = serde_json::from_str(include_str!("../peers/smollm2/golden.json"));
    check(&template, &golden.expect("the golden file"));
}

fn ids(value: &Value) -> Vec<TokenId> {
    let ids = value.as_array().expect("ids").iter();
    ids.map(|id| TokenId(u32::try_from(id.as_u64().expect("an id")).expect("an id"))).collect()
}

fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value[key].as_str().expect("text")
}

fn options() -> RenderOptions {
    RenderOptions::at("2026-03-09T17:05[UTC]".parse().expect("a time"))
}

#[test]
fn texts_become_the_references_ids_and_come_back() {
    with_model(|template, golden| {
        let tokenizer = template.tokenizer();
        let cases = golden["tokenize"].as_array().expect("cases");
        assert_eq!(cases.len(), 11);
        for case in cases {
            let specials = match case["parse_special"].as_bool() {
                Some(true) => Specials::Parse,
                _ => Specials::Text,
            };
            let found = tokenizer.encode(text(case, "text"), specials).expect("a short text");
            assert_eq!(found, ids(&case["ids"]), "{}", case["name"]);
            if specials == Specials::Text {
                assert_eq!(tokenizer.decode(&found), text(case, "text"), "{}", case["name"]);
            }
        }
        assert_eq!(tokenizer.stop_tokens(), [TokenId(2), TokenId(0)]);
        assert!(!tokenizer.adds_bos());
    });
}

#[test]
fn bytes_without_token_are_dropped() {
    with_model(|template, _| {
        let tokenizer = template.tokenizer();
        let found = tokenizer.encode("a\u{4}b\u{16}", Specials::Text).expect("a short text");
        assert_eq!(tokenizer.decode(&found), "ab");
    });
}

#[test]
fn messages_become_the_references_prompts() {
    with_model(|template, golden| {
        let cases = golden["templates"].as_array().expect("cases");
        assert_eq!(cases.len(), 3);
        for case in cases {
            let messages = case["messages"].as_array().expect("messages").iter();
            let messages: Vec<Message> = messages.map(message).collect();
            let prompt = template.render(&messages, &[], &options()).expect("it renders");
            assert_eq!(prompt.text(), text(case, "rendered"), "{}", case["name"]);
            let tokens = prompt.tokens(template.tokenizer()).expect("a short text");
            assert_eq!(tokens, ids(&case["ids"]), "{}", case["name"]);
        }
    });
}

#[test]
fn tools_reach_it_though_its_template_ignores_them() {
    with_model(|template, _| {
        let tool = Tool { name: "light_turn_on".to_owned(), description: None, parameters: None };
        let user = Message::text(Role::User, "Kitchen light on.");
        let prompt = template.render(&[user], &[tool], &options()).expect("it renders").text();
        let expected =
            "<|im_start|>system\nYou may call these functions: [{\"name\":\"light_turn_on\"";
        assert!(prompt.starts_with(expected), "{prompt}");
    });
}

fn message(value: &Value) -> Message {
    let role = match text(value, "role") {
        "system" => Role::System,
        "user" => Role::User,
        "assistant" => Role::Assistant,
        "tool" => Role::Tool,
        other => panic!("role {other}"),
    };
    Message::text(role, text(value, "content"))
}
