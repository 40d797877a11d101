//! Names and shapes: which tensors the GGUF file has, and where in the checkpoint each comes from.

use std::collections::BTreeSet;

use super::config::{Family, ModelConfig};

/// A tensor of the file to be written.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    pub name: String,
    /// Fastest dimension first.
    pub shape: Vec<u64>,
    pub source: Source,
}

/// Where the values come from; names are those of the checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// A tensor as it is.
    Plain { name: String },
    /// Rows of each of `heads` heads go from half-split to interleaved pairs: row 2i + b of a head
    /// comes from row b·D/2 + i.
    Interleaved { name: String, heads: u64 },
    /// Columns `from..from + rows` of every expert's [in, out] matrix, transposed to [rows, in].
    Experts { name: String, from: u64 },
    /// One [out, in] matrix for each expert.
    Stack { names: Vec<String> },
    /// Computed by the converter.
    Values(Vec<f32>),
}

/// What to write, in the order of the file, and which tensors are left out.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    pub targets: Vec<Target>,
    /// Vision parts.
    pub skipped: Vec<String>,
}

/// A tensor that is not as the config says.
#[derive(Clone, Debug, PartialEq)]
pub struct MappingError {
    pub tensor: String,
    pub reason: String,
}

/// Lays out the file for a checkpoint with the given tensors (name and shape, outermost first).
///
/// What every token needs comes first and lies together; the routed experts follow layer by layer,
/// so that one expert is three runs of the file.
pub fn lay_out(config: &ModelConfig, tensors: &[(&str, &[u64])]) -> Result<Layout, MappingError> {
    let mut builder = Builder::new(config, tensors);
    builder.head()?;
    for layer in 0..config.layers {
        builder.always_needed(layer)?;
    }
    for layer in 0..config.layers {
        if config.has_experts(layer) {
            builder.experts(layer)?;
        }
    }
    builder.finish()
}

struct Builder<'a> {
    config: &'a ModelConfig,
    /// Sorted by plain name: (without prefix, as in the checkpoint, shape).
    known: Vec<(String, &'a str, &'a [u64])>,
    used: BTreeSet<String>,
    layout: Layout,
}

impl<'a> Builder<'a> {
    fn new(config: &'a ModelConfig, tensors: &[(&'a str, &'a [u64])]) -> Builder<'a> {
        let mut layout = Layout { targets: Vec::new(), skipped: Vec::new() };
        let mut known = Vec::with_capacity(tensors.len());
        for &(name, shape) in tensors {
            match plain_name(name, config.multimodal) {
                Some(plain) => known.push((plain, name, shape)),
                None => layout.skipped.push(name.to_owned()),
            }
        }
        known.sort_unstable();
        Builder { config, known, used: BTreeSet::new(), layout }
    }

    fn head(&mut self) -> Result<(), MappingError> {
        let (hidden, vocab) = (self.config.hidden, self.config.vocab_len);
        self.plain("model.embed_tokens.weight", "token_embd.weight", &[vocab, hidden])?;
        self.plain("model.norm.weight", "output_norm.weight", &[hidden])?;
        // A tied checkpoint may still hold a copy of the table as its head.
        if self.config.tied {
            self.used.insert("lm_head.weight".to_owned());
        } else {
            self.plain("lm_head.weight", "output.weight", &[vocab, hidden])?;
        }
        if let Some(factors) = self.config.rope_factors() {
            let shape = vec![factors.len() as u64];
            let source = Source::Values(factors);
            self.layout.targets.push(Target { name: ROPE_FREQS.to_owned(), shape, source });
        }
        Ok(())
    }

    fn always_needed(&mut self, layer: u64) -> Result<(), MappingError> {
        let config = self.config;
        let hidden = config.hidden;
        let (from, to) = (format!("model.layers.{layer}"), format!("blk.{layer}"));
        let norm = |name: &str| format!("{from}.{name}.weight");
        self.plain(&norm("input_layernorm"), &format!("{to}.attn_norm.weight"), &[hidden])?;
        let heads = [
            ("q", config.heads, "attn_q"),
            ("k", config.kv_heads, "attn_k"),
            ("v", config.kv_heads, "attn_v"),
        ];
        for (short, heads, name) in heads {
            let projection = format!("{from}.self_attn.{short}_proj");
            let rotates = short != "v" && config.family == Family::Llama;
            let rows = heads * config.head_len;
            let source = |name: String| {
                if rotates { Source::Interleaved { name, heads } } else { Source::Plain { name } }
            };
            self.add(
                &format!("{projection}.weight"),
                &format!("{to}.{name}.weight"),
                &[rows, hidden],
                source,
            )?;
            if config.attention_bias {
                self.add(
                    &format!("{projection}.bias"),
                    &format!("{to}.{name}.bias"),
                    &[rows],
                    source,
                )?;
            }
        }
        let output = format!("{from}.self_attn.o_proj");
        let q_len = config.heads * config.head_len;
        self.plain(
            &format!("{output}.weight"),
            &format!("{to}.attn_output.weight"),
            &[hidden, q_len],
        )?;
        if config.attention_bias {
            self.plain(&format!("{output}.bias"), &format!("{to}.attn_output.bias"), &[hidden])?;
        }
        self.plain(&norm("post_attention_layernorm"), &format!("{to}.ffn_norm.weight"), &[hidden])?;
        match &config.family {
            Family::Llama4(llama4) if config.has_experts(layer) => {
                let moe = format!("{from}.feed_forward");
                self.plain(
                    &format!("{moe}.router.weight"),
                    &format!("{to}.ffn_gate_inp.weight"),
                    &[llama4.experts, hidden],
                )?;
                let shared = format!("{moe}.shared_expert");
                self.dense(&shared, &to, "_shexp", llama4.expert_ffn_len)
            }
            Family::Llama4(_) => {
                self.dense(&format!("{from}.feed_forward"), &to, "", config.ffn_len)
            }
            Family::Llama => self.dense(&format!("{from}.mlp"), &to, "", config.ffn_len),
        }
    }

    /// Gate, up and down of a feed-forward layer or a shared expert of width `ffn_len`.
    fn dense(
        &mut self,
        from: &str,
        to: &str,
        suffix: &str,
        ffn_len: u64,
    ) -> Result<(), MappingError> {
        let hidden = self.config.hidden;
        let biased = self.config.mlp_bias && self.config.family == Family::Llama;
        for (name, rows, cols) in
            [("gate", ffn_len, hidden), ("up", ffn_len, hidden), ("down", hidden, ffn_len)]
        {
            let (from, to) = (format!("{from}.{name}_proj"), format!("{to}.ffn_{name}{suffix}"));
            self.plain(&format!("{from}.weight"), &format!("{to}.weight"), &[rows, cols])?;
            if biased {
                self.plain(&format!("{from}.bias"), &format!("{to}.bias"), &[rows])?;
            }
        }
        Ok(())
    }

    fn experts(&mut self, layer: u64) -> Result<(), MappingError> {
        let Family::Llama4(llama4) = &self.config.family else { return Ok(()) };
        let (hidden, width, count) = (self.config.hidden, llama4.expert_ffn_len, llama4.experts);
        let from = format!("model.layers.{layer}.feed_forward.experts");
        let stacked = self.shape(&format!("{from}.gate_up_proj")).is_some()
            || self.shape(&format!("{from}.0.gate_proj.weight")).is_none();
        for (name, rows, cols) in
            [("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)]
        {
            let source = if stacked {
                let (tensor, shape, from_column) = match name {
                    "gate" => ("gate_up_proj", [count, hidden, 2 * width], 0),
                    "up" => ("gate_up_proj", [count, hidden, 2 * width], width),
                    _ => ("down_proj", [count, width, hidden], 0),
                };
                let name = self.take(&format!("{from}.{tensor}"), &shape)?;
                Source::Experts { name, from: from_column }
            } else {
                let one = |expert| format!("{from}.{expert}.{name}_proj.weight");
                let names: Result<Vec<_>, _> =
                    (0..count).map(|expert| self.take(&one(expert), &[rows, cols])).collect();
                Source::Stack { names: names? }
            };
            self.layout.targets.push(Target {
                name: format!("blk.{layer}.ffn_{name}_exps.weight"),
                shape: vec![cols, rows, count],
                source,
            });
        }
        Ok(())
    }

    fn plain(&mut self, from: &str, to: &str, shape: &[u64]) -> Result<(), MappingError> {
        self.add(from, to, shape, |name| Source::Plain { name })
    }

    fn add(
        &mut self,
        from: &str,
        to: &str,
        shape: &[u64],
        source: impl Fn(String) -> Source,
    ) -> Result<(), MappingError> {
        let source = source(self.take(from, shape)?);
        let shape = shape.iter().rev().copied().collect();
        self.layout.targets.push(Target { name: to.to_owned(), shape, source });
        Ok(())
    }

    fn shape(&self, plain: &str) -> Option<&'a [u64]> {
        self.find(plain).map(|(_, _, shape)| *shape)
    }

    fn find(&self, plain: &str) -> Option<&(String, &'a str, &'a [u64])> {
        let at = self.known.binary_search_by(|(name, _, _)| name.as_str().cmp(plain)).ok()?;
        self.known.get(at)
    }

    /// Marks a tensor as used and gives its name in the checkpoint.
    fn take(&mut self, plain: &str, shape: &[u64]) -> Result<String, MappingError> {
        let Some((_, name, found)) = self.find(plain) else {
            let similar = self.known.iter().find(|(name, _, _)| name.ends_with(plain));
            let hint = similar.map(|(_, name, _)| format!("; `{name}` has another prefix"));
            return Err(MappingError {
                tensor: plain.to_owned(),
                reason: format!("is missing{}", hint.unwrap_or_default()),
            });
        };
        if *found != shape {
            return Err(MappingError {
                tensor: (*name).to_owned(),
                reason: format!("has shape {found:?}, the config says {shape:?}"),
            });
        }
        let name = (*name).to_owned();
        self.used.insert(plain.to_owned());
        Ok(name)
    }

    /// A tensor that nobody asked for is an error: it would be missing in the answer.
    fn finish(self) -> Result<Layout, MappingError> {
        for (plain, name, _) in &self.known {
            if !self.used.contains(plain) && !plain.ends_with(".rotary_emb.inv_freq") {
                return Err(MappingError {
                    tensor: (*name).to_owned(),
                    reason: "has no place in a GGUF file of this architecture".to_owned(),
                });
            }
        }
        Ok(self.layout)
    }
}

/// The name without the prefix of a multimodal checkpoint; `None` for its vision parts.
fn plain_name(name: &str, multimodal: bool) -> Option<String> {
    if !multimodal {
        return Some(name.to_owned());
    }
    let inner = name.strip_prefix("model.").unwrap_or(name);
    if inner.starts_with("vision_model.") || inner.starts_with("multi_modal_projector.") {
        return None;
    }
    // transformers 5 saves `model.language_model.layers…`, Meta's files `language_model.model.layers…`.
    if let Some(rest) = name.strip_prefix("model.language_model.") {
        return Some(format!("model.{rest}"));
    }
    Some(name.strip_prefix("language_model.").unwrap_or(name).to_owned())
}

const ROPE_FREQS: &str = "rope_freqs.weight";

#[cfg(test)]
pub(super) mod tests {
    use super::super::config::tests::SCOUT;
    use super::*;

    /// Every tensor of Scout's text part, as its shards name them.
    pub(in super::super) fn scout_tensors(prefix: &str) -> Vec<(String, Vec<u64>)> {
        let mut list = vec![
            ("model.embed_tokens.weight".to_owned(), vec![202_048, 5120]),
            ("lm_head.weight".to_owned(), vec![202_048, 5120]),
            ("model.norm.weight".to_owned(), vec![5120]),
        ];
        for layer in 0..48 {
            let of_layer: [(&str, &[u64]); 12] = [
                ("input_layernorm.weight", &[5120]),
                ("post_attention_layernorm.weight", &[5120]),
                ("self_attn.q_proj.weight", &[5120, 5120]),
                ("self_attn.k_proj.weight", &[1024, 5120]),
                ("self_attn.v_proj.weight", &[1024, 5120]),
                ("self_attn.o_proj.weight", &[5120, 5120]),
                ("feed_forward.router.weight", &[16, 5120]),
                ("feed_forward.shared_expert.gate_proj.weight", &[8192, 5120]),
                ("feed_forward.shared_expert.up_proj.weight", &[8192, 5120]),
                ("feed_forward.shared_expert.down_proj.weight", &[5120, 8192]),
                ("feed_forward.experts.gate_up_proj", &[16, 5120, 16384]),
                ("feed_forward.experts.down_proj", &[16, 8192, 5120]),
            ];
            for (name, shape) in of_layer {
                list.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
            }
        }
        list.into_iter().map(|(name, shape)| (format!("{prefix}{name}"), shape)).collect()
    }

    pub(in super::super) fn borrowed(list: &[(String, Vec<u64>)]) -> Vec<(&str, &[u64])> {
        list.iter().map(|(name, shape)| (name.as_str(), shape.as_slice())).collect()
    }

    #[test]
    fn scout_has_628_tensors() {
        let config = ModelConfig::parse(SCOUT.as_bytes()).unwrap();
        let mut tensors = scout_tensors("language_model.");
        tensors.push(("vision_model.class_embedding".to_owned(), vec![1408]));
        tensors.push(("multi_modal_projector.linear_1.weight".to_owned(), vec![5120, 4096]));
        let layout = lay_out(&config, &borrowed(&tensors)).unwrap();
        assert_eq!(layout.targets.len(), 628);
        assert_eq!(layout.skipped.len(), 2);
        let values: u64 = layout.targets.iter().map(|t| t.shape.iter().product::<u64>()).sum();
        // The 64 rotation factors are no parameters.
        assert_eq!(values - 64, 107_769_861_120);
        let up = layout.targets.iter().find(|t| t.name == "blk.7.ffn_up_exps.weight").unwrap();
        assert_eq!(up.shape, [5120, 8192, 16]);
        let name = "language_model.model.layers.7.feed_forward.experts.gate_up_proj".to_owned();
        assert_eq!(up.source, Source::Experts { name, from: 8192 });
        let q = layout.targets.iter().find(|t| t.name == "blk.0.attn_q.weight").unwrap();
        assert!(matches!(&q.source, Source::Plain { .. }), "llama4 is never permuted");
    }

    #[test]
    fn newer_prefix_and_single_expert_files_give_the_same_names() {
        let config = ModelConfig::parse(SCOUT.as_bytes()).unwrap();
        let plain = scout_tensors("");
        let wanted = lay_out(&config, &borrowed(&scout_tensors("language_model."))).unwrap();
        let newer: Vec<_> = plain
            .iter()
            .flat_map(|(name, shape)| {
                let name = match name.strip_prefix("model.") {
                    Some(rest) => format!("model.language_model.{rest}"),
                    None => name.clone(),
                };
                let Some(base) = name.strip_suffix("gate_up_proj") else {
                    return match name.strip_suffix("experts.down_proj") {
                        None => vec![(name, shape.clone())],
                        Some(base) => (0..16)
                            .map(|e| {
                                (format!("{base}experts.{e}.down_proj.weight"), vec![5120, 8192])
                            })
                            .collect(),
                    };
                };
                let one = |e, part| (format!("{base}{e}.{part}_proj.weight"), vec![8192, 5120]);
                (0..16).flat_map(|e| [one(e, "gate"), one(e, "up")]).collect()
            })
            .collect();
        let found = lay_out(&config, &borrowed(&newer)).unwrap();
        let names = |layout: &Layout| -> Vec<(String, Vec<u64>)> {
            layout.targets.iter().map(|t| (t.name.clone(), t.shape.clone())).collect()
        };
        assert_eq!(names(&found), names(&wanted));
        assert!(
            found
                .targets
                .iter()
                .any(|t| matches!(&t.source, Source::Stack { names } if names.len() == 16))
        );
    }

    #[test]
    fn wrong_tensors_are_named() {
        let config = ModelConfig::parse(SCOUT.as_bytes()).unwrap();
        type Tensors = Vec<(String, Vec<u64>)>;
        let check = |change: &dyn Fn(&mut Tensors), tensor: &str, part: &str| {
            let mut tensors = scout_tensors("language_model.");
            change(&mut tensors);
            let error = lay_out(&config, &borrowed(&tensors)).unwrap_err();
            assert_eq!(error.tensor, tensor);
            assert!(error.reason.contains(part), "{}", error.reason);
        };
        check(&|list| drop(list.remove(2)), "model.norm.weight", "is missing");
        check(
            &|list| list[5].1 = vec![5120, 1024],
            "language_model.model.layers.0.self_attn.q_proj.weight",
            "the config says [5120, 5120]",
        );
        check(&|list| list.push(("model.x".to_owned(), vec![1])), "model.x", "no place");
        check(
            &|list| list.iter_mut().for_each(|(name, _)| name.insert_str(0, "base.")),
            "model.embed_tokens.weight",
            "another prefix",
        );
    }

    #[test]
    fn llama_permutes_q_and_k_only() {
        let json = br#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_attention_heads": 2,
            "num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": 10, "tie_word_embeddings": true,
            "max_position_embeddings": 64, "attention_bias": true}"#;
        let config = ModelConfig::parse(json).unwrap();
        let layer = "model.layers.0";
        let mut tensors = vec![
            ("model.embed_tokens.weight".to_owned(), vec![10, 8]),
            ("lm_head.weight".to_owned(), vec![10, 8]),
            ("model.norm.weight".to_owned(), vec![8]),
            (format!("{layer}.input_layernorm.weight"), vec![8]),
            (format!("{layer}.post_attention_layernorm.weight"), vec![8]),
            (format!("{layer}.self_attn.rotary_emb.inv_freq"), vec![2]),
            (format!("{layer}.mlp.gate_proj.weight"), vec![16, 8]),
            (format!("{layer}.mlp.up_proj.weight"), vec![16, 8]),
            (format!("{layer}.mlp.down_proj.weight"), vec![8, 16]),
        ];
        for name in ["q", "k", "v", "o"] {
            tensors.push((format!("{layer}.self_attn.{name}_proj.weight"), vec![8, 8]));
            tensors.push((format!("{layer}.self_attn.{name}_proj.bias"), vec![8]));
        }
        let layout = lay_out(&config, &borrowed(&tensors)).unwrap();
        let permuted: Vec<&str> = layout
            .targets
            .iter()
            .filter(|t| matches!(t.source, Source::Interleaved { heads: 2, .. }))
            .map(|t| t.name.as_str())
            .collect();
        let wanted = [
            "blk.0.attn_q.weight",
            "blk.0.attn_q.bias",
            "blk.0.attn_k.weight",
            "blk.0.attn_k.bias",
        ];
        assert_eq!(permuted, wanted);
        assert!(!layout.targets.iter().any(|t| t.name == "output.weight"), "tied");
    }
}
