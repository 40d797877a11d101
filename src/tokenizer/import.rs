//! Vocabularies from other formats than GGUF, for `convert` and for tests against references.

use serde_json::Value;

use super::vocabulary::Vocabulary;
use super::{TokenizerError, huggingface, sentencepiece_file, tiktoken};

/// A tokenizer file that cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// The file contradicts its format.
    #[error("{file}: {reason}")]
    Malformed {
        /// The file's usual name.
        file: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The file asks for something that is not built in.
    #[error("{file}: not supported: {what}")]
    NotSupported {
        /// The file's usual name.
        file: &'static str,
        /// What it asks for.
        what: String,
    },
    /// What was read is no usable vocabulary.
    #[error(transparent)]
    Vocabulary(#[from] TokenizerError),
}

impl Vocabulary<'static> {
    /// Reads a Hugging Face `tokenizer.json`, with the `tokenizer_config.json` beside it if there is
    /// one (it names bos and eos).
    ///
    /// # Errors
    ///
    /// A file that is not one, and whatever it asks for that would change token ids and is not
    /// built in, by name.
    pub fn from_tokenizer_json(
        tokenizer: &[u8],
        config: Option<&[u8]>,
    ) -> Result<Vocabulary<'static>, ImportError> {
        huggingface::read(tokenizer, config)
    }

    /// Reads a `tokenizer.model`: tiktoken's list of ranks (Llama 3 and 4; recognized by its length,
    /// the control tokens are added) or SentencePiece's (Llama 2).
    ///
    /// # Errors
    ///
    /// A file that is neither, or a vocabulary of another model.
    pub fn from_tokenizer_model(bytes: &[u8]) -> Result<Vocabulary<'static>, ImportError> {
        if tiktoken::looks_like(bytes) {
            tiktoken::read(bytes)
        } else {
            sentencepiece_file::read(bytes)
        }
    }
}

/// A JSON file of a checkpoint.
pub(super) fn json(file: &'static str, bytes: &[u8]) -> Result<Value, ImportError> {
    serde_json::from_slice(bytes)
        .map_err(|error| ImportError::Malformed { file, reason: error.to_string() })
}
