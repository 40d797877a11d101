//! The lanes of NEON, which every aarch64 processor has, and their table of vector operations.

#![allow(clippy::wildcard_imports, reason = "intrinsics")]

use std::arch::aarch64::*;
use std::arch::asm;

use super::lanes::Lanes;
use super::vector::vector_table;

vector_table!(NEON, neon, "neon", super::Four);

/// A NEON register.
#[derive(Clone, Copy)]
pub(crate) struct Four(float32x4_t);

impl Lanes for Four {
    const LEN: usize = 4;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(vdupq_n_f32(x)) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(vld1q_f32(from)) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the contract of the trait.
        unsafe { vst1q_f32(to, self.0) }
    }
    /// `fcvtl` belongs to the base instruction set; in assembly to stay clear of the `fp16` types.
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: the contract of the trait; the instruction touches registers only.
        unsafe {
            let half = vld1_u16(from);
            let wide: float32x4_t;
            asm!("fcvtl {wide:v}.4s, {half:v}.4h", wide = lateout(vreg) wide, half = in(vreg) half,
                 options(pure, nomem, nostack, preserves_flags));
            Self(wide)
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16) {
        // SAFETY: the contract of the trait; the instruction touches registers only. FPCR is at its default,
        // so it rounds to nearest even.
        unsafe {
            let half: uint16x4_t;
            asm!("fcvtn {half:v}.4h, {wide:v}.4s", half = lateout(vreg) half, wide = in(vreg) self.0,
                 options(pure, nomem, nostack, preserves_flags));
            vst1_u16(to, half);
        }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(vaddq_f32(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(vmulq_f32(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(vdivq_f32(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(vfmaq_f32(c.0, self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(vmaxq_f32(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(vminq_f32(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(vrndnq_f32(self.0)) }
    }
    #[inline(always)]
    unsafe fn exp2_integral(self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe {
            let biased = vaddq_s32(vcvtnq_s32_f32(self.0), vdupq_n_s32(127));
            Self(vreinterpretq_f32_s32(vshlq_n_s32::<23>(biased)))
        }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: the contract of the trait.
        unsafe { vaddvq_f32(self.0) }
    }
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        // SAFETY: the contract of the trait.
        unsafe { vmaxvq_f32(self.0) }
    }
    #[inline(always)]
    unsafe fn swap_neighbours(self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(vrev64q_f32(self.0)) }
    }
    #[inline(always)]
    unsafe fn repeat_even(self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(vtrn1q_f32(self.0, self.0)) }
    }
    #[inline(always)]
    unsafe fn repeat_odd(self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe { Self(vtrn2q_f32(self.0, self.0)) }
    }
}
