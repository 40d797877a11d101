//! AVX-512 with VNNI: a row of weights in each lane.
//!
//! Sixteen rows are read at once: 16 bytes of each become four registers whose lane `r` holds four values of row `r`
//! (a 4 x 4 transposition inside the 128-bit lanes). So a broadcast of four activations meets sixteen rows in one
//! `vpdpbusd`, block sums need no horizontal addition, scales are one vector for sixteen rows, and blocks are added in
//! the order of the row: the results equal those of the scalar reference bit for bit. `vpdpbusd` multiplies unsigned
//! by signed bytes: weights stay unsigned, their offset times the sum of the activations is taken off.
//!
//! Few tokens (decode): weights go from memory through registers. Many (prefill): 256 columns of sixteen rows are
//! unpacked once into a panel of 4 KiB and meet up to [`TOKENS`] tokens, eight at a time.

#![allow(clippy::wildcard_imports, reason = "intrinsics")]

use std::arch::x86_64::*;

use super::avx512_floats::{product_bf16, product_f16, product_f32};
use super::avx512_k::{product_q4_k, product_q5_k, product_q6_k};
use super::rows::{Blocks, Group, Padded};
use crate::format::Format;
use crate::table::{Piece, Table};

/// Overwrites the entries that AVX-512 has better kernels for.
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
    table
}

/// Rows in the lanes of a register.
pub(super) const LANES: usize = 16;
/// Tokens that a panel meets before the next one is unpacked: their sums take 4 KiB.
pub(super) const TOKENS: usize = 64;
/// Up to this many tokens weights are not stored in a panel.
pub(super) const FEW: usize = 4;
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
/// The processor has the features of `Isa::Avx512Vnni`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn product_q4_0(piece: &Piece<'_>) {
    product::<Q4_0>(piece);
}

/// # Safety
/// The processor has the features of `Isa::Avx512Vnni`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn product_q4_1(piece: &Piece<'_>) {
    product::<Q4_1>(piece);
}

/// # Safety
/// The processor has the features of `Isa::Avx512Vnni`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn product_q8_0(piece: &Piece<'_>) {
    product::<Q8_0>(piece);
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn product<const KIND: u8>(piece: &Piece<'_>) {
    for first in (0..piece.rows).step_by(LANES) {
        let group = Group::<LANES>::new(piece, first);
        match piece.tokens() {
            1 => few::<KIND, 1>(&group),
            2 => few::<KIND, 2>(&group),
            3 => few::<KIND, 3>(&group),
            FEW => few::<KIND, FEW>(&group),
            _ => many::<KIND>(&group),
        }
    }
}

/// Writes the sums of a token.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn store(group: &Group<'_, LANES>, token: usize, sums: __m512) {
    let at = group.piece.out.at(token, group.first, group.rows);
    let mask = u16::MAX >> (LANES - group.rows);
    // SAFETY: `at` is valid for `rows` values, the mask writes no more.
    unsafe { _mm512_mask_storeu_ps(at, mask, sums) }
}

/// 16 bytes of each row: register `k` has in lane `r` the bytes `4 k..4 k + 4` of row `r`.
///
/// # Safety
/// Sixteen bytes can be read at each row of `blocks`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn columns(blocks: Blocks) -> [__m512i; 4] {
    let load = |row: usize| {
        let at = blocks.at.wrapping_add(row * blocks.stride).cast();
        // SAFETY: the caller's promise.
        unsafe { _mm_loadu_si128(at) }
    };
    let every_fourth = |row: usize| {
        let z = _mm512_castsi128_si512(load(row));
        let z = _mm512_inserti32x4::<1>(z, load(row + 4));
        let z = _mm512_inserti32x4::<2>(z, load(row + 8));
        _mm512_inserti32x4::<3>(z, load(row + 12))
    };
    let (a, b, c, d) = (every_fourth(0), every_fourth(1), every_fourth(2), every_fourth(3));
    let (ab_low, cd_low) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
    let (ab_high, cd_high) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
    [
        _mm512_unpacklo_epi64(ab_low, cd_low),
        _mm512_unpackhi_epi64(ab_low, cd_low),
        _mm512_unpacklo_epi64(ab_high, cd_high),
        _mm512_unpackhi_epi64(ab_high, cd_high),
    ]
}

/// The half at the start of each row's block.
///
/// # Safety
/// Two bytes can be read at each row of `blocks`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn halves(blocks: Blocks) -> __m512 {
    // SAFETY: the caller's promise.
    let four = |row| unsafe { blocks.four_halves(row) };
    _mm512_cvtph_ps(_mm256_set_epi64x(four(12), four(8), four(4), four(0)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn low_nibbles(z: __m512i) -> __m512i {
    _mm512_and_si512(z, _mm512_set1_epi8(15))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn high_nibbles(z: __m512i) -> __m512i {
    low_nibbles(_mm512_srli_epi16::<4>(z))
}

/// Four levels of a token, in every lane.
///
/// # Safety
/// Four bytes can be read at `at`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn broadcast(at: *const i8) -> __m512i {
    // SAFETY: the caller's promise.
    _mm512_set1_epi32(unsafe { at.cast::<i32>().read_unaligned() })
}

/// One block of sixteen rows: register `k` has in lane `r` the levels `4 k..4 k + 4`, unsigned.
struct Unpacked {
    levels: [__m512i; 8],
    scales: __m512,
    minima: __m512,
}

/// # Safety
/// A block can be read at each row of `blocks`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn unpack<const KIND: u8>(blocks: Blocks) -> Unpacked {
    // SAFETY: the three layouts have 2 (Q4_1: 4) bytes of halves, then 16 (Q8_0: 32) bytes of levels.
    unsafe {
        let scales = halves(blocks);
        if KIND == Q8_0 {
            let sign = _mm512_set1_epi8(i8::MIN);
            let [a, b, c, d] = columns(blocks.offset(2));
            let [e, f, g, h] = columns(blocks.offset(18));
            let levels = [a, b, c, d, e, f, g, h].map(|z| _mm512_xor_si512(z, sign));
            return Unpacked { levels, scales, minima: _mm512_setzero_ps() };
        }
        let minima = if KIND == Q4_1 { halves(blocks.offset(2)) } else { _mm512_setzero_ps() };
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
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn add<const KIND: u8>(
    piece: &Piece<'_>,
    (token, block): (usize, usize),
    weights: &Unpacked,
    dots: __m512i,
    sum: __m512,
) -> __m512 {
    let at = token * (piece.x.cols() / 32) + block;
    let offset = match KIND {
        Q4_0 => _mm512_slli_epi32::<3>(_mm512_set1_epi32(piece.x.sums[at])),
        Q8_0 => _mm512_slli_epi32::<7>(_mm512_set1_epi32(piece.x.sums[at])),
        _ => _mm512_setzero_si512(),
    };
    let dots = _mm512_cvtepi32_ps(_mm512_sub_epi32(dots, offset));
    let scales = _mm512_mul_ps(weights.scales, _mm512_set1_ps(piece.x.scales[at]));
    let sum = _mm512_fmadd_ps(scales, dots, sum);
    if KIND == Q4_1 {
        _mm512_fmadd_ps(weights.minima, _mm512_set1_ps(piece.x.scaled_sums[at]), sum)
    } else {
        sum
    }
}

/// All of `T` tokens, weights from memory to registers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn few<const KIND: u8, const T: usize>(group: &Group<'_, LANES>) {
    let piece = group.piece;
    let (cols, bytes) = (piece.x.cols(), format(KIND).block_bytes());
    let levels: [*const i8; T] = std::array::from_fn(|t| piece.x.levels_of(t).as_ptr());
    let mut padded = Padded::new();
    let mut sums = [_mm512_setzero_ps(); T];
    for first in (0..cols / 32).step_by(BLOCKS) {
        let last = (first + BLOCKS).min(cols / 32);
        let blocks = group.blocks(first * bytes, (last - first) * bytes, &mut padded);
        for block in first..last {
            // SAFETY: a block of each row inside the bytes that `blocks` asked for.
            let weights = unsafe { unpack::<KIND>(blocks.offset((block - first) * bytes)) };
            for t in 0..T {
                let mut dots = _mm512_setzero_si512();
                for (k, w) in weights.levels.iter().enumerate() {
                    // SAFETY: inside the levels of the token, `block` being below `cols / 32`.
                    let x = unsafe { broadcast(levels[t].add(32 * block + 4 * k)) };
                    dots = _mm512_dpbusd_epi32(dots, *w, x);
                }
                sums[t] = add::<KIND>(piece, (t, block), &weights, dots, sums[t]);
            }
        }
    }
    for (t, sum) in sums.into_iter().enumerate() {
        store(group, t, sum);
    }
}

/// Any number of tokens: panels of 256 columns.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn many<const KIND: u8>(group: &Group<'_, LANES>) {
    let piece = group.piece;
    let (blocks_a_row, bytes) = (piece.x.cols() / 32, format(KIND).block_bytes());
    let mut padded = Padded::new();
    let zero = _mm512_setzero_ps();
    let mut panel: [Unpacked; BLOCKS] = std::array::from_fn(|_| Unpacked {
        levels: [_mm512_setzero_si512(); 8],
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
            let (eights, rest) = sums.as_chunks_mut::<8>();
            let mut token = first_token;
            for sums in eights {
                tile::<KIND, 8>(piece, panel, (token, first), sums);
                token += 8;
            }
            let (twos, rest) = rest.as_chunks_mut::<2>();
            for sums in twos {
                tile::<KIND, 2>(piece, panel, (token, first), sums);
                token += 2;
            }
            for sum in rest {
                tile::<KIND, 1>(piece, panel, (token, first), std::array::from_mut(sum));
            }
        }
        for (t, sum) in sums.iter().take(tokens).enumerate() {
            store(group, first_token + t, *sum);
        }
    }
}

/// `T` tokens from `token` on against the blocks of a panel, the first of which is block `first` of the row.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn tile<const KIND: u8, const T: usize>(
    piece: &Piece<'_>,
    panel: &[Unpacked],
    (token, first): (usize, usize),
    sums: &mut [__m512; T],
) {
    let levels: [*const i8; T] =
        std::array::from_fn(|t| piece.x.levels_of(token + t)[32 * first..].as_ptr());
    let mut now = *sums;
    for (i, weights) in panel.iter().enumerate() {
        let mut dots = [_mm512_setzero_si512(); T];
        for (k, w) in weights.levels.iter().enumerate() {
            for t in 0..T {
                // SAFETY: the panel ends inside the row, so do the levels.
                let x = unsafe { broadcast(levels[t].add(32 * i + 4 * k)) };
                dots[t] = _mm512_dpbusd_epi32(dots[t], *w, x);
            }
        }
        for t in 0..T {
            now[t] = add::<KIND>(piece, (token + t, first + i), weights, dots[t], now[t]);
        }
    }
    *sums = now;
}
