//! The lanes of AVX2 (with FMA and F16C) and of AVX-512, and their tables of vector operations.

#![allow(clippy::wildcard_imports, reason = "intrinsics")]

use std::arch::x86_64::*;

use super::lanes::Lanes;
use super::vector::vector_table;

vector_table!(AVX2, avx2, "avx2,fma,f16c", super::Eight);
vector_table!(AVX512, avx512, "avx2,fma,f16c,avx512f", super::Sixteen);

/// An AVX register.
#[derive(Clone, Copy)]
pub(crate) struct Eight(__m256);

impl Lanes for Eight {
    const LEN: usize = 8;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(_mm256_set1_ps(x)) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(_mm256_loadu_ps(from)) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the contract of the trait.
        unsafe { _mm256_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(_mm256_cvtph_ps(_mm_loadu_si128(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16) {
        // SAFETY: the contract of the trait.
        unsafe {
            let half = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0);
            _mm_storeu_si128(to.cast(), half);
        }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(_mm256_add_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(_mm256_mul_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(_mm256_div_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(_mm256_fmadd_ps(self.0, b.0, c.0)) }
    }
    // The instruction returns its second operand if either is NaN: hence `self` second.
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(_mm256_max_ps(b.0, self.0)) }
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(_mm256_min_ps(b.0, self.0)) }
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe {
            Self(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0))
        }
    }
    #[inline(always)]
    unsafe fn exp2_integral(self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe {
            let biased = _mm256_add_epi32(_mm256_cvtps_epi32(self.0), _mm256_set1_epi32(127));
            Self(_mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased)))
        }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: the contract of the trait.
        unsafe {
            let four =
                _mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        // SAFETY: the contract of the trait.
        unsafe {
            let four =
                _mm_max_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    unsafe fn swap_neighbours(self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(_mm256_permute_ps::<0b10_11_00_01>(self.0)) }
    }
    #[inline(always)]
    unsafe fn repeat_even(self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(_mm256_moveldup_ps(self.0)) }
    }
    #[inline(always)]
    unsafe fn repeat_odd(self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(_mm256_movehdup_ps(self.0)) }
    }
}

/// An AVX-512 register.
#[derive(Clone, Copy)]
pub(crate) struct Sixteen(__m512);

impl Lanes for Sixteen {
    const LEN: usize = 16;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(_mm512_set1_ps(x)) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(_mm512_loadu_ps(from)) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the contract of the trait.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16) {
        // SAFETY: the contract of the trait.
        unsafe {
            let half = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0);
            _mm256_storeu_si256(to.cast(), half);
        }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(_mm512_add_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(_mm512_mul_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(_mm512_div_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(_mm512_fmadd_ps(self.0, b.0, c.0)) }
    }
    // As for AVX: the second operand wins over a NaN.
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(_mm512_max_ps(b.0, self.0)) }
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(_mm512_min_ps(b.0, self.0)) }
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe {
            Self(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0))
        }
    }
    #[inline(always)]
    unsafe fn exp2_integral(self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe {
            let biased = _mm512_add_epi32(_mm512_cvtps_epi32(self.0), _mm512_set1_epi32(127));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased)))
        }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: the contract of the trait.
        unsafe { _mm512_reduce_add_ps(self.0) }
    }
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        // SAFETY: the contract of the trait.
        unsafe { _mm512_reduce_max_ps(self.0) }
    }
    #[inline(always)]
    unsafe fn swap_neighbours(self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(_mm512_permute_ps::<0b10_11_00_01>(self.0)) }
    }
    #[inline(always)]
    unsafe fn repeat_even(self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(_mm512_moveldup_ps(self.0)) }
    }
    #[inline(always)]
    unsafe fn repeat_odd(self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(_mm512_movehdup_ps(self.0)) }
    }
}
