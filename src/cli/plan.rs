//! `scoutd plan`: whether a model will fit this machine and the boards, how fast it would be, and what would fit
//! instead.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, bail};
use serde_json::{Map, Value as Json, json};

use super::Usage;
use super::options::ConfigOptions;
use crate::config::Config;
use crate::convert::config::{ConfigError, Family, ModelConfig};
use crate::convert::recipe::Candidate;
use crate::convert::{Base, Recipe};
use crate::daemon;
use crate::gguf::{Gguf, Mapping};
use crate::memory::{MemoryProbe, ProcProbe};
use crate::model::{Blueprint, ExpertsOutline, KvType, Outline};
use crate::store::{self, Fit, Machine, MachineRecord, PI_5_GIB, Rates, Wish};
use crate::units::Bytes;

/// Options of `scoutd plan`.
#[derive(clap::Args)]
#[command(after_help = "\
MODEL is a GGUF file, a model's name in the store, a folder with the config.json of a Hugging Face checkpoint (planned as it would be
converted), or one of these words, planned in Q4_0 without any file:
  scout, llama-3.1-8b, llama-3.2-3b, llama-3.2-1b, smollm2-1.7b, smollm2-360m, smollm2-135m, tinyllama-1.1b

Speeds on this machine come from `scoutd bench --machine` if it was ever run, else from published figures of a
Raspberry Pi 5; which of them is said.

Examples:
  scoutd plan scout
  scoutd plan ./Llama-3.2-3B --type q8_0 --context 16384
  scoutd plan model.gguf --ram 8GiB --json")]
pub(super) struct Args {
    /// A GGUF file, a name in the store, a checkpoint's folder or a model's word [default: the configured model]
    #[arg(value_name = "MODEL")]
    subject: Option<String>,
    /// Plan for an idle machine with this much memory only, as in 8GiB
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    ram: Option<Bytes>,
    /// Longest context of one request in tokens [default: the model's own, but at most 8192]
    #[arg(long, value_name = "TOKENS")]
    context: Option<u32>,
    /// The type that a checkpoint would be converted to
    #[arg(long = "type", value_name = "TYPE", default_value = "q4_0")]
    base: Base,
    /// Print the plans as one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    options: ConfigOptions,
}

/// Prints a plan for each machine.
pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let config = args.options.load()?;
    let kv_type = KvType::from(config.model.kv);
    let subject = match (&args.subject, &config.model.path) {
        (Some(subject), _) => subject.clone(),
        (None, Some(path)) => path.display().to_string(),
        (None, None) => bail!(Usage("name a model to plan".to_owned())),
    };
    let outline = outline(&config, &subject, args.base, kv_type)?;
    let asked = args.context.unwrap_or(config.model.context_tokens);
    let context_tokens = daemon::context(asked, outline.spec.context_len);
    if asked > outline.spec.context_len {
        bail!(Usage(format!(
            "context of {asked} tokens exceeds the model's {}",
            outline.spec.context_len
        )));
    }
    let wish = Wish { context_tokens, pass_tokens: config.engine.prefill_tokens_max };
    let record = record()?;
    let machines = machines(args.ram, &config, record.as_ref())?;
    let plans: Vec<(Machine, Fit)> = machines
        .into_iter()
        .map(|machine| {
            let fit = store::fit(&outline, &machine, wish);
            (machine, fit)
        })
        .collect();
    if args.json {
        println!("{:#}", to_json(&outline, context_tokens, &plans, record.as_ref()));
    } else {
        print(&outline, context_tokens, &plans, record.as_ref());
    }
    Ok(ExitCode::SUCCESS)
}

/// What a model of any kind takes.
fn outline(config: &Config, subject: &str, base: Base, kv_type: KvType) -> anyhow::Result<Outline> {
    let path = Path::new(subject);
    if path.is_dir() {
        return checkpoint(path, base, kv_type);
    }
    if path.is_file() {
        return file(path, kv_type);
    }
    // A file of that name in the store is more than a shape.
    if let Ok(stored) = daemon::find_model(config, path)
        && stored.is_file()
    {
        return file(&stored, kv_type);
    }
    let Some(blueprint) = store::find(subject) else {
        let words: Vec<&str> = store::catalogue().into_iter().map(|(word, _)| word).collect();
        bail!(Usage(format!(
            "`{subject}` is no file, no folder, no model of the store and none of {}",
            words.join(", ")
        )));
    };
    Ok(blueprint.outline_q4_0(kv_type))
}

fn file(path: &Path, kv_type: KvType) -> anyhow::Result<Outline> {
    let name = path.display();
    let mapping = Mapping::open(path).with_context(|| format!("cannot open {name}"))?;
    let gguf = Gguf::parse(mapping.bytes()).with_context(|| format!("cannot read {name}"))?;
    Outline::from_gguf(&gguf, kv_type).with_context(|| format!("{name} cannot be run"))
}

/// A checkpoint as it would be converted. Only its `config.json` is read.
fn checkpoint(folder: &Path, base: Base, kv_type: KvType) -> anyhow::Result<Outline> {
    let path = folder.join("config.json");
    let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let config = ModelConfig::parse(&text).map_err(|error| {
        let reason = match error {
            ConfigError::Architecture(found) => format!("architecture `{found}` is not supported"),
            ConfigError::Other(reason) => reason,
        };
        anyhow::anyhow!("{}: {reason}", path.display())
    })?;
    let name = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    let blueprint = blueprint(&config, &name.file_name().unwrap_or_default().to_string_lossy());
    let tensors = blueprint.tensors();
    let candidates: Vec<Candidate> =
        tensors.iter().map(|(name, shape, _)| Candidate { name, shape }).collect();
    let recipe = Recipe { base, overrides: Vec::new() };
    let choices = recipe.choose(&candidates, config.layers).map_err(anyhow::Error::msg)?;
    let formats: Vec<_> = choices.into_iter().map(|choice| choice.format).collect();
    Ok(blueprint.outline(&formats, kv_type))
}

fn blueprint(config: &ModelConfig, name: &str) -> Blueprint {
    let size = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
    let experts = match &config.family {
        Family::Llama => None,
        Family::Llama4(llama4) => Some(ExpertsOutline {
            count: size(llama4.experts),
            width: size(llama4.expert_ffn_len),
            step: size(llama4.moe_step),
            chunk: size(llama4.chunk_len),
        }),
    };
    Blueprint {
        name: name.to_owned(),
        layers: size(config.layers),
        hidden: size(config.hidden),
        heads: size(config.heads),
        kv_heads: size(config.kv_heads),
        head_len: size(config.head_len),
        width: size(config.ffn_len),
        vocab_len: size(config.vocab_len),
        context_len: size(config.context_len),
        tied: config.tied,
        rope_factors: config.rope_scaling.is_some(),
        experts,
    }
}

/// What was measured of this machine, if it was this machine.
pub(super) fn record() -> anyhow::Result<Option<MachineRecord>> {
    let memory = this_memory()?.0;
    Ok(daemon::machine_record(memory))
}

/// All memory of this machine, and what is available of it.
fn this_memory() -> anyhow::Result<(Bytes, Bytes)> {
    let sample = ProcProbe::new().and_then(|mut probe| probe.sample()).context("memory")?;
    Ok((sample.total, sample.available))
}

/// The boards and this machine, or one of a given size.
fn machines(
    ram: Option<Bytes>,
    config: &Config,
    record: Option<&MachineRecord>,
) -> anyhow::Result<Vec<Machine>> {
    let keep_free = config.memory.keep_free_percent;
    let rates = record.map_or(Rates::PI_5, MachineRecord::rates);
    if let Some(ram) = ram {
        let name = format!("a machine with {ram}");
        return Ok(vec![Machine::idle(&name, ram, keep_free, rates)]);
    }
    let mut machines: Vec<Machine> =
        PI_5_GIB.into_iter().map(|gib| Machine::pi_5(gib, keep_free)).collect();
    machines.push(this_machine(config, rates)?);
    Ok(machines)
}

/// This machine as it is now.
pub(super) fn this_machine(config: &Config, rates: Rates) -> anyhow::Result<Machine> {
    let (total, available) = this_memory()?;
    let keep_free = config.memory.keep_free_percent;
    Ok(Machine::now("this machine", total, available, keep_free, rates))
}

fn print(
    outline: &Outline,
    context_tokens: u32,
    plans: &[(Machine, Fit)],
    record: Option<&MachineRecord>,
) {
    let spec = &outline.spec;
    println!(
        "{} ({}, {}): {:.1} billion parameters, {}; planned with {context_tokens} tokens of context",
        spec.name,
        spec.architecture,
        spec.quantization,
        spec.parameters as f64 / 1e9,
        Bytes(spec.weights_bytes)
    );
    for (machine, fit) in plans {
        println!();
        println!(
            "{} ({} may be promised, {} kept free)",
            machine.name, machine.headroom, machine.keep_free
        );
        println!("  {}", fit.summary());
        for line in fit.details() {
            println!("  {line}");
        }
    }
    println!();
    if plans.iter().any(|(machine, _)| machine.rates.measured)
        && let Some(record) = record
    {
        println!("speeds on this machine: from its bandwidths, measured on {}", record.date);
    } else {
        println!(
            "speeds on this machine: not measured (`scoutd bench --machine`), as on a Raspberry Pi 5"
        );
    }
    println!(
        "speeds on a Raspberry Pi 5: from published bandwidths, with an NVMe drive at PCIe Gen 3"
    );
}

fn to_json(
    outline: &Outline,
    context_tokens: u32,
    plans: &[(Machine, Fit)],
    record: Option<&MachineRecord>,
) -> Json {
    let spec = &outline.spec;
    let machines: Vec<Json> =
        plans.iter().map(|(machine, fit)| machine_json(machine, fit)).collect();
    json!({
        "model": spec.name, "architecture": spec.architecture, "quantization": spec.quantization,
        "parameters": spec.parameters, "active_parameters": outline.active_parameters,
        "weights_bytes": spec.weights_bytes, "context_tokens": context_tokens,
        "machines": machines,
        "measured": record.map(|record| json!({"date": record.date, "machine": record.machine})),
    })
}

fn machine_json(machine: &Machine, fit: &Fit) -> Json {
    let mut object = Map::new();
    object.insert("machine".to_owned(), json!(machine.name));
    object.insert("memory_bytes".to_owned(), json!(machine.total.0));
    object.insert("headroom_bytes".to_owned(), json!(machine.headroom.0));
    object.insert("keep_free_bytes".to_owned(), json!(machine.keep_free.0));
    object.insert("rates_measured".to_owned(), json!(machine.rates.measured));
    object.insert("verdict".to_owned(), json!(fit.verdict()));
    for (name, value) in fit.figures() {
        let whole = value.fract() == 0.0;
        object.insert(name.to_owned(), if whole { json!(value as u64) } else { json!(value) });
    }
    let instead: Vec<Json> = fit.instead.iter().map(instead_json).collect();
    object.insert("would_fit".to_owned(), json!(instead));
    Json::Object(object)
}

fn instead_json(instead: &store::Instead) -> Json {
    match instead {
        store::Instead::Context { tokens } => json!({"context_tokens": tokens}),
        store::Instead::Model { name, weights, speed } => json!({
            "model": name, "quantization": "Q4_0", "weights_bytes": weights.0,
            "plan_decode_tokens_per_second": speed.decode_tokens_per_s,
            "plan_prefill_tokens_per_second": speed.prefill_tokens_per_s,
        }),
    }
}

/// `8GiB`, `8G`, `16GB`, `500MB`, or plain bytes. Letters without `i` before `B` are decimal; a single letter is
/// binary, as memory is sold.
fn bytes(text: &str) -> Result<Bytes, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: f64 = number.parse().map_err(|_| format!("`{text}` is no number of bytes"))?;
    let scale = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1_048_576.0,
        "g" | "gib" => 1_073_741_824.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        _ => return Err(format!("`{unit}` is no unit: use MiB, GiB, MB or GB")),
    };
    Ok(Bytes((number * scale) as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        assert_eq!(bytes("8GiB"), Ok(Bytes(8 << 30)));
        assert_eq!(bytes("8g"), Ok(Bytes(8 << 30)));
        assert_eq!(bytes("1.5 GB"), Ok(Bytes(1_500_000_000)));
        assert_eq!(bytes("4096"), Ok(Bytes(4096)));
        assert!(bytes("many").is_err() && bytes("3 apples").is_err());
    }
}
