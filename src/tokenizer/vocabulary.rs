//! A vocabulary as plain data: what a GGUF's `tokenizer.ggml.*` keys say, and what the importers of
//! other formats produce. `Tokenizer::new` checks it.

use std::borrow::Cow;

use super::TokenizerError;
use super::split::Splitter;
use crate::gguf::{GgufError, Metadata};

/// The tokens of a model and the rules that make text into them.
#[derive(Clone, Debug, PartialEq)]
pub struct Vocabulary<'a> {
    /// How text becomes tokens.
    pub scheme: Scheme<'a>,
    /// The text of each token, by id: ordinary tokens in GPT-2's byte alphabet (byte pairs) or with
    /// `▁` for a blank (SentencePiece), control and user-defined tokens as they are.
    pub tokens: Vec<Cow<'a, str>>,
    /// The kind of each token; empty means that all are ordinary.
    pub kinds: Vec<TokenKind>,
    /// The token that a prompt begins with.
    pub bos: Option<u32>,
    /// The token that ends a reply.
    pub eos: Option<u32>,
    /// The token for text that has none.
    pub unknown: Option<u32>,
    /// The token that fills batches.
    pub padding: Option<u32>,
    /// Whether a prompt must begin with `bos`.
    pub adds_bos: bool,
    /// Further tokens that end a reply, as far as the file names them by id.
    pub ends: Vec<u32>,
}

/// The two families of vocabularies.
#[derive(Clone, Debug, PartialEq)]
pub enum Scheme<'a> {
    /// Byte-level byte pairs, `tokenizer.ggml.model` = `gpt2`.
    BytePairs {
        /// How text is cut before merging.
        splitter: Splitter,
        /// `left right` in the byte alphabet, best first.
        merges: Vec<Cow<'a, str>>,
    },
    /// SentencePiece's byte-pair model, `tokenizer.ggml.model` = `llama`.
    SentencePiece {
        /// The score of each token; the highest is joined first.
        scores: Vec<f32>,
        /// Whether a blank is put before the text.
        space_prefix: bool,
    },
}

/// What a token is, by the numbers of `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum TokenKind {
    /// Made by merging.
    Normal = 1,
    /// Stands for text that has no token.
    Unknown = 2,
    /// Markup of the chat format: never made from a client's text, never shown.
    Control = 3,
    /// Text that is always one token.
    UserDefined = 4,
    /// Fills the vocabulary up.
    Unused = 5,
    /// One byte, for text that has no token (SentencePiece).
    Byte = 6,
}

impl TokenKind {
    /// The kind of a number in `tokenizer.ggml.token_type`; 0 (undefined) counts as ordinary.
    pub fn from_number(number: i32) -> Option<TokenKind> {
        Some(match number {
            0 | 1 => TokenKind::Normal,
            2 => TokenKind::Unknown,
            3 => TokenKind::Control,
            4 => TokenKind::UserDefined,
            5 => TokenKind::Unused,
            6 => TokenKind::Byte,
            _ => return None,
        })
    }
}

impl<'a> Vocabulary<'a> {
    /// Reads the `tokenizer.ggml.*` keys of a GGUF. Texts stay borrowed from the file.
    ///
    /// # Errors
    ///
    /// Absent or wrong keys; a model or a splitter that is not built in, with those that are.
    pub fn from_gguf(metadata: &Metadata<'a>) -> Result<Vocabulary<'a>, TokenizerError> {
        let model = metadata.str("tokenizer.ggml.model")?;
        let pre = metadata.str_opt("tokenizer.ggml.pre")?.unwrap_or("default");
        let (scheme, adds_bos) = match model {
            "gpt2" => {
                let splitter = Splitter::from_name(pre)
                    .ok_or_else(|| TokenizerError::UnknownSplitter(pre.to_owned()))?;
                let merges = if metadata.get(MERGES_KEY).is_some() {
                    metadata.strings(MERGES_KEY)?.map(Cow::Borrowed).collect()
                } else {
                    Vec::new()
                };
                (Scheme::BytePairs { splitter, merges }, splitter == Splitter::Llama3)
            }
            "llama" => {
                let scores = metadata.f32s("tokenizer.ggml.scores")?.collect();
                let space_prefix =
                    metadata.bool_opt("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
                (Scheme::SentencePiece { scores, space_prefix }, true)
            }
            other => return Err(TokenizerError::UnknownModel(other.to_owned())),
        };
        let id = |key: &str| metadata.u32_opt(key);
        let ends = ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"].map(id);
        let ends: Result<Vec<Option<u32>>, GgufError> = ends.into_iter().collect();
        Ok(Vocabulary {
            scheme,
            tokens: metadata.strings("tokenizer.ggml.tokens")?.map(Cow::Borrowed).collect(),
            kinds: kinds_from_gguf(metadata)?,
            bos: id("tokenizer.ggml.bos_token_id")?,
            eos: id("tokenizer.ggml.eos_token_id")?,
            unknown: id("tokenizer.ggml.unknown_token_id")?,
            padding: id("tokenizer.ggml.padding_token_id")?,
            adds_bos: metadata.bool_opt("tokenizer.ggml.add_bos_token")?.unwrap_or(adds_bos),
            ends: ends?.into_iter().flatten().collect(),
        })
    }

    /// The value for `tokenizer.ggml.model`.
    pub fn model_name(&self) -> &'static str {
        match self.scheme {
            Scheme::BytePairs { .. } => "gpt2",
            Scheme::SentencePiece { .. } => "llama",
        }
    }

    /// The value for `tokenizer.ggml.pre`.
    pub fn splitter_name(&self) -> &'static str {
        match self.scheme {
            Scheme::BytePairs { splitter, .. } => splitter.name(),
            Scheme::SentencePiece { .. } => "default",
        }
    }

    /// The id of the token with this text, by a search through all of them.
    pub fn find(&self, text: &str) -> Option<u32> {
        self.tokens.iter().position(|token| token == text).and_then(|at| u32::try_from(at).ok())
    }

    /// Adds unused tokens until there are `count`: some checkpoints have more rows in their
    /// embedding than tokens in their vocabulary.
    pub fn pad_to(&mut self, count: usize) {
        self.kinds.resize(self.tokens.len(), TokenKind::Normal);
        for id in self.tokens.len()..count {
            self.tokens.push(Cow::Owned(format!("[PAD{id}]")));
            self.kinds.push(TokenKind::Unused);
            if let Scheme::SentencePiece { scores, .. } = &mut self.scheme {
                scores.push(PADDING_SCORE);
            }
        }
    }
}

fn kinds_from_gguf(metadata: &Metadata<'_>) -> Result<Vec<TokenKind>, TokenizerError> {
    if metadata.get(KINDS_KEY).is_none() {
        return Ok(Vec::new());
    }
    let kind = |(id, number)| {
        TokenKind::from_number(number).ok_or(TokenizerError::TokenKind { id, number })
    };
    metadata.i32s(KINDS_KEY)?.enumerate().map(kind).collect()
}

const KINDS_KEY: &str = "tokenizer.ggml.token_type";
const MERGES_KEY: &str = "tokenizer.ggml.merges";
/// The score llama.cpp's converter gives to tokens that fill up.
const PADDING_SCORE: f32 = -10000.0;
