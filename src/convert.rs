//! Checkpoints to GGUF, and quantization.
//!
//! A conversion is planned completely before a byte is written: [`config`] reads the shape of the
//! model, [`mapping`] says which tensor comes from where, [`recipe`] which format it gets, and
//! [`pieces`] cuts the work so that memory stays bounded whatever the model's size. [`run`] then
//! carries the plan out on several threads, keeps a journal to resume from, reads the file back and
//! renames it into place. [`verify`] says afterwards whether the file still answers as its source.

pub mod checkpoint;
pub mod config;
mod error;
pub mod input;
mod journal;
pub mod mapping;
mod pieces;
mod plan;
pub mod recipe;
mod report;
mod run;
pub mod safetensors;
pub mod verify;
mod vocabulary;

pub use error::ConvertError;
pub use plan::{Plan, Planned, plan};
pub use recipe::{Base, Override, Recipe};
pub use report::{Report, TensorReport};
pub use run::{Observer, Options, Part, Silent, convert};

/// Alignment of tensors in the files we write: whole flash pages and, on kernels with 16 KiB pages,
/// whole pages of the mapping, so that an expert is read in few direct reads.
pub use crate::gguf::ALIGNMENT_OURS;

#[cfg(test)]
mod tests;
