//! Any text as a chat template, and any text as a client's message: an error or a prompt in bounded time, never a
//! panic, and no control token but those of the template. The input is the template, a zero byte, the message.

#![no_main]

use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use scoutd::chat::{Message, Role, Tool};
use scoutd::template::{ChatTemplate, RenderOptions};
use scoutd::tokenizer::{Tokenizer, Vocabulary};

static TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
    let json = include_bytes!("../../tests/golden/tokenizers/scout-nano.json");
    let vocabulary = Vocabulary::from_tokenizer_json(json, None).expect("a known vocabulary");
    Arc::new(Tokenizer::new(&vocabulary).expect("a sound vocabulary"))
});

const HARMLESS: &str = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}";

fuzz_target!(|bytes: &[u8]| {
    let Ok(input) = std::str::from_utf8(bytes) else { return };
    let (source, message) = input.split_once('\0').unwrap_or((HARMLESS, input));
    let Ok(template) = ChatTemplate::new(source, Arc::clone(&TOKENIZER)) else { return };
    let tool =
        Tool { name: "f".to_owned(), description: Some(message.to_owned()), parameters: None };
    let options = RenderOptions::at("2026-03-09T17:05[UTC]".parse().expect("a time"));
    let messages = [Message::text(Role::User, message)];
    let Ok(prompt) = template.render(&messages, &[tool], &options) else { return };
    let Ok(tokens) = prompt.tokens(&TOKENIZER) else { return };
    if source == HARMLESS {
        assert!(tokens.iter().all(|token| !TOKENIZER.is_control(*token)));
        assert!(prompt.text().contains(message));
    }
});
