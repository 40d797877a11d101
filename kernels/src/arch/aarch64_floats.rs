//! F32, F16 and BF16 weights against F32 activations.
//!
//! Four rows against one or two tokens; each pair keeps two registers of sums (columns 0–3 and 4–7 of each
//! eight), whatever the number of tokens, so prefill and decode give the same bits.
//!
//! # Safety of every function
//! As in `aarch64_blocks32`.

#![allow(clippy::wildcard_imports, reason = "intrinsics")]

use std::arch::aarch64::*;

use super::aarch64_blocks32::quad;
use super::aarch64_dot::widen_halves;
use crate::table::Piece;

/// A number of a weight matrix.
trait Number: Copy {
    unsafe fn load(from: *const Self) -> float32x4_t;
    fn to_f32(self) -> f32;
}

/// The bits of a number.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct F16(u16);

/// The bits of a number.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Bf16(u16);

impl Number for f32 {
    #[inline(always)]
    unsafe fn load(from: *const f32) -> float32x4_t {
        // SAFETY: the contract of this file: four values.
        unsafe { vld1q_f32(from) }
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl Number for F16 {
    #[inline(always)]
    unsafe fn load(from: *const F16) -> float32x4_t {
        // SAFETY: the contract of this file: four values.
        unsafe { widen_halves(vld1_u16(from.cast())) }
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        half::f16::from_bits(self.0).to_f32_const()
    }
}

impl Number for Bf16 {
    #[inline(always)]
    unsafe fn load(from: *const Bf16) -> float32x4_t {
        // SAFETY: the contract of this file: four values.
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(from.cast()))) }
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
}

/// # Safety
/// The processor has NEON; the piece holds F32 weights.
#[target_feature(enable = "neon")]
pub(super) unsafe fn product_f32(piece: &Piece<'_>) {
    // SAFETY: the contract of this function.
    unsafe { product::<f32>(piece) }
}

/// # Safety
/// The processor has NEON; the piece holds F16 weights.
#[target_feature(enable = "neon")]
pub(super) unsafe fn product_f16(piece: &Piece<'_>) {
    // SAFETY: the contract of this function.
    unsafe { product::<F16>(piece) }
}

/// # Safety
/// The processor has NEON; the piece holds BF16 weights.
#[target_feature(enable = "neon")]
pub(super) unsafe fn product_bf16(piece: &Piece<'_>) {
    // SAFETY: the contract of this function.
    unsafe { product::<Bf16>(piece) }
}

#[inline(always)]
unsafe fn product<N: Number>(piece: &Piece<'_>) {
    for first in (0..piece.rows).step_by(4) {
        let rows = quad::<N>(piece, first);
        let len = 4.min(piece.rows - first);
        let mut token = 0;
        // SAFETY: the contract of this file; two tokens end within the tokens.
        unsafe {
            while token + 2 <= piece.tokens() {
                tile::<N, 2>(piece, rows, first, len, token);
                token += 2;
            }
            if token < piece.tokens() {
                tile::<N, 1>(piece, rows, first, len, token);
            }
        }
    }
}

#[inline(always)]
unsafe fn tile<N: Number, const T: usize>(
    piece: &Piece<'_>,
    rows: [*const N; 4],
    first: usize,
    len: usize,
    token: usize,
) {
    let x: [&[f32]; T] = std::array::from_fn(|t| piece.x.values_of(token + t));
    let cols = piece.x.cols();
    let whole = cols / 8 * 8;
    // SAFETY: the contract of this file: rows and tokens have `cols` values.
    unsafe {
        let mut acc = [[[vdupq_n_f32(0.0); 2]; T]; 4];
        for i in (0..whole).step_by(8) {
            for (row, acc) in rows.iter().zip(&mut acc) {
                let w = [N::load(row.add(i)), N::load(row.add(i + 4))];
                for (x, acc) in x.iter().zip(acc) {
                    let x = x.as_ptr().add(i);
                    acc[0] = vfmaq_f32(acc[0], w[0], vld1q_f32(x));
                    acc[1] = vfmaq_f32(acc[1], w[1], vld1q_f32(x.add(4)));
                }
            }
        }
        for (r, acc) in acc.iter().enumerate().take(len) {
            for (t, acc) in acc.iter().enumerate() {
                let mut sum = vaddvq_f32(vaddq_f32(acc[0], acc[1]));
                for (i, x) in x[t].iter().enumerate().skip(whole) {
                    sum += (*rows[r].add(i)).to_f32() * x;
                }
                piece.out.set(token + t, first + r, sum);
            }
        }
    }
}
