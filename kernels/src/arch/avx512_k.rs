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

/// A block of sixteen rows. `GROUPS` is 8 or 16.
struct Panel<const GROUPS: usize> {
    /// In the order of the values: register `k` has in lane `r` the levels `4 k..4 k + 4` of row `r`, unsigned.
    levels: [__m512i; 64],
    /// For each group the integer scales of the rows.
    scales: [__m512i; GROUPS],
    /// What meets two neighbouring sums of 16 activations, as pairs of words: the minimum twice, or (Q6_K) the scales
    /// of both groups.
    offsets: [__m512i; 8],
    d: __m512,
    dmin: __m512,
}

impl<const GROUPS: usize> Panel<GROUPS> {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn new() -> Self {
        let zero = _mm512_setzero_si512();
        Panel {
            levels: [zero; 64],
            scales: [zero; GROUPS],
            offsets: [zero; 8],
            d: _mm512_setzero_ps(),
            dmin: _mm512_setzero_ps(),
        }
    }

    /// # Safety
    /// A block of the format `KIND` can be read at each row of `blocks`.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn unpack<const KIND: u8>(&mut self, blocks: Blocks) {
        // SAFETY: Q4_K: 16 bytes of header, 128 of levels. Q5_K: 16, 32 of fifth bits, 128.
        // Q6_K: 128 of low bits, 64 of high ones, 16 of scales, 2 of d.
        unsafe {
            match KIND {
                Q4_K => {
                    self.header(columns(blocks));
                    self.nibbles(blocks.offset(16), None);
                }
                Q5_K => {
                    self.header(columns(blocks));
                    let high = [columns(blocks.offset(16)), columns(blocks.offset(32))];
                    self.nibbles(blocks.offset(48), Some(high));
                }
                _ => self.six_bits(blocks),
            }
        }
    }

    /// From the words of the header: both halves, then the three words of packed scales and minima.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn header(&mut self, [d, s0, s1, s2]: [__m512i; 4]) {
        self.d = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(d));
        self.dmin = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(d)));
        let six = _mm512_set1_epi8(63);
        let two = _mm512_set1_epi8(0x30);
        let top = |s| _mm512_and_si512(_mm512_srli_epi32::<2>(s), two);
        let scales = [_mm512_and_si512(s0, six), _mm512_or_si512(low_nibbles(s2), top(s0))];
        let minima = [_mm512_and_si512(s1, six), _mm512_or_si512(high_nibbles(s2), top(s1))];
        for half in 0..2 {
            for i in 0..4 {
                let once = [i as u8, 128, 128, 128];
                let twice = [i as u8, 128, i as u8, 128];
                self.scales[4 * half + i] = pick(scales[half], once);
                self.offsets[4 * half + i] = pick(minima[half], twice);
            }
        }
    }

    /// # Safety
    /// 128 bytes can be read at each row of `blocks`.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn nibbles(&mut self, blocks: Blocks, fifth: Option<[[__m512i; 4]; 2]>) {
        let sixteen = _mm512_set1_epi8(16);
        for pair in 0..4 {
            for part in 0..2 {
                // SAFETY: 16 of the 128 bytes.
                let bytes = unsafe { columns(blocks.offset(32 * pair + 16 * part)) };
                for k in 0..4 {
                    let (mut low, mut high) = (low_nibbles(bytes[k]), high_nibbles(bytes[k]));
                    if let Some(fifth) = &fifth {
                        // Bits 2 pair and 2 pair + 1 of each byte, at bit 4.
                        let shift = _mm_cvtsi32_si128(2 * pair as i32);
                        let bits = _mm512_srl_epi16(fifth[part][k], shift);
                        let [first, second] =
                            [_mm512_slli_epi16::<4>(bits), _mm512_slli_epi16::<3>(bits)];
                        low = _mm512_or_si512(low, _mm512_and_si512(first, sixteen));
                        high = _mm512_or_si512(high, _mm512_and_si512(second, sixteen));
                    }
                    self.levels[16 * pair + 4 * part + k] = low;
                    self.levels[16 * pair + 8 + 4 * part + k] = high;
                }
            }
        }
    }

    /// # Safety
    /// A block of Q6_K can be read at each row of `blocks`.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn six_bits(&mut self, blocks: Blocks) {
        let high_two = _mm512_set1_epi8(0x30);
        for half in 0..2 {
            for part in 0..2 {
                // SAFETY: 16 bytes each, inside ql (128 bytes) and qh (64 bytes after them).
                let [low, next, high] = unsafe {
                    [
                        columns(blocks.offset(64 * half + 16 * part)),
                        columns(blocks.offset(64 * half + 32 + 16 * part)),
                        columns(blocks.offset(128 + 32 * half + 16 * part)),
                    ]
                };
                for k in 0..4 {
                    let bits = |z| _mm512_and_si512(z, high_two);
                    let at = 32 * half + 4 * part + k;
                    let h = high[k];
                    self.levels[at] =
                        _mm512_or_si512(low_nibbles(low[k]), bits(_mm512_slli_epi16::<4>(h)));
                    self.levels[at + 8] =
                        _mm512_or_si512(low_nibbles(next[k]), bits(_mm512_slli_epi16::<2>(h)));
                    self.levels[at + 16] = _mm512_or_si512(high_nibbles(low[k]), bits(h));
                    self.levels[at + 24] =
                        _mm512_or_si512(high_nibbles(next[k]), bits(_mm512_srli_epi16::<2>(h)));
                }
            }
        }
        // SAFETY: the 16 scales, and the half behind them.
        let scales = unsafe {
            self.d = halves(blocks.offset(208));
            columns(blocks.offset(192))
        };
        for (word, scales) in scales.into_iter().enumerate() {
            for i in 0..4 {
                let top = [128, 128, 128, i as u8];
                self.scales[4 * word + i] = _mm512_srai_epi32::<24>(pick(scales, top));
            }
            for i in 0..2 {
                let [a, b] = [2 * i as u8, 2 * i as u8 + 1];
                let tops = [128, a, 128, b];
                self.offsets[2 * word + i] = _mm512_srai_epi16::<8>(pick(scales, tops));
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn product<const KIND: u8, const GROUPS: usize>(piece: &Piece<'_>) {
    let bytes = format(KIND).block_bytes();
    let mut padded = Padded::new();
    let mut panel = Panel::<GROUPS>::new();
    for first_row in (0..piece.rows).step_by(LANES) {
        let group = Group::<LANES>::new(piece, first_row);
        for first_token in (0..piece.tokens()).step_by(TOKENS) {
            let tokens = TOKENS.min(piece.tokens() - first_token);
            let mut sums = [_mm512_setzero_ps(); TOKENS];
            for block in 0..piece.x.cols() / 256 {
                let blocks = group.blocks(block * bytes, bytes, &mut padded);
                // SAFETY: `blocks` asked for a block of each row.
                unsafe { panel.unpack::<KIND>(blocks) };
                let (fours, rest) = sums[..tokens].as_chunks_mut::<FEW>();
                let mut token = first_token;
                for sums in fours {
                    tile::<KIND, GROUPS, FEW>(piece, &panel, (token, block), sums);
                    token += FEW;
                }
                for sum in rest {
                    let sum = std::array::from_mut(sum);
                    tile::<KIND, GROUPS, 1>(piece, &panel, (token, block), sum);
                    token += 1;
                }
            }
            for (t, sum) in sums.iter().take(tokens).enumerate() {
                store(&group, first_token + t, *sum);
            }
        }
    }
}

/// `T` tokens from `token` on against a block.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn tile<const KIND: u8, const GROUPS: usize, const T: usize>(
    piece: &Piece<'_>,
    panel: &Panel<GROUPS>,
    (token, block): (usize, usize),
    sums: &mut [__m512; T],
) {
    let levels: [&[i8]; T] =
        std::array::from_fn(|t| &piece.x.levels_of(token + t)[256 * block..][..256]);
    let zero = _mm512_setzero_si512();
    let mut totals = [zero; T];
    for (g, scales) in panel.scales.iter().enumerate() {
        let mut dots = [zero; T];
        for k in 64 / GROUPS * g..64 / GROUPS * (g + 1) {
            for t in 0..T {
                // SAFETY: four of the 256 levels, as `k` is below 64.
                let x = unsafe { broadcast(levels[t].as_ptr().add(4 * k)) };
                dots[t] = _mm512_dpbusd_epi32(dots[t], panel.levels[k], x);
            }
        }
        for t in 0..T {
            totals[t] = _mm512_add_epi32(totals[t], _mm512_mullo_epi32(dots[t], *scales));
        }
    }
    for t in 0..T {
        let group_sums = &piece.x.group_sums_of(token + t)[16 * block..][..16];
        let mut offsets = zero;
        for (pair, weights) in panel.offsets.iter().enumerate() {
            // SAFETY: two of the sixteen sums.
            let pair = unsafe { broadcast(group_sums.as_ptr().add(2 * pair).cast()) };
            offsets = _mm512_dpwssd_epi32(offsets, *weights, pair);
        }
        let scale = _mm512_set1_ps(piece.x.scales_of(token + t)[block]);
        let d = _mm512_mul_ps(panel.d, scale);
        sums[t] = if KIND == Q6_K {
            let dots = _mm512_sub_epi32(totals[t], _mm512_slli_epi32::<5>(offsets));
            _mm512_fmadd_ps(d, _mm512_cvtepi32_ps(dots), sums[t])
        } else {
            let sum = _mm512_fmadd_ps(d, _mm512_cvtepi32_ps(totals[t]), sums[t]);
            _mm512_fnmadd_ps(_mm512_mul_ps(panel.dmin, scale), _mm512_cvtepi32_ps(offsets), sum)
        };
    }
}
