//! `scoutd verify`: the quality gate.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Duration;

use clap::builder::RangedU64ValueParser;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::convert::Base;
use crate::convert::verify::{
    Gate, Likeness, Needs, Options, Progress, Report, Share, Subject, Unit, verify,
};
use crate::memory::{MemoryProbe, ProcProbe};
use crate::units::Bytes;

/// Options of `scoutd verify`.
#[derive(clap::Args)]
#[command(after_help = "\
Both models read the same tokens, one after the other. Without --text, perplexity is that of
the expected answers; without --requests, these are requests to a made-up home, which suit
scout-nano and models trained on the same corpus. REQUESTS holds JSON lines:
  {\"system\":\"…\",\"turns\":[{\"user\":\"…\",\"answer\":\"…\",\"result\":\"…\",\"reply\":\"…\"}, …]}
  {\"messages\":[{\"role\":\"user\",\"content\":\"…\"}],\"tools\":[…],\"answer\":\"…\"}
An expected call is written as {\"name\":\"…\",\"parameters\":{…}}.

Perplexity of a text is llama.cpp's: windows from the beginning on, the predictions of the
second half of each count, the rest of the text is left out.

A checkpoint's folder is first converted, without rounding, to a temporary GGUF file beside
FILE (or in --temp), which is removed afterwards; --keep keeps it, and the next run uses it.

Exit status: 0 the gate is passed, 1 failure, 2 the gate is not passed, 64 wrong usage.

Examples:
  scoutd verify model-q4_0.gguf --against ./checkpoint
  scoutd verify model-q4_0.gguf --against model-q8_0.gguf --text wiki.txt
  scoutd verify model.gguf --against model-f16.gguf --requests house.jsonl --json > gate.json")]
pub(super) struct Args {
    /// The GGUF file in question
    file: PathBuf,
    /// What it was made from: a checkpoint's folder, or a GGUF file of higher precision
    #[arg(long, value_name = "SRC")]
    against: PathBuf,
    /// A text for perplexity
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Tokens of a window of the text
    #[arg(long, default_value_t = 512, value_name = "TOKENS", value_parser = RangedU64ValueParser::<usize>::new().range(4..))]
    window: usize,
    /// Prompts, one a line, whose answers are compared [default: eight built-in ones]
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Requests with their expected answers [default: 80 built-in conversations]
    #[arg(long, value_name = "FILE")]
    requests: Option<PathBuf>,
    /// Only the first so many requests
    #[arg(long, value_name = "COUNT")]
    limit: Option<usize>,
    /// How much perplexity may rise, in percent
    #[arg(long, default_value_t = Gate::default().perplexity_rise_percent, value_name = "PERCENT")]
    perplexity_max: f64,
    /// How much the rate of exactly right tool calls may fall, in points
    #[arg(long, default_value_t = Gate::default().calls_drop_points, value_name = "POINTS")]
    calls_max: f64,
    /// How many answers that set out to be JSON must be valid, in percent
    #[arg(long, default_value_t = Gate::default().json_valid_percent, value_name = "PERCENT")]
    json_min: f64,
    /// Type of the reference made of a checkpoint [default: that of most of its weights]
    #[arg(long, value_name = "TYPE")]
    reference_type: Option<Base>,
    /// Where temporary files lie [default: beside FILE]
    #[arg(long, value_name = "DIR")]
    temp: Option<PathBuf>,
    /// Keep the reference made of a checkpoint for the next time
    #[arg(long)]
    keep: bool,
    /// Compute with activations and cache in F32 instead of as they are served
    #[arg(long)]
    exact: bool,
    /// Threads; by default one for each core
    #[arg(long, value_parser = RangedU64ValueParser::<usize>::new().range(1..=256))]
    threads: Option<usize>,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// Compares, showing progress on the terminal and the verdict at the end.
pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let reference_type = match args.reference_type {
        Some(Base::Auto) => {
            anyhow::bail!(super::Usage("--reference-type: auto is no reference".to_owned()))
        }
        Some(Base::Pure(format)) => Some(format),
        None => None,
    };
    let options = Options {
        file: args.file,
        against: args.against,
        text: args.text,
        window: args.window,
        prompts: args.prompts,
        requests: args.requests,
        limit: args.limit,
        reference_type,
        temp: args.temp,
        keep: args.keep,
        exact: args.exact,
        threads: args.threads,
        gate: Gate {
            perplexity_rise_percent: args.perplexity_max,
            calls_drop_points: args.calls_max,
            json_valid_percent: args.json_min,
        },
    };
    let shown = Shown { bar: Mutex::new(ProgressBar::hidden()), quiet: args.json };
    let report = verify(&options, &shown);
    shown.bar().finish_and_clear();
    let report = report?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report);
    }
    Ok(if report.passed { ExitCode::SUCCESS } else { ExitCode::from(EXIT_NOT_PASSED) })
}

/// Progress on standard error; standard output belongs to the report.
struct Shown {
    bar: Mutex<ProgressBar>,
    quiet: bool,
}

impl Shown {
    fn bar(&self) -> std::sync::MutexGuard<'_, ProgressBar> {
        self.bar.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Progress for Shown {
    fn planned(&self, needs: &Needs) {
        if self.quiet {
            return;
        }
        eprintln!(
            "{} requests, {} tokens to read and {} positions to compare, in both models; up to {} of memory, {} of disk in {}",
            needs.requests,
            needs.tokens,
            needs.positions,
            needs.memory,
            needs.disk,
            needs.dir.display()
        );
        let available = ProcProbe::new().and_then(|mut probe| probe.sample());
        if let Ok(sample) = available
            && sample.available < needs.memory
        {
            eprintln!(
                "note: {} of memory are available: weights will be read from disk again and again",
                sample.available
            );
        }
    }

    fn begin(&self, stage: &str, unit: Unit, count: u64) {
        if !std::io::stderr().is_terminal() {
            return;
        }
        let bar = ProgressBar::with_draw_target(Some(count), ProgressDrawTarget::stderr());
        let template = match unit {
            Unit::Bytes => {
                "{msg:>22} {wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}"
            }
            Unit::Tokens => "{msg:>22} {wide_bar} {pos}/{len} tokens {per_sec} {eta}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(stage.to_owned());
        bar.enable_steady_tick(Duration::from_millis(500));
        let before = std::mem::replace(&mut *self.bar(), bar);
        before.finish_and_clear();
    }

    fn passed(&self, count: u64) {
        self.bar().inc(count);
    }
}

fn print(report: &Report) {
    print_subject("file", &report.file);
    print_subject("reference", &report.reference);
    println!("arithmetic  {}\n", report.arithmetic);
    println!(
        "{:<18} {:>9} {:>10} {:>10} {:>16} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "",
        "positions",
        "perplexity",
        "reference",
        "rise",
        "KL mean",
        "median",
        "99 %",
        "max",
        "same top"
    );
    let parts = [
        ("text", &report.text),
        ("expected answers", &report.answers),
        ("prompts", &report.prompts),
    ];
    for (name, likeness) in parts {
        if let Some(likeness) = likeness {
            print_likeness(name, likeness);
        }
    }
    print_calls(report);
    print_lost(report);
    println!();
    for check in &report.gate {
        let value = check.value.map_or("none".to_owned(), |value| format!("{value:.2}"));
        let verdict = if check.passed { "passed" } else { "NOT PASSED" };
        let note = check.note.as_ref().map(|note| format!("  ({note})")).unwrap_or_default();
        println!("{verdict:<10}  {}: {value}, limit {:.2}{note}", check.name, check.limit);
    }
    let verdict = if report.passed { "the gate is passed" } else { "the gate is NOT passed" };
    println!("{verdict}; {:.1} s", report.seconds);
}

fn print_subject(what: &str, subject: &Subject) {
    let Subject { path, architecture, quantization, bytes, .. } = subject;
    println!("{what:<11} {path} ({architecture}, {quantization}, {})", Bytes(*bytes));
}

fn print_likeness(name: &str, likeness: &Likeness) {
    let Likeness { positions, perplexity, divergence, same_top } = likeness;
    println!(
        "{name:<18} {positions:>9} {:>10.3} {:>10.3} {:>+7.2} ± {:.2} % {:>9.5} {:>9.5} {:>9.5} {:>9.5} {:>7.2} %",
        perplexity.file,
        perplexity.reference,
        perplexity.rise_percent,
        perplexity.standard_error_percent,
        divergence.mean,
        divergence.median,
        divergence.p99,
        divergence.max,
        same_top.percent().unwrap_or(0.0),
    );
    if divergence.mean_tail > 0.0 {
        println!(
            "{:<18} KL without what the unlikeliest tokens differ among themselves; they hold {:.2} % on average",
            "",
            100.0 * divergence.mean_tail
        );
    }
}

fn print_calls(report: &Report) {
    let calls = &report.calls;
    println!("\n{:<34} {:>18} {:>18}", "", "file", "reference");
    let rows = [
        ("tool calls exactly right", calls.file_exact, calls.reference_exact),
        ("valid JSON where JSON was begun", calls.file_json_valid, calls.reference_json_valid),
        ("other answers word for word", calls.file_texts, calls.reference_texts),
    ];
    for (name, file, reference) in rows {
        println!("{name:<34} {:>18} {:>18}", share(file), share(reference));
    }
    println!(
        "tool calls right in one only: {} lost, {} gained; McNemar p = {:.2}",
        calls.lost, calls.gained, calls.p_value
    );
}

/// The first of what the file made worse; all of it is in the JSON report.
fn print_lost(report: &Report) {
    let worse = report.differences.iter().filter(|one| one.lost || one.broken_json);
    for one in worse.take(LOST_SHOWN) {
        let what = if one.lost { "lost" } else { "broken" };
        println!("{what:<7} {:?}: {:?} instead of {:?}", one.request, one.file, one.expected);
    }
}

fn share(share: Share) -> String {
    match share.percent() {
        Some(percent) => format!("{}/{} = {percent:.1} %", share.count, share.of),
        None => "none".to_owned(),
    }
}

const LOST_SHOWN: usize = 5;
/// The file is worse than the gate allows.
const EXIT_NOT_PASSED: u8 = 2;
