//! The models of this machine: the folder they live in, downloads, and whether one will fit.

mod catalogue;
mod fit;
mod machine;

pub use catalogue::{catalogue, find};
pub use fit::{
    CONTEXT_MIN, DECODE_SHARE, Fit, Instead, Machine, PI_5_GIB, Rates, Speed, Wish, context_in, fit,
};
pub use machine::{DiskRecord, MachineRecord};
