//! What the forward pass must know of a file, read from its keys and checked against its tensors. Pure.
//!
//! Whatever a file asks for that is not computed here is refused by name: a model that runs is computed as
//! its makers meant it, or not at all.

use std::collections::HashSet;

use scoutd_kernels::Format;

use super::{KvType, ModelError, ModelSpec, llama, llama4};
use crate::gguf::{Gguf, Metadata, TensorInfo};

/// The numbers and the layers of a model. One forward pass serves all architectures.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Shape {
    pub(super) architecture: &'static str,
    pub(super) name: String,
    pub(super) hidden: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_len: usize,
    pub(super) context_len: usize,
    pub(super) vocab_len: usize,
    pub(super) norm_eps: f32,
    pub(super) rope_theta: f32,
    /// Local layers see the keys of their own chunk of this many positions.
    pub(super) chunk: Option<usize>,
    /// Scaling of queries by position in layers that want it.
    pub(super) temperature: Option<Temperature>,
    pub(super) layers: Vec<Layer>,
    /// Whether `token_embd` serves as output matrix too.
    pub(super) tied: bool,
    pub(super) weights_bytes: u64,
    pub(super) parameters: u64,
    pub(super) quantization: String,
}

/// `q ← q (1 + scale · ln(1 + ⌊(p + 1) / floor⌋))`
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Temperature {
    pub(super) floor: f32,
    pub(super) scale: f32,
}

/// What sets a layer apart from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layer {
    pub(super) rope: bool,
    /// Sees only the keys of its chunk.
    pub(super) local: bool,
    /// Norm without weight of each head of queries and keys, after the rotation.
    pub(super) qk_norm: bool,
    pub(super) temperature: bool,
    pub(super) feed_forward: FeedForward,
}

/// The second half of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FeedForward {
    /// Gate, up and down of this width.
    Dense { width: usize },
    /// One of `experts` chosen by the router, and a shared one, all of the same width.
    Experts { experts: usize, width: usize },
}

impl FeedForward {
    /// Routed experts; 0 in a dense layer.
    pub(super) fn experts(self) -> u32 {
        match self {
            FeedForward::Dense { .. } => 0,
            FeedForward::Experts { experts, .. } => u32::try_from(experts).unwrap_or(u32::MAX),
        }
    }
}

impl Shape {
    /// Reads the keys and checks that exactly the tensors they call for are there.
    ///
    /// # Errors
    /// The first key or tensor that is missing, contradicts another, or is not supported.
    pub(super) fn from_gguf(gguf: &Gguf) -> Result<Shape, ModelError> {
        let shape = match gguf.metadata().str("general.architecture")? {
            "llama" => llama::shape(gguf)?,
            "llama4" => llama4::shape(gguf)?,
            other => return Err(ModelError::Architecture(other.to_owned())),
        };
        shape.check_tensors(gguf)?;
        Ok(shape)
    }

    /// The part that others see.
    pub(super) fn spec(&self, kv_type: KvType) -> ModelSpec {
        let value_bytes = kv_type.bytes();
        let narrow = |value: usize| u32::try_from(value).expect("checked when the keys were read");
        ModelSpec {
            architecture: self.architecture.to_owned(),
            name: self.name.clone(),
            layers: narrow(self.layers.len()),
            hidden: narrow(self.hidden),
            heads: narrow(self.heads),
            kv_heads: narrow(self.kv_heads),
            head_len: narrow(self.head_len),
            context_len: narrow(self.context_len),
            vocab_len: narrow(self.vocab_len),
            chunk: self.chunk.map(narrow),
            local_layers: narrow(self.layers.iter().filter(|layer| layer.local).count()),
            page_tokens: narrow(self.page_tokens()),
            kv_token_bytes: narrow(2 * self.kv_heads * self.head_len * value_bytes),
            scratch_token_bytes: self.scratch_token_bytes(),
            weights_bytes: self.weights_bytes,
            parameters: self.parameters,
            quantization: self.quantization.clone(),
        }
    }

    /// Tokens of a page of the KV cache: 64, or the largest power of two below that divides the chunk.
    pub(super) fn page_tokens(&self) -> usize {
        self.chunk.map_or(PAGE_TOKENS, |chunk| 1 << chunk.trailing_zeros().min(6))
    }

    /// Bytes of `Scratch` for each token of a pass. Attention keeps its heads' outputs, and activations exist
    /// in up to three forms of at most 4, 2 and 2 bytes a value, once for the stream and once for an expert.
    fn scratch_token_bytes(&self) -> u64 {
        let (hidden, width) = (self.hidden, self.width_max());
        let (q_len, kv_len) = (self.heads * self.head_len, self.kv_heads * self.head_len);
        let widest = hidden.max(q_len).max(width);
        let stream = 2 * hidden + hidden.max(q_len) + 2 * q_len + 2 * kv_len + self.head_len;
        let routed = match self.experts_max() {
            0 => 0,
            experts => experts + 2 * hidden + 3 * width,
        };
        let values = stream + 3 * width + routed;
        (4 * values + 2 * 8 * widest) as u64
    }

    /// The widest feed-forward part.
    pub(super) fn width_max(&self) -> usize {
        let width = |layer: &Layer| match layer.feed_forward {
            FeedForward::Dense { width } | FeedForward::Experts { width, .. } => width,
        };
        self.layers.iter().map(width).max().unwrap_or(0)
    }

    /// The largest number of experts of a layer, 0 if there are none.
    pub(super) fn experts_max(&self) -> usize {
        let experts = |layer: &Layer| match layer.feed_forward {
            FeedForward::Dense { .. } => 0,
            FeedForward::Experts { experts, .. } => experts,
        };
        self.layers.iter().map(experts).max().unwrap_or(0)
    }

    /// Every tensor that is wanted is there in its shape, and every tensor that is there is used.
    fn check_tensors(&self, gguf: &Gguf) -> Result<(), ModelError> {
        let mut used = HashSet::new();
        for Wanted { name, shape, kind } in self.tensors(gguf.tensor(ROPE_FREQS).is_some()) {
            check_tensor(gguf, &name, &shape, kind)?;
            used.insert(name);
        }
        match gguf.tensors().iter().find(|tensor| !used.contains(&tensor.name)) {
            None => Ok(()),
            Some(tensor) => Err(ModelError::TensorUnknown {
                tensor: tensor.name.clone(),
                architecture: self.architecture,
            }),
        }
    }

    /// The tensors that make up the model.
    pub(super) fn tensors(&self, rope_factors: bool) -> Vec<Wanted> {
        let (hidden, vocab) = (self.hidden, self.vocab_len);
        let mut wanted = Vec::new();
        let mut want = |name: &str, shape: &[usize], kind| {
            wanted.push(Wanted { name: name.to_owned(), shape: shape.to_vec(), kind });
        };
        want(TOKEN_EMBD, &[hidden, vocab], Kind::Matrix);
        want(OUTPUT_NORM, &[hidden], Kind::Plain);
        if !self.tied {
            want(OUTPUT, &[hidden, vocab], Kind::Matrix);
        }
        if rope_factors {
            want(ROPE_FREQS, &[self.head_len / 2], Kind::Plain);
        }
        for (index, layer) in self.layers.iter().enumerate() {
            self.layer_tensors(index, layer.feed_forward, &mut want);
        }
        wanted
    }

    fn layer_tensors(
        &self,
        layer: usize,
        feed_forward: FeedForward,
        want: &mut impl FnMut(&str, &[usize], Kind),
    ) {
        let hidden = self.hidden;
        let (q_len, kv_len) = (self.heads * self.head_len, self.kv_heads * self.head_len);
        let mut want =
            |part: &str, shape: &[usize], kind| want(&layer_tensor(layer, part), shape, kind);
        want("attn_norm", &[hidden], Kind::Plain);
        want("attn_q", &[hidden, q_len], Kind::Matrix);
        want("attn_k", &[hidden, kv_len], Kind::Matrix);
        want("attn_v", &[hidden, kv_len], Kind::Matrix);
        want("attn_output", &[q_len, hidden], Kind::Matrix);
        want("ffn_norm", &[hidden], Kind::Plain);
        match feed_forward {
            FeedForward::Dense { width } => {
                want("ffn_gate", &[hidden, width], Kind::Matrix);
                want("ffn_up", &[hidden, width], Kind::Matrix);
                want("ffn_down", &[width, hidden], Kind::Matrix);
            }
            FeedForward::Experts { experts, width } => {
                want("ffn_gate_inp", &[hidden, experts], Kind::Plain);
                want("ffn_gate_exps", &[hidden, width, experts], Kind::Matrix);
                want("ffn_up_exps", &[hidden, width, experts], Kind::Matrix);
                want("ffn_down_exps", &[width, hidden, experts], Kind::Matrix);
                want("ffn_gate_shexp", &[hidden, width], Kind::Matrix);
                want("ffn_up_shexp", &[hidden, width], Kind::Matrix);
                want("ffn_down_shexp", &[width, hidden], Kind::Matrix);
            }
        }
    }
}

/// A tensor that a shape calls for.
pub(super) struct Wanted {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) kind: Kind,
}

/// Keys that both architectures have, read under the prefix of one.
pub(super) struct Keys<'g, 'a> {
    pub(super) metadata: &'g Metadata<'a>,
    prefix: &'static str,
    tensors: usize,
}

impl<'g, 'a> Keys<'g, 'a> {
    pub(super) fn new(gguf: &'g Gguf<'a>, prefix: &'static str) -> Keys<'g, 'a> {
        Keys { metadata: gguf.metadata(), prefix, tensors: gguf.tensors().len() }
    }

    pub(super) fn key(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.prefix)
    }

    /// A count that must be there and within `1..=largest`.
    pub(super) fn count(&self, suffix: &str, largest: usize) -> Result<usize, ModelError> {
        let key = self.key(suffix);
        let value = self.metadata.u32(&key)?;
        in_range(key, value, largest)
    }

    /// As `count`, where the key may be missing.
    pub(super) fn count_opt(
        &self,
        suffix: &str,
        largest: usize,
    ) -> Result<Option<usize>, ModelError> {
        let key = self.key(suffix);
        let value = self.metadata.u32_opt(&key)?;
        value.map(|value| in_range(key, value, largest)).transpose()
    }

    /// Layers: at least one tensor stands in each, so their number is bounded by the file.
    pub(super) fn layer_count(&self) -> Result<usize, ModelError> {
        self.count("block_count", self.tensors.max(1))
    }

    /// A finite number above zero, given as float or integer.
    pub(super) fn positive(&self, key: &str) -> Result<Option<f32>, ModelError> {
        let value = match self.metadata.f32_opt(key) {
            Err(_) => self.metadata.u32_opt(key)?.map(|value| value as f32),
            other => other?,
        };
        match value {
            Some(value) if !(value.is_finite() && value > 0.0) => {
                Err(ModelError::Key { key: key.to_owned(), value: value.to_string() })
            }
            value => Ok(value),
        }
    }

    /// Refuses a key whatever it holds, except what `harmless` names as the neutral value.
    pub(super) fn refuse(&self, suffix: &str, harmless: &[&str]) -> Result<(), ModelError> {
        let key = self.key(suffix);
        match self.metadata.get(&key).map(ToString::to_string) {
            Some(value) if !harmless.contains(&value.as_str()) => {
                Err(ModelError::Unsupported { key, value })
            }
            _ => Ok(()),
        }
    }

    /// The fields that all architectures share; layers, chunk and temperature are left to the caller.
    pub(super) fn shape(
        &self,
        gguf: &Gguf,
        layers: Vec<Layer>,
        theta: Option<f32>,
    ) -> Result<Shape, ModelError> {
        let hidden = self.count("embedding_length", DIMENSION_MAX)?;
        let heads = self.count("attention.head_count", DIMENSION_MAX)?;
        let kv_heads = self.count_opt("attention.head_count_kv", DIMENSION_MAX)?.unwrap_or(heads);
        let head_len = self.head_len(hidden, heads)?;
        if !heads.is_multiple_of(kv_heads) {
            let (key, value) = (self.key("attention.head_count_kv"), kv_heads.to_string());
            return Err(ModelError::Key { key, value });
        }
        let eps_key = self.key("attention.layer_norm_rms_epsilon");
        let norm_eps = match self.positive(&eps_key)? {
            Some(eps) => eps,
            None => self.metadata.f32(&eps_key)?,
        };
        let theta_key = self.key("rope.freq_base");
        let rope_theta = match self.positive(&theta_key)?.or(theta) {
            Some(theta) => theta,
            None => self.metadata.f32(&theta_key)?,
        };
        self.refuse_rope_scaling(gguf)?;
        Ok(Shape {
            architecture: self.prefix,
            name: self.name()?,
            hidden,
            heads,
            kv_heads,
            head_len,
            context_len: self.count("context_length", u32::MAX as usize)?,
            vocab_len: self.vocab_len(gguf)?,
            norm_eps,
            rope_theta,
            chunk: None,
            temperature: None,
            layers,
            tied: gguf.tensor(OUTPUT).is_none(),
            weights_bytes: gguf.tensors().iter().map(|tensor| tensor.bytes).sum(),
            parameters: gguf.tensors().iter().map(TensorInfo::values).sum(),
            quantization: quantization(gguf)?,
        })
    }

    fn name(&self) -> Result<String, ModelError> {
        let name = self.metadata.str_opt("general.name")?;
        let name = name.or(self.metadata.str_opt("general.basename")?);
        Ok(name.unwrap_or(self.prefix).to_owned())
    }

    fn head_len(&self, hidden: usize, heads: usize) -> Result<usize, ModelError> {
        let head_len = match self.count_opt("attention.key_length", HEAD_LEN_MAX)? {
            Some(head_len) => head_len,
            None => hidden / heads,
        };
        if !head_len.is_multiple_of(HEAD_LEN_STEP) || !(1..=HEAD_LEN_MAX).contains(&head_len) {
            return Err(ModelError::Key {
                key: self.key("attention.key_length"),
                value: head_len.to_string(),
            });
        }
        for suffix in ["attention.value_length", "rope.dimension_count"] {
            match self.count_opt(suffix, DIMENSION_MAX)? {
                Some(other) if other != head_len => {
                    let (key, value) = (self.key(suffix), other.to_string());
                    return Err(ModelError::Unsupported { key, value });
                }
                _ => {}
            }
        }
        Ok(head_len)
    }

    /// The rows of the embedding; the key and the tokenizer must agree.
    fn vocab_len(&self, gguf: &Gguf) -> Result<usize, ModelError> {
        let table = gguf
            .tensor(TOKEN_EMBD)
            .ok_or_else(|| ModelError::TensorMissing(TOKEN_EMBD.to_owned()))?;
        let rows = table.shape.get(1).copied().unwrap_or(0);
        let stated = self.count_opt("vocab_size", u32::MAX as usize)?;
        let tokens = match self.metadata.get(TOKENS) {
            Some(_) => Some(self.metadata.strings(TOKENS)?.len()),
            None => None,
        };
        for (key, value) in [(self.key("vocab_size"), stated), (TOKENS.to_owned(), tokens)] {
            match value {
                Some(value) if value as u64 != rows => {
                    return Err(ModelError::Vocabulary { key, value, rows });
                }
                _ => {}
            }
        }
        match usize::try_from(rows) {
            Ok(rows) if rows > 0 && u32::try_from(rows).is_ok() => Ok(rows),
            _ => Err(ModelError::Vocabulary { key: TOKEN_EMBD.to_owned(), value: 0, rows }),
        }
    }

    /// Scaling is supported in the form of `rope_freqs.weight` alone.
    fn refuse_rope_scaling(&self, gguf: &Gguf) -> Result<(), ModelError> {
        let factors = gguf.tensor(ROPE_FREQS).is_some();
        let kind = self.metadata.str_opt(&self.key("rope.scaling.type"))?;
        match kind {
            Some("none") => {}
            Some("llama3") if factors => {}
            _ => {
                self.refuse("rope.scaling.type", &[])?;
                self.refuse("rope.scaling.factor", &["0", "1"])?;
            }
        }
        self.refuse("rope.scale_linear", &["0", "1"])?;
        self.refuse("rope.scaling.attn_factor", &["1"])
    }
}

/// How a tensor is used.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Any format.
    Matrix,
    /// Read as numbers at load, so F32; converters never quantize these.
    Plain,
}

fn check_tensor(gguf: &Gguf, name: &str, shape: &[usize], kind: Kind) -> Result<(), ModelError> {
    let tensor = gguf.tensor(name).ok_or_else(|| ModelError::TensorMissing(name.to_owned()))?;
    let same = tensor.shape.len() == shape.len()
        && tensor.shape.iter().zip(shape).all(|(&found, &wanted)| found == wanted as u64);
    if !same {
        return Err(ModelError::TensorShape {
            tensor: name.to_owned(),
            found: tensor.shape.clone(),
            wanted: shape.to_vec(),
        });
    }
    if kind == Kind::Plain && tensor.format != Format::F32 {
        let (tensor, format) = (name.to_owned(), tensor.format);
        return Err(ModelError::TensorFormat { tensor, format });
    }
    Ok(())
}

fn in_range(key: String, value: u32, largest: usize) -> Result<usize, ModelError> {
    let count = value as usize;
    if (1..=largest).contains(&count) {
        Ok(count)
    } else {
        Err(ModelError::Key { key, value: value.to_string() })
    }
}

/// The label of the file if its base format is the one that most bytes have, else that format's name.
fn quantization(gguf: &Gguf) -> Result<String, ModelError> {
    let bytes_of = |format: Format| -> u64 {
        gguf.tensors().iter().filter(|t| t.format == format).map(|t| t.bytes).sum()
    };
    let prevailing = Format::ALL.into_iter().max_by_key(|&format| bytes_of(format));
    let prevailing = prevailing.expect("there are formats").name();
    let label = gguf.metadata().u32_opt("general.file_type")?.and_then(|number| {
        FILE_TYPES.iter().find(|(file_type, _)| *file_type == number).map(|(_, label)| *label)
    });
    match label {
        Some(label) if label.starts_with(prevailing) => Ok(label.to_owned()),
        _ => Ok(prevailing.to_owned()),
    }
}

/// `blk.3.attn_q.weight`
pub(super) fn layer_tensor(layer: usize, part: &str) -> String {
    format!("blk.{layer}.{part}.weight")
}

pub(super) const TOKEN_EMBD: &str = "token_embd.weight";
pub(super) const OUTPUT_NORM: &str = "output_norm.weight";
pub(super) const OUTPUT: &str = "output.weight";
pub(super) const ROPE_FREQS: &str = "rope_freqs.weight";
const TOKENS: &str = "tokenizer.ggml.tokens";

/// Widths and head counts above this are no model but a broken header; a token of KV fits 32 bits.
pub(super) const DIMENSION_MAX: usize = 1 << 20;
/// Attention keeps a block of keys of the longest head on the stack.
const HEAD_LEN_MAX: usize = 256;
/// Attention reads heads in whole registers of the widest instruction set.
const HEAD_LEN_STEP: usize = 16;
/// Tokens of a page: a page of a small model's layers has about a megabyte.
const PAGE_TOKENS: usize = 64;

/// `general.file_type`, as llama.cpp numbers it.
const FILE_TYPES: [(u32, &str); 11] = [
    (0, "F32"),
    (1, "F16"),
    (2, "Q4_0"),
    (3, "Q4_1"),
    (7, "Q8_0"),
    (14, "Q4_K_S"),
    (15, "Q4_K_M"),
    (16, "Q5_K_S"),
    (17, "Q5_K_M"),
    (18, "Q6_K"),
    (32, "BF16"),
];
