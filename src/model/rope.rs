//! Angles of the rotation of queries and keys.

/// Inverse frequencies of the pairs of a head, divided by the file's factors.
#[derive(Clone, Debug)]
pub(super) struct Rope {
    frequencies: Vec<f32>,
}

impl Rope {
    /// `theta^(-2i / head_len)` for each pair i, made in F64, rounded to F32 and divided by the factor;
    /// no factors count as ones. Multiplying theta along instead costs 6e-5 on logits past position 8192.
    pub(super) fn new(theta: f32, head_len: usize, factors: Option<&[f32]>) -> Rope {
        let frequency = |pair: usize| {
            let exponent = -2.0 * pair as f64 / head_len as f64;
            let frequency = f64::from(theta).powf(exponent) as f32;
            factors.map_or(frequency, |factors| frequency / factors[pair])
        };
        Rope { frequencies: (0..head_len / 2).map(frequency).collect() }
    }

    /// Cosine and sine of each pair's angle at `position`, alternating: one head's length.
    ///
    /// # Panics
    /// If `out` has another length.
    pub(super) fn cos_sin(&self, position: usize, out: &mut [f32]) {
        assert_eq!(out.len(), 2 * self.frequencies.len(), "length of a head");
        for (pair, frequency) in out.chunks_exact_mut(2).zip(&self.frequencies) {
            let (sin, cos) = (position as f32 * frequency).sin_cos();
            pair.copy_from_slice(&[cos, sin]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Rope;

    #[test]
    fn frequencies_fall_from_one_and_are_divided_by_factors() {
        let plain = Rope::new(500_000.0, 128, None);
        assert_eq!(plain.frequencies.len(), 64);
        assert_eq!(plain.frequencies[0], 1.0);
        // Wavelengths of Scout's step at 8192: pair 34 is below, pair 35 above.
        let wavelength = |pair: usize| std::f32::consts::TAU / plain.frequencies[pair];
        assert!((6694.0..6696.0).contains(&wavelength(34)), "{}", wavelength(34));
        assert!((8218.0..8220.0).contains(&wavelength(35)), "{}", wavelength(35));
        let mut factors = [1.0; 64];
        factors[35..].fill(16.0);
        let scaled = Rope::new(500_000.0, 128, Some(&factors));
        assert_eq!(scaled.frequencies[34], plain.frequencies[34]);
        assert_eq!(scaled.frequencies[35] * 16.0, plain.frequencies[35]);
    }

    #[test]
    fn position_zero_turns_nothing() {
        let mut turns = [0.0; 8];
        Rope::new(10_000.0, 8, None).cos_sin(0, &mut turns);
        assert_eq!(turns, [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0]);
        Rope::new(10_000.0, 8, None).cos_sin(3, &mut turns);
        assert_eq!(turns[..2], [3.0_f32.cos(), 3.0_f32.sin()]);
    }
}
