//! The kernels, one file (or family of files) for each instruction set, and which table belongs to which set.

use crate::isa::Isa;
use crate::table::Table;

pub(crate) mod scalar;

/// The table of a set. It may be used only where the set is available.
pub(crate) fn table(isa: Isa) -> &'static Table {
    match isa {
        Isa::Scalar | Isa::Neon | Isa::NeonDotprod | Isa::Avx2 | Isa::Avx512Vnni => &SCALAR,
    }
}

static SCALAR: Table = scalar::TABLE;
