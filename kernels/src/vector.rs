//! Vector operations of a forward pass: norms, rotation, gating, softmax, conversion, attention.
//!
//! Each fast form agrees with the scalar reference within a few roundings (`tests/vector.rs` states the
//! bounds, against F64); conversions and `argmax` agree exactly. Wrong lengths panic here, never in a
//! kernel.

use crate::arch::vector::VectorTable;
use crate::arch::vector_table;
use crate::isa::Isa;
use crate::table::Kernels;

/// The vector operations of one instruction set. Holding one proves that the processor runs it.
#[derive(Clone, Copy)]
pub struct Vector {
    isa: Isa,
    pub(crate) table: &'static VectorTable,
}

impl Kernels {
    /// The vector operations of this set.
    pub fn vector(&self) -> Vector {
        Vector { isa: self.isa(), table: vector_table(self.isa()) }
    }
}

impl Vector {
    /// The best this processor has.
    pub fn detect() -> Vector {
        Kernels::detect().vector()
    }

    /// The set these operations were made for.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// `out = x / sqrt(mean(x²) + eps) * weight`; no weight counts as ones.
    ///
    /// # Panics
    /// If the lengths differ or are zero.
    pub fn rms_norm(&self, x: &[f32], weight: Option<&[f32]>, eps: f32, out: &mut [f32]) {
        assert!(!x.is_empty() && x.len() == out.len(), "rms_norm of unequal or empty rows");
        assert!(
            weight.is_none_or(|w| w.len() == x.len()),
            "rms_norm with a weight of another length"
        );
        self.table.rms_norm(x, weight, eps, out);
    }

    /// `rms_norm` without weight of every `head_len` values, in place.
    ///
    /// # Panics
    /// If `x` is not a whole number of heads.
    pub fn rms_norm_heads(&self, x: &mut [f32], head_len: usize, eps: f32) {
        assert!(head_len > 0 && x.len().is_multiple_of(head_len), "heads of unequal length");
        self.table.rms_norm_heads(x, head_len, eps);
    }

    /// Rotates neighbouring pairs of every `head_len` values, in place:
    /// `(a, b) = (a cos - b sin, a sin + b cos)`. `cos_sin` holds `cos, sin` of pair 0, of pair 1, …; where it
    /// is shorter than a head, the rest of the head stays as it is.
    ///
    /// # Panics
    /// If `x` is not a whole number of heads, or `cos_sin` is odd or longer than a head.
    pub fn rope_interleaved(&self, x: &mut [f32], head_len: usize, cos_sin: &[f32]) {
        assert!(head_len > 0 && x.len().is_multiple_of(head_len), "heads of unequal length");
        assert!(
            cos_sin.len() <= head_len && cos_sin.len().is_multiple_of(2),
            "rotation of {} values in a head of {head_len}",
            cos_sin.len()
        );
        self.table.rope_interleaved(x, head_len, cos_sin);
    }

    /// `out = silu(scale gate) * (scale up)`, `silu(z) = z / (1 + exp(-z))`. The scale is the router's
    /// score where it scales an expert's input; 1 elsewhere.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn silu_mul(&self, gate: &[f32], up: &[f32], scale: f32, out: &mut [f32]) {
        assert!(gate.len() == up.len() && up.len() == out.len(), "silu_mul of unequal rows");
        self.table.silu_mul(gate, up, scale, out);
    }

    /// `x += y`
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn add_assign(&self, x: &mut [f32], y: &[f32]) {
        assert!(x.len() == y.len(), "sum of unequal rows");
        self.table.add_assign(x, y);
    }

    /// `x *= factor`
    pub fn scale(&self, x: &mut [f32], factor: f32) {
        self.table.scale(x, factor);
    }

    /// `x = exp(x - max x) / sum`, in place. An entry more than 87 below the largest may come out as 1e-38
    /// instead of 0.
    pub fn softmax(&self, x: &mut [f32]) {
        if !x.is_empty() {
            self.table.softmax(x);
        }
    }

    /// The position of the largest value, the first of equals; NaN is never the largest. 0 if there is none.
    pub fn argmax(&self, x: &[f32]) -> usize {
        self.table.argmax(x)
    }

    /// The sum of the products.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn dot(&self, a: &[f32], b: &[f32]) -> f32 {
        assert!(a.len() == b.len(), "dot product of unequal rows");
        self.table.dot(a, b)
    }

    /// Widens F16 values, given as their bits; exact.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn f16_to_f32(&self, x: &[u16], out: &mut [f32]) {
        assert!(x.len() == out.len(), "conversion of unequal rows");
        self.table.f16_to_f32(x, out);
    }

    /// Rounds to F16, nearest even; too large becomes infinite.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn f32_to_f16(&self, x: &[f32], out: &mut [u16]) {
        assert!(x.len() == out.len(), "conversion of unequal rows");
        self.table.f32_to_f16(x, out);
    }
}

/// `1 / (1 + exp(-x))`
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}
