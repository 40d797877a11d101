//! What can be wrong with a vocabulary or a text.

use super::split::Splitter;
use crate::gguf::GgufError;

/// A vocabulary that cannot be used, or a text that is too long.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// SentencePiece: a byte token that is not written `<0xNN>`.
    #[error("byte token {id} is not written `<0xNN>`: {text:?}")]
    ByteToken {
        /// The token.
        id: u32,
        /// Its text.
        text: String,
    },
    /// A merge whose result is markup: a client's text could become a control token.
    #[error("merge {rank} makes the control token {text:?}")]
    ControlMerge {
        /// Its place in the list.
        rank: usize,
        /// What it makes.
        text: String,
    },
    /// Two tokens with one text.
    #[error("tokens {first} and {second} have the same text {text:?}")]
    DuplicateToken {
        /// The lower id.
        first: u32,
        /// The higher id.
        second: u32,
        /// Their text.
        text: String,
    },
    /// Arrays that should have an entry for each token.
    #[error("`{key}` has {count} entries for {tokens} tokens")]
    EntryCount {
        /// The array.
        key: &'static str,
        /// Its length.
        count: usize,
        /// The length of the vocabulary.
        tokens: usize,
    },
    /// A key that is absent or of the wrong type.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A merge that is not two tokens whose join is a token.
    #[error("merge {rank} is not two tokens that join into a token: {text:?}")]
    Merge {
        /// Its place in the list.
        rank: usize,
        /// What the file says.
        text: String,
    },
    /// Byte pairs without a list of merges.
    #[error("the vocabulary has no merges (`tokenizer.ggml.merges`)")]
    NoMerges,
    /// An empty vocabulary.
    #[error("the vocabulary has no tokens (`tokenizer.ggml.tokens`)")]
    NoTokens,
    /// One word of a text beyond what is merged in reasonable time.
    #[error("a word of {bytes} bytes exceeds the limit of {max}")]
    PieceTooLong {
        /// Its length.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// A score that orders nothing.
    #[error("the score of token {id} is not a number")]
    Score {
        /// The token.
        id: u32,
    },
    /// A text beyond what is encoded at once.
    #[error("a text of {bytes} bytes exceeds the limit of {max}")]
    TextTooLong {
        /// Its length.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// A kind of token that does not exist.
    #[error("token {id} has the unknown type {number}")]
    TokenKind {
        /// The token.
        id: usize,
        /// The number in `tokenizer.ggml.token_type`.
        number: i32,
    },
    /// A key that names a token beyond the vocabulary.
    #[error("`{key}` is beyond the {tokens} tokens: {id}")]
    TokenRange {
        /// The key.
        key: &'static str,
        /// What it says.
        id: u32,
        /// The length of the vocabulary.
        tokens: usize,
    },
    /// A token longer than any real one.
    #[error("token {id} has {bytes} bytes, more than {max}")]
    TokenTooLong {
        /// The token.
        id: usize,
        /// Its length.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// More entries than any real vocabulary has.
    #[error("`{key}` has more than {max} entries: {count}")]
    TooMany {
        /// The array.
        key: &'static str,
        /// Its length.
        count: usize,
        /// The limit.
        max: usize,
    },
    /// A kind of tokenizer that is not built in.
    #[error("unknown tokenizer model (supported: `gpt2`, `llama`): {0:?}")]
    UnknownModel(String),
    /// A splitter that is not built in.
    #[error("unknown pre-tokenizer (supported: {names}): {0:?}", names = Splitter::NAMES)]
    UnknownSplitter(String),
}
