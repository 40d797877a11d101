//! Sums of products of 8-bit integers, with and without the `dotprod` extension: the one difference between
//! the two aarch64 sets, so that each product is written once over this trait.
//!
//! All is `#[inline(always)]` and ends in the body of an outer function that carries `#[target_feature]`.

#![allow(clippy::wildcard_imports, reason = "intrinsics")]

use std::arch::aarch64::*;
use std::arch::asm;

/// Four rows of 16 levels, interleaved: register j holds values 4j..4j+4 of row 0, of row 1, of row 2, of row 3.
pub(super) type Rows16 = [int8x16_t; 4];

/// What bounds the levels of weights: 4, 5, 6 bits stand for 0..2^BITS, 8 for -128..=127. It matters where
/// products are summed in 16 bits first.
pub(super) trait Weights {
    const BITS: u32;
}

/// Products of weights `w` and activations `x`, which lie in -127..=127.
///
/// # Safety of every method
/// The processor has the implementation's features.
pub(super) trait IntDot {
    /// `acc + w . x` over 16 values, spread over the lanes in any way.
    unsafe fn dot16(acc: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t;
    /// `w . x` over 32 values, spread over the lanes in any way.
    unsafe fn dot32<W: Weights>(w: [int8x16_t; 2], x: [int8x16_t; 2]) -> int32x4_t;
    /// `w[r] . x` over 16 values in lane r.
    unsafe fn tile16<W: Weights>(w: &Rows16, x: int8x16_t) -> int32x4_t;
    /// `w[r] . x` over 32 values in lane r.
    unsafe fn tile32<W: Weights>(w: &[Rows16; 2], x: [int8x16_t; 2]) -> int32x4_t;
}

/// ARMv8.2 `sdot`: four products into each 32-bit lane.
pub(super) struct Dotprod;

/// `acc[i] += a[4i..4i+4] . b[4i..4i+4]`. In assembly because `vdotq_s32` is unstable in Rust 1.95
/// (`stdarch_neon_dotprod`).
#[inline(always)]
unsafe fn sdot(mut acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: registers only; the caller's features.
    unsafe {
        asm!("sdot {acc:v}.4s, {a:v}.16b, {b:v}.16b",
             acc = inout(vreg) acc, a = in(vreg) a, b = in(vreg) b,
             options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

/// `acc[i] += a[4i..4i+4] . b[4J..4J+4]`
#[inline(always)]
unsafe fn sdot_lane<const J: i32>(mut acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: registers only; the caller's features.
    unsafe {
        asm!("sdot {acc:v}.4s, {a:v}.16b, {b:v}.4b[{j}]",
             acc = inout(vreg) acc, a = in(vreg) a, b = in(vreg) b, j = const J,
             options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

#[inline(always)]
unsafe fn sdot_rows(acc: int32x4_t, w: &Rows16, x: int8x16_t) -> int32x4_t {
    // SAFETY: the contract of the trait.
    unsafe {
        let acc = sdot_lane::<0>(acc, w[0], x);
        let acc = sdot_lane::<1>(acc, w[1], x);
        let acc = sdot_lane::<2>(acc, w[2], x);
        sdot_lane::<3>(acc, w[3], x)
    }
}

impl IntDot for Dotprod {
    #[inline(always)]
    unsafe fn dot16(acc: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
        // SAFETY: the contract of the trait.
        unsafe { sdot(acc, w, x) }
    }

    #[inline(always)]
    unsafe fn dot32<W: Weights>(w: [int8x16_t; 2], x: [int8x16_t; 2]) -> int32x4_t {
        // SAFETY: the contract of the trait.
        unsafe { sdot(sdot(vdupq_n_s32(0), w[0], x[0]), w[1], x[1]) }
    }

    #[inline(always)]
    unsafe fn tile16<W: Weights>(w: &Rows16, x: int8x16_t) -> int32x4_t {
        // SAFETY: the contract of the trait.
        unsafe { sdot_rows(vdupq_n_s32(0), w, x) }
    }

    #[inline(always)]
    unsafe fn tile32<W: Weights>(w: &[Rows16; 2], x: [int8x16_t; 2]) -> int32x4_t {
        // SAFETY: the contract of the trait.
        unsafe { sdot_rows(sdot_rows(vdupq_n_s32(0), &w[0], x[0]), &w[1], x[1]) }
    }
}

/// Base NEON: products in 16 bits, of which as many are added as fit before they are widened.
///
/// A product is at most `2^BITS * 127` (BITS 8: 128 * 127). So a 16-bit lane takes two products of 8-bit
/// weights (2 * 16,256), four of 6 bits (4 * 63 * 127 = 32,004), eight of 5 or 4 bits (8 * 31 * 127 = 31,496).
pub(super) struct Widening;

/// Sums of the products with x in 16-bit lanes: of rows 0 and 1, of rows 2 and 3.
type Halves = (int16x8_t, int16x8_t);

/// Register J of four rows against values 4J..4J+4 of x.
#[inline(always)]
unsafe fn widening_step<const J: i32>(sums: Option<Halves>, w: int8x16_t, x: int8x16_t) -> Halves {
    // SAFETY: the contract of the trait.
    unsafe {
        let x = vreinterpretq_s8_s32(vdupq_laneq_s32::<J>(vreinterpretq_s32_s8(x)));
        let (wl, xl) = (vget_low_s8(w), vget_low_s8(x));
        match sums {
            None => (vmull_s8(wl, xl), vmull_high_s8(w, x)),
            Some((low, high)) => (vmlal_s8(low, wl, xl), vmlal_high_s8(high, w, x)),
        }
    }
}

/// Lane r = the sum that belongs to row r.
#[inline(always)]
unsafe fn widen((low, high): Halves) -> int32x4_t {
    // SAFETY: the contract of the trait.
    unsafe { vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)) }
}

#[inline(always)]
unsafe fn widening_rows(sums: Option<Halves>, w: &Rows16, x: int8x16_t) -> Halves {
    // SAFETY: the contract of the trait.
    unsafe {
        let sums = widening_step::<0>(sums, w[0], x);
        let sums = widening_step::<1>(Some(sums), w[1], x);
        let sums = widening_step::<2>(Some(sums), w[2], x);
        widening_step::<3>(Some(sums), w[3], x)
    }
}

impl IntDot for Widening {
    #[inline(always)]
    unsafe fn dot16(acc: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
        // SAFETY: the contract of the trait.
        unsafe {
            let products = vmull_s8(vget_low_s8(w), vget_low_s8(x));
            vpadalq_s16(acc, vmlal_high_s8(products, w, x))
        }
    }

    #[inline(always)]
    unsafe fn dot32<W: Weights>(w: [int8x16_t; 2], x: [int8x16_t; 2]) -> int32x4_t {
        // SAFETY: the contract of the trait.
        unsafe {
            let products = vmull_s8(vget_low_s8(w[0]), vget_low_s8(x[0]));
            let products = vmlal_high_s8(products, w[0], x[0]);
            if W::BITS > 6 {
                return Self::dot16(vpaddlq_s16(products), w[1], x[1]);
            }
            let products = vmlal_s8(products, vget_low_s8(w[1]), vget_low_s8(x[1]));
            vpaddlq_s16(vmlal_high_s8(products, w[1], x[1]))
        }
    }

    #[inline(always)]
    unsafe fn tile16<W: Weights>(w: &Rows16, x: int8x16_t) -> int32x4_t {
        // SAFETY: the contract of the trait.
        unsafe {
            if W::BITS <= 6 {
                return widen(widening_rows(None, w, x));
            }
            let first = widening_step::<0>(None, w[0], x);
            let first = widening_step::<1>(Some(first), w[1], x);
            let second = widening_step::<2>(None, w[2], x);
            let second = widening_step::<3>(Some(second), w[3], x);
            vpaddq_s32(
                vpadalq_s16(vpaddlq_s16(first.0), second.0),
                vpadalq_s16(vpaddlq_s16(first.1), second.1),
            )
        }
    }

    #[inline(always)]
    unsafe fn tile32<W: Weights>(w: &[Rows16; 2], x: [int8x16_t; 2]) -> int32x4_t {
        // SAFETY: the contract of the trait.
        unsafe {
            if W::BITS <= 5 {
                let sums = widening_rows(None, &w[0], x[0]);
                return widen(widening_rows(Some(sums), &w[1], x[1]));
            }
            vaddq_s32(Self::tile16::<W>(&w[0], x[0]), Self::tile16::<W>(&w[1], x[1]))
        }
    }
}

/// `unrolled!(T, |t| body)`: the body for t in 0..T, T at most 8, each t a constant, so that arrays it indexes stay
/// in registers. (LLVM leaves a loop of this size rolled, and the sums in memory.)
macro_rules! unrolled {
    ($count:expr, |$t:ident| $body:expr) => {
        unrolled!(@ $count, $t, $body, 0 1 2 3 4 5 6 7)
    };
    (@ $count:expr, $t:ident, $body:expr, $($at:literal)*) => {
        $(
            if $at < $count {
                let $t: usize = $at;
                $body
            }
        )*
    };
}
pub(super) use unrolled;

/// Interleaves 16 bytes of four rows, four bytes at a time.
#[inline(always)]
pub(super) unsafe fn interleave(rows: [uint8x16_t; 4]) -> [uint8x16_t; 4] {
    // SAFETY: NEON belongs to every aarch64 processor.
    unsafe {
        let [a, b, c, d] = rows.map(|row| vreinterpretq_u32_u8(row));
        let (ab02, ab13) = (vtrn1q_u32(a, b), vtrn2q_u32(a, b));
        let (cd02, cd13) = (vtrn1q_u32(c, d), vtrn2q_u32(c, d));
        let (ab02, ab13) = (vreinterpretq_u64_u32(ab02), vreinterpretq_u64_u32(ab13));
        let (cd02, cd13) = (vreinterpretq_u64_u32(cd02), vreinterpretq_u64_u32(cd13));
        [
            vreinterpretq_u8_u64(vtrn1q_u64(ab02, cd02)),
            vreinterpretq_u8_u64(vtrn1q_u64(ab13, cd13)),
            vreinterpretq_u8_u64(vtrn2q_u64(ab02, cd02)),
            vreinterpretq_u8_u64(vtrn2q_u64(ab13, cd13)),
        ]
    }
}

/// Lane i = the sum of the lanes of `rows[i]`.
#[inline(always)]
pub(super) unsafe fn sums_of_rows(rows: [int32x4_t; 4]) -> int32x4_t {
    // SAFETY: NEON belongs to every aarch64 processor.
    unsafe { vpaddq_s32(vpaddq_s32(rows[0], rows[1]), vpaddq_s32(rows[2], rows[3])) }
}

/// The halves at four places, as F32.
///
/// # Safety
/// The pointers are valid.
#[inline(always)]
pub(super) unsafe fn load_halves(at: [*const u16; 4]) -> float32x4_t {
    // SAFETY: the caller's promise; `fcvtl` belongs to the base instruction set and touches registers only.
    unsafe {
        let halves = vld1_lane_u16::<0>(at[0], vdup_n_u16(0));
        let halves = vld1_lane_u16::<1>(at[1], halves);
        let halves = vld1_lane_u16::<2>(at[2], halves);
        let halves = vld1_lane_u16::<3>(at[3], halves);
        widen_halves(halves)
    }
}

/// Four halves as F32. In assembly to stay clear of the `fp16` types.
#[inline(always)]
pub(super) unsafe fn widen_halves(halves: uint16x4_t) -> float32x4_t {
    // SAFETY: registers only, and an instruction of the base set.
    unsafe {
        let wide: float32x4_t;
        asm!("fcvtl {wide:v}.4s, {halves:v}.4h", wide = lateout(vreg) wide, halves = in(vreg) halves,
             options(pure, nomem, nostack, preserves_flags));
        wide
    }
}
