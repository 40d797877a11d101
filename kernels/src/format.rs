//! How numbers lie in a file, and in which form activations meet them.

use std::fmt;

/// The type of a weight tensor, as GGUF numbers it.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Format {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

/// How activations are held while they are multiplied.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Precision {
    /// F32 activations against weights read back to F32: slow, for goldens and comparisons.
    Exact,
    /// Activations rounded to 8 bits in blocks, integer sums inside a block.
    #[default]
    Int8,
}

/// The form of a row of activations.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ActivationForm {
    F32,
    /// Blocks of 32 levels with a scale, and with what Q8_1 adds to them: the scaled sum.
    Q8_0,
    /// Blocks of 256 levels with a scale, and the sums of each 16.
    Q8K,
}

impl Format {
    /// Every format, in the order of the kernel tables.
    pub const ALL: [Format; 9] = [
        Format::F32,
        Format::F16,
        Format::Bf16,
        Format::Q4_0,
        Format::Q4_1,
        Format::Q8_0,
        Format::Q4K,
        Format::Q5K,
        Format::Q6K,
    ];

    /// Values of one block; 1 where values stand alone.
    pub const fn block_len(self) -> usize {
        match self {
            Format::F32 | Format::F16 | Format::Bf16 => 1,
            Format::Q4_0 | Format::Q4_1 | Format::Q8_0 => 32,
            Format::Q4K | Format::Q5K | Format::Q6K => 256,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Format::F32 => 4,
            Format::F16 | Format::Bf16 => 2,
            Format::Q4_0 => 18,
            Format::Q4_1 => 20,
            Format::Q8_0 => 34,
            Format::Q4K => 144,
            Format::Q5K => 176,
            Format::Q6K => 210,
        }
    }

    /// The alignment that rows of this format keep inside an aligned tensor.
    pub const fn alignment(self) -> usize {
        if matches!(self, Format::F32) { 4 } else { 2 }
    }

    /// Bytes of a row of `cols` values; `None` if `cols` is no multiple of the block or the row has no size.
    pub const fn row_bytes(self, cols: usize) -> Option<usize> {
        if !cols.is_multiple_of(self.block_len()) {
            return None;
        }
        (cols / self.block_len()).checked_mul(self.block_bytes())
    }

    /// The name llama.cpp and this daemon print: `Q4_K`, `BF16`.
    pub const fn name(self) -> &'static str {
        match self {
            Format::F32 => "F32",
            Format::F16 => "F16",
            Format::Bf16 => "BF16",
            Format::Q4_0 => "Q4_0",
            Format::Q4_1 => "Q4_1",
            Format::Q8_0 => "Q8_0",
            Format::Q4K => "Q4_K",
            Format::Q5K => "Q5_K",
            Format::Q6K => "Q6_K",
        }
    }

    /// The number of this format in a GGUF file.
    pub const fn ggml_type(self) -> u32 {
        match self {
            Format::F32 => 0,
            Format::F16 => 1,
            Format::Q4_0 => 2,
            Format::Q4_1 => 3,
            Format::Q8_0 => 8,
            Format::Q4K => 12,
            Format::Q5K => 13,
            Format::Q6K => 14,
            Format::Bf16 => 30,
        }
    }

    /// The format of a GGUF type number, if it is one that these kernels read.
    pub fn from_ggml(number: u32) -> Option<Format> {
        Format::ALL.into_iter().find(|format| format.ggml_type() == number)
    }

    /// The form in which activations meet weights of this format.
    pub const fn activation_form(self, precision: Precision) -> ActivationForm {
        match (precision, self) {
            (Precision::Exact, _) | (_, Format::F32 | Format::F16 | Format::Bf16) => {
                ActivationForm::F32
            }
            (Precision::Int8, Format::Q4_0 | Format::Q4_1 | Format::Q8_0) => ActivationForm::Q8_0,
            (Precision::Int8, Format::Q4K | Format::Q5K | Format::Q6K) => ActivationForm::Q8K,
        }
    }

    pub(crate) const fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl ActivationForm {
    /// Values of one block of this form.
    pub const fn block_len(self) -> usize {
        match self {
            ActivationForm::F32 => 1,
            ActivationForm::Q8_0 => 32,
            ActivationForm::Q8K => 256,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_sizes_agree() {
        for format in Format::ALL {
            assert_eq!(Format::from_ggml(format.ggml_type()), Some(format));
            assert_eq!(Format::ALL[format.index()], format);
            assert_eq!(
                format.row_bytes(256),
                Some(256 / format.block_len() * format.block_bytes())
            );
        }
        assert_eq!(Format::from_ggml(9), None);
        assert_eq!(Format::Q4_0.row_bytes(33), None);
        assert_eq!(Format::F32.row_bytes(usize::MAX), None);
    }
}
