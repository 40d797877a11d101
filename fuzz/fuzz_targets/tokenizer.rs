//! Any bytes as a tokenizer file, and as a text: an error, or tokens that give the text back.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use scoutd::tokenizer::{Specials, Tokenizer, Vocabulary};

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let json = include_bytes!("../../tests/golden/tokenizers/scout-nano.json");
    let vocabulary = Vocabulary::from_tokenizer_json(json, None).expect("a known vocabulary");
    Tokenizer::new(&vocabulary).expect("a sound vocabulary")
});

fuzz_target!(|bytes: &[u8]| {
    let read =
        [Vocabulary::from_tokenizer_json(bytes, None), Vocabulary::from_tokenizer_model(bytes)];
    for vocabulary in read.into_iter().flatten() {
        if let Ok(tokenizer) = Tokenizer::new(&vocabulary) {
            let tokens = tokenizer.encode("some text <|eot|> é", Specials::Parse);
            tokenizer.decode(&tokens.expect("a short text"));
        }
    }
    let text = String::from_utf8_lossy(bytes);
    let tokens = TOKENIZER.encode(&text, Specials::Text).expect("a short text");
    assert!(tokens.iter().all(|token| !TOKENIZER.is_control(*token)));
    assert_eq!(TOKENIZER.decode(&tokens), text);
    let tokens = TOKENIZER.encode(&text, Specials::Parse).expect("a short text");
    assert!(TOKENIZER.decode(&tokens).len() <= text.len());
});
