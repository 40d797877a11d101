//! AVX-512 with VNNI: the K-quants, sixteen rows in the lanes as in `avx512`.
//!
//! A block of 256 values has groups (of 32, Q6_K of 16) with integer scales: the sum of a group is multiplied by the
//! scales of the sixteen rows (`vpmulld`), so all of a block is one exact integer. What offsets and minima take off is
//! a second integer, the group sums of the activations times scales or minima (`vpdpwssd`).

#![allow(clippy::wildcard_imports, reason = "intrinsics")]

use std::arch::x86_64::*;

use super::avx512::{
    FEW, LANES, TOKENS, broadcast, columns, halves, high_nibbles, low_nibbles, store,
};
use super::rows::{Blocks, Group, Padded};
use crate::format::Format;
use crate::table::Piece;

const Q4_K: u8 = 0;
const Q5_K: u8 = 1;
const Q6_K: u8 = 2;

const fn format(kind: u8) -> Format {
    match kind {
        Q4_K => Format::Q4K,
        Q5_K => Format::Q5K,
        _ => Format::Q6K,
    }
}

/// # Safety
/// The processor has the features of `Isa::Avx512Vnni`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn product_q4_k(piece: &Piece<'_>) {
    product::<Q4_K, 8>(piece);
}

/// # Safety
/// The processor has the features of `Isa::Avx512Vnni`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn product_q5_k(piece: &Piece<'_>) {
    product::<Q5_K, 8>(piece);
}

/// # Safety
/// The processor has the features of `Isa::Avx512Vnni`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn product_q6_k(piece: &Piece<'_>) {
    product::<Q6_K, 16>(piece);
}

/// For each word of `z` the bytes of it that `bytes` names, zero where that is 128.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn pick(z: __m512i, bytes: [u8; 4]) -> __m512i {
    let words = _mm512_set4_epi32(0x0c0c_0c0c, 0x0808_0808, 0x0404_0404, 0);
    let indices = _mm512_add_epi8(_mm512_set1_epi32(i32::from_le_bytes(bytes)), words);
    _mm512_shuffle_epi8(z, indices)
}

/// What a block of sixteen rows has beside its levels. `GROUPS` is 8 or 16.
struct Scales<const GROUPS: usize> {
    /// For each group the integer scales of the rows.
    scales: [__m512i; GROUPS],
    /// What meets two neighbouring sums of 16 activations, as pairs of words: the minimum twice, or (Q6_K) the scales
    /// of both groups.
    offsets: [__m512i; 8],
    d: __m512,
    dmin: __m512,
    /// Q5_K: the fifth bits, not yet shifted.
    fifth: [[__m512i; 4]; 2],
}

/// A quarter of the levels of a block of sixteen rows, unsigned: sixteen registers of four levels of each row.
/// Q4_K and Q5_K: 64 values in their order. Q6_K: four groups of 16 that share their bytes.
type Quarter = [__m512i; 16];

/// The group to which registers `4 * part..` of a quarter belong, and their first value in the block.
const fn place(kind: u8, quarter: usize, part: usize) -> (usize, usize) {
    if kind == Q6_K {
        let group = 8 * (quarter / 2) + 2 * part + quarter % 2;
        (group, 16 * group)
    } else {
        (2 * quarter + part / 2, 64 * quarter + 16 * part)
    }
}

/// # Safety
/// A block of the format `KIND` can be read at each row of `blocks`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn scales<const KIND: u8, const GROUPS: usize>(blocks: Blocks) -> Scales<GROUPS> {
    let zero = _mm512_setzero_si512();
    let mut scales = Scales {
        scales: [zero; GROUPS],
        offsets: [zero; 8],
        d: _mm512_setzero_ps(),
        dmin: _mm512_setzero_ps(),
        fifth: [[zero; 4]; 2],
    };
    // SAFETY: Q4_K and Q5_K have 16 bytes of header, Q5_K then 32 of fifth bits; Q6_K has 16 bytes of scales at 192.
    unsafe {
        if KIND == Q6_K {
            signed_scales(columns(blocks.offset(192)), &mut scales);
            scales.d = halves(blocks.offset(208));
        } else {
            header(columns(blocks), &mut scales);
        }
        if KIND == Q5_K {
            scales.fifth = [columns(blocks.offset(16)), columns(blocks.offset(32))];
        }
    }
    scales
}

/// From the words of the header: both halves, then the three words of packed scales and minima.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn header<const GROUPS: usize>([d, s0, s1, s2]: [__m512i; 4], to: &mut Scales<GROUPS>) {
    to.d = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(d));
    to.dmin = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(d)));
    let six = _mm512_set1_epi8(63);
    let two = _mm512_set1_epi8(0x30);
    let top = |s| _mm512_and_si512(_mm512_srli_epi32::<2>(s), two);
    let scales = [_mm512_and_si512(s0, six), _mm512_or_si512(low_nibbles(s2), top(s0))];
    let minima = [_mm512_and_si512(s1, six), _mm512_or_si512(high_nibbles(s2), top(s1))];
    for half in 0..2 {
        for i in 0..4 {
            let byte = i as u8;
            to.scales[4 * half + i] = pick(scales[half], [byte, 128, 128, 128]);
            to.offsets[4 * half + i] = pick(minima[half], [byte, 128, byte, 128]);
        }
    }
}

/// From the words of the sixteen signed scales of Q6_K.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn signed_scales<const GROUPS: usize>(words: [__m512i; 4], to: &mut Scales<GROUPS>) {
    for (word, bytes) in words.into_iter().enumerate() {
        for i in 0..4 {
            let top = pick(bytes, [128, 128, 128, i as u8]);
            to.scales[4 * word + i] = _mm512_srai_epi32::<24>(top);
        }
        for i in 0..2 {
            let tops = pick(bytes, [128, 2 * i as u8, 128, 2 * i as u8 + 1]);
            to.offsets[2 * word + i] = _mm512_srai_epi16::<8>(tops);
        }
    }
}

/// # Safety
/// A block of the format `KIND` can be read at each row of `blocks`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn quarter<const KIND: u8>(
    blocks: Blocks,
    quarter: usize,
    fifth: &[[__m512i; 4]; 2],
) -> Quarter {
    let mut levels = [_mm512_setzero_si512(); 16];
    if KIND == Q6_K {
        let (half, part) = (quarter / 2, quarter % 2);
        // SAFETY: 16 bytes each, inside ql (128 bytes) and qh (64 bytes after them).
        let [low, next, high] = unsafe {
            [
                columns(blocks.offset(64 * half + 16 * part)),
                columns(blocks.offset(64 * half + 32 + 16 * part)),
                columns(blocks.offset(128 + 32 * half + 16 * part)),
            ]
        };
        let bits = |z| _mm512_and_si512(z, _mm512_set1_epi8(0x30));
        for k in 0..4 {
            let h = high[k];
            levels[k] = _mm512_or_si512(low_nibbles(low[k]), bits(_mm512_slli_epi16::<4>(h)));
            levels[4 + k] = _mm512_or_si512(low_nibbles(next[k]), bits(_mm512_slli_epi16::<2>(h)));
            levels[8 + k] = _mm512_or_si512(high_nibbles(low[k]), bits(h));
            levels[12 + k] =
                _mm512_or_si512(high_nibbles(next[k]), bits(_mm512_srli_epi16::<2>(h)));
        }
        return levels;
    }
    let sixteen = _mm512_set1_epi8(16);
    // Bits 2 quarter and 2 quarter + 1 of each byte of `fifth` belong here, at bit 4.
    let shift = _mm_cvtsi32_si128(2 * quarter as i32);
    let nibbles = blocks.offset(if KIND == Q5_K { 48 } else { 16 });
    for part in 0..2 {
        // SAFETY: 16 of the 128 bytes of nibbles.
        let bytes = unsafe { columns(nibbles.offset(32 * quarter + 16 * part)) };
        for k in 0..4 {
            let (mut low, mut high) = (low_nibbles(bytes[k]), high_nibbles(bytes[k]));
            if KIND == Q5_K {
                let bits = _mm512_srl_epi16(fifth[part][k], shift);
                let [first, second] = [_mm512_slli_epi16::<4>(bits), _mm512_slli_epi16::<3>(bits)];
                low = _mm512_or_si512(low, _mm512_and_si512(first, sixteen));
                high = _mm512_or_si512(high, _mm512_and_si512(second, sixteen));
            }
            levels[4 * part + k] = low;
            levels[8 + 4 * part + k] = high;
        }
    }
    levels
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn product<const KIND: u8, const GROUPS: usize>(piece: &Piece<'_>) {
    for first in (0..piece.rows).step_by(LANES) {
        let group = Group::<LANES>::new(piece, first);
        match piece.tokens() {
            1 => few::<KIND, GROUPS, 1>(&group),
            2 => few::<KIND, GROUPS, 2>(&group),
            3 => few::<KIND, GROUPS, 3>(&group),
            FEW => few::<KIND, GROUPS, FEW>(&group),
            _ => many::<KIND, GROUPS>(&group),
        }
    }
}

/// All of `T` tokens, weights from memory to registers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn few<const KIND: u8, const GROUPS: usize, const T: usize>(group: &Group<'_, LANES>) {
    let piece = group.piece;
    let bytes = format(KIND).block_bytes();
    let mut padded = Padded::new();
    let mut sums = [_mm512_setzero_ps(); T];
    for block in 0..piece.x.cols() / 256 {
        let blocks = group.blocks(block * bytes, bytes, &mut padded);
        let levels = std::array::from_fn(|t| &piece.x.levels_of(t)[256 * block..][..256]);
        let mut totals = [_mm512_setzero_si512(); T];
        // SAFETY: `blocks` asked for a block of each row.
        unsafe {
            let scales = scales::<KIND, GROUPS>(blocks);
            let mut add = |i: usize| {
                let weights = quarter::<KIND>(blocks, i, &scales.fifth);
                add_quarter::<KIND, GROUPS, T>(i, &weights, &scales, &levels, &mut totals);
            };
            add(0);
            add(1);
            add(2);
            add(3);
            add_block::<KIND, GROUPS, T>(piece, (0, block), &scales, &totals, &mut sums);
        }
    }
    for (t, sum) in sums.into_iter().enumerate() {
        store(group, t, sum);
    }
}

/// Any number of tokens: each block is unpacked once for [`TOKENS`] of them.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn many<const KIND: u8, const GROUPS: usize>(group: &Group<'_, LANES>) {
    let piece = group.piece;
    let bytes = format(KIND).block_bytes();
    let mut padded = Padded::new();
    for first_token in (0..piece.tokens()).step_by(TOKENS) {
        let tokens = TOKENS.min(piece.tokens() - first_token);
        let mut sums = [_mm512_setzero_ps(); TOKENS];
        for block in 0..piece.x.cols() / 256 {
            let blocks = group.blocks(block * bytes, bytes, &mut padded);
            // SAFETY: `blocks` asked for a block of each row.
            let (scales, panel) = unsafe {
                let scales = scales::<KIND, GROUPS>(blocks);
                let panel = [0, 1, 2, 3].map(|i| quarter::<KIND>(blocks, i, &scales.fifth));
                (scales, panel)
            };
            let (fours, rest) = sums[..tokens].as_chunks_mut::<FEW>();
            let mut token = first_token;
            for sums in fours {
                tile::<KIND, GROUPS, FEW>(piece, (&scales, &panel), (token, block), sums);
                token += FEW;
            }
            for sum in rest {
                let sum = std::array::from_mut(sum);
                tile::<KIND, GROUPS, 1>(piece, (&scales, &panel), (token, block), sum);
                token += 1;
            }
        }
        for (t, sum) in sums.iter().take(tokens).enumerate() {
            store(group, first_token + t, *sum);
        }
    }
}

/// `T` tokens from `token` on against a block.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn tile<const KIND: u8, const GROUPS: usize, const T: usize>(
    piece: &Piece<'_>,
    (scales, panel): (&Scales<GROUPS>, &[Quarter; 4]),
    (token, block): (usize, usize),
    sums: &mut [__m512; T],
) {
    let levels = std::array::from_fn(|t| &piece.x.levels_of(token + t)[256 * block..][..256]);
    let mut totals = [_mm512_setzero_si512(); T];
    for (i, weights) in panel.iter().enumerate() {
        add_quarter::<KIND, GROUPS, T>(i, weights, scales, &levels, &mut totals);
    }
    add_block::<KIND, GROUPS, T>(piece, (token, block), scales, &totals, sums);
}

/// Adds the groups of a quarter, times their scales, to the totals of the block.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn add_quarter<const KIND: u8, const GROUPS: usize, const T: usize>(
    quarter: usize,
    weights: &Quarter,
    scales: &Scales<GROUPS>,
    levels: &[&[i8]; T],
    totals: &mut [__m512i; T],
) {
    // A group is 32 values, two parts, but for Q6_K.
    let parts = if KIND == Q6_K { 1 } else { 2 };
    for first in (0..4).step_by(parts) {
        let (group, value) = place(KIND, quarter, first);
        for t in 0..T {
            let mut dots = _mm512_setzero_si512();
            for k in 0..4 * parts {
                // SAFETY: four of the 256 levels, as the group lies inside the block.
                let x = unsafe { broadcast(levels[t].as_ptr().add(value + 4 * k)) };
                dots = _mm512_dpbusd_epi32(dots, weights[4 * first + k], x);
            }
            let scaled = _mm512_mullo_epi32(dots, scales.scales[group]);
            totals[t] = _mm512_add_epi32(totals[t], scaled);
        }
    }
}

/// Adds what a block gives to the sums of `T` tokens from `token` on.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn add_block<const KIND: u8, const GROUPS: usize, const T: usize>(
    piece: &Piece<'_>,
    (token, block): (usize, usize),
    scales: &Scales<GROUPS>,
    totals: &[__m512i; T],
    sums: &mut [__m512; T],
) {
    for t in 0..T {
        let group_sums = &piece.x.group_sums_of(token + t)[16 * block..][..16];
        let mut offsets = _mm512_setzero_si512();
        for (pair, weights) in scales.offsets.iter().enumerate() {
            // SAFETY: two of the sixteen sums.
            let pair = unsafe { broadcast(group_sums.as_ptr().add(2 * pair).cast()) };
            offsets = _mm512_dpwssd_epi32(offsets, *weights, pair);
        }
        let scale = _mm512_set1_ps(piece.x.scales_of(token + t)[block]);
        let d = _mm512_mul_ps(scales.d, scale);
        sums[t] = if KIND == Q6_K {
            let dots = _mm512_sub_epi32(totals[t], _mm512_slli_epi32::<5>(offsets));
            _mm512_fmadd_ps(d, _mm512_cvtepi32_ps(dots), sums[t])
        } else {
            let sum = _mm512_fmadd_ps(d, _mm512_cvtepi32_ps(totals[t]), sums[t]);
            let dmin = _mm512_mul_ps(scales.dmin, scale);
            _mm512_fnmadd_ps(dmin, _mm512_cvtepi32_ps(offsets), sum)
        };
    }
}
