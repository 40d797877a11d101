//! One model that reads given tokens and answers greedily, outside of the engine: nothing here depends on
//! what else runs.

use std::path::{Path, PathBuf};

use scoutd_kernels::Precision;

use super::error::VerifyError;
use super::report::Subject;
use super::rows::top;
use super::{Options, open};
use crate::model::{self, Batch, BatchRow, KvType, LogitsWanted, Model, ModelOptions};
use crate::units::{SlotId, TokenId};

/// Tokens of one pass through the weights.
pub(super) const PASS_TOKENS: usize = 256;

/// Logits of one pass that are in memory at once, at most (but those of one token always are).
const LOGITS_BYTES_MAX: usize = 16 << 20;

/// Bytes of the logits that are in memory at once.
pub(super) fn logits_bytes(vocab_len: usize) -> usize {
    scored_tokens(vocab_len) * vocab_len * 4
}

fn scored_tokens(vocab_len: usize) -> usize {
    (LOGITS_BYTES_MAX / (4 * vocab_len.max(1))).clamp(1, PASS_TOKENS)
}

/// A model with one sequence.
pub(super) struct Runner {
    path: PathBuf,
    model: Box<dyn Model>,
    pub(super) vocab_len: usize,
    logits: Vec<f32>,
    /// What the sequence holds.
    held: Vec<TokenId>,
}

impl Runner {
    pub(super) fn open(path: &Path, options: &Options) -> Result<Runner, VerifyError> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let (precision, kv_type) = match options.exact {
            true => (Precision::Exact, KvType::F32),
            false => (Precision::Int8, KvType::F16),
        };
        let how = ModelOptions {
            threads: options.threads.unwrap_or(cores),
            precision,
            kv_type,
            pass_tokens_max: PASS_TOKENS,
            ..ModelOptions::default()
        };
        let model = model::open(open(path)?, &how).map_err(VerifyError::model(path))?;
        Ok(Runner {
            path: path.to_path_buf(),
            vocab_len: model.spec().vocab_len as usize,
            model,
            logits: Vec::new(),
            held: Vec::new(),
        })
    }

    pub(super) fn subject(&self) -> Subject {
        let spec = self.model.spec();
        Subject {
            path: self.path.display().to_string(),
            name: spec.name.clone(),
            architecture: spec.architecture.clone(),
            quantization: spec.quantization.clone(),
            bytes: spec.weights_bytes,
        }
    }

    /// Reads `tokens`, and shows the logits after each from number `first` on, with its number. What the
    /// sequence holds of them is not read again, apart from what is shown.
    pub(super) fn read(
        &mut self,
        tokens: &[TokenId],
        first: usize,
        mut show: impl FnMut(usize, &[f32]) -> Result<(), VerifyError>,
    ) -> Result<(), VerifyError> {
        let common = self.held.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        let mut at = self.cut(common.min(first));
        while at < tokens.len() {
            let (end, wanted) = match at < first {
                true => (tokens.len().min(first).min(at + PASS_TOKENS), LogitsWanted::None),
                false => (tokens.len().min(at + scored_tokens(self.vocab_len)), LogitsWanted::All),
            };
            self.pass(&tokens[at..end], wanted)?;
            if wanted == LogitsWanted::All {
                for (index, row) in self.logits.chunks_exact(self.vocab_len).enumerate() {
                    show(at + index, row)?;
                }
            }
            at = end;
        }
        Ok(())
    }

    /// The likeliest tokens one after the other behind `prompt`, up to a stop token (not given back) or `most`.
    pub(super) fn answer(
        &mut self,
        prompt: &[TokenId],
        most: usize,
        stops: &[TokenId],
    ) -> Result<Vec<TokenId>, VerifyError> {
        let mut next = TokenId(0);
        self.read(prompt, prompt.len() - 1, |_, logits| {
            next = top(logits);
            Ok(())
        })?;
        let mut answer = Vec::new();
        while answer.len() < most && !stops.contains(&next) {
            answer.push(next);
            self.pass(&[next], LogitsWanted::Last)?;
            next = top(&self.logits);
        }
        Ok(answer)
    }

    /// Cuts the sequence to `len` tokens; gives how many are left, which may be fewer.
    fn cut(&mut self, len: usize) -> usize {
        let slot = SlotId(0);
        let left = match len {
            0 => {
                self.model.clear(slot);
                0
            }
            len => self.model.share_prefix(slot, slot, len),
        };
        self.held.truncate(left);
        left
    }

    fn pass(&mut self, tokens: &[TokenId], wants_logits: LogitsWanted) -> Result<(), VerifyError> {
        let row = BatchRow { slot: SlotId(0), tokens: tokens.to_vec(), wants_logits };
        self.model
            .forward(&Batch { rows: vec![row] }, &mut self.logits)
            .map_err(VerifyError::model(&self.path))?;
        self.held.extend_from_slice(tokens);
        Ok(())
    }
}
