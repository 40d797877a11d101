//! Whole conversions of small made-up checkpoints.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use half::bf16;
use scoutd_kernels::Format;
use scoutd_kernels::quantize::{dequantize_row, quantize_row};

use super::{Base, ConvertError, Observer, Options, Part, Plan, Recipe, Silent, convert};
use crate::gguf::{Gguf, Mapping};

const HIDDEN: u64 = 64;
const WIDTH: u64 = 96;
const EXPERTS: u64 = 3;
const VOCAB: u64 = 40;
const LAYERS: u64 = 2;

/// A multimodal Llama 4 in two shards with an index.
struct Checkpoint {
    dir: tempfile::TempDir,
    tensors: Vec<(String, Vec<u64>)>,
}

const CONFIG: &str = r#"{"architectures": ["Llama4ForConditionalGeneration"], "text_config": {
    "hidden_size": 64, "intermediate_size": 96, "intermediate_size_mlp": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 3,
    "vocab_size": 40, "max_position_embeddings": 512, "attention_chunk_size": 32, "floor_scale": 16,
    "no_rope_layers": [1, 1], "rope_theta": 10000.0, "eos_token_id": [3, 2],
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}}"#;

impl Checkpoint {
    fn new() -> Checkpoint {
        let root = [
            ("model.embed_tokens.weight", vec![VOCAB, HIDDEN]),
            ("lm_head.weight", vec![VOCAB, HIDDEN]),
            ("model.norm.weight", vec![HIDDEN]),
        ];
        let mut tensors: Vec<(String, Vec<u64>)> =
            root.into_iter().map(|(n, shape)| (format!("language_model.{n}"), shape)).collect();
        for layer in 0..LAYERS {
            let of_layer = [
                ("input_layernorm.weight", vec![HIDDEN]),
                ("post_attention_layernorm.weight", vec![HIDDEN]),
                ("self_attn.q_proj.weight", vec![64, HIDDEN]),
                ("self_attn.k_proj.weight", vec![32, HIDDEN]),
                ("self_attn.v_proj.weight", vec![32, HIDDEN]),
                ("self_attn.o_proj.weight", vec![HIDDEN, 64]),
                ("feed_forward.router.weight", vec![EXPERTS, HIDDEN]),
                ("feed_forward.shared_expert.gate_proj.weight", vec![WIDTH, HIDDEN]),
                ("feed_forward.shared_expert.up_proj.weight", vec![WIDTH, HIDDEN]),
                ("feed_forward.shared_expert.down_proj.weight", vec![HIDDEN, WIDTH]),
                ("feed_forward.experts.gate_up_proj", vec![EXPERTS, HIDDEN, 2 * WIDTH]),
                ("feed_forward.experts.down_proj", vec![EXPERTS, WIDTH, HIDDEN]),
            ];
            for (name, shape) in of_layer {
                tensors.push((format!("language_model.model.layers.{layer}.{name}"), shape));
            }
        }
        tensors.push(("vision_model.patch.weight".to_owned(), vec![4, 4]));
        let checkpoint = Checkpoint { dir: tempfile::tempdir().unwrap(), tensors };
        fs::write(checkpoint.path("config.json"), CONFIG).unwrap();
        let vocab: Vec<String> = (0..38).map(|id| format!(r#""t{id}": {id}"#)).collect();
        let tokenizer = format!(
            r#"{{"pre_tokenizer": {{"type": "ByteLevel"}}, "model": {{"type": "BPE", "vocab": {{{}}}, "merges": []}}}}"#,
            vocab.join(",")
        );
        fs::write(checkpoint.path("tokenizer.json"), tokenizer).unwrap();
        let config = r#"{"bos_token": "t1", "chat_template": "x"}"#;
        fs::write(checkpoint.path("tokenizer_config.json"), config).unwrap();
        checkpoint.write_shards(&|_, _, _| {});
        checkpoint
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The value of element `at` of a tensor: any, but exact in BF16 and different everywhere near.
    fn value(tensor: &str, at: u64) -> f32 {
        let seed = tensor.bytes().fold(at, |sum, byte| sum.wrapping_mul(31) + u64::from(byte));
        let mixed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        bf16::from_f32(mixed as f32 / (1 << 23) as f32 - 1.0).to_f32()
    }

    /// Writes both shards in BF16; `change` may alter name, type or bytes of a tensor.
    fn write_shards(&self, change: &dyn Fn(&mut String, &mut &str, &mut Vec<u8>)) {
        let (first, second) = self.tensors.split_at(10);
        let mut map = Vec::new();
        for (file, tensors) in [("a.safetensors", first), ("b.safetensors", second)] {
            let (mut entries, mut data) = (Vec::new(), Vec::new());
            for (name, shape) in tensors {
                let values = (0..shape.iter().product()).map(|at| Checkpoint::value(name, at));
                let mut bytes: Vec<u8> =
                    values.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect();
                let (mut name, mut dtype) = (name.clone(), "BF16");
                change(&mut name, &mut dtype, &mut bytes);
                let (from, to) = (data.len(), data.len() + bytes.len());
                data.extend(bytes);
                entries.push(format!(
                    r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{from},{to}]}}"#
                ));
                map.push(format!(r#""{name}":"{file}""#));
            }
            let header = format!("{{{}}}", entries.join(","));
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend(header.as_bytes());
            bytes.extend(data);
            fs::write(self.path(file), bytes).unwrap();
        }
        let index = format!(r#"{{"weight_map": {{{}}}}}"#, map.join(","));
        fs::write(self.path("model.safetensors.index.json"), index).unwrap();
    }

    fn options(&self, base: &str) -> Options {
        options(self.dir.path(), &self.path("out.gguf"), base)
    }
}

fn options(source: &Path, target: &Path, base: &str) -> Options {
    Options {
        source: source.to_path_buf(),
        target: target.to_path_buf(),
        recipe: Recipe { base: base.parse().unwrap(), overrides: Vec::new() },
        name: None,
        knows_tools: false,
        alignment: 64,
        threads: Some(2),
        resume: false,
        force: false,
    }
}

/// A tensor of a file as F32.
fn values(path: &Path, name: &str) -> Vec<f32> {
    let mapping = Mapping::open(path).unwrap();
    let gguf = Gguf::parse(mapping.bytes()).unwrap();
    let info = gguf.tensor(name).unwrap();
    // Blocks want an aligned address, which a mapping gives and the alignment of 64 keeps.
    let mut out = vec![0.0; info.values() as usize];
    dequantize_row(info.format, gguf.data(info), &mut out);
    out
}

fn remains(checkpoint: &Checkpoint) -> Vec<String> {
    let names = fs::read_dir(checkpoint.dir.path()).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with("out")).collect()
}

#[test]
fn f32_holds_every_value_in_its_place() {
    let checkpoint = Checkpoint::new();
    let options = checkpoint.options("f32");
    let report = convert(&options, &Silent).unwrap();
    assert_eq!(report.rms_error, 0.0);
    assert_eq!(report.skipped, ["vision_model.patch.weight"]);
    assert_eq!(report.tensors.len() as u64, 4 + 13 * LAYERS);
    let of = |hf: &str, at: u64| Checkpoint::value(&format!("language_model.{hf}"), at);

    let up = values(&options.target, "blk.1.ffn_up_exps.weight");
    let down = values(&options.target, "blk.1.ffn_down_exps.weight");
    let gate = values(&options.target, "blk.1.ffn_gate_exps.weight");
    let experts = "model.layers.1.feed_forward.experts";
    for expert in 0..EXPERTS {
        for narrow in 0..HIDDEN {
            for wide in 0..WIDTH {
                let at = ((expert * WIDTH + wide) * HIDDEN + narrow) as usize;
                let row = (expert * HIDDEN + narrow) * 2 * WIDTH;
                assert_eq!(gate[at], of(&format!("{experts}.gate_up_proj"), row + wide));
                assert_eq!(up[at], of(&format!("{experts}.gate_up_proj"), row + WIDTH + wide));
                let at = ((expert * HIDDEN + narrow) * WIDTH + wide) as usize;
                let from = (expert * WIDTH + wide) * HIDDEN + narrow;
                assert_eq!(down[at], of(&format!("{experts}.down_proj"), from));
            }
        }
    }
    let q = values(&options.target, "blk.0.attn_q.weight");
    let hf = "model.layers.0.self_attn.q_proj.weight";
    assert!(q.iter().zip(0..).all(|(&value, at)| value == of(hf, at)));
    let freqs = values(&options.target, "rope_freqs.weight");
    assert_eq!((freqs.len(), freqs[0], freqs[7]), (8, 1.0, 8.0));
}

#[test]
fn keys_are_those_of_the_container() {
    let checkpoint = Checkpoint::new();
    let options = checkpoint.options("auto");
    convert(&options, &Silent).unwrap();
    let mapping = Mapping::open(&options.target).unwrap();
    let gguf = Gguf::parse(mapping.bytes()).unwrap();
    let keys = gguf.metadata();
    assert_eq!(keys.str("general.architecture").unwrap(), "llama4");
    let sizes = [
        ("llama4.block_count", 2),
        ("llama4.feed_forward_length", 128),
        ("llama4.expert_feed_forward_length", 96),
        ("llama4.expert_count", 3),
        ("llama4.expert_used_count", 1),
        ("llama4.attention.key_length", 16),
        ("llama4.attention.sliding_window", 32),
        ("tokenizer.ggml.bos_token_id", 1),
        ("tokenizer.ggml.eos_token_id", 3),
        ("general.alignment", 64),
        ("general.file_type", 2),
    ];
    for (key, wanted) in sizes {
        assert_eq!(keys.u32(key).unwrap(), wanted, "{key}");
    }
    assert_eq!(keys.f32("scoutd.attn_floor_scale").unwrap(), 16.0);
    assert_eq!(keys.str("tokenizer.ggml.pre").unwrap(), "gpt-2");
    assert_eq!(keys.str("tokenizer.chat_template").unwrap(), "x");
    assert!(keys.get("scoutd.template.lists_tools").is_none());
    assert_eq!(keys.strings("tokenizer.ggml.tokens").unwrap().len(), VOCAB as usize);
    assert!(!keys.bool("tokenizer.ggml.add_bos_token").unwrap());
    assert!(gguf.tensors().iter().all(|tensor| tensor.offset.is_multiple_of(64)));
    let resident = gguf.tensors().iter().rposition(|tensor| !tensor.name.contains("_exps"));
    let expert = gguf.tensors().iter().position(|tensor| tensor.name.contains("_exps"));
    assert!(resident < expert, "experts come last");
}

#[test]
fn tools_known_from_training_are_written_down_and_kept() {
    let checkpoint = Checkpoint::new();
    let mut options = checkpoint.options("q8_0");
    options.knows_tools = true;
    convert(&options, &Silent).unwrap();
    let again = checkpoint.path("again.gguf");
    convert(&self::options(&options.target, &again, "q4_0"), &Silent).unwrap();
    for file in [&options.target, &again] {
        let mapping = Mapping::open(file).unwrap();
        let gguf = Gguf::parse(mapping.bytes()).unwrap();
        assert!(!gguf.metadata().bool("scoutd.template.lists_tools").unwrap());
    }
}

#[test]
fn quantized_rows_are_the_quantizer_s() {
    let checkpoint = Checkpoint::new();
    let mut plain = checkpoint.options("f32");
    plain.target = checkpoint.path("plain.gguf");
    convert(&plain, &Silent).unwrap();
    for (base, format) in [("q4_0", Format::Q4_0), ("q4_1", Format::Q4_1), ("q8_0", Format::Q8_0)] {
        let mut options = checkpoint.options(base);
        options.force = true;
        let report = convert(&options, &Silent).unwrap();
        assert!(report.rms_error > 0.0 && report.rms_error < 0.1);
        let name = "blk.0.ffn_down_exps.weight";
        let from = values(&plain.target, name);
        let mapping = Mapping::open(&options.target).unwrap();
        let gguf = Gguf::parse(mapping.bytes()).unwrap();
        let info = gguf.tensor(name).unwrap();
        assert_eq!(info.format, format);
        let mut wanted = vec![0; info.bytes as usize + 4];
        let skip = wanted.as_ptr().align_offset(4);
        let wanted = &mut wanted[skip..skip + info.bytes as usize];
        quantize_row(format, &from, wanted);
        assert_eq!(gguf.data(info), wanted, "{base}");
    }
}

/// Panics after so many bytes: to the files it looks like a kill.
struct DiesAfter(AtomicU64);

impl Observer for DiesAfter {
    fn planned(&self, _: &Plan) {}
    fn begin(&self, part: Part, _: u64) {
        assert_ne!(part, Part::Check, "should have died before");
    }
    fn passed(&self, bytes: u64) {
        let left = self.0.load(Ordering::Relaxed);
        self.0.store(left.checked_sub(bytes).expect("dies now"), Ordering::Relaxed);
    }
}

#[test]
fn a_resumed_conversion_gives_the_same_bytes() {
    let checkpoint = Checkpoint::new();
    let mut options = checkpoint.options("q4_0");
    let whole = convert(&options, &Silent).unwrap();
    let wanted = fs::read(&options.target).unwrap();
    fs::remove_file(&options.target).unwrap();
    let partial = checkpoint.path("out.gguf.partial");
    options.threads = Some(1);
    for bytes in [0, 20_000, wanted.len() as u64 / 2] {
        let death = DiesAfter(AtomicU64::new(bytes));
        catch_unwind(AssertUnwindSafe(|| convert(&options, &death))).unwrap_err();
        assert!(!options.target.exists());
        let error = convert(&options, &Silent).unwrap_err();
        assert!(matches!(error, ConvertError::Unfinished(_)), "{error}");
        // A piece that did not reach the disk, as after a power cut: its hash tells.
        let mut file = fs::read(&partial).unwrap();
        let at = file.iter().rposition(|&byte| byte != 0).unwrap();
        file[at] ^= 1;
        fs::write(&partial, file).unwrap();
        options.resume = true;
        let report = convert(&options, &Silent).unwrap();
        assert_eq!(report.resumed_pieces > 0, bytes > 0);
        assert!(report.resumed_pieces < report.pieces);
        assert_eq!(report.rms_error, whole.rms_error);
        assert!(fs::read(&options.target).unwrap() == wanted, "bytes differ");
        assert_eq!(remains(&checkpoint), ["out.gguf"]);
        fs::remove_file(&options.target).unwrap();
        options.resume = false;
    }
}

#[test]
fn resuming_another_conversion_is_refused() {
    let checkpoint = Checkpoint::new();
    let mut options = checkpoint.options("q4_0");
    options.threads = Some(1);
    let death = DiesAfter(AtomicU64::new(9000));
    catch_unwind(AssertUnwindSafe(|| convert(&options, &death))).unwrap_err();
    options.resume = true;
    options.recipe.base = Base::Pure(Format::Q8_0);
    let error = convert(&options, &Silent).unwrap_err().to_string();
    assert!(error.contains("differ from the interrupted run"), "{error}");
    options.recipe.base = Base::Pure(Format::Q4_0);
    checkpoint.write_shards(&|_, _, bytes| bytes[0] ^= 1);
    assert!(convert(&options, &Silent).is_err(), "the source changed");
    options.resume = false;
    options.force = true;
    convert(&options, &Silent).unwrap();
    assert_eq!(remains(&checkpoint), ["out.gguf"]);
}

#[test]
fn gguf_is_requantized() {
    let checkpoint = Checkpoint::new();
    let plain = checkpoint.options("f32");
    convert(&plain, &Silent).unwrap();
    let direct = options(checkpoint.dir.path(), &checkpoint.path("direct.gguf"), "q8_0");
    convert(&direct, &Silent).unwrap();
    let twice = options(&plain.target, &checkpoint.path("twice.gguf"), "q8_0");
    let report = convert(&twice, &Silent).unwrap();
    assert!(report.notes.is_empty());
    for tensor in &report.tensors {
        assert_eq!(
            values(&direct.target, &tensor.name),
            values(&twice.target, &tensor.name),
            "{}",
            tensor.name
        );
    }
    let down = options(&twice.target, &checkpoint.path("down.gguf"), "q4_0");
    let report = convert(&down, &Silent).unwrap();
    assert!(report.notes[0].contains("second time"), "{:?}", report.notes);
    // Same types again: copied, not rounded again.
    let same = options(&down.target, &checkpoint.path("same.gguf"), "q4_0");
    let report = convert(&same, &Silent).unwrap();
    assert_eq!(report.rms_error, 0.0);
    let (from, to) = (fs::read(&down.target).unwrap(), fs::read(&same.target).unwrap());
    assert!(from == to, "bytes differ");
}

#[test]
fn bad_input_is_refused_by_name_and_leaves_nothing() {
    let check = |spoil: &dyn Fn(&Checkpoint), parts: &[&str]| {
        let checkpoint = Checkpoint::new();
        spoil(&checkpoint);
        let error = convert(&checkpoint.options("q4_0"), &Silent).unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        assert!(remains(&checkpoint).is_empty(), "{:?}", remains(&checkpoint));
    };
    let gone = |name: &'static str| move |c: &Checkpoint| fs::remove_file(c.path(name)).unwrap();
    check(&gone("b.safetensors"), &["b.safetensors is missing"]);
    check(&gone("tokenizer.json"), &["tokenizer.json is missing"]);
    check(&gone("config.json"), &["config.json"]);
    let router = "language_model.model.layers.1.feed_forward.router.weight";
    let spoil_router = |change: &dyn Fn(&mut String, &mut &str, &mut Vec<u8>), parts: &[&str]| {
        check(
            &|checkpoint: &Checkpoint| {
                checkpoint.write_shards(&|name, dtype, bytes| {
                    if name == router {
                        change(name, dtype, bytes);
                    }
                });
            },
            parts,
        );
    };
    spoil_router(&|name, _, _| name.push('x'), &["`model.layers.1.feed_forward.router.weight`"]);
    spoil_router(&|_, dtype, _| *dtype = "I16", &["b.safetensors", router, "has type I16"]);
    let nan = bf16::NAN.to_le_bytes();
    spoil_router(
        &|_, _, b| b[130..132].copy_from_slice(&nan),
        &["b.safetensors", router, "NaN at column 1 (row 1"],
    );
    let infinite = bf16::INFINITY.to_le_bytes();
    spoil_router(&|_, _, b| b[0..2].copy_from_slice(&infinite), &[router, "holds inf"]);
    let config = |from: &'static str, to: &'static str| {
        move |checkpoint: &Checkpoint| {
            assert!(CONFIG.contains(from));
            fs::write(checkpoint.path("config.json"), CONFIG.replacen(from, to, 1)).unwrap();
        }
    };
    check(&config("Llama4ForC", "GemmaForC"), &["config.json", "`GemmaForConditionalGeneration`"]);
    check(&config("\"hidden_size\": 64", "\"hidden_size\": 65"), &["a.safetensors", "[40, 65]"]);
    check(&config("\"no_rope_layers\": [1, 1]", "\"no_rope_layers\": [1, 0]"), &["no_rope_layers"]);
}

#[test]
fn an_existing_target_stays() {
    let checkpoint = Checkpoint::new();
    let mut options = checkpoint.options("q4_0");
    fs::write(&options.target, "mine").unwrap();
    let error = convert(&options, &Silent).unwrap_err();
    assert!(matches!(error, ConvertError::TargetExists(_)), "{error}");
    assert_eq!(fs::read_to_string(&options.target).unwrap(), "mine");
    options.force = true;
    convert(&options, &Silent).unwrap();
    assert!(fs::read(&options.target).unwrap().starts_with(b"GGUF"));
    options.target = checkpoint.path("no-such-folder/out.gguf");
    let error = convert(&options, &Silent).unwrap_err().to_string();
    assert!(error.contains("no-such-folder"), "{error}");
}
