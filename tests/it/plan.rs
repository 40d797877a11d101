//! `scoutd plan` and what `serve` says of a model that does not fit.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use scoutd::gguf::GgufHeader;
use scoutd::model::Blueprint;
use scoutd::store;
use scoutd_kernels::Format;
use serde_json::{Value, json};

/// Runs the binary with `folder` as the only place where it may find or keep anything.
fn scoutd(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_scoutd"));
    command.env_clear().env("XDG_STATE_HOME", folder).current_dir(folder).args(arguments);
    command.output().expect("the binary runs")
}

fn plan(folder: &Path, arguments: &[&str]) -> Value {
    let output = scoutd(folder, &[&["plan", "--json"], arguments].concat());
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder can be made")
}

/// A file of the right size that takes no room: keys and tensor list, then a hole.
fn sparse_model(path: &Path, blueprint: &Blueprint) {
    let mut header = GgufHeader::new(32);
    header.str("general.architecture", "llama");
    header.str("general.name", &blueprint.name);
    let mut number = |key: &str, value: usize| {
        header.u32(&format!("llama.{key}"), u32::try_from(value).expect("a small number"));
    };
    number("block_count", blueprint.layers);
    number("context_length", blueprint.context_len);
    number("embedding_length", blueprint.hidden);
    number("feed_forward_length", blueprint.width);
    number("attention.head_count", blueprint.heads);
    number("attention.head_count_kv", blueprint.kv_heads);
    number("attention.key_length", blueprint.head_len);
    header.f32("llama.attention.layer_norm_rms_epsilon", 1e-5);
    let mut bytes = 0;
    for (name, shape, is_matrix) in blueprint.tensors() {
        let format = if is_matrix { Format::Q4_0 } else { Format::F32 };
        header.tensor(&name, format, &shape);
        let rows: u64 = shape[1..].iter().product();
        bytes += format.row_bytes(shape[0] as usize).expect("whole blocks") as u64 * rows + 32;
    }
    let mut file = File::create(path).expect("the folder can be written");
    header.start(&mut file).expect("the shapes are possible");
    let header_bytes = file.metadata().expect("it is a file").len();
    file.set_len(header_bytes + bytes).expect("holes are possible");
}

/// A dense model of 1.6 TB, which no machine holds.
fn giant() -> Blueprint {
    let small = store::find("llama-3.1-8b").expect("it is in the catalogue");
    Blueprint { name: "giant".to_owned(), layers: 1000, hidden: 16_384, width: 53_248, ..small }
}

#[test]
fn scout_is_planned_for_every_board_without_a_file() {
    let folder = folder();
    let plan = plan(folder.path(), &["scout", "--context", "4096"]);
    assert_eq!(plan["architecture"], "llama4");
    assert_eq!(plan["weights_bytes"].as_u64().map(|bytes| bytes / 100_000_000), Some(606));
    let machines = plan["machines"].as_array().expect("a list");
    let verdicts: Vec<&str> =
        machines[..3].iter().map(|m| m["verdict"].as_str().expect("a word")).collect();
    assert_eq!(verdicts, ["refused", "refused", "streams"]);
    assert_eq!(machines[3]["machine"], "this machine");
    assert_eq!(machines[0]["would_fit"][0]["model"], "llama-3.2-3b");
    let board = &machines[2];
    let slots = board["plan_expert_slots"].as_u64().expect("a number");
    assert!((98..=102).contains(&slots), "{slots}");
    let speed = board["plan_decode_tokens_per_second"].as_f64().expect("a number");
    assert!((0.25..0.29).contains(&speed), "{speed}");
    assert_eq!(board["rates_measured"], false);
}

#[test]
fn more_memory_never_makes_a_plan_worse() {
    let folder = folder();
    let mut last = 0;
    for (ram, verdict) in
        [("8GiB", "refused"), ("16GiB", "streams"), ("32GiB", "streams"), ("80GiB", "resident")]
    {
        let plan = plan(folder.path(), &["scout", "--ram", ram]);
        let machines = plan["machines"].as_array().expect("a list");
        assert_eq!((machines.len(), &machines[0]["verdict"]), (1, &json!(verdict)), "{ram}");
        let slots = machines[0]["plan_expert_slots"].as_u64().unwrap_or(last);
        assert!(slots >= last);
        last = slots;
    }
}

#[test]
fn a_checkpoint_is_planned_as_it_would_be_converted() {
    let folder = folder();
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "num_hidden_layers": 16,
        "intermediate_size": 8192, "vocab_size": 128_256, "max_position_embeddings": 131_072,
        "tie_word_embeddings": true, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
    });
    let checkpoint = folder.path().join("some-1b");
    fs::create_dir(&checkpoint).expect("the folder can be made");
    fs::write(checkpoint.join("config.json"), config.to_string()).expect("it can be written");
    let four = plan(folder.path(), &["some-1b"]);
    assert_eq!((&four["model"], &four["quantization"]), (&json!("some-1b"), &json!("Q4_0")));
    assert_eq!(four["parameters"], 1_235_814_400);
    let eight = plan(folder.path(), &["some-1b", "--type", "q8_0"]);
    let bytes = |plan: &Value| plan["weights_bytes"].as_f64().expect("a number");
    assert!((1.8..1.95).contains(&(bytes(&eight) / bytes(&four))));
    fs::write(checkpoint.join("config.json"), r#"{"architectures": ["MambaForCausalLM"]}"#)
        .expect("it can be written");
    let output = scoutd(folder.path(), &["plan", "some-1b"]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains("MambaForCausalLM"), "{error}");
}

#[test]
fn a_file_is_planned_from_its_header() {
    let folder = folder();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/scout-nano-q4_0.gguf");
    let plan = plan(folder.path(), &[model.to_str().expect("a plain path")]);
    let verdicts = plan["machines"].as_array().expect("a list").iter().map(|m| &m["verdict"]);
    assert!({ verdicts }.all(|verdict| verdict == "resident"));
}

#[test]
fn what_is_no_model_is_said_with_the_words_that_are() {
    let folder = folder();
    let output = scoutd(folder.path(), &["plan", "scoot"]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(64));
    assert!(error.contains("`scoot`") && error.contains("llama-3.2-1b"), "{error}");
}

#[test]
fn serve_refuses_what_does_not_fit_before_it_loads() {
    let folder = folder();
    let model = folder.path().join("giant.gguf");
    sparse_model(&model, &giant());
    let planned = plan(folder.path(), &["giant.gguf"]);
    assert_eq!(planned["machines"][3]["verdict"], "refused");
    let output = scoutd(folder.path(), &["serve", "--model", "giant.gguf"]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    for part in ["giant.gguf", "missing", "would fit: ", "in Q4_0", "--force"] {
        assert!(error.contains(part), "{part} in {error}");
    }
}

#[test]
fn a_measured_machine_is_remembered() {
    let folder = folder();
    let disk = measurable_folder();
    let arguments = [
        "bench",
        "--machine",
        "--json",
        "--threads",
        "2",
        "--disk",
        &disk.path().to_string_lossy(),
    ];
    let output = scoutd(folder.path(), &arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    let read = report["record"]["memory_read_one_thread"].as_f64().expect("a number");
    assert!(read > 1e6 && report["record"]["int8_ops"].as_f64().is_some_and(|ops| ops > 1e6));
    assert!(PathBuf::from(report["file"].as_str().expect("a path")).starts_with(folder.path()));
    let plan = plan(folder.path(), &["smollm2-135m"]);
    assert_eq!(plan["measured"]["date"], report["record"]["date"]);
    let this = &plan["machines"][3];
    assert_eq!(this["rates_measured"], true);
    let expected = read.max(report["record"]["memory_read_all_threads"].as_f64().unwrap_or(0.0));
    let decode = this["plan_decode_tokens_per_second"].as_f64().expect("a number");
    let pinned = this["plan_pinned_bytes"].as_f64().expect("a number");
    let ratio = decode * pinned / (store::DECODE_SHARE * expected);
    assert!((0.99..1.01).contains(&ratio), "{ratio}");
}

/// A folder on a real disk: the usual temporary folder may lie in memory.
fn measurable_folder() -> tempfile::TempDir {
    let target = Path::new(env!("CARGO_BIN_EXE_scoutd")).parent().expect("it lies in a folder");
    tempfile::tempdir_in(target).expect("the build folder can be written")
}

#[test]
fn doctor_lists_what_it_found() {
    let folder = folder();
    let output = scoutd(folder.path(), &["doctor", "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    let findings = report["findings"].as_array().expect("a list");
    let row =
        |name: &str| findings.iter().find(|row| row["name"] == name).expect("the row is there");
    for name in ["memory", "memory cgroup", "pressure stalls", "page size", "locked memory", "swap"]
    {
        let row = row(name);
        let is_good = row["verdict"] == "ok";
        assert_eq!(row["consequence"] == "", is_good, "{row}");
    }
    assert_eq!(row("measured")["found"], "never");
    let is_bad = findings.iter().any(|row| row["verdict"] == "bad");
    assert_eq!(output.status.code(), Some(i32::from(is_bad)));
}
