//! `scoutd convert`: a checkpoint or a GGUF file to quantized GGUF.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Duration;

use clap::builder::RangedU64ValueParser;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::convert::{
    self, ALIGNMENT_OURS, Base, Observer, Options, Override, Part, Plan, Recipe, Report,
};

/// Options of `scoutd convert`.
#[derive(clap::Args)]
#[command(after_help = "\
TYPE is one of auto, q4_0, q4_1, q4_k, q5_k, q6_k, q8_0, f16, bf16, f32.
`auto` is Q4_0 with more bits where four are known to hurt: Q6_K for the output
matrix, attention values and early down projections. Norms, router and rotation
factors are F32 in every type.

Examples:
  scoutd convert ./Llama-4-Scout --out scout.gguf
  scoutd convert ./checkpoint --type q8_0 --out model-q8_0.gguf
  scoutd convert ./checkpoint --type q4_0 --tensor 'blk.*.attn_v.weight=q8_0' --out model.gguf
  scoutd convert model-q8_0.gguf --type q4_k --out model-q4_k.gguf --json > report.json")]
pub(super) struct Args {
    /// A folder with config.json, *.safetensors and tokenizer, or a GGUF file
    source: PathBuf,
    /// The type of the large matrices
    #[arg(long = "type", value_name = "TYPE", default_value = "auto")]
    base: Base,
    /// Gives tensors whose GGUF name matches another type; `*` and `?` are wildcards, the last
    /// matching one counts
    #[arg(long = "tensor", value_name = "PATTERN=TYPE")]
    tensors: Vec<Override>,
    /// The file to write; by default NAME-TYPE.gguf in this folder
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// The model's name in the file; by default the folder's
    #[arg(long)]
    name: Option<String>,
    /// The model knows its tools from training: never list them in prompts whose template ignores tools
    #[arg(long)]
    knows_tools: bool,
    /// Bytes that tensors are aligned to, a power of two; 32 makes small models smaller
    #[arg(long, value_name = "BYTES", default_value_t = ALIGNMENT_OURS, value_parser = alignment)]
    align: u32,
    /// Threads; by default one for each core, fewer where memory would not suffice
    #[arg(long, value_parser = RangedU64ValueParser::<usize>::new().range(1..=256))]
    threads: Option<usize>,
    /// Go on with an interrupted conversion
    #[arg(long, conflicts_with = "force")]
    resume: bool,
    /// Replace an existing file, or start an interrupted conversion anew
    #[arg(long)]
    force: bool,
    /// Show types and sizes, write nothing
    #[arg(long)]
    dry_run: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// Converts, showing progress on the terminal and the report at the end.
pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let recipe = Recipe { base: args.base, overrides: args.tensors };
    let options = Options {
        target: args.out.unwrap_or_else(|| default_target(&args.source, args.base)),
        source: args.source,
        recipe,
        name: args.name,
        knows_tools: args.knows_tools,
        alignment: args.align,
        threads: args.threads,
        resume: args.resume,
        force: args.force,
    };
    if args.dry_run {
        return Ok(convert::plan(&options, |plan, _| {
            if args.json {
                print_plan_json(&plan)
            } else {
                print_plan(&plan)
            }
            Ok(ExitCode::SUCCESS)
        })?);
    }
    let shown = Shown::new(args.json);
    let report = convert::convert(&options, &shown);
    shown.finish();
    let report = report?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print_report(&report);
        if report.rms_error > 0.0 {
            let source = options.source.display();
            println!(
                "does it still answer as before? scoutd verify {} --against {source}",
                report.file
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn alignment(text: &str) -> Result<u32, String> {
    let bytes: u32 = text.parse().map_err(|error| format!("{error}"))?;
    let fits = bytes.is_power_of_two() && (32..=ALIGNMENT_MAX).contains(&bytes);
    fits.then_some(bytes).ok_or_else(|| format!("not a power of two from 32 to {ALIGNMENT_MAX}"))
}

fn default_target(source: &std::path::Path, base: Base) -> PathBuf {
    let absolute = source.canonicalize().unwrap_or_else(|_| source.to_path_buf());
    let stem = absolute.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let base = Recipe { base, overrides: Vec::new() };
    PathBuf::from(format!("{stem}-{base}.gguf"))
}

/// Progress on standard error; standard output belongs to the report.
struct Shown {
    bar: Mutex<ProgressBar>,
    quiet: bool,
}

impl Shown {
    fn new(quiet: bool) -> Shown {
        Shown { bar: Mutex::new(ProgressBar::hidden()), quiet }
    }

    fn bar(&self) -> std::sync::MutexGuard<'_, ProgressBar> {
        self.bar.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn finish(&self) {
        self.bar().finish_and_clear();
    }
}

impl Observer for Shown {
    fn planned(&self, plan: &Plan) {
        if !self.quiet {
            let count = plan.tensors().len();
            let (name, architecture, recipe) = (&plan.name, &plan.architecture, &plan.recipe);
            eprintln!(
                "{name} ({architecture}): {count} tensors, recipe {recipe}, {}",
                size(plan.bytes)
            );
            plan.notes.iter().for_each(|note| eprintln!("note: {note}"));
        }
    }

    fn begin(&self, part: Part, bytes: u64) {
        if !std::io::stderr().is_terminal() {
            return;
        }
        let label = match part {
            Part::Resume => "checking what is there",
            Part::Convert => "converting",
            Part::Check => "reading back",
        };
        let bar = ProgressBar::with_draw_target(Some(bytes), ProgressDrawTarget::stderr());
        let template = "{msg:>22} {wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(label);
        bar.enable_steady_tick(Duration::from_millis(500));
        let before = std::mem::replace(&mut *self.bar(), bar);
        before.finish_and_clear();
    }

    fn passed(&self, bytes: u64) {
        self.bar().inc(bytes);
    }
}

fn print_plan(plan: &Plan) {
    println!("{:<38} {:>6} {:>14}  shape", "tensor", "type", "bytes");
    for tensor in plan.tensors() {
        let shape = shape(tensor.shape);
        println!("{:<38} {:>6} {:>14}  {shape}", tensor.name, tensor.format.name(), tensor.bytes);
    }
    plan.notes.iter().for_each(|note| println!("note: {note}"));
    let tensors = plan.tensors().len();
    let bytes: u64 = plan.tensors().map(|tensor| tensor.bytes).sum();
    println!(
        "{tensors} tensors, {} parameters, {bytes} bytes of tensors, file {}",
        plan.parameters(),
        size(plan.bytes)
    );
}

fn print_plan_json(plan: &Plan) {
    let tensors: Vec<serde_json::Value> = plan
        .tensors()
        .map(|tensor| {
            serde_json::json!({
                "name": tensor.name, "shape": tensor.shape,
                "type": tensor.format.name(), "bytes": tensor.bytes,
            })
        })
        .collect();
    let plan = serde_json::json!({
        "architecture": plan.architecture, "name": plan.name, "recipe": plan.recipe,
        "parameters": plan.parameters(), "bytes": plan.bytes, "tensors": tensors,
        "skipped": plan.skipped, "notes": plan.notes,
    });
    println!("{plan:#}");
}

fn print_report(report: &Report) {
    println!("{:<38} {:>6} {:>14} {:>9} {:>9}", "tensor", "type", "bytes", "rms", "max");
    for tensor in &report.tensors {
        let note = tensor.instead_of.map(|wanted| format!("  instead of {wanted}"));
        println!(
            "{:<38} {:>6} {:>14} {:>9} {:>9}{}",
            tensor.name,
            tensor.format,
            tensor.bytes,
            percent(tensor.rms_error),
            percent(tensor.max_error),
            note.unwrap_or_default()
        );
    }
    if report.resumed_pieces > 0 {
        println!("resumed: {} of {} pieces were there", report.resumed_pieces, report.pieces);
    }
    println!(
        "{}: {}, {:.2} bits per weight, rms error {}; read back and equal; {:.1} s, {} threads",
        report.file,
        size(report.bytes),
        report.bits_per_weight,
        percent(report.rms_error),
        report.seconds,
        report.threads
    );
}

fn percent(share: f64) -> String {
    if share == 0.0 { "0".to_owned() } else { format!("{:.3} %", share * 100.0) }
}

fn shape(shape: &[u64]) -> String {
    shape.iter().map(u64::to_string).collect::<Vec<_>>().join(" × ")
}

fn size(bytes: u64) -> String {
    crate::units::Bytes(bytes).to_string()
}

const ALIGNMENT_MAX: u32 = 1 << 20;

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn arguments() {
        let parse = |line: &str| Command::try_parse_from(line.split(' '));
        let args = parse("x ./m --tensor a*=q8_0 --align 32 --resume").unwrap().args;
        assert_eq!((args.base, args.align, args.resume), (Base::Auto, 32, true));
        assert_eq!(args.tensors.len(), 1);
        for bad in ["--align 33", "--type q9", "--tensor a", "--resume --force", "--threads 0"] {
            assert!(parse(&format!("x ./m {bad}")).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_default_name_says_the_type() {
        let target = default_target(std::path::Path::new("/nowhere/model"), Base::Auto);
        assert_eq!(target, PathBuf::from("model-auto.gguf"));
    }
}
