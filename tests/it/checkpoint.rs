//! A small made-up checkpoint in the form of a Hugging Face folder, and ways to spoil it.

use std::fs;
use std::path::{Path, PathBuf};

use half::bf16;
use tempfile::TempDir;

/// A Llama in two shards with an index, weights in BF16. Its tokens are the letters; a chat is its contents one
/// after the other.
pub(crate) struct Checkpoint {
    dir: TempDir,
    tensors: Vec<Tensor>,
}

#[derive(Clone)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: &'static str,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

/// The second shard begins with the second layer.
pub(crate) const SHARDS: [&str; 2] =
    ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
/// A tensor of the second shard.
pub(crate) const LAST_DOWN: &str = "model.layers.1.mlp.down_proj.weight";
const INDEX: &str = "model.safetensors.index.json";
const HIDDEN: usize = 64;
const WIDTH: usize = 96;
const LETTERS: usize = 32;

const CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "bos_token_id": 30, "eos_token_id": 31}"#;

impl Checkpoint {
    pub(crate) fn new() -> Checkpoint {
        let mut shapes = vec![
            ("model.embed_tokens.weight".to_owned(), vec![LETTERS, HIDDEN]),
            ("lm_head.weight".to_owned(), vec![LETTERS, HIDDEN]),
            ("model.norm.weight".to_owned(), vec![HIDDEN]),
        ];
        for layer in 0..2 {
            let of_layer = [
                ("input_layernorm", vec![HIDDEN]),
                ("post_attention_layernorm", vec![HIDDEN]),
                ("self_attn.q_proj", vec![HIDDEN, HIDDEN]),
                ("self_attn.k_proj", vec![HIDDEN / 2, HIDDEN]),
                ("self_attn.v_proj", vec![HIDDEN / 2, HIDDEN]),
                ("self_attn.o_proj", vec![HIDDEN, HIDDEN]),
                ("mlp.gate_proj", vec![WIDTH, HIDDEN]),
                ("mlp.up_proj", vec![WIDTH, HIDDEN]),
                ("mlp.down_proj", vec![HIDDEN, WIDTH]),
            ];
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            shapes.extend(of_layer.map(|(part, shape)| (name(part), shape)));
        }
        let tensors = shapes.into_iter().enumerate().map(|(seed, (name, shape))| {
            let count: usize = shape.iter().product();
            let bytes = (0..count).flat_map(|at| weight(seed, at).to_le_bytes()).collect();
            Tensor { name, dtype: "BF16", shape, bytes }
        });
        let dir = tempfile::tempdir().expect("a temporary folder");
        let checkpoint = Checkpoint { dir, tensors: tensors.collect() };
        checkpoint.write("config.json", CONFIG);
        checkpoint.write("tokenizer.json", &tokenizer());
        let template = "{% for message in messages %}{{ message['content'] }}{% endfor %}";
        checkpoint.write("tokenizer_config.json", &format!(r#"{{"chat_template": "{template}"}}"#));
        checkpoint.save(|_| {});
        checkpoint
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).expect("the folder can be written");
    }

    /// Replaces a part of a file, which must be there.
    pub(crate) fn replace(&self, name: &str, from: &str, to: &str) {
        let text = fs::read_to_string(self.path(name)).expect("a text file");
        assert!(text.contains(from), "{name} has no {from}");
        self.write(name, &text.replacen(from, to, 1));
    }

    pub(crate) fn remove(&self, name: &str) {
        fs::remove_file(self.path(name)).expect("the file was there");
    }

    /// Writes the shards and their index; `spoil` may change a tensor on its way.
    pub(crate) fn save(&self, spoil: impl Fn(&mut Tensor)) {
        let (first, second) = self.tensors.split_at(12);
        let mut map = serde_json::Map::new();
        for (file, tensors) in SHARDS.into_iter().zip([first, second]) {
            let mut tensors = tensors.to_vec();
            tensors.iter_mut().for_each(&spoil);
            let mut header = serde_json::Map::new();
            let mut at = 0;
            for tensor in &tensors {
                let end = at + tensor.bytes.len();
                let entry = serde_json::json!({
                    "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, end]
                });
                header.insert(tensor.name.clone(), entry);
                map.insert(tensor.name.clone(), file.into());
                at = end;
            }
            let header = serde_json::to_vec(&header).expect("plain JSON");
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend(header);
            bytes.extend(tensors.into_iter().flat_map(|tensor| tensor.bytes));
            fs::write(self.path(file), bytes).expect("the folder can be written");
        }
        self.write(INDEX, &serde_json::json!({"metadata": {}, "weight_map": map}).to_string());
    }
}

/// Numbers that look like weights; norms (the only odd count of dimensions) are not needed near one.
fn weight(seed: usize, at: usize) -> bf16 {
    let mixed = (at * 2_654_435_761 + seed * 40_503) % 2001;
    bf16::from_f32(mixed as f32 / 4000.0 - 0.25)
}

/// 26 letters, a pair of them, a quote and blanks, and the two ends.
fn tokenizer() -> String {
    let mut vocabulary = serde_json::Map::new();
    let texts = ('a'..='z').map(String::from).chain(["qu", "\"", "Ġ", "Ċ"].map(str::to_owned));
    for (id, text) in texts.enumerate() {
        vocabulary.insert(text, id.into());
    }
    serde_json::json!({
        "added_tokens": [{"id": 30, "content": "<s>", "special": true}, {"id": 31, "content": "</s>", "special": true}],
        "pre_tokenizer": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": ["q u"]},
    })
    .to_string()
}
