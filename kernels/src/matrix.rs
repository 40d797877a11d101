//! Weights where they lie.

use std::fmt;
use std::ops::Range;

use crate::format::Format;
use crate::quantize::dequantize_row;

/// `rows` times `cols` weights, row after row, as they lie in the file.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    format: Format,
    rows: usize,
    cols: usize,
    row_bytes: usize,
    bytes: &'a [u8],
}

/// Why bytes are not the matrix they should be.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum MatrixError {
    Alignment { format: Format },
    Columns { format: Format, cols: usize },
    Length { expected: usize, found: usize },
    TooLarge { rows: usize, cols: usize },
}

impl<'a> Matrix<'a> {
    /// # Errors
    /// If `cols` is no whole number of blocks, or `bytes` has another length than the rows or is badly aligned.
    pub fn new(
        format: Format,
        rows: usize,
        cols: usize,
        bytes: &'a [u8],
    ) -> Result<Matrix<'a>, MatrixError> {
        if !cols.is_multiple_of(format.block_len()) {
            return Err(MatrixError::Columns { format, cols });
        }
        let too_large = MatrixError::TooLarge { rows, cols };
        let row_bytes = format.row_bytes(cols).ok_or(too_large)?;
        let expected = row_bytes.checked_mul(rows).ok_or(too_large)?;
        if bytes.len() != expected {
            return Err(MatrixError::Length { expected, found: bytes.len() });
        }
        if !bytes.is_empty() && !bytes.as_ptr().addr().is_multiple_of(format.alignment()) {
            return Err(MatrixError::Alignment { format });
        }
        Ok(Matrix { format, rows, cols, row_bytes, bytes })
    }

    pub fn format(&self) -> Format {
        self.format
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    pub(crate) fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// The matrix of some of the rows.
    ///
    /// # Panics
    /// If the range is not inside the rows.
    pub fn rows_range(&self, range: Range<usize>) -> Matrix<'a> {
        assert!(
            range.start <= range.end && range.end <= self.rows,
            "rows {range:?} of {}",
            self.rows
        );
        let bytes = &self.bytes[range.start * self.row_bytes..range.end * self.row_bytes];
        Matrix { rows: range.len(), bytes, ..*self }
    }

    /// Reads one row back to F32.
    ///
    /// # Panics
    /// If there is no such row, or `out` has not `cols` values.
    pub fn row_to_f32(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols, "length of a row");
        dequantize_row(self.format, self.rows_range(row..row + 1).bytes, out);
    }
}

impl fmt::Debug for Matrix<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} x {} {}", self.rows, self.cols, self.format)
    }
}

impl fmt::Display for MatrixError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MatrixError::Alignment { format } => {
                write!(f, "{format} weights are not aligned to {}", format.alignment())
            }
            MatrixError::Columns { format, cols } => {
                write!(f, "rows of {cols} values are no whole blocks of {format}")
            }
            MatrixError::Length { expected, found } => {
                write!(f, "matrix of {expected} bytes has {found}")
            }
            MatrixError::TooLarge { rows, cols } => {
                write!(f, "matrix of {rows} x {cols} values has no size in memory")
            }
        }
    }
}

impl std::error::Error for MatrixError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_shapes_are_named() {
        let words = [0u32; 27];
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let new = |format, rows, cols, bytes| Matrix::new(format, rows, cols, bytes).map(|_| ());
        assert_eq!(new(Format::Q4_0, 3, 64, &bytes), Ok(()));
        assert_eq!(
            new(Format::Q4_0, 3, 65, &bytes),
            Err(MatrixError::Columns { format: Format::Q4_0, cols: 65 })
        );
        assert_eq!(
            new(Format::Q4_0, 3, 64, &bytes[..100]),
            Err(MatrixError::Length { expected: 108, found: 100 })
        );
        assert_eq!(
            new(Format::F16, usize::MAX, 64, &bytes),
            Err(MatrixError::TooLarge { rows: usize::MAX, cols: 64 })
        );
        assert_eq!(
            new(Format::F16, 1, 2, &bytes[1..5]),
            Err(MatrixError::Alignment { format: Format::F16 })
        );
    }
}
