//! Options that several subcommands share: where the configuration comes from, and shortcuts into it.

use std::path::PathBuf;

use anyhow::bail;
use clap::Args;

use crate::config::{Config, Named, Sources};
use crate::daemon;

/// The usual place of the configuration file.
const DEFAULT_FILE: &str = "/etc/scoutd/scoutd.toml";

/// Where the configuration comes from. Later ones win: file, drop-ins, environment, flags.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct SourceOptions {
    /// Configuration file [default: /etc/scoutd/scoutd.toml if it is there]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Set any configuration value, as in `--set engine.slots=2` (repeatable)
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    settings: Vec<String>,
}

/// The configuration, and shortcuts for what is changed most.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct ConfigOptions {
    #[command(flatten)]
    sources: SourceOptions,
    /// GGUF model file, or a model's name in the store [default: the built-in scout-nano]
    #[arg(long, short, value_name = "FILE|NAME")]
    model: Option<PathBuf>,
    /// Threads that compute [default: chosen for this machine]
    #[arg(long, short, value_name = "COUNT")]
    threads: Option<usize>,
}

impl SourceOptions {
    /// The configuration that the files, the environment and these options add up to.
    ///
    /// # Errors
    /// All faults of all sources in one message.
    pub(super) fn load(&self) -> anyhow::Result<Config> {
        let file = match &self.config {
            Some(file) => (file.clone(), Named::Explicitly),
            None => (PathBuf::from(DEFAULT_FILE), Named::ByDefault),
        };
        let environment = std::env::vars()
            .filter(|(name, _)| name.starts_with("SCOUTD_") && name.contains("__"))
            .collect();
        let sources = Sources { file: Some(file), environment, settings: self.settings.clone() };
        Config::load(&sources).or_else(|errors| {
            let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
            bail!(super::Usage(lines.join("\n")));
        })
    }
}

impl ConfigOptions {
    /// As [`SourceOptions::load`], with the model found.
    ///
    /// # Errors
    /// Faults of the sources, or a model that is neither a file nor in the store.
    pub(super) fn load(&self) -> anyhow::Result<Config> {
        let mut config = self.sources.load()?;
        if let Some(model) = &self.model {
            config.model.path = Some(model.clone());
        }
        if let Some(model) = &config.model.path {
            config.model.path = Some(daemon::find_model(&config, model)?);
        }
        if let Some(threads) = self.threads {
            config.model.threads = threads;
        }
        Ok(config)
    }
}
