//! Tokens from a model's vocabulary: byte-pair encoding and SentencePiece, and incremental decoding.
//!
//! The ids are those of the reference tokenizers (tiktoken, `tokenizers`, sentencepiece), which
//! `tests/peers/tokenizers/run` holds on a megabyte of mixed text. Two things differ on purpose from
//! a plain port: the splitters need no look-ahead (`split.rs`), and control tokens are found in text
//! only when the caller says that the text is the template's own markup (`Specials::Parse`).

mod alphabet;
mod bpe;
mod decoder;
mod error;
mod huggingface;
mod import;
mod merge;
mod sentencepiece;
mod sentencepiece_file;
mod specials;
mod split;
mod texts;
mod tiktoken;
mod vocabulary;

#[cfg(test)]
mod tests;

use std::borrow::Cow;

use bpe::BytePairs;
pub use decoder::Decoder;
pub use error::TokenizerError;
pub use import::ImportError;
use merge::Merger;
use rustc_hash::FxHashMap;
use sentencepiece::SentencePiece;
use specials::SpecialTrie;
pub use split::Splitter;
use texts::{TextTable, Texts};
pub use vocabulary::{Scheme, TokenKind, Vocabulary};

use crate::gguf::Metadata;
use crate::units::TokenId;

/// Makes text into tokens and tokens into text. Immutable, so one serves all threads.
#[derive(Debug)]
pub struct Tokenizer {
    texts: Texts,
    table: TextTable,
    kinds: Box<[TokenKind]>,
    rules: Rules,
    specials: SpecialTrie,
    bos: Option<TokenId>,
    eos: Option<TokenId>,
    adds_bos: bool,
    stops: Vec<TokenId>,
}

/// What special tokens inside a text mean.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Specials {
    /// The text of a control token is the control token: for a template's own markup.
    Parse,
    /// The text of a control token is text: for whatever a client sent.
    Text,
}

impl Tokenizer {
    /// Checks a vocabulary and makes its tables.
    ///
    /// # Errors
    ///
    /// Whatever in the vocabulary contradicts itself or exceeds the limits, by name.
    pub fn new(vocabulary: &Vocabulary<'_>) -> Result<Tokenizer, TokenizerError> {
        check_ranges(vocabulary)?;
        let ids = ids_by_text(&vocabulary.tokens)?;
        let kinds = kinds(vocabulary);
        let (texts, table, specials) = tables(vocabulary, &kinds)?;
        let rules = match &vocabulary.scheme {
            Scheme::BytePairs { splitter, merges } => {
                Rules::BytePairs(BytePairs::new(*splitter, merges, &ids, &kinds, &texts, &table)?)
            }
            Scheme::SentencePiece { scores, space_prefix } => Rules::SentencePiece(
                SentencePiece::new(vocabulary, scores, *space_prefix, &kinds, &texts)?,
            ),
        };
        let eos = vocabulary.eos.map(TokenId);
        let mut stops: Vec<TokenId> = eos.into_iter().collect();
        let named = vocabulary.ends.iter().copied().map(TokenId);
        for stop in named.chain(END_TEXTS.iter().filter_map(|text| specials.control(text))) {
            if !stops.contains(&stop) {
                stops.push(stop);
            }
        }
        Ok(Tokenizer {
            texts,
            table,
            kinds: kinds.into_boxed_slice(),
            rules,
            specials,
            bos: vocabulary.bos.map(TokenId),
            eos,
            adds_bos: vocabulary.adds_bos && vocabulary.bos.is_some(),
            stops,
        })
    }

    /// The tokenizer of a GGUF.
    ///
    /// # Errors
    ///
    /// As `new`, and absent or wrong keys, unknown models and splitters by name.
    pub fn from_gguf(metadata: &Metadata<'_>) -> Result<Tokenizer, TokenizerError> {
        Tokenizer::new(&Vocabulary::from_gguf(metadata)?)
    }

    /// The tokens of `text`, without `bos`.
    ///
    /// Bytes for which the vocabulary has no token are dropped, as the reference does (SmolLM2 lacks
    /// 21 byte values, all control characters or never part of UTF-8).
    ///
    /// # Errors
    ///
    /// `TextTooLong` and `PieceTooLong`: time and memory of one call are bounded.
    pub fn encode(&self, text: &str, specials: Specials) -> Result<Vec<TokenId>, TokenizerError> {
        let mut tokens = Vec::new();
        self.encode_into(text, specials, &mut tokens)?;
        Ok(tokens)
    }

    /// Appends the tokens of `text`, as `encode`.
    ///
    /// # Errors
    ///
    /// As `encode`; `tokens` then holds part of the text.
    pub fn encode_into(
        &self,
        text: &str,
        specials: Specials,
        tokens: &mut Vec<TokenId>,
    ) -> Result<(), TokenizerError> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(TokenizerError::TextTooLong { bytes: text.len(), max: TEXT_BYTES_MAX });
        }
        let with_control = specials == Specials::Parse;
        let mut merger = Merger::default();
        let mut at = 0;
        while let Some(found) = self.specials.find(text, at, with_control) {
            self.encode_plain(&text[at..found.start], &mut merger, tokens)?;
            tokens.push(found.token);
            at = found.end;
        }
        self.encode_plain(&text[at..], &mut merger, tokens)
    }

    fn encode_plain(
        &self,
        text: &str,
        merger: &mut Merger,
        tokens: &mut Vec<TokenId>,
    ) -> Result<(), TokenizerError> {
        if text.is_empty() {
            return Ok(());
        }
        match &self.rules {
            Rules::BytePairs(rules) => rules.encode(text, &self.texts, &self.table, merger, tokens),
            Rules::SentencePiece(rules) => {
                rules.encode(text, &self.texts, &self.table, merger, tokens)
            }
        }
    }

    /// The text of `tokens`: control tokens give nothing, bytes that are not UTF-8 U+FFFD, and the
    /// blank that SentencePiece puts before a text is taken off again.
    pub fn decode(&self, tokens: &[TokenId]) -> String {
        let mut text = String::new();
        let mut decoder = Decoder::at_start();
        for token in tokens {
            decoder.push(self, *token, &mut text);
        }
        decoder.finish(&mut text);
        text
    }

    /// How many tokens there are.
    pub fn vocab_len(&self) -> usize {
        self.texts.len()
    }

    /// The bytes that a token stands for, of a control token those of its name; empty for an id
    /// beyond the vocabulary.
    pub fn token_bytes(&self, token: TokenId) -> &[u8] {
        self.texts.get(token.0).unwrap_or_default()
    }

    /// Bytes of the longest token: no text has fewer tokens than its bytes divided by this. Looks at all tokens.
    pub fn longest_token_bytes(&self) -> usize {
        let ids = (0..).take(self.vocab_len()).map(TokenId);
        ids.map(|token| self.token_bytes(token).len()).max().unwrap_or(1).max(1)
    }

    /// A token's bytes as text, U+FFFD for what is not UTF-8.
    pub fn text_of(&self, token: TokenId) -> Cow<'_, str> {
        String::from_utf8_lossy(self.token_bytes(token))
    }

    /// Whether a token is markup, or nothing that a reply could show: control, unknown, unused, or
    /// beyond the vocabulary.
    pub fn is_control(&self, token: TokenId) -> bool {
        let kind = self.kinds.get(token.0 as usize);
        matches!(kind, None | Some(TokenKind::Control | TokenKind::Unknown | TokenKind::Unused))
    }

    /// The control token with this text.
    pub fn control(&self, text: &str) -> Option<TokenId> {
        self.specials.control(text)
    }

    /// The first control token at or after byte `from` of `text`, as its range.
    pub fn find_control(&self, text: &str, from: usize) -> Option<std::ops::Range<usize>> {
        let mut at = from;
        loop {
            let found = self.specials.find(text, at, true)?;
            if self.is_control(found.token) {
                return Some(found.start..found.end);
            }
            at = found.end;
        }
    }

    /// Whether `text` begins with a control token's text, or is the beginning of one.
    pub fn may_begin_control(&self, text: &str) -> bool {
        self.specials.may_begin_control(text)
    }

    /// The token that a prompt begins with.
    pub fn bos(&self) -> Option<TokenId> {
        self.bos
    }

    /// The token that ends a reply, as the file names it.
    pub fn eos(&self) -> Option<TokenId> {
        self.eos
    }

    /// Whether a prompt must begin with `bos`.
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// All tokens that end a reply: `eos` and the other ends of turns and texts that the field uses,
    /// found by their text among the control tokens.
    pub fn stop_tokens(&self) -> &[TokenId] {
        &self.stops
    }

    /// Whether encoding puts a blank before the text, which decoding from the start takes off.
    fn has_space_prefix(&self) -> bool {
        matches!(&self.rules, Rules::SentencePiece(rules) if rules.has_space_prefix())
    }
}

#[derive(Debug)]
enum Rules {
    BytePairs(BytePairs),
    SentencePiece(SentencePiece),
}

fn check_ranges(vocabulary: &Vocabulary<'_>) -> Result<(), TokenizerError> {
    let tokens = vocabulary.tokens.len();
    if tokens == 0 {
        return Err(TokenizerError::NoTokens);
    }
    check_count(TOKENS_KEY, tokens, TOKENS_MAX)?;
    let kinds = vocabulary.kinds.len();
    if kinds != 0 && kinds != tokens {
        let key = "tokenizer.ggml.token_type";
        return Err(TokenizerError::EntryCount { key, count: kinds, tokens });
    }
    let named = [
        ("tokenizer.ggml.bos_token_id", vocabulary.bos),
        ("tokenizer.ggml.eos_token_id", vocabulary.eos),
        ("tokenizer.ggml.unknown_token_id", vocabulary.unknown),
        ("tokenizer.ggml.padding_token_id", vocabulary.padding),
    ];
    let ends = vocabulary.ends.iter().map(|id| ("tokenizer.ggml.eot_token_id", Some(*id)));
    for (key, id) in named.into_iter().chain(ends) {
        if let Some(id) = id.filter(|id| *id as usize >= tokens) {
            return Err(TokenizerError::TokenRange { key, id, tokens });
        }
    }
    Ok(())
}

fn check_count(key: &'static str, count: usize, max: usize) -> Result<(), TokenizerError> {
    if count > max { Err(TokenizerError::TooMany { key, count, max }) } else { Ok(()) }
}

fn ids_by_text<'v>(tokens: &'v [Cow<'_, str>]) -> Result<FxHashMap<&'v str, u32>, TokenizerError> {
    let mut ids = FxHashMap::with_capacity_and_hasher(tokens.len(), Default::default());
    for (id, text) in (0..).zip(tokens) {
        if let Some(first) = ids.insert(text.as_ref(), id) {
            let text = excerpt(text);
            return Err(TokenizerError::DuplicateToken { first, second: id, text });
        }
    }
    Ok(ids)
}

fn kinds(vocabulary: &Vocabulary<'_>) -> Vec<TokenKind> {
    let mut kinds = vocabulary.kinds.clone();
    kinds.resize(vocabulary.tokens.len(), TokenKind::Normal);
    kinds
}

/// The bytes of all tokens, the ids of those that text can become, and the special ones.
fn tables(
    vocabulary: &Vocabulary<'_>,
    kinds: &[TokenKind],
) -> Result<(Texts, TextTable, SpecialTrie), TokenizerError> {
    let is_byte_pairs = matches!(vocabulary.scheme, Scheme::BytePairs { .. });
    let mut texts = Texts::with_capacity(vocabulary.tokens.len());
    let mut table = TextTable::with_capacity(vocabulary.tokens.len());
    let mut specials = SpecialTrie::default();
    for ((id, text), kind) in (0u32..).zip(&vocabulary.tokens).zip(kinds) {
        let is_special = matches!(kind, TokenKind::Control | TokenKind::UserDefined);
        let max = if is_special { SPECIAL_BYTES_MAX } else { TOKEN_BYTES_MAX };
        if text.len() > max {
            let (id, bytes) = (id as usize, text.len());
            return Err(TokenizerError::TokenTooLong { id, bytes, max });
        }
        match kind {
            TokenKind::Byte if !is_byte_pairs => {
                let byte = sentencepiece::byte_of(id, text)?;
                texts.push(|out| out.push(byte));
            }
            TokenKind::Normal | TokenKind::Byte if is_byte_pairs => {
                texts.push(|out| alphabet::push_bytes(text, out));
                table.insert(&texts, id);
            }
            TokenKind::Normal => {
                texts.push(|out| sentencepiece::push_bytes(text, out));
                table.insert(&texts, id);
            }
            _ => {
                texts.push(|out| out.extend_from_slice(text.as_bytes()));
            }
        }
        if is_special && !text.is_empty() {
            specials.insert(text, id, *kind);
        }
    }
    texts.shrink();
    Ok((texts, table, specials))
}

/// The beginning of a text, for messages.
fn excerpt(text: &str) -> String {
    text.chars().take(40).collect()
}

const TOKENS_KEY: &str = "tokenizer.ggml.tokens";
const TOKENS_MAX: usize = 1 << 20;
/// Four times the longest token of any vocabulary looked at; `TOKENS_MAX` of them count in a `u32`.
const TOKEN_BYTES_MAX: usize = 2048;
const SPECIAL_BYTES_MAX: usize = 256;
/// A second or two of work, and more than any context of a small board holds.
const TEXT_BYTES_MAX: usize = 16 << 20;
/// One word: merged in n log n, about a second.
const PIECE_BYTES_MAX: usize = 1 << 20;

/// The ends of a turn or a text in the chat formats of the field.
const END_TEXTS: [&str; 7] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|eot|>",
    "<|eom|>",
    "<|im_end|>",
    "<|endoftext|>",
];
