//! The tokenizer files of a checkpoint, as the keys of a GGUF file.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::error::ConvertError;
use super::sentencepiece;
use crate::gguf::GgufHeader;

/// `tokenizer.*` of a GGUF file.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Vocabulary {
    /// `gpt2` or `llama`.
    pub(super) model: &'static str,
    pub(super) pre: &'static str,
    pub(super) tokens: Vec<String>,
    /// 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte.
    pub(super) kinds: Vec<i32>,
    /// Byte pairs, best first.
    pub(super) merges: Vec<String>,
    /// SentencePiece only.
    pub(super) scores: Vec<f32>,
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) pad: Option<u32>,
    pub(super) unknown: Option<u32>,
    pub(super) adds_bos: bool,
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

/// Reads `tokenizer.json` or a SentencePiece `tokenizer.model`, and beside it
/// `tokenizer_config.json` and `chat_template.jinja`.
pub(super) fn load(dir: &Path, wanted: Wanted) -> Result<Vocabulary, ConvertError> {
    let (path, mut vocabulary) = tokens(dir)?;
    let config_path = dir.join("tokenizer_config.json");
    let config = json_if_there(&config_path)?.unwrap_or(Value::Null);
    let wrong = |reason| ConvertError::Tokenizer { path: path.clone(), reason };
    vocabulary.fit(wanted.len).map_err(wrong)?;
    vocabulary.mark_specials(&config, wanted);
    if let Some(adds_bos) = config.get("add_bos_token").and_then(Value::as_bool) {
        vocabulary.adds_bos = adds_bos;
    }
    vocabulary.adds_bos &= vocabulary.bos.is_some();
    let last = vocabulary.tokens.len() as u32;
    for id in [vocabulary.bos, vocabulary.eos, vocabulary.pad].into_iter().flatten() {
        if id >= last {
            return Err(wrong(format!("special token {id} is beyond the {last} tokens")));
        }
    }
    vocabulary.chat_template = chat_template(dir, &config)?;
    Ok(vocabulary)
}

fn tokens(dir: &Path) -> Result<(PathBuf, Vocabulary), ConvertError> {
    let path = dir.join("tokenizer.json");
    let mut why_not_json = None;
    if let Some(json) = json_if_there(&path)? {
        match from_json(&json) {
            Ok(vocabulary) => return Ok((path, vocabulary)),
            Err(reason) => why_not_json = Some(ConvertError::Tokenizer { path, reason }),
        }
    }
    let path = dir.join("tokenizer.model");
    if path.exists() {
        let bytes = std::fs::read(&path).map_err(ConvertError::io(&path))?;
        let model = sentencepiece::parse(&bytes);
        let model =
            model.map_err(|reason| ConvertError::Tokenizer { path: path.clone(), reason })?;
        return Ok((path, from_sentencepiece(model)));
    }
    Err(why_not_json.unwrap_or_else(|| ConvertError::Missing {
        path: dir.join("tokenizer.json"),
        reason: "and so is tokenizer.model: without one of them the model cannot read".to_owned(),
    }))
}

fn from_sentencepiece(model: sentencepiece::Model) -> Vocabulary {
    Vocabulary {
        model: "llama",
        pre: "default",
        tokens: model.pieces.iter().map(|piece| piece.text.clone()).collect(),
        kinds: model.pieces.iter().map(|piece| piece.kind).collect(),
        scores: model.pieces.iter().map(|piece| piece.score).collect(),
        bos: model.bos,
        eos: model.eos,
        unknown: model.unknown,
        adds_bos: true,
        ..Vocabulary::default()
    }
}

/// A byte-level BPE `tokenizer.json`.
fn from_json(json: &Value) -> Result<Vocabulary, String> {
    let model = json.get("model").ok_or("no `model`")?;
    match model.get("type").and_then(Value::as_str) {
        Some("BPE") | None => {}
        Some(other) => return Err(format!("model type `{other}` is not supported, only BPE")),
    }
    if model.get("byte_fallback").and_then(Value::as_bool) == Some(true) {
        return Err(
            "a SentencePiece vocabulary without its scores; tokenizer.model has them, and \
                    is not there"
                .to_owned(),
        );
    }
    let entries = model.get("vocab").and_then(Value::as_object).ok_or("no `model.vocab`")?;
    let added = json.get("added_tokens").and_then(Value::as_array);
    let mut list: Vec<Option<(String, i32)>> = Vec::new();
    let mut put = |id: &Value, text: &str, kind| {
        let id = id.as_u64().filter(|&id| id < TOKENS_MAX as u64);
        let id = id.ok_or_else(|| format!("token `{text}` has no valid id"))? as usize;
        if list.len() <= id {
            list.resize(id + 1, None);
        }
        match &list[id] {
            Some((other, _)) if other != text => Err(format!("`{other}` and `{text}` share {id}")),
            _ => {
                list[id] = Some((text.to_owned(), kind));
                Ok(())
            }
        }
    };
    for (text, id) in entries {
        put(id, text, NORMAL)?;
    }
    for token in added.into_iter().flatten() {
        let text =
            token.get("content").and_then(Value::as_str).ok_or("added token without text")?;
        let special = token.get("special").and_then(Value::as_bool) == Some(true);
        let id = token.get("id").unwrap_or(&Value::Null);
        put(id, text, if special { CONTROL } else { USER_DEFINED })?;
    }
    let mut vocabulary = Vocabulary { model: "gpt2", ..Vocabulary::default() };
    for (id, token) in list.into_iter().enumerate() {
        let (text, kind) = token.unwrap_or_else(|| padding(id));
        vocabulary.tokens.push(text);
        vocabulary.kinds.push(kind);
    }
    vocabulary.pre = splitter(json.get("pre_tokenizer").unwrap_or(&Value::Null))?;
    vocabulary.merges = merges(model.get("merges").ok_or("no `model.merges`")?)?;
    vocabulary.adds_bos = begins_with_special(json.get("post_processor").unwrap_or(&Value::Null));
    Ok(vocabulary)
}

/// Merges as `"a b"` or, in newer files, `["a", "b"]`.
fn merges(value: &Value) -> Result<Vec<String>, String> {
    let list = value.as_array().ok_or("`model.merges` is no list")?;
    let one = |merge: &Value| match merge {
        Value::String(text) => Ok(text.clone()),
        Value::Array(pair) => match pair.as_slice() {
            // The key joins them by a blank, so neither may hold one; in the byte alphabet none does.
            [Value::String(a), Value::String(b)] if !a.contains(' ') && !b.contains(' ') => {
                Ok(format!("{a} {b}"))
            }
            _ => Err(format!("merge {merge} is no pair")),
        },
        _ => Err(format!("merge {merge} is no pair")),
    };
    list.iter().map(one).collect()
}

/// The value of `tokenizer.ggml.pre`: llama.cpp finds it by hashing the ids of a test text, here it
/// is read from the pattern.
fn splitter(pre_tokenizer: &Value) -> Result<&'static str, String> {
    let parts = match pre_tokenizer.get("pretokenizers").and_then(Value::as_array) {
        Some(parts) => parts.iter().collect(),
        None => vec![pre_tokenizer],
    };
    let kind = |part: &Value| part.get("type").and_then(Value::as_str).unwrap_or("").to_owned();
    let pattern = parts.iter().find_map(|part| part.get("pattern")?.get("Regex")?.as_str());
    let by_bytes = |part: &&Value| {
        kind(part) == "ByteLevel" && part.get("use_regex").and_then(Value::as_bool) != Some(false)
    };
    if let Some(pattern) = pattern {
        let known = PATTERNS.iter().find(|(known, _)| *known == pattern);
        return known.map(|(_, name)| *name).ok_or_else(|| {
            format!("its splitting pattern is not one of Llama 3, Llama 4, GPT-2: `{pattern}`")
        });
    }
    match parts.iter().any(by_bytes) {
        true if parts.iter().any(|part| kind(part) == "Digits") => Ok("smollm"),
        true => Ok("gpt-2"),
        false => Err(format!("unknown pre-tokenizer `{}`", kind(pre_tokenizer))),
    }
}

/// Whether a post-processor puts a special token in front of the text.
fn begins_with_special(processor: &Value) -> bool {
    let nested = processor.get("processors").and_then(Value::as_array);
    let first = processor.get("single").and_then(|single| single.get(0));
    first.is_some_and(|first| first.get("SpecialToken").is_some())
        || nested.into_iter().flatten().any(begins_with_special)
}

impl Vocabulary {
    /// Fills up to the rows of the embedding table.
    fn fit(&mut self, len: u64) -> Result<(), String> {
        if self.tokens.len() as u64 > len {
            let tokens = self.tokens.len();
            return Err(format!("{tokens} tokens, but the embedding table has {len} rows"));
        }
        for id in self.tokens.len()..len as usize {
            let (text, kind) = padding(id);
            self.tokens.push(text);
            self.kinds.push(kind);
            if self.model == "llama" {
                self.scores.push(PADDING_SCORE);
            }
        }
        Ok(())
    }

    /// Special tokens by name from the tokenizer's config, else by id from the model's.
    fn mark_specials(&mut self, config: &Value, wanted: Wanted) {
        let named = |key: &str| {
            let value = config.get(key)?;
            let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
            self.tokens.iter().position(|token| token == text).map(|at| at as u32)
        };
        let (bos, eos, pad) = (named("bos_token"), named("eos_token"), named("pad_token"));
        self.bos = bos.or(wanted.bos).or(self.bos);
        self.eos = eos.or(wanted.eos).or(self.eos);
        self.pad = pad.or(wanted.pad).or(self.pad);
    }

    /// Adds the keys to a header.
    pub(super) fn write(&self, header: &mut GgufHeader) {
        header.str("tokenizer.ggml.model", self.model);
        header.str("tokenizer.ggml.pre", self.pre);
        header.strings("tokenizer.ggml.tokens", self.tokens.iter());
        if !self.scores.is_empty() {
            header.f32s("tokenizer.ggml.scores", &self.scores);
        }
        header.i32s("tokenizer.ggml.token_type", &self.kinds);
        if !self.merges.is_empty() {
            header.strings("tokenizer.ggml.merges", self.merges.iter());
        }
        let ids = [
            ("bos", self.bos),
            ("eos", self.eos),
            ("unknown", self.unknown),
            ("padding", self.pad),
        ];
        for (name, id) in ids {
            if let Some(id) = id {
                header.u32(&format!("tokenizer.ggml.{name}_token_id"), id);
            }
        }
        header.bool("tokenizer.ggml.add_bos_token", self.adds_bos);
        if let Some(template) = &self.chat_template {
            header.str("tokenizer.chat_template", template);
        }
    }
}

/// `chat_template.jinja` wins over the key, as in transformers; of several named ones `default`.
fn chat_template(dir: &Path, config: &Value) -> Result<Option<String>, ConvertError> {
    let path = dir.join("chat_template.jinja");
    if path.exists() {
        return std::fs::read_to_string(&path).map(Some).map_err(ConvertError::io(&path));
    }
    let older = json_if_there(&dir.join("chat_template.json"))?;
    let value = older.as_ref().and_then(|json| json.get("chat_template"));
    let Some(value) = value.or_else(|| config.get("chat_template")) else { return Ok(None) };
    let named = value.as_array().and_then(|list| {
        let is_default = |entry: &&Value| entry.get("name").is_some_and(|name| name == "default");
        list.iter().find(is_default).or(list.first())?.get("template")
    });
    Ok(named.unwrap_or(value).as_str().map(str::to_owned))
}

fn json_if_there(path: &Path) -> Result<Option<Value>, ConvertError> {
    if !path.exists() {
        return Ok(None);
    }
    let bytes = std::fs::read(path).map_err(ConvertError::io(path))?;
    let parsed = serde_json::from_slice(&bytes);
    parsed.map(Some).map_err(|error| ConvertError::Tokenizer {
        path: path.to_path_buf(),
        reason: format!("no valid JSON: {error}"),
    })
}

/// The name llama.cpp's converter gives to ids without a token.
fn padding(id: usize) -> (String, i32) {
    (format!("[PAD{id}]"), UNUSED)
}

const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const PADDING_SCORE: f32 = -10000.0;
/// Five times the largest vocabulary known.
const TOKENS_MAX: usize = 1 << 20;

const PATTERNS: [(&str, &str); 4] = [
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "llama4",
    ),
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "llama-bpe",
    ),
    (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", "gpt-2"),
    (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", "gpt-2"),
];

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const WANTED: Wanted = Wanted { len: 8, bos: None, eos: Some(1), pad: None };

    fn tokenizer(pre: &str) -> String {
        format!(
            r#"{{"added_tokens": [{{"id": 4, "content": "<|bos|>", "special": true}},
                {{"id": 6, "content": "<tool>", "special": false}}],
            "pre_tokenizer": {pre},
            "post_processor": {{"type": "Sequence", "processors": [{{"single": [{{"SpecialToken": {{"id": "<|bos|>"}}}}]}}]}},
            "model": {{"type": "BPE", "vocab": {{"a": 0, "b": 1, "ab": 2, "Ġ": 3}}, "merges": [["a", "b"], "Ġ a"]}}}}"#
        )
    }

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    const BYTES: &str = r#"{"type": "ByteLevel"}"#;

    #[test]
    fn byte_pairs_from_json() {
        let config = r#"{"bos_token": {"content": "<|bos|>"}, "chat_template": [
            {"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}"#;
        let json = tokenizer(BYTES);
        let dir = folder(&[("tokenizer.json", &json), ("tokenizer_config.json", config)]);
        let found = load(dir.path(), WANTED).unwrap();
        assert_eq!(found.tokens, ["a", "b", "ab", "Ġ", "<|bos|>", "[PAD5]", "<tool>", "[PAD7]"]);
        assert_eq!(found.kinds, [1, 1, 1, 1, 3, 5, 4, 5]);
        assert_eq!(found.merges, ["a b", "Ġ a"]);
        assert_eq!((found.model, found.pre), ("gpt2", "gpt-2"));
        assert_eq!(
            (found.bos, found.eos, found.pad, found.adds_bos),
            (Some(4), Some(1), None, true)
        );
        assert_eq!(found.chat_template.as_deref(), Some("D"));
        fs::write(dir.path().join("chat_template.jinja"), "J").unwrap();
        assert_eq!(load(dir.path(), WANTED).unwrap().chat_template.as_deref(), Some("J"));
    }

    #[test]
    fn splitters_are_known_by_pattern() {
        let check = |pre: &str, wanted: Result<&str, &str>| {
            let found = splitter(&serde_json::from_str(pre).unwrap());
            match wanted {
                Ok(name) => assert_eq!(found, Ok(name)),
                Err(part) => assert!(found.unwrap_err().contains(part)),
            }
        };
        for (pattern, name) in PATTERNS {
            let pattern = serde_json::to_string(pattern).unwrap();
            let pre = format!(
                r#"{{"type": "Sequence", "pretokenizers": [{{"type": "Split", "pattern": {{"Regex": {pattern}}}}},
                {{"type": "ByteLevel", "use_regex": false}}]}}"#
            );
            check(&pre, Ok(name));
        }
        let digits =
            r#"{"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel"}]}"#;
        check(digits, Ok("smollm"));
        check(r#"{"type": "Split", "pattern": {"Regex": "x+"}}"#, Err("`x+`"));
        check(r#"{"type": "Metaspace"}"#, Err("Metaspace"));
        check("null", Err("unknown"));
    }

    #[test]
    fn bad_tokenizers_are_named() {
        let check = |files: &[(&str, &str)], part: &str| {
            let dir = folder(files);
            let error = load(dir.path(), WANTED).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        check(&[], "tokenizer.model");
        check(&[("tokenizer.json", "{")], "no valid JSON");
        check(&[("tokenizer.json", r#"{"model": {"type": "Unigram"}}"#)], "`Unigram`");
        check(&[("tokenizer.json", r#"{"model": {"byte_fallback": true}}"#)], "scores");
        let many = tokenizer(BYTES).replace(r#""Ġ": 3"#, r#""Ġ": 300"#);
        check(&[("tokenizer.json", &many)], "has 8 rows");
        let twice = tokenizer(BYTES).replace(r#""Ġ": 3"#, r#""Ġ": 2"#);
        check(&[("tokenizer.json", &twice)], "share 2");
        let huge = tokenizer(BYTES).replace(r#""Ġ": 3"#, r#""Ġ": 99999999999"#);
        check(&[("tokenizer.json", &huge)], "no valid id");
    }
}
