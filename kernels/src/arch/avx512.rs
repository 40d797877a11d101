//! AVX-512 with VNNI: a row of weights in each lane.
//!
//! Sixteen rows are read at once, a row (or, while products are summed, a quarter of its block) in each lane, so scales
//! are one vector for sixteen rows, and blocks are added in the order of the row: the results equal those of the scalar
//! reference bit for bit. `vpdpbusd` multiplies unsigned by signed bytes: weights stay unsigned, their offset times the
//! sum of the activations is taken off.
//!
//! Few tokens (decode): the bytes of four rows fill a register as they come from memory and meet sixteen activations,
//! repeated; the four lanes of a row are added after the products. Many (prefill): 256 columns of sixteen rows are
//! unpacked once into a panel of 4 KiB, lane `r` of a register holding four values of row `r` (a 4 x 4 transposition
//! inside the 128-bit lanes), so that a broadcast of four activations meets sixteen rows and no lanes are added. A panel
//! meets up to [`TOKENS`] tokens, eight at a time.

#![allow(clippy::wildcard_imports, reason = "intrinsics")]

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

use super::avx512_floats::{product_bf16, product_f16, product_f32};
use super::avx512_k::{product_q4_k, product_q5_k, product_q6_k};
use super::rows::{Blocks, Group, Padded};
use crate::activations::Activations;
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

/// `at`, of which the compiler knows nothing: it would keep sixteen addresses, more than there are registers, instead
/// of four, to which the multiples of a stride are added for nothing.
#[inline]
fn opaque(at: *const u8) -> *const u8 {
    let mut address = at.addr();
    // SAFETY: no instruction.
    unsafe {
        asm!("/* {0} */", inout(reg) address, options(pure, nomem, nostack, preserves_flags))
    };
    at.with_addr(address)
}

/// 16 bytes of each row: register `k` has those of the rows `k`, `k + 4`, `k + 8`, `k + 12`.
///
/// # Safety
/// Sixteen bytes can be read at each row of `blocks`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn quads<const FEW_ADDRESSES: bool>(blocks: Blocks) -> [__m512i; 4] {
    let fours = [0, 1, 2, 3].map(|k| {
        let at = blocks.at.wrapping_add(k * blocks.stride);
        if FEW_ADDRESSES { opaque(at) } else { at }
    });
    let load = |row: usize| {
        let at = fours[row % 4].wrapping_add((row - row % 4) * blocks.stride).cast();
        // SAFETY: the caller's promise.
        unsafe { _mm_loadu_si128(at) }
    };
    // In two halves: an insertion costs by the width of its register.
    let pair =
        |row: usize| _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(load(row)), load(row + 4));
    let quad =
        |row: usize| _mm512_inserti64x4::<1>(_mm512_castsi256_si512(pair(row)), pair(row + 8));
    [quad(0), quad(1), quad(2), quad(3)]
}

/// Lane `r` = the sum of the four lanes that belong to row `r`, the rows lying as in [`quads`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn sums_of_quads([a, b, c, d]: [__m512i; 4]) -> __m512i {
    let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd))
}

/// The same for sums that fit into 15 bits.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn small_sums_of_quads([a, b, c, d]: [__m512i; 4]) -> __m512i {
    let ones = _mm512_set1_epi16(1);
    let ab = _mm512_madd_epi16(_mm512_packs_epi32(a, b), ones);
    let cd = _mm512_madd_epi16(_mm512_packs_epi32(c, d), ones);
    _mm512_madd_epi16(_mm512_packs_epi32(ab, cd), ones)
}

/// 16 bytes of each row: register `k` has in lane `r` the bytes `4 k..4 k + 4` of row `r`.
///
/// # Safety
/// Sixteen bytes can be read at each row of `blocks`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn columns(blocks: Blocks) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    let [a, b, c, d] = unsafe { quads::<false>(blocks) };
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

/// What stands before the levels of some consecutive blocks: for each block sixteen scales, or (Q4_1) sixteen times scale
/// and minimum. A ring.
///
/// It is gathered by the general registers, which have nothing else to do, and meets the vector registers in memory,
/// some blocks before it is needed: what was just written in small pieces cannot be read at once in a large one.
struct Heads([[u16; 2 * LANES]; 2 * HEADS_AHEAD]);

const HEADS_AHEAD: usize = 8;

/// `gather!(load, step, value, at, to)`: moves the first bytes of sixteen rows to `to`, `step` bytes apart. In assembly,
/// as the compiler would gather them in vector registers.
macro_rules! gather {
    ($load:literal, $step:literal, $value:literal, $blocks:expr, $to:expr) => {{
        let Blocks { at, stride } = $blocks;
        asm!(
            concat!($load, "[{a}]"), concat!("mov [{to} + 0 * ", $step, "], ", $value),
            concat!($load, "[{b}]"), concat!("mov [{to} + 1 * ", $step, "], ", $value),
            concat!($load, "[{c}]"), concat!("mov [{to} + 2 * ", $step, "], ", $value),
            concat!($load, "[{d}]"), concat!("mov [{to} + 3 * ", $step, "], ", $value),
            concat!($load, "[{a} + 4 * {s}]"), concat!("mov [{to} + 4 * ", $step, "], ", $value),
            concat!($load, "[{b} + 4 * {s}]"), concat!("mov [{to} + 5 * ", $step, "], ", $value),
            concat!($load, "[{c} + 4 * {s}]"), concat!("mov [{to} + 6 * ", $step, "], ", $value),
            concat!($load, "[{d} + 4 * {s}]"), concat!("mov [{to} + 7 * ", $step, "], ", $value),
            concat!($load, "[{a} + 8 * {s}]"), concat!("mov [{to} + 8 * ", $step, "], ", $value),
            concat!($load, "[{b} + 8 * {s}]"), concat!("mov [{to} + 9 * ", $step, "], ", $value),
            concat!($load, "[{c} + 8 * {s}]"), concat!("mov [{to} + 10 * ", $step, "], ", $value),
            concat!($load, "[{d} + 8 * {s}]"), concat!("mov [{to} + 11 * ", $step, "], ", $value),
            concat!($load, "[{a} + 4 * {s3}]"), concat!("mov [{to} + 12 * ", $step, "], ", $value),
            concat!($load, "[{b} + 4 * {s3}]"), concat!("mov [{to} + 13 * ", $step, "], ", $value),
            concat!($load, "[{c} + 4 * {s3}]"), concat!("mov [{to} + 14 * ", $step, "], ", $value),
            concat!($load, "[{d} + 4 * {s3}]"), concat!("mov [{to} + 15 * ", $step, "], ", $value),
            t = out(reg) _,
            a = in(reg) at,
            b = in(reg) at.wrapping_add(stride),
            c = in(reg) at.wrapping_add(2 * stride),
            d = in(reg) at.wrapping_add(3 * stride),
            s = in(reg) stride,
            s3 = in(reg) 3 * stride,
            to = in(reg) $to,
            options(nostack, preserves_flags),
        );
    }};
}

impl Heads {
    /// Gathers those of block `i`, the first being at `blocks`.
    ///
    /// # Safety
    /// That block can be read at each row.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn gather<const KIND: u8>(&mut self, blocks: Blocks, i: usize) {
        let block = blocks.offset(i * format(KIND).block_bytes());
        let to = self.0[i % (2 * HEADS_AHEAD)].as_mut_ptr();
        // SAFETY: a block begins with two bytes of scale, of Q4_1 four bytes of scale and minimum; `to` has room for
        // sixteen times four.
        unsafe {
            if KIND == Q4_1 {
                gather!("mov {t:e}, ", "4", "{t:e}", block, to);
            } else {
                gather!("movzx {t:e}, word ptr ", "2", "{t:x}", block, to);
            }
        }
    }

    /// The scales of block `i`, and its minima (Q4_1).
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn read<const KIND: u8>(&self, i: usize) -> [__m512; 2] {
        let at = self.0[i % (2 * HEADS_AHEAD)].as_ptr();
        // SAFETY: 32 or 64 bytes of the 64.
        unsafe {
            if KIND == Q4_1 {
                let words = _mm512_loadu_si512(at.cast());
                [words, _mm512_srli_epi32::<16>(words)]
                    .map(|z| _mm512_cvtph_ps(_mm512_cvtepi32_epi16(z)))
            } else {
                [_mm512_cvtph_ps(_mm256_loadu_si256(at.cast())), _mm512_setzero_ps()]
            }
        }
    }
}

/// One token's activations.
#[derive(Clone, Copy)]
struct Token {
    levels: *const i8,
    scales: *const f32,
    sums: *const i32,
    scaled_sums: *const f32,
}

impl Token {
    #[inline]
    fn new(x: &Activations, t: usize) -> Token {
        Token {
            levels: x.levels_of(t).as_ptr(),
            scales: x.scales_of(t).as_ptr(),
            sums: x.sums_of(t).as_ptr(),
            scaled_sums: x.scaled_sums_of(t).as_ptr(),
        }
    }

    /// What block `block` of the weights adds to the sum of this token. They lie as [`quads`] lays them.
    ///
    /// # Safety
    /// The token has that block.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn add<const KIND: u8>(&self, block: usize, weights: &Unpacked, sum: __m512) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe {
            let levels = self.levels.add(32 * block).cast();
            let low = _mm512_broadcast_i32x4(_mm_loadu_si128(levels));
            let high = _mm512_broadcast_i32x4(_mm_loadu_si128(levels.add(1)));
            let dots = [0, 1, 2, 3].map(|k| {
                let dots = _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights.levels[k], low);
                _mm512_dpbusd_epi32(dots, weights.levels[4 + k], high)
            });
            let mut dots =
                if KIND == Q8_0 { sums_of_quads(dots) } else { small_sums_of_quads(dots) };
            if KIND != Q4_1 {
                // The sum of the levels fits into the low half of its word: so this takes off `offset * sum`.
                let offset = if KIND == Q4_0 { -8 } else { -128 };
                let sum = _mm512_set1_epi32(*self.sums.add(block));
                dots = _mm512_dpwssd_epi32(dots, _mm512_set1_epi32(offset & 0xffff), sum);
            }
            let scales = _mm512_mul_ps(weights.scales, _mm512_set1_ps(*self.scales.add(block)));
            let sum = _mm512_fmadd_ps(scales, _mm512_cvtepi32_ps(dots), sum);
            if KIND == Q4_1 {
                let scaled = _mm512_set1_ps(*self.scaled_sums.add(block));
                _mm512_fmadd_ps(weights.minima, scaled, sum)
            } else {
                sum
            }
        }
    }
}

/// All of `T` tokens, weights from memory to registers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn few<const KIND: u8, const T: usize>(group: &Group<'_, LANES>) {
    let (count, bytes) = (group.piece.x.cols() / 32, format(KIND).block_bytes());
    let tokens: [Token; T] = std::array::from_fn(|t| Token::new(group.piece.x, t));
    let mut sums = [_mm512_setzero_ps(); T];
    if let Some(blocks) = group.whole() {
        // SAFETY: sixteen rows of `count` blocks, as many as the tokens have.
        unsafe { add_blocks::<KIND, T>(group, blocks, 0..count, &tokens, &mut sums) };
    } else {
        let mut padded = Padded::new();
        for first in (0..count).step_by(BLOCKS) {
            let last = (first + BLOCKS).min(count);
            let blocks = group.blocks(first * bytes, (last - first) * bytes, &mut padded);
            // SAFETY: as above, of the blocks that were asked for.
            unsafe { add_blocks::<KIND, T>(group, blocks, first..last, &tokens, &mut sums) };
        }
    }
    for (t, sum) in sums.into_iter().enumerate() {
        store(group, t, sum);
    }
}

/// Adds what some blocks of the rows give to the sums of the tokens. `blocks` begins at the first of them.
///
/// # Safety
/// The blocks can be read at each row of `blocks`, and the tokens have them.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn add_blocks<const KIND: u8, const T: usize>(
    group: &Group<'_, LANES>,
    blocks: Blocks,
    range: Range<usize>,
    tokens: &[Token; T],
    sums: &mut [__m512; T],
) {
    let (count, bytes) = (range.len(), format(KIND).block_bytes());
    let mut heads = Heads([[0; 2 * LANES]; 2 * HEADS_AHEAD]);
    let mut now = *sums;
    for i in 0..HEADS_AHEAD.min(count) {
        // SAFETY: the caller's promise.
        unsafe { heads.gather::<KIND>(blocks, i) };
    }
    for i in 0..count {
        group.prefetch((range.start + i) * bytes, bytes);
        // SAFETY: the caller's promise.
        unsafe {
            if i + HEADS_AHEAD < count {
                heads.gather::<KIND>(blocks, i + HEADS_AHEAD);
            }
            let weights = unpack_quads::<KIND>(blocks.offset(i * bytes), &heads, i);
            for t in 0..T {
                now[t] = tokens[t].add::<KIND>(range.start + i, &weights, now[t]);
            }
        }
    }
    *sums = now;
}

/// One block of sixteen rows, as [`quads`] lays them: the first sixteen levels in four registers, the others in four.
///
/// # Safety
/// A block can be read at each row of `blocks`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn unpack_quads<const KIND: u8>(blocks: Blocks, heads: &Heads, i: usize) -> Unpacked {
    let [scales, minima] = heads.read::<KIND>(i);
    // SAFETY: the three layouts have 2 (Q4_1: 4) bytes of halves, then 16 (Q8_0: 32) bytes of levels.
    let levels = unsafe {
        if KIND == Q8_0 {
            let sign = _mm512_set1_epi8(i8::MIN);
            let [a, b, c, d] = quads::<true>(blocks.offset(2));
            let [e, f, g, h] = quads::<true>(blocks.offset(18));
            [a, b, c, d, e, f, g, h].map(|z| _mm512_xor_si512(z, sign))
        } else {
            let quads = quads::<true>(blocks.offset(if KIND == Q4_1 { 4 } else { 2 }));
            let [a, b, c, d] = quads.map(|z| low_nibbles(z));
            let [e, f, g, h] = quads.map(|z| high_nibbles(z));
            [a, b, c, d, e, f, g, h]
        }
    };
    Unpacked { levels, scales, minima }
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
