//! Llama 4 Scout at its real size, 218 GB of which are in sparse files: planned to the byte without a weight being
//! read.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use serde_json::{Map, Value, json};

/// Scout's own numbers, as its `config.json` has them.
const CONFIG: &str = r#"{
    "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4",
    "text_config": {
        "attention_bias": false, "attention_chunk_size": 8192, "attn_scale": 0.1, "attn_temperature_tuning": 4,
        "bos_token_id": 200000, "eos_token_id": [200001, 200007, 200008], "floor_scale": 8192, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 5120, "interleave_moe_layer_step": 1, "intermediate_size": 8192,
        "intermediate_size_mlp": 16384, "max_position_embeddings": 10485760, "model_type": "llama4_text",
        "no_rope_layers": [], "num_attention_heads": 40, "num_experts_per_tok": 1, "num_hidden_layers": 48,
        "num_key_value_heads": 8, "num_local_experts": 16, "pad_token_id": 200018, "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0, "use_qk_norm": true, "vocab_size": 202048,
        "rope_scaling": {"factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"}
    }, "vision_config": {"hidden_size": 1408} }"#;

const LAYERS: usize = 48;
/// One for each layer and each end, as many as the real checkpoint has.
const SHARDS: usize = 50;

/// The tensors of a shard.
fn shard(number: usize) -> Vec<(String, Vec<u64>)> {
    let (hidden, width, vocabulary) = (5120, 8192, 202_048);
    match number {
        0 => vec![
            ("language_model.model.embed_tokens.weight".to_owned(), vec![vocabulary, hidden]),
            ("vision_model.class_embedding".to_owned(), vec![1408]),
        ],
        last if last == SHARDS - 1 => vec![
            ("language_model.model.norm.weight".to_owned(), vec![hidden]),
            ("language_model.lm_head.weight".to_owned(), vec![vocabulary, hidden]),
        ],
        layer => [
            ("input_layernorm.weight", vec![hidden]),
            ("post_attention_layernorm.weight", vec![hidden]),
            ("self_attn.q_proj.weight", vec![hidden, hidden]),
            ("self_attn.k_proj.weight", vec![1024, hidden]),
            ("self_attn.v_proj.weight", vec![1024, hidden]),
            ("self_attn.o_proj.weight", vec![hidden, hidden]),
            ("feed_forward.router.weight", vec![16, hidden]),
            ("feed_forward.experts.gate_up_proj", vec![16, hidden, 2 * width]),
            ("feed_forward.experts.down_proj", vec![16, width, hidden]),
            ("feed_forward.shared_expert.gate_proj.weight", vec![width, hidden]),
            ("feed_forward.shared_expert.up_proj.weight", vec![width, hidden]),
            ("feed_forward.shared_expert.down_proj.weight", vec![hidden, width]),
        ]
        .map(|(part, shape)| (format!("language_model.model.layers.{}.{part}", layer - 1), shape))
        .to_vec(),
    }
}

/// Writes the headers and the index; the weights are holes. Gives the bytes that the checkpoint says it has.
fn write(dir: &Path) -> u64 {
    let (mut index, mut total) = (Map::new(), 0);
    for number in 0..SHARDS {
        let file = format!("model-{:05}-of-{SHARDS:05}.safetensors", number + 1);
        let (mut header, mut at) = (Map::new(), 0);
        for (name, shape) in shard(number) {
            let end = at + 2 * shape.iter().product::<u64>();
            let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": [at, end]});
            header.insert(name.clone(), entry);
            index.insert(name, file.clone().into());
            at = end;
        }
        let header = Value::Object(header).to_string();
        let mut start = (header.len() as u64).to_le_bytes().to_vec();
        start.extend(header.as_bytes());
        let out = File::create(dir.join(file)).expect("the folder can be written");
        out.write_all_at(&start, 0).expect("the folder can be written");
        out.set_len(start.len() as u64 + at).expect("a sparse file");
        total += at;
    }
    let write =
        |name: &str, text: String| fs::write(dir.join(name), text).expect("it can be written");
    write("model.safetensors.index.json", json!({"weight_map": index}).to_string());
    write("config.json", CONFIG.to_owned());
    let bpe = json!({"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]});
    let tokenizer = json!({"model": bpe, "pre_tokenizer": {"type": "ByteLevel"}});
    write("tokenizer.json", tokenizer.to_string());
    total
}

#[test]
fn scout_is_planned_to_the_byte() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let source = dir.path().join("Llama-4-Scout");
    fs::create_dir(&source).expect("the folder can be written");
    assert!(write(&source) > 215_000_000_000);
    for (kind, bytes) in [("q4_0", 60_635_771_136_u64), ("q8_0", 114_518_487_296)] {
        let mut plan = Command::new(env!("CARGO_BIN_EXE_scoutd"));
        plan.arg("convert").arg(&source).args(["--type", kind, "--dry-run", "--json"]);
        let done = plan.output().expect("the binary starts");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let plan: Value = serde_json::from_slice(&done.stdout).expect("a plan in JSON");
        let tensors = plan["tensors"].as_array().expect("a list");
        assert_eq!(tensors.len(), 13 * LAYERS + 4);
        let sum: u64 = tensors.iter().filter_map(|tensor| tensor["bytes"].as_u64()).sum();
        assert_eq!(sum, bytes, "{kind}");
        assert_eq!(plan["parameters"], 107_769_861_120_u64);
        assert_eq!(plan["skipped"], json!(["vision_model.class_embedding"]));
        let file = plan["bytes"].as_u64().expect("a number");
        assert!(file > sum && file.is_multiple_of(16384), "{file}");
    }
    assert_eq!(fs::read_dir(dir.path()).expect("the folder").count(), 1, "a plan writes nothing");
}
