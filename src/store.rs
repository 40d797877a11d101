//! The models of this machine: the folder they live in, downloads, and whether one will fit.

mod catalogue;
mod choice;
mod config;
mod download;
mod error;
mod facts;
mod fit;
mod hub;
mod index;
mod join;
mod machine;
mod pull;
mod reference;

pub use catalogue::{catalogue, find};
pub use choice::RemoteFile;
pub use config::Config;
pub use download::Observer;
pub use error::StoreError;
pub use facts::{Facts, header_digest};
pub use fit::{
    CONTEXT_MIN, DECODE_SHARE, Fit, Instead, Machine, PI_5_GIB, Rates, Speed, Wish, context_in, fit,
};
pub use hub::{Access, Hub, Repository, Retry, Token};
pub use index::{Installed, Kind, Origin, Store, Unfinished};
pub use machine::{DiskRecord, MachineRecord};
pub use pull::{PullPlan, PullRequest};
pub use reference::{Reference, Repo, is_name};
