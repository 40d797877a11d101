//! Wiring: from a configuration to a running process, and down again.
//!
//! [`Assembly`] is what answers: model, engine, ledger, router. [`serve`] puts the doors in front of it, tells the
//! service manager, and drains when asked to stop. Nothing below this module reads the environment.

mod assembly;
mod built_in;
mod facts;
mod fitting;
mod log;
mod models;
mod notify;
mod pool;
mod serve;

pub use assembly::{Assembly, OpenModel, check, open_model, threads};
pub use facts::{machine_name, machine_record, state_folder};
pub use fitting::context;
pub use models::{find_model, open_hub, open_store};
pub use serve::serve;

use std::path::PathBuf;

/// Why the daemon did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The configuration contradicts itself.
    #[error("{0}")]
    Config(String),
    /// A door could not be opened.
    #[error("{door} at {address}: {source}")]
    Door {
        /// `http` or `mqtt`.
        door: &'static str,
        /// What it should listen on or connect to.
        address: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// Memory cannot be watched.
    #[error("memory cannot be sampled: {0}")]
    Memory(std::io::Error),
    /// The model cannot be used.
    #[error("model {path}: {message}")]
    Model {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what would work.
        message: String,
    },
    /// The model does not fit into what may be promised.
    #[error("model {path}: {plan}")]
    NoHeadroom {
        /// The file.
        path: PathBuf,
        /// What is missing, and what would fit; several lines.
        plan: String,
    },
    /// A thread, a runtime or a signal handler could not be had.
    #[error("{0}")]
    System(String),
}
