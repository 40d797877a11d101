//! Blocks and the arithmetic over them.

mod format;

pub use format::{ActivationForm, Format, Precision};
