//! One register of F32 lanes, as the vector operations see it: the minimal trait that each instruction
//! set implements, so that an algorithm is written once (`vector_lanes`, `attention_lanes`).
//!
//! All methods are `#[inline(always)]` and end in the body of an outer function that carries
//! `#[target_feature]`; outside such a body they must not be called. Only those outer functions enter a
//! table.

/// A register of `LEN` F32 lanes.
///
/// # Safety of every method
/// The processor has the instruction set of the implementation, pointers are valid for `LEN` elements
/// (alignment of the element suffices).
pub(crate) trait Lanes: Copy {
    const LEN: usize;
    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// Loads `LEN` F16 values and widens them; exact.
    unsafe fn load_f16(from: *const u16) -> Self;
    /// Rounds to F16, nearest even, and stores `LEN` values.
    unsafe fn store_f16(self, to: *mut u16);
    unsafe fn add(self, b: Self) -> Self;
    unsafe fn mul(self, b: Self) -> Self;
    unsafe fn div(self, b: Self) -> Self;
    /// `self * b + c`, rounded once.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
    /// The larger of each lane; a NaN in `self` passes through.
    unsafe fn max(self, b: Self) -> Self;
    /// The smaller of each lane; a NaN in `self` passes through.
    unsafe fn min(self, b: Self) -> Self;
    /// Rounds to the nearest integer, ties to even.
    unsafe fn round(self) -> Self;
    /// `2^self` for integral lanes in -126..=127.
    unsafe fn exp2_integral(self) -> Self;
    unsafe fn sum(self) -> f32;
    /// The largest lane; unspecified if a lane is NaN.
    unsafe fn largest(self) -> f32;
    /// (l1, l0, l3, l2, …)
    unsafe fn swap_neighbours(self) -> Self;
    /// (l0, l0, l2, l2, …)
    unsafe fn repeat_even(self) -> Self;
    /// (l1, l1, l3, l3, …)
    unsafe fn repeat_odd(self) -> Self;

    /// `exp(self)`, relative error below 2e-7 for lanes in -87.3..=88.0 (tested against F64). Larger lanes
    /// give `exp(88)`, smaller ones `exp(-87.3)` = 1.2e-38; NaN stays NaN.
    ///
    /// `e^x = 2^n e^r` with `n = round(x / ln 2)`, so |r| ≤ ln 2 / 2. There `1 + r + r² p(r)` with p of degree
    /// 4, interpolated at the Chebyshev nodes, misses e^r by 1e-8 relative; the rest is rounding. ln 2 is
    /// taken off in two parts, of which the first has nine bits, so that its product with n is exact.
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        // SAFETY: the contract of the trait.
        unsafe {
            let x = self.min(Self::splat(EXP_ARGUMENT_MAX)).max(Self::splat(EXP_ARGUMENT_MIN));
            let n = x.mul(Self::splat(std::f32::consts::LOG2_E)).round();
            let r = n.mul_add(Self::splat(-LN_2_HIGH), x);
            let r = n.mul_add(Self::splat(-LN_2_LOW), r);
            let mut p = Self::splat(EXP_POLYNOMIAL[0]);
            p = p.mul_add(r, Self::splat(EXP_POLYNOMIAL[1]));
            p = p.mul_add(r, Self::splat(EXP_POLYNOMIAL[2]));
            p = p.mul_add(r, Self::splat(EXP_POLYNOMIAL[3]));
            p = p.mul_add(r, Self::splat(EXP_POLYNOMIAL[4]));
            let e = p.mul(r).mul_add(r, r).add(Self::splat(1.0));
            e.mul(n.exp2_integral())
        }
    }
}

/// An element a cache may hold: F32, or F16 as its bits.
pub(crate) trait Element: Copy {
    /// # Safety
    /// As for `Lanes::load`.
    unsafe fn load<L: Lanes>(from: *const Self) -> L;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const f32) -> L {
        // SAFETY: the caller's promise.
        unsafe { L::load(from) }
    }
}

impl Element for u16 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const u16) -> L {
        // SAFETY: the caller's promise.
        unsafe { L::load_f16(from) }
    }
}

/// What the scalar reference needs of an element.
pub(crate) trait Widen: Copy {
    fn widen(self) -> f64;
}

impl Widen for f32 {
    fn widen(self) -> f64 {
        f64::from(self)
    }
}

impl Widen for u16 {
    fn widen(self) -> f64 {
        half::f16::from_bits(self).to_f64_const()
    }
}

/// 127 ln 2, rounded down: beyond it 2^n has no exponent.
const EXP_ARGUMENT_MAX: f32 = 88.02969;
/// -126 ln 2, rounded towards zero: the smallest normal number.
const EXP_ARGUMENT_MIN: f32 = -87.33654;
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// Of r⁴ first.
const EXP_POLYNOMIAL: [f32; 5] = [0.001_392_617_8, 0.008_363_173, 0.041_666_556, 0.166_665_78, 0.5];
