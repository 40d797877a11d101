//! A checkpoint's `config.json`: the shape of the model, and what a GGUF file cannot express.

use serde_json::{Map, Value};

/// Shape and constants of a text model, as the converter needs them.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    pub family: Family,
    /// The checkpoint also holds a vision part, which is left out.
    pub multimodal: bool,
    pub layers: u64,
    pub hidden: u64,
    pub heads: u64,
    pub kv_heads: u64,
    pub head_len: u64,
    /// Width of dense feed-forward layers.
    pub ffn_len: u64,
    pub vocab_len: u64,
    pub context_len: u64,
    pub norm_eps: f32,
    pub rope_theta: f32,
    pub rope_scaling: Option<RopeScaling>,
    /// No output matrix: the embedding table serves for both.
    pub tied: bool,
    /// Biases at q, k, v and the output projection; at gate, up and down.
    pub attention_bias: bool,
    pub mlp_bias: bool,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub pad: Option<u32>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Family {
    Llama,
    Llama4(Llama4),
}

/// What Llama 4 adds.
#[derive(Clone, Debug, PartialEq)]
pub struct Llama4 {
    pub experts: u64,
    pub expert_ffn_len: u64,
    /// A layer has experts where (layer + 1) % step = 0.
    pub moe_step: u64,
    pub chunk_len: u64,
    pub floor_scale: f32,
    pub attn_scale: f32,
}

/// `rope_scaling` of type `llama3`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeScaling {
    pub factor: f64,
    pub low: f64,
    pub high: f64,
    /// `original_max_position_embeddings`
    pub context: f64,
}

/// Why a config was refused.
#[derive(Clone, Debug, PartialEq)]
pub enum ConfigError {
    /// No architecture of ours.
    Architecture(String),
    Other(String),
}

impl From<String> for ConfigError {
    fn from(reason: String) -> ConfigError {
        ConfigError::Other(reason)
    }
}

impl Family {
    /// `general.architecture` of the GGUF file.
    pub fn name(&self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Llama4(_) => "llama4",
        }
    }
}

impl ModelConfig {
    /// Reads a `config.json`. Refuses, by the name of the field, what the GGUF form of the
    /// architecture cannot express, instead of converting to a file that answers wrongly.
    pub fn parse(json: &[u8]) -> Result<ModelConfig, ConfigError> {
        let root: Value =
            serde_json::from_slice(json).map_err(|error| format!("no valid JSON: {error}"))?;
        let root = root.as_object().ok_or_else(|| "no JSON object".to_owned())?;
        let (is_llama4, multimodal) = match architecture(root)?.as_str() {
            "Llama4ForConditionalGeneration" => (true, true),
            "Llama4ForCausalLM" => (true, false),
            "LlamaForCausalLM" => (false, false),
            other => return Err(ConfigError::Architecture(other.to_owned())),
        };
        let text = match root.get("text_config") {
            Some(Value::Object(text)) => text,
            Some(_) => return Err("`text_config` is no object".to_owned().into()),
            None => root,
        };
        for fields in [root, text] {
            if fields.get("quantization_config").is_some_and(|value| !value.is_null()) {
                return Err("`quantization_config`: the checkpoint is quantized already; \
                            convert the original, or a GGUF file"
                    .to_owned()
                    .into());
            }
        }
        Ok(Fields { text, root }.config(is_llama4, multimodal)?)
    }

    /// Divisors of the rotation's frequencies, one for each pair of a head: `rope_freqs.weight`.
    pub fn rope_factors(&self) -> Option<Vec<f32>> {
        let scaling = self.rope_scaling?;
        let pairs = self.head_len / 2;
        let exponent = |i: u64| 2.0 * i as f64 / self.head_len as f64;
        let frequency = |i| f64::from(self.rope_theta).powf(-exponent(i));
        Some((0..pairs).map(|i| scaling.factor_at(frequency(i)) as f32).collect())
    }

    /// Whether `layer` has routed experts.
    pub fn has_experts(&self, layer: u64) -> bool {
        match &self.family {
            Family::Llama => false,
            Family::Llama4(llama4) => (layer + 1).is_multiple_of(llama4.moe_step),
        }
    }
}

impl RopeScaling {
    /// Llama 3's rule. Scout has low = high: the ramp between them is empty, and dividing by its
    /// width must not happen.
    fn factor_at(&self, frequency: f64) -> f64 {
        let wavelength = std::f64::consts::TAU / frequency;
        if wavelength < self.context / self.high {
            1.0
        } else if wavelength > self.context / self.low || self.high == self.low {
            self.factor
        } else {
            let t = (self.context / wavelength - self.low) / (self.high - self.low);
            1.0 / ((1.0 - t) / self.factor + t)
        }
    }
}

fn architecture(root: &Map<String, Value>) -> Result<String, ConfigError> {
    if let Some(Value::String(name)) = root.get("architectures").and_then(|list| list.get(0)) {
        return Ok(name.clone());
    }
    let by_type = match root.get("model_type").and_then(Value::as_str) {
        Some("llama") => "LlamaForCausalLM",
        Some("llama4") => "Llama4ForConditionalGeneration",
        Some("llama4_text") => "Llama4ForCausalLM",
        Some(other) => return Err(ConfigError::Architecture(other.to_owned())),
        None => return Err("neither `architectures` nor `model_type`".to_owned().into()),
    };
    Ok(by_type.to_owned())
}

/// The text model's fields, and those beside them at the top.
struct Fields<'a> {
    text: &'a Map<String, Value>,
    root: &'a Map<String, Value>,
}

impl Fields<'_> {
    fn config(&self, is_llama4: bool, multimodal: bool) -> Result<ModelConfig, String> {
        let hidden = self.size("hidden_size")?;
        let heads = self.size("num_attention_heads")?;
        let kv_heads = self.size_or("num_key_value_heads", heads)?;
        if !heads.is_multiple_of(kv_heads) {
            return Err(format!("`num_key_value_heads`: {heads} heads share {kv_heads} unevenly"));
        }
        let head_len = self.size_or("head_dim", (hidden / heads).max(1))?;
        if !head_len.is_multiple_of(2) || head_len > HEAD_LEN_MAX {
            return Err(format!("`head_dim`: {head_len} is odd or exceeds {HEAD_LEN_MAX}"));
        }
        let layers = self.size("num_hidden_layers")?;
        if layers > LAYERS_MAX {
            return Err(format!("`num_hidden_layers`: {layers} exceeds {LAYERS_MAX}"));
        }
        if let Some(act) = self.get("hidden_act").filter(|act| *act != "silu") {
            return Err(format!("`hidden_act`: only silu is known, not {act}"));
        }
        let rope = self.rope()?;
        let ffn = if is_llama4 { "intermediate_size_mlp" } else { "intermediate_size" };
        let theta_default = if is_llama4 { 500_000.0 } else { 10_000.0 };
        Ok(ModelConfig {
            family: if is_llama4 {
                Family::Llama4(self.llama4(layers)?)
            } else {
                self.refuse_experts()?;
                Family::Llama
            },
            multimodal,
            layers,
            hidden,
            heads,
            kv_heads,
            head_len,
            ffn_len: self.size(ffn)?,
            vocab_len: self.size("vocab_size")?,
            context_len: self.size("max_position_embeddings")?,
            norm_eps: self.float_or("rms_norm_eps", 1e-5)? as f32,
            rope_theta: rope.theta.unwrap_or(theta_default) as f32,
            rope_scaling: rope.scaling,
            tied: self.flag("tie_word_embeddings")?.unwrap_or(false),
            attention_bias: self.flag("attention_bias")?.unwrap_or(false),
            mlp_bias: self.flag("mlp_bias")?.unwrap_or(false),
            bos: self.token("bos_token_id"),
            eos: self.token("eos_token_id"),
            pad: self.token("pad_token_id"),
        })
    }

    fn llama4(&self, layers: u64) -> Result<Llama4, String> {
        let experts = self.size("num_local_experts")?;
        let per_token = self.size_or("num_experts_per_tok", 1)?;
        if per_token != 1 {
            return Err(format!("`num_experts_per_tok`: a GGUF of Llama 4 has 1, not {per_token}"));
        }
        let moe_step = self.size_or("interleave_moe_layer_step", 1)?;
        self.layer_list("moe_layers", layers, |layer| (layer + 1) % moe_step == 0)?;
        self.check_rope_layers(layers)?;
        if self.flag("use_qk_norm")?.unwrap_or(true) != (experts != 128) {
            return Err("`use_qk_norm`: a GGUF of Llama 4 has it on, and off with 128 experts; \
                        this checkpoint differs"
                .to_owned());
        }
        if self.flag("attn_temperature_tuning")? == Some(false) {
            return Err("`attn_temperature_tuning`: cannot be off in a GGUF of Llama 4".to_owned());
        }
        if self.flag("attention_bias")?.unwrap_or(false) {
            return Err("`attention_bias`: Llama 4 has none".to_owned());
        }
        Ok(Llama4 {
            experts,
            expert_ffn_len: self.size("intermediate_size")?,
            moe_step,
            chunk_len: match self.text.get("attention_chunk_size") {
                Some(Value::Null) => {
                    return Err("`attention_chunk_size`: null cannot be expressed".to_owned());
                }
                _ => self.size_or("attention_chunk_size", 8192)?,
            },
            floor_scale: self.float_or("floor_scale", 8192.0)? as f32,
            attn_scale: self.float_or("attn_scale", 0.1)? as f32,
        })
    }

    /// The container cannot say which layers rotate: every fourth does not.
    fn check_rope_layers(&self, layers: u64) -> Result<(), String> {
        let Some(Value::Array(list)) = self.text.get("no_rope_layers") else {
            return match self.size_or("no_rope_layer_interval", 4)? {
                4 => Ok(()),
                other => Err(format!("`no_rope_layer_interval`: must be 4, not {other}")),
            };
        };
        if list.is_empty() {
            return Ok(());
        }
        let as_expected = list.len() as u64 == layers
            && (0..layers).zip(list).all(|(layer, value)| {
                value.as_u64() == Some(u64::from(!(layer + 1).is_multiple_of(4)))
            });
        if as_expected {
            Ok(())
        } else {
            Err("`no_rope_layers`: a GGUF of Llama 4 rotates all but every fourth layer; \
                 this checkpoint differs"
                .to_owned())
        }
    }

    fn layer_list(&self, key: &str, layers: u64, rule: impl Fn(u64) -> bool) -> Result<(), String> {
        let Some(Value::Array(list)) = self.text.get(key) else { return Ok(()) };
        let found: Vec<Option<u64>> = list.iter().map(Value::as_u64).collect();
        let wanted: Vec<Option<u64>> = (0..layers).filter(|&layer| rule(layer)).map(Some).collect();
        if found == wanted {
            Ok(())
        } else {
            Err(format!("`{key}`: contradicts `interleave_moe_layer_step`"))
        }
    }

    fn refuse_experts(&self) -> Result<(), String> {
        match self.size_or("num_local_experts", 1)? {
            1 => Ok(()),
            experts => Err(format!("`num_local_experts`: {experts} experts in a plain Llama")),
        }
    }

    /// `rope_parameters` (transformers 5), or `rope_scaling` and `rope_theta`.
    fn rope(&self) -> Result<Rope, String> {
        let (key, object) = match (self.get("rope_parameters"), self.get("rope_scaling")) {
            (Some(Value::Object(object)), _) => ("rope_parameters", object),
            (None, Some(Value::Object(object))) => ("rope_scaling", object),
            (None, None) => {
                return Ok(Rope { theta: self.float("rope_theta")?, scaling: None });
            }
            _ => return Err("`rope_parameters` or `rope_scaling` is no object".to_owned()),
        };
        let theta = match object.get("rope_theta") {
            Some(_) => float_of(object, "rope_theta")?,
            None => self.float("rope_theta")?,
        };
        let kind = object.get("rope_type").or_else(|| object.get("type"));
        let scaling = match kind.and_then(Value::as_str) {
            None | Some("default") => None,
            Some("llama3") => {
                let field = |name: &str| {
                    float_of(object, name)?.ok_or_else(|| format!("`{key}` has no `{name}`"))
                };
                let scaling = RopeScaling {
                    factor: field("factor")?,
                    low: field("low_freq_factor")?,
                    high: field("high_freq_factor")?,
                    context: field("original_max_position_embeddings")?,
                };
                let positive = [scaling.factor, scaling.low, scaling.high, scaling.context];
                if positive.iter().any(|value| *value <= 0.0) || scaling.low > scaling.high {
                    return Err(format!("`{key}`: {scaling:?} makes no sense"));
                }
                Some(scaling)
            }
            Some(other) => return Err(format!("`{key}`: type `{other}` is not supported")),
        };
        Ok(Rope { theta, scaling })
    }

    /// A field of the text model that is there and not null.
    fn get(&self, key: &str) -> Option<&Value> {
        self.text.get(key).filter(|value| !value.is_null())
    }

    fn size(&self, key: &str) -> Result<u64, String> {
        let value = self.get(key).ok_or_else(|| format!("`{key}` is missing"))?;
        match whole(value) {
            Some(0) | None => Err(format!("`{key}`: {value} is no size")),
            Some(size) if size > SIZE_MAX => Err(format!("`{key}`: {size} is too large")),
            Some(size) => Ok(size),
        }
    }

    fn size_or(&self, key: &str, default: u64) -> Result<u64, String> {
        if self.get(key).is_some() { self.size(key) } else { Ok(default) }
    }

    fn float(&self, key: &str) -> Result<Option<f64>, String> {
        float_of(self.text, key)
    }

    fn float_or(&self, key: &str, default: f64) -> Result<f64, String> {
        Ok(self.float(key)?.unwrap_or(default))
    }

    /// Scout says `attn_temperature_tuning: 4`: an integer that means true.
    fn flag(&self, key: &str) -> Result<Option<bool>, String> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(value) => match value.as_f64() {
                Some(number) => Ok(Some(number != 0.0)),
                None => Err(format!("`{key}`: {value} is neither true nor false")),
            },
        }
    }

    /// A token id, or the first of a list; beside the text model's fields as a second choice.
    fn token(&self, key: &str) -> Option<u32> {
        let value = self.get(key).or_else(|| self.root.get(key))?;
        let value = value.get(0).unwrap_or(value);
        u32::try_from(value.as_u64()?).ok()
    }
}

struct Rope {
    theta: Option<f64>,
    scaling: Option<RopeScaling>,
}

fn whole(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| {
        let float = value.as_f64()?;
        (float >= 0.0 && float.fract() == 0.0 && float < 2e15).then_some(float as u64)
    })
}

fn float_of(object: &Map<String, Value>, key: &str) -> Result<Option<f64>, String> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_f64() {
            Some(float) => Ok(Some(float)),
            None => Err(format!("`{key}`: {value} is no number")),
        },
    }
}

/// Keeps products of sizes far from overflow; the largest real one is a context of 10 million.
const SIZE_MAX: u64 = 1 << 31;
const LAYERS_MAX: u64 = 1024;
const HEAD_LEN_MAX: u64 = 1 << 16;

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Scout's own numbers, as its `config.json` has them.
    pub(in super::super) const SCOUT: &str = r#"{
        "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4",
        "text_config": {
            "attention_bias": false, "attention_chunk_size": 8192, "attn_scale": 0.1,
            "attn_temperature_tuning": 4, "bos_token_id": 200000, "eos_token_id": [200001, 200007, 200008],
            "floor_scale": 8192, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
            "interleave_moe_layer_step": 1, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
            "max_position_embeddings": 10485760, "model_type": "llama4_text", "no_rope_layers": [],
            "num_attention_heads": 40, "num_experts_per_tok": 1, "num_hidden_layers": 48,
            "num_key_value_heads": 8, "num_local_experts": 16, "pad_token_id": 200018,
            "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "use_qk_norm": true, "vocab_size": 202048,
            "rope_scaling": {"factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3"}
        }, "vision_config": {"hidden_size": 1408} }"#;

    #[test]
    fn scout_is_read() {
        let scout = ModelConfig::parse(SCOUT.as_bytes()).unwrap();
        assert!(scout.multimodal && !scout.tied);
        assert_eq!((scout.layers, scout.heads, scout.head_len), (48, 40, 128));
        assert_eq!((scout.ffn_len, scout.bos, scout.eos), (16384, Some(200000), Some(200001)));
        let Family::Llama4(llama4) = &scout.family else { panic!("{:?}", scout.family) };
        assert_eq!((llama4.experts, llama4.expert_ffn_len, llama4.chunk_len), (16, 8192, 8192));
        let factors = scout.rope_factors().unwrap();
        assert_eq!(factors.len(), 64);
        assert!(factors[..35].iter().all(|&factor| factor == 1.0));
        assert!(factors[35..].iter().all(|&factor| factor == 16.0));
    }

    #[test]
    fn llama3_factors() {
        // 3.1 8B, 3.2 1B, 3.2 3B: how many ones, the ramp, then the factor.
        let cases: [(u64, f64, usize, &[f32]); 3] = [
            (128, 8.0, 29, &[1.2075, 1.5534, 2.0263, 2.6945, 3.6843, 5.2573]),
            (64, 32.0, 15, &[1.6513, 3.2923, 9.6667]),
            (128, 32.0, 29, &[1.2349, 1.6513, 2.2767, 3.2923, 5.1716, 9.6667]),
        ];
        for (head_len, factor, ones, ramp) in cases {
            let mut config = ModelConfig::parse(SCOUT.as_bytes()).unwrap();
            config.head_len = head_len;
            config.rope_scaling =
                Some(RopeScaling { factor, low: 1.0, high: 4.0, context: 8192.0 });
            let factors = config.rope_factors().unwrap();
            assert!(factors[..ones].iter().all(|&value| value == 1.0));
            for (found, wanted) in factors[ones..].iter().zip(ramp) {
                assert!((found - wanted).abs() < 1e-4, "{found} is not {wanted}");
            }
            assert!(factors[ones + ramp.len()..].iter().all(|&value| value == factor as f32));
        }
    }

    #[test]
    fn what_gguf_cannot_express_is_refused() {
        let check = |from: &str, to: &str, part: &str| {
            assert!(SCOUT.contains(from), "{from}");
            let changed = SCOUT.replacen(from, to, 1);
            match ModelConfig::parse(changed.as_bytes()) {
                Err(ConfigError::Other(reason)) => assert!(reason.contains(part), "{reason}"),
                other => panic!("{to}: {other:?}"),
            }
        };
        check(r#""no_rope_layers": []"#, r#""no_rope_layers": [1, 1, 0]"#, "no_rope_layers");
        check(r#""use_qk_norm": true"#, r#""use_qk_norm": false"#, "use_qk_norm");
        check(r#""num_experts_per_tok": 1"#, r#""num_experts_per_tok": 2"#, "num_experts_per_tok");
        check(r#""attn_temperature_tuning": 4"#, r#""attn_temperature_tuning": false"#, "tuning");
        check(r#""attention_chunk_size": 8192"#, r#""attention_chunk_size": null"#, "chunk");
        check(r#""rope_type": "llama3""#, r#""rope_type": "yarn""#, "`yarn`");
        check(r#""hidden_size": 5120"#, r#""hidden_size": -1"#, "`hidden_size`");
        check(r#""head_dim": 128"#, r#""head_dim": 2000000000"#, "`head_dim`");
        check(r#""hidden_size": 5120,"#, "", "`hidden_size` is missing");
        check(r#""hidden_act": "silu""#, r#""hidden_act": "gelu""#, "hidden_act");
        check(r#""model_type": "llama4","#, r#""quantization_config": {"bits": 4},"#, "quantized");
        check("{", "[", "JSON");
        assert_eq!(
            ModelConfig::parse(br#"{"architectures": ["Qwen3ForCausalLM"]}"#),
            Err(ConfigError::Architecture("Qwen3ForCausalLM".to_owned()))
        );
        // With 128 experts the norm is off, as Maverick has it.
        let maverick = SCOUT
            .replacen(r#""num_local_experts": 16"#, r#""num_local_experts": 128"#, 1)
            .replacen(r#""use_qk_norm": true"#, r#""use_qk_norm": false"#, 1);
        assert!(ModelConfig::parse(maverick.as_bytes()).is_ok());
    }
}
