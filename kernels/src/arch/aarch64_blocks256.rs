//! Q4_K, Q5_K and Q6_K weights against Q8_K activations.
//!
//! ```text
//! decode, 4 rows:   for each block and row: w . x of four groups into the four lanes of a register (three pairwise
//!                   additions), times their scales in one multiply-add, which is slow on 32-bit lanes; minima . group
//!                   sums; then lanes are summed for the 4 rows at once, and lane r belongs to row r
//! prefill, 4 rows x T tokens:
//!     for each block: unpack and interleave 4 rows once into a panel (1 KiB)
//!         for each group: for each token: isum[t] += scale[4 rows] * (8 sdot by element)
//!         for each token: acc[t] = acc[t] + (d d_x) * isum[t] - (dmin d_x) * (minima . group sums)
//! ```
//! All integers are exact: |isum| ≤ 256 * 63 * 127 * 63 (Q5_K: levels 31) and 256 * 128 * 95 * 127 (Q6_K) fit
//! in 32 bits. Blocks are added in order with the roundings of the scalar reference, so the bits are the same.
//!
//! # Safety of every function
//! As in `aarch64_blocks32`.

#![allow(clippy::wildcard_imports, reason = "intrinsics")]
#![allow(clippy::needless_range_loop, reason = "panels are read and written by index throughout")]

use std::arch::aarch64::*;

use super::aarch64_blocks32::{Tile, quad};
use super::aarch64_dot::{
    IntDot, Rows16, Weights, interleave, load_halves, sums_of_rows, unrolled,
};
use crate::activations::Activations;
use crate::blocks::{BlockQ4K, BlockQ5K, BlockQ6K, unpack_scales};
use crate::table::Piece;

/// 32 values of four rows, for each of the eight parts of a block.
type Panel = [[Rows16; 2]; 8];

/// A format of blocks of 256.
trait Blocks256: Weights {
    type Block;
    /// What is the same for the four rows of a tile during one block.
    type Scales;
    /// `(Σ scale (w . x), what is taken off it by the second factor)`, both to be summed over their lanes.
    unsafe fn dot<D: IntDot>(block: *const Self::Block, x: &Block) -> (int32x4_t, int32x4_t);
    unsafe fn unpack_rows(blocks: [*const Self::Block; 4], panel: &mut Panel);
    unsafe fn scales(blocks: [*const Self::Block; 4]) -> Self::Scales;
    /// `isum + scale * (w . x)` for part `b`, lane = row.
    unsafe fn add_part<D: IntDot>(
        isum: int32x4_t,
        scales: &Self::Scales,
        b: usize,
        w: &[Rows16; 2],
        x: &Block,
    ) -> int32x4_t;
    /// What is taken off by the second factor, lane = row.
    unsafe fn offsets(scales: &Self::Scales, x: &Block) -> int32x4_t;
    unsafe fn d(blocks: [*const Self::Block; 4]) -> float32x4_t;
    /// Adds the block's sums to the result.
    unsafe fn add(
        acc: float32x4_t,
        blocks: [*const Self::Block; 4],
        d: float32x4_t,
        scale: float32x4_t,
        sums: int32x4_t,
        offsets: int32x4_t,
    ) -> float32x4_t;
}

/// One block of a token's activations.
struct Block {
    levels: *const i8,
    group_sums: *const i16,
    scale: *const f32,
}

impl Block {
    #[inline(always)]
    unsafe fn levels(&self, at: usize) -> int8x16_t {
        // SAFETY: the contract of this file: at + 16 <= 256.
        unsafe { vld1q_s8(self.levels.add(at)) }
    }

    /// Of each 32 values; at most 32 * 127 in size.
    #[inline(always)]
    unsafe fn sums_of_32(&self) -> int16x8_t {
        // SAFETY: the contract of this file: 16 sums.
        unsafe { vpaddq_s16(vld1q_s16(self.group_sums), vld1q_s16(self.group_sums.add(8))) }
    }
}

/// The activations of a tile's tokens: rows of equal length.
struct Tokens {
    blocks: usize,
    levels: *const i8,
    group_sums: *const i16,
    scales: *const f32,
}

impl Tokens {
    /// From the token `first` on.
    #[inline(always)]
    fn new(x: &Activations, first: usize) -> Tokens {
        let blocks = x.cols() / 256;
        Tokens {
            blocks,
            levels: x.levels[first * x.cols()..].as_ptr(),
            group_sums: x.group_sums[16 * first * blocks..].as_ptr(),
            scales: x.scales[first * blocks..].as_ptr(),
        }
    }

    #[inline(always)]
    unsafe fn block(&self, t: usize, b: usize) -> Block {
        let at = t * self.blocks + b;
        // SAFETY: the contract of this file: the token has this block.
        unsafe {
            Block {
                levels: self.levels.add(256 * at),
                group_sums: self.group_sums.add(16 * at),
                scale: self.scales.add(at),
            }
        }
    }
}

#[inline(always)]
pub(super) unsafe fn q4_k<D: IntDot>(piece: &Piece<'_>) {
    // SAFETY: the contract of this file.
    unsafe { product::<D, Q4K>(piece) }
}

#[inline(always)]
pub(super) unsafe fn q5_k<D: IntDot>(piece: &Piece<'_>) {
    // SAFETY: the contract of this file.
    unsafe { product::<D, Q5K>(piece) }
}

#[inline(always)]
pub(super) unsafe fn q6_k<D: IntDot>(piece: &Piece<'_>) {
    // SAFETY: the contract of this file.
    unsafe { product::<D, Q6K>(piece) }
}

#[inline(always)]
unsafe fn product<D: IntDot, F: Blocks256>(piece: &Piece<'_>) {
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

#[inline(always)]
unsafe fn one_token<D: IntDot, F: Blocks256>(
    piece: &Piece<'_>,
    rows: [*const F::Block; 4],
    token: usize,
) -> Tile<1> {
    let x = Tokens::new(piece.x, token);
    // SAFETY: the contract of this file: rows and token have `cols / 256` blocks.
    unsafe {
        let mut acc = vdupq_n_f32(0.0);
        for b in 0..x.blocks {
            let blocks = rows.map(|row| row.add(b));
            let x = x.block(0, b);
            let (s0, o0) = F::dot::<D>(blocks[0], &x);
            let (s1, o1) = F::dot::<D>(blocks[1], &x);
            let (s2, o2) = F::dot::<D>(blocks[2], &x);
            let (s3, o3) = F::dot::<D>(blocks[3], &x);
            let sums = sums_of_rows([s0, s1, s2, s3]);
            let offsets = sums_of_rows([o0, o1, o2, o3]);
            acc = F::add(acc, blocks, F::d(blocks), vld1q_dup_f32(x.scale), sums, offsets);
        }
        Tile([acc])
    }
}

#[inline(always)]
unsafe fn tile<D: IntDot, F: Blocks256, const T: usize>(
    piece: &Piece<'_>,
    rows: [*const F::Block; 4],
    token: usize,
) -> Tile<T> {
    let x = Tokens::new(piece.x, token);
    // SAFETY: the contract of this file: rows and tokens have `cols / 256` blocks.
    unsafe {
        let mut acc = [vdupq_n_f32(0.0); T];
        let mut panel: Panel = [[[vdupq_n_s8(0); 4]; 2]; 8];
        for b in 0..x.blocks {
            let blocks = rows.map(|row| row.add(b));
            F::unpack_rows(blocks, &mut panel);
            let scales = F::scales(blocks);
            let mut isums = [vdupq_n_s32(0); T];
            for (part, w) in panel.iter().enumerate() {
                unrolled!(T, |t| {
                    isums[t] = F::add_part::<D>(isums[t], &scales, part, w, &x.block(t, b));
                });
            }
            let d = F::d(blocks);
            unrolled!(T, |t| {
                let x = x.block(t, b);
                let offsets = F::offsets(&scales, &x);
                acc[t] = F::add(acc[t], blocks, d, vld1q_dup_f32(x.scale), isums[t], offsets);
            });
        }
        Tile(acc)
    }
}

/// Scales and minima of four rows.
struct WithMin {
    scales: [[i32; 4]; 8],
    minima: [[i16; 4]; 8],
}

impl WithMin {
    #[inline(always)]
    fn new(rows: [&[u8; 12]; 4]) -> WithMin {
        let mut all = WithMin { scales: [[0; 4]; 8], minima: [[0; 4]; 8] };
        for (r, row) in rows.into_iter().enumerate() {
            let (scales, minima) = unpack_scales(row);
            for b in 0..8 {
                all.scales[b][r] = i32::from(scales[b]);
                all.minima[b][r] = i16::from(minima[b]);
            }
        }
        all
    }

    #[inline(always)]
    unsafe fn offsets(&self, x: &Block) -> int32x4_t {
        // SAFETY: the contract of this file.
        unsafe {
            let sums = x.sums_of_32();
            let m = |b: usize| vld1_s16(self.minima[b].as_ptr());
            let acc = vmull_laneq_s16::<0>(m(0), sums);
            let acc = vmlal_laneq_s16::<1>(acc, m(1), sums);
            let acc = vmlal_laneq_s16::<2>(acc, m(2), sums);
            let acc = vmlal_laneq_s16::<3>(acc, m(3), sums);
            let acc = vmlal_laneq_s16::<4>(acc, m(4), sums);
            let acc = vmlal_laneq_s16::<5>(acc, m(5), sums);
            let acc = vmlal_laneq_s16::<6>(acc, m(6), sums);
            vmlal_laneq_s16::<7>(acc, m(7), sums)
        }
    }

    #[inline(always)]
    unsafe fn add_part<D: IntDot, W: Weights>(
        &self,
        isum: int32x4_t,
        b: usize,
        w: &[Rows16; 2],
        x: &Block,
    ) -> int32x4_t {
        // SAFETY: the contract of this file; b < 8.
        unsafe {
            let dots = D::tile32::<W>(w, [x.levels(32 * b), x.levels(32 * b + 16)]);
            vmlaq_s32(isum, dots, vld1q_s32(self.scales[b].as_ptr()))
        }
    }
}

/// `Σ sc (w . x)` over the eight parts that `part` unpacks, and `Σ m Σx`, spread over lanes.
#[inline(always)]
unsafe fn dot_with_min<D: IntDot, W: Weights>(
    scales: &[u8; 12],
    x: &Block,
    pair: impl Fn(usize) -> [[int8x16_t; 2]; 2],
) -> (int32x4_t, int32x4_t) {
    // SAFETY: the contract of this file.
    unsafe {
        let (scales, minima) = unpack_scales(scales);
        let scales = vmovl_u8(vcreate_u8(u64::from_le_bytes(scales)));
        let minima = vreinterpretq_s16_u16(vmovl_u8(vcreate_u8(u64::from_le_bytes(minima))));
        let low = vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(scales)));
        let high = vreinterpretq_s32_u32(vmovl_high_u16(scales));
        let sums = x.sums_of_32();
        let offsets = vmull_s16(vget_low_s16(minima), vget_low_s16(sums));
        let offsets = vmlal_high_s16(offsets, minima, sums);
        let dot = |w: [int8x16_t; 2], b: usize| {
            D::dot32::<W>(w, [x.levels(32 * b), x.levels(32 * b + 16)])
        };
        let [w0, w1] = pair(0);
        let [w2, w3] = pair(1);
        let first = sums_of_rows([dot(w0, 0), dot(w1, 1), dot(w2, 2), dot(w3, 3)]);
        let [w4, w5] = pair(2);
        let [w6, w7] = pair(3);
        let second = sums_of_rows([dot(w4, 4), dot(w5, 5), dot(w6, 6), dot(w7, 7)]);
        let acc = vmlaq_s32(vmulq_s32(first, low), second, high);
        (acc, offsets)
    }
}

/// `acc + (d d_x) sums - (dmin d_x) offsets`
#[inline(always)]
unsafe fn add_with_min(
    acc: float32x4_t,
    d: float32x4_t,
    dmin: float32x4_t,
    scale: float32x4_t,
    sums: int32x4_t,
    offsets: int32x4_t,
) -> float32x4_t {
    // SAFETY: the contract of this file.
    unsafe {
        let acc = vfmaq_f32(acc, vmulq_f32(d, scale), vcvtq_f32_s32(sums));
        vfmsq_f32(acc, vmulq_f32(dmin, scale), vcvtq_f32_s32(offsets))
    }
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

struct Q4K;

impl Weights for Q4K {
    const BITS: u32 = 4;
}

impl Blocks256 for Q4K {
    type Block = BlockQ4K;
    type Scales = WithMin;

    #[inline(always)]
    unsafe fn dot<D: IntDot>(block: *const BlockQ4K, x: &Block) -> (int32x4_t, int32x4_t) {
        // SAFETY: the contract of this file: 128 bytes of nibbles.
        unsafe {
            let qs: *const u8 = (&raw const (*block).qs).cast();
            dot_with_min::<D, Q4K>(&(*block).scales, x, |pair| {
                let (a, b) = (vld1q_u8(qs.add(32 * pair)), vld1q_u8(qs.add(32 * pair + 16)));
                [[low_nibbles(a), low_nibbles(b)], [high_nibbles(a), high_nibbles(b)]]
            })
        }
    }

    #[inline(always)]
    unsafe fn unpack_rows(blocks: [*const BlockQ4K; 4], panel: &mut Panel) {
        // SAFETY: the contract of this file: 128 bytes of nibbles each.
        unsafe {
            let qs = blocks.map(|block| (&raw const (*block).qs).cast::<u8>());
            for pair in 0..4 {
                for half in 0..2 {
                    let bytes = interleave(qs.map(|qs| vld1q_u8(qs.add(32 * pair + 16 * half))));
                    panel[2 * pair][half] = bytes.map(|bytes| low_nibbles(bytes));
                    panel[2 * pair + 1][half] = bytes.map(|bytes| high_nibbles(bytes));
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn scales(blocks: [*const BlockQ4K; 4]) -> WithMin {
        // SAFETY: the contract of this file.
        WithMin::new(blocks.map(|block| unsafe { &(*block).scales }))
    }

    #[inline(always)]
    unsafe fn add_part<D: IntDot>(
        isum: int32x4_t,
        scales: &WithMin,
        b: usize,
        w: &[Rows16; 2],
        x: &Block,
    ) -> int32x4_t {
        // SAFETY: the contract of this file.
        unsafe { scales.add_part::<D, Q4K>(isum, b, w, x) }
    }

    #[inline(always)]
    unsafe fn offsets(scales: &WithMin, x: &Block) -> int32x4_t {
        // SAFETY: the contract of this file.
        unsafe { scales.offsets(x) }
    }

    #[inline(always)]
    unsafe fn d(blocks: [*const BlockQ4K; 4]) -> float32x4_t {
        // SAFETY: the contract of this file.
        unsafe { load_halves(blocks.map(|block| &raw const (*block).d)) }
    }

    #[inline(always)]
    unsafe fn add(
        acc: float32x4_t,
        blocks: [*const BlockQ4K; 4],
        d: float32x4_t,
        scale: float32x4_t,
        sums: int32x4_t,
        offsets: int32x4_t,
    ) -> float32x4_t {
        // SAFETY: the contract of this file.
        unsafe {
            let dmin = load_halves(blocks.map(|block| &raw const (*block).dmin));
            add_with_min(acc, d, dmin, scale, sums, offsets)
        }
    }
}

struct Q5K;

impl Weights for Q5K {
    const BITS: u32 = 5;
}

/// Nibble in the low half of `q`, fifth bit in the lowest of `bit`.
#[inline(always)]
unsafe fn five_bits(q: uint8x16_t, bit: uint8x16_t) -> int8x16_t {
    // SAFETY: the contract of this file.
    unsafe { vreinterpretq_s8_u8(vandq_u8(vsliq_n_u8::<4>(q, bit), vdupq_n_u8(31))) }
}

impl Blocks256 for Q5K {
    type Block = BlockQ5K;
    type Scales = WithMin;

    #[inline(always)]
    unsafe fn dot<D: IntDot>(block: *const BlockQ5K, x: &Block) -> (int32x4_t, int32x4_t) {
        // SAFETY: the contract of this file: 128 bytes of nibbles, 32 of fifth bits.
        unsafe {
            let qs: *const u8 = (&raw const (*block).qs).cast();
            let qh: *const u8 = (&raw const (*block).qh).cast();
            let qh = [vld1q_u8(qh), vld1q_u8(qh.add(16))];
            dot_with_min::<D, Q5K>(&(*block).scales, x, |pair| {
                let right = vdupq_n_s8(-2 * pair as i8);
                let first = [vshlq_u8(qh[0], right), vshlq_u8(qh[1], right)];
                let q = [vld1q_u8(qs.add(32 * pair)), vld1q_u8(qs.add(32 * pair + 16))];
                [
                    [five_bits(q[0], first[0]), five_bits(q[1], first[1])],
                    [
                        five_bits(vshrq_n_u8::<4>(q[0]), vshrq_n_u8::<1>(first[0])),
                        five_bits(vshrq_n_u8::<4>(q[1]), vshrq_n_u8::<1>(first[1])),
                    ],
                ]
            })
        }
    }

    #[inline(always)]
    unsafe fn unpack_rows(blocks: [*const BlockQ5K; 4], panel: &mut Panel) {
        // SAFETY: the contract of this file: 128 bytes of nibbles, 32 of fifth bits each.
        unsafe {
            let qs = blocks.map(|block| (&raw const (*block).qs).cast::<u8>());
            let qh = blocks.map(|block| (&raw const (*block).qh).cast::<u8>());
            for half in 0..2 {
                let mut bits = interleave(qh.map(|qh| vld1q_u8(qh.add(16 * half))));
                for pair in 0..4 {
                    let bytes = interleave(qs.map(|qs| vld1q_u8(qs.add(32 * pair + 16 * half))));
                    for i in 0..4 {
                        panel[2 * pair][half][i] = five_bits(bytes[i], bits[i]);
                        panel[2 * pair + 1][half][i] =
                            five_bits(vshrq_n_u8::<4>(bytes[i]), vshrq_n_u8::<1>(bits[i]));
                        bits[i] = vshrq_n_u8::<2>(bits[i]);
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn scales(blocks: [*const BlockQ5K; 4]) -> WithMin {
        // SAFETY: the contract of this file.
        WithMin::new(blocks.map(|block| unsafe { &(*block).scales }))
    }

    #[inline(always)]
    unsafe fn add_part<D: IntDot>(
        isum: int32x4_t,
        scales: &WithMin,
        b: usize,
        w: &[Rows16; 2],
        x: &Block,
    ) -> int32x4_t {
        // SAFETY: the contract of this file.
        unsafe { scales.add_part::<D, Q5K>(isum, b, w, x) }
    }

    #[inline(always)]
    unsafe fn offsets(scales: &WithMin, x: &Block) -> int32x4_t {
        // SAFETY: the contract of this file.
        unsafe { scales.offsets(x) }
    }

    #[inline(always)]
    unsafe fn d(blocks: [*const BlockQ5K; 4]) -> float32x4_t {
        // SAFETY: the contract of this file.
        unsafe { load_halves(blocks.map(|block| &raw const (*block).d)) }
    }

    #[inline(always)]
    unsafe fn add(
        acc: float32x4_t,
        blocks: [*const BlockQ5K; 4],
        d: float32x4_t,
        scale: float32x4_t,
        sums: int32x4_t,
        offsets: int32x4_t,
    ) -> float32x4_t {
        // SAFETY: the contract of this file.
        unsafe {
            let dmin = load_halves(blocks.map(|block| &raw const (*block).dmin));
            add_with_min(acc, d, dmin, scale, sums, offsets)
        }
    }
}

struct Q6K;

impl Weights for Q6K {
    const BITS: u32 = 6;
}

/// Scales of four rows, for each group of 16, in two widths.
struct Groups {
    wide: [[i32; 4]; 16],
    narrow: [[i16; 4]; 16],
}

/// 16 bytes each of: nibbles of the first 32 values, of the second 32, and the upper bits. Gives the 16
/// values at 0, 32, 64 and 96.
#[inline(always)]
unsafe fn six_bits(a: uint8x16_t, b: uint8x16_t, high: uint8x16_t) -> [int8x16_t; 4] {
    // SAFETY: the contract of this file.
    unsafe {
        let mask = vdupq_n_u8(63);
        [
            vandq_u8(vsliq_n_u8::<4>(a, high), mask),
            vandq_u8(vsliq_n_u8::<4>(b, vshrq_n_u8::<2>(high)), mask),
            vandq_u8(vsliq_n_u8::<4>(vshrq_n_u8::<4>(a), vshrq_n_u8::<4>(high)), mask),
            vsliq_n_u8::<4>(vshrq_n_u8::<4>(b), vshrq_n_u8::<6>(high)),
        ]
        .map(|levels| vreinterpretq_s8_u8(levels))
    }
}

impl Blocks256 for Q6K {
    type Block = BlockQ6K;
    type Scales = Groups;

    #[inline(always)]
    unsafe fn dot<D: IntDot>(block: *const BlockQ6K, x: &Block) -> (int32x4_t, int32x4_t) {
        // SAFETY: the contract of this file: 128 bytes ql, 64 qh, 16 scales.
        unsafe {
            let ql: *const u8 = (&raw const (*block).ql).cast();
            let qh: *const u8 = (&raw const (*block).qh).cast();
            let scales = vld1q_s8((&raw const (*block).scales).cast());
            let scales = [vmovl_s8(vget_low_s8(scales)), vmovl_high_s8(scales)];
            let sums = [vld1q_s16(x.group_sums), vld1q_s16(x.group_sums.add(8))];
            let mut offsets = vdupq_n_s32(0);
            let mut acc = vdupq_n_s32(0);
            for half in 0..2 {
                offsets = vmlal_s16(offsets, vget_low_s16(scales[half]), vget_low_s16(sums[half]));
                offsets = vmlal_high_s16(offsets, scales[half], sums[half]);
                let low = vmovl_s16(vget_low_s16(scales[half]));
                let high = vmovl_high_s16(scales[half]);
                let (ql, qh) = (ql.add(64 * half), qh.add(32 * half));
                let x = |group: usize| x.levels(128 * half + 16 * group);
                let zero = vdupq_n_s32(0);
                let even = six_bits(vld1q_u8(ql), vld1q_u8(ql.add(32)), vld1q_u8(qh));
                let odd =
                    six_bits(vld1q_u8(ql.add(16)), vld1q_u8(ql.add(48)), vld1q_u8(qh.add(16)));
                let first = sums_of_rows([
                    D::dot16(zero, even[0], x(0)),
                    D::dot16(zero, odd[0], x(1)),
                    D::dot16(zero, even[1], x(2)),
                    D::dot16(zero, odd[1], x(3)),
                ]);
                let second = sums_of_rows([
                    D::dot16(zero, even[2], x(4)),
                    D::dot16(zero, odd[2], x(5)),
                    D::dot16(zero, even[3], x(6)),
                    D::dot16(zero, odd[3], x(7)),
                ]);
                acc = vmlaq_s32(vmlaq_s32(acc, first, low), second, high);
            }
            (acc, offsets)
        }
    }

    #[inline(always)]
    unsafe fn unpack_rows(blocks: [*const BlockQ6K; 4], panel: &mut Panel) {
        // SAFETY: the contract of this file: 128 bytes ql, 64 qh each.
        unsafe {
            let ql = blocks.map(|block| (&raw const (*block).ql).cast::<u8>());
            let qh = blocks.map(|block| (&raw const (*block).qh).cast::<u8>());
            for half in 0..2 {
                for c in 0..2 {
                    let at = 64 * half + 16 * c;
                    let a = interleave(ql.map(|ql| vld1q_u8(ql.add(at))));
                    let b = interleave(ql.map(|ql| vld1q_u8(ql.add(at + 32))));
                    let high = interleave(qh.map(|qh| vld1q_u8(qh.add(32 * half + 16 * c))));
                    for i in 0..4 {
                        let levels = six_bits(a[i], b[i], high[i]);
                        for (part, levels) in levels.into_iter().enumerate() {
                            panel[4 * half + part][c][i] = levels;
                        }
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn scales(blocks: [*const BlockQ6K; 4]) -> Groups {
        let mut all = Groups { wide: [[0; 4]; 16], narrow: [[0; 4]; 16] };
        for (r, block) in blocks.into_iter().enumerate() {
            // SAFETY: the contract of this file.
            let scales = unsafe { &(*block).scales };
            for (g, scale) in scales.iter().enumerate() {
                all.wide[g][r] = i32::from(*scale);
                all.narrow[g][r] = i16::from(*scale);
            }
        }
        all
    }

    #[inline(always)]
    unsafe fn add_part<D: IntDot>(
        isum: int32x4_t,
        scales: &Groups,
        b: usize,
        w: &[Rows16; 2],
        x: &Block,
    ) -> int32x4_t {
        // SAFETY: the contract of this file; b < 8.
        unsafe {
            let first = D::tile16::<Q6K>(&w[0], x.levels(32 * b));
            let second = D::tile16::<Q6K>(&w[1], x.levels(32 * b + 16));
            let isum = vmlaq_s32(isum, first, vld1q_s32(scales.wide[2 * b].as_ptr()));
            vmlaq_s32(isum, second, vld1q_s32(scales.wide[2 * b + 1].as_ptr()))
        }
    }

    #[inline(always)]
    unsafe fn offsets(scales: &Groups, x: &Block) -> int32x4_t {
        // SAFETY: the contract of this file.
        unsafe {
            let mut acc = vdupq_n_s32(0);
            for half in 0..2 {
                let sums = vld1q_s16(x.group_sums.add(8 * half));
                let sc = |g: usize| vld1_s16(scales.narrow[8 * half + g].as_ptr());
                acc = vmlal_laneq_s16::<0>(acc, sc(0), sums);
                acc = vmlal_laneq_s16::<1>(acc, sc(1), sums);
                acc = vmlal_laneq_s16::<2>(acc, sc(2), sums);
                acc = vmlal_laneq_s16::<3>(acc, sc(3), sums);
                acc = vmlal_laneq_s16::<4>(acc, sc(4), sums);
                acc = vmlal_laneq_s16::<5>(acc, sc(5), sums);
                acc = vmlal_laneq_s16::<6>(acc, sc(6), sums);
                acc = vmlal_laneq_s16::<7>(acc, sc(7), sums);
            }
            acc
        }
    }

    #[inline(always)]
    unsafe fn d(blocks: [*const BlockQ6K; 4]) -> float32x4_t {
        // SAFETY: the contract of this file.
        unsafe { load_halves(blocks.map(|block| &raw const (*block).d)) }
    }

    /// `acc + (d d_x) (sums - 32 offsets)`
    #[inline(always)]
    unsafe fn add(
        acc: float32x4_t,
        _: [*const BlockQ6K; 4],
        d: float32x4_t,
        scale: float32x4_t,
        sums: int32x4_t,
        offsets: int32x4_t,
    ) -> float32x4_t {
        // SAFETY: the contract of this file.
        unsafe {
            let sums = vsubq_s32(sums, vshlq_n_s32::<5>(offsets));
            vfmaq_f32(acc, vmulq_f32(d, scale), vcvtq_f32_s32(sums))
        }
    }
}
