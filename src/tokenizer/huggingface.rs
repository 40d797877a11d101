//! Hugging Face's `tokenizer.json`. Only pipelines that are built in are read; any other is refused
//! by name, because guessing at one gives ids that are wrong here and there.

use std::borrow::Cow;

use rustc_hash::FxHashMap;
use serde_json::Value;

use super::import::{ImportError, json};
use super::split::Splitter;
use super::vocabulary::{Scheme, TokenKind, Vocabulary};

/// Reads `tokenizer.json` and, if there is one, `tokenizer_config.json`.
pub(super) fn read(
    tokenizer: &[u8],
    config: Option<&[u8]>,
) -> Result<Vocabulary<'static>, ImportError> {
    let tokenizer = json(FILE, tokenizer)?;
    let config = match config {
        Some(bytes) => json("tokenizer_config.json", bytes)?,
        None => Value::Null,
    };
    let model = &tokenizer["model"];
    if model["type"].as_str().is_some_and(|kind| kind != "BPE") {
        return Err(not_supported("model type", &model["type"]));
    }
    for key in ["dropout", "continuing_subword_prefix", "end_of_word_suffix"] {
        if !matches!(&model[key], Value::Null) && model[key] != "" {
            return Err(not_supported(key, &model[key]));
        }
    }
    let added = added_tokens(&tokenizer)?;
    let (tokens, kinds) = tokens(model, &added)?;
    let find = |text: &str| tokens.iter().position(|token| token == text).map(|at| at as u32);
    let named = |key: &str| name_of(&config[key]).and_then(find);
    let (bos, eos, padding) = (named("bos_token"), named("eos_token"), named("pad_token"));
    let unknown = name_of(&config["unk_token"]).or(model["unk_token"].as_str()).and_then(find);
    let adds_bos = config["add_bos_token"].as_bool().unwrap_or_else(|| {
        bos.is_some_and(|bos| starts_with(&tokenizer["post_processor"], &tokens[bos as usize]))
    });
    let merges = merges(model)?;
    let is_bytes = model["byte_fallback"].as_bool() != Some(true);
    let scheme = if is_bytes {
        let splitter = splitter(&tokenizer)?;
        let whole_first = model["ignore_merges"].as_bool() == Some(true);
        // For O200K both give the same ids: merging reaches every token.
        if whole_first != splitter.takes_whole_pieces() && splitter != Splitter::O200k {
            return Err(not_supported("ignore_merges", &model["ignore_merges"]));
        }
        Scheme::BytePairs { splitter, merges }
    } else {
        let space_prefix = space_prefix(&tokenizer)?;
        Scheme::SentencePiece { scores: scores(&tokens, &merges), space_prefix }
    };
    let mut vocabulary = Vocabulary {
        scheme,
        tokens,
        kinds,
        bos,
        eos,
        unknown,
        padding,
        adds_bos,
        ends: Vec::new(),
    };
    if !is_bytes {
        mark_bytes(&mut vocabulary);
    }
    Ok(vocabulary)
}

struct Added {
    id: usize,
    text: String,
    is_control: bool,
}

fn added_tokens(tokenizer: &Value) -> Result<Vec<Added>, ImportError> {
    let entries = tokenizer["added_tokens"].as_array().map(Vec::as_slice).unwrap_or_default();
    let added = entries.iter().map(|entry| {
        let id = entry["id"].as_u64().and_then(|id| usize::try_from(id).ok());
        let (Some(id), Some(text)) = (id, entry["content"].as_str()) else {
            return Err(malformed("an added token has no id or no content"));
        };
        let is_control = entry["special"].as_bool() == Some(true);
        Ok(Added { id, text: text.to_owned(), is_control })
    });
    added.collect()
}

/// The texts and kinds of all tokens; ids that the file leaves out become unused tokens.
fn tokens(
    model: &Value,
    added: &[Added],
) -> Result<(Vec<Cow<'static, str>>, Vec<TokenKind>), ImportError> {
    let vocab = model["vocab"].as_object().ok_or_else(|| malformed("no `model.vocab`"))?;
    let mut by_id: Vec<(usize, &str, TokenKind)> = Vec::with_capacity(vocab.len() + added.len());
    for (text, id) in vocab {
        let id = id.as_u64().and_then(|id| usize::try_from(id).ok());
        let id = id.ok_or_else(|| malformed("an id in `model.vocab` is not a number"))?;
        by_id.push((id, text, TokenKind::Normal));
    }
    for token in added {
        let kind = if token.is_control { TokenKind::Control } else { TokenKind::UserDefined };
        by_id.push((token.id, &token.text, kind));
    }
    // Stable, so that an added token comes after the entry of the vocabulary that it describes.
    by_id.sort_by_key(|(id, _, _)| *id);
    let count = by_id.last().map_or(0, |(id, _, _)| id.saturating_add(1));
    if count > IDS_MAX {
        return Err(malformed(&format!("an id beyond {IDS_MAX}")));
    }
    let mut tokens: Vec<Cow<'static, str>> = Vec::with_capacity(count);
    let mut kinds = Vec::with_capacity(count);
    for (id, text, kind) in by_id {
        while tokens.len() < id {
            tokens.push(Cow::Owned(format!("[PAD{}]", tokens.len())));
            kinds.push(TokenKind::Unused);
        }
        if tokens.len() == id {
            tokens.push(Cow::Owned(text.to_owned()));
            kinds.push(kind);
        } else if tokens[id] == text {
            kinds[id] = kind;
        } else {
            return Err(malformed(&format!("two tokens have the id {id}")));
        }
    }
    Ok((tokens, kinds))
}

/// The merges as `left right`, which newer files write as pairs.
fn merges(model: &Value) -> Result<Vec<Cow<'static, str>>, ImportError> {
    let merges = model["merges"].as_array().ok_or_else(|| malformed("no `model.merges`"))?;
    let merge = |merge: &Value| {
        let pair = merge.as_array().map(Vec::as_slice);
        let text = match (merge.as_str(), pair) {
            (Some(text), _) => text.to_owned(),
            (None, Some([left, right])) => format!("{} {}", left.as_str()?, right.as_str()?),
            _ => return None,
        };
        Some(Cow::Owned(text))
    };
    let malformed = || malformed("a merge is not a pair of texts");
    merges.iter().map(|value| merge(value).ok_or_else(malformed)).collect()
}

/// Recognizes the splitter of a byte-level pipeline.
fn splitter(tokenizer: &Value) -> Result<Splitter, ImportError> {
    if !tokenizer["normalizer"].is_null() {
        return Err(not_supported("normalizer", &tokenizer["normalizer"]));
    }
    let pipeline = &tokenizer["pre_tokenizer"];
    let steps = match pipeline["pretokenizers"].as_array() {
        Some(steps) => steps.as_slice(),
        None => std::slice::from_ref(pipeline),
    };
    let is_gpt2 = |step: &Value| is_byte_level(step) && step["use_regex"] != false;
    let found = match steps {
        [bytes] if is_gpt2(bytes) => Some(Splitter::Gpt2),
        [digits, bytes] if digits["type"] == "Digits" && is_gpt2(bytes) => {
            (digits["individual_digits"] == true).then_some(Splitter::SmolLm)
        }
        [split, bytes] if split["type"] == "Split" && is_byte_level(bytes) => {
            let is_plain = split["behavior"] == "Isolated" && split["invert"] != true;
            let pattern = split["pattern"]["Regex"].as_str().filter(|_| is_plain);
            pattern.filter(|_| bytes["use_regex"] == false).and_then(Splitter::from_pattern)
        }
        _ => None,
    };
    found.ok_or_else(|| not_supported("pre_tokenizer", pipeline))
}

fn is_byte_level(step: &Value) -> bool {
    step["type"] == "ByteLevel" && step["add_prefix_space"] != true
}

/// Recognizes Llama 2's pipeline: `▁` for blanks, and perhaps one before the text.
fn space_prefix(tokenizer: &Value) -> Result<bool, ImportError> {
    let (normalizer, pre) = (&tokenizer["normalizer"], &tokenizer["pre_tokenizer"]);
    if normalizer.is_null() && pre["type"] == "Metaspace" && pre["split"] == false {
        return Ok(pre["prepend_scheme"] != "never");
    }
    let is_replace = |step: &Value| {
        step["type"] == "Replace" && step["pattern"]["String"] == " " && step["content"] == "▁"
    };
    let steps = normalizer["normalizers"].as_array().map(Vec::as_slice);
    match steps {
        Some([prepend, replace])
            if prepend["type"] == "Prepend" && prepend["prepend"] == "▁" && is_replace(replace) =>
        {
            Ok(true)
        }
        None if is_replace(normalizer) => Ok(false),
        _ => Err(not_supported("normalizer", normalizer)),
    }
}

/// Scores in the order of the merges: what is joined first scores highest.
fn scores(tokens: &[Cow<'static, str>], merges: &[Cow<'static, str>]) -> Vec<f32> {
    let mut ranks: FxHashMap<String, usize> = FxHashMap::default();
    for (rank, merge) in merges.iter().enumerate() {
        ranks.entry(merge.replacen(' ', "", 1)).or_insert(rank);
    }
    let score = |text: &str| ranks.get(text).map_or(UNMERGED_SCORE, |rank| -(*rank as f32));
    tokens.iter().map(|text| score(text)).collect()
}

/// Byte tokens are ordinary entries of this format.
fn mark_bytes(vocabulary: &mut Vocabulary<'_>) {
    for (text, kind) in vocabulary.tokens.iter().zip(&mut vocabulary.kinds) {
        let is_byte = text.len() == 6 && text.starts_with("<0x") && text.ends_with('>');
        if is_byte && *kind == TokenKind::Normal {
            *kind = TokenKind::Byte;
        }
    }
    if let Some(id) = vocabulary.unknown {
        vocabulary.kinds[id as usize] = TokenKind::Unknown;
    }
}

/// A token in `tokenizer_config.json`: its text, or an object with its text.
fn name_of(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

/// Whether a post-processor puts `token` before a text.
fn starts_with(post: &Value, token: &str) -> bool {
    let nested = post["processors"].as_array().map(Vec::as_slice).unwrap_or_default();
    post["single"][0]["SpecialToken"]["id"] == token
        || nested.iter().any(|processor| starts_with(processor, token))
}

fn malformed(reason: &str) -> ImportError {
    ImportError::Malformed { file: FILE, reason: reason.to_owned() }
}

fn not_supported(key: &str, value: &Value) -> ImportError {
    let value: String = value.to_string().chars().take(200).collect();
    ImportError::NotSupported { file: FILE, what: format!("{key} {value}") }
}

const FILE: &str = "tokenizer.json";
const IDS_MAX: usize = 1 << 20;
/// Below every rank: a token that no merge makes.
const UNMERGED_SCORE: f32 = -1e9;
