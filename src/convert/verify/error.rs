//! What can go wrong in a comparison.

use std::io;
use std::path::{Path, PathBuf};

use super::super::ConvertError;
use crate::gguf::GgufError;
use crate::model::ModelError;
use crate::template::TemplateError;
use crate::tokenizer::TokenizerError;

/// Why a comparison was refused or stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// The reference could not be made, or does not fit the disk.
    #[error(transparent)]
    Convert(#[from] ConvertError),
    /// A GGUF file that cannot be read.
    #[error("cannot read {}", path.display())]
    File { path: PathBuf, source: GgufError },
    #[error("cannot read or write {}", path.display())]
    Io { path: PathBuf, source: io::Error },
    /// A line of requests or prompts.
    #[error("{} line {line}: {reason}", path.display())]
    Line { path: PathBuf, line: usize, reason: String },
    /// A model that cannot be run.
    #[error("cannot run {}", path.display())]
    Model { path: PathBuf, source: ModelError },
    /// A reference of an earlier run that is not what this one would make.
    #[error("{} is there and was not made from this checkpoint; remove it, or give another --temp", .0.display())]
    OtherReference(PathBuf),
    /// A chat template that refuses a request.
    #[error("{}: {error}", file.display())]
    Template { file: PathBuf, error: TemplateError },
    /// A text of less than one window.
    #[error("{} has {tokens} tokens, less than one window of {window}", path.display())]
    TextTooShort { path: PathBuf, tokens: usize, window: usize },
    #[error("{}: {error}", file.display())]
    Tokenizer { file: PathBuf, error: TokenizerError },
    /// A request or window beyond the model's context.
    #[error("{} has a context of {context} tokens, and {tokens} are to be read at once", file.display())]
    TooLong { file: PathBuf, tokens: usize, context: u32 },
    /// Token numbers that mean something else there.
    #[error("{} has another vocabulary: the two cannot be compared", path.display())]
    Vocabulary { path: PathBuf },
}

impl VerifyError {
    /// For `map_err`: names a GGUF file.
    pub(super) fn file(path: &Path) -> impl FnOnce(GgufError) -> VerifyError + '_ {
        move |source| VerifyError::File { path: path.to_path_buf(), source }
    }

    /// For `map_err`: names the file of an I/O error.
    pub(super) fn io(path: &Path) -> impl FnOnce(io::Error) -> VerifyError + '_ {
        move |source| VerifyError::Io { path: path.to_path_buf(), source }
    }

    /// For `map_err`: names the model.
    pub(super) fn model(path: &Path) -> impl FnOnce(ModelError) -> VerifyError + '_ {
        move |source| VerifyError::Model { path: path.to_path_buf(), source }
    }
}
