//! What can go wrong between a checkpoint and a GGUF file.

use std::io;
use std::path::PathBuf;

/// Why a conversion was refused or stopped. Every variant names the file it is about, and the tensor
/// where there is one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    #[error("unsupported architecture `{found}` in {}; known are Llama4ForConditionalGeneration, Llama4ForCausalLM, LlamaForCausalLM", path.display())]
    Architecture { path: PathBuf, found: String },
    #[error("{}: {reason}", path.display())]
    Config { path: PathBuf, reason: String },
    #[error("{} has {free} bytes free, the conversion needs {needed}", dir.display())]
    DiskFull { dir: PathBuf, needed: u64, free: u64 },
    #[error("index {} lies: {reason}", path.display())]
    Index { path: PathBuf, reason: String },
    #[error("cannot read or write {}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("file {} is missing, {reason}", path.display())]
    Missing { path: PathBuf, reason: String },
    #[error("recipe: {0}")]
    Recipe(String),
    #[error("cannot resume {}: {reason}", path.display())]
    Resume { path: PathBuf, reason: String },
    #[error("shard {}: {reason}", path.display())]
    Shard { path: PathBuf, reason: String },
    #[error("{} exists; give another name, or --force to replace it", .0.display())]
    TargetExists(PathBuf),
    #[error("{}: tensor `{tensor}` {reason}", file.display())]
    Tensor { file: PathBuf, tensor: String, reason: String },
    #[error("tokenizer {}: {reason}", path.display())]
    Tokenizer { path: PathBuf, reason: String },
    #[error("{} is left by an unfinished conversion; --resume goes on with it, --force starts anew", .0.display())]
    Unfinished(PathBuf),
    #[error("{} does not read back as written: {reason}", path.display())]
    Verify { path: PathBuf, reason: String },
}

impl ConvertError {
    /// For `map_err`: names the file of an I/O error.
    pub(super) fn io(path: &std::path::Path) -> impl FnOnce(io::Error) -> ConvertError + '_ {
        move |source| ConvertError::Io { path: path.to_path_buf(), source }
    }
}
