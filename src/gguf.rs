//! GGUF v2 and v3: a total parser that borrows from the file, the mapping of a file, and a writer.
//!
//! Files come from strangers. Every length, count, offset and type is checked before it is used, every
//! failure is a [`GgufError`] that names the key or tensor, and what the parser allocates is bounded by
//! the size of the file, whatever its header claims.

mod error;
mod mapping;
mod metadata;
mod parse;
mod write;

pub use error::GgufError;
pub use mapping::Mapping;
pub use metadata::{Array, Metadata, Scalars, Strings, Value, ValueType};
pub use parse::{Gguf, TensorInfo};
pub use write::{GgufHeader, GgufWriter};

#[cfg(test)]
mod tests;

/// Alignment of a file that does not say its own.
pub const ALIGNMENT_DEFAULT: u64 = 32;

/// Alignment of the files we write: pages of 16 KiB, as Raspberry Pi OS has them on a Pi 5.
pub const ALIGNMENT_OURS: u32 = 16384;
