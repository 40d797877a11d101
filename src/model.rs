//! A model with its weights and KV cache, as the engine sees it: batches of tokens in, logits out.

mod spec;

pub use spec::ModelSpec;

use crate::units::{SlotId, TokenId};

/// A model with its KV cache. It knows nothing of requests.
pub trait Model: Send {
    /// What it is and what it costs.
    fn spec(&self) -> &ModelSpec;

    /// Runs `batch` and appends its tokens to their slots. `logits` is cleared and then gets `vocab_len`
    /// values for each token that wants them, in the order of the rows and of the tokens inside a row.
    ///
    /// # Errors
    /// If the batch contradicts the slots or a weight cannot be read; the named slots are then undefined
    /// until they are cleared.
    fn forward(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), ModelError>;

    /// Empties `slot` and frees its pages.
    fn clear(&mut self, slot: SlotId);

    /// Makes `to` begin with the first `len` tokens of `from`: pages are shared and copied on write. If both
    /// are the same slot, it is cut to `len`. Returns how many tokens `to` now holds: chunked layers may have
    /// dropped the pages that `len` would need, then it is fewer, down to none.
    fn share_prefix(&mut self, from: SlotId, to: SlotId, len: usize) -> usize;

    /// Tokens that `slot` holds.
    fn len(&self, slot: SlotId) -> usize;
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

/// Why a pass failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The batch names a slot, position or token that does not exist.
    #[error("batch: {0}")]
    Batch(String),
    /// Weights or pages could not be read.
    #[error("memory: {0}")]
    Io(#[from] std::io::Error),
}
