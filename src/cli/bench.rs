//! `scoutd bench`: prefill and decode speed of a model on this machine.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Args as ClapArgs;
use serde_json::json;

use super::machine;
use super::options::ConfigOptions;
use crate::daemon;
use crate::model::{Batch, BatchRow, LogitsWanted, Model};
use crate::units::{SlotId, TokenId};

/// What `bench` takes.
#[derive(ClapArgs, Debug)]
pub(super) struct Args {
    /// Tokens of the prompt
    #[arg(long, default_value_t = 512, value_name = "TOKENS")]
    prompt: u32,
    /// Tokens to generate
    #[arg(long, default_value_t = 128, value_name = "TOKENS")]
    generate: u32,
    /// Tokens already in the context before either is measured
    #[arg(long, default_value_t = 0, value_name = "TOKENS")]
    depth: u32,
    /// Sequences that generate at the same time
    #[arg(long, default_value_t = 1, value_name = "COUNT")]
    sequences: u16,
    /// Measured runs; the median is reported, with the extremes
    #[arg(long, default_value_t = 5, value_name = "COUNT")]
    runs: u32,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
    /// Measure memory, products and disk of this machine instead of a model, and keep the figures for `plan`
    #[arg(long)]
    machine: bool,
    /// With --machine, a folder on the disk to measure [default: the state folder]
    #[arg(long, value_name = "FOLDER", requires = "machine")]
    disk: Option<PathBuf>,
    /// With --machine, the folder to keep the figures in [default: /var/lib/scoutd, or the user's state folder]
    #[arg(long, value_name = "FOLDER", requires = "machine")]
    state: Option<PathBuf>,
    #[command(flatten)]
    options: ConfigOptions,
}

/// Tokens a second over several runs.
struct Rates(Vec<f64>);

impl Rates {
    fn new(mut rates: Vec<f64>) -> Rates {
        rates.sort_by(f64::total_cmp);
        Rates(rates)
    }

    fn median(&self) -> f64 {
        self.0[self.0.len() / 2]
    }

    fn min(&self) -> f64 {
        self.0[0]
    }

    fn max(&self) -> f64 {
        self.0[self.0.len() - 1]
    }

    fn json(&self) -> serde_json::Value {
        json!({"median": self.median(), "min": self.min(), "max": self.max()})
    }
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    if args.machine {
        let threads = daemon::threads(&args.options.load()?);
        let (disk, state, json) = (args.disk, args.state, args.json);
        return machine::run(&machine::Request { disk, state, threads, json });
    }
    ensure!(args.runs > 0 && args.prompt > 0 && args.sequences > 0, "nothing to measure");
    let config = args.options.load()?;
    let mut opened = daemon::open_model(&config, args.sequences)?;
    let vocab_len = opened.model.spec().vocab_len;
    let context = opened.model.spec().context_len;
    let longest = args.depth + args.prompt.max(args.generate);
    ensure!(longest <= context, "{longest} tokens exceed the model's context of {context}");

    let mut bench = Bench { model: opened.model.as_mut(), vocab_len, logits: Vec::new() };
    let mut prefill = Vec::new();
    let mut decode = Vec::new();
    // The first run warms caches and page tables and is not counted.
    for run in 0..=args.runs {
        let prompt = bench.prefill(args.depth, args.prompt).context("prefill")?;
        let generate = bench.decode(args.depth, args.generate, args.sequences).context("decode")?;
        if run > 0 {
            prefill.push(f64::from(args.prompt) / prompt.as_secs_f64());
            let generated = f64::from(args.generate) * f64::from(args.sequences);
            decode.push(generated / generate.as_secs_f64());
        }
    }
    let (prefill, decode) = (Rates::new(prefill), Rates::new(decode));
    if args.json {
        let spec = opened.model.spec();
        let report = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "model": spec.name, "architecture": spec.architecture, "quantization": spec.quantization,
            "weights_bytes": spec.weights_bytes, "isa": opened.isa, "threads": opened.threads,
            "prompt_tokens": args.prompt, "generated_tokens": args.generate,
            "depth_tokens": args.depth, "sequences": args.sequences, "runs": args.runs,
            "prefill_tokens_per_s": prefill.json(), "decode_tokens_per_s": decode.json(),
        });
        println!("{report}");
        return Ok(ExitCode::SUCCESS);
    }
    println!("{}", opened.summary());
    for (name, tokens, rates) in
        [("prefill", args.prompt, &prefill), ("decode", args.generate, &decode)]
    {
        println!(
            "{name:<8} {tokens:>5} tokens  {:>9.1} tokens/s  (min {:.1}, max {:.1}, median of {})",
            rates.median(),
            rates.min(),
            rates.max(),
            args.runs
        );
    }
    Ok(ExitCode::SUCCESS)
}

struct Bench<'a> {
    model: &'a mut dyn Model,
    vocab_len: u32,
    logits: Vec<f32>,
}

impl Bench<'_> {
    /// Time to read a prompt of `tokens` tokens after `depth` others.
    fn prefill(&mut self, depth: u32, tokens: u32) -> anyhow::Result<Duration> {
        let slot = SlotId(0);
        self.model.clear(slot);
        self.feed(slot, depth)?;
        let start = Instant::now();
        self.feed(slot, tokens)?;
        Ok(start.elapsed())
    }

    /// Time for `sequences` sequences to generate `tokens` tokens each after `depth` others.
    fn decode(&mut self, depth: u32, tokens: u32, sequences: u16) -> anyhow::Result<Duration> {
        for slot in (0..sequences).map(SlotId) {
            self.model.clear(slot);
            self.feed(slot, depth.max(1))?;
        }
        let start = Instant::now();
        for step in 0..tokens {
            let rows = (0..sequences).map(|slot| BatchRow {
                slot: SlotId(slot),
                tokens: vec![self.token(step + u32::from(slot))],
                wants_logits: LogitsWanted::Last,
            });
            let batch = Batch { rows: rows.collect() };
            self.model.forward(&batch, &mut self.logits)?;
        }
        Ok(start.elapsed())
    }

    fn feed(&mut self, slot: SlotId, tokens: u32) -> anyhow::Result<()> {
        if tokens == 0 {
            return Ok(());
        }
        let tokens = (0..tokens).map(|n| self.token(n)).collect();
        let row = BatchRow { slot, tokens, wants_logits: LogitsWanted::Last };
        self.model.forward(&Batch { rows: vec![row] }, &mut self.logits)?;
        Ok(())
    }

    /// Any tokens do: the work is the same. A multiplicative sequence spreads them over the experts.
    fn token(&self, n: u32) -> TokenId {
        TokenId(n.wrapping_mul(2_654_435_761) % self.vocab_len)
    }
}
