//! The vector operations in plain Rust: the reference of every faster path, and the path of processors
//! without one. Sums run in F64, so this is also the most exact form.

use half::f16;

/// As `Kernels::rms_norm`.
pub(crate) fn rms_norm(x: &[f32], weight: Option<&[f32]>, eps: f32, out: &mut [f32]) {
    let factor = rms_factor(x, eps);
    match weight {
        Some(weight) => {
            for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
                *out = x * factor * w;
            }
        }
        None => {
            for (out, x) in out.iter_mut().zip(x) {
                *out = x * factor;
            }
        }
    }
}

/// As `Kernels::rms_norm_heads`.
pub(crate) fn rms_norm_heads(x: &mut [f32], head_len: usize, eps: f32) {
    for head in x.chunks_exact_mut(head_len) {
        let factor = rms_factor(head, eps);
        for x in head {
            *x *= factor;
        }
    }
}

fn rms_factor(x: &[f32], eps: f32) -> f32 {
    let sum: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    (1.0 / (sum / x.len() as f64 + f64::from(eps)).sqrt()) as f32
}

/// As `Kernels::rope_interleaved`.
pub(crate) fn rope_interleaved(x: &mut [f32], head_len: usize, cos_sin: &[f32]) {
    for head in x.chunks_exact_mut(head_len) {
        for (pair, turn) in head.chunks_exact_mut(2).zip(cos_sin.chunks_exact(2)) {
            let (a, b, cos, sin) = (pair[0], pair[1], turn[0], turn[1]);
            pair[0] = a * cos - b * sin;
            pair[1] = a * sin + b * cos;
        }
    }
}

/// As `Kernels::silu_mul`.
pub(crate) fn silu_mul(gate: &[f32], up: &[f32], scale: f32, out: &mut [f32]) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = silu(gate * scale) * (up * scale);
    }
}

/// z / (1 + exp(-z))
pub(crate) fn silu(z: f32) -> f32 {
    z / (1.0 + (-z).exp())
}

/// As `Kernels::add_assign`.
pub(crate) fn add_assign(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// As `Kernels::scale`.
pub(crate) fn scale(x: &mut [f32], factor: f32) {
    for x in x {
        *x *= factor;
    }
}

/// As `Kernels::softmax`.
pub(crate) fn softmax(x: &mut [f32]) {
    let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0f64;
    for x in x.iter_mut() {
        *x = (*x - largest).exp();
        sum += f64::from(*x);
    }
    let factor = (1.0 / sum) as f32;
    for x in x {
        *x *= factor;
    }
}

/// As `Kernels::dot`.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>() as f32
}

/// As `Kernels::argmax`.
pub(crate) fn argmax(x: &[f32]) -> usize {
    let (mut best, mut largest) = (0, f32::NEG_INFINITY);
    for (i, &x) in x.iter().enumerate() {
        if x > largest {
            (best, largest) = (i, x);
        }
    }
    best
}

/// As `Kernels::f16_to_f32`.
pub(crate) fn f16_to_f32(x: &[u16], out: &mut [f32]) {
    for (out, &x) in out.iter_mut().zip(x) {
        *out = f16::from_bits(x).to_f32_const();
    }
}

/// As `Kernels::f32_to_f16`.
pub(crate) fn f32_to_f16(x: &[f32], out: &mut [u16]) {
    for (out, &x) in out.iter_mut().zip(x) {
        *out = f16::from_f32_const(x).to_bits();
    }
}
