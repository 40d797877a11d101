//! Every module's configuration in one typed tree.
//!
//! Sources, each overriding the one before: built-in defaults, the file, drop-ins beside it
//! (`scoutd.toml.d/*.toml` in name order), environment variables `SCOUTD_SECTION__KEY`, and `--set section.key=value`.
//! Unknown keys are refused with the choices. Each module gets its own part and never imports this one.

mod load;

pub use load::{ConfigError, Named, Sources};

use std::path::PathBuf;

use serde::Deserialize;

/// The whole configuration, with every default filled in.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// What is written to the journal or the terminal.
    pub log: LogConfig,
    /// Which model, and how it is run.
    pub model: ModelConfig,
}

/// What is written to the journal or the terminal.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// `error`, `warn`, `info`, `debug`, `trace`, or per module as in `info,rest=debug`.
    pub level: String,
}

impl Default for LogConfig {
    fn default() -> LogConfig {
        LogConfig { level: "info".to_owned() }
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

impl Config {
    /// Reads all sources.
    ///
    /// # Errors
    /// Every fault found, not only the first, each naming its source.
    pub fn load(sources: &Sources) -> Result<Config, Vec<ConfigError>> {
        load::load(sources)
    }
}

#[cfg(test)]
mod tests;
