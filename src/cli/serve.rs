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
    /// Only check the configuration and the model file, then exit
    #[arg(long)]
    check: bool,
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let config = args.options.load()?;
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
