//! `scoutd inspect`: what is in a GGUF file, and what it needs to run.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use serde_json::{Value as Json, json};

use super::options::SourceOptions;
use crate::daemon;
use crate::gguf::{Gguf, Mapping, TensorInfo, Value};
use crate::units::Bytes;

/// Options of `scoutd inspect`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// A GGUF file, or a model's name in the store
    file: PathBuf,
    /// Print everything as JSON
    #[arg(long)]
    json: bool,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
    #[command(flatten)]
    sources: SourceOptions,
}

/// Prints keys, tensors and needs.
pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let file = daemon::find_model(&args.sources.load()?, &args.file)?;
    let name = file.display();
    let mapping = Mapping::open(&file).with_context(|| format!("cannot open {name}"))?;
    let gguf = Gguf::parse(mapping.bytes()).with_context(|| format!("cannot read {name}"))?;
    if args.json {
        println!("{:#}", describe(&gguf, mapping.bytes().len() as u64));
    } else {
        print(&gguf, mapping.bytes().len() as u64, args.tensors);
    }
    Ok(ExitCode::SUCCESS)
}

fn print(gguf: &Gguf, file_bytes: u64, all_tensors: bool) {
    println!("GGUF version {}, {}", gguf.version(), Bytes(file_bytes));
    for (key, value) in gguf.metadata().iter() {
        println!("{key:<44} {}", brief(value));
    }
    if all_tensors {
        println!("\n{:<38} {:>6} {:>14}  shape", "tensor", "type", "bytes");
        for tensor in gguf.tensors() {
            let shape: Vec<String> = tensor.shape.iter().map(u64::to_string).collect();
            let (format, shape) = (tensor.format.name(), shape.join(" × "));
            println!("{:<38} {format:>6} {:>14}  {shape}", tensor.name, tensor.bytes);
        }
    }
    println!();
    for (format, (count, bytes)) in by_format(gguf.tensors()) {
        println!("{count:>6} tensors {format:<6} {:>14} bytes  {}", bytes, Bytes(bytes));
    }
    let needs = Needs::of(gguf);
    println!("{} parameters", needs.parameters);
    println!("to run it: always needed     {}", Bytes(needs.resident_bytes));
    if needs.expert_bytes > 0 {
        let each = Bytes(needs.expert_bytes / needs.experts.max(1));
        let all = Bytes(needs.expert_bytes);
        println!("           routed experts    {all} in {} of {each}; may stream", needs.experts);
    }
    if let Some(bytes) = needs.kv_bytes_per_token {
        println!("           KV cache (F16)    {bytes} bytes for each token of the context");
    }
}

fn describe(gguf: &Gguf, file_bytes: u64) -> Json {
    let metadata: serde_json::Map<String, Json> =
        gguf.metadata().iter().map(|(key, value)| (key.to_owned(), to_json(value))).collect();
    let tensors: Vec<Json> = gguf
        .tensors()
        .iter()
        .map(|tensor| {
            json!({"name": tensor.name, "type": tensor.format.name(), "shape": tensor.shape,
                "offset": tensor.offset, "bytes": tensor.bytes})
        })
        .collect();
    let needs = Needs::of(gguf);
    json!({
        "version": gguf.version(), "bytes": file_bytes, "alignment": gguf.alignment(),
        "metadata": metadata, "tensors": tensors,
        "needs": {
            "parameters": needs.parameters, "resident_bytes": needs.resident_bytes,
            "expert_bytes": needs.expert_bytes, "experts": needs.experts,
            "kv_bytes_per_token": needs.kv_bytes_per_token,
        },
    })
}

/// What running the file takes, from its header alone.
#[derive(Debug, PartialEq)]
struct Needs {
    parameters: u64,
    /// Tensors that every token reads, and the embedding table.
    resident_bytes: u64,
    /// All routed experts of all layers together.
    expert_bytes: u64,
    experts: u64,
    /// Keys and values of all layers in F16, before layers with a limited span drop theirs.
    kv_bytes_per_token: Option<u64>,
}

impl Needs {
    fn of(gguf: &Gguf) -> Needs {
        let is_expert = |tensor: &&TensorInfo| tensor.name.contains("_exps.");
        let bytes = |tensors: &mut dyn Iterator<Item = &TensorInfo>| tensors.map(|t| t.bytes).sum();
        let tensors = gguf.tensors();
        let downs = tensors.iter().filter(|tensor| tensor.name.contains(".ffn_down_exps."));
        Needs {
            parameters: tensors
                .iter()
                .filter(|tensor| tensor.name != "rope_freqs.weight")
                .map(TensorInfo::values)
                .sum(),
            resident_bytes: bytes(&mut tensors.iter().filter(|tensor| !is_expert(tensor))),
            expert_bytes: bytes(&mut tensors.iter().filter(is_expert)),
            experts: downs.filter_map(|tensor| tensor.shape.last()).sum(),
            kv_bytes_per_token: kv_bytes_per_token(gguf),
        }
    }
}

fn kv_bytes_per_token(gguf: &Gguf) -> Option<u64> {
    let metadata = gguf.metadata();
    let architecture = metadata.str("general.architecture").ok()?;
    let read = |key: &str| metadata.u64(&format!("{architecture}.{key}")).ok();
    let heads = read("attention.head_count")?;
    let head_len = match read("attention.key_length") {
        Some(len) => len,
        None => read("embedding_length")?.checked_div(heads)?,
    };
    let kv_heads = read("attention.head_count_kv").unwrap_or(heads);
    const F16_BYTES: u64 = 2;
    let layer = kv_heads.checked_mul(head_len)?.checked_mul(2 * F16_BYTES)?;
    read("block_count")?.checked_mul(layer)
}

fn by_format(tensors: &[TensorInfo]) -> BTreeMap<&'static str, (u64, u64)> {
    let mut sums = BTreeMap::new();
    for tensor in tensors {
        let (count, bytes) = sums.entry(tensor.format.name()).or_insert((0, 0));
        *count += 1;
        *bytes += tensor.bytes;
    }
    sums
}

/// A value on one line: arrays by their length, long texts by their beginning.
fn brief(value: &Value) -> String {
    match value {
        Value::Array(array) => format!("[{:?}; {}]", array.element(), array.len()),
        Value::String(text) if text.chars().count() > LINE_CHARS => {
            let beginning: String = text.chars().take(LINE_CHARS).collect();
            format!("{beginning:?}… ({} bytes)", text.len())
        }
        Value::String(text) => format!("{text:?}"),
        other => to_json(other).to_string(),
    }
}

/// Arrays are given by type and length: a vocabulary would bury everything else.
fn to_json(value: &Value) -> Json {
    match value {
        Value::U8(v) => json!(v),
        Value::I8(v) => json!(v),
        Value::U16(v) => json!(v),
        Value::I16(v) => json!(v),
        Value::U32(v) => json!(v),
        Value::I32(v) => json!(v),
        Value::F32(v) => json!(v),
        Value::Bool(v) => json!(v),
        Value::String(v) => json!(v),
        Value::U64(v) => json!(v),
        Value::I64(v) => json!(v),
        Value::F64(v) => json!(v),
        Value::Array(v) => json!({"array": format!("{:?}", v.element()), "len": v.len()}),
    }
}

const LINE_CHARS: usize = 80;
