//! `scoutd convert`, `inspect` and `verify` as they are typed: from a checkpoint to a file that is as good, and
//! what bad input gives.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use half::bf16;
use serde_json::Value;

use crate::checkpoint::{Checkpoint, LAST_DOWN, SHARDS};

/// The model that is built in, as a file.
const NANO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/scout-nano-q4_0.gguf");

fn scoutd() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_scoutd"));
    command.env_clear();
    command
}

fn convert(source: &Path, target: &Path, more: &[&str]) -> Output {
    let mut command = scoutd();
    command.arg("convert").arg(source).arg("--out").arg(target).args(["--align", "64"]);
    command.args(more).output().expect("the binary starts")
}

fn verify(file: &Path, against: &Path, more: &[&str]) -> Output {
    let mut command = scoutd();
    command.arg("verify").arg(file).arg("--against").arg(against).arg("--json");
    command.args(more).output().expect("the binary starts")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("no JSON: {}", stderr(output)))
}

/// Names in a folder, sorted.
fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("a folder");
    let mut names: Vec<String> = entries
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Requests that the small checkpoint's letters can write.
fn small_requests(dir: &Path) -> PathBuf {
    let path = dir.join("requests.jsonl");
    let lines = r#"{"system":"you are","turns":[{"user":"abc","answer":"xyz"},{"user":"de","answer":"fgh"}]}"#;
    fs::write(&path, lines).expect("the folder can be written");
    path
}

#[test]
fn a_checkpoint_becomes_a_file_that_is_inspected_and_verified() {
    let checkpoint = Checkpoint::new();
    let out = tempfile::tempdir().expect("a temporary folder");
    let file = out.path().join("small.gguf");
    let done = convert(checkpoint.dir(), &file, &["--type", "q8_0", "--json"]);
    assert!(done.status.success(), "{}", stderr(&done));
    let report = json(&done);
    assert_eq!(report["tensors"].as_array().map(Vec::len), Some(3 + 2 * 9));
    assert!(report["rms_error"].as_f64().is_some_and(|error| error < 0.01));

    let shown = scoutd().arg("inspect").arg(&file).arg("--json").output().expect("it starts");
    let shown = json(&shown);
    assert_eq!(shown["metadata"]["general.architecture"], "llama");
    assert_eq!(shown["metadata"]["scoutd.convert.recipe"], "q8_0");
    assert_eq!(shown["bytes"].as_u64(), Some(fs::metadata(&file).expect("it is there").len()));

    let requests = small_requests(out.path());
    let requests = requests.to_str().expect("plain letters");
    let verified = verify(&file, checkpoint.dir(), &["--requests", requests, "--keep"]);
    let report = json(&verified);
    assert_eq!(report["reference"]["quantization"], "BF16", "the checkpoint's own type");
    let answers = &report["answers"];
    assert_eq!(answers["positions"], 8, "two answers of three letters, each with its end");
    let rise = answers["perplexity"]["rise_percent"].as_f64().expect("a number");
    assert!(rise.abs() < 2.0, "{answers}");
    assert_eq!(verified.status.code(), Some(0), "{report}");
    assert_eq!(names(out.path()), ["requests.jsonl", "small.gguf", "small.reference.gguf"]);

    // The kept reference is used, and not taken away; without --keep nothing stays.
    let again = verify(&file, checkpoint.dir(), &["--requests", requests]);
    assert_eq!(json(&again)["answers"], *answers);
    fs::remove_file(out.path().join("small.reference.gguf")).expect("it was kept");
    let again = verify(&file, checkpoint.dir(), &["--requests", requests]);
    assert_eq!(json(&again)["answers"], *answers);
    assert_eq!(names(out.path()), ["requests.jsonl", "small.gguf"]);
}

#[test]
fn a_foreign_file_under_the_reference_s_name_stays() {
    let checkpoint = Checkpoint::new();
    let out = tempfile::tempdir().expect("a temporary folder");
    let file = out.path().join("small.gguf");
    assert!(convert(checkpoint.dir(), &file, &["--type", "q8_0"]).status.success());
    let reference = out.path().join("small.reference.gguf");
    fs::write(&reference, "mine").expect("the folder can be written");
    let refused = verify(&file, checkpoint.dir(), &[]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("was not made from this checkpoint"), "{}", stderr(&refused));
    assert_eq!(fs::read_to_string(&reference).expect("still there"), "mine");
}

/// A text in the form that scout-nano knows, of more than one window.
fn home_text(dir: &Path) -> PathBuf {
    let line = "turn on the kitchen light. The kitchen light is on. set a timer for 12 minutes. ";
    let path = dir.join("text.txt");
    fs::write(&path, line.repeat(12)).expect("the folder can be written");
    path
}

#[test]
fn eight_bits_pass_the_gate() {
    let out = tempfile::tempdir().expect("a temporary folder");
    let (reference, file) = (out.path().join("f32.gguf"), out.path().join("q8_0.gguf"));
    assert!(convert(Path::new(NANO), &reference, &["--type", "f32"]).status.success());
    assert!(convert(&reference, &file, &["--type", "q8_0"]).status.success());
    let text = home_text(out.path());
    let text = text.to_str().expect("plain letters");
    let more = ["--limit", "24", "--text", text, "--window", "64"];
    let verified = verify(&file, &reference, &more);
    let report = json(&verified);
    assert_eq!(verified.status.code(), Some(0), "{report}");
    assert_eq!(report["passed"], true);
    assert_eq!(report["gate"][0]["name"], "perplexity rise on the text, percent");
    let text = &report["text"];
    assert_eq!(text["positions"].as_u64().expect("a number") % 31, 0, "31 of a window of 64");
    for part in [text, &report["answers"], &report["prompts"]] {
        let mean = part["divergence"]["mean"].as_f64().expect("a number");
        assert!(mean > 0.0 && mean < 0.01, "{part}");
        assert_eq!(part["divergence"]["mean_tail"], 0.0, "a small vocabulary is compared whole");
        let same = &part["same_top"];
        assert!(same["count"].as_f64() >= same["of"].as_f64().map(|of| 0.95 * of), "{part}");
    }
    let calls = &report["calls"];
    assert_eq!(calls["requests"], 24);
    assert!(calls["file_exact"]["count"].as_u64() > Some(4), "{calls}");
    assert_eq!(report["each_prompt"].as_array().map(Vec::len), Some(8));
    assert_eq!(names(out.path()), ["f32.gguf", "q8_0.gguf", "text.txt"]);

    // The same model against itself differs by nothing.
    let same = json(&verify(&reference, &reference, &["--limit", "6"]));
    assert_eq!(same["calls"]["lost"], 0);
    let rise = same["answers"]["perplexity"]["rise_percent"].as_f64().expect("a number");
    assert!(rise.abs() < 1e-5, "{rise}: the reference's numbers are kept in F32");
    assert!(same["answers"]["divergence"]["max"].as_f64() < Some(1e-6));
}

#[test]
fn a_damaged_file_does_not_pass() {
    let out = tempfile::tempdir().expect("a temporary folder");
    let file = out.path().join("damaged.gguf");
    let mut bytes = fs::read(NANO).expect("the model is in the repository");
    {
        let gguf = scoutd::gguf::Gguf::parse(&bytes).expect("a good file");
        let tensor = gguf.tensor("blk.2.attn_output.weight").expect("it is there");
        let place = tensor.offset as usize..(tensor.offset + tensor.bytes) as usize;
        bytes[place].fill(0);
    }
    fs::write(&file, bytes).expect("the folder can be written");
    let verified = verify(&file, Path::new(NANO), &["--limit", "24"]);
    let report = json(&verified);
    assert_eq!(verified.status.code(), Some(2), "{report}");
    assert_eq!(report["passed"], false);
    assert_eq!(report["gate"][0]["passed"], false);
    assert!(report["calls"]["lost"].as_u64() > Some(0), "{report}");

    let verified = verify(
        &file,
        Path::new(NANO),
        &["--limit", "24", "--perplexity-max", "1e9", "--calls-max", "100", "--json-min", "0"],
    );
    assert_eq!(verified.status.code(), Some(0), "wider limits: {}", json(&verified)["gate"]);
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let checkpoint = Checkpoint::new();
    let out = tempfile::tempdir().expect("a temporary folder");
    let file = out.path().join("small.gguf");
    assert!(convert(checkpoint.dir(), &file, &["--type", "q8_0"]).status.success());
    let bad_requests = out.path().join("bad.jsonl");
    fs::write(&bad_requests, "{\"turns\":[]}\n").expect("the folder can be written");
    let bad_requests = bad_requests.to_str().expect("plain letters");
    let short = out.path().join("short.txt");
    fs::write(&short, "abc").expect("the folder can be written");
    let check = |against: &Path, more: &[&str], code: i32, part: &str| {
        let refused = verify(&file, against, more);
        assert_eq!(refused.status.code(), Some(code), "{}", stderr(&refused));
        assert!(stderr(&refused).contains(part), "{}", stderr(&refused));
    };
    check(Path::new(NANO), &[], 1, "another vocabulary");
    check(Path::new("/nowhere"), &[], 1, "/nowhere");
    check(&file, &["--requests", bad_requests], 1, "bad.jsonl line 1");
    check(&file, &["--text", short.to_str().expect("plain letters")], 1, "less than one window");
    check(&file, &[], 1, "has a context of 256 tokens");
    check(&file, &["--reference-type", "auto"], 64, "auto is no reference");
    let requests = small_requests(out.path());
    let requests = requests.to_str().expect("plain letters");
    let prompts = ["--requests", requests, "--temp", "/nowhere"];
    check(checkpoint.dir(), &prompts, 1, "/nowhere");
}

/// Spoils a checkpoint, converts it, and looks for what the message must say and what must not be there.
fn refused(spoil: impl Fn(&Checkpoint), parts: &[&str]) {
    let checkpoint = Checkpoint::new();
    spoil(&checkpoint);
    let out = tempfile::tempdir().expect("a temporary folder");
    let done = convert(checkpoint.dir(), &out.path().join("model.gguf"), &["--type", "q4_0"]);
    let message = stderr(&done);
    assert_eq!(done.status.code(), Some(1), "{message}");
    for part in parts {
        assert!(message.contains(part), "no `{part}` in: {message}");
    }
    assert!(names(out.path()).is_empty(), "left behind: {:?}", names(out.path()));
}

#[test]
fn bad_checkpoints_are_refused_by_file_and_tensor() {
    let last = SHARDS[1];
    let index = "model.safetensors.index.json";
    let value = |number: bf16| {
        move |checkpoint: &Checkpoint| {
            checkpoint.save(|tensor| {
                if tensor.name == LAST_DOWN {
                    tensor.bytes[200..202].copy_from_slice(&number.to_le_bytes());
                }
            });
        }
    };
    refused(|c| c.remove(last), &[last, "is missing", index]);
    refused(
        |c| {
            c.replace(
                index,
                &format!("\"{LAST_DOWN}\":\"{last}\""),
                &format!("\"{LAST_DOWN}\":\"{}\"", SHARDS[0]),
            )
        },
        &[index, "lies", LAST_DOWN, last],
    );
    refused(
        |c| c.save(|t| t.dtype = if t.name == LAST_DOWN { "I16" } else { t.dtype }),
        &[last, LAST_DOWN, "I16"],
    );
    refused(value(bf16::NAN), &[last, LAST_DOWN, "NaN"]);
    refused(value(bf16::INFINITY), &[last, LAST_DOWN, "inf"]);
    refused(
        |c| c.replace("config.json", "LlamaForCausalLM", "MambaForCausalLM"),
        &["config.json", "MambaForCausalLM"],
    );
    refused(|c| c.remove("tokenizer.json"), &["tokenizer.json is missing"]);
    refused(|c| c.remove("config.json"), &["config.json"]);
    refused(
        |c| {
            c.save(|t| {
                t.name = t.name.replace(LAST_DOWN, "model.layers.1.mlp.sideways_proj.weight")
            })
        },
        &[LAST_DOWN],
    );
    refused(
        |c| {
            let bytes = fs::read(c.path(last)).expect("it is there");
            fs::write(c.path(last), &bytes[..bytes.len() - 100]).expect("it can be written");
        },
        &[last, "the file has"],
    );
}

#[test]
fn an_existing_target_stays_unless_forced() {
    let checkpoint = Checkpoint::new();
    let out = tempfile::tempdir().expect("a temporary folder");
    let target = out.path().join("model.gguf");
    fs::write(&target, "mine").expect("the folder can be written");
    let done = convert(checkpoint.dir(), &target, &[]);
    assert_eq!(done.status.code(), Some(1));
    assert!(stderr(&done).contains("model.gguf exists"), "{}", stderr(&done));
    assert_eq!(fs::read_to_string(&target).expect("still there"), "mine");
    let done = convert(checkpoint.dir(), &target, &["--force"]);
    assert!(done.status.success());
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(said.contains(&format!("scoutd verify {} --against", target.display())), "{said}");
    assert_eq!(names(out.path()), ["model.gguf"]);
}

#[test]
fn a_reader_that_has_gone_brings_nothing_down() {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let mut inspect = scoutd();
    inspect.args(["inspect", NANO, "--tensors"]).stdout(writer).stderr(Stdio::piped());
    let done = inspect.spawn().and_then(Child::wait_with_output).expect("the binary starts");
    assert_eq!((done.status.code(), stderr(&done)), (Some(0), String::new()));
}

/// Runs the binary from a shell that first does `before`.
fn after(before: &str, checkpoint: &Checkpoint, target: &Path) -> Output {
    let script = format!("{before} && exec \"$@\"");
    let mut command = Command::new("sh");
    command.args(["-c", &script, "sh", env!("CARGO_BIN_EXE_scoutd"), "convert"]);
    command.arg(checkpoint.dir()).arg("--out").arg(target).args(["--type", "f32"]);
    command.output().expect("a shell")
}

#[test]
fn a_file_that_may_not_grow_leaves_nothing() {
    let checkpoint = Checkpoint::new();
    let out = tempfile::tempdir().expect("a temporary folder");
    let target = out.path().join("model.gguf");
    // 16 blocks of at most 1 KiB; ignoring the signal makes it an error of the write.
    let done = after("trap '' XFSZ; ulimit -f 16", &checkpoint, &target);
    assert_eq!(done.status.code(), Some(1), "{}", stderr(&done));
    assert!(stderr(&done).contains("model.gguf.partial"), "{}", stderr(&done));
    assert!(names(out.path()).is_empty(), "left behind: {:?}", names(out.path()));
}

#[test]
fn a_full_disk_is_found_before_anything_is_written() {
    let checkpoint = Checkpoint::new();
    let disk = tempfile::tempdir().expect("a temporary folder");
    let small = disk.path().display();
    let inside = |command: &str| {
        let mut unshare = Command::new("unshare");
        unshare.args(["--user", "--map-root-user", "--mount", "sh", "-c"]);
        unshare.arg(format!("mount -t tmpfs -o size=64k tmpfs {small} && {command}"));
        unshare.output()
    };
    if !inside("true").is_ok_and(|output| output.status.success()) {
        println!(
            "skipped: no mounts in a user namespace here; tests/peers/convert does it as root"
        );
        return;
    }
    let (program, source) = (env!("CARGO_BIN_EXE_scoutd"), checkpoint.dir().display());
    let command =
        format!("{program} convert {source} --out {small}/model.gguf; echo $?; ls -A {small}");
    let done = inside(&command).expect("it ran before");
    assert_eq!(String::from_utf8_lossy(&done.stdout), "1\n", "status 1 and an empty folder");
    let message = stderr(&done);
    assert!(message.contains("bytes free, the conversion needs"), "{message}");
}
