//! Every module's configuration in one typed tree.
//!
//! Sources, each overriding the one before: built-in defaults, the file, drop-ins beside it
//! (`scoutd.toml.d/*.toml` in name order), environment variables `SCOUTD_SECTION__KEY`, and `--set section.key=value`.
//! Unknown keys are refused with the choices. Each module gets its own part and never imports this one.

mod load;

pub use load::{ConfigError, Named, Sources};

use std::path::PathBuf;

use serde::Deserialize;

use crate::{engine, memory, model, mqtt, peer, residency, rest, store};

/// The whole configuration, with every default filled in.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// What is written to the journal or the terminal.
    pub log: LogConfig,
    /// Starting, stopping, and what holds for every door.
    pub daemon: DaemonConfig,
    /// Which model, and how it is run.
    pub model: ModelConfig,
    /// Where models lie and where they come from.
    pub store: store::Config,
    /// How memory is watched.
    pub memory: memory::Config,
    /// How a model that is larger than memory is kept.
    pub residency: residency::Config,
    /// How many requests at once, and what they may cost.
    pub engine: engine::Config,
    /// The HTTP door.
    pub rest: rest::Config,
    /// The MQTT door.
    pub mqtt: mqtt::Config,
    /// The pool: other machines that answer together with this one.
    pub fusion: peer::Config,
}

/// Starting, stopping, and what holds for every door.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DaemonConfig {
    /// Seconds that running answers get to finish when the daemon is told to stop.
    pub drain_s: u64,
    /// Seconds a request may take over HTTP if it does not say.
    pub deadline_s: u64,
}

impl Default for DaemonConfig {
    fn default() -> DaemonConfig {
        DaemonConfig { drain_s: 20, deadline_s: 600 }
    }
}

/// What is written to the journal or the terminal.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// `error`, `warn`, `info`, `debug`, `trace`, and per module as in `info,rest=debug`. The libraries below the doors
    /// are kept at `warn` by the default.
    pub level: String,
}

impl Default for LogConfig {
    fn default() -> LogConfig {
        LogConfig { level: "info,mqtt5=warn,actix_server=warn".to_owned() }
    }
}

/// Which model, and how it is run.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelConfig {
    /// The GGUF file; absent is the built-in scout-nano.
    pub path: Option<PathBuf>,
    /// The name clients use; absent is the file's name without `.gguf`.
    pub name: Option<String>,
    /// Threads that compute; 0 chooses.
    pub threads: usize,
    /// Instruction set to use instead of the best one: `scalar`, `neon`, `neon-dotprod`, `avx2`, `avx512-vnni`.
    pub isa: Option<String>,
    /// `int8` quantizes activations as the formats are made for; `exact` computes in F32, for comparisons.
    pub precision: Precision,
    /// How keys and values are kept: `f16` or `f32`.
    pub kv: KvType,
    /// Longest context of one request; 0 is the model's own, but at most 8192.
    pub context_tokens: u32,
    /// Start although the model does not fit: what has no room is read from disk again for every token.
    pub force: bool,
}

/// How activations meet quantized weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// F32 activations.
    Exact,
    /// Activations of 8 bits.
    #[default]
    Int8,
}

/// How keys and values are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvType {
    /// Two bytes a value.
    #[default]
    F16,
    /// Four bytes a value.
    F32,
}

impl From<Precision> for scoutd_kernels::Precision {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::Exact => Self::Exact,
            Precision::Int8 => Self::Int8,
        }
    }
}

impl From<KvType> for model::KvType {
    fn from(kv: KvType) -> Self {
        match kv {
            KvType::F16 => Self::F16,
            KvType::F32 => Self::F32,
        }
    }
}

impl Config {
    /// Reads all sources.
    ///
    /// # Errors
    /// Every fault found, not only the first, each naming its source.
    pub fn load(sources: &Sources) -> Result<Config, Vec<ConfigError>> {
        load::load(sources)
    }

    /// Everything wrong with the values themselves; empty is right.
    pub fn check(&self) -> Vec<String> {
        let mut errors = self.memory.check();
        errors.extend(self.residency.check());
        errors.extend(self.store.check());
        errors.extend(self.engine.check());
        errors.extend(self.fusion.check());
        errors
    }
}

#[cfg(test)]
mod tests;
