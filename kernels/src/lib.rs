//! Blocks of quantized weights and the arithmetic over them.
//!
//! | File | Holds |
//! | --- | --- |
//! | `format` | the weight formats, and which form activations take to meet them |
//! | `isa` | the instruction sets, and the only questions to the processor |
//! | `blocks` | blocks as they lie in a file, checked casts from bytes |
//! | `quantize` | rounding to every format and reading back, bit exact |
//! | `matrix`, `activations` | the two sides of a product |
//! | `table` | [`Kernels`]: a table of functions; [`matmul`] cuts a product into pieces and calls it |
//! | `vector`, `attention` | norms, rotation, gating, softmax, conversion; attention over pages |
//! | `team` | the threads |
//! | `arch` | the kernels: `scalar` is the reference, the others overwrite its entries |
//!
//! **A new instruction set**, or a better kernel for one: write `arch/<set>.rs` with
//! `pub(crate) const fn install(table: Table) -> Table`, which overwrites the entries it has; give the set a `static`
//! table in `arch.rs` (`install` of the next lower set's table) and a line in `arch::table`. An entry is an
//! `unsafe fn` with `#[target_feature]`, whose features must be among those that [`Isa::is_available`] asks for; its
//! helpers are safe `#[target_feature]` functions. `tests/conformance.rs` compares every entry of every available set
//! with the scalar one.
//!
//! **A product entry** gets a piece (`table::Piece`): some rows of one matrix against all tokens. It reads weight
//! rows by `Piece::row`, activations by `Activations::levels_of` and its like, and writes `Piece::out`. With one token
//! (decode) it should read several rows at a time, with many (prefill) unpack weights once for a tile of tokens.
//!
//! **A new vector operation**: the algorithm in `arch/vector_lanes.rs` over the trait `Lanes`, its reference in
//! `arch/vector_scalar.rs`, a line in each list of `arch/vector.rs`, and a safe method of [`Vector`] that asserts
//! lengths.

mod activations;
mod arch;
mod attention;
pub mod blocks;
mod format;
mod isa;
mod matrix;
pub mod quantize;
mod table;
mod team;
pub mod vector;

pub use activations::Activations;
pub use attention::{Attention, KvPages};
pub use format::{ActivationForm, Format, Precision};
pub use isa::{Isa, UnknownIsa};
pub use matrix::{Matrix, MatrixError};
pub use table::{Kernels, matmul, matmul_many};
pub use team::Team;
pub use vector::Vector;
