//! `scoutd trace`: what the routers of a mixture of experts choose, and what that means for expert slots.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, ensure};
use clap::Args as ClapArgs;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::{Value, json};

use super::Usage;
use super::options::ConfigOptions;
use crate::chat::{Message, Role};
use crate::daemon;
use crate::model::{Batch, BatchRow, LogitsWanted, Model};
use crate::residency::{self, Policy, TraceReport};
use crate::template::{ChatTemplate, RenderOptions};
use crate::units::{SlotId, TokenId};

/// What `trace` takes.
#[derive(ClapArgs, Debug)]
#[command(after_help = "\
Each prompt is asked as a conversation of its own and answered with the likeliest tokens. The
report counts, for each layer with experts, how evenly they are used, how soon an expert is
needed again, how often the layer before would have guessed the right one, and what share of
uses 1, 2, 3, … slots for each layer would find, by way of eviction.

Examples:
  scoutd trace --model scout.gguf
  scoutd trace --model scout.gguf --prompts house.txt --generate 200 --json > trace.json")]
pub(super) struct Args {
    /// Prompts, one a line [default: eight requests to a home]
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Most tokens of each answer
    #[arg(long, default_value_t = 64, value_name = "TOKENS")]
    generate: u32,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    options: ConfigOptions,
}

const PROMPTS: [&str; 8] = [
    "Turn on the kitchen light.",
    "Is the garage door closed?",
    "Set the bedroom to 19 degrees at ten in the evening.",
    "What is the temperature in the living room?",
    "Why is the sky blue?",
    "Write a short shopping list for a vegetable soup.",
    "Which lights are on upstairs?",
    "Tell me how a heat pump works, in three sentences.",
];

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    ensure!(args.generate > 0, Usage("--generate must be at least 1".to_owned()));
    let text = match &args.prompts {
        Some(path) => {
            fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?
        }
        None => PROMPTS.join("\n"),
    };
    let prompts: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    ensure!(!prompts.is_empty(), Usage("no prompts".to_owned()));
    let config = args.options.load()?;
    let mut opened = daemon::open_model(&config, 1)?;
    let template = opened.template()?;
    let experts = opened.experts()?;
    let model = opened.model.as_mut();
    ensure!(experts > 0, "{} has no experts to trace", model.spec().name);

    model.record_routes(true);
    for prompt in &prompts {
        answer(model, &template, prompt, args.generate)
            .with_context(|| format!("prompt `{prompt}`"))?;
    }
    let report = residency::report(experts, &model.record_routes(false));
    if args.json {
        println!("{}", json_of(&report, &opened.model.spec().name, prompts.len()));
    } else {
        println!("{}", opened.summary());
        print(&report, prompts.len());
    }
    Ok(ExitCode::SUCCESS)
}

/// Reads one prompt and writes the likeliest tokens, until the model stops or `most` are written.
fn answer(
    model: &mut dyn Model,
    template: &ChatTemplate,
    prompt: &str,
    most: u32,
) -> anyhow::Result<()> {
    let tokenizer = template.tokenizer();
    let messages = [Message::text(Role::User, prompt)];
    // Always the same day, where a template tells it.
    let now = Timestamp::UNIX_EPOCH.to_zoned_datetime(TimeZone::UTC);
    let options = RenderOptions::at(now);
    let mut tokens = template.render(&messages, &[], &options)?.tokens(tokenizer)?;
    let room = model.spec().context_len as usize;
    ensure!(tokens.len() < room, "{} tokens in a context of {room}", tokens.len());
    let most = (most as usize).min(room - tokens.len());
    let slot = SlotId(0);
    model.clear(slot);
    let mut logits = Vec::new();
    for _ in 0..most {
        let row = BatchRow { slot, tokens, wants_logits: LogitsWanted::Last };
        model.forward(&Batch { rows: vec![row] }, &mut logits)?;
        let likeliest = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
        let next = TokenId(u32::try_from(likeliest.unwrap_or(0))?);
        if tokenizer.stop_tokens().contains(&next) {
            break;
        }
        tokens = vec![next];
    }
    Ok(())
}

fn print(report: &TraceReport, prompts: usize) {
    println!(
        "{prompts} prompts, {} tokens read, {} written, {} experts in each of {} layers",
        report.prompt_tokens,
        report.decoded_tokens,
        report.experts,
        report.layers.len()
    );
    println!("\nlayer  used as evenly as  busiest  reuse after (half, 9 of 10)  guessed right");
    for (number, layer) in report.layers.iter().enumerate() {
        let all: u64 = layer.decode_counts.iter().sum();
        let busiest = layer.decode_counts.iter().max().copied().unwrap_or(0);
        let steps = |steps: Option<usize>| steps.map_or("-".to_owned(), |n| n.to_string());
        println!(
            "{number:>5}  {:>6.1} of {:<8} {:>8.0} %  {:>12}  {:>12}  {:>13}",
            layer.effective_experts,
            report.experts,
            100.0 * busiest as f64 / all.max(1) as f64,
            steps(layer.reuse_median),
            steps(layer.reuse_p90),
            layer.guess_ratio.map_or("-".to_owned(), |ratio| format!("{:.0} %", 100.0 * ratio)),
        );
    }
    println!(
        "\nslots of a layer  found in them by {}, at best",
        Policy::ALL.map(Policy::name).join(", ")
    );
    for hits in &report.hits {
        let ratios = hits.ratios.map(|ratio| format!("{:>6.1} %", 100.0 * ratio)).join("  ");
        println!("{:>16}  {ratios}  {:>6.1} %", hits.slots, 100.0 * hits.best);
    }
}

fn json_of(report: &TraceReport, model: &str, prompts: usize) -> Value {
    let layers: Vec<Value> = report
        .layers
        .iter()
        .map(|layer| {
            json!({
                "decode_counts": layer.decode_counts, "prompt_counts": layer.prompt_counts,
                "effective_experts": layer.effective_experts,
                "reuse_median_steps": layer.reuse_median, "reuse_p90_steps": layer.reuse_p90,
                "guess_ratio": layer.guess_ratio,
            })
        })
        .collect();
    let hits: Vec<Value> = report
        .hits
        .iter()
        .map(|hits| {
            let mut ratios = serde_json::Map::new();
            for (policy, ratio) in Policy::ALL.iter().zip(hits.ratios) {
                ratios.insert(policy.name().to_owned(), json!(ratio));
            }
            ratios.insert("best".to_owned(), json!(hits.best));
            json!({"slots_per_layer": hits.slots, "expert_hit_ratio": ratios})
        })
        .collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"), "model": model, "prompts": prompts,
        "prompt_tokens": report.prompt_tokens, "generated_tokens": report.decoded_tokens,
        "experts": report.experts, "guess_ratio": report.guess_ratio(),
        "layers": layers, "slots": hits,
    })
}
