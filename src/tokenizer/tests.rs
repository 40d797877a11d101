//! The tokenizer as a whole on small vocabularies: what it refuses, and what must come back.

use std::borrow::Cow;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

use super::{Decoder, Scheme, Specials, Splitter, TokenKind, Tokenizer, Vocabulary, alphabet};
use crate::gguf::{Gguf, GgufHeader};
use crate::units::TokenId;

/// All bytes, a few merges, and control tokens. The ids of the bytes are the bytes.
fn bytes_and_merges() -> Vocabulary<'static> {
    let merges = ["t h", "th e", "Ġ the", "a a", "aa aa", "Ġ Ġ", "ĠĠ ĠĠ"];
    let mut tokens: Vec<Cow<'static, str>> =
        (0..=u8::MAX).map(|byte| Cow::Owned(alphabet::char_of(byte).to_string())).collect();
    tokens.extend(merges.iter().map(|merge| Cow::Owned(merge.replace(' ', ""))));
    let mut kinds = vec![TokenKind::Normal; tokens.len()];
    for text in ["<|begin_of_text|>", "<|eot|>", "<|eom|>", "<|end_of_text|>"] {
        tokens.push(Cow::Borrowed(text));
        kinds.push(TokenKind::Control);
    }
    Vocabulary {
        scheme: Scheme::BytePairs {
            splitter: Splitter::O200k,
            merges: merges.map(Cow::Borrowed).into(),
        },
        tokens,
        kinds,
        bos: Some(263),
        eos: Some(264),
        unknown: None,
        padding: None,
        adds_bos: true,
        ends: Vec::new(),
    }
}

/// Llama 2 in small: unknown, bos, eos, byte tokens and a few pieces.
fn sentence_pieces() -> Vocabulary<'static> {
    let mut tokens: Vec<Cow<'static, str>> = ["<unk>", "<s>", "</s>"].map(Cow::Borrowed).into();
    let mut kinds = vec![TokenKind::Unknown, TokenKind::Control, TokenKind::Control];
    tokens.extend((0..=u8::MAX).map(|byte| Cow::Owned(format!("<0x{byte:02X}>"))));
    kinds.resize(tokens.len(), TokenKind::Byte);
    let pieces = ["▁", "a", "b", "▁a", "ab", "▁ab", "▁▁"];
    tokens.extend(pieces.map(Cow::Borrowed));
    kinds.resize(tokens.len(), TokenKind::Normal);
    let mut scores = vec![0.0; 259];
    scores.extend([-9.0, -9.0, -9.0, -2.0, -1.0, -3.0, -4.0]);
    Vocabulary {
        scheme: Scheme::SentencePiece { scores, space_prefix: true },
        tokens,
        kinds,
        bos: Some(1),
        eos: Some(2),
        unknown: Some(0),
        padding: None,
        adds_bos: true,
        ends: Vec::new(),
    }
}

fn ids(tokenizer: &Tokenizer, text: &str, specials: Specials) -> Vec<u32> {
    let tokens = tokenizer.encode(text, specials).expect("the text is short");
    tokens.into_iter().map(|token| token.0).collect()
}

#[test]
fn merges_in_order_and_parses_control_tokens_only_when_asked() {
    let tokenizer = Tokenizer::new(&bytes_and_merges()).unwrap();
    assert_eq!(ids(&tokenizer, "the the", Specials::Text), [257, 258]);
    assert_eq!(ids(&tokenizer, "aaaaa", Specials::Text), [260, 97]);
    assert_eq!(ids(&tokenizer, "<|eot|>", Specials::Parse), [264]);
    let as_text: Vec<u32> = b"<|eot|>".iter().copied().map(u32::from).collect();
    assert_eq!(ids(&tokenizer, "<|eot|>", Specials::Text), as_text);
    let stops: Vec<u32> = tokenizer.stop_tokens().iter().map(|token| token.0).collect();
    assert_eq!(stops, [264, 266, 265]);
    assert_eq!((tokenizer.bos(), tokenizer.adds_bos()), (Some(TokenId(263)), true));
    assert_eq!(tokenizer.find_control("x<|eom|>", 0), Some(1..8));
    assert!(tokenizer.is_control(TokenId(264)) && !tokenizer.is_control(TokenId(0)));
    assert!(tokenizer.is_control(TokenId(267)), "beyond the vocabulary");
}

#[test]
fn sentence_pieces_join_by_score() {
    let tokenizer = Tokenizer::new(&sentence_pieces()).unwrap();
    // `ab` scores above `▁a`, and `▁ab` is then joined from `▁` and `ab`.
    assert_eq!(ids(&tokenizer, "ab a", Specials::Text), [264, 262]);
    assert_eq!(ids(&tokenizer, "  a", Specials::Text), [265, 262]);
    // U+2581 is a blank; a character without piece falls apart into bytes.
    assert_eq!(ids(&tokenizer, "▁é", Specials::Text), [265, 3 + 0xC3, 3 + 0xA9]);
    assert_eq!(ids(&tokenizer, "", Specials::Text), [0u32; 0]);
    assert_eq!(ids(&tokenizer, "a</s>a", Specials::Parse), [262, 2, 262]);
    assert_eq!(tokenizer.decode(&tokenizer.encode("a</s>a", Specials::Parse).unwrap()), "aa");
    assert!(!ids(&tokenizer, "a</s>a<0x0A>", Specials::Text).contains(&2));
}

#[test]
fn decoding_gives_whole_characters() {
    let tokenizer = Tokenizer::new(&bytes_and_merges()).unwrap();
    let mut decoder = Decoder::new();
    let mut steps = Vec::new();
    let stream = "é".bytes().chain(*b"x").chain("😀".bytes()).map(u32::from);
    for token in stream.chain([0xFF, 0xE2, 0x82, 264]) {
        let mut text = String::new();
        decoder.push(&tokenizer, TokenId(token), &mut text);
        steps.push(text);
    }
    assert_eq!(steps, ["", "é", "x", "", "", "", "😀", "\u{FFFD}", "", "", "\u{FFFD}"]);
    assert!(!decoder.is_holding());
}

fn check_refused(vocabulary: &Vocabulary<'_>, message: &str) {
    let error = Tokenizer::new(vocabulary).expect_err(message).to_string();
    assert_eq!(error, message);
}

#[test]
fn contradictions_are_named() {
    let change = |change: &dyn Fn(&mut Vocabulary<'static>)| {
        let mut vocabulary = bytes_and_merges();
        change(&mut vocabulary);
        vocabulary
    };
    let with_merges = |merges: &'static [&'static str]| {
        change(&|vocabulary| {
            let merges = merges.iter().copied().map(Cow::Borrowed).collect();
            vocabulary.scheme = Scheme::BytePairs { splitter: Splitter::Gpt2, merges };
        })
    };
    check_refused(&with_merges(&[]), "the vocabulary has no merges (`tokenizer.ggml.merges`)");
    check_refused(
        &with_merges(&["t h", "thx"]),
        "merge 1 is not two tokens that join into a token: \"thx\"",
    );
    check_refused(
        &with_merges(&["t x"]),
        "merge 0 is not two tokens that join into a token: \"t x\"",
    );
    check_refused(
        &change(&|vocabulary| vocabulary.kinds[257] = TokenKind::Control),
        "merge 1 makes the control token \"the\"",
    );
    check_refused(
        &change(&|vocabulary| vocabulary.tokens[257] = Cow::Borrowed("a")),
        "tokens 97 and 257 have the same text \"a\"",
    );
    check_refused(
        &change(&|vocabulary| vocabulary.kinds.truncate(3)),
        "`tokenizer.ggml.token_type` has 3 entries for 267 tokens",
    );
    check_refused(
        &change(&|vocabulary| vocabulary.eos = Some(267)),
        "`tokenizer.ggml.eos_token_id` is beyond the 267 tokens: 267",
    );
    check_refused(
        &change(&|vocabulary| vocabulary.tokens.clear()),
        "the vocabulary has no tokens (`tokenizer.ggml.tokens`)",
    );
    check_refused(
        &change(&|vocabulary| vocabulary.tokens[266] = Cow::Owned("x".repeat(5000))),
        "token 266 has 5000 bytes, more than 256",
    );
    let mut pieces = sentence_pieces();
    pieces.scheme = Scheme::SentencePiece { scores: vec![0.0; 5], space_prefix: true };
    check_refused(&pieces, "`tokenizer.ggml.scores` has 5 entries for 266 tokens");
    pieces.scheme = Scheme::SentencePiece { scores: vec![f32::NAN; 266], space_prefix: true };
    check_refused(&pieces, "the score of token 0 is not a number");
    pieces.tokens[7] = Cow::Borrowed("<0x+4>");
    check_refused(&pieces, "byte token 7 is not written `<0xNN>`: \"<0x+4>\"");
}

/// A GGUF header with this vocabulary, and what `change` adds.
fn gguf_of(vocabulary: &Vocabulary<'_>, model: &str, pre: &str) -> Vec<u8> {
    let mut header = GgufHeader::new(32);
    header.str("general.architecture", "llama");
    header.str("tokenizer.ggml.model", model).str("tokenizer.ggml.pre", pre);
    header.strings("tokenizer.ggml.tokens", vocabulary.tokens.iter());
    let kinds: Vec<i32> = vocabulary.kinds.iter().map(|kind| *kind as i32).collect();
    header.i32s("tokenizer.ggml.token_type", &kinds);
    match &vocabulary.scheme {
        Scheme::BytePairs { merges, .. } => {
            header.strings("tokenizer.ggml.merges", merges.iter());
        }
        Scheme::SentencePiece { scores, .. } => {
            header.f32s("tokenizer.ggml.scores", scores);
        }
    }
    header.u32("tokenizer.ggml.bos_token_id", vocabulary.bos.expect("the samples have one"));
    header.u32("tokenizer.ggml.eos_token_id", vocabulary.eos.expect("the samples have one"));
    header.bool("tokenizer.ggml.add_bos_token", vocabulary.adds_bos);
    let writer = header.start(Vec::new()).expect("memory does not fail");
    writer.finish().expect("memory does not fail")
}

#[test]
fn a_gguf_gives_the_vocabulary_back() {
    for (mut vocabulary, unknown) in [(bytes_and_merges(), None), (sentence_pieces(), Some(0))] {
        let bytes = gguf_of(&vocabulary, vocabulary.model_name(), vocabulary.splitter_name());
        let gguf = Gguf::parse(&bytes).unwrap();
        // The kind says which token is the unknown one; the key was left out.
        assert_eq!(vocabulary.unknown, unknown);
        vocabulary.unknown = None;
        assert_eq!(Vocabulary::from_gguf(gguf.metadata()).unwrap(), vocabulary);
        Tokenizer::from_gguf(gguf.metadata()).unwrap();
    }
}

#[test]
fn unknown_kinds_are_named_with_what_is_supported() {
    let refuse = |model, pre| {
        let bytes = gguf_of(&bytes_and_merges(), model, pre);
        Tokenizer::from_gguf(Gguf::parse(&bytes).unwrap().metadata()).unwrap_err().to_string()
    };
    let model = "unknown tokenizer model (supported: `gpt2`, `llama`): \"bert\"";
    assert_eq!(refuse("bert", "default"), model);
    let error = refuse("gpt2", "tekken");
    assert!(error.starts_with("unknown pre-tokenizer (supported: `default`, `gpt-2`"), "{error}");
    assert!(error.ends_with(": \"tekken\""), "{error}");
}

#[test]
fn long_words_and_long_blanks_take_bounded_time() {
    let tokenizer = Tokenizer::new(&bytes_and_merges()).unwrap();
    let pieces = Tokenizer::new(&sentence_pieces()).unwrap();
    let begin = Instant::now();
    // Quadratic merging of the first would take hours, n log n takes seconds without optimization.
    for text in ["a".repeat(1 << 18), " ".repeat(1 << 18) + "x", "the ".repeat(1 << 16)] {
        for tokenizer in [&tokenizer, &pieces] {
            let tokens = tokenizer.encode(&text, Specials::Text).unwrap();
            assert_eq!(tokenizer.decode(&tokens), text);
        }
    }
    assert!(begin.elapsed() < Duration::from_secs(120), "{:?}", begin.elapsed());
    let error = tokenizer.encode(&"a".repeat((1 << 20) + 1), Specials::Text).unwrap_err();
    assert_eq!(error.to_string(), "a word of 1048577 bytes exceeds the limit of 1048576");
    let error = tokenizer.encode(&"a ".repeat(9 << 20), Specials::Text).unwrap_err();
    assert_eq!(error.to_string(), "a text of 18874368 bytes exceeds the limit of 16777216");
}

static BYTES: LazyLock<Tokenizer> =
    LazyLock::new(|| Tokenizer::new(&bytes_and_merges()).expect("the sample is sound"));
static PIECES: LazyLock<Tokenizer> =
    LazyLock::new(|| Tokenizer::new(&sentence_pieces()).expect("the sample is sound"));

proptest! {
    #[test]
    fn text_comes_back(text in any::<String>(), blanks in "[ \\n\\ta▁]{0,80}") {
        let tokenizer = &*BYTES;
        for text in [text.clone() + &blanks, blanks + &text] {
            let tokens = tokenizer.encode(&text, Specials::Text).unwrap();
            prop_assert!(tokens.iter().all(|token| !tokenizer.is_control(*token)));
            prop_assert_eq!(tokenizer.decode(&tokens), text);
        }
    }

    #[test]
    fn sentence_pieces_come_back(text in "[ ab▁é\\n</s>]{0,60}") {
        let tokenizer = &*PIECES;
        let tokens = tokenizer.encode(&text, Specials::Text).unwrap();
        prop_assert!(tokens.iter().all(|token| !tokenizer.is_control(*token)));
        prop_assert_eq!(tokenizer.decode(&tokens), text.replace('▁', " "));
    }
}
