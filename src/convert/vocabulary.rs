//! The tokenizer files of a checkpoint, as the keys of a GGUF file.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::error::ConvertError;
use crate::gguf::GgufHeader;
use crate::tokenizer::{Scheme, TokenKind, Vocabulary};

/// A vocabulary and how a chat is written with it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Language {
    pub(super) vocabulary: Vocabulary<'static>,
    pub(super) chat_template: Option<String>,
}

/// What the model's config says about the vocabulary.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    /// Rows of the embedding table.
    pub(super) len: u64,
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) pad: Option<u32>,
}

/// Reads `tokenizer.json` or `tokenizer.model`, and beside it `tokenizer_config.json` and the chat
/// template, which may be a file of its own.
pub(super) fn load(dir: &Path, wanted: Wanted) -> Result<Language, ConvertError> {
    let config_path = dir.join("tokenizer_config.json");
    let config_bytes = if_there(&config_path)?;
    let config: Value = match &config_bytes {
        Some(bytes) => json(&config_path, bytes)?,
        None => Value::Null,
    };
    let (path, mut vocabulary) = tokens(dir, config_bytes.as_deref())?;
    let wrong = |reason| ConvertError::Tokenizer { path: path.clone(), reason };
    let tokens = vocabulary.tokens.len() as u64;
    if tokens > wanted.len {
        let rows = wanted.len;
        return Err(wrong(format!("{tokens} tokens, but the embedding table has {rows} rows")));
    }
    vocabulary.pad_to(wanted.len as usize);
    name_specials(&mut vocabulary, &config, wanted);
    for id in [vocabulary.bos, vocabulary.eos, vocabulary.padding].into_iter().flatten() {
        if u64::from(id) >= wanted.len {
            let rows = wanted.len;
            return Err(wrong(format!("special token {id} is beyond the {rows} tokens")));
        }
    }
    Ok(Language { vocabulary, chat_template: chat_template(dir, &config)? })
}

/// `tokenizer.json` first, because it alone knows tokens that were added later; `tokenizer.model`
/// where there is none, or one of a kind that is not read.
fn tokens(
    dir: &Path,
    config: Option<&[u8]>,
) -> Result<(PathBuf, Vocabulary<'static>), ConvertError> {
    let path = dir.join("tokenizer.json");
    let mut why_not_json = ConvertError::Missing {
        path: path.clone(),
        reason: "and so is tokenizer.model: without one of them the model cannot read".to_owned(),
    };
    if let Some(bytes) = if_there(&path)? {
        match Vocabulary::from_tokenizer_json(&bytes, config) {
            Ok(vocabulary) => return Ok((path, vocabulary)),
            Err(error) => {
                why_not_json = ConvertError::Tokenizer { path, reason: error.to_string() };
            }
        }
    }
    let path = dir.join("tokenizer.model");
    let Some(bytes) = if_there(&path)? else { return Err(why_not_json) };
    match Vocabulary::from_tokenizer_model(&bytes) {
        Ok(vocabulary) => Ok((path, vocabulary)),
        Err(error) => Err(ConvertError::Tokenizer { path, reason: error.to_string() }),
    }
}

/// Special tokens by name from the tokenizer's config, else as the tokenizer's file has them, else
/// by id from the model's config.
fn name_specials(vocabulary: &mut Vocabulary, config: &Value, wanted: Wanted) {
    let named = |key: &str| {
        let value = &config[key];
        vocabulary.find(value.as_str().or_else(|| value["content"].as_str())?)
    };
    let (bos, eos, padding) = (named("bos_token"), named("eos_token"), named("pad_token"));
    vocabulary.bos = bos.or(vocabulary.bos).or(wanted.bos);
    vocabulary.eos = eos.or(vocabulary.eos).or(wanted.eos);
    vocabulary.padding = padding.or(vocabulary.padding).or(wanted.pad);
    let adds_bos = config["add_bos_token"].as_bool().unwrap_or(vocabulary.adds_bos);
    vocabulary.adds_bos = adds_bos && vocabulary.bos.is_some();
}

impl Language {
    /// Adds the keys to a header.
    pub(super) fn write(&self, header: &mut GgufHeader) {
        let vocabulary = &self.vocabulary;
        header.str("tokenizer.ggml.model", vocabulary.model_name());
        header.str("tokenizer.ggml.pre", vocabulary.splitter_name());
        header.strings("tokenizer.ggml.tokens", vocabulary.tokens.iter());
        let kind = |id| vocabulary.kinds.get(id).copied().unwrap_or(TokenKind::Normal) as i32;
        let kinds: Vec<i32> = (0..vocabulary.tokens.len()).map(kind).collect();
        header.i32s("tokenizer.ggml.token_type", &kinds);
        match &vocabulary.scheme {
            Scheme::BytePairs { merges, .. } => {
                header.strings("tokenizer.ggml.merges", merges.iter());
            }
            Scheme::SentencePiece { scores, space_prefix } => {
                header.f32s("tokenizer.ggml.scores", scores);
                header.bool("tokenizer.ggml.add_space_prefix", *space_prefix);
            }
        }
        let ids = [
            ("bos", vocabulary.bos),
            ("eos", vocabulary.eos),
            ("unknown", vocabulary.unknown),
            ("padding", vocabulary.padding),
        ];
        for (name, id) in ids {
            if let Some(id) = id {
                header.u32(&format!("tokenizer.ggml.{name}_token_id"), id);
            }
        }
        header.bool("tokenizer.ggml.add_bos_token", vocabulary.adds_bos);
        if let Some(template) = &self.chat_template {
            header.str("tokenizer.chat_template", template);
        }
    }
}

/// `chat_template.jinja` wins over the key, as in transformers; of several named ones `default`.
fn chat_template(dir: &Path, config: &Value) -> Result<Option<String>, ConvertError> {
    let path = dir.join("chat_template.jinja");
    if let Some(bytes) = if_there(&path)? {
        let text = String::from_utf8(bytes);
        let reason = "no UTF-8".to_owned();
        return text.map(Some).map_err(|_| ConvertError::Tokenizer { path, reason });
    }
    let path = dir.join("chat_template.json");
    let older = if_there(&path)?.map(|bytes| json(&path, &bytes)).transpose()?;
    let value = match &older {
        Some(older) => &older["chat_template"],
        None => &config["chat_template"],
    };
    let named = value.as_array().and_then(|list| {
        let default = list.iter().find(|entry| entry["name"] == "default");
        default.or(list.first()).map(|entry| &entry["template"])
    });
    Ok(named.unwrap_or(value).as_str().map(str::to_owned))
}

fn if_there(path: &Path) -> Result<Option<Vec<u8>>, ConvertError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(ConvertError::io(path)(error)),
    }
}

fn json(path: &Path, bytes: &[u8]) -> Result<Value, ConvertError> {
    serde_json::from_slice(bytes).map_err(|error| ConvertError::Tokenizer {
        path: path.to_path_buf(),
        reason: format!("no valid JSON: {error}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: Wanted = Wanted { len: 8, bos: None, eos: Some(1), pad: None };

    const TOKENIZER: &str = r#"{"added_tokens": [{"id": 4, "content": "<|bos|>", "special": true},
            {"id": 6, "content": "<tool>", "special": false}],
        "pre_tokenizer": {"type": "ByteLevel"},
        "post_processor": {"single": [{"SpecialToken": {"id": "<|bos|>"}}]},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3}, "merges": [["a", "b"]]}}"#;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    #[test]
    fn a_checkpoint_s_language() {
        let config = r#"{"bos_token": {"content": "<|bos|>"}, "chat_template": [
            {"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}"#;
        let dir = folder(&[("tokenizer.json", TOKENIZER), ("tokenizer_config.json", config)]);
        let found = load(dir.path(), WANTED).unwrap();
        let Language { vocabulary, chat_template } = &found;
        let texts = ["a", "b", "ab", "Ġ", "<|bos|>", "[PAD5]", "<tool>", "[PAD7]"];
        assert_eq!(vocabulary.tokens, texts);
        let kinds: Vec<u8> = vocabulary.kinds.iter().map(|&kind| kind as u8).collect();
        assert_eq!(kinds, [1, 1, 1, 1, 3, 5, 4, 5]);
        assert_eq!((vocabulary.bos, vocabulary.eos), (Some(4), Some(1)));
        assert!(vocabulary.adds_bos);
        assert_eq!(chat_template.as_deref(), Some("D"));
        fs::write(dir.path().join("chat_template.jinja"), "J").unwrap();
        assert_eq!(load(dir.path(), WANTED).unwrap().chat_template.as_deref(), Some("J"));
    }

    #[test]
    fn bad_tokenizers_are_named() {
        let check = |files: &[(&str, &str)], part: &str| {
            let dir = folder(files);
            let error = load(dir.path(), WANTED).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        check(&[], "tokenizer.json is missing, and so is tokenizer.model");
        check(&[("tokenizer.json", "{")], "tokenizer.json");
        check(&[("tokenizer.json", r#"{"model": {"type": "Unigram"}}"#)], "Unigram");
        check(&[("tokenizer.model", "IQ")], "tokenizer.model");
        check(&[("tokenizer.json", TOKENIZER), ("tokenizer_config.json", "[")], "no valid JSON");
        let many = TOKENIZER.replace(r#""Ġ": 3"#, r#""Ġ": 300"#);
        check(&[("tokenizer.json", &many)], "has 8 rows");
        let twice = TOKENIZER.replace(r#""Ġ": 3"#, r#""Ġ": 2"#);
        check(&[("tokenizer.json", &twice)], "the id 2");
    }
}
