//! A model with its weights and KV cache, as the engine sees it: batches of tokens in, logits out.

mod blueprint;
mod experts;
mod forward;
mod kv;
mod llama;
mod llama4;
mod outline;
mod rope;
mod scratch;
mod shape;
mod spec;
mod weights;

pub use blueprint::{Blueprint, ExpertsOutline};
pub use outline::Outline;
pub use spec::ModelSpec;

use std::sync::Arc;

use scoutd_kernels::{Format, Isa, MatrixError, Precision};

use crate::gguf::{Gguf, GgufError, Mapping};
use crate::memory::Ledger;
use crate::residency::{ExpertSlots, ReadError, Route, SlotsError, SlotsOptions};
use crate::units::{Bytes, SlotId, TokenId};

#[cfg(test)]
mod tests;

/// Reads what a file is and costs, without running it.
///
/// # Errors
/// As [`open`].
pub fn inspect(gguf: &Gguf, kv_type: KvType) -> Result<ModelSpec, ModelError> {
    Ok(shape::Shape::from_gguf(gguf)?.spec(kv_type))
}

/// Makes the model of a file ready to run. Its matrices stay in the mapping.
///
/// Norms, routers and rotation factors that are not finite are refused here. The scales of quantized
/// matrices are not scanned (that would read the whole file): they show as [`ModelError::NotFinite`].
///
/// # Errors
/// If the file is no model that can be computed as its makers meant it, or the instruction set is missing.
pub fn open(mapping: Arc<Mapping>, options: &ModelOptions) -> Result<Box<dyn Model>, ModelError> {
    Ok(Box::new(forward::Transformer::new(mapping, options)?))
}

/// How a model is run.
#[derive(Clone, Debug)]
pub struct ModelOptions {
    /// Threads, the calling one included.
    pub threads: usize,
    /// The instruction set of the kernels; the best of the processor if `None`.
    pub isa: Option<Isa>,
    /// Whether activations are rounded to 8 bits, which is fast, or stay F32.
    pub precision: Precision,
    /// The numbers in the KV cache.
    pub kv_type: KvType,
    /// Sequences at once.
    pub slots: usize,
    /// Tokens of one pass through the weights. It sizes the scratch; a larger batch takes several passes.
    pub pass_tokens_max: usize,
    /// Keep routed experts in slots and read the others when they are needed; `None` takes all from the mapping.
    /// Answers are the same bit for bit, if passes are cut alike.
    pub streaming: Option<StreamedExperts>,
}

/// How the experts of a model that is larger than memory are kept.
#[derive(Clone, Debug, Default)]
pub struct StreamedExperts {
    /// How many, and how they are read.
    pub slots: SlotsOptions,
    /// Where the memory of slots is promised, if anybody keeps account.
    pub ledger: Option<Arc<Ledger>>,
    /// Whose they are, in the ledger's table.
    pub label: String,
}

impl Default for ModelOptions {
    fn default() -> ModelOptions {
        ModelOptions {
            threads: 1,
            isa: None,
            precision: Precision::Int8,
            kv_type: KvType::F16,
            slots: 1,
            pass_tokens_max: 256,
            streaming: None,
        }
    }
}

/// Least tokens of the largest pass of a model that streams: a sweep reads each missing expert once, however many
/// tokens use it.
pub const STREAMED_PASS_TOKENS: usize = 1024;

/// The numbers in the KV cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvType {
    /// Four bytes: exact.
    F32,
    /// Two bytes.
    #[default]
    F16,
}

impl KvType {
    /// Bytes of one number.
    pub fn bytes(self) -> usize {
        match self {
            KvType::F32 => 4,
            KvType::F16 => 2,
        }
    }
}

/// A model with its KV cache. It knows nothing of requests.
pub trait Model: Send {
    /// What it is and what it costs.
    fn spec(&self) -> &ModelSpec;

    /// Runs `batch` and appends its tokens to their slots. `logits` is cleared and then gets `vocab_len`
    /// values for each token that wants them, in the order of the rows and of the tokens inside a row.
    ///
    /// # Errors
    /// If the batch contradicts the slots, and then nothing has changed; or if a weight is not a number:
    /// [`ModelError::NotFinite`] names the rows, and the logits of the others are good.
    fn forward(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), ModelError>;

    /// Empties `slot` and frees its pages.
    fn clear(&mut self, slot: SlotId);

    /// Makes `to` begin with the first `len` tokens of `from`: pages are shared and copied on write. If both
    /// are the same slot, it is cut to `len`. Returns how many tokens `to` now holds: chunked layers may have
    /// dropped the pages that `len` would need, then it is fewer, down to none.
    fn share_prefix(&mut self, from: SlotId, to: SlotId, len: usize) -> usize;

    /// Tokens that `slot` holds.
    fn len(&self, slot: SlotId) -> usize;

    /// Bytes of KV pages in use, shared ones counted once.
    fn kv_bytes_in_use(&self) -> u64 {
        0
    }

    /// Gives the memory of the weights back to the system; the next pass reads them from the file again. Returns
    /// their bytes: none where the weights are not those of a file.
    ///
    /// # Errors
    /// If the system refuses; the weights are as usable as before.
    fn release_weights(&mut self) -> std::io::Result<Bytes> {
        Ok(Bytes(0))
    }

    /// The slots of a model that reads its experts when they are needed.
    fn expert_slots(&self) -> Option<Arc<ExpertSlots>> {
        None
    }

    /// Begins or ends the recording of what routers choose, and returns what was recorded until now. Recording
    /// takes a few bytes for each token and layer.
    fn record_routes(&mut self, on: bool) -> Vec<Route> {
        let _ = on;
        Vec::new()
    }

    /// Bytes of weights that are locked in memory.
    fn locked_bytes(&self) -> u64 {
        0
    }

    /// Prompt tokens that a pass should have where there are so many: where each pass reads most of the file, small
    /// pieces would cost as much as large ones.
    fn prefill_tokens_wanted(&self) -> usize {
        1
    }
}

/// The tokens of one pass through the model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// One row per slot; a slot occurs at most once.
    pub rows: Vec<BatchRow>,
}

/// One slot's tokens: many while its prompt is read, one while it writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchRow {
    /// The slot they are appended to.
    pub slot: SlotId,
    /// Never empty.
    pub tokens: Vec<TokenId>,
    /// Whose logits are computed.
    pub wants_logits: LogitsWanted,
}

/// Whose logits a row wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitsWanted {
    /// Nobody's: the prompt goes on.
    None,
    /// The last token's: the next one is sampled from them.
    Last,
    /// Every token's: the prompt is being scored.
    All,
}

/// Why a file is no model, or a pass failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// An architecture that is not computed here.
    #[error("architecture `{0}` is not supported; llama and llama4 are")]
    Architecture(String),
    /// The batch names a slot, position or token that does not exist.
    #[error("batch: {0}")]
    Batch(String),
    /// The file is no GGUF file, or a key has the wrong type.
    #[error(transparent)]
    File(#[from] GgufError),
    /// Weights or pages could not be read.
    #[error("memory: {0}")]
    Io(#[from] std::io::Error),
    /// The processor has no such instruction set.
    #[error("this processor has no {0}")]
    Isa(Isa),
    /// A number that no model can have.
    #[error("key `{key}` has the impossible value {value}")]
    Key { key: String, value: String },
    /// Logits that are no numbers; the others of the batch are good.
    #[error(
        "logits are not finite, in the rows {rows:?} of the batch: the model's weights are damaged"
    )]
    NotFinite { rows: Vec<usize> },
    /// An expert did not arrive.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Expert slots cannot be had.
    #[error(transparent)]
    Slots(#[from] SlotsError),
    /// A tensor in a format that its use does not allow.
    #[error("tensor `{tensor}` is {format} and must be F32")]
    TensorFormat { tensor: String, format: Format },
    /// A tensor whose bytes do not lie as its format needs.
    #[error("tensor `{tensor}`: {error}")]
    TensorLayout { tensor: String, error: MatrixError },
    /// A tensor that the keys call for.
    #[error("tensor `{0}` is missing")]
    TensorMissing(String),
    /// A tensor of another shape than the keys say.
    #[error("tensor `{tensor}` has the shape {found:?} and must have {wanted:?}")]
    TensorShape { tensor: String, found: Vec<u64>, wanted: Vec<usize> },
    /// A tensor that would have to be used and cannot be.
    #[error("tensor `{tensor}` is not supported in architecture {architecture}")]
    TensorUnknown { tensor: String, architecture: &'static str },
    /// A number among the weights that is not finite, or not above zero.
    #[error("tensor `{tensor}` holds an impossible number")]
    TensorValue { tensor: String },
    /// A key that asks for what is not computed here.
    #[error("key `{key}` has the value {value}, which is not supported")]
    Unsupported { key: String, value: String },
    /// Two places that disagree on the size of the vocabulary.
    #[error("key `{key}` counts {value} tokens, the tensor `token_embd.weight` {rows}")]
    Vocabulary { key: String, value: usize, rows: u64 },
}
