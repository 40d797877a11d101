//! Pieces: the parts of a tensor that are read, rounded and written at once.
//!
//! A piece is a range of rows of one tensor. It is small enough that several threads with a piece
//! each stay within the memory bound, and an expert is never split, because its rows are columns of
//! the checkpoint: all of it must be read to get any of them.

use std::ops::Range;

use scoutd_kernels::Format;
use scoutd_kernels::quantize::{dequantize_row, quantize_row};

use super::error::ConvertError;
use super::input::Input;
use super::mapping::Source;
use super::report::Loss;

/// A tensor of the file to be written, with its place.
#[derive(Clone, Debug)]
pub(super) struct Tensor {
    pub(super) name: String,
    /// Fastest dimension first.
    pub(super) shape: Vec<u64>,
    pub(super) format: Format,
    /// The format that the recipe wanted, where its blocks do not fit the rows.
    pub(super) instead_of: Option<Format>,
    pub(super) source: Source,
    /// From the beginning of the file.
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

/// Rows `rows` of tensor number `tensor`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Piece {
    pub(super) tensor: usize,
    pub(super) rows: Range<u64>,
}

impl Tensor {
    /// Rows and columns of the matrix that all outer dimensions make together. A permuted bias is a
    /// column, so that its "rows" can change places.
    pub(super) fn view(&self) -> (u64, u64) {
        let values = self.values();
        match (&self.source, self.shape.len()) {
            (Source::Interleaved { .. }, 1) => (values, 1),
            _ => (values / self.shape[0], self.shape[0]),
        }
    }

    pub(super) fn values(&self) -> u64 {
        self.shape.iter().product()
    }

    pub(super) fn row_bytes(&self) -> u64 {
        self.bytes / self.view().0
    }

    /// Where a piece lies in the file.
    pub(super) fn place(&self, piece: &Piece) -> Range<u64> {
        let row_bytes = self.row_bytes();
        self.offset + piece.rows.start * row_bytes..self.offset + piece.rows.end * row_bytes
    }

    /// The unit that a piece must hold whole numbers of, in rows.
    fn unit(&self) -> u64 {
        let (rows, _) = self.view();
        match &self.source {
            Source::Experts { .. } => self.shape[1],
            Source::Interleaved { heads, .. } => rows / heads,
            Source::Plain { .. } | Source::Stack { .. } | Source::Values(_) => 1,
        }
    }
}

/// All pieces, in the order in which they are best read: gate, up and down of an expert one after
/// the other, because gate and up share the pages of one slice.
pub(super) fn cut(tensors: &[Tensor]) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut group = 0;
    for (index, tensor) in tensors.iter().enumerate() {
        let (rows, cols) = tensor.view();
        let unit = tensor.unit();
        let in_experts = matches!(tensor.source, Source::Experts { .. } | Source::Stack { .. });
        let continues = in_experts
            && index > 0
            && layer_of(&tensors[index - 1].name) == layer_of(&tensor.name)
            && matches!(tensors[index - 1].source, Source::Experts { .. } | Source::Stack { .. });
        if !continues {
            group = index;
        }
        let per_piece = match tensor.source {
            Source::Experts { .. } => unit,
            _ => (PIECE_VALUES / cols / unit).max(1) * unit,
        };
        // A stack's pieces must end where its experts end: each is a tensor of its own.
        let span = if in_experts { tensor.shape[1] } else { rows };
        for first in (0..rows).step_by(span as usize) {
            for start in (first..first + span).step_by(per_piece as usize) {
                let end = (start + per_piece).min(first + span);
                let expert = if in_experts { start / span } else { 0 };
                pieces.push((group, expert, Piece { tensor: index, rows: start..end }));
            }
        }
    }
    pieces.sort_by_key(|(group, expert, piece)| (*group, *expert, piece.tensor, piece.rows.start));
    pieces.into_iter().map(|(_, _, piece)| piece).collect()
}

fn layer_of(name: &str) -> Option<&str> {
    name.strip_prefix("blk.")?.split('.').next()
}

/// The most bytes a worker holds for any of the pieces.
pub(super) fn worker_bytes(tensors: &[Tensor], pieces: &[Piece]) -> u64 {
    let raw = pieces.iter().map(|piece| {
        let (_, cols) = tensors[piece.tensor].view();
        (piece.rows.end - piece.rows.start) * cols * 4
    });
    raw.max().unwrap_or(0) + 2 * OUT_BYTES as u64
}

/// Takes the bytes for a place in the file.
pub(super) type Write<'a> = dyn FnMut(u64, &[u8]) -> Result<(), ConvertError> + 'a;

/// Buffers of one thread, reused from piece to piece.
#[derive(Default)]
pub(super) struct Worker {
    raw: Aligned,
    out: Aligned,
    band: Vec<f32>,
    back: Vec<f32>,
}

impl Worker {
    /// Converts one piece; `write` gets the bytes in order, from their place in the file on.
    pub(super) fn convert(
        &mut self,
        input: &dyn Input,
        tensor: &Tensor,
        piece: &Piece,
        write: &mut Write,
    ) -> Result<Loss, ConvertError> {
        let (_, cols) = tensor.view();
        let cols = cols as usize;
        let source = self.fetch(input, tensor, piece)?;
        let row_bytes = tensor.row_bytes() as usize;
        let rows_per_write = (OUT_BYTES / row_bytes.max(1)).max(1) as u64;
        let rows_per_band = (BAND_VALUES / cols).clamp(1, BAND_ROWS) as u64;
        let mut loss = Loss::default();
        let mut at = tensor.place(piece).start;
        for start in piece.rows.clone().step_by(rows_per_write as usize) {
            let end = (start + rows_per_write).min(piece.rows.end);
            let out = self.out.get((end - start) as usize * row_bytes);
            for band_start in (start..end).step_by(rows_per_band as usize) {
                let band_end = (band_start + rows_per_band).min(end);
                self.band.resize((band_end - band_start) as usize * cols, 0.0);
                self.back.resize(cols, 0.0);
                let within = band_start - piece.rows.start..band_end - piece.rows.start;
                source.decode(self.raw.held(), within, cols, &mut self.band);
                for (row, values) in (band_start..).zip(self.band.chunks_exact(cols)) {
                    let from = (row - start) as usize * row_bytes;
                    let bytes = &mut out[from..from + row_bytes];
                    let named = |reason| named(input, tensor, &source, row, reason);
                    finite(values).map_err(named)?;
                    if source.copies(tensor.format) {
                        bytes.copy_from_slice(source.row(self.raw.held(), row - piece.rows.start));
                    } else {
                        quantize_row(tensor.format, values, bytes);
                    }
                    dequantize_row(tensor.format, bytes, &mut self.back);
                    finite(&self.back).map_err(|_| {
                        named(format!("has values too large for {}", tensor.format))
                    })?;
                    loss.add(values, &self.back);
                }
            }
            write(at, out)?;
            at += out.len() as u64;
        }
        Ok(loss)
    }

    /// Reads the source bytes of a piece into `raw`.
    fn fetch(
        &mut self,
        input: &dyn Input,
        tensor: &Tensor,
        piece: &Piece,
    ) -> Result<Fetched, ConvertError> {
        let (_, cols) = tensor.view();
        let Range { start, end } = piece.rows.clone();
        let rows = end - start;
        let mut plain = |name: &str, first_row: u64, head: Option<u64>| {
            let format = input.format(name)?;
            let row_bytes = source_row_bytes(input, name, format, cols)?;
            input.read(name, first_row * row_bytes, self.raw.get((rows * row_bytes) as usize))?;
            let order = head.map_or(Order::Rows, |head_rows| Order::HalfSplit { head_rows });
            Ok(Fetched { name: name.to_owned(), format, row_bytes: row_bytes as usize, order })
        };
        match &tensor.source {
            Source::Plain { name } => plain(name, start, None),
            Source::Interleaved { name, .. } => plain(name, start, Some(tensor.unit())),
            Source::Stack { names } => {
                let per_expert = tensor.shape[1];
                plain(&names[(start / per_expert) as usize], start % per_expert, None)
            }
            Source::Values(values) => {
                let bytes = self.raw.get(values.len() * 4);
                quantize_row(Format::F32, values, bytes);
                let name = tensor.name.clone();
                Ok(Fetched {
                    name,
                    format: Format::F32,
                    row_bytes: values.len() * 4,
                    order: Order::Rows,
                })
            }
            Source::Experts { name, from } => {
                let format = input.format(name)?;
                let size = format.block_bytes() as u64;
                let expert = start / tensor.shape[1];
                // The checkpoint's matrix is [in, out] with `out` columns; ours are `rows` of them.
                let out_columns = if name.ends_with("gate_up_proj") { 2 * rows } else { rows };
                let first = (expert * cols * out_columns + from) * size;
                let wanted = (rows * size) as usize;
                let raw = self.raw.get(cols as usize * wanted);
                if out_columns == rows {
                    input.read(name, first, raw)?;
                } else {
                    for (line, out) in raw.chunks_exact_mut(wanted).enumerate() {
                        input.read(name, first + line as u64 * out_columns * size, out)?;
                    }
                }
                Ok(Fetched { name: name.clone(), format, row_bytes: wanted, order: Order::Columns })
            }
        }
    }
}

/// How the bytes of a piece lie in the buffer.
struct Fetched {
    name: String,
    format: Format,
    /// Of a row of the source.
    row_bytes: usize,
    order: Order,
}

#[derive(Clone, Copy, PartialEq)]
enum Order {
    Rows,
    /// Rows of heads whose halves are to be interleaved.
    HalfSplit {
        head_rows: u64,
    },
    /// Rows are columns.
    Columns,
}

impl Fetched {
    /// Rows `rows` of the piece as F32.
    fn decode(&self, raw: &[u8], rows: Range<u64>, cols: usize, out: &mut [f32]) {
        match self.order {
            Order::Columns => self.transpose(raw, rows, cols, out),
            Order::Rows | Order::HalfSplit { .. } => {
                for (row, out) in rows.zip(out.chunks_exact_mut(cols)) {
                    dequantize_row(self.format, self.row(raw, row), out);
                }
            }
        }
    }

    /// The source bytes of row `row` of the piece.
    fn row<'a>(&self, raw: &'a [u8], row: u64) -> &'a [u8] {
        let row = match self.order {
            Order::HalfSplit { head_rows } => {
                let (head, within) = (row / head_rows, row % head_rows);
                head * head_rows + (within % 2) * (head_rows / 2) + within / 2
            }
            Order::Rows | Order::Columns => row,
        };
        let from = row as usize * self.row_bytes;
        &raw[from..from + self.row_bytes]
    }

    /// The band is narrow, so its output rows stay in the cache while the source streams by.
    fn transpose(&self, raw: &[u8], rows: Range<u64>, cols: usize, out: &mut [f32]) {
        let size = self.format.block_bytes();
        let span = rows.start as usize * size..rows.end as usize * size;
        for (col, line) in raw.chunks_exact(self.row_bytes).enumerate() {
            let values = line[span.clone()].chunks_exact(size);
            for (value, out) in values.zip(out[col..].iter_mut().step_by(cols)) {
                *out = match (self.format, value) {
                    (Format::F16, &[a, b]) => half::f16::from_le_bytes([a, b]).to_f32(),
                    (Format::Bf16, &[a, b]) => half::bf16::from_le_bytes([a, b]).to_f32(),
                    (_, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
                    _ => f32::NAN,
                };
            }
        }
    }

    /// Quantized rows that keep their format are copied: rounding them again would only lose.
    fn copies(&self, format: Format) -> bool {
        self.format == format && self.order == Order::Rows
    }
}

fn source_row_bytes(
    input: &dyn Input,
    name: &str,
    format: Format,
    cols: u64,
) -> Result<u64, ConvertError> {
    let bytes = format.row_bytes(cols as usize).map(|bytes| bytes as u64);
    bytes.ok_or_else(|| ConvertError::Tensor {
        file: input.file_of(name).to_path_buf(),
        tensor: name.to_owned(),
        reason: format!("has rows of {cols} values, no whole blocks of {format}"),
    })
}

fn named(
    input: &dyn Input,
    tensor: &Tensor,
    source: &Fetched,
    row: u64,
    reason: String,
) -> ConvertError {
    ConvertError::Tensor {
        file: input.file_of(&source.name).to_path_buf(),
        tensor: source.name.clone(),
        reason: format!("{reason} (row {row} of {})", tensor.name),
    }
}

fn finite(values: &[f32]) -> Result<(), String> {
    // One pass that vectorizes; the exact place is looked for only if something is wrong.
    let largest = values.iter().fold(0, |max, value: &f32| max.max(value.to_bits() << 1));
    if largest < f32::INFINITY.to_bits() << 1 {
        return Ok(());
    }
    match values.iter().enumerate().find(|(_, value)| !value.is_finite()) {
        Some((at, value)) => Err(format!("holds {value} at column {at}")),
        None => Ok(()),
    }
}

/// A byte buffer whose contents begin at an address that every block format accepts.
#[derive(Default)]
struct Aligned {
    bytes: Vec<u8>,
    from: usize,
    len: usize,
}

impl Aligned {
    /// `len` bytes, with whatever they held before.
    fn get(&mut self, len: usize) -> &mut [u8] {
        if self.bytes.len() < len + ALIGNMENT {
            self.bytes = Vec::new();
            self.bytes.resize(len + ALIGNMENT, 0);
        }
        self.from = self.bytes.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        self.len = len;
        &mut self.bytes[self.from..self.from + len]
    }

    /// What the last `get` gave.
    fn held(&self) -> &[u8] {
        &self.bytes[self.from..self.from + self.len]
    }
}

const ALIGNMENT: usize = 64;
/// Values of a piece that can be cut anywhere: 32 MiB in F32.
const PIECE_VALUES: u64 = 8 << 20;
/// Bytes of one write.
const OUT_BYTES: usize = 4 << 20;
/// A band of rows is decoded at once: 256 KiB, and few enough rows that a transposition reads whole
/// cache lines and writes few streams.
const BAND_VALUES: usize = 64 << 10;
const BAND_ROWS: usize = 32;

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::path::Path;

    use super::*;

    /// Tensors of F32 values in memory.
    struct Memory(HashMap<String, Vec<f32>>);

    impl Input for Memory {
        fn format(&self, _: &str) -> Result<Format, ConvertError> {
            Ok(Format::F32)
        }

        fn read(&self, tensor: &str, from: u64, out: &mut [u8]) -> Result<(), ConvertError> {
            let bytes: Vec<u8> = self.0[tensor].iter().flat_map(|v| v.to_le_bytes()).collect();
            out.copy_from_slice(&bytes[from as usize..from as usize + out.len()]);
            Ok(())
        }

        fn file_of(&self, _: &str) -> &Path {
            Path::new("memory")
        }

        fn fingerprint(&self) -> Result<String, ConvertError> {
            Ok(String::new())
        }
    }

    fn tensor(shape: &[u64], format: Format, source: Source) -> Tensor {
        let rows: u64 = shape[1..].iter().product();
        let bytes = rows * format.row_bytes(shape[0] as usize).unwrap() as u64;
        let name = "blk.0.x".to_owned();
        Tensor { name, shape: shape.to_vec(), format, instead_of: None, source, offset: 64, bytes }
    }

    /// All pieces converted and read back as F32.
    fn converted(tensor: &Tensor, values: Vec<f32>) -> Result<Vec<f32>, ConvertError> {
        let input = Memory(HashMap::from([("t".to_owned(), values)]));
        let mut file = vec![0; tensor.bytes as usize];
        let mut worker = Worker::default();
        for piece in cut(std::slice::from_ref(tensor)) {
            worker.convert(&input, tensor, &piece, &mut |at, bytes| {
                let at = (at - tensor.offset) as usize;
                file[at..at + bytes.len()].copy_from_slice(bytes);
                Ok(())
            })?;
        }
        let words = file.chunks_exact(4).map(|w| f32::from_le_bytes(w.try_into().unwrap()));
        Ok(words.collect())
    }

    fn counted(len: usize) -> Vec<f32> {
        (0..len).map(|i| i as f32).collect()
    }

    #[test]
    fn experts_are_split_and_transposed() {
        let (experts, cols, rows) = (3, 5, 4);
        let values = counted(experts * cols * 2 * rows);
        for from in [0, rows] {
            let source = Source::Experts { name: "gate_up_proj".to_owned(), from: from as u64 };
            let shape = [cols as u64, rows as u64, experts as u64];
            let target = tensor(&shape, Format::F32, source);
            let input = Memory(HashMap::from([("gate_up_proj".to_owned(), values.clone())]));
            let mut found = Vec::new();
            for piece in cut(std::slice::from_ref(&target)) {
                let mut write = |at: u64, bytes: &[u8]| {
                    assert_eq!(at, target.place(&piece).start);
                    found.extend(
                        bytes.chunks_exact(4).map(|w| f32::from_le_bytes(w.try_into().unwrap())),
                    );
                    Ok(())
                };
                Worker::default().convert(&input, &target, &piece, &mut write).unwrap();
            }
            let mut wanted = Vec::new();
            for expert in 0..experts {
                for row in 0..rows {
                    for col in 0..cols {
                        wanted.push(values[(expert * cols + col) * 2 * rows + from + row]);
                    }
                }
            }
            assert_eq!(found, wanted);
        }
    }

    #[test]
    fn heads_are_interleaved() {
        // Two heads of four rows, two columns.
        let source = Source::Interleaved { name: "t".to_owned(), heads: 2 };
        let target = tensor(&[2, 8], Format::F32, source.clone());
        let rows: Vec<u64> =
            converted(&target, counted(16)).unwrap().chunks(2).map(|r| r[0] as u64 / 2).collect();
        assert_eq!(rows, [0, 2, 1, 3, 4, 6, 5, 7]);
        let bias = tensor(&[8], Format::F32, source);
        assert_eq!(converted(&bias, counted(8)).unwrap(), [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
    }

    #[test]
    fn large_tensors_are_cut_without_gaps() {
        let source = Source::Plain { name: "t".to_owned() };
        let big = tensor(&[5120, 20_000], Format::Q4_0, source);
        let pieces = cut(std::slice::from_ref(&big));
        assert!(pieces.len() > 10);
        let ends = pieces.windows(2).all(|pair| pair[0].rows.end == pair[1].rows.start);
        assert!(ends && pieces[0].rows.start == 0 && pieces[pieces.len() - 1].rows.end == 20_000);
        let stack = tensor(
            &[5120, 3000, 2],
            Format::Q4_0,
            Source::Stack { names: vec!["a".to_owned(), "b".to_owned()] },
        );
        for piece in cut(&[stack]) {
            assert_eq!(piece.rows.start / 3000, (piece.rows.end - 1) / 3000, "{piece:?}");
        }
    }

    #[test]
    fn nan_infinity_and_overflow_are_named() {
        let source = Source::Plain { name: "t".to_owned() };
        let check = |format, bad: f32, part: &str| {
            let mut values = counted(64);
            values[40] = bad;
            let error = converted(&tensor(&[32, 2], format, source.clone()), values).unwrap_err();
            let error = error.to_string();
            assert!(error.contains("tensor `t`") && error.contains(part), "{error}");
            assert!(error.contains("memory"), "{error}");
        };
        check(Format::F32, f32::NAN, "holds NaN at column 8 (row 1");
        check(Format::Q4_0, f32::NEG_INFINITY, "holds -inf at column 8");
        check(Format::F16, 1e6, "too large for F16");
        check(Format::Q4_0, 1e9, "too large for Q4_0");
        assert!(finite(&[f32::MAX, f32::MAX]).is_ok());
    }
}
