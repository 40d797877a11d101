//! Where a model's weights lie in its file, and the few that are kept as numbers.

use std::ops::Range;
use std::sync::Arc;

use scoutd_kernels::{Format, Matrix};

use super::ModelError;
use super::shape::{FeedForward, OUTPUT, OUTPUT_NORM, ROPE_FREQS, Shape, TOKEN_EMBD, layer_tensor};
use crate::gguf::{Gguf, GgufError, Mapping};
use crate::residency::{Pinned, pager};
use crate::units::Bytes;

/// The weights of a model. Matrices stay in the mapping and are read there; norms, router and rotation
/// factors are copied, as they are small and must be finite.
pub(super) struct Weights {
    mapping: Arc<Mapping>,
    pub(super) token_embd: Tensor,
    pub(super) output: Tensor,
    pub(super) output_norm: Vec<f32>,
    pub(super) rope_factors: Option<Vec<f32>>,
    pub(super) layers: Vec<LayerWeights>,
}

/// The weights of a layer.
pub(super) struct LayerWeights {
    pub(super) attn_norm: Vec<f32>,
    pub(super) attn_q: Tensor,
    pub(super) attn_k: Tensor,
    pub(super) attn_v: Tensor,
    pub(super) attn_output: Tensor,
    pub(super) ffn_norm: Vec<f32>,
    pub(super) feed_forward: FeedForwardWeights,
}

/// The matrices of a layer's second half.
pub(super) enum FeedForwardWeights {
    Dense(Gated),
    Experts { router: Tensor, routed: Gated, shared: Gated },
}

/// `down (silu(gate x) * (up x))`
pub(super) struct Gated {
    pub(super) gate: Tensor,
    pub(super) up: Tensor,
    pub(super) down: Tensor,
}

/// A matrix in the file, or several of one shape behind each other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tensor {
    format: Format,
    pub(super) rows: usize,
    pub(super) cols: usize,
    offset: usize,
    /// Bytes of one matrix.
    bytes: usize,
}

impl Weights {
    /// Finds the weights of `shape`, which was read from the same file.
    ///
    /// # Errors
    /// If a tensor is not aligned for its format, or a norm, a router or a factor is not finite.
    pub(super) fn find(
        mapping: Arc<Mapping>,
        gguf: &Gguf,
        shape: &Shape,
    ) -> Result<Weights, ModelError> {
        let finder = Finder { gguf };
        let token_embd = finder.tensor(TOKEN_EMBD)?;
        let rope_factors = match gguf.tensor(ROPE_FREQS) {
            Some(_) => {
                let factors = finder.numbers(ROPE_FREQS)?;
                if factors.iter().any(|&factor| factor <= 0.0) {
                    return Err(ModelError::TensorValue { tensor: ROPE_FREQS.to_owned() });
                }
                Some(factors)
            }
            None => None,
        };
        let layers = shape.layers.iter().enumerate().map(|(index, layer)| {
            let tensor = |part: &str| finder.tensor(&layer_tensor(index, part));
            let numbers = |part: &str| finder.numbers(&layer_tensor(index, part));
            let gated = |[gate, up, down]: [&str; 3]| {
                Ok::<_, ModelError>(Gated {
                    gate: tensor(gate)?,
                    up: tensor(up)?,
                    down: tensor(down)?,
                })
            };
            let feed_forward = match layer.feed_forward {
                FeedForward::Dense { .. } => {
                    FeedForwardWeights::Dense(gated(["ffn_gate", "ffn_up", "ffn_down"])?)
                }
                FeedForward::Experts { .. } => {
                    numbers("ffn_gate_inp")?;
                    FeedForwardWeights::Experts {
                        router: tensor("ffn_gate_inp")?,
                        routed: gated(["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"])?,
                        shared: gated(["ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"])?,
                    }
                }
            };
            Ok::<_, ModelError>(LayerWeights {
                attn_norm: numbers("attn_norm")?,
                attn_q: tensor("attn_q")?,
                attn_k: tensor("attn_k")?,
                attn_v: tensor("attn_v")?,
                attn_output: tensor("attn_output")?,
                ffn_norm: numbers("ffn_norm")?,
                feed_forward,
            })
        });
        Ok(Weights {
            token_embd,
            output: if shape.tied { token_embd } else { finder.tensor(OUTPUT)? },
            output_norm: finder.numbers(OUTPUT_NORM)?,
            rope_factors,
            layers: layers.collect::<Result<_, _>>()?,
            mapping,
        })
    }

    /// Where the weights lie that every token reads: all but routed experts, and but an embedding table that is
    /// read by rows.
    pub(super) fn dense_ranges(&self) -> Vec<Range<usize>> {
        let mut tensors = vec![&self.output];
        for layer in &self.layers {
            tensors.extend([&layer.attn_q, &layer.attn_k, &layer.attn_v, &layer.attn_output]);
            let gated = match &layer.feed_forward {
                FeedForwardWeights::Dense(dense) => dense,
                FeedForwardWeights::Experts { router, shared, .. } => {
                    tensors.push(router);
                    shared
                }
            };
            tensors.extend([&gated.gate, &gated.up, &gated.down]);
        }
        tensors.into_iter().map(|tensor| tensor.offset..tensor.offset + tensor.bytes).collect()
    }

    /// Brings the weights that every token reads into memory and keeps them there.
    pub(super) fn pin(&self, lock: bool) -> Result<Pinned, ModelError> {
        let table = self.token_embd.offset..self.token_embd.offset + self.token_embd.bytes;
        if self.output.offset != self.token_embd.offset {
            // An advice: rows come in all the same, with more around them.
            let _ = pager::expect_scattered(&self.mapping, table);
        }
        Ok(Pinned::new(Arc::clone(&self.mapping), self.dense_ranges(), lock)?)
    }

    /// Fails if the file is not as it was when it was opened.
    pub(super) fn check_unchanged(&self) -> Result<(), ModelError> {
        Ok(self.mapping.check_unchanged()?)
    }

    /// Gives the memory of everything that lies in the mapping back; it is read again when it is used. Returns the
    /// bytes of the file.
    pub(super) fn release(&self) -> std::io::Result<Bytes> {
        let len = self.mapping.bytes().len();
        pager::drop_pages(&self.mapping, 0..len)?;
        Ok(Bytes(len as u64))
    }

    /// What to say when bytes of a file that has not changed could not be read.
    pub(super) fn unreadable(&self) -> ModelError {
        let path = self.mapping.path().to_owned();
        let source = std::io::Error::other("the disk could not read mapped weights");
        ModelError::File(GgufError::Io { path, source })
    }

    /// The matrix `tensor`, or the first of several.
    pub(super) fn matrix(&self, tensor: &Tensor) -> Matrix<'_> {
        self.expert(tensor, 0)
    }

    /// One of several matrices behind each other.
    pub(super) fn expert(&self, tensor: &Tensor, expert: usize) -> Matrix<'_> {
        let start = tensor.offset + expert * tensor.bytes;
        tensor.matrix(&self.mapping.bytes()[start..start + tensor.bytes])
    }
}

impl Tensor {
    /// One matrix of this kind in `bytes`, which lie as they do in the file, up to whole pages.
    pub(super) fn matrix<'a>(&self, bytes: &'a [u8]) -> Matrix<'a> {
        Matrix::new(self.format, self.rows, self.cols, bytes).expect("checked when found")
    }

    /// Where the first matrix begins in the file.
    pub(super) fn offset(&self) -> usize {
        self.offset
    }

    /// Bytes of one matrix.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Reads tensors of a file whose names and shapes were checked.
struct Finder<'g, 'a> {
    gguf: &'g Gguf<'a>,
}

impl Finder<'_, '_> {
    fn tensor(&self, name: &str) -> Result<Tensor, ModelError> {
        let missing = || ModelError::TensorMissing(name.to_owned());
        let info = self.gguf.tensor(name).ok_or_else(missing)?;
        let dimension = |index: usize| info.shape.get(index).map_or(1, |&d| d as usize);
        let (cols, rows, count) = (dimension(0), dimension(1), dimension(2));
        let bytes = info.bytes as usize / count;
        let data = &self.gguf.data(info)[..bytes];
        Matrix::new(info.format, rows, cols, data)
            .map_err(|error| ModelError::TensorLayout { tensor: name.to_owned(), error })?;
        Ok(Tensor { format: info.format, rows, cols, offset: info.offset as usize, bytes })
    }

    /// The values of an F32 tensor, which must be finite.
    fn numbers(&self, name: &str) -> Result<Vec<f32>, ModelError> {
        let missing = || ModelError::TensorMissing(name.to_owned());
        let info = self.gguf.tensor(name).ok_or_else(missing)?;
        let chunks = self.gguf.data(info).chunks_exact(4);
        let values: Vec<f32> =
            chunks.map(|four| f32::from_le_bytes(four.try_into().expect("four"))).collect();
        if values.iter().all(|value| value.is_finite()) {
            Ok(values)
        } else {
            Err(ModelError::TensorValue { tensor: name.to_owned() })
        }
    }
}
