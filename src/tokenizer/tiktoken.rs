//! tiktoken's list of ranks, the `tokenizer.model` of Llama 3 and Llama 4: a line per token, its
//! bytes in base64 and its rank, which is its id. The file holds neither merges nor control tokens.

use std::borrow::Cow;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustc_hash::FxHashMap;

use super::alphabet;
use super::import::ImportError;
use super::split::Splitter;
use super::vocabulary::{Scheme, TokenKind, Vocabulary};

/// Whether a file begins like such a list.
pub(super) fn looks_like(bytes: &[u8]) -> bool {
    let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
    parse_line(line).is_some()
}

/// Reads the list and adds the control tokens of the model that it belongs to.
pub(super) fn read(bytes: &[u8]) -> Result<Vocabulary<'static>, ImportError> {
    let tokens = ranks(bytes)?;
    let (splitter, specials) = match tokens.len() {
        LLAMA3_RANKS => (Splitter::Llama3, llama3_specials()),
        LLAMA4_RANKS => (Splitter::O200k, llama4_specials()),
        count => {
            let what = format!(
                "a list of {count} ranks (Llama 3 has {LLAMA3_RANKS}, Llama 4 {LLAMA4_RANKS})"
            );
            return Err(ImportError::NotSupported { file: FILE, what });
        }
    };
    Ok(vocabulary(splitter, &tokens, specials))
}

/// The vocabulary of ranked tokens, followed by control tokens.
fn vocabulary(
    splitter: Splitter,
    ranked: &[Vec<u8>],
    specials: Vec<String>,
) -> Vocabulary<'static> {
    let merges = merges(ranked);
    let mut kinds = vec![TokenKind::Normal; ranked.len()];
    kinds.resize(ranked.len() + specials.len(), TokenKind::Control);
    let texts = ranked.iter().map(|bytes| alphabet::text_of(bytes)).chain(specials);
    let mut vocabulary = Vocabulary {
        scheme: Scheme::BytePairs { splitter, merges },
        tokens: texts.map(Cow::Owned).collect(),
        kinds,
        bos: None,
        eos: None,
        unknown: None,
        padding: None,
        adds_bos: true,
        ends: Vec::new(),
    };
    let find = |texts: [&str; 2]| texts.into_iter().find_map(|text| vocabulary.find(text));
    let bos = find(["<|begin_of_text|>"; 2]);
    let eos = find(["<|eot_id|>", "<|eot|>"]);
    let padding = find(["<|finetune_right_pad_id|>", "<|finetune_right_pad|>"]);
    (vocabulary.bos, vocabulary.eos, vocabulary.padding) = (bos, eos, padding);
    vocabulary
}

/// The bytes of each token, by rank.
fn ranks(bytes: &[u8]) -> Result<Vec<Vec<u8>>, ImportError> {
    let mut tokens = Vec::new();
    for (at, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
        if line.is_empty() {
            continue;
        }
        let malformed = |reason: String| ImportError::Malformed { file: FILE, reason };
        let (token, rank) = parse_line(line)
            .ok_or_else(|| malformed(format!("line {} is not `BASE64 RANK`", at + 1)))?;
        if rank != tokens.len() {
            return Err(malformed(format!("rank {} expected in line {}", tokens.len(), at + 1)));
        }
        tokens.push(token);
    }
    Ok(tokens)
}

fn parse_line(line: &[u8]) -> Option<(Vec<u8>, usize)> {
    let (token, rank) = std::str::from_utf8(line).ok()?.trim_end().split_once(' ')?;
    Some((STANDARD.decode(token).ok()?, rank.parse().ok()?))
}

/// All pairs of tokens whose join is a token, by the rank of the result: the order in which tiktoken
/// merges. For one result the pairs stand together, by the ranks of their parts.
fn merges(ranked: &[Vec<u8>]) -> Vec<Cow<'static, str>> {
    let ids: FxHashMap<&[u8], u32> = ranked.iter().map(Vec::as_slice).zip(0..).collect();
    let mut merges = Vec::with_capacity(2 * ranked.len());
    let mut splits = Vec::new();
    for token in ranked {
        splits.clear();
        splits.extend((1..token.len()).filter_map(|at| {
            let (left, right) = token.split_at(at);
            Some((*ids.get(left)?, *ids.get(right)?, at))
        }));
        splits.sort_unstable();
        merges.extend(splits.iter().map(|(_, _, at)| {
            let (left, right) = token.split_at(*at);
            Cow::Owned(alphabet::text_of(left) + " " + &alphabet::text_of(right))
        }));
    }
    merges
}

/// The 256 control tokens after Llama 3's ranks (`llama_models/llama3/tokenizer.py`).
fn llama3_specials() -> Vec<String> {
    let mut names: Vec<String> = [
        "begin_of_text",
        "end_of_text",
        "reserved_special_token_0",
        "reserved_special_token_1",
        "finetune_right_pad_id",
        "step_id",
        "start_header_id",
        "end_header_id",
        "eom_id",
        "eot_id",
        "python_tag",
        "image",
    ]
    .map(String::from)
    .into();
    let reserved = 256 - names.len();
    names.extend((2..2 + reserved).map(|at| format!("reserved_special_token_{at}")));
    in_bars(names)
}

/// The 2048 control tokens after Llama 4's ranks (`llama_models/llama4/tokenizer.py`).
fn llama4_specials() -> Vec<String> {
    let reserved = |prefix: &str, range: std::ops::Range<usize>| {
        range.map(|at| format!("{prefix}reserved_special_token_{at}")).collect::<Vec<_>>()
    };
    let named = |names: &[&str]| names.iter().copied().map(String::from).collect::<Vec<_>>();
    let mut names = [
        named(&["begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix"]),
        named(&["header_start", "header_end", "eom", "eot", "step"]),
        reserved("text_post_train_", 0..6),
        named(&["python_start", "python_end", "finetune_right_pad"]),
        reserved("text_post_train_", 8..69),
        named(&["image_start", "image_end"]),
        reserved("vision_", 0..2),
        named(&["tile_x_separator", "tile_y_separator"]),
        reserved("vision_", 2..6),
        named(&["image"]),
        reserved("vision_", 6..7),
        named(&["patch"]),
        reserved("vision_", 7..1048),
        reserved("reasoning_", 0..8),
        named(&["reasoning_thinking_start", "reasoning_thinking_end"]),
    ]
    .concat();
    names.extend(reserved("", 0..2048 - names.len()));
    in_bars(names)
}

fn in_bars(names: Vec<String>) -> Vec<String> {
    names.into_iter().map(|name| format!("<|{name}|>")).collect()
}

const FILE: &str = "tokenizer.model";
const LLAMA3_RANKS: usize = 128_000;
const LLAMA4_RANKS: usize = 200_000;

#[cfg(test)]
mod tests {
    use super::{llama3_specials, llama4_specials, looks_like, merges, ranks, read};

    #[test]
    fn control_tokens_have_their_ids() {
        let llama3 = llama3_specials();
        assert_eq!(llama3.len(), 256);
        assert_eq!(llama3[9], "<|eot_id|>");
        assert_eq!(llama3[255], "<|reserved_special_token_245|>");
        let llama4 = llama4_specials();
        assert_eq!(llama4.len(), 2048);
        let expected = [
            (8, "<|eot|>"),
            (16, "<|python_start|>"),
            (18, "<|finetune_right_pad|>"),
            (79, "<|text_post_train_reserved_special_token_68|>"),
            (80, "<|image_start|>"),
            (90, "<|image|>"),
            (92, "<|patch|>"),
            (1143, "<|reasoning_thinking_end|>"),
            (1144, "<|reserved_special_token_0|>"),
        ];
        for (id, text) in expected {
            assert_eq!(llama4[id], text);
        }
    }

    #[test]
    fn merges_are_all_splits_by_rank() {
        let ranked = [b"a".as_slice(), b"b", b" ", b"ab", b" a", b" ab"].map(<[u8]>::to_vec);
        assert_eq!(merges(&ranked), ["a b", "Ġ a", "Ġ ab", "Ġa b"]);
    }

    #[test]
    fn lists_are_recognized_and_checked() {
        assert!(looks_like(b"IQ== 0\nIg== 1\n"));
        assert!(!looks_like(b"\x0a\x0e\x0a\x05<unk>"));
        assert_eq!(ranks(b"IQ== 0\nIg== 1\n").unwrap(), [b"!", b"\""]);
        let error = ranks(b"IQ== 0\nIg== 2\n").unwrap_err();
        assert_eq!(error.to_string(), "tokenizer.model: rank 1 expected in line 2");
        let error = read(b"IQ== 0\n").unwrap_err().to_string();
        assert!(error.contains("a list of 1 ranks (Llama 3 has 128000"), "{error}");
    }
}
