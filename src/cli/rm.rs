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
    let name = model.as_ref().map_or(args.name, |model| model.name.clone());
    let bytes = match &model {
        Some(model) => Some(model.bytes),
        None => store.unfinished()?.iter().find(|part| part.name == name).map(|part| part.bytes),
    };
    if let Some(model) = &model
        && let Some(configured) = config.model.path.as_deref()
        && super::list::is_of(&store, model, configured)
    {
        eprintln!("note: the configuration starts {name} (model.path)");
    }
    // What is not there needs no question.
    if let Some(bytes) = bytes
        && !args.yes
        && !super::pull::confirm(&format!("Delete {name} ({})?", Bytes(bytes)))?
    {
        return Ok(ExitCode::FAILURE);
    }
    let freed = store.remove(&name)?;
    println!("deleted {name}, {} freed", Bytes(freed));
    Ok(ExitCode::SUCCESS)
}
