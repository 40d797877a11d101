//! Attention over `Lanes`, written once for every instruction set.
//!
//! ```text
//! for each tile of ROWS query rows (token x head of the group):   m = -inf, l = 0, out = 0
//!     for each block of KEYS keys (never across a page):
//!         s[row][key] = scale * q[row] . k[key]       4 rows x 2 keys in registers
//!         m' = max(m, max s); p = exp(s - m'); c = exp(m - m'); l = c l + sum p     (keys past a row's end: p = 0)
//!         out = c out + p v                           4 rows x 2 registers of the head
//!     out /= l
//! ```
//! All rows of a tile share each read of keys and values; when the cache holds F16 and the rows are many,
//! a block is widened once into scratch. A block's sum starts from zero before it is added to `out`, so
//! the roundings along a long context grow with the square root of blocks, not of keys.
//!
//! # Safety of every function
//! As in `vector_lanes`; the pointers of a task are valid for what the task describes, and the head length
//! is a multiple of `L::LEN` and at most `HEAD_LEN_MAX`.

use std::mem::MaybeUninit;

use super::lanes::{Element, Lanes};
use super::vector::AttentionTask;

/// Keys of one block.
const KEYS: usize = 32;
/// Query rows that share a block of keys.
const ROWS: usize = 32;
/// Rows of a register tile.
const TILE: usize = 4;
/// Above this number of rows, F16 blocks are widened into scratch first.
const WIDEN_ABOVE: usize = 2 * TILE;
/// The longest head.
pub(crate) const HEAD_LEN_MAX: usize = 256;

/// A block of keys or values, widened.
type Scratch = [MaybeUninit<f32>; KEYS * HEAD_LEN_MAX];

#[inline(always)]
pub(crate) unsafe fn attend<L: Lanes, E: Element>(task: &AttentionTask<'_, E>, out: &mut [f32]) {
    const { assert!(KEYS.is_multiple_of(L::LEN)) };
    let mut scratch: Scratch = [MaybeUninit::uninit(); KEYS * HEAD_LEN_MAX];
    for first in (0..task.rows()).step_by(ROWS) {
        let rows = ROWS.min(task.rows() - first);
        let out = &mut out[first * task.head_len..(first + rows) * task.head_len];
        // SAFETY: the contract of this file.
        unsafe { attend_rows::<L, E>(task, first, rows, out, &mut scratch) };
    }
}

/// The rows `first..first + rows`, at most `ROWS`, into `out`.
#[inline(always)]
unsafe fn attend_rows<L: Lanes, E: Element>(
    task: &AttentionTask<'_, E>,
    first: usize,
    rows: usize,
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    let d = task.head_len;
    let mut scores = [[0.0f32; KEYS]; ROWS];
    let mut queries = [std::ptr::null::<f32>(); ROWS];
    let mut ends = [0usize; ROWS];
    let mut largest = [f32::NEG_INFINITY; ROWS];
    let mut sums = [0.0f32; ROWS];
    let mut corrections = [0.0f32; ROWS];
    for row in 0..rows {
        queries[row] = task.query(first + row);
        ends[row] = task.end(first + row);
    }
    out.fill(0.0);

    let last = ends[rows - 1];
    let mut start = task.start;
    while start < last {
        let (page, offset) = (start / task.page_tokens, start % task.page_tokens);
        let keys = KEYS.min(task.page_tokens - offset).min(last - start);
        // SAFETY: the contract of this file: the page holds `page_tokens` rows of `d`; the wrapper checked that
        // the pages reach `last`. Scratch holds KEYS rows of the longest head.
        unsafe {
            let k = task.keys[page].as_ptr().add(offset * d);
            let v = task.values[page].as_ptr().add(offset * d);
            let widened: *mut f32 = scratch.as_mut_ptr().cast();
            let widen = size_of::<E>() == 2 && rows > WIDEN_ABOVE;
            if widen {
                copy_widened::<L, E>(k, widened, keys * d);
                score_rows::<L, f32>(&queries[..rows], widened, d, keys, task.scale, &mut scores);
            } else {
                score_rows::<L, E>(&queries[..rows], k, d, keys, task.scale, &mut scores);
            }
            for row in 0..rows {
                let seen = ends[row].saturating_sub(start).min(keys);
                corrections[row] =
                    weigh::<L>(&mut scores[row], seen, &mut largest[row], &mut sums[row]);
            }
            if widen {
                copy_widened::<L, E>(v, widened, keys * d);
                mix_rows::<L, f32>(&scores, &corrections[..rows], widened, d, keys, out);
            } else {
                mix_rows::<L, E>(&scores, &corrections[..rows], v, d, keys, out);
            }
        }
        start += keys;
    }

    for (row, head) in out.chunks_exact_mut(d).enumerate() {
        // SAFETY: the contract of this file.
        unsafe { super::vector_lanes::scale::<L>(head, 1.0 / sums[row]) };
    }
}

#[inline(always)]
unsafe fn copy_widened<L: Lanes, E: Element>(from: *const E, to: *mut f32, len: usize) {
    for i in (0..len).step_by(L::LEN) {
        // SAFETY: both hold `len` elements, a multiple of the lanes.
        unsafe { E::load::<L>(from.add(i)).store(to.add(i)) };
    }
}

/// Raw scores of all rows against one block of keys.
#[inline(always)]
unsafe fn score_rows<L: Lanes, E: Element>(
    queries: &[*const f32],
    k: *const E,
    d: usize,
    keys: usize,
    scale: f32,
    scores: &mut [[f32; KEYS]; ROWS],
) {
    let mut row = 0;
    // SAFETY: the contract of this file; `row` plus the tile's height stays within `queries`.
    unsafe {
        while row + TILE <= queries.len() {
            score_tile::<L, E, TILE>(&queries[row..], k, d, keys, scale, &mut scores[row..]);
            row += TILE;
        }
        match queries.len() - row {
            3 => score_tile::<L, E, 3>(&queries[row..], k, d, keys, scale, &mut scores[row..]),
            2 => score_tile::<L, E, 2>(&queries[row..], k, d, keys, scale, &mut scores[row..]),
            1 => score_tile::<L, E, 1>(&queries[row..], k, d, keys, scale, &mut scores[row..]),
            _ => {}
        }
    }
}

/// R rows, two keys at a time; a single row four, or the latency of the multiply-add would show.
#[inline(always)]
unsafe fn score_tile<L: Lanes, E: Element, const R: usize>(
    queries: &[*const f32],
    k: *const E,
    d: usize,
    keys: usize,
    scale: f32,
    scores: &mut [[f32; KEYS]],
) {
    let mut key = 0;
    // SAFETY: the contract of this file; the keys read end within `keys`.
    unsafe {
        while R == 1 && key + 4 <= keys {
            score_keys::<L, E, R, 4>(queries, k, d, key, scale, scores);
            key += 4;
        }
        while key + 2 <= keys {
            score_keys::<L, E, R, 2>(queries, k, d, key, scale, scores);
            key += 2;
        }
        if key < keys {
            score_keys::<L, E, R, 1>(queries, k, d, key, scale, scores);
        }
    }
}

/// R rows against K keys from `key`.
#[inline(always)]
unsafe fn score_keys<L: Lanes, E: Element, const R: usize, const K: usize>(
    queries: &[*const f32],
    k: *const E,
    d: usize,
    key: usize,
    scale: f32,
    scores: &mut [[f32; KEYS]],
) {
    // SAFETY: the contract of this file; R queries, K keys from `key`, i + LEN <= d.
    unsafe {
        let mut acc = [[L::splat(0.0); K]; R];
        let mut i = 0;
        while i < d {
            let mut row = [L::splat(0.0); K];
            for (j, row) in row.iter_mut().enumerate() {
                *row = E::load::<L>(k.add((key + j) * d + i));
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let q = L::load(queries.get_unchecked(r).add(i));
                for (acc, row) in acc.iter_mut().zip(row) {
                    *acc = q.mul_add(row, *acc);
                }
            }
            i += L::LEN;
        }
        for (r, acc) in acc.iter().enumerate() {
            for (j, acc) in acc.iter().enumerate() {
                scores[r][key + j] = acc.sum() * scale;
            }
        }
    }
}

/// Turns the first `seen` scores of a row into weights `exp(s - largest)` and the others into zero, brings
/// the row's running maximum and sum up to date, and returns by what its earlier output must be multiplied.
#[inline(always)]
unsafe fn weigh<L: Lanes>(
    scores: &mut [f32; KEYS],
    seen: usize,
    largest: &mut f32,
    sum: &mut f32,
) -> f32 {
    if seen == 0 {
        scores.fill(0.0);
        return 1.0;
    }
    scores[seen..].fill(f32::NEG_INFINITY);
    // SAFETY: KEYS is a multiple of the lanes.
    unsafe {
        let s = scores.as_mut_ptr();
        let mut lanes = L::load(s);
        for i in (L::LEN..KEYS).step_by(L::LEN) {
            lanes = lanes.max(L::load(s.add(i)));
        }
        let raised = largest.max(lanes.largest());
        let shift = L::splat(-raised);
        let mut sums = L::splat(0.0);
        for i in (0..KEYS).step_by(L::LEN) {
            let p = L::load(s.add(i)).add(shift).exp();
            sums = sums.add(p);
            p.store(s.add(i));
        }
        // The masked keys weigh 1.2e-38 each, less than half a unit in the last place of any sum that holds
        // the largest key (which weighs 1 in the block where it stands).
        scores[seen..].fill(0.0);
        // Of the first block it is exp(-87) instead of 0, and multiplies zeros.
        let correction =
            if raised == *largest { 1.0 } else { L::splat(*largest - raised).exp().largest() };
        *largest = raised;
        *sum = *sum * correction + sums.sum();
        correction
    }
}

/// `out = correction * out + weights . v` for all rows and one block of values.
#[inline(always)]
unsafe fn mix_rows<L: Lanes, E: Element>(
    weights: &[[f32; KEYS]; ROWS],
    corrections: &[f32],
    v: *const E,
    d: usize,
    keys: usize,
    out: &mut [f32],
) {
    let rows = corrections.len();
    let mut row = 0;
    // SAFETY: the contract of this file; `row` plus the tile's height stays within the rows.
    unsafe {
        while row + TILE <= rows {
            mix_tile::<L, E, TILE>(
                &weights[row..],
                &corrections[row..],
                v,
                d,
                keys,
                &mut out[row * d..],
            );
            row += TILE;
        }
        let (weights, corrections, out) =
            (&weights[row..], &corrections[row..], &mut out[row * d..]);
        match rows - row {
            3 => mix_tile::<L, E, 3>(weights, corrections, v, d, keys, out),
            2 => mix_tile::<L, E, 2>(weights, corrections, v, d, keys, out),
            1 => mix_tile::<L, E, 1>(weights, corrections, v, d, keys, out),
            _ => {}
        }
    }
}

#[inline(always)]
unsafe fn mix_tile<L: Lanes, E: Element, const R: usize>(
    weights: &[[f32; KEYS]],
    corrections: &[f32],
    v: *const E,
    d: usize,
    keys: usize,
    out: &mut [f32],
) {
    let mut i = 0;
    // SAFETY: i plus the registers' width stays within the head.
    unsafe {
        // Few rows: more columns, so that as many sums are under way.
        while R <= 2 && i + 4 * L::LEN <= d {
            mix_columns::<L, E, R, 4>(weights, corrections, v, d, keys, out, i);
            i += 4 * L::LEN;
        }
        while i + 2 * L::LEN <= d {
            mix_columns::<L, E, R, 2>(weights, corrections, v, d, keys, out, i);
            i += 2 * L::LEN;
        }
        if i < d {
            mix_columns::<L, E, R, 1>(weights, corrections, v, d, keys, out, i);
        }
    }
}

/// R rows, C registers of the head from column `i`.
#[inline(always)]
unsafe fn mix_columns<L: Lanes, E: Element, const R: usize, const C: usize>(
    weights: &[[f32; KEYS]],
    corrections: &[f32],
    v: *const E,
    d: usize,
    keys: usize,
    out: &mut [f32],
    i: usize,
) {
    // SAFETY: the contract of this file; R rows of weights and out exist, i + C * LEN <= d.
    unsafe {
        let mut acc = [[L::splat(0.0); C]; R];
        for key in 0..keys {
            let row = v.add(key * d + i);
            let mut values = [L::splat(0.0); C];
            for (c, value) in values.iter_mut().enumerate() {
                *value = E::load::<L>(row.add(c * L::LEN));
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let p = L::splat(*weights.get_unchecked(r).get_unchecked(key));
                for (acc, value) in acc.iter_mut().zip(values) {
                    *acc = p.mul_add(value, *acc);
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            let correction = L::splat(corrections[r]);
            for (c, acc) in acc.iter().enumerate() {
                let to = out.as_mut_ptr().add(r * d + i + c * L::LEN);
                correction.mul_add(L::load(to), *acc).store(to);
            }
        }
    }
}
