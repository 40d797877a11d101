//! AVX2: a row of weights in each of the eight lanes, as in `avx512`, so again bit for bit the scalar results.
//!
//! Without `vpdpbusd` a product of bytes is `vpmaddubsw` (unsigned by signed, pairs added to 16 bits, saturating) and
//! `vpmaddwd` against ones. Levels below 16 leave room to add eight of the pairs before that, 32 four, 64 two. Q8_0
//! multiplies the absolute weight by the activation with the weight's sign: at most 128 * 127 * 2 = 32512.

#![allow(clippy::wildcard_imports, reason = "intrinsics")]

use std::arch::x86_64::*;

use super::avx2_floats::{product_bf16, product_f16, product_f32, quantize_q8_0, quantize_q8_k};
use super::avx2_k::{product_q4_k, product_q5_k, product_q6_k};
use super::rows::{Blocks, Group, Padded};
use crate::format::Format;
use crate::table::{Piece, Table};

/// Overwrites the entries that AVX2 has better kernels for.
pub(crate) const fn install(mut table: Table) -> Table {
    table.products[Format::F32.index()] = product_f32;
    table.products[Format::F16.index()] = product_f16;
    table.products[Format::Bf16.index()] = product_bf16;
    table.products[Format::Q4_0.index()] = product_q4_0;
    table.products[Format::Q4_1.index()] = product_q4_1;
    table.products[Format::Q8_0.index()] = product_q8_0;
    table.products[Format::Q4K.index()] = product_q4_k;
    table.products[Format::Q5K.index()] = product_q5_k;
    table.products[Format::Q6K.index()] = product_q6_k;
    table.quantize_q8_0 = quantize_q8_0;
    table.quantize_q8_k = quantize_q8_k;
    table
}

/// Rows in the lanes of a register.
pub(super) const LANES: usize = 8;
/// Tokens that a panel meets before the next one is unpacked: their sums take 2 KiB.
pub(super) const TOKENS: usize = 64;
/// Tokens of a tile.
pub(super) const TILE: usize = 4;
/// Blocks of 32 in a panel.
const BLOCKS: usize = 8;

const Q4_0: u8 = 0;
const Q4_1: u8 = 1;
const Q8_0: u8 = 2;

const fn format(kind: u8) -> Format {
    match kind {
        Q4_0 => Format::Q4_0,
        Q4_1 => Format::Q4_1,
        _ => Format::Q8_0,
    }
}

/// # Safety
/// The processor has the features of `Isa::Avx2`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn product_q4_0(piece: &Piece<'_>) {
    product::<Q4_0>(piece);
}

/// # Safety
/// The processor has the features of `Isa::Avx2`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn product_q4_1(piece: &Piece<'_>) {
    product::<Q4_1>(piece);
}

/// # Safety
/// The processor has the features of `Isa::Avx2`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn product_q8_0(piece: &Piece<'_>) {
    product::<Q8_0>(piece);
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn product<const KIND: u8>(piece: &Piece<'_>) {
    for first in (0..piece.rows).step_by(LANES) {
        many::<KIND>(&Group::new(piece, first));
    }
}

/// Writes the sums of a token.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn store(group: &Group<'_, LANES>, token: usize, sums: __m256) {
    let at = group.piece.out.at(token, group.first, group.rows);
    // SAFETY: `at` is valid for `rows` values, and no more than eight are written.
    unsafe {
        if group.rows == LANES {
            return _mm256_storeu_ps(at, sums);
        }
        let mut values = [0.0f32; LANES];
        _mm256_storeu_ps(values.as_mut_ptr(), sums);
        at.copy_from_nonoverlapping(values.as_ptr(), group.rows);
    }
}

/// 16 bytes of each row: register `k` has in lane `r` the bytes `4 k..4 k + 4` of row `r`.
///
/// # Safety
/// Sixteen bytes can be read at each row of `blocks`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn columns(blocks: Blocks) -> [__m256i; 4] {
    let load = |row: usize| {
        let at = blocks.at.wrapping_add(row * blocks.stride).cast();
        // SAFETY: the caller's promise.
        unsafe { _mm_loadu_si128(at) }
    };
    let every_fourth = |row: usize| {
        let low = _mm256_castsi128_si256(load(row));
        _mm256_inserti128_si256::<1>(low, load(row + 4))
    };
    let (a, b, c, d) = (every_fourth(0), every_fourth(1), every_fourth(2), every_fourth(3));
    let (ab_low, cd_low) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
    let (ab_high, cd_high) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
    [
        _mm256_unpacklo_epi64(ab_low, cd_low),
        _mm256_unpackhi_epi64(ab_low, cd_low),
        _mm256_unpacklo_epi64(ab_high, cd_high),
        _mm256_unpackhi_epi64(ab_high, cd_high),
    ]
}

/// The half at the start of each row's block.
///
/// # Safety
/// Two bytes can be read at each row of `blocks`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn halves(blocks: Blocks) -> __m256 {
    // SAFETY: the caller's promise.
    let four = |row| unsafe { blocks.four_halves(row) };
    _mm256_cvtph_ps(_mm_set_epi64x(four(4), four(0)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn low_nibbles(z: __m256i) -> __m256i {
    _mm256_and_si256(z, _mm256_set1_epi8(15))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn high_nibbles(z: __m256i) -> __m256i {
    low_nibbles(_mm256_srli_epi16::<4>(z))
}

/// Four levels of a token, in every lane.
///
/// # Safety
/// Four bytes can be read at `at`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn broadcast(at: *const i8) -> __m256i {
    // SAFETY: the caller's promise.
    _mm256_set1_epi32(unsafe { at.cast::<i32>().read_unaligned() })
}

/// Unsigned levels of the rows against those of a token, `ROOM` products of pairs fitting 16 bits.
///
/// # Safety
/// `4 * levels.len()` bytes can be read at `x`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn dot<const ROOM: usize>(levels: &[__m256i], x: *const i8) -> __m256i {
    let ones = _mm256_set1_epi16(1);
    let mut sum = _mm256_setzero_si256();
    for (i, levels) in levels.chunks_exact(ROOM).enumerate() {
        let mut pairs = _mm256_setzero_si256();
        for (k, w) in levels.iter().enumerate() {
            // SAFETY: the caller's promise.
            let x = unsafe { broadcast(x.add(4 * (ROOM * i + k))) };
            pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(*w, x));
        }
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
    }
    sum
}

/// Signed levels of the rows against those of a token.
///
/// # Safety
/// 32 bytes can be read at `x`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dot_signed(levels: &[__m256i; 8], x: *const i8) -> __m256i {
    let ones = _mm256_set1_epi16(1);
    let mut sum = _mm256_setzero_si256();
    for (k, w) in levels.iter().enumerate() {
        // SAFETY: the caller's promise.
        let x = unsafe { broadcast(x.add(4 * k)) };
        let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(*w), _mm256_sign_epi8(x, *w));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
    }
    sum
}

/// One block of eight rows: register `k` has in lane `r` the levels `4 k..4 k + 4`, signed in Q8_0 only.
struct Unpacked {
    levels: [__m256i; 8],
    scales: __m256,
    minima: __m256,
}

/// # Safety
/// A block can be read at each row of `blocks`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn unpack<const KIND: u8>(blocks: Blocks) -> Unpacked {
    // SAFETY: the three layouts have 2 (Q4_1: 4) bytes of halves, then 16 (Q8_0: 32) bytes of levels.
    unsafe {
        let scales = halves(blocks);
        if KIND == Q8_0 {
            let [a, b, c, d] = columns(blocks.offset(2));
            let [e, f, g, h] = columns(blocks.offset(18));
            let levels = [a, b, c, d, e, f, g, h];
            return Unpacked { levels, scales, minima: _mm256_setzero_ps() };
        }
        let minima = if KIND == Q4_1 { halves(blocks.offset(2)) } else { _mm256_setzero_ps() };
        let [a, b, c, d] = columns(blocks.offset(if KIND == Q4_1 { 4 } else { 2 }));
        let levels = [
            low_nibbles(a),
            low_nibbles(b),
            low_nibbles(c),
            low_nibbles(d),
            high_nibbles(a),
            high_nibbles(b),
            high_nibbles(c),
            high_nibbles(d),
        ];
        Unpacked { levels, scales, minima }
    }
}

/// What a block adds to the sum of a token: `block` counts from the start of the row.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add<const KIND: u8>(
    piece: &Piece<'_>,
    (token, block): (usize, usize),
    weights: &Unpacked,
    dots: __m256i,
    sum: __m256,
) -> __m256 {
    let at = token * (piece.x.cols() / 32) + block;
    let dots = if KIND == Q4_0 {
        let offset = _mm256_slli_epi32::<3>(_mm256_set1_epi32(piece.x.sums[at]));
        _mm256_sub_epi32(dots, offset)
    } else {
        dots
    };
    let dots = _mm256_cvtepi32_ps(dots);
    let scales = _mm256_mul_ps(weights.scales, _mm256_set1_ps(piece.x.scales[at]));
    let sum = _mm256_fmadd_ps(scales, dots, sum);
    if KIND == Q4_1 {
        _mm256_fmadd_ps(weights.minima, _mm256_set1_ps(piece.x.scaled_sums[at]), sum)
    } else {
        sum
    }
}

/// Any number of tokens: panels of 256 columns.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn many<const KIND: u8>(group: &Group<'_, LANES>) {
    let piece = group.piece;
    let (blocks_a_row, bytes) = (piece.x.cols() / 32, format(KIND).block_bytes());
    let mut padded = Padded::new();
    let zero = _mm256_setzero_ps();
    let mut panel: [Unpacked; BLOCKS] = std::array::from_fn(|_| Unpacked {
        levels: [_mm256_setzero_si256(); 8],
        scales: zero,
        minima: zero,
    });
    for first_token in (0..piece.tokens()).step_by(TOKENS) {
        let tokens = TOKENS.min(piece.tokens() - first_token);
        let mut sums = [zero; TOKENS];
        for first in (0..blocks_a_row).step_by(BLOCKS) {
            let count = BLOCKS.min(blocks_a_row - first);
            let blocks = group.blocks(first * bytes, count * bytes, &mut padded);
            for (i, unpacked) in panel.iter_mut().take(count).enumerate() {
                // SAFETY: a block of each row inside the bytes that `blocks` asked for.
                *unpacked = unsafe { unpack::<KIND>(blocks.offset(i * bytes)) };
            }
            let (panel, sums) = (&panel[..count], &mut sums[..tokens]);
            let (tiles, rest) = sums.as_chunks_mut::<TILE>();
            let mut token = first_token;
            for sums in tiles {
                tile::<KIND, TILE>(piece, panel, (token, first), sums);
                token += TILE;
            }
            for sum in rest {
                tile::<KIND, 1>(piece, panel, (token, first), std::array::from_mut(sum));
                token += 1;
            }
        }
        for (t, sum) in sums.iter().take(tokens).enumerate() {
            store(group, first_token + t, *sum);
        }
    }
}

/// `T` tokens from `token` on against the blocks of a panel, the first of which is block `first` of the row.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn tile<const KIND: u8, const T: usize>(
    piece: &Piece<'_>,
    panel: &[Unpacked],
    (token, first): (usize, usize),
    sums: &mut [__m256; T],
) {
    let levels: [*const i8; T] =
        std::array::from_fn(|t| piece.x.levels_of(token + t)[32 * first..].as_ptr());
    let mut now = *sums;
    for (i, weights) in panel.iter().enumerate() {
        for t in 0..T {
            // SAFETY: the panel ends inside the row, so do the levels.
            let dots = unsafe {
                let x = levels[t].add(32 * i);
                if KIND == Q8_0 {
                    dot_signed(&weights.levels, x)
                } else {
                    dot::<8>(&weights.levels, x)
                }
            };
            now[t] = add::<KIND>(piece, (token + t, first + i), weights, dots, now[t]);
        }
    }
    *sums = now;
}
