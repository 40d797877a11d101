//! AVX-512: F32, F16 and BF16 weights against F32 activations.
//!
//! Four rows and up to four tokens at a time, one register of sums for each pair; the sixteen lanes are folded at the
//! end. The order of additions is not that of the scalar reference: both are within `cols` roundings of the exact sum.

#![allow(clippy::wildcard_imports, reason = "intrinsics")]

use std::arch::x86_64::*;

use crate::table::Piece;

const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;

/// # Safety
/// The processor has the features of `Isa::Avx512Vnni`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn product_f32(piece: &Piece<'_>) {
    product::<F32>(piece);
}

/// # Safety
/// The processor has the features of `Isa::Avx512Vnni`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn product_f16(piece: &Piece<'_>) {
    product::<F16>(piece);
}

/// # Safety
/// The processor has the features of `Isa::Avx512Vnni`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn product_bf16(piece: &Piece<'_>) {
    product::<BF16>(piece);
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn product<const KIND: u8>(piece: &Piece<'_>) {
    let mut row = 0;
    while row < piece.rows {
        let four = piece.rows - row >= 4;
        let mut token = 0;
        while token < piece.tokens() {
            match (four, piece.tokens() - token >= 4) {
                (true, true) => tile::<KIND, 4, 4>(piece, row, token),
                (true, false) => tile::<KIND, 4, 1>(piece, row, token),
                (false, true) => tile::<KIND, 1, 4>(piece, row, token),
                (false, false) => tile::<KIND, 1, 1>(piece, row, token),
            }
            token += if piece.tokens() - token >= 4 { 4 } else { 1 };
        }
        row += if four { 4 } else { 1 };
    }
}

/// Up to sixteen weights from `at` on, those outside of `mask` zero.
///
/// # Safety
/// The weights of the mask can be read at `at`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn load<const KIND: u8>(at: *const u8, mask: u16) -> __m512 {
    // SAFETY: the caller's promise; masked lanes are not read.
    unsafe {
        match KIND {
            F32 => _mm512_maskz_loadu_ps(mask, at.cast()),
            F16 => _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, at.cast())),
            _ => {
                let words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn tile<const KIND: u8, const R: usize, const T: usize>(
    piece: &Piece<'_>,
    row: usize,
    token: usize,
) {
    let cols = piece.x.cols();
    let width = if KIND == F32 { 4 } else { 2 };
    let weights: [*const u8; R] = std::array::from_fn(|r| piece.row(row + r).as_ptr());
    let values: [*const f32; T] = std::array::from_fn(|t| piece.x.values_of(token + t).as_ptr());
    let mut sums = [[_mm512_setzero_ps(); T]; R];
    let mut step = |col: usize, mask: u16| {
        // SAFETY: `col` and the lanes of the mask lie below `cols`, in weights as in activations.
        let x: [__m512; T] =
            std::array::from_fn(|t| unsafe { _mm512_maskz_loadu_ps(mask, values[t].add(col)) });
        for (weights, sums) in weights.iter().zip(&mut sums) {
            // SAFETY: as above.
            let w = unsafe { load::<KIND>(weights.add(col * width), mask) };
            for (sum, x) in sums.iter_mut().zip(x) {
                *sum = _mm512_fmadd_ps(w, x, *sum);
            }
        }
    };
    for col in (0..cols / 16).map(|i| 16 * i) {
        step(col, u16::MAX);
    }
    if !cols.is_multiple_of(16) {
        step(cols / 16 * 16, u16::MAX >> (16 - cols % 16));
    }
    for (r, sums) in sums.into_iter().enumerate() {
        for (t, sum) in sums.into_iter().enumerate() {
            piece.out.set(token + t, row + r, _mm512_reduce_add_ps(sum));
        }
    }
}
