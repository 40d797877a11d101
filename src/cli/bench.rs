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
use crate::residency::SlotStats;
use crate::units::{Bytes, SlotId, TokenId};

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

    let slots = opened.model.expert_slots();
    let stats = || slots.as_ref().map(|slots| slots.stats()).unwrap_or_default();
    let mut bench = Bench { model: opened.model.as_mut(), vocab_len, logits: Vec::new() };
    let mut prefill = Vec::new();
    let mut decode = Vec::new();
    let mut experts = [Phase::default(), Phase::default()];
    // The first run warms caches and page tables and is not counted.
    for run in 0..=args.runs {
        let (prompt, before_prompt) = bench.prefill(args.depth, args.prompt, &stats)?;
        let after_prompt = stats();
        let (generate, before_generate) =
            bench.decode(args.depth, args.generate, args.sequences, &stats)?;
        let after_generate = stats();
        if run > 0 {
            let generated = args.generate * u32::from(args.sequences);
            experts[0].add(args.prompt, prompt, after_prompt.since(&before_prompt));
            experts[1].add(generated, generate, after_generate.since(&before_generate));
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
            "experts": slots.as_ref().map(|slots| {
                let bytes = slots.expert_bytes().0;
                json!({
                    "expert_bytes": bytes,
                    "prefill": experts[0].json(), "decode": experts[1].json(),
                })
            }),
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
    if slots.is_some() {
        for (name, phase) in [("prefill", &experts[0]), ("decode", &experts[1])] {
            println!("{name:<8} {}", phase.line());
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What the expert slots did in all measured runs of a phase.
#[derive(Default)]
struct Phase {
    tokens: u64,
    seconds: f64,
    stats: SlotStats,
}

impl Phase {
    fn add(&mut self, tokens: u32, took: Duration, new: SlotStats) {
        self.tokens += u64::from(tokens);
        self.seconds += took.as_secs_f64();
        self.stats = SlotStats {
            uses: self.stats.uses + new.uses,
            hits: self.stats.hits + new.hits,
            ahead_hits: self.stats.ahead_hits + new.ahead_hits,
            ahead_reads: self.stats.ahead_reads + new.ahead_reads,
            guesses: self.stats.guesses + new.guesses,
            right_guesses: self.stats.right_guesses + new.right_guesses,
            bytes_read: self.stats.bytes_read + new.bytes_read,
            wait_ns: self.stats.wait_ns + new.wait_ns,
            busy_ns: self.stats.busy_ns + new.busy_ns,
            ..new
        };
    }

    fn bytes_per_token(&self) -> f64 {
        self.stats.bytes_read as f64 / self.tokens.max(1) as f64
    }

    /// While something was being read.
    fn disk_bytes_per_s(&self) -> f64 {
        self.stats.bytes_read as f64 / (self.stats.busy_ns as f64 / 1e9).max(1e-9)
    }

    fn wait_share(&self) -> f64 {
        self.stats.wait_ns as f64 / 1e9 / self.seconds.max(1e-9)
    }

    fn busy_share(&self) -> f64 {
        self.stats.busy_ns as f64 / 1e9 / self.seconds.max(1e-9)
    }

    fn json(&self) -> serde_json::Value {
        let SlotStats { slots, held_bytes, uses, hits, bytes_read, direct, .. } = self.stats;
        json!({
            "expert_slots": slots, "expert_slot_bytes": held_bytes, "direct": direct,
            "expert_uses": uses, "expert_hits": hits, "expert_hit_ratio": self.stats.hit_ratio(),
            "expert_read_bytes": bytes_read, "read_bytes_per_token": self.bytes_per_token(),
            "wait_share": self.wait_share(), "disk_busy_share": self.busy_share(),
            "disk_bytes_per_s": self.disk_bytes_per_s(),
            "guess_ratio": self.stats.guess_ratio(),
            "ahead_reads": self.stats.ahead_reads, "ahead_hits": self.stats.ahead_hits,
        })
    }

    fn line(&self) -> String {
        format!(
            "experts in slots {:.1} %, read {} a token, waited {:.0} % of the time, disk busy {:.0} % at {:.0} MB/s, \
             guesses right {:.0} %",
            100.0 * self.stats.hit_ratio(),
            Bytes(self.bytes_per_token() as u64),
            100.0 * self.wait_share(),
            100.0 * self.busy_share(),
            self.disk_bytes_per_s() / 1e6,
            100.0 * self.stats.guess_ratio(),
        )
    }
}

struct Bench<'a> {
    model: &'a mut dyn Model,
    vocab_len: u32,
    logits: Vec<f32>,
}

impl Bench<'_> {
    /// Time to read a prompt of `tokens` tokens after `depth` others, and what the expert slots had done before.
    fn prefill(
        &mut self,
        depth: u32,
        tokens: u32,
        stats: &impl Fn() -> SlotStats,
    ) -> anyhow::Result<(Duration, SlotStats)> {
        let slot = SlotId(0);
        self.model.clear(slot);
        self.feed(slot, depth).context("prefill")?;
        let before = stats();
        let start = Instant::now();
        self.feed(slot, tokens).context("prefill")?;
        Ok((start.elapsed(), before))
    }

    /// Time for `sequences` sequences to generate `tokens` tokens each after `depth` others, and what the expert
    /// slots had done before.
    fn decode(
        &mut self,
        depth: u32,
        tokens: u32,
        sequences: u16,
        stats: &impl Fn() -> SlotStats,
    ) -> anyhow::Result<(Duration, SlotStats)> {
        for slot in (0..sequences).map(SlotId) {
            self.model.clear(slot);
            self.feed(slot, depth.max(1)).context("decode")?;
        }
        let before = stats();
        let start = Instant::now();
        for step in 0..tokens {
            let rows = (0..sequences).map(|slot| BatchRow {
                slot: SlotId(slot),
                tokens: vec![self.token(step + u32::from(slot))],
                wants_logits: LogitsWanted::Last,
            });
            let batch = Batch { rows: rows.collect() };
            self.model.forward(&batch, &mut self.logits).context("decode")?;
        }
        Ok((start.elapsed(), before))
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
