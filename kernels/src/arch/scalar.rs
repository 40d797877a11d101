//! The reference in plain Rust: what every other kernel is compared with.
//!
//! Integers are exact inside a block; the blocks of a row are added in their order, each with one fused
//! multiply-add, so that kernels with a row in each lane give the same bits.

use half::{bf16, f16};

use crate::activations::{Q8KRow, Q8Row};
use crate::blocks::{
    Block, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5K, BlockQ6K, BlockQ8_0, blocks_from_bytes,
    unpack_scales,
};
use crate::quantize::{half_to_f32, levels_q4_k, levels_q5_k, levels_q6_k};
use crate::table::{Piece, Table};

/// The table that every other one starts from.
pub(crate) const TABLE: Table = Table {
    products: [
        product_f32,
        product_f16,
        product_bf16,
        product_q4_0,
        product_q4_1,
        product_q8_0,
        product_q4_k,
        product_q5_k,
        product_q6_k,
    ],
    quantize_q8_0,
    quantize_q8_k,
};

fn product_f32(piece: &Piece<'_>) {
    product_floats(piece, |bytes: &[u8; 4]| f32::from_le_bytes(*bytes));
}

fn product_f16(piece: &Piece<'_>) {
    product_floats(piece, |bytes: &[u8; 2]| f16::from_le_bytes(*bytes).to_f32());
}

fn product_bf16(piece: &Piece<'_>) {
    product_floats(piece, |bytes: &[u8; 2]| bf16::from_le_bytes(*bytes).to_f32());
}

/// Sums in 16 lanes, folded in halves: more exact than one long sum, and near to what vectors do.
fn product_floats<const N: usize>(piece: &Piece<'_>, value: impl Fn(&[u8; N]) -> f32) {
    for r in 0..piece.rows {
        let weights = piece.row(r).as_chunks::<N>().0;
        for t in 0..piece.tokens() {
            let mut lanes = [0.0f32; 16];
            for (w, x) in weights.chunks(16).zip(piece.x.values_of(t).chunks(16)) {
                for ((lane, w), x) in lanes.iter_mut().zip(w).zip(x) {
                    *lane += value(w) * x;
                }
            }
            for width in [8, 4, 2, 1] {
                for i in 0..width {
                    lanes[i] += lanes[i + width];
                }
            }
            piece.out.set(t, r, lanes[0]);
        }
    }
}

fn blocks<B: Block>(row: &[u8]) -> &[B] {
    blocks_from_bytes(row).expect("the matrix checked length and alignment")
}

fn product_q4_0(piece: &Piece<'_>) {
    each_block_of_32::<BlockQ4_0>(piece, |block, x, sum| {
        let dot = dot_nibbles(&block.qs, x.levels) - 8 * x.sum;
        (half_to_f32(block.d) * x.scale).mul_add(dot as f32, sum)
    });
}

fn product_q4_1(piece: &Piece<'_>) {
    each_block_of_32::<BlockQ4_1>(piece, |block, x, sum| {
        let dot = dot_nibbles(&block.qs, x.levels);
        let sum = (half_to_f32(block.d) * x.scale).mul_add(dot as f32, sum);
        half_to_f32(block.m).mul_add(x.scaled_sum, sum)
    });
}

fn product_q8_0(piece: &Piece<'_>) {
    each_block_of_32::<BlockQ8_0>(piece, |block, x, sum| {
        let products = block.qs.iter().zip(x.levels).map(|(w, x)| i32::from(*w) * i32::from(*x));
        (half_to_f32(block.d) * x.scale).mul_add(products.sum::<i32>() as f32, sum)
    });
}

/// One block of Q8_0 activations.
struct Block32<'a> {
    levels: &'a [i8; 32],
    scale: f32,
    sum: i32,
    scaled_sum: f32,
}

/// `add(block, activations, sum)` for each block of each row and token.
fn each_block_of_32<B: Block>(piece: &Piece<'_>, add: impl Fn(&B, &Block32<'_>, f32) -> f32) {
    for t in 0..piece.tokens() {
        let levels = piece.x.levels_of(t).as_chunks::<32>().0;
        let (scales, sums) = (piece.x.scales_of(t), piece.x.sums_of(t));
        let scaled_sums = piece.x.scaled_sums_of(t);
        for r in 0..piece.rows {
            let mut sum = 0.0;
            for (b, block) in blocks::<B>(piece.row(r)).iter().enumerate() {
                let x = Block32 {
                    levels: &levels[b],
                    scale: scales[b],
                    sum: sums[b],
                    scaled_sum: scaled_sums[b],
                };
                sum = add(block, &x, sum);
            }
            piece.out.set(t, r, sum);
        }
    }
}

fn dot_nibbles(nibbles: &[u8; 16], levels: &[i8; 32]) -> i32 {
    let (low, high) = levels.split_at(16);
    nibbles
        .iter()
        .zip(low.iter().zip(high))
        .map(|(q, (low, high))| {
            i32::from(q & 15) * i32::from(*low) + i32::from(q >> 4) * i32::from(*high)
        })
        .sum()
}

fn product_q4_k(piece: &Piece<'_>) {
    each_block_of_256::<BlockQ4K>(piece, |block, x, sum| {
        let mut levels = [0; 256];
        levels_q4_k(block, &mut levels);
        add_with_min(&levels, &block.scales, (block.d, block.dmin), x, sum)
    });
}

fn product_q5_k(piece: &Piece<'_>) {
    each_block_of_256::<BlockQ5K>(piece, |block, x, sum| {
        let mut levels = [0; 256];
        levels_q5_k(block, &mut levels);
        add_with_min(&levels, &block.scales, (block.d, block.dmin), x, sum)
    });
}

/// `sum + d d_x Σ sc Σ q x - dmin d_x Σ m Σ x`, one rounding for each of the two terms' factors and each addition.
fn add_with_min(
    levels: &[u8; 256],
    scales: &[u8; 12],
    (d, dmin): (u16, u16),
    x: &Block256<'_>,
    sum: f32,
) -> f32 {
    let (scales, minima) = unpack_scales(scales);
    let (mut dots, mut offsets) = (0i32, 0i32);
    for b in 0..8 {
        dots += i32::from(scales[b]) * dot(&levels[32 * b..][..32], &x.levels[32 * b..][..32]);
        let group = i32::from(x.group_sums[2 * b]) + i32::from(x.group_sums[2 * b + 1]);
        offsets += i32::from(minima[b]) * group;
    }
    let sum = (half_to_f32(d) * x.scale).mul_add(dots as f32, sum);
    (-(half_to_f32(dmin) * x.scale)).mul_add(offsets as f32, sum)
}

fn product_q6_k(piece: &Piece<'_>) {
    each_block_of_256::<BlockQ6K>(piece, |block, x, sum| {
        let mut levels = [0; 256];
        levels_q6_k(block, &mut levels);
        let mut dots = 0i32;
        for g in 0..16 {
            let dot = dot(&levels[16 * g..][..16], &x.levels[16 * g..][..16]);
            dots += i32::from(block.scales[g]) * (dot - 32 * i32::from(x.group_sums[g]));
        }
        (half_to_f32(block.d) * x.scale).mul_add(dots as f32, sum)
    });
}

fn dot(weights: &[u8], levels: &[i8]) -> i32 {
    weights.iter().zip(levels).map(|(w, x)| i32::from(*w) * i32::from(*x)).sum()
}

/// One block of Q8_K activations.
struct Block256<'a> {
    levels: &'a [i8; 256],
    scale: f32,
    group_sums: &'a [i16; 16],
}

fn each_block_of_256<B: Block>(piece: &Piece<'_>, add: impl Fn(&B, &Block256<'_>, f32) -> f32) {
    for t in 0..piece.tokens() {
        let levels = piece.x.levels_of(t).as_chunks::<256>().0;
        let group_sums = piece.x.group_sums_of(t).as_chunks::<16>().0;
        let scales = piece.x.scales_of(t);
        for r in 0..piece.rows {
            let mut sum = 0.0;
            for (b, block) in blocks::<B>(piece.row(r)).iter().enumerate() {
                let x =
                    Block256 { levels: &levels[b], scale: scales[b], group_sums: &group_sums[b] };
                sum = add(block, &x, sum);
            }
            piece.out.set(t, r, sum);
        }
    }
}

/// ggml's Q8_0 and Q8_1: levels by the F32 scale, halves away from zero, the scale kept as a half.
fn quantize_q8_0(x: &[f32], row: Q8Row<'_>) {
    let levels = row.levels.as_chunks_mut::<32>().0;
    for (b, (x, levels)) in x.as_chunks::<32>().0.iter().zip(levels).enumerate() {
        let d = x.iter().fold(0.0f32, |max, x| max.max(x.abs())) / 127.0;
        let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
        *levels = x.map(|x| (x * inverse).round() as i8);
        let sum: i32 = levels.iter().map(|level| i32::from(*level)).sum();
        row.scales[b] = f16::from_f32(d).to_f32();
        row.sums[b] = sum;
        row.scaled_sums[b] = f16::from_f32(d * sum as f32).to_f32();
    }
}

/// ggml's Q8_K: the value of largest magnitude becomes -127, halves to even.
fn quantize_q8_k(x: &[f32], row: Q8KRow<'_>) {
    let levels = row.levels.as_chunks_mut::<256>().0;
    let sums = row.group_sums.as_chunks_mut::<16>().0;
    for (b, (x, levels)) in x.as_chunks::<256>().0.iter().zip(levels).enumerate() {
        let mut extreme = 0.0f32;
        for x in x {
            if x.abs() > extreme.abs() {
                extreme = *x;
            }
        }
        let inverse = if extreme == 0.0 { 0.0 } else { -127.0 / extreme };
        *levels = x.map(|x| (x * inverse).round_ties_even().min(127.0) as i8);
        for (sum, group) in sums[b].iter_mut().zip(levels.as_chunks::<16>().0) {
            *sum = group.iter().map(|level| i16::from(*level)).sum();
        }
        row.scales[b] = if inverse == 0.0 { 0.0 } else { 1.0 / inverse };
    }
}
