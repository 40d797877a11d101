//! Several rows of weights side by side, as kernels with a row in each lane read them.

use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};

use crate::table::Piece;

/// Up to `LANES` rows of a piece, against its tokens.
pub(super) struct Group<'a, const LANES: usize> {
    pub(super) piece: &'a Piece<'a>,
    pub(super) first: usize,
    pub(super) rows: usize,
}

/// Blocks of as many rows as there are lanes: that of row `r` begins at `at + r * stride`.
#[derive(Clone, Copy)]
pub(super) struct Blocks {
    pub(super) at: *const u8,
    pub(super) stride: usize,
}

/// A copy of the blocks of fewer rows, the missing ones zero.
pub(super) struct Padded([u8; LANES_MAX * PADDED_BYTES]);

const LANES_MAX: usize = 16;
/// The bytes of 256 values in the largest format.
const PADDED_BYTES: usize = 272;
/// Bytes between the end of these rows and what is asked for, as rows may be short.
const AHEAD: usize = 4096;

impl Padded {
    pub(super) fn new() -> Padded {
        Padded([0; LANES_MAX * PADDED_BYTES])
    }
}

impl<'a, const LANES: usize> Group<'a, LANES> {
    pub(super) fn new(piece: &'a Piece<'a>, first: usize) -> Self {
        Group { piece, first, rows: LANES.min(piece.rows - first) }
    }

    /// The bytes `start..start + len` of all rows; `len` is at most [`PADDED_BYTES`]. Asks for those of the next rows.
    #[inline]
    pub(super) fn blocks(&self, start: usize, len: usize, padded: &mut Padded) -> Blocks {
        self.prefetch(start, len);
        self.bytes(start, len, padded)
    }

    /// Asks for what the next rows need, a share as large as the bytes `start..start + len` of these. Rather often and
    /// little: the processor forgets what it is asked for while some twenty lines are on their way.
    #[inline]
    pub(super) fn prefetch(&self, start: usize, len: usize) {
        let stride = self.piece.row_bytes;
        if self.rows == LANES {
            let at = self.first * stride + LANES * (stride + start) + AHEAD;
            prefetch(self.piece.weights.as_ptr().wrapping_add(at), LANES * len);
        }
    }

    /// Where the rows begin; nothing if there are fewer than lanes.
    #[inline]
    pub(super) fn whole(&self) -> Option<Blocks> {
        let stride = self.piece.row_bytes;
        let rows = self.piece.weights.get(self.first * stride..(self.first + LANES) * stride)?;
        (self.rows == LANES).then_some(Blocks { at: rows.as_ptr(), stride })
    }

    #[inline]
    fn bytes(&self, start: usize, len: usize, padded: &mut Padded) -> Blocks {
        let stride = self.piece.row_bytes;
        if self.rows == LANES {
            let rows = &self.piece.weights[self.first * stride..][..LANES * stride];
            assert!(start + len <= stride, "inside of a row");
            return Blocks { at: rows[start..].as_ptr(), stride };
        }
        for (row, to) in padded.0.chunks_exact_mut(PADDED_BYTES).take(self.rows).enumerate() {
            to[..len].copy_from_slice(&self.piece.row(self.first + row)[start..][..len]);
        }
        Blocks { at: padded.0.as_ptr(), stride: PADDED_BYTES }
    }
}

impl Blocks {
    #[inline]
    pub(super) fn offset(self, bytes: usize) -> Blocks {
        Blocks { at: self.at.wrapping_add(bytes), stride: self.stride }
    }

    /// Four halves at the start of the blocks of rows `row..row + 4`. In a general register: the vector units have
    /// enough to shuffle.
    ///
    /// # Safety
    /// Two bytes can be read at each of these rows.
    #[inline]
    pub(super) unsafe fn four_halves(self, row: usize) -> i64 {
        let word = |row: usize| {
            let at = self.at.wrapping_add(row * self.stride).cast::<u16>();
            // SAFETY: the caller's promise.
            u64::from(unsafe { at.read_unaligned() })
        };
        let low = word(row) | word(row + 1) << 16;
        (low | (word(row + 2) | word(row + 3) << 16) << 32).cast_signed()
    }
}

/// Asks for the bytes that the next rows need, in the order they lie in memory: many rows read side by side are no
/// stream to the processor, and it waited for memory half of the time (Zen 4, one thread, Q4_0: 6.7 GiB/s without,
/// 12.5 with; into the first level 7). Nothing is read, so `at` may lie behind the weights.
#[inline]
fn prefetch(at: *const u8, len: usize) {
    for line in (0..len).step_by(64) {
        // SAFETY: a hint; no address is dereferenced.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(line).cast()) }
    }
}
