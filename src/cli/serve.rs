//! `scoutd serve`: the daemon.

use std::process::ExitCode;

use clap::Args as ClapArgs;

use super::options::ConfigOptions;
use crate::daemon;

/// What `serve` takes.
#[derive(ClapArgs, Debug)]
pub(super) struct Args {
    #[command(flatten)]
    options: ConfigOptions,
    /// Address for HTTP instead of the configured ones, as `127.0.0.1:8080` (repeatable)
    #[arg(long, value_name = "ADDRESS")]
    listen: Vec<String>,
    /// Longest context of one request in tokens [default: the model's own, but at most 8192]
    #[arg(long, value_name = "TOKENS")]
    context: Option<u32>,
    /// Start although the model does not fit. What has no room is read from disk again for every token: answers
    /// take minutes, and other programs lose the page cache and may stall
    #[arg(long)]
    force: bool,
    /// Only check the configuration and the model file, then exit
    #[arg(long)]
    check: bool,
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut config = args.options.load()?;
    if !args.listen.is_empty() {
        config.rest.listen = args.listen;
    }
    if let Some(tokens) = args.context {
        config.model.context_tokens = tokens;
    }
    config.model.force |= args.force;
    if args.check {
        daemon::check(&config)?;
        println!("configuration and model are valid");
        return Ok(ExitCode::SUCCESS);
    }
    daemon::serve(config, |lines| {
        for line in lines {
            println!("{line}");
        }
    })?;
    Ok(ExitCode::SUCCESS)
}
