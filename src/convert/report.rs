//! What a conversion did to each tensor.

use serde::Serialize;

/// The difference between values and what they read back as.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Loss {
    square: f64,
    error_square: f64,
    largest: f32,
    error_largest: f32,
}

impl Loss {
    /// Adds a row: its values, and what they read back as.
    pub(super) fn add(&mut self, values: &[f32], back: &[f32]) {
        // Eight sums side by side, so that the loop vectorizes; F64 only across rows.
        const LANES: usize = 8;
        let (mut square, mut error_square) = ([0.0_f32; LANES], [0.0_f32; LANES]);
        let (mut largest, mut error_largest) = ([0.0_f32; LANES], [0.0_f32; LANES]);
        for (values, back) in values.chunks(LANES).zip(back.chunks(LANES)) {
            for (lane, (value, back)) in values.iter().zip(back).enumerate() {
                let error = value - back;
                square[lane] += value * value;
                error_square[lane] += error * error;
                largest[lane] = largest[lane].max(value.abs());
                error_largest[lane] = error_largest[lane].max(error.abs());
            }
        }
        self.square += square.iter().map(|&sum| f64::from(sum)).sum::<f64>();
        self.error_square += error_square.iter().map(|&sum| f64::from(sum)).sum::<f64>();
        self.largest = largest.into_iter().fold(self.largest, f32::max);
        self.error_largest = error_largest.into_iter().fold(self.error_largest, f32::max);
    }

    pub(super) fn merge(&mut self, other: &Loss) {
        self.square += other.square;
        self.error_square += other.error_square;
        self.largest = self.largest.max(other.largest);
        self.error_largest = self.error_largest.max(other.error_largest);
    }

    /// The sums as text that reads back bit for bit, for the journal.
    pub(super) fn to_text(self) -> String {
        let (square, error_square) = (self.square.to_bits(), self.error_square.to_bits());
        let (largest, error_largest) = (self.largest.to_bits(), self.error_largest.to_bits());
        format!("{square:x} {error_square:x} {largest:x} {error_largest:x}")
    }

    pub(super) fn from_text(text: &str) -> Option<Loss> {
        let mut words = text.split(' ');
        let mut wide = || u64::from_str_radix(words.next()?, 16).ok();
        let (square, error_square) = (f64::from_bits(wide()?), f64::from_bits(wide()?));
        let mut narrow = || u32::from_str_radix(words.next()?, 16).ok();
        let (largest, error_largest) = (f32::from_bits(narrow()?), f32::from_bits(narrow()?));
        words.next().is_none().then_some(Loss { square, error_square, largest, error_largest })
    }

    /// Root mean square of the error, relative to that of the values.
    pub(super) fn rms(&self) -> f64 {
        if self.square > 0.0 { (self.error_square / self.square).sqrt() } else { 0.0 }
    }

    /// Largest error, relative to the largest value of the tensor.
    pub(super) fn max(&self) -> f64 {
        if self.largest > 0.0 {
            f64::from(self.error_largest) / f64::from(self.largest)
        } else {
            0.0
        }
    }
}

/// One tensor of the report.
#[derive(Clone, Debug, Serialize)]
pub struct TensorReport {
    pub name: String,
    pub shape: Vec<u64>,
    #[serde(rename = "type")]
    pub format: &'static str,
    /// The type that was wanted, where its blocks do not fit the rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instead_of: Option<&'static str>,
    pub bytes: u64,
    pub rms_error: f64,
    pub max_error: f64,
}

/// The whole conversion.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub file: String,
    pub architecture: String,
    pub name: String,
    pub recipe: String,
    pub parameters: u64,
    /// Of the file.
    pub bytes: u64,
    pub bits_per_weight: f64,
    /// RMS error over all tensors.
    pub rms_error: f64,
    pub tensors: Vec<TensorReport>,
    /// Tensors of the source that have no place in the file.
    pub skipped: Vec<String>,
    /// What a reader should know.
    pub notes: Vec<String>,
    pub seconds: f64,
    pub threads: usize,
    /// Pieces taken over from an interrupted run, of all pieces.
    pub resumed_pieces: usize,
    pub pieces: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loss_is_relative() {
        let mut loss = Loss::default();
        assert_eq!((loss.rms(), loss.max()), (0.0, 0.0));
        loss.add(&[3.0, 4.0], &[3.0, 3.0]);
        assert!((loss.rms() - 0.2).abs() < 1e-12);
        assert!((loss.max() - 0.25).abs() < 1e-12);
        assert_eq!(Loss::from_text(&loss.to_text()), Some(loss));
        assert_eq!(Loss::from_text("3ff0000000000000 0 0"), None);
        let mut other = Loss::default();
        other.add(&[0.0, -8.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], &[0.0; 9]);
        loss.merge(&other);
        assert_eq!(loss.max(), 1.0);
        assert!((loss.rms() - (65.0_f64 / 89.0).sqrt()).abs() < 1e-9);
    }
}
