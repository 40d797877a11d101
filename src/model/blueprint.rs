//! A model that has no file here yet: its numbers, and what a file of it would need.

use scoutd_kernels::Format;

use super::outline::{Outline, Part};
use super::shape::{DIMENSION_MAX, FeedForward, Kind, Shape};
use super::{KvType, llama, llama4};

/// The numbers that decide the size of a model, as its `config.json` has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blueprint {
    /// What it is called.
    pub name: String,
    /// Transformer layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Values per head.
    pub head_len: usize,
    /// Width of the dense feed-forward part.
    pub width: usize,
    /// Entries of the vocabulary.
    pub vocab_len: usize,
    /// Longest context, in tokens.
    pub context_len: usize,
    /// Whether the embedding table is the output matrix too.
    pub tied: bool,
    /// Whether rotation is scaled, which takes a small tensor.
    pub rope_factors: bool,
    /// Llama 4's routed experts; `None` is a plain Llama.
    pub experts: Option<ExpertsOutline>,
}

/// Routed experts, each such layer with a shared one of the same width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertsOutline {
    /// Experts of a layer.
    pub count: usize,
    /// Width of one.
    pub width: usize,
    /// A layer has experts where its number, from 1, is a multiple of this.
    pub step: usize,
    /// Positions that local layers see.
    pub chunk: usize,
}

impl Blueprint {
    /// The tensors of its file: name, dimensions (the fastest first), and whether it is a matrix that may be
    /// quantized.
    pub fn tensors(&self) -> Vec<(String, Vec<u64>, bool)> {
        let wanted = self.shape().tensors(self.rope_factors).into_iter();
        wanted
            .map(|tensor| {
                let shape = tensor.shape.into_iter().map(|length| length as u64).collect();
                (tensor.name, shape, tensor.kind == Kind::Matrix)
            })
            .collect()
    }

    /// What a file needs that has its [`tensors`](Blueprint::tensors) in `formats`, one for each. Rows that are no
    /// whole number of blocks count as the blocks they begin.
    ///
    /// # Panics
    /// If there is not one format for each tensor.
    pub fn outline(&self, formats: &[Format], kv_type: KvType) -> Outline {
        let tensors = self.tensors();
        assert_eq!(tensors.len(), formats.len(), "one format for each tensor");
        let mut shape = self.shape();
        let parts: Vec<Part> = tensors
            .iter()
            .zip(formats)
            .map(|((name, lengths, _), format)| {
                let rows: u64 = lengths[1..].iter().product();
                let blocks = lengths[0].div_ceil(format.block_len() as u64);
                let bytes = rows * blocks * format.block_bytes() as u64;
                Part { name, values: lengths.iter().product(), bytes }
            })
            .collect();
        shape.weights_bytes = parts.iter().map(|part| part.bytes).sum();
        shape.parameters = parts.iter().map(|part| part.values).sum();
        prevailing(formats, &parts).name().clone_into(&mut shape.quantization);
        Outline::new(&shape, kv_type, parts.into_iter())
    }

    /// What a file needs whose matrices are all in Q4_0, whatever else may be better for them.
    pub fn outline_q4_0(&self, kv_type: KvType) -> Outline {
        let format = |matrix| if matrix { Format::Q4_0 } else { Format::F32 };
        let formats: Vec<Format> = self.tensors().iter().map(|tensor| format(tensor.2)).collect();
        self.outline(&formats, kv_type)
    }

    fn shape(&self) -> Shape {
        let count = |count: usize| count.clamp(1, DIMENSION_MAX);
        let (architecture, layers) = match self.experts {
            None => ("llama", vec![llama::layer(count(self.width)); self.layers]),
            Some(experts) => {
                let routed = FeedForward::Experts {
                    experts: count(experts.count),
                    width: count(experts.width),
                };
                let dense = (experts.step > 1).then_some(count(self.width));
                ("llama4", llama4::layers(self.layers, routed, count(experts.step), dense))
            }
        };
        Shape {
            architecture,
            name: self.name.clone(),
            hidden: count(self.hidden),
            heads: count(self.heads),
            kv_heads: count(self.kv_heads),
            head_len: count(self.head_len),
            context_len: self.context_len.min(u32::MAX as usize),
            vocab_len: self.vocab_len.min(u32::MAX as usize),
            norm_eps: 1e-5,
            rope_theta: 1e4,
            chunk: self.experts.map(|experts| count(experts.chunk)),
            temperature: None,
            layers,
            tied: self.tied,
            weights_bytes: 0,
            parameters: 0,
            quantization: String::new(),
        }
    }
}

/// The format that most bytes have.
fn prevailing(formats: &[Format], parts: &[Part]) -> Format {
    let bytes_of = |format: Format| -> u64 {
        let own = formats.iter().zip(parts).filter(|(own, _)| **own == format);
        own.map(|(_, part)| part.bytes).sum()
    };
    Format::ALL.into_iter().max_by_key(|&format| bytes_of(format)).unwrap_or(Format::F32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::residency::ExpertLayer;
    use crate::units::Bytes;

    /// Scout as its `config.json` has it.
    fn scout() -> Blueprint {
        Blueprint {
            name: "scout".to_owned(),
            layers: 48,
            hidden: 5120,
            heads: 40,
            kv_heads: 8,
            head_len: 128,
            width: 16_384,
            vocab_len: 202_048,
            context_len: 10_485_760,
            tied: false,
            rope_factors: true,
            experts: Some(ExpertsOutline { count: 16, width: 8192, step: 1, chunk: 8192 }),
        }
    }

    #[test]
    fn scout_in_q4_0_has_the_sizes_it_is_planned_with() {
        let outline = scout().outline_q4_0(KvType::F16);
        let needs = outline.needs(4096, 256);
        assert_eq!(needs.expert_layers.len(), 48);
        assert_eq!(needs.expert_layers[0], ExpertLayer { count: 16, bytes: Bytes(70_778_880) });
        assert_eq!(needs.shared, Bytes(48 * 70_778_880));
        assert_eq!(needs.table, Bytes(5120 * 202_048 / 32 * 18));
        assert_eq!(needs.kv, Bytes(196_608 * 4096));
        // Attention, shared experts and output matrix; then norms and routers in F32.
        let matrices = 48 * (2 * 5120 * (5120 + 1024) / 32 * 18 + 70_778_880) + needs.table.0;
        let plain = 4 * (48 * (2 * 5120 + 16 * 5120) + 5120 + 64);
        assert_eq!(needs.dense, Bytes(matrices + plain));
        assert_eq!(outline.spec.weights_bytes, needs.weights().0);
        assert_eq!(outline.spec.parameters, 107_769_861_184);
        // 17 B published: active with the embedding table, which is not multiplied.
        assert_eq!(outline.active_parameters / 100_000_000, 161);
        assert_eq!((outline.spec.local_layers, outline.spec.chunk), (36, Some(8192)));
    }

    #[test]
    fn a_blueprint_agrees_with_the_file() {
        let mapping =
            crate::gguf::Mapping::open(std::path::Path::new("models/scout-nano-q4_0.gguf"))
                .expect("the built-in model is in the repository");
        let gguf = crate::gguf::Gguf::parse(mapping.bytes()).expect("it is a GGUF file");
        let from_file = Outline::from_gguf(&gguf, KvType::F16).expect("it can be run");
        let key = |key: &str| gguf.metadata().u32(&format!("llama4.{key}")).expect("has the key");
        let blueprint = Blueprint {
            name: from_file.spec.name.clone(),
            layers: key("block_count") as usize,
            hidden: key("embedding_length") as usize,
            heads: key("attention.head_count") as usize,
            kv_heads: key("attention.head_count_kv") as usize,
            head_len: key("attention.key_length") as usize,
            width: key("feed_forward_length") as usize,
            vocab_len: from_file.spec.vocab_len as usize,
            context_len: key("context_length") as usize,
            tied: gguf.tensor("output.weight").is_none(),
            rope_factors: gguf.tensor("rope_freqs.weight").is_some(),
            experts: Some(ExpertsOutline {
                count: key("expert_count") as usize,
                width: key("expert_feed_forward_length") as usize,
                step: key("interleave_moe_layer_step") as usize,
                chunk: key("attention.sliding_window") as usize,
            }),
        };
        let formats: Vec<Format> = blueprint
            .tensors()
            .iter()
            .map(|(name, ..)| gguf.tensor(name).expect("the file has every tensor").format)
            .collect();
        assert_eq!(blueprint.outline(&formats, KvType::F16), from_file);
    }
}
