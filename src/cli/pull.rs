//! `scoutd pull`: a model from the Hugging Face hub into the store.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value as Json, json};

use super::Usage;
use super::options::SourceOptions;
use crate::config::Config;
use crate::daemon;
use crate::model::KvType;
use crate::store::{
    self, Fit, Hub, Installed, Kind, MachineRecord, Observer, PullPlan, PullRequest, Rates,
    Reference, Store, StoreError, Wish,
};
use crate::units::Bytes;

/// Options of `scoutd pull`.
#[derive(clap::Args)]
#[command(after_help = "\
Without QUANT or FILE the first of these is taken that the repository has: Q4_0, Q4_K_M, Q4_K_S,
Q4_1, Q5_K_M, Q5_K_S, Q6_K, Q8_0, BF16, F16. Before anything is loaded you see size, licence and
whether it will fit. A pull that was cut off goes on where it was when it is called again.

Private and gated models need a token: HF_TOKEN in the environment, or store.token_file.
HF_ENDPOINT, store.hub and store.mirror name another hub.

Examples:
  scoutd pull owner/model-GGUF
  scoutd pull owner/model-GGUF:Q8_0 --name house --yes
  scoutd pull owner/model-GGUF:model-q4_k_m.gguf --dry-run
  scoutd pull owner/checkpoint --safetensors")]
pub(super) struct Args {
    /// A repository of the hub, and which of its quantizations or files
    #[arg(value_name = "OWNER/NAME[:QUANT|:FILE]")]
    reference: Reference,
    /// A branch, tag or commit [default: the main branch]
    #[arg(long)]
    revision: Option<String>,
    /// What to call it here [default: the file's name]
    #[arg(long)]
    name: Option<String>,
    /// Load what `scoutd convert` reads: configuration, tokenizer and weights in safetensors
    #[arg(long)]
    safetensors: bool,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
    /// Only show what would be done
    #[arg(long)]
    dry_run: bool,
    /// Print plan and result as one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sources: SourceOptions,
}

/// Plans, asks, loads.
pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let config = args.sources.load()?;
    let store = daemon::open_store(&config)?;
    let hub = daemon::open_hub(&config)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("no async runtime")?;
    let request = PullRequest {
        reference: args.reference.clone(),
        revision: args.revision.clone(),
        name: args.name.clone(),
        safetensors: args.safetensors,
        kv_type: KvType::from(config.model.kv),
    };
    let plan = runtime.block_on(interruptible(store.plan_pull(&hub, &request)))?;
    let fit = fit(&config, &plan)?;
    if !args.json {
        describe(&hub, &store, &plan, fit.as_ref());
    }
    let mut installed = None;
    if !plan.installed && !args.dry_run {
        if !args.yes && !confirm("Load it?")? {
            return Ok(ExitCode::FAILURE);
        }
        let shown = Shown::new(plan.bytes);
        let pulled = runtime.block_on(interruptible(store.pull(&hub, &plan, &shown)));
        shown.finish();
        installed = Some(pulled?);
    }
    if args.json {
        println!("{:#}", to_json(&store, &plan, fit.as_ref(), installed.as_ref()));
    } else if let Some(model) = &installed {
        println!("{}", next_step(&store, model));
    }
    Ok(ExitCode::SUCCESS)
}

/// Ctrl-C ends the work; what was written stays.
async fn interruptible<T>(work: impl Future<Output = Result<T, StoreError>>) -> anyhow::Result<T> {
    tokio::select! {
        result = work => Ok(result?),
        _ = tokio::signal::ctrl_c() => {
            bail!("interrupted; what was loaded is kept, the same command goes on with it")
        }
    }
}

/// Asks on the terminal; nobody there is an error, not a yes.
pub(super) fn confirm(question: &str) -> anyhow::Result<bool> {
    if !io::stdin().is_terminal() {
        bail!(Usage("nobody to ask: not a terminal; say --yes".to_owned()));
    }
    eprint!("{question} [y/N] ");
    io::stderr().flush()?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
}

/// Whether it would run on this machine now, if its header says what it takes.
fn fit(config: &Config, plan: &PullPlan) -> anyhow::Result<Option<Fit>> {
    let Some(outline) = &plan.outline else { return Ok(None) };
    let record = super::plan::record()?;
    let rates = record.as_ref().map_or(Rates::PI_5, MachineRecord::rates);
    let machine = super::plan::this_machine(config, rates)?;
    let wish = Wish {
        context_tokens: daemon::context(config.model.context_tokens, outline.spec.context_len)
            .min(outline.spec.context_len),
        pass_tokens: config.engine.prefill_tokens_max,
    };
    Ok(Some(store::fit(outline, &machine, wish)))
}

fn describe(hub: &Hub, store: &Store, plan: &PullPlan, fit: Option<&Fit>) {
    let line = |key: &str, text: String| println!("  {key:<13} {text}");
    let repository = &plan.repository;
    println!("{} at {}", repository.repo, &repository.commit[..repository.commit.len().min(8)]);
    if plan.installed {
        println!("{} is in the store already, with the same content", plan.name);
        return;
    }
    let size =
        plan.bytes.map_or_else(|| "size unknown".to_owned(), |bytes| Bytes(bytes).to_string());
    match &plan.files[..] {
        [file] => line("file", format!("{}, {size}", file.path)),
        files => line("files", format!("{} files, {size}; first {}", files.len(), files[0].path)),
    }
    let quantization = plan.quantization.as_deref().or(plan.facts.quantization.as_deref());
    match (plan.kind, quantization) {
        (Kind::Checkpoint, _) => line("for", "scoutd convert".to_owned()),
        (_, Some(label)) => line("quantization", format!("{label}: {}", plan.reason)),
        (_, None) => line("quantization", format!("not in the name; {}", plan.reason)),
    }
    line("licence", licence(hub, plan));
    let there = match plan.there_bytes {
        0 => String::new(),
        bytes => format!(", {} of it are here already", Bytes(bytes)),
    };
    line("disk", format!("{size} to load{there}; {} free in {}", plan.free, store.dir().display()));
    if plan.kind == Kind::Gguf && plan.files.len() > 1 {
        line("", "the parts are joined to one file, which takes the size once more".to_owned());
    }
    match (fit, &plan.facts.problem) {
        (Some(fit), _) => {
            line("memory", fit.summary());
            fit.details().into_iter().for_each(|detail| line("", detail));
        }
        (None, Some(problem)) => line("memory", format!("scoutd cannot run it: {problem}")),
        (None, None) => line("memory", "known when it is here (`scoutd plan`)".to_owned()),
    }
    line("name", plan.name.clone());
}

fn licence(hub: &Hub, plan: &PullPlan) -> String {
    let repository = &plan.repository;
    let name = repository.license.as_deref().unwrap_or("not stated");
    let base = hub.base().to_string();
    let page = format!("{}/{}", base.trim_end_matches('/'), repository.repo);
    let link = repository.license_link.clone().unwrap_or(page);
    format!("{name}; read it at {link}")
}

fn next_step(store: &Store, model: &Installed) -> String {
    match model.kind {
        Kind::Gguf => format!(
            "{} is in the store; start it with `scoutd serve --model {}`",
            model.name, model.name
        ),
        Kind::Checkpoint => format!(
            "{} is in the store; make a file of it with `scoutd convert {}`",
            model.name,
            store.path(model).display()
        ),
    }
}

fn to_json(
    store: &Store,
    plan: &PullPlan,
    fit: Option<&Fit>,
    installed: Option<&Installed>,
) -> Json {
    let repository = &plan.repository;
    let files: Vec<Json> = plan
        .files
        .iter()
        .map(|file| json!({"path": file.path, "bytes": file.bytes, "sha256": file.sha256}))
        .collect();
    json!({
        "repo": repository.repo.as_str(), "commit": repository.commit, "name": plan.name,
        "files": files, "quantization": plan.quantization, "reason": plan.reason,
        "license": repository.license, "license_link": repository.license_link,
        "bytes": plan.bytes, "there_bytes": plan.there_bytes, "free_bytes": plan.free.0,
        "fit": fit.map(Fit::verdict), "problem": plan.facts.problem,
        "already_installed": plan.installed,
        "installed": installed.map(|model| super::list::model_json(store, model, false)),
    })
}

/// Progress on standard error; standard output belongs to the result.
struct Shown {
    bar: Mutex<ProgressBar>,
}

impl Shown {
    fn new(bytes: Option<u64>) -> Shown {
        let bar = if io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(bytes, ProgressDrawTarget::stderr());
            let template =
                "{msg:>12} {wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(500));
            bar
        } else {
            ProgressBar::hidden()
        };
        Shown { bar: Mutex::new(bar) }
    }

    fn bar(&self) -> std::sync::MutexGuard<'_, ProgressBar> {
        self.bar.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn say(&self, text: &str) {
        self.bar().suspend(|| eprintln!("{text}"));
    }

    fn finish(&self) {
        self.bar().finish_and_clear();
    }
}

impl Observer for Shown {
    fn begin(&self, _: &str, _: Option<u64>, there: u64) {
        self.bar().set_message(if there > 0 { "checking" } else { "loading" });
    }

    fn passed(&self, bytes: u64) {
        self.bar().inc(bytes);
    }

    fn loading(&self) {
        let bar = self.bar();
        bar.set_message("loading");
        // The rate is the network's, not the disk's.
        bar.reset_eta();
    }

    fn restarted(&self, file: &str, lost: u64) {
        self.bar().dec(lost);
        self.say(&format!("what was here of {file} is of no use; it is loaded anew"));
    }

    fn waiting(&self, error: &StoreError, wait: Duration) {
        self.say(&format!("{error}; trying again in {:.1} s", wait.as_secs_f64()));
    }

    fn done(&self, _: &str) {}
}
