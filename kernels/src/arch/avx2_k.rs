//! AVX2: the K-quants, eight rows in the lanes. The scheme is that of `avx512_k`, the products of bytes those of `avx2`.

#![allow(clippy::wildcard_imports, reason = "intrinsics")]

use std::arch::x86_64::*;

use super::avx2::{
    LANES, TILE, TOKENS, broadcast, columns, dot, halves, high_nibbles, low_nibbles, store,
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
/// The processor has the features of `Isa::Avx2`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn product_q4_k(piece: &Piece<'_>) {
    product::<Q4_K, 8>(piece);
}

/// # Safety
/// The processor has the features of `Isa::Avx2`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn product_q5_k(piece: &Piece<'_>) {
    product::<Q5_K, 8>(piece);
}

/// # Safety
/// The processor has the features of `Isa::Avx2`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn product_q6_k(piece: &Piece<'_>) {
    product::<Q6_K, 16>(piece);
}

/// For each word of `z` the bytes of it that `bytes` names, zero where that is 128.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn pick(z: __m256i, bytes: [u8; 4]) -> __m256i {
    let words = _mm256_set_epi32(
        0x0c0c_0c0c,
        0x0808_0808,
        0x0404_0404,
        0,
        0x0c0c_0c0c,
        0x0808_0808,
        0x0404_0404,
        0,
    );
    let indices = _mm256_add_epi8(_mm256_set1_epi32(i32::from_le_bytes(bytes)), words);
    _mm256_shuffle_epi8(z, indices)
}

/// The half in the low word of each lane.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn low_halves(z: __m256i) -> __m256 {
    let words = _mm256_and_si256(z, _mm256_set1_epi32(0xffff));
    let words = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(words, words));
    _mm256_cvtph_ps(_mm256_castsi256_si128(words))
}

/// A block of eight rows. `GROUPS` is 8 or 16.
struct Panel<const GROUPS: usize> {
    /// In the order of the values: register `k` has in lane `r` the levels `4 k..4 k + 4` of row `r`, unsigned.
    levels: [__m256i; 64],
    /// For each group the integer scales of the rows.
    scales: [__m256i; GROUPS],
    /// What meets two neighbouring sums of 16 activations, as pairs of words: the minimum twice, or (Q6_K) the scales
    /// of both groups.
    offsets: [__m256i; 8],
    d: __m256,
    dmin: __m256,
}

impl<const GROUPS: usize> Panel<GROUPS> {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn new() -> Self {
        let zero = _mm256_setzero_si256();
        Panel {
            levels: [zero; 64],
            scales: [zero; GROUPS],
            offsets: [zero; 8],
            d: _mm256_setzero_ps(),
            dmin: _mm256_setzero_ps(),
        }
    }

    /// # Safety
    /// A block of the format `KIND` can be read at each row of `blocks`.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
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
    #[target_feature(enable = "avx2,fma,f16c")]
    fn header(&mut self, [d, s0, s1, s2]: [__m256i; 4]) {
        self.d = low_halves(d);
        self.dmin = low_halves(_mm256_srli_epi32::<16>(d));
        let six = _mm256_set1_epi8(63);
        let two = _mm256_set1_epi8(0x30);
        let top = |s| _mm256_and_si256(_mm256_srli_epi32::<2>(s), two);
        let scales = [_mm256_and_si256(s0, six), _mm256_or_si256(low_nibbles(s2), top(s0))];
        let minima = [_mm256_and_si256(s1, six), _mm256_or_si256(high_nibbles(s2), top(s1))];
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
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn nibbles(&mut self, blocks: Blocks, fifth: Option<[[__m256i; 4]; 2]>) {
        let sixteen = _mm256_set1_epi8(16);
        for pair in 0..4 {
            for part in 0..2 {
                // SAFETY: 16 of the 128 bytes.
                let bytes = unsafe { columns(blocks.offset(32 * pair + 16 * part)) };
                for k in 0..4 {
                    let (mut low, mut high) = (low_nibbles(bytes[k]), high_nibbles(bytes[k]));
                    if let Some(fifth) = &fifth {
                        // Bits 2 pair and 2 pair + 1 of each byte, at bit 4.
                        let shift = _mm_cvtsi32_si128(2 * pair as i32);
                        let bits = _mm256_srl_epi16(fifth[part][k], shift);
                        let [first, second] =
                            [_mm256_slli_epi16::<4>(bits), _mm256_slli_epi16::<3>(bits)];
                        low = _mm256_or_si256(low, _mm256_and_si256(first, sixteen));
                        high = _mm256_or_si256(high, _mm256_and_si256(second, sixteen));
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
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn six_bits(&mut self, blocks: Blocks) {
        let high_two = _mm256_set1_epi8(0x30);
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
                    let bits = |z| _mm256_and_si256(z, high_two);
                    let at = 32 * half + 4 * part + k;
                    let h = high[k];
                    self.levels[at] =
                        _mm256_or_si256(low_nibbles(low[k]), bits(_mm256_slli_epi16::<4>(h)));
                    self.levels[at + 8] =
                        _mm256_or_si256(low_nibbles(next[k]), bits(_mm256_slli_epi16::<2>(h)));
                    self.levels[at + 16] = _mm256_or_si256(high_nibbles(low[k]), bits(h));
                    self.levels[at + 24] =
                        _mm256_or_si256(high_nibbles(next[k]), bits(_mm256_srli_epi16::<2>(h)));
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
                self.scales[4 * word + i] = _mm256_srai_epi32::<24>(pick(scales, top));
            }
            for i in 0..2 {
                let [a, b] = [2 * i as u8, 2 * i as u8 + 1];
                let tops = [128, a, 128, b];
                self.offsets[2 * word + i] = _mm256_srai_epi16::<8>(pick(scales, tops));
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn product<const KIND: u8, const GROUPS: usize>(piece: &Piece<'_>) {
    let bytes = format(KIND).block_bytes();
    let mut padded = Padded::new();
    let mut panel = Panel::<GROUPS>::new();
    for first_row in (0..piece.rows).step_by(LANES) {
        let group = Group::<LANES>::new(piece, first_row);
        for first_token in (0..piece.tokens()).step_by(TOKENS) {
            let tokens = TOKENS.min(piece.tokens() - first_token);
            let mut sums = [_mm256_setzero_ps(); TOKENS];
            for block in 0..piece.x.cols() / 256 {
                let blocks = group.blocks(block * bytes, bytes, &mut padded);
                // SAFETY: `blocks` asked for a block of each row.
                unsafe { panel.unpack::<KIND>(blocks) };
                let (fours, rest) = sums[..tokens].as_chunks_mut::<TILE>();
                let mut token = first_token;
                for sums in fours {
                    tile::<KIND, GROUPS, TILE>(piece, &panel, (token, block), sums);
                    token += TILE;
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
#[target_feature(enable = "avx2,fma,f16c")]
fn tile<const KIND: u8, const GROUPS: usize, const T: usize>(
    piece: &Piece<'_>,
    panel: &Panel<GROUPS>,
    (token, block): (usize, usize),
    sums: &mut [__m256; T],
) {
    let levels: [&[i8]; T] =
        std::array::from_fn(|t| &piece.x.levels_of(token + t)[256 * block..][..256]);
    let zero = _mm256_setzero_si256();
    let mut totals = [zero; T];
    for (g, scales) in panel.scales.iter().enumerate() {
        let size = 64 / GROUPS;
        let weights = &panel.levels[size * g..][..size];
        for t in 0..T {
            // SAFETY: the levels of group `g`, four for each register of weights.
            let dots = unsafe {
                let x = levels[t].as_ptr().add(4 * size * g);
                match KIND {
                    Q4_K => dot::<8>(weights, x),
                    Q5_K => dot::<4>(weights, x),
                    _ => dot::<2>(weights, x),
                }
            };
            totals[t] = _mm256_add_epi32(totals[t], _mm256_mullo_epi32(dots, *scales));
        }
    }
    for t in 0..T {
        let group_sums = &piece.x.group_sums_of(token + t)[16 * block..][..16];
        let mut offsets = zero;
        for (pair, weights) in panel.offsets.iter().enumerate() {
            // SAFETY: two of the sixteen sums.
            let pair = unsafe { broadcast(group_sums.as_ptr().add(2 * pair).cast()) };
            offsets = _mm256_add_epi32(offsets, _mm256_madd_epi16(*weights, pair));
        }
        let scale = _mm256_set1_ps(piece.x.scales_of(token + t)[block]);
        let d = _mm256_mul_ps(panel.d, scale);
        sums[t] = if KIND == Q6_K {
            let dots = _mm256_sub_epi32(totals[t], _mm256_slli_epi32::<5>(offsets));
            _mm256_fmadd_ps(d, _mm256_cvtepi32_ps(dots), sums[t])
        } else {
            let sum = _mm256_fmadd_ps(d, _mm256_cvtepi32_ps(totals[t]), sums[t]);
            _mm256_fnmadd_ps(_mm256_mul_ps(panel.dmin, scale), _mm256_cvtepi32_ps(offsets), sum)
        };
    }
}
