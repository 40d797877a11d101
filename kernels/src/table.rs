//! The table of kernels of one instruction set, and the products that call it.
//!
//! A table starts as the scalar one; each set overwrites the entries it has better kernels for, the more capable
//! sets last. So every entry is always callable, and an entry without an own variant holds the next lower one.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use crate::activations::{Activations, Q8KRow, Q8Row};
use crate::arch;
use crate::blocks::bytes_of;
use crate::format::{ActivationForm, Format, Precision};
use crate::isa::Isa;
use crate::matrix::Matrix;
use crate::team::Team;

/// The kernels of one instruction set. Holding it proves that this processor runs them.
#[derive(Clone, Copy)]
pub struct Kernels {
    isa: Isa,
    pub(crate) table: &'static Table,
}

/// One entry for each kernel. An entry may be called where the [`Isa`] of its table is available.
#[derive(Clone, Copy)]
pub(crate) struct Table {
    /// By [`Format::index`]: weights against activations in the form of [`Precision::Int8`].
    pub(crate) products: [Product; Format::ALL.len()],
    pub(crate) quantize_q8_0: unsafe fn(&[f32], Q8Row<'_>),
    pub(crate) quantize_q8_k: unsafe fn(&[f32], Q8KRow<'_>),
}

/// Computes a [`Piece`].
///
/// # Safety
/// The processor has the features of the table's [`Isa`].
pub(crate) type Product = unsafe fn(&Piece<'_>);

/// What a kernel does in one call: some rows of one matrix against all tokens.
///
/// What is promised: `weights` are `rows * row_bytes` bytes, rows of `x.cols()` values of the entry's format, and
/// aligned to 2 (4 for F32); `x` has the form of the entry. For a given row the result must not depend on which
/// rows are in the piece with it: pieces begin at multiples of [`PIECE_ROWS`], but end anywhere.
pub(crate) struct Piece<'a> {
    pub(crate) weights: &'a [u8],
    pub(crate) row_bytes: usize,
    pub(crate) rows: usize,
    pub(crate) x: &'a Activations,
    pub(crate) out: Out<'a>,
}

impl<'a> Piece<'a> {
    pub(crate) fn row(&self, row: usize) -> &'a [u8] {
        &self.weights[row * self.row_bytes..][..self.row_bytes]
    }

    pub(crate) fn tokens(&self) -> usize {
        self.x.tokens()
    }
}

/// The columns of a result that belong to one piece: `tokens` rows of `rows` values, `stride` apart.
pub(crate) struct Out<'a> {
    at: *mut f32,
    stride: usize,
    tokens: usize,
    rows: usize,
    borrowed: PhantomData<&'a mut [f32]>,
}

impl Out<'_> {
    /// Where the results of rows `row..row + len` for a token go: valid for writing `len` values.
    ///
    /// # Panics
    /// If they are not part of this piece.
    #[inline(always)]
    pub(crate) fn at(&self, token: usize, row: usize, len: usize) -> *mut f32 {
        assert!(token < self.tokens && row + len <= self.rows, "outside of the piece");
        // SAFETY: inside the result, as `Shared::piece` made sure of the corners.
        unsafe { self.at.add(token * self.stride + row) }
    }

    /// Writes one result.
    #[inline]
    pub(crate) fn set(&self, token: usize, row: usize, value: f32) {
        // SAFETY: `at` checked that the place is ours, and no other piece has it.
        unsafe { *self.at(token, row, 1) = value }
    }
}

/// One product of a parallel region, its result shared by the threads.
#[derive(Clone, Copy)]
struct Shared<'a> {
    weights: Matrix<'a>,
    out: *mut f32,
    pieces: usize,
    borrowed: PhantomData<&'a mut [f32]>,
}

// SAFETY: the threads write disjoint rows of `out`, each piece being taken once.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    fn new(weights: Matrix<'a>, out: &'a mut [f32], x: &Activations, rows_a_piece: usize) -> Self {
        assert_eq!(weights.cols(), x.cols(), "columns of weights and activations");
        assert_eq!(out.len(), weights.rows() * x.tokens(), "length of the result");
        let int8 = weights.format().activation_form(Precision::Int8);
        assert!(
            x.form() == ActivationForm::F32 || x.form() == int8,
            "{} weights against {:?} activations",
            weights.format(),
            x.form()
        );
        let pieces = weights.rows().div_ceil(rows_a_piece);
        Shared { weights, out: out.as_mut_ptr(), pieces, borrowed: PhantomData }
    }

    /// Computes the rows of one piece.
    ///
    /// # Safety
    /// No two threads may compute the same rows.
    unsafe fn compute(&self, kernels: &Kernels, x: &Activations, rows: Range<usize>) {
        let weights = self.weights.rows_range(rows.clone());
        let out = |rows: Range<usize>| Out {
            // SAFETY: `rows` lie inside the matrix, and `out` has `rows` values for each token.
            at: unsafe { self.out.add(rows.start) },
            stride: self.weights.rows(),
            tokens: x.tokens(),
            rows: rows.len(),
            borrowed: PhantomData,
        };
        if x.form() == weights.format().activation_form(Precision::Int8) {
            let native = Piece {
                weights: weights.bytes(),
                row_bytes: weights.row_bytes(),
                rows: weights.rows(),
                x,
                out: out(rows),
            };
            kernels.product(weights.format(), &native);
            return;
        }
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.resize(EXACT_ROWS * x.cols(), 0.0);
            for first in (0..weights.rows()).step_by(EXACT_ROWS) {
                let last = (first + EXACT_ROWS).min(weights.rows());
                let some = weights.rows_range(first..last);
                let values = &mut scratch[..some.rows() * x.cols()];
                for (row, values) in values.chunks_exact_mut(x.cols()).enumerate() {
                    some.row_to_f32(row, values);
                }
                let exact = Piece {
                    weights: bytes_of(values),
                    row_bytes: 4 * x.cols(),
                    rows: some.rows(),
                    x,
                    out: out(rows.start + first..rows.start + last),
                };
                kernels.product(Format::F32, &exact);
            }
        });
    }
}

impl Kernels {
    /// The best kernels of this processor.
    pub fn detect() -> Kernels {
        Isa::available().find_map(Kernels::with_isa).expect("scalar kernels run everywhere")
    }

    /// The kernels of one set; `None` if this processor cannot run it.
    pub fn with_isa(isa: Isa) -> Option<Kernels> {
        isa.is_available().then(|| Kernels { isa, table: arch::table(isa) })
    }

    /// The set these kernels were made for.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    fn product(&self, format: Format, piece: &Piece<'_>) {
        // SAFETY: a `Kernels` exists only where its set is available.
        unsafe { self.table.products[format.index()](piece) }
    }

    pub(crate) fn quantize_q8_0(&self, x: &[f32], row: Q8Row<'_>) {
        let blocks = x.len() / 32;
        assert!(
            x.len() == 32 * blocks
                && row.levels.len() == x.len()
                && row.scales.len() == blocks
                && row.sums.len() == blocks
                && row.scaled_sums.len() == blocks
        );
        // SAFETY: as in `product`.
        unsafe { (self.table.quantize_q8_0)(x, row) }
    }

    pub(crate) fn quantize_q8_k(&self, x: &[f32], row: Q8KRow<'_>) {
        let blocks = x.len() / 256;
        assert!(
            x.len() == 256 * blocks
                && row.levels.len() == x.len()
                && row.scales.len() == blocks
                && row.group_sums.len() == 16 * blocks
        );
        // SAFETY: as in `product`.
        unsafe { (self.table.quantize_q8_k)(x, row) }
    }
}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Kernels({})", self.isa)
    }
}

/// `out[t * rows + r]` becomes the product of weights row `r` and token `t`, on the threads of the team.
///
/// The result does not depend on the number of threads.
///
/// # Panics
/// If the columns differ, `out` has another length, or `x` has neither the form of the weights' format
/// ([`Format::activation_form`]) nor F32.
pub fn matmul(
    team: &mut Team,
    kernels: &Kernels,
    weights: &Matrix<'_>,
    x: &Activations,
    out: &mut [f32],
) {
    matmul_many(team, kernels, &mut [(*weights, out)], x);
}

/// Several matrices against the same activations, in one parallel region.
///
/// # Panics
/// As [`matmul`].
pub fn matmul_many(
    team: &mut Team,
    kernels: &Kernels,
    products: &mut [(Matrix<'_>, &mut [f32])],
    x: &Activations,
) {
    for products in products.chunks_mut(REGION_PRODUCTS) {
        region(team, kernels, products, x);
    }
}

fn region(
    team: &mut Team,
    kernels: &Kernels,
    products: &mut [(Matrix<'_>, &mut [f32])],
    x: &Activations,
) {
    let rows: usize = products.iter().map(|(weights, _)| weights.rows()).sum();
    let rows_a_piece = (rows / (team.threads() * PIECES_A_THREAD))
        .next_multiple_of(PIECE_ROWS)
        .clamp(PIECE_ROWS, PIECE_ROWS_MAX);
    let mut shared = [None; REGION_PRODUCTS];
    for (slot, (weights, out)) in shared.iter_mut().zip(products) {
        *slot = Some(Shared::new(*weights, out, x, rows_a_piece));
    }
    if x.tokens() == 0 {
        return;
    }
    let shared = || shared.iter().flatten();
    let pieces: usize = shared().map(|product| product.pieces).sum();
    let next = AtomicUsize::new(0);
    let part = |_: usize| {
        loop {
            let mut piece = next.fetch_add(1, Relaxed);
            if piece >= pieces {
                return;
            }
            for product in shared() {
                if piece < product.pieces {
                    let first = piece * rows_a_piece;
                    let last = (first + rows_a_piece).min(product.weights.rows());
                    // SAFETY: the counter gives each piece to one thread, and pieces do not overlap.
                    unsafe { product.compute(kernels, x, first..last) };
                    break;
                }
                piece -= product.pieces;
            }
        }
    };
    if pieces < 2 || rows * x.cols() * x.tokens() < TEAM_WORK_MIN {
        part(0);
    } else {
        team.run(&part);
    }
}

thread_local! {
    /// Rows read back to F32, for [`Precision::Exact`].
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Pieces begin at multiples of this, so kernels may work on that many rows at a time.
pub(crate) const PIECE_ROWS: usize = 16;
const PIECE_ROWS_MAX: usize = 256;
/// More pieces than threads, so that a thread which lost its core leaves its share to the others.
const PIECES_A_THREAD: usize = 8;
const REGION_PRODUCTS: usize = 8;
/// Rows that are read back at a time.
const EXACT_ROWS: usize = PIECE_ROWS;
/// Multiplications below which waking others costs more than it gives.
const TEAM_WORK_MIN: usize = 1 << 17;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::quantize_row;

    /// Values between -1 and 1 that repeat nothing for a long time.
    fn noise(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    /// Weights, their bytes in `format`, and what these read back as.
    fn weights(format: Format, rows: usize, cols: usize) -> (Vec<u8>, Vec<f32>) {
        let values = noise(rows * cols, 7);
        let mut bytes = vec![0; format.row_bytes(values.len()).expect("whole blocks")];
        quantize_row(format, &values, &mut bytes);
        let mut back = vec![0.0; values.len()];
        crate::quantize::dequantize_row(format, &bytes, &mut back);
        (bytes, back)
    }

    #[test]
    fn products_are_near_to_those_of_f64() {
        let (rows, cols, tokens) = (37, 512, 3);
        let x = noise(tokens * cols, 1);
        for (format, threads) in Format::ALL.into_iter().zip([1, 2, 3].into_iter().cycle()) {
            let (bytes, values) = weights(format, rows, cols);
            let matrix = Matrix::new(format, rows, cols, &bytes).expect("a matrix");
            for precision in [Precision::Exact, Precision::Int8] {
                let (kernels, mut team) = (Kernels::detect(), Team::new(threads));
                let mut activations = Activations::new();
                activations.fill(&kernels, format.activation_form(precision), &x, cols);
                let mut out = vec![f32::NAN; tokens * rows];
                matmul(&mut team, &kernels, &matrix, &activations, &mut out);
                let form = activations.form();
                // Rounding to 8 bits moves each activation by up to 1/254, at random.
                let bound = if form == ActivationForm::F32 { 2e-5 } else { 0.1 };
                for (i, found) in out.into_iter().enumerate() {
                    let (t, r) = (i / rows, i % rows);
                    let row = values[r * cols..][..cols].iter().zip(&x[t * cols..][..cols]);
                    let expected: f64 = row.map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                    let diff = (f64::from(found) - expected).abs();
                    assert!(diff < bound, "{format} {form:?} {i}: {found} for {expected}");
                }
            }
        }
    }

    #[test]
    fn many_products_equal_single_ones() {
        let (cols, tokens) = (256, 2);
        let kernels = Kernels::detect();
        let mut team = Team::new(2);
        let mut activations = Activations::new();
        activations.fill(&kernels, ActivationForm::Q8_0, &noise(tokens * cols, 3), cols);
        let shapes = [1, 16, 300, 0, 5, 700, 17, 31, 48, 2];
        let matrices = shapes.map(|rows| weights(Format::Q4_0, rows, cols).0);
        let matrices: Vec<Matrix<'_>> = shapes
            .iter()
            .zip(&matrices)
            .map(|(rows, bytes)| Matrix::new(Format::Q4_0, *rows, cols, bytes).expect("a matrix"))
            .collect();
        let mut single: Vec<Vec<f32>> =
            shapes.iter().map(|rows| vec![0.0; rows * tokens]).collect();
        let mut many = single.clone();
        for (matrix, out) in matrices.iter().zip(&mut single) {
            matmul(&mut team, &kernels, matrix, &activations, out);
        }
        let mut products: Vec<(Matrix<'_>, &mut [f32])> =
            matrices.iter().copied().zip(many.iter_mut().map(Vec::as_mut_slice)).collect();
        matmul_many(&mut team, &kernels, &mut products, &activations);
        assert_eq!(single, many);
    }

    #[test]
    #[should_panic(expected = "length of the result")]
    fn a_short_result_is_refused() {
        let kernels = Kernels::detect();
        let (bytes, _) = weights(Format::Q8_0, 4, 32);
        let matrix = Matrix::new(Format::Q8_0, 4, 32, &bytes).expect("a matrix");
        let mut activations = Activations::new();
        activations.fill(&kernels, ActivationForm::Q8_0, &[1.0; 64], 32);
        matmul(&mut Team::new(1), &kernels, &matrix, &activations, &mut [0.0; 7]);
    }
}
