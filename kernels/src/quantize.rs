//! Rounding rows of F32 into blocks, and reading them back: ggml's reference rounding, bit for bit.
//!
//! All arithmetic is F32, in the order of the C reference, never fused: a build of llama.cpp that fuses
//! multiply-add gives other bytes in a few blocks. No importance matrix.

use half::{bf16, f16};

use crate::blocks::{
    Block, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5K, BlockQ6K, BlockQ8_0, blocks_from_bytes,
    blocks_from_bytes_mut, unpack_scales,
};
use crate::format::Format;

/// Rounds a row of values to `format`.
///
/// # Panics
/// If the values are no whole blocks, or `out` has not exactly the bytes of the row, or is badly aligned.
pub fn quantize_row(format: Format, values: &[f32], out: &mut [u8]) {
    assert_eq!(format.row_bytes(values.len()), Some(out.len()), "bytes of a {format} row");
    match format {
        Format::F32 => {
            for (value, out) in values.iter().zip(out.as_chunks_mut().0) {
                *out = value.to_le_bytes();
            }
        }
        Format::F16 => {
            for (value, out) in values.iter().zip(out.as_chunks_mut().0) {
                *out = f16::from_f32(*value).to_le_bytes();
            }
        }
        Format::Bf16 => {
            for (value, out) in values.iter().zip(out.as_chunks_mut().0) {
                *out = bf16::from_f32(*value).to_le_bytes();
            }
        }
        Format::Q4_0 => each_block_mut(values, out, quantize_q4_0),
        Format::Q4_1 => each_block_mut(values, out, quantize_q4_1),
        Format::Q8_0 => each_block_mut(values, out, quantize_q8_0),
        Format::Q4K => each_block_mut(values, out, quantize_q4_k),
        Format::Q5K => each_block_mut(values, out, quantize_q5_k),
        Format::Q6K => each_block_mut(values, out, quantize_q6_k),
    }
}

/// Reads a row of `format` back.
///
/// # Panics
/// As [`quantize_row`].
pub fn dequantize_row(format: Format, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(format.row_bytes(out.len()), Some(bytes.len()), "bytes of a {format} row");
    match format {
        Format::F32 => {
            for (bytes, out) in bytes.as_chunks().0.iter().zip(out) {
                *out = f32::from_le_bytes(*bytes);
            }
        }
        Format::F16 => {
            for (bytes, out) in bytes.as_chunks().0.iter().zip(out) {
                *out = f16::from_le_bytes(*bytes).to_f32();
            }
        }
        Format::Bf16 => {
            for (bytes, out) in bytes.as_chunks().0.iter().zip(out) {
                *out = bf16::from_le_bytes(*bytes).to_f32();
            }
        }
        Format::Q4_0 => each_block(bytes, out, dequantize_q4_0),
        Format::Q4_1 => each_block(bytes, out, dequantize_q4_1),
        Format::Q8_0 => each_block(bytes, out, dequantize_q8_0),
        Format::Q4K => each_block(bytes, out, dequantize_q4_k),
        Format::Q5K => each_block(bytes, out, dequantize_q5_k),
        Format::Q6K => each_block(bytes, out, dequantize_q6_k),
    }
}

fn each_block_mut<B: Block, const N: usize>(
    values: &[f32],
    out: &mut [u8],
    quantize: impl Fn(&[f32; N]) -> B,
) {
    let blocks = blocks_from_bytes_mut::<B>(out).expect("an aligned row of whole blocks");
    for (block, values) in blocks.iter_mut().zip(values.as_chunks().0) {
        *block = quantize(values);
    }
}

fn each_block<B: Block, const N: usize>(
    bytes: &[u8],
    out: &mut [f32],
    dequantize: impl Fn(&B, &mut [f32; N]),
) {
    let blocks = blocks_from_bytes::<B>(bytes).expect("an aligned row of whole blocks");
    for (block, out) in blocks.iter().zip(out.as_chunks_mut().0) {
        dequantize(block, out);
    }
}

pub(crate) fn half_to_f32(bits: u16) -> f32 {
    f16::from_bits(bits).to_f32()
}

fn half_bits(value: f32) -> u16 {
    f16::from_f32(value).to_bits()
}

/// Half to even, as adding 1.5 * 2^23 rounds.
fn nearest(value: f32) -> i32 {
    value.round_ties_even() as i32
}

fn reciprocal(value: f32) -> f32 {
    if value == 0.0 { 0.0 } else { 1.0 / value }
}

/// `b` only where it is greater: of zeros of both signs the first stays, which `f32::max` leaves open.
fn greater(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// As [`greater`], the other way.
fn lesser(a: f32, b: f32) -> f32 {
    if b < a { b } else { a }
}

/// The signed value of largest magnitude, the first of equals.
fn extreme(values: &[f32]) -> f32 {
    let mut best = 0.0f32;
    for value in values {
        if value.abs() > best.abs() {
            best = *value;
        }
    }
    best
}

fn low_nibbles_first(levels: &[u8; 32]) -> [u8; 16] {
    std::array::from_fn(|j| levels[j] | levels[j + 16] << 4)
}

fn quantize_q4_0(x: &[f32; 32]) -> BlockQ4_0 {
    let d = extreme(x) / -8.0;
    let inverse = reciprocal(d);
    let levels = x.map(|x| ((x * inverse + 8.5) as i8).clamp(0, 15) as u8);
    BlockQ4_0 { d: half_bits(d), qs: low_nibbles_first(&levels) }
}

fn quantize_q4_1(x: &[f32; 32]) -> BlockQ4_1 {
    let (min, max) =
        x.iter().fold((x[0], x[0]), |(min, max), x| (lesser(min, *x), greater(max, *x)));
    let d = (max - min) / 15.0;
    let inverse = reciprocal(d);
    let levels = x.map(|x| (((x - min) * inverse + 0.5) as i8).clamp(0, 15) as u8);
    BlockQ4_1 { d: half_bits(d), m: half_bits(min), qs: low_nibbles_first(&levels) }
}

fn quantize_q8_0(x: &[f32; 32]) -> BlockQ8_0 {
    let d = x.iter().fold(0.0f32, |max, x| max.max(x.abs())) / 127.0;
    let inverse = reciprocal(d);
    BlockQ8_0 { d: half_bits(d), qs: x.map(|x| (x * inverse).round() as i8) }
}

/// What the search for the scale and minimum of 32 values found: `x = scale q - min`.
struct Group {
    scale: f32,
    min: f32,
    levels: [u8; 32],
}

/// The grid of a K-quant with minimum: highest level, and where the search over scales starts and ends.
struct Grid {
    top: f32,
    first: f32,
    steps: u8,
}

const Q4_K_GRID: Grid = Grid { top: 15.0, first: -1.0, steps: 20 };
const Q5_K_GRID: Grid = Grid { top: 31.0, first: -0.5, steps: 15 };

/// `make_qkx2_quants`: a first guess, then weighted least squares over a series of scales.
fn search_scale_and_min(x: &[f32; 32], grid: &Grid) -> Group {
    let mean_square = x.iter().fold(0.0f32, |sum, x| sum + x * x) / 32.0;
    let w = x.map(|x| mean_square.sqrt() + x.abs());
    let (mut min, max) =
        x.iter().fold((x[0], x[0]), |(min, max), x| (lesser(min, *x), greater(max, *x)));
    let (mut sum_w, mut sum_x) = (w[0], w[0] * x[0]);
    for i in 1..32 {
        sum_w += w[i];
        sum_x += w[i] * x[i];
    }
    min = lesser(0.0, min);
    if max == min {
        return Group { scale: 0.0, min: -min, levels: [0; 32] };
    }
    let levels_at = |inverse: f32, min: f32| {
        x.map(|x| (nearest(inverse * (x - min)) as f32).clamp(0.0, grid.top))
    };
    let error_of = |levels: &[f32; 32], scale: f32, min: f32| {
        (0..32).fold(0.0f32, |sum, i| {
            let diff = scale * levels[i] + min - x[i];
            sum + w[i] * (diff * diff)
        })
    };
    let inverse = grid.top / (max - min);
    let mut scale = 1.0 / inverse;
    let mut best = levels_at(inverse, min);
    let mut best_error = error_of(&best, scale, min);
    for step in 0..=grid.steps {
        let inverse = (grid.first + 0.1 * f32::from(step) + grid.top) / (max - min);
        let levels = levels_at(inverse, min);
        let (mut sum_l, mut sum_l2, mut sum_xl) = (0.0f32, 0.0f32, 0.0f32);
        for i in 0..32 {
            let l = levels[i];
            sum_l += w[i] * l;
            sum_l2 += w[i] * l * l;
            sum_xl += w[i] * l * x[i];
        }
        let determinant = sum_w * sum_l2 - sum_l * sum_l;
        if determinant <= 0.0 || determinant.is_nan() {
            continue;
        }
        let mut this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        let mut this_min = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        if this_min > 0.0 {
            this_min = 0.0;
            this_scale = sum_xl / sum_l2;
        }
        let error = error_of(&levels, this_scale, this_min);
        if error < best_error {
            (best, best_error, scale, min) = (levels, error, this_scale, this_min);
        }
    }
    Group { scale, min: -min, levels: best.map(|l| l as u8) }
}

/// The header that Q4_K and Q5_K share, and the final levels of the 8 groups.
fn quantize_with_min(x: &[f32; 256], grid: &Grid) -> (u16, u16, [u8; 12], [[u8; 32]; 8]) {
    let (groups, _) = x.as_chunks::<32>();
    let found: [Group; 8] = std::array::from_fn(|b| search_scale_and_min(&groups[b], grid));
    let max_scale = found.iter().fold(0.0, |max, g| greater(max, g.scale));
    let max_min = found.iter().fold(0.0, |max, g| greater(max, g.min));
    let per_scale = if max_scale > 0.0 { 63.0 / max_scale } else { 0.0 };
    let per_min = if max_min > 0.0 { 63.0 / max_min } else { 0.0 };
    let scales: [u8; 8] =
        std::array::from_fn(|b| (nearest(per_scale * found[b].scale) as u8).min(63));
    let minima: [u8; 8] = std::array::from_fn(|b| (nearest(per_min * found[b].min) as u8).min(63));
    let mut packed = [0u8; 12];
    for j in 0..4 {
        packed[j] = scales[j] | scales[j + 4] >> 4 << 6;
        packed[j + 4] = minima[j] | minima[j + 4] >> 4 << 6;
        packed[j + 8] = (scales[j + 4] & 15) | (minima[j + 4] & 15) << 4;
    }
    let (d, dmin) = (half_bits(max_scale / 63.0), half_bits(max_min / 63.0));
    let levels = std::array::from_fn(|b| {
        let scale = half_to_f32(d) * f32::from(scales[b]);
        if scale == 0.0 {
            return found[b].levels;
        }
        let min = half_to_f32(dmin) * f32::from(minima[b]);
        groups[b].map(|x| nearest((x + min) / scale).clamp(0, grid.top as i32) as u8)
    });
    (d, dmin, packed, levels)
}

/// Nibbles of 8 groups: 32 bytes hold two of them.
fn pack_nibbles(levels: &[[u8; 32]; 8]) -> [u8; 128] {
    std::array::from_fn(|i| {
        let (pair, j) = (i / 32 * 2, i % 32);
        (levels[pair][j] & 15) | levels[pair + 1][j] << 4
    })
}

fn quantize_q4_k(x: &[f32; 256]) -> BlockQ4K {
    let (d, dmin, scales, levels) = quantize_with_min(x, &Q4_K_GRID);
    BlockQ4K { d, dmin, scales, qs: pack_nibbles(&levels) }
}

fn quantize_q5_k(x: &[f32; 256]) -> BlockQ5K {
    let (d, dmin, scales, levels) = quantize_with_min(x, &Q5_K_GRID);
    let qh = std::array::from_fn(|j| (0..8).fold(0, |bits, b| bits | (levels[b][j] >> 4 & 1) << b));
    BlockQ5K { d, dmin, scales, qh, qs: pack_nibbles(&levels) }
}

/// `make_qx_quants` with weights x²: the scale of 16 values and their levels, offset by 32.
fn search_scale(x: &[f32; 16]) -> (f32, [u8; 16]) {
    let m = extreme(x);
    if m.abs() < GROUP_EPS {
        return (0.0, [0; 16]);
    }
    let at = |inverse: f32| {
        let levels = x.map(|x| nearest(inverse * x).clamp(-32, 31));
        let (mut sum_lx, mut sum_l2) = (0.0f32, 0.0f32);
        for (x, l) in x.iter().zip(levels) {
            let (w, l) = (x * x, l as f32);
            sum_lx += w * x * l;
            sum_l2 += w * l * l;
        }
        (levels, sum_lx, sum_l2)
    };
    let (mut levels, sum_lx, sum_l2) = at(-32.0 / m);
    let mut scale = if sum_l2 == 0.0 { 0.0 } else { sum_lx / sum_l2 };
    let mut best = scale * sum_lx;
    for step in (-9i8..=9).filter(|step| *step != 0) {
        let (these, sum_lx, sum_l2) = at(-(32.0 + 0.1 * f32::from(step)) / m);
        if sum_l2 > 0.0 && sum_lx * sum_lx > best * sum_l2 {
            levels = these;
            scale = sum_lx / sum_l2;
            best = scale * sum_lx;
        }
    }
    (scale, levels.map(|l| (l + 32) as u8))
}

/// Below this a group of Q6_K counts as zero.
const GROUP_EPS: f32 = 1e-15;

fn quantize_q6_k(x: &[f32; 256]) -> BlockQ6K {
    let (groups, _) = x.as_chunks::<16>();
    let found: [(f32, [u8; 16]); 16] = std::array::from_fn(|g| search_scale(&groups[g]));
    let max_scale = extreme(&found.map(|(scale, _)| scale));
    if max_scale.abs() < GROUP_EPS {
        return BlockQ6K { ql: [0; 128], qh: [0; 64], scales: [0; 16], d: 0 };
    }
    let inverse = -128.0 / max_scale;
    let d = half_bits(1.0 / inverse);
    let scales = found.map(|(scale, _)| nearest(inverse * scale).min(127) as i8);
    let mut levels = [0u8; 256];
    for (g, out) in levels.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = half_to_f32(d) * f32::from(scales[g]);
        *out = if scale == 0.0 {
            found[g].1
        } else {
            groups[g].map(|x| (nearest(x / scale).clamp(-32, 31) + 32) as u8)
        };
    }
    let (mut ql, mut qh) = ([0u8; 128], [0u8; 64]);
    for half in 0..2 {
        for l in 0..32 {
            let [a, b, c, d] = std::array::from_fn(|k| levels[128 * half + 32 * k + l]);
            ql[64 * half + l] = (a & 15) | (c & 15) << 4;
            ql[64 * half + 32 + l] = (b & 15) | (d & 15) << 4;
            qh[32 * half + l] = a >> 4 | b >> 4 << 2 | c >> 4 << 4 | d >> 4 << 6;
        }
    }
    BlockQ6K { ql, qh, scales, d }
}

fn dequantize_q4_0(block: &BlockQ4_0, out: &mut [f32; 32]) {
    let d = half_to_f32(block.d);
    for (j, q) in block.qs.iter().enumerate() {
        out[j] = f32::from((q & 15) as i8 - 8) * d;
        out[j + 16] = f32::from((q >> 4) as i8 - 8) * d;
    }
}

fn dequantize_q4_1(block: &BlockQ4_1, out: &mut [f32; 32]) {
    let (d, m) = (half_to_f32(block.d), half_to_f32(block.m));
    for (j, q) in block.qs.iter().enumerate() {
        out[j] = f32::from(q & 15) * d + m;
        out[j + 16] = f32::from(q >> 4) * d + m;
    }
}

fn dequantize_q8_0(block: &BlockQ8_0, out: &mut [f32; 32]) {
    let d = half_to_f32(block.d);
    for (q, out) in block.qs.iter().zip(out) {
        *out = f32::from(*q) * d;
    }
}

fn dequantize_q4_k(block: &BlockQ4K, out: &mut [f32; 256]) {
    let mut levels = [0u8; 256];
    levels_q4_k(block, &mut levels);
    scale_groups(block.d, block.dmin, &block.scales, &levels, out);
}

fn dequantize_q5_k(block: &BlockQ5K, out: &mut [f32; 256]) {
    let mut levels = [0u8; 256];
    levels_q5_k(block, &mut levels);
    scale_groups(block.d, block.dmin, &block.scales, &levels, out);
}

fn scale_groups(d: u16, dmin: u16, scales: &[u8; 12], levels: &[u8; 256], out: &mut [f32; 256]) {
    let (d, dmin) = (half_to_f32(d), half_to_f32(dmin));
    let (scales, minima) = unpack_scales(scales);
    for (i, out) in out.iter_mut().enumerate() {
        let (scale, min) = (d * f32::from(scales[i / 32]), dmin * f32::from(minima[i / 32]));
        *out = scale * f32::from(levels[i]) - min;
    }
}

fn dequantize_q6_k(block: &BlockQ6K, out: &mut [f32; 256]) {
    let d = half_to_f32(block.d);
    let mut levels = [0u8; 256];
    levels_q6_k(block, &mut levels);
    for (i, out) in out.iter_mut().enumerate() {
        *out = d * f32::from(block.scales[i / 16]) * f32::from(levels[i] as i8 - 32);
    }
}

/// The levels 0..16 in the order of the values.
pub(crate) fn levels_q4_k(block: &BlockQ4K, levels: &mut [u8; 256]) {
    for (pair, bytes) in block.qs.as_chunks::<32>().0.iter().enumerate() {
        for (j, byte) in bytes.iter().enumerate() {
            levels[64 * pair + j] = byte & 15;
            levels[64 * pair + 32 + j] = byte >> 4;
        }
    }
}

/// The levels 0..32 in the order of the values.
pub(crate) fn levels_q5_k(block: &BlockQ5K, levels: &mut [u8; 256]) {
    for (pair, bytes) in block.qs.as_chunks::<32>().0.iter().enumerate() {
        for (j, byte) in bytes.iter().enumerate() {
            let high = block.qh[j] >> (2 * pair);
            levels[64 * pair + j] = (byte & 15) | (high & 1) << 4;
            levels[64 * pair + 32 + j] = byte >> 4 | (high >> 1 & 1) << 4;
        }
    }
}

/// The levels 0..64, offset by 32, in the order of the values.
pub(crate) fn levels_q6_k(block: &BlockQ6K, levels: &mut [u8; 256]) {
    for half in 0..2 {
        for l in 0..32 {
            let (low, next) = (block.ql[64 * half + l], block.ql[64 * half + 32 + l]);
            let high = block.qh[32 * half + l];
            let at = 128 * half + l;
            levels[at] = (low & 15) | (high & 3) << 4;
            levels[at + 32] = (next & 15) | (high >> 2 & 3) << 4;
            levels[at + 64] = low >> 4 | (high >> 4 & 3) << 4;
            levels[at + 96] = next >> 4 | (high >> 6) << 4;
        }
    }
}
