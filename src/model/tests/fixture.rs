//! Small models: the golden one in any format, and made-up ones of both architectures.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use scoutd_kernels::quantize::{dequantize_row, quantize_row};
use scoutd_kernels::{Format, Precision};

use crate::gguf::{Gguf, GgufHeader, Mapping};
use crate::model::forward::Transformer;
use crate::model::{Batch, BatchRow, KvType, LogitsWanted, Model, ModelError, ModelOptions};
use crate::units::{SlotId, TokenId};

/// A file taken apart, to be changed and put together again.
#[derive(Clone)]
pub(super) struct Parts {
    pub(super) keys: Vec<(String, Key)>,
    pub(super) tensors: BTreeMap<String, (Vec<u64>, Vec<f32>)>,
    /// The format of matrices; vectors and routers stay F32.
    pub(super) format: Format,
}

#[derive(Clone, Debug)]
pub(super) enum Key {
    Str(String),
    U32(u32),
    F32(f32),
    Bool(bool),
}

impl Parts {
    /// The golden model, with the chunk and floor of its goldens, or with the defaults.
    pub(super) fn tiny(stock: bool) -> Parts {
        let bytes = include_bytes!("../../../tests/golden/tiny/tiny-bf16.gguf");
        let gguf = Gguf::parse(bytes).expect("the golden file");
        let metadata = gguf.metadata();
        let mut keys: Vec<(String, Key)> = Vec::new();
        for key in metadata.keys().filter(|key| key.starts_with("llama4.")) {
            let value = match metadata.u32(key) {
                Ok(value) => Key::U32(value),
                Err(_) => Key::F32(metadata.f32(key).expect("a number")),
            };
            keys.push((key.to_owned(), value));
        }
        keys.push(("general.architecture".to_owned(), Key::Str("llama4".to_owned())));
        keys.push(("general.name".to_owned(), Key::Str("Tiny".to_owned())));
        if !stock {
            keys.push(("llama4.attention.sliding_window".to_owned(), Key::U32(32)));
            keys.push(("scoutd.attn_floor_scale".to_owned(), Key::F32(16.0)));
        }
        let tensors = gguf.tensors().iter().map(|tensor| {
            let mut values = vec![0.0; tensor.values() as usize];
            dequantize_row(tensor.format, gguf.data(tensor), &mut values);
            (tensor.name.clone(), (tensor.shape.clone(), values))
        });
        Parts { keys, tensors: tensors.collect(), format: Format::F32 }
    }

    /// A made-up model, wide enough for every format: two layers of `llama`, or four of `llama4`, of which
    /// one has no rotation and two have experts.
    pub(super) fn random(architecture: &str) -> Parts {
        static LLAMA: LazyLock<Parts> = LazyLock::new(|| Parts::made_up("llama", 2));
        static LLAMA4: LazyLock<Parts> = LazyLock::new(|| Parts::made_up("llama4", 4));
        if architecture == "llama4" { LLAMA4.clone() } else { LLAMA.clone() }
    }

    fn made_up(architecture: &str, layers: u32) -> Parts {
        let (hidden, width, vocab, head_len, heads, kv_heads, experts) =
            (256_u64, 512_u64, 96_u64, 64_u64, 4_u64, 2_u64, 3_u64);
        let mut rng = ChaCha8Rng::seed_from_u64(20_260_101);
        let mut parts = Parts { keys: Vec::new(), tensors: BTreeMap::new(), format: Format::F32 };
        let llama4 = architecture == "llama4";
        parts.set("general.architecture", Key::Str(architecture.to_owned()));
        let sizes = [
            ("block_count", u64::from(layers)),
            ("context_length", 512),
            ("embedding_length", hidden),
            ("feed_forward_length", width),
            ("attention.head_count", heads),
            ("attention.head_count_kv", kv_heads),
            ("attention.key_length", head_len),
            ("attention.value_length", head_len),
            ("rope.dimension_count", head_len),
            ("vocab_size", vocab),
        ];
        for (name, value) in sizes {
            parts.set(&format!("{architecture}.{name}"), Key::U32(value as u32));
        }
        let norm_eps = format!("{architecture}.attention.layer_norm_rms_epsilon");
        parts.set(&norm_eps, Key::F32(1e-5));
        parts.set(&format!("{architecture}.rope.freq_base"), Key::F32(10_000.0));
        if llama4 {
            parts.set("llama4.expert_count", Key::U32(experts as u32));
            parts.set("llama4.expert_used_count", Key::U32(1));
            parts.set("llama4.expert_feed_forward_length", Key::U32(width as u32));
            parts.set("llama4.interleave_moe_layer_step", Key::U32(2));
            parts.set("llama4.attention.sliding_window", Key::U32(16));
            parts.set("scoutd.attn_floor_scale", Key::F32(8.0));
        }
        let mut tensor = |name: String, shape: &[u64], around: f32| {
            let scale = if shape.len() == 1 { 0.2 } else { 1.5 / (shape[0] as f32).sqrt() };
            let count = shape.iter().product::<u64>();
            let value = |_| around + scale * (rng.random::<f32>() * 2.0 - 1.0);
            parts.tensors.insert(name, (shape.to_vec(), (0..count).map(value).collect()));
        };
        tensor("token_embd.weight".to_owned(), &[hidden, vocab], 0.0);
        tensor("output_norm.weight".to_owned(), &[hidden], 1.0);
        tensor("rope_freqs.weight".to_owned(), &[head_len / 2], 1.5);
        let (q_len, kv_len) = (heads * head_len, kv_heads * head_len);
        for layer in 0..layers {
            let mut tensor = |part: &str, shape: &[u64], around| {
                tensor(format!("blk.{layer}.{part}.weight"), shape, around);
            };
            tensor("attn_norm", &[hidden], 1.0);
            tensor("ffn_norm", &[hidden], 1.0);
            tensor("attn_q", &[hidden, q_len], 0.0);
            tensor("attn_k", &[hidden, kv_len], 0.0);
            tensor("attn_v", &[hidden, kv_len], 0.0);
            tensor("attn_output", &[q_len, hidden], 0.0);
            if llama4 && layer % 2 == 1 {
                tensor("ffn_gate_inp", &[hidden, experts], 0.0);
                for (suffix, count) in [("exps", Some(experts)), ("shexp", None)] {
                    let shape = |a, b| [a, b].into_iter().chain(count).collect::<Vec<u64>>();
                    tensor(&format!("ffn_gate_{suffix}"), &shape(hidden, width), 0.0);
                    tensor(&format!("ffn_up_{suffix}"), &shape(hidden, width), 0.0);
                    tensor(&format!("ffn_down_{suffix}"), &shape(width, hidden), 0.0);
                }
            } else {
                tensor("ffn_gate", &[hidden, width], 0.0);
                tensor("ffn_up", &[hidden, width], 0.0);
                tensor("ffn_down", &[width, hidden], 0.0);
            }
        }
        parts
    }

    pub(super) fn format(mut self, format: Format) -> Parts {
        self.format = format;
        self
    }

    pub(super) fn set(&mut self, key: &str, value: Key) {
        self.keys.retain(|(other, _)| other != key);
        self.keys.push((key.to_owned(), value));
    }

    /// The same weights as they read back from the format, in F32.
    pub(super) fn dequantized(&self) -> Parts {
        let mut parts = self.clone();
        parts.format = Format::F32;
        for (name, (shape, values)) in &mut parts.tensors {
            if !is_plain(name, shape) {
                let bytes = quantized(self.format, shape, values);
                dequantize_row(self.format, &bytes, values);
            }
        }
        parts
    }

    pub(super) fn mapping(&self) -> Arc<Mapping> {
        Arc::new(Mapping::built_in("made for a test", Box::leak(self.bytes().into_boxed_slice())))
    }

    /// The model as a file in `dir`, mapped.
    pub(super) fn file(&self, dir: &Path) -> Arc<Mapping> {
        let path = dir.join("model.gguf");
        std::fs::write(&path, self.bytes()).expect("room for it");
        Arc::new(Mapping::open(&path).expect("a regular file"))
    }

    fn bytes(&self) -> Vec<u8> {
        let mut header = GgufHeader::new(32);
        for (key, value) in &self.keys {
            match value {
                Key::Str(value) => header.str(key, value),
                Key::U32(value) => header.u32(key, *value),
                Key::F32(value) => header.f32(key, *value),
                Key::Bool(value) => header.bool(key, *value),
            };
        }
        let format_of = |name: &str, shape: &[u64]| {
            if is_plain(name, shape) { Format::F32 } else { self.format }
        };
        for (name, (shape, _)) in &self.tensors {
            header.tensor(name, format_of(name, shape), shape);
        }
        let mut writer = header.start(Vec::new()).expect("shapes fit the format");
        for (name, (shape, values)) in &self.tensors {
            let bytes = quantized(format_of(name, shape), shape, values);
            writer.tensor(name, &bytes).expect("announced");
        }
        writer.finish().expect("complete")
    }

    pub(super) fn open(&self, options: &ModelOptions) -> Transformer {
        Transformer::new(self.mapping(), options).expect("a good model")
    }

    pub(super) fn refusal(&self) -> ModelError {
        match Transformer::new(self.mapping(), &exact(1)) {
            Ok(_) => panic!("the model was not refused"),
            Err(error) => error,
        }
    }
}

fn is_plain(name: &str, shape: &[u64]) -> bool {
    shape.len() == 1 || name.contains("ffn_gate_inp")
}

fn quantized(format: Format, shape: &[u64], values: &[f32]) -> Vec<u8> {
    let cols = shape[0] as usize;
    let row_bytes = format.row_bytes(cols).expect("whole blocks");
    let mut bytes = vec![0; values.len() / cols * row_bytes];
    for (row, out) in values.chunks_exact(cols).zip(bytes.chunks_exact_mut(row_bytes)) {
        quantize_row(format, row, out);
    }
    bytes
}

/// F32 everywhere, for comparison with goldens.
pub(super) fn exact(slots: usize) -> ModelOptions {
    ModelOptions {
        threads: 2,
        precision: Precision::Exact,
        kv_type: KvType::F32,
        slots,
        ..ModelOptions::default()
    }
}

pub(super) fn row(slot: u16, tokens: &[u32], wants_logits: LogitsWanted) -> BatchRow {
    let tokens = tokens.iter().map(|&token| TokenId(token)).collect();
    BatchRow { slot: SlotId(slot), tokens, wants_logits }
}

/// Logits of a batch that must be good.
pub(super) fn forward(model: &mut Transformer, rows: Vec<BatchRow>) -> Vec<f32> {
    let mut logits = Vec::new();
    model.forward(&Batch { rows }, &mut logits).expect("a good batch");
    logits
}

/// Logits of every token of one sequence in slot 0, from its beginning.
pub(super) fn all_logits(model: &mut Transformer, tokens: &[u32]) -> Vec<f32> {
    model.clear(SlotId(0));
    forward(model, vec![row(0, tokens, LogitsWanted::All)])
}

/// Repeatable tokens below `vocab`.
pub(super) fn tokens(seed: u64, count: usize, vocab: u32) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| rng.random_range(0..vocab)).collect()
}

#[track_caller]
pub(super) fn assert_close(found: &[f32], wanted: &[f32], bound: f32, what: &str) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    let difference = |(a, b): (&f32, &f32)| (a - b).abs();
    let worst = found.iter().zip(wanted).map(difference).fold(0.0, f32::max);
    let finite = found.iter().all(|value| value.is_finite());
    assert!(finite && worst <= bound, "{what}: off by {worst:e}, allowed {bound:e}");
}
