//! Q4_0, Q4_1 and Q8_0 weights against Q8_0 activations.
//!
//! ```text
//! decode, 4 rows:   for each block: dots = sums of 4 x (w . x); acc = acc + (d d_x) * dots     lane = row
//! prefill, 4 rows x T tokens:
//!     for each block: unpack and interleave 4 rows once (8 registers)
//!         for each token: dots = 8 sdot by element, no horizontal sum; acc[t] = acc[t] + (d d_x[t]) * dots
//! ```
//! The offset of Q4_0 is taken off in decode as 8 times the sum of the activations, so nibbles stay as they are; in
//! prefill when they are unpacked, once for all tokens. Blocks are added in order with one rounding each: every form
//! gives the bits of the scalar reference.
//!
//! # Safety of every function
//! The processor has the features of `D`, and the body is inlined into a function that enables them; the piece
//! keeps the promises of `table::Piece`, its format being `F`.

#![allow(clippy::wildcard_imports, reason = "intrinsics")]

use std::arch::aarch64::*;

use super::aarch64_dot::{
    IntDot, Rows16, Weights, interleave, load_halves, sums_of_rows, unrolled,
};
use crate::activations::Activations;
use crate::blocks::{BlockQ4_0, BlockQ4_1, BlockQ8_0};
use crate::table::Piece;

/// A format of blocks of 32.
trait Blocks32: Weights {
    type Block;
    /// Taken off every level that `unpack` gives; `unpack_rows` gives levels without it.
    const OFFSET: i32;
    /// Whether a block has a minimum `m`.
    const HAS_MIN: bool;
    unsafe fn unpack(block: *const Self::Block) -> [int8x16_t; 2];
    unsafe fn unpack_rows(blocks: [*const Self::Block; 4]) -> [Rows16; 2];
    unsafe fn d(blocks: [*const Self::Block; 4]) -> float32x4_t;
    unsafe fn m(blocks: [*const Self::Block; 4]) -> float32x4_t;
}

#[inline(always)]
unsafe fn low_nibbles(bytes: uint8x16_t) -> int8x16_t {
    // SAFETY: the contract of this file.
    unsafe { vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15))) }
}

#[inline(always)]
unsafe fn high_nibbles(bytes: uint8x16_t) -> int8x16_t {
    // SAFETY: the contract of this file.
    unsafe { vreinterpretq_s8_u8(vshrq_n_u8::<4>(bytes)) }
}

#[inline(always)]
unsafe fn nibbles(qs: *const u8) -> [int8x16_t; 2] {
    // SAFETY: the contract of this file: 16 bytes.
    unsafe {
        let bytes = vld1q_u8(qs);
        [low_nibbles(bytes), high_nibbles(bytes)]
    }
}

#[inline(always)]
unsafe fn nibbles_of_rows(qs: [*const u8; 4]) -> [Rows16; 2] {
    // SAFETY: the contract of this file: 16 bytes each.
    unsafe {
        let bytes = interleave(qs.map(|qs| vld1q_u8(qs)));
        [bytes.map(|bytes| low_nibbles(bytes)), bytes.map(|bytes| high_nibbles(bytes))]
    }
}

struct Q4_0;

impl Weights for Q4_0 {
    const BITS: u32 = 4;
}

impl Blocks32 for Q4_0 {
    type Block = BlockQ4_0;
    const OFFSET: i32 = 8;
    const HAS_MIN: bool = false;
    #[inline(always)]
    unsafe fn unpack(block: *const BlockQ4_0) -> [int8x16_t; 2] {
        // SAFETY: the contract of this file.
        unsafe { nibbles((&raw const (*block).qs).cast()) }
    }
    #[inline(always)]
    unsafe fn unpack_rows(blocks: [*const BlockQ4_0; 4]) -> [Rows16; 2] {
        // SAFETY: the contract of this file.
        unsafe {
            let rows = nibbles_of_rows(blocks.map(|block| (&raw const (*block).qs).cast()));
            rows.map(|rows| rows.map(|levels| vsubq_s8(levels, vdupq_n_s8(8))))
        }
    }
    #[inline(always)]
    unsafe fn d(blocks: [*const BlockQ4_0; 4]) -> float32x4_t {
        // SAFETY: the contract of this file.
        unsafe { load_halves(blocks.map(|block| &raw const (*block).d)) }
    }
    #[inline(always)]
    unsafe fn m(_: [*const BlockQ4_0; 4]) -> float32x4_t {
        // SAFETY: the contract of this file.
        unsafe { vdupq_n_f32(0.0) }
    }
}

struct Q4_1;

impl Weights for Q4_1 {
    const BITS: u32 = 4;
}

impl Blocks32 for Q4_1 {
    type Block = BlockQ4_1;
    const OFFSET: i32 = 0;
    const HAS_MIN: bool = true;
    #[inline(always)]
    unsafe fn unpack(block: *const BlockQ4_1) -> [int8x16_t; 2] {
        // SAFETY: the contract of this file.
        unsafe { nibbles((&raw const (*block).qs).cast()) }
    }
    #[inline(always)]
    unsafe fn unpack_rows(blocks: [*const BlockQ4_1; 4]) -> [Rows16; 2] {
        // SAFETY: the contract of this file.
        unsafe { nibbles_of_rows(blocks.map(|block| (&raw const (*block).qs).cast())) }
    }
    #[inline(always)]
    unsafe fn d(blocks: [*const BlockQ4_1; 4]) -> float32x4_t {
        // SAFETY: the contract of this file.
        unsafe { load_halves(blocks.map(|block| &raw const (*block).d)) }
    }
    #[inline(always)]
    unsafe fn m(blocks: [*const BlockQ4_1; 4]) -> float32x4_t {
        // SAFETY: the contract of this file.
        unsafe { load_halves(blocks.map(|block| &raw const (*block).m)) }
    }
}

struct Q8_0;

impl Weights for Q8_0 {
    const BITS: u32 = 8;
}

impl Blocks32 for Q8_0 {
    type Block = BlockQ8_0;
    const OFFSET: i32 = 0;
    const HAS_MIN: bool = false;
    #[inline(always)]
    unsafe fn unpack(block: *const BlockQ8_0) -> [int8x16_t; 2] {
        // SAFETY: the contract of this file: 32 levels.
        unsafe {
            let levels: *const i8 = (&raw const (*block).qs).cast();
            [vld1q_s8(levels), vld1q_s8(levels.add(16))]
        }
    }
    #[inline(always)]
    unsafe fn unpack_rows(blocks: [*const BlockQ8_0; 4]) -> [Rows16; 2] {
        // SAFETY: the contract of this file: 32 levels each.
        unsafe {
            let levels = blocks.map(|block| (&raw const (*block).qs).cast::<u8>());
            let first = interleave(levels.map(|levels| vld1q_u8(levels)));
            let second = interleave(levels.map(|levels| vld1q_u8(levels.add(16))));
            [first, second].map(|rows| rows.map(|bytes| vreinterpretq_s8_u8(bytes)))
        }
    }
    #[inline(always)]
    unsafe fn d(blocks: [*const BlockQ8_0; 4]) -> float32x4_t {
        // SAFETY: the contract of this file.
        unsafe { load_halves(blocks.map(|block| &raw const (*block).d)) }
    }
    #[inline(always)]
    unsafe fn m(_: [*const BlockQ8_0; 4]) -> float32x4_t {
        // SAFETY: the contract of this file.
        unsafe { vdupq_n_f32(0.0) }
    }
}

#[inline(always)]
pub(super) unsafe fn q4_0<D: IntDot>(piece: &Piece<'_>) {
    // SAFETY: the contract of this file.
    unsafe { product::<D, Q4_0>(piece) }
}

#[inline(always)]
pub(super) unsafe fn q4_1<D: IntDot>(piece: &Piece<'_>) {
    // SAFETY: the contract of this file.
    unsafe { product::<D, Q4_1>(piece) }
}

#[inline(always)]
pub(super) unsafe fn q8_0<D: IntDot>(piece: &Piece<'_>) {
    // SAFETY: the contract of this file.
    unsafe { product::<D, Q8_0>(piece) }
}

#[inline(always)]
unsafe fn product<D: IntDot, F: Blocks32>(piece: &Piece<'_>) {
    for first in (0..piece.rows).step_by(4) {
        let rows = quad(piece, first);
        let len = 4.min(piece.rows - first);
        let mut token = 0;
        // SAFETY: the contract of this file; a tile ends within the tokens.
        unsafe {
            while token + 8 <= piece.tokens() {
                tile::<D, F, 8>(piece, rows, token).store(piece, token, first, len);
                token += 8;
            }
            if token + 4 <= piece.tokens() {
                tile::<D, F, 4>(piece, rows, token).store(piece, token, first, len);
                token += 4;
            }
            if token + 2 <= piece.tokens() {
                tile::<D, F, 2>(piece, rows, token).store(piece, token, first, len);
                token += 2;
            }
            if token < piece.tokens() {
                one_token::<D, F>(piece, rows, token).store(piece, token, first, len);
            }
        }
    }
}

/// Four rows from `first`; behind the last row of the piece comes that row again.
#[inline(always)]
pub(super) fn quad<B>(piece: &Piece<'_>, first: usize) -> [*const B; 4] {
    [0, 1, 2, 3].map(|i| piece.row((first + i).min(piece.rows - 1)).as_ptr().cast())
}

/// Results of T tokens, lane = row.
pub(super) struct Tile<const T: usize>(pub(super) [float32x4_t; T]);

impl<const T: usize> Tile<T> {
    /// Writes the first `len` lanes of each token to rows `row..`.
    #[inline(always)]
    pub(super) unsafe fn store(self, piece: &Piece<'_>, token: usize, row: usize, len: usize) {
        for (t, lanes) in self.0.into_iter().enumerate() {
            // SAFETY: `at` checks that `len` places are ours.
            unsafe {
                let to = piece.out.at(token + t, row, len);
                match len {
                    4 => vst1q_f32(to, lanes),
                    3 => {
                        vst1_f32(to, vget_low_f32(lanes));
                        vst1q_lane_f32::<2>(to.add(2), lanes);
                    }
                    2 => vst1_f32(to, vget_low_f32(lanes)),
                    _ => vst1q_lane_f32::<0>(to, lanes),
                }
            }
        }
    }
}

/// The activations of a tile's tokens: rows of equal length, one entry a block.
struct Tokens {
    blocks: usize,
    levels: *const i8,
    scales: *const f32,
    sums: *const i32,
    scaled_sums: *const f32,
}

impl Tokens {
    /// From the token `first` on.
    #[inline(always)]
    fn new(x: &Activations, first: usize) -> Tokens {
        let blocks = x.cols() / 32;
        Tokens {
            blocks,
            levels: x.levels[first * x.cols()..].as_ptr(),
            scales: x.scales[first * blocks..].as_ptr(),
            sums: x.sums[first * blocks..].as_ptr(),
            scaled_sums: x.scaled_sums[first * blocks..].as_ptr(),
        }
    }

    #[inline(always)]
    unsafe fn levels(&self, t: usize, b: usize) -> [int8x16_t; 2] {
        // SAFETY: the contract of this file: the token has this block.
        unsafe {
            let levels = self.levels.add(32 * (t * self.blocks + b));
            [vld1q_s8(levels), vld1q_s8(levels.add(16))]
        }
    }

    /// `dots - OFFSET Σx`
    #[inline(always)]
    unsafe fn without_offset<F: Blocks32>(&self, b: usize, dots: int32x4_t) -> int32x4_t {
        if F::OFFSET == 0 {
            return dots;
        }
        // SAFETY: the contract of this file: the first token has this block.
        unsafe { vmlsq_s32(dots, vld1q_dup_s32(self.sums.add(b)), vdupq_n_s32(F::OFFSET)) }
    }

    /// `acc + (d d_x) dots [+ m s_x]`
    #[inline(always)]
    unsafe fn add<F: Blocks32>(
        &self,
        (t, b): (usize, usize),
        acc: float32x4_t,
        dots: int32x4_t,
        d: float32x4_t,
        m: float32x4_t,
    ) -> float32x4_t {
        let at = t * self.blocks + b;
        // SAFETY: the contract of this file: the token has this block.
        unsafe {
            let d = vmulq_f32(d, vld1q_dup_f32(self.scales.add(at)));
            let acc = vfmaq_f32(acc, d, vcvtq_f32_s32(dots));
            if F::HAS_MIN {
                vfmaq_f32(acc, m, vld1q_dup_f32(self.scaled_sums.add(at)))
            } else {
                acc
            }
        }
    }
}

#[inline(always)]
unsafe fn one_token<D: IntDot, F: Blocks32>(
    piece: &Piece<'_>,
    rows: [*const F::Block; 4],
    token: usize,
) -> Tile<1> {
    let x = Tokens::new(piece.x, token);
    // SAFETY: the contract of this file: rows and token have `cols / 32` blocks.
    unsafe {
        let mut acc = vdupq_n_f32(0.0);
        for b in 0..x.blocks {
            let blocks = rows.map(|row| row.add(b));
            let levels = x.levels(0, b);
            let dots = sums_of_rows([
                D::dot32::<F>(F::unpack(blocks[0]), levels),
                D::dot32::<F>(F::unpack(blocks[1]), levels),
                D::dot32::<F>(F::unpack(blocks[2]), levels),
                D::dot32::<F>(F::unpack(blocks[3]), levels),
            ]);
            let dots = x.without_offset::<F>(b, dots);
            acc = x.add::<F>((0, b), acc, dots, F::d(blocks), F::m(blocks));
        }
        Tile([acc])
    }
}

#[inline(always)]
unsafe fn tile<D: IntDot, F: Blocks32, const T: usize>(
    piece: &Piece<'_>,
    rows: [*const F::Block; 4],
    token: usize,
) -> Tile<T> {
    let x = Tokens::new(piece.x, token);
    // SAFETY: the contract of this file: rows and tokens have `cols / 32` blocks.
    unsafe {
        let mut acc = [vdupq_n_f32(0.0); T];
        for b in 0..x.blocks {
            let blocks = rows.map(|row| row.add(b));
            let weights = F::unpack_rows(blocks);
            let (d, m) = (F::d(blocks), F::m(blocks));
            unrolled!(T, |t| {
                let dots = D::tile32::<F>(&weights, x.levels(t, b));
                acc[t] = x.add::<F>((t, b), acc[t], dots, d, m);
            });
        }
        Tile(acc)
    }
}
