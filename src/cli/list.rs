//! `scoutd list`: the models of the store.

use std::path::Path;
use std::process::ExitCode;

use serde_json::{Value as Json, json};

use super::options::SourceOptions;
use crate::daemon;
use crate::store::{Installed, Kind, Store, Unfinished};
use crate::units::Bytes;

/// Options of `scoutd list`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Print everything as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sources: SourceOptions,
}

/// Prints models and unfinished downloads.
pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let config = args.sources.load()?;
    let store = daemon::open_store(&config)?;
    let models = store.list()?;
    let unfinished = store.unfinished()?;
    let configured = config.model.path.as_deref();
    let in_use = |model: &Installed| configured.is_some_and(|path| is_of(&store, model, path));
    if args.json {
        let list: Vec<Json> =
            models.iter().map(|model| model_json(&store, model, in_use(model))).collect();
        let parts: Vec<Json> = unfinished
            .iter()
            .map(|it| {
                json!({"name": it.name, "reference": it.reference, "bytes": it.bytes,
                    "of_bytes": it.of_bytes})
            })
            .collect();
        let folder = store.dir().display().to_string();
        println!("{:#}", json!({"folder": folder, "models": list, "unfinished": parts}));
        return Ok(ExitCode::SUCCESS);
    }
    if models.is_empty() {
        println!("no models in {}; `scoutd pull` loads one", store.dir().display());
    } else {
        table(&models, in_use);
    }
    unfinished.iter().for_each(|it| println!("{}", unfinished_line(it)));
    Ok(ExitCode::SUCCESS)
}

/// Whether the configured model, a name or a path, is this one.
pub(super) fn is_of(store: &Store, model: &Installed, configured: &Path) -> bool {
    let path = store.path(model);
    let same_file = || Some(configured.canonicalize().ok()? == path.canonicalize().ok()?);
    configured.as_os_str() == model.name.as_str() || same_file() == Some(true)
}

fn table(models: &[Installed], in_use: impl Fn(&Installed) -> bool) {
    let width = models.iter().map(|model| model.name.len()).max().unwrap_or(0).max(4);
    println!(
        "{:<width$}  {:>10}  {:<8} {:<10} {:>7}  {:<10}  note",
        "name", "size", "type", "arch", "context", "changed"
    );
    for model in models {
        let facts = &model.facts;
        let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".to_owned());
        let kind = match model.kind {
            Kind::Gguf => text(&facts.quantization),
            Kind::Checkpoint => "safetens.".to_owned(),
        };
        let context = facts.context_tokens.map_or_else(|| "-".to_owned(), |it| it.to_string());
        let mut notes = Vec::new();
        if in_use(model) {
            notes.push("configured".to_owned());
        }
        notes.extend(facts.problem.iter().map(|problem| format!("cannot run: {problem}")));
        println!(
            "{:<width$}  {:>10}  {kind:<8} {:<10} {context:>7}  {:<10}  {}",
            model.name,
            Bytes(model.bytes).to_string(),
            text(&facts.architecture),
            date(model.modified.0),
            notes.join("; ")
        );
    }
}

fn unfinished_line(it: &Unfinished) -> String {
    let of = it.of_bytes.map_or_else(String::new, |bytes| format!(" of {}", Bytes(bytes)));
    let how = match &it.reference {
        Some(reference) => format!("`scoutd pull {reference}` goes on"),
        None => format!("`scoutd rm {}` removes it", it.name),
    };
    format!("unfinished: {}, {}{of}; {how}", it.name, Bytes(it.bytes))
}

/// A model under the names that `--json` of `list` and `pull` share.
pub(super) fn model_json(store: &Store, model: &Installed, in_use: bool) -> Json {
    let facts = &model.facts;
    json!({
        "name": model.name, "kind": model.kind, "path": store.path(model).display().to_string(),
        "bytes": model.bytes, "changed": time(model.modified.0), "configured": in_use,
        "architecture": facts.architecture, "quantization": facts.quantization,
        "parameters": facts.parameters, "context_tokens": facts.context_tokens,
        "header_sha256": facts.digest, "problem": facts.problem, "origin": model.origin,
    })
}

fn time(unix_s: i64) -> Option<String> {
    jiff::Timestamp::from_second(unix_s).ok().map(|time| time.to_string())
}

fn date(unix_s: i64) -> String {
    time(unix_s).and_then(|time| time.get(..10).map(str::to_owned)).unwrap_or_default()
}
