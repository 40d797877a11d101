//! Rounding of activations to Q8_0 and Q8_K, with the bits of the scalar reference.

#![allow(clippy::wildcard_imports, reason = "intrinsics")]

use std::arch::aarch64::*;
use std::arch::asm;

use crate::activations::{Q8KRow, Q8Row};

/// ggml's Q8_0 and Q8_1: levels by the F32 scale, halves away from zero, the scale kept as a half.
///
/// # Safety
/// The processor has NEON; the parts of `row` fit `x`.
#[target_feature(enable = "neon")]
pub(super) unsafe fn quantize_q8_0(x: &[f32], row: Q8Row<'_>) {
    let levels = row.levels.as_chunks_mut::<32>().0;
    for (b, (x, levels)) in x.as_chunks::<32>().0.iter().zip(levels).enumerate() {
        let x = load(x);
        let mut largest = vdupq_n_f32(0.0);
        for x in x {
            largest = vmaxnmq_f32(largest, vabsq_f32(x));
        }
        let d = vmaxnmvq_f32(largest) / 127.0;
        let inverse = vdupq_n_f32(if d == 0.0 { 0.0 } else { 1.0 / d });
        let whole = x.map(|x| vcvtaq_s32_f32(vmulq_f32(x, inverse)));
        let [first, second] = narrow(whole);
        // SAFETY: 32 levels.
        unsafe {
            vst1q_s8(levels.as_mut_ptr(), first);
            vst1q_s8(levels.as_mut_ptr().add(16), second);
        }
        let sum = i32::from(vaddlvq_s8(first)) + i32::from(vaddlvq_s8(second));
        row.scales[b] = round_to_half(d);
        row.sums[b] = sum;
        row.scaled_sums[b] = round_to_half(d * sum as f32);
    }
}

/// ggml's Q8_K: the value of largest magnitude becomes -127, halves to even.
///
/// # Safety
/// The processor has NEON; the parts of `row` fit `x`.
#[target_feature(enable = "neon")]
pub(super) unsafe fn quantize_q8_k(x: &[f32], row: Q8KRow<'_>) {
    let levels = row.levels.as_chunks_mut::<256>().0;
    let sums = row.group_sums.as_chunks_mut::<16>().0;
    for (b, (x, levels)) in x.as_chunks::<256>().0.iter().zip(levels).enumerate() {
        let extreme = extreme(x);
        let inverse = if extreme == 0.0 { 0.0 } else { -127.0 / extreme };
        let chunks = x.as_chunks::<32>().0.iter().zip(levels.as_chunks_mut::<32>().0);
        for (c, (x, levels)) in chunks.enumerate() {
            let (factor, bound) = (vdupq_n_f32(inverse), vdupq_n_f32(127.0));
            // The bound wins over NaN, as `f32::min` has it.
            let whole = load(x)
                .map(|x| vcvtq_s32_f32(vminnmq_f32(vrndnq_f32(vmulq_f32(x, factor)), bound)));
            let [first, second] = narrow(whole);
            // SAFETY: 32 levels.
            unsafe {
                vst1q_s8(levels.as_mut_ptr(), first);
                vst1q_s8(levels.as_mut_ptr().add(16), second);
            }
            sums[b][2 * c] = vaddlvq_s8(first);
            sums[b][2 * c + 1] = vaddlvq_s8(second);
        }
        row.scales[b] = if inverse == 0.0 { 0.0 } else { 1.0 / inverse };
    }
}

/// The value of largest magnitude, the first of equals; NaN is none.
#[inline]
#[target_feature(enable = "neon")]
fn extreme(x: &[f32; 256]) -> f32 {
    let (mut high, mut low) = (vdupq_n_f32(0.0), vdupq_n_f32(0.0));
    for x in x.as_chunks::<32>().0 {
        for x in load(x) {
            high = vmaxnmq_f32(high, x);
            low = vminnmq_f32(low, x);
        }
    }
    let (high, low) = (vmaxnmvq_f32(high), vminnmvq_f32(low));
    if high > -low {
        high
    } else if high < -low {
        low
    } else {
        x.iter().copied().find(|x| x.abs() == high).unwrap_or(0.0)
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn load(x: &[f32; 32]) -> [float32x4_t; 8] {
    let mut registers = [vdupq_n_f32(0.0); 8];
    for (register, x) in registers.iter_mut().zip(x.as_chunks::<4>().0) {
        // SAFETY: four values.
        *register = unsafe { vld1q_f32(x.as_ptr()) };
    }
    registers
}

/// Saturates 32 integers to 8 bits.
#[inline]
#[target_feature(enable = "neon")]
fn narrow(x: [int32x4_t; 8]) -> [int8x16_t; 2] {
    let pair = |a, b| vqmovn_high_s32(vqmovn_s32(a), b);
    let first = vqmovn_high_s16(vqmovn_s16(pair(x[0], x[1])), pair(x[2], x[3]));
    let second = vqmovn_high_s16(vqmovn_s16(pair(x[4], x[5])), pair(x[6], x[7]));
    [first, second]
}

/// To the nearest half, and back. In assembly to stay clear of the `fp16` types; both belong to the base set.
#[inline]
fn round_to_half(x: f32) -> f32 {
    let rounded: f32;
    // SAFETY: registers only.
    unsafe {
        asm!("fcvt {y:h}, {x:s}", "fcvt {y:s}, {y:h}", x = in(vreg) x, y = lateout(vreg) rounded,
             options(pure, nomem, nostack, preserves_flags));
    }
    rounded
}
