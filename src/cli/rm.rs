//! `scoutd rm`: deletes a model of the store.

use std::process::ExitCode;

use super::options::SourceOptions;
use crate::daemon;
use crate::units::Bytes;

/// Options of `scoutd rm`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// A model's name, as `scoutd list` shows it; an unfinished download's too
    name: String,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
    #[command(flatten)]
    sources: SourceOptions,
}

/// Asks, then deletes.
pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let config = args.sources.load()?;
    let store = daemon::open_store(&config)?;
    let model = store.find(&args.name)?;
    if let Some(model) = &model {
        let configured = config.model.path.as_deref();
        if configured.is_some_and(|path| super::list::is_of(&store, model, path)) {
            eprintln!("note: the configuration starts {} (model.path)", model.name);
        }
        if !args.yes {
            let question = format!("Delete {} ({})?", model.name, Bytes(model.bytes));
            if !super::pull::confirm(&question)? {
                return Ok(ExitCode::FAILURE);
            }
        }
    }
    let name = model.map_or(args.name, |model| model.name);
    let freed = store.remove(&name)?;
    println!("deleted {name}, {} freed", Bytes(freed));
    Ok(ExitCode::SUCCESS)
}
