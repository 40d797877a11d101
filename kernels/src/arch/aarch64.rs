//! The products of aarch64: `install_neon` fills a table for every processor, `install_dotprod` overwrites the
//! integer products for those with `sdot` (Cortex-A76, the Raspberry Pi 5).
//!
//! | File | Holds |
//! | --- | --- |
//! | `aarch64_dot` | integer sums of products, the one difference between the two sets |
//! | `aarch64_blocks32` | Q4_0, Q4_1, Q8_0 |
//! | `aarch64_blocks256` | Q4_K, Q5_K, Q6_K |
//! | `aarch64_floats` | F32, F16, BF16 |
//! | `aarch64_quantize` | rounding of activations |
//!
//! Four rows are read at a time, in lanes in the end, so that scales, conversion and the final multiply-add serve
//! four results at once.

use super::aarch64_dot::{Dotprod, Widening};
use super::{aarch64_blocks32, aarch64_blocks256, aarch64_floats, aarch64_quantize};
use crate::format::Format;
use crate::table::{Piece, Table};

/// Overwrites every entry: NEON has kernels for all.
pub(crate) const fn install_neon(mut table: Table) -> Table {
    table.products[Format::F32.index()] = aarch64_floats::product_f32;
    table.products[Format::F16.index()] = aarch64_floats::product_f16;
    table.products[Format::Bf16.index()] = aarch64_floats::product_bf16;
    table.products[Format::Q4_0.index()] = product_q4_0_neon;
    table.products[Format::Q4_1.index()] = product_q4_1_neon;
    table.products[Format::Q8_0.index()] = product_q8_0_neon;
    table.products[Format::Q4K.index()] = product_q4_k_neon;
    table.products[Format::Q5K.index()] = product_q5_k_neon;
    table.products[Format::Q6K.index()] = product_q6_k_neon;
    table.quantize_q8_0 = aarch64_quantize::quantize_q8_0;
    table.quantize_q8_k = aarch64_quantize::quantize_q8_k;
    table
}

/// Overwrites the integer products.
pub(crate) const fn install_dotprod(mut table: Table) -> Table {
    table.products[Format::Q4_0.index()] = product_q4_0_dotprod;
    table.products[Format::Q4_1.index()] = product_q4_1_dotprod;
    table.products[Format::Q8_0.index()] = product_q8_0_dotprod;
    table.products[Format::Q4K.index()] = product_q4_k_dotprod;
    table.products[Format::Q5K.index()] = product_q5_k_dotprod;
    table.products[Format::Q6K.index()] = product_q6_k_dotprod;
    table
}

/// The outermost functions: each enables the features and inlines the body for one set.
macro_rules! products {
    ($features:literal, $dot:ty: $($name:ident = $from:ident::$body:ident;)*) => {
        $(
            /// # Safety
            /// The processor has the features, and the piece holds weights of the format.
            #[target_feature(enable = $features)]
            unsafe fn $name(piece: &Piece<'_>) {
                // SAFETY: the contract of this function.
                unsafe { $from::$body::<$dot>(piece) }
            }
        )*
    };
}

products! { "neon", Widening:
    product_q4_0_neon = aarch64_blocks32::q4_0;
    product_q4_1_neon = aarch64_blocks32::q4_1;
    product_q8_0_neon = aarch64_blocks32::q8_0;
    product_q4_k_neon = aarch64_blocks256::q4_k;
    product_q5_k_neon = aarch64_blocks256::q5_k;
    product_q6_k_neon = aarch64_blocks256::q6_k;
}

products! { "neon,dotprod", Dotprod:
    product_q4_0_dotprod = aarch64_blocks32::q4_0;
    product_q4_1_dotprod = aarch64_blocks32::q4_1;
    product_q8_0_dotprod = aarch64_blocks32::q8_0;
    product_q4_k_dotprod = aarch64_blocks256::q4_k;
    product_q5_k_dotprod = aarch64_blocks256::q5_k;
    product_q6_k_dotprod = aarch64_blocks256::q6_k;
}
