//! The vector operations over `Lanes`, written once for every instruction set. What is left over after
//! whole registers goes through `vector_scalar`.
//!
//! # Safety of every function
//! The processor has the instruction set of `L`, and the body is inlined into a function with the target
//! features of `L`. Lengths are as the wrappers in `vector` assert them.

use super::lanes::Lanes;
use super::vector_scalar as scalar;

#[inline(always)]
pub(crate) unsafe fn rms_norm<L: Lanes>(
    x: &[f32],
    weight: Option<&[f32]>,
    eps: f32,
    out: &mut [f32],
) {
    // SAFETY: the contract of this file; `whole` is within all of the equally long slices.
    unsafe {
        let factor = rms_factor::<L>(x, eps);
        let whole = whole::<L>(x.len());
        let factors = L::splat(factor);
        match weight {
            Some(weight) => {
                for i in (0..whole).step_by(L::LEN) {
                    let w = L::load(weight.as_ptr().add(i));
                    L::load(x.as_ptr().add(i)).mul(factors).mul(w).store(out.as_mut_ptr().add(i));
                }
                for i in whole..x.len() {
                    out[i] = x[i] * factor * weight[i];
                }
            }
            None => {
                for i in (0..whole).step_by(L::LEN) {
                    L::load(x.as_ptr().add(i)).mul(factors).store(out.as_mut_ptr().add(i));
                }
                for i in whole..x.len() {
                    out[i] = x[i] * factor;
                }
            }
        }
    }
}

#[inline(always)]
pub(crate) unsafe fn rms_norm_heads<L: Lanes>(x: &mut [f32], head_len: usize, eps: f32) {
    for head in x.chunks_exact_mut(head_len) {
        // SAFETY: the contract of this file.
        unsafe {
            let factor = rms_factor::<L>(head, eps);
            scale::<L>(head, factor);
        }
    }
}

/// `1 / sqrt(mean(x²) + eps)`
#[inline(always)]
unsafe fn rms_factor<L: Lanes>(x: &[f32], eps: f32) -> f32 {
    // SAFETY: the contract of this file.
    let sum = unsafe { dot::<L>(x, x) };
    1.0 / (sum / x.len() as f32 + eps).sqrt()
}

/// Four accumulators hide the latency of the fused multiply-add and shorten the chain of roundings.
#[inline(always)]
pub(crate) unsafe fn dot<L: Lanes>(a: &[f32], b: &[f32]) -> f32 {
    // SAFETY: the contract of this file; all loads end at or before `whole`.
    unsafe {
        let mut sums = [L::splat(0.0); 4];
        let (pa, pb) = (a.as_ptr(), b.as_ptr());
        let by_four = a.len() / (4 * L::LEN) * (4 * L::LEN);
        for i in (0..by_four).step_by(4 * L::LEN) {
            for (j, sum) in sums.iter_mut().enumerate() {
                let at = i + j * L::LEN;
                *sum = L::load(pa.add(at)).mul_add(L::load(pb.add(at)), *sum);
            }
        }
        let whole = whole::<L>(a.len());
        for i in (by_four..whole).step_by(L::LEN) {
            sums[0] = L::load(pa.add(i)).mul_add(L::load(pb.add(i)), sums[0]);
        }
        let sum = sums[0].add(sums[1]).add(sums[2].add(sums[3])).sum();
        if whole == a.len() { sum } else { sum + scalar::dot(&a[whole..], &b[whole..]) }
    }
}

/// Per register: `z * (cos, cos, …) + swapped z * (-sin, sin, …)`.
#[inline(always)]
pub(crate) unsafe fn rope_interleaved<L: Lanes>(x: &mut [f32], head_len: usize, cos_sin: &[f32]) {
    // SAFETY: the contract of this file; `cos_sin` is no longer than a head, so all accesses are inside both.
    unsafe {
        let whole = whole::<L>(cos_sin.len());
        let signs = alternating::<L>();
        for head in x.chunks_exact_mut(head_len) {
            let z = head.as_mut_ptr();
            for i in (0..whole).step_by(L::LEN) {
                let turn = L::load(cos_sin.as_ptr().add(i));
                let v = L::load(z.add(i));
                let crossed = v.swap_neighbours().mul(turn.repeat_odd().mul(signs));
                v.mul_add(turn.repeat_even(), crossed).store(z.add(i));
            }
            let rest = cos_sin.len() - whole;
            if rest > 0 {
                scalar::rope_interleaved(&mut head[whole..whole + rest], rest, &cos_sin[whole..]);
            }
        }
    }
}

/// (-1, 1, -1, 1, …)
#[inline(always)]
unsafe fn alternating<L: Lanes>() -> L {
    const SIGNS: [f32; 16] =
        [-1., 1., -1., 1., -1., 1., -1., 1., -1., 1., -1., 1., -1., 1., -1., 1.];
    const { assert!(L::LEN <= SIGNS.len()) };
    // SAFETY: the contract of this file; the constant is long enough.
    unsafe { L::load(SIGNS.as_ptr()) }
}

#[inline(always)]
pub(crate) unsafe fn silu_mul<L: Lanes>(gate: &[f32], up: &[f32], scale: f32, out: &mut [f32]) {
    // SAFETY: the contract of this file; all accesses end at or before `whole`.
    unsafe {
        let whole = whole::<L>(gate.len());
        let (scales, ones) = (L::splat(scale), L::splat(1.0));
        let minus = L::splat(-1.0);
        for i in (0..whole).step_by(L::LEN) {
            let g = L::load(gate.as_ptr().add(i)).mul(scales);
            let u = L::load(up.as_ptr().add(i)).mul(scales);
            let silu = g.div(g.mul(minus).exp().add(ones));
            silu.mul(u).store(out.as_mut_ptr().add(i));
        }
        scalar::silu_mul(&gate[whole..], &up[whole..], scale, &mut out[whole..]);
    }
}

#[inline(always)]
pub(crate) unsafe fn add_assign<L: Lanes>(x: &mut [f32], y: &[f32]) {
    // SAFETY: the contract of this file; all accesses end at or before `whole`.
    unsafe {
        let whole = whole::<L>(x.len());
        for i in (0..whole).step_by(L::LEN) {
            let to = x.as_mut_ptr().add(i);
            L::load(to).add(L::load(y.as_ptr().add(i))).store(to);
        }
        scalar::add_assign(&mut x[whole..], &y[whole..]);
    }
}

#[inline(always)]
pub(crate) unsafe fn scale<L: Lanes>(x: &mut [f32], factor: f32) {
    // SAFETY: the contract of this file; all accesses end at or before `whole`.
    unsafe {
        let whole = whole::<L>(x.len());
        for i in (0..whole).step_by(L::LEN) {
            let to = x.as_mut_ptr().add(i);
            L::load(to).mul(L::splat(factor)).store(to);
        }
        scalar::scale(&mut x[whole..], factor);
    }
}

#[inline(always)]
pub(crate) unsafe fn softmax<L: Lanes>(x: &mut [f32]) {
    // SAFETY: the contract of this file; all accesses end at or before `whole`.
    unsafe {
        let whole = whole::<L>(x.len());
        let largest = largest::<L>(x);
        let (shift, to) = (L::splat(-largest), x.as_mut_ptr());
        let mut sums = L::splat(0.0);
        for i in (0..whole).step_by(L::LEN) {
            let e = L::load(to.add(i)).add(shift).exp();
            sums = sums.add(e);
            e.store(to.add(i));
        }
        let mut sum = sums.sum();
        for x in &mut x[whole..] {
            *x = (*x - largest).exp();
            sum += *x;
        }
        scale::<L>(x, 1.0 / sum);
    }
}

#[inline(always)]
unsafe fn largest<L: Lanes>(x: &[f32]) -> f32 {
    // SAFETY: the contract of this file; all accesses end at or before `whole`.
    unsafe {
        let whole = whole::<L>(x.len());
        let mut lanes = L::splat(f32::NEG_INFINITY);
        for i in (0..whole).step_by(L::LEN) {
            // The accumulator stands second: a NaN in x must not displace it for good.
            lanes = lanes.max(L::load(x.as_ptr().add(i)));
        }
        x[whole..].iter().copied().fold(lanes.largest(), f32::max)
    }
}

/// In chunks: the largest of each is found by lanes, and only a chunk that beats the best so far is
/// searched for where it stands.
#[inline(always)]
pub(crate) unsafe fn argmax<L: Lanes>(x: &[f32]) -> usize {
    const CHUNK: usize = 256;
    let (mut best, mut best_value) = (0, f32::NEG_INFINITY);
    for (n, chunk) in x.chunks(CHUNK).enumerate() {
        // SAFETY: the contract of this file.
        let bound = unsafe { largest::<L>(chunk) };
        // Not `bound > best_value`: with a NaN among the lanes the bound says nothing.
        if bound <= best_value {
            continue;
        }
        for (i, &x) in chunk.iter().enumerate() {
            if x > best_value {
                (best, best_value) = (n * CHUNK + i, x);
            }
        }
    }
    best
}

#[inline(always)]
pub(crate) unsafe fn f16_to_f32<L: Lanes>(x: &[u16], out: &mut [f32]) {
    // SAFETY: the contract of this file; all accesses end at or before `whole`.
    unsafe {
        let whole = whole::<L>(x.len());
        for i in (0..whole).step_by(L::LEN) {
            L::load_f16(x.as_ptr().add(i)).store(out.as_mut_ptr().add(i));
        }
        scalar::f16_to_f32(&x[whole..], &mut out[whole..]);
    }
}

#[inline(always)]
pub(crate) unsafe fn f32_to_f16<L: Lanes>(x: &[f32], out: &mut [u16]) {
    // SAFETY: the contract of this file; all accesses end at or before `whole`.
    unsafe {
        let whole = whole::<L>(x.len());
        for i in (0..whole).step_by(L::LEN) {
            L::load(x.as_ptr().add(i)).store_f16(out.as_mut_ptr().add(i));
        }
        scalar::f32_to_f16(&x[whole..], &mut out[whole..]);
    }
}

/// The largest multiple of the lane count within `len`.
#[inline(always)]
fn whole<L: Lanes>(len: usize) -> usize {
    len / L::LEN * L::LEN
}
