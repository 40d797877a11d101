//! The kernels, one file (or family of files) for each instruction set, and which table belongs to which set.

use crate::isa::Isa;
use crate::table::Table;

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "aarch64")]
mod aarch64_blocks256;
#[cfg(target_arch = "aarch64")]
mod aarch64_blocks32;
#[cfg(target_arch = "aarch64")]
mod aarch64_dot;
#[cfg(target_arch = "aarch64")]
mod aarch64_floats;
#[cfg(target_arch = "aarch64")]
mod aarch64_quantize;
#[cfg(target_arch = "aarch64")]
mod aarch64_vector;
pub(crate) mod attention_lanes;
pub(crate) mod attention_scalar;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx2_floats;
#[cfg(target_arch = "x86_64")]
mod avx2_k;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_floats;
#[cfg(target_arch = "x86_64")]
mod avx512_k;
mod lanes;
#[cfg(target_arch = "x86_64")]
mod rows;
pub(crate) mod scalar;
pub(crate) mod vector;
mod vector_lanes;
mod vector_scalar;
#[cfg(target_arch = "x86_64")]
mod x86_64_vector;

/// The table of a set. It may be used only where the set is available.
pub(crate) fn table(isa: Isa) -> &'static Table {
    match isa {
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => &NEON,
        #[cfg(target_arch = "aarch64")]
        Isa::NeonDotprod => &NEON_DOTPROD,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => &AVX2,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni => &AVX512,
        _ => &SCALAR,
    }
}

/// The vector operations of a set. They may be used only where the set is available.
pub(crate) fn vector_table(isa: Isa) -> &'static vector::VectorTable {
    match isa {
        #[cfg(target_arch = "aarch64")]
        Isa::Neon | Isa::NeonDotprod => &aarch64_vector::NEON,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => &x86_64_vector::AVX2,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni => &x86_64_vector::AVX512,
        _ => &vector::SCALAR,
    }
}

static SCALAR: Table = scalar::TABLE;
#[cfg(target_arch = "aarch64")]
static NEON: Table = aarch64::install_neon(SCALAR);
#[cfg(target_arch = "aarch64")]
static NEON_DOTPROD: Table = aarch64::install_dotprod(NEON);
#[cfg(target_arch = "x86_64")]
static AVX2: Table = avx2::install(SCALAR);
#[cfg(target_arch = "x86_64")]
static AVX512: Table = avx512::install(AVX2);
