//! AVX2: F32, F16 and BF16 weights against F32 activations, and the rounding of activations to 8 bits.
//!
//! Products: several rows and tokens at a time, one register of sums for each pair, the eight lanes folded at the end;
//! not the order of the scalar reference, both are within `cols` roundings of the exact sum.

#![allow(clippy::wildcard_imports, reason = "intrinsics")]

use std::arch::x86_64::*;

use crate::activations::{Q8KRow, Q8Row};
use crate::table::Piece;

const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;

/// # Safety
/// The processor has the features of `Isa::Avx2`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn product_f32(piece: &Piece<'_>) {
    product::<F32>(piece);
}

/// # Safety
/// The processor has the features of `Isa::Avx2`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn product_f16(piece: &Piece<'_>) {
    product::<F16>(piece);
}

/// # Safety
/// The processor has the features of `Isa::Avx2`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn product_bf16(piece: &Piece<'_>) {
    product::<BF16>(piece);
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn product<const KIND: u8>(piece: &Piece<'_>) {
    let mut row = 0;
    while row < piece.rows {
        let four = piece.rows - row >= 4;
        let mut token = 0;
        while token < piece.tokens() {
            let two = piece.tokens() - token >= 2;
            match (four, two) {
                (true, true) => tile::<KIND, 4, 2>(piece, row, token),
                (true, false) => tile::<KIND, 4, 1>(piece, row, token),
                (false, true) => tile::<KIND, 1, 2>(piece, row, token),
                (false, false) => tile::<KIND, 1, 1>(piece, row, token),
            }
            token += if two { 2 } else { 1 };
        }
        row += if four { 4 } else { 1 };
    }
}

/// Eight weights.
///
/// # Safety
/// They can be read at `at`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load<const KIND: u8>(at: *const u8) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        match KIND {
            F32 => _mm256_loadu_ps(at.cast()),
            F16 => _mm256_cvtph_ps(_mm_loadu_si128(at.cast())),
            _ => {
                let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn tile<const KIND: u8, const R: usize, const T: usize>(
    piece: &Piece<'_>,
    row: usize,
    token: usize,
) {
    let width = if KIND == F32 { 4 } else { 2 };
    let (whole, rest) = (piece.x.cols() / 8, piece.x.cols() % 8);
    let weights: [&[u8]; R] = std::array::from_fn(|r| piece.row(row + r));
    let values: [&[f32]; T] = std::array::from_fn(|t| piece.x.values_of(token + t));
    let mut sums = [[_mm256_setzero_ps(); T]; R];
    for col in (0..whole).map(|i| 8 * i) {
        // SAFETY: eight values from `col` on are inside of the row, in activations as in weights.
        unsafe {
            let x: [__m256; T] =
                std::array::from_fn(|t| _mm256_loadu_ps(values[t].as_ptr().add(col)));
            let w: [__m256; R] =
                std::array::from_fn(|r| load::<KIND>(weights[r].as_ptr().add(col * width)));
            add(&w, &x, &mut sums);
        }
    }
    if rest > 0 {
        let x = values.map(|values| {
            let mut padded = [0.0; 8];
            padded[..rest].copy_from_slice(&values[8 * whole..]);
            // SAFETY: eight values.
            unsafe { _mm256_loadu_ps(padded.as_ptr()) }
        });
        let w = weights.map(|weights| {
            let mut padded = [0; 32];
            padded[..rest * width].copy_from_slice(&weights[8 * whole * width..]);
            // SAFETY: at least eight weights.
            unsafe { load::<KIND>(padded.as_ptr()) }
        });
        add(&w, &x, &mut sums);
    }
    for (r, sums) in sums.into_iter().enumerate() {
        for (t, sum) in sums.into_iter().enumerate() {
            piece.out.set(token + t, row + r, fold(sum));
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add<const R: usize, const T: usize>(
    w: &[__m256; R],
    x: &[__m256; T],
    sums: &mut [[__m256; T]; R],
) {
    for (w, sums) in w.iter().zip(sums) {
        for (x, sum) in x.iter().zip(sums) {
            *sum = _mm256_fmadd_ps(*w, *x, *sum);
        }
    }
}

/// The sum of the lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fold(sum: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
}

/// Eight values.
///
/// # Safety
/// They can be read at `at`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn eight(at: *const f32) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe { _mm256_loadu_ps(at) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn magnitude(x: __m256) -> __m256 {
    _mm256_andnot_ps(_mm256_set1_ps(-0.0), x)
}

/// The largest lane.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn largest(x: __m256) -> f32 {
    let four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
}

/// Four times eight integers between -128 and 127 as bytes, in order.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn to_bytes([a, b, c, d]: [__m256i; 4]) -> __m256i {
    let words = [_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d)];
    let bytes = _mm256_packs_epi16(words[0], words[1]);
    _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
}

/// Halves away from zero, as `f32::round`: truncated, then one further where half a step or more was cut off.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn round_away(x: __m256) -> __m256i {
    let whole = _mm256_round_ps::<{ _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC }>(x);
    let cut = magnitude(_mm256_sub_ps(x, whole));
    let far = _mm256_cmp_ps::<_CMP_GE_OQ>(cut, _mm256_set1_ps(0.5));
    let sign = _mm256_and_ps(_mm256_set1_ps(-0.0), x);
    let step = _mm256_and_ps(far, _mm256_or_ps(sign, _mm256_set1_ps(1.0)));
    _mm256_cvttps_epi32(_mm256_add_ps(whole, step))
}

/// # Safety
/// The processor has the features of `Isa::Avx2`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn quantize_q8_0(x: &[f32], row: Q8Row<'_>) {
    let levels = row.levels.as_chunks_mut::<32>().0;
    for (b, (x, levels)) in x.as_chunks::<32>().0.iter().zip(levels).enumerate() {
        // SAFETY: four times eight of the 32 values.
        let x: [__m256; 4] = std::array::from_fn(|i| unsafe { eight(x.as_ptr().add(8 * i)) });
        let most = x.map(|x| magnitude(x));
        let most = _mm256_max_ps(_mm256_max_ps(most[0], most[1]), _mm256_max_ps(most[2], most[3]));
        let d = largest(most) / 127.0;
        let inverse = _mm256_set1_ps(if d == 0.0 { 0.0 } else { 1.0 / d });
        let whole = x.map(|x| round_away(_mm256_mul_ps(x, inverse)));
        let bytes = to_bytes(whole);
        // SAFETY: 32 levels.
        unsafe { _mm256_storeu_si256(levels.as_mut_ptr().cast(), bytes) };
        let pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
        let sum = fold_integers(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        let halves =
            _mm_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm_setr_ps(d, d * sum as f32, 0.0, 0.0));
        let values = _mm_cvtph_ps(halves);
        row.scales[b] = _mm_cvtss_f32(values);
        row.sums[b] = sum;
        row.scaled_sums[b] = _mm_cvtss_f32(_mm_shuffle_ps::<1>(values, values));
    }
}

/// The sum of the lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fold_integers(x: __m256i) -> i32 {
    let four = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
    let two = _mm_add_epi32(four, _mm_shuffle_epi32::<0b1110>(four));
    _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<1>(two)))
}

/// # Safety
/// The processor has the features of `Isa::Avx2`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn quantize_q8_k(x: &[f32], row: Q8KRow<'_>) {
    let levels = row.levels.as_chunks_mut::<256>().0;
    let sums = row.group_sums.as_chunks_mut::<16>().0;
    for (b, (x, levels)) in x.as_chunks::<256>().0.iter().zip(levels).enumerate() {
        let mut most = _mm256_setzero_ps();
        for x in x.as_chunks::<8>().0 {
            // SAFETY: eight values.
            most = _mm256_max_ps(most, magnitude(unsafe { eight(x.as_ptr()) }));
        }
        let most = largest(most);
        // The sign of the first of equals; where there is none (NaN alone) the block counts as zero, as in scalar.
        let extreme = x.iter().copied().find(|x| x.abs() == most).unwrap_or(0.0);
        let inverse = if extreme == 0.0 { 0.0 } else { -127.0 / extreme };
        let factor = _mm256_set1_ps(inverse);
        let (parts, bytes) = (x.as_chunks::<32>().0, levels.as_chunks_mut::<32>().0);
        for (i, (x, levels)) in parts.iter().zip(bytes).enumerate() {
            let whole = std::array::from_fn(|i| {
                // SAFETY: four times eight of the 32 values.
                let x = unsafe { eight(x.as_ptr().add(8 * i)) };
                let scaled = _mm256_min_ps(_mm256_mul_ps(x, factor), _mm256_set1_ps(127.0));
                _mm256_cvtps_epi32(scaled)
            });
            let bytes = to_bytes(whole);
            // SAFETY: 32 levels.
            unsafe { _mm256_storeu_si256(levels.as_mut_ptr().cast(), bytes) };
            let pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
            let fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
            for (half, fours) in
                [_mm256_castsi256_si128(fours), _mm256_extracti128_si256::<1>(fours)]
                    .into_iter()
                    .enumerate()
            {
                let two = _mm_add_epi32(fours, _mm_shuffle_epi32::<0b1110>(fours));
                let one = _mm_add_epi32(two, _mm_shuffle_epi32::<1>(two));
                sums[b][2 * i + half] = _mm_cvtsi128_si32(one) as i16;
            }
        }
        row.scales[b] = if inverse == 0.0 { 0.0 } else { 1.0 / inverse };
    }
}
