//! The quality gate: whether a quantized file still answers as the model it was made from.
//!
//! Both models read the same tokens, one after the other, so that only one is in memory: first the reference
//! ([`reference`]), whose distributions go to a temporary file ([`rows`]), then the file. What is compared:
//! - the expected answers to home requests, and a text if one is given: perplexity, divergence of the
//!   distributions, how often both find the same token likeliest ([`divergence`]);
//! - prompts: the same along the reference's own greedy answers;
//! - the answers that both give to the requests: tool calls by exact match ([`calls`]). Four bits break calls
//!   before perplexity shows it.
//!
//! [`report`] has the limits and the verdict.

mod calls;
mod cases;
mod divergence;
mod error;
mod reference;
mod report;
mod rows;
mod runner;
mod study;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use scoutd_kernels::Format;

use self::cases::Cases;
pub use self::error::VerifyError;
use self::reference::Reference;
pub use self::report::{
    Check, Difference, Divergence, Gate, Likeness, Perplexity, PromptReport, Report, Share,
    Subject, ToolCalls,
};
use crate::gguf::{Gguf, Mapping};
use crate::model::{self, KvType};
use crate::units::Bytes;

/// What is compared, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// The GGUF file in question.
    pub file: PathBuf,
    /// What it is compared with: a checkpoint's folder, or another GGUF file.
    pub against: PathBuf,
    /// A text for perplexity; without one only the expected answers count.
    pub text: Option<PathBuf>,
    /// Tokens of a window of the text.
    pub window: usize,
    /// Prompts, one a line; built-in ones if absent.
    pub prompts: Option<PathBuf>,
    /// Requests with their expected answers, JSON lines; built-in ones if absent.
    pub requests: Option<PathBuf>,
    /// Only so many of the requests.
    pub limit: Option<usize>,
    /// The type of the reference made of a checkpoint; that of most of its weights if absent.
    pub reference_type: Option<Format>,
    /// Where temporary files lie; beside the file if absent.
    pub temp: Option<PathBuf>,
    /// Keep the reference made of a checkpoint for the next time.
    pub keep: bool,
    /// Activations and cache in F32 instead of as they are served (8 bits and F16).
    pub exact: bool,
    /// All cores if absent.
    pub threads: Option<usize>,
    pub gate: Gate,
}

/// What a comparison takes, known before it begins.
#[derive(Clone, Debug)]
pub struct Needs {
    /// Weights of the larger model, which are mapped, and everything beside them.
    pub memory: Bytes,
    /// Temporary files.
    pub disk: Bytes,
    pub dir: PathBuf,
    /// Tokens that each model reads.
    pub tokens: u64,
    /// Token positions that are compared.
    pub positions: u64,
    pub requests: usize,
}

/// What is counted while it passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Bytes,
    Tokens,
}

/// Who is told how far the comparison is; called from several threads.
pub trait Progress: Sync {
    /// Planned; nothing has been read or written yet.
    fn planned(&self, needs: &Needs);
    /// A stage begins in which `count` units pass.
    fn begin(&self, stage: &str, unit: Unit, count: u64);
    /// So many more have passed.
    fn passed(&self, count: u64);
}

/// Compares `options.file` with what it was made from.
///
/// # Errors
/// Whatever is wrong with the files, the disk or the models. A gate that is not passed is no error: see
/// [`Report::passed`].
pub fn verify(options: &Options, progress: &dyn Progress) -> Result<Report, VerifyError> {
    let mapping = open(&options.file)?;
    let gguf = parse(&options.file, &mapping)?;
    let cases = Cases::load(options, &gguf)?;
    let dir = options.temp.clone().unwrap_or_else(|| parent(&options.file).to_path_buf());
    let reference = Reference::plan(options, &dir)?;
    if let Reference::File(path) = &reference {
        same_vocabulary(&gguf, path)?;
    }
    let needs = needs(options, &gguf, &cases, &reference, dir)?;
    progress.planned(&needs);
    room(&needs)?;
    let reference = reference.make(progress)?;
    study::run(options, &needs.dir, reference.path(), &cases, progress)
}

fn needs(
    options: &Options,
    gguf: &Gguf,
    cases: &Cases,
    reference: &Reference,
    dir: PathBuf,
) -> Result<Needs, VerifyError> {
    let unusable = VerifyError::model(&options.file);
    let kv_type = if options.exact { KvType::F32 } else { KvType::F16 };
    let spec = model::inspect(gguf, kv_type).map_err(unusable)?;
    let longest = cases.longest();
    if longest > spec.context_len as usize {
        let (context, file) = (spec.context_len, options.file.clone());
        return Err(VerifyError::TooLong { file, tokens: longest, context });
    }
    let vocab = spec.vocab_len as usize;
    let beside = spec.kv_bytes(longest as u32)
        + spec.scratch_token_bytes * runner::PASS_TOKENS as u64
        + runner::logits_bytes(vocab) as u64;
    let weights = spec.weights_bytes.max(reference.bytes()?);
    let positions = cases.positions();
    Ok(Needs {
        memory: Bytes(weights + beside),
        disk: Bytes(reference.bytes_to_write() + positions * rows::row_bytes(vocab) as u64),
        dir,
        tokens: cases.tokens(),
        positions,
        requests: cases.requests.len(),
    })
}

/// Fails if the temporary files would not fit.
fn room(needs: &Needs) -> Result<(), VerifyError> {
    let disk = rustix::fs::statvfs(&needs.dir)
        .map_err(|error| VerifyError::Io { path: needs.dir.clone(), source: error.into() })?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    if needs.disk.0 > free {
        let (dir, needed) = (needs.dir.clone(), needs.disk.0);
        return Err(super::ConvertError::DiskFull { dir, needed, free }.into());
    }
    Ok(())
}

/// Both must mean the same by a token's number.
fn same_vocabulary(gguf: &Gguf, path: &Path) -> Result<(), VerifyError> {
    let mapping = open(path)?;
    let other = parse(path, &mapping)?;
    let tokens = |gguf: &Gguf, path: &Path| -> Result<Vec<String>, VerifyError> {
        let tokens = gguf.metadata().strings("tokenizer.ggml.tokens");
        let tokens = tokens.map_err(|error| VerifyError::file(path)(error))?;
        Ok(tokens.map(str::to_owned).collect())
    };
    if tokens(gguf, path)? == tokens(&other, path)? {
        return Ok(());
    }
    Err(VerifyError::Vocabulary { path: path.to_path_buf() })
}

fn open(path: &Path) -> Result<Arc<Mapping>, VerifyError> {
    Mapping::open(path).map(Arc::new).map_err(VerifyError::file(path))
}

fn parse<'m>(path: &Path, mapping: &'m Mapping) -> Result<Gguf<'m>, VerifyError> {
    Gguf::parse(mapping.bytes()).map_err(VerifyError::file(path))
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
