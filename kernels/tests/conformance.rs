//! Every instruction set of this processor against the scalar reference.
//!
//! Integer products add exact block sums in the order of the row, so they must agree bit for bit, NaN aside; so must
//! the rounding of activations, which shows in them. Float products add in another order: they are held to a bound
//! against F64. `SCOUTD_REQUIRE_ISA=name` fails where that set is missing.

use proptest::prelude::*;
use scoutd_kernels::quantize::quantize_row;
use scoutd_kernels::{
    ActivationForm, Activations, Format, Isa, Kernels, Matrix, Precision, Team, matmul,
};

const QUANTIZED: [Format; 6] =
    [Format::Q4_0, Format::Q4_1, Format::Q8_0, Format::Q4K, Format::Q5K, Format::Q6K];
const FLOATS: [Format; 3] = [Format::F32, Format::F16, Format::Bf16];

/// Numbers from a seed, the same everywhere.
struct Noise(u64);

impl Noise {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Between -1 and 1.
    fn value(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn values(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.value()).collect()
    }
}

/// Finite halves of every kind.
fn half(noise: &mut Noise) -> u16 {
    match noise.bits() % 8 {
        0 => 0,
        1 => 0x8000,
        2 => 1 + (noise.bits() % 0x3ff) as u16,
        3 => 0x7bff,
        _ => (0x1000 + (noise.bits() % 0x2800) as u16) | (noise.bits() as u16 & 0x8000),
    }
}

/// Where the halves of a block lie.
fn halves_of(format: Format) -> &'static [usize] {
    match format {
        Format::Q4_0 | Format::Q8_0 => &[0],
        Format::Q4_1 | Format::Q4K | Format::Q5K => &[0, 2],
        Format::Q6K => &[208],
        Format::F32 | Format::F16 | Format::Bf16 => &[],
    }
}

/// How the levels of weights are chosen.
#[derive(Clone, Copy, Debug)]
enum Levels {
    Random,
    All(u8),
}

/// Blocks of any levels and of finite scales.
fn blocks(format: Format, values: usize, levels: Levels, noise: &mut Noise) -> Vec<u8> {
    let mut bytes = vec![0; format.row_bytes(values).expect("whole blocks")];
    for byte in &mut bytes {
        *byte = match levels {
            Levels::Random => noise.bits() as u8,
            Levels::All(byte) => byte,
        };
    }
    for block in bytes.chunks_exact_mut(format.block_bytes()) {
        for at in halves_of(format) {
            block[*at..at + 2].copy_from_slice(&half(noise).to_le_bytes());
        }
    }
    bytes
}

struct Shape {
    rows: usize,
    cols: usize,
    tokens: usize,
}

fn product(kernels: &Kernels, matrix: &Matrix<'_>, form: ActivationForm, x: &[f32]) -> Vec<f32> {
    const GUARD: usize = 64;
    let mut activations = Activations::new();
    activations.fill(kernels, form, x, matrix.cols());
    let len = matrix.rows() * activations.tokens();
    let mut guarded = vec![f32::from_bits(0x7fc0_1234); len + 2 * GUARD];
    let out = &mut guarded[GUARD..GUARD + len];
    matmul(&mut Team::new(1), kernels, matrix, &activations, out);
    let (before, rest) = guarded.split_at(GUARD);
    let (out, after) = rest.split_at(len);
    let intact = |guard: &[f32]| guard.iter().all(|value| value.to_bits() == 0x7fc0_1234);
    assert!(intact(before) && intact(after), "written outside of the result");
    out.to_vec()
}

fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

fn check(format: Format, shape: &Shape, bytes: &[u8], x: &[f32]) {
    let matrix = Matrix::new(format, shape.rows, shape.cols, bytes).expect("a matrix");
    let form = format.activation_form(Precision::Int8);
    let scalar = Kernels::with_isa(Isa::Scalar).expect("everywhere");
    let expected = product(&scalar, &matrix, form, x);
    for isa in Isa::available() {
        let kernels = Kernels::with_isa(isa).expect("available");
        let found = product(&kernels, &matrix, form, x);
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let (t, r) = (i / shape.rows, i % shape.rows);
            let Shape { rows, cols, tokens } = shape;
            assert!(
                same(*found, *expected),
                "{isa} {format} {rows} x {cols}, {tokens} tokens: row {r} of token {t} is {found}, not {expected}"
            );
        }
    }
}

fn check_random(format: Format, shape: &Shape, seed: u64) {
    let mut noise = Noise(seed);
    let bytes = blocks(format, shape.rows * shape.cols, Levels::Random, &mut noise);
    let x = noise.values(shape.tokens * shape.cols);
    check(format, shape, &bytes, &x);
}

#[test]
fn required_set_is_available() {
    if let Ok(name) = std::env::var("SCOUTD_REQUIRE_ISA") {
        let isa: Isa = name.parse().expect("SCOUTD_REQUIRE_ISA names a set");
        assert!(isa.is_available(), "{isa} is required and missing");
        assert_eq!(Kernels::with_isa(isa).map(|kernels| kernels.isa()), Some(isa));
    }
}

#[test]
fn any_number_of_blocks() {
    for format in QUANTIZED {
        for blocks in 1..=70 {
            let cols = blocks * format.block_len();
            check_random(format, &Shape { rows: 3, cols, tokens: 1 }, blocks as u64);
        }
    }
}

#[test]
fn no_rows_and_no_tokens() {
    for format in Format::ALL {
        for (rows, tokens) in [(0, 2), (3, 0), (0, 0)] {
            check_random(format, &Shape { rows, cols: 256, tokens }, 1);
        }
    }
}

#[test]
fn any_number_of_rows_and_tokens() {
    for format in QUANTIZED {
        for (rows, tokens) in [
            (1, 1),
            (15, 1),
            (16, 1),
            (17, 1),
            (33, 1),
            (64, 1),
            (7, 2),
            (16, 2),
            (18, 3),
            (31, 4),
            (16, 5),
            (5, 7),
            (16, 8),
            (40, 9),
            (17, 13),
            (16, 16),
            (3, 63),
            (20, 64),
            (18, 65),
            (16, 130),
            (2, 150),
        ] {
            let seed = (1000 * rows + tokens) as u64;
            check_random(format, &Shape { rows, cols: 768, tokens }, seed);
        }
    }
}

#[test]
fn sizes_of_models() {
    for format in QUANTIZED {
        for cols in [512, 1536, 2048, 5120, 8192] {
            check_random(format, &Shape { rows: 18, cols, tokens: 1 }, cols as u64);
            check_random(format, &Shape { rows: 16, cols, tokens: 9 }, cols as u64);
        }
    }
    for format in [Format::Q4_0, Format::Q4_1, Format::Q8_0] {
        check_random(format, &Shape { rows: 33, cols: 576, tokens: 11 }, 576);
    }
}

#[test]
fn worst_levels() {
    let shape = Shape { rows: 17, cols: 1024, tokens: 9 };
    let len = shape.tokens * shape.cols;
    let activations: [Vec<f32>; 8] = [
        vec![1.0; len],
        vec![-1.0; len],
        (0..len).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 }).collect(),
        vec![0.0; len],
        vec![-0.0; len],
        vec![1e-42; len],
        vec![3e38; len],
        (0..len).map(|i| (i % 255) as f32 - 127.5).collect(),
    ];
    for format in QUANTIZED {
        for byte in [0x00, 0x7f, 0x80, 0x81, 0xff, 0xf0, 0x0f] {
            let mut noise = Noise(u64::from(byte));
            let len = shape.rows * shape.cols;
            let bytes = blocks(format, len, Levels::All(byte), &mut noise);
            for x in &activations {
                check(format, &shape, &bytes, x);
            }
        }
    }
}

#[test]
fn rounding_of_activations() {
    let mut noise = Noise(9);
    let cols = 2048;
    for scale in [1e-40, 1e-8, 1e-3, 1.0, 77.0, 1e5, 1e30] {
        let mut x: Vec<f32> = noise.values(3 * cols).iter().map(|x| x * scale).collect();
        // Ties: with a largest value of 127 steps, every half step lies between two levels.
        for (i, x) in x[cols..2 * cols].iter_mut().enumerate() {
            *x = if i % 32 == 5 { -127.0 } else { (noise.bits() % 509) as f32 / 2.0 - 127.0 }
                * scale;
        }
        for format in [Format::Q8_0, Format::Q4_1, Format::Q6K] {
            let shape = Shape { rows: 16, cols, tokens: 3 };
            let bytes = blocks(format, shape.rows * cols, Levels::Random, &mut noise);
            check(format, &shape, &bytes, &x);
        }
    }
}

/// `form` F32: against F64 within one rounding for each addition of a lane (four at least) of what the terms amount to.
fn check_exact(format: Format, shape: &Shape, seed: u64) {
    let mut noise = Noise(seed);
    let weights = noise.values(shape.rows * shape.cols);
    let mut bytes = vec![0; format.row_bytes(weights.len()).expect("whole blocks")];
    quantize_row(format, &weights, &mut bytes);
    let matrix = Matrix::new(format, shape.rows, shape.cols, &bytes).expect("a matrix");
    let x = noise.values(shape.tokens * shape.cols);
    for isa in Isa::available() {
        let kernels = Kernels::with_isa(isa).expect("available");
        let found = product(&kernels, &matrix, ActivationForm::F32, &x);
        let mut row = vec![0.0; shape.cols];
        for r in 0..shape.rows {
            matrix.row_to_f32(r, &mut row);
            for t in 0..shape.tokens {
                let terms = row.iter().zip(&x[t * shape.cols..]);
                let terms = terms.map(|(w, x)| f64::from(*w) * f64::from(*x));
                let (sum, size) =
                    terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
                let bound = (shape.cols as f64 / 4.0 + 6.0) * f64::from(f32::EPSILON) * size;
                let diff = (f64::from(found[t * shape.rows + r]) - sum).abs();
                assert!(diff <= bound, "{isa} {format} {}: {diff} over {bound}", shape.cols);
            }
        }
    }
}

#[test]
fn float_products_keep_their_bound() {
    for format in FLOATS {
        for cols in (1..=70).chain([576, 1000, 2047]) {
            check_exact(format, &Shape { rows: 6, cols, tokens: 1 }, cols as u64);
        }
        for (rows, tokens) in [(1, 5), (4, 4), (5, 9), (19, 6)] {
            check_exact(format, &Shape { rows, cols: 99, tokens }, tokens as u64);
        }
    }
}

#[test]
fn exact_products_equal_those_of_the_dequantized_matrix() {
    let (rows, cols, tokens) = (35, 1024, 3);
    for format in QUANTIZED {
        check_exact(format, &Shape { rows, cols, tokens }, 3);
        let mut noise = Noise(4);
        let bytes = blocks(format, rows * cols, Levels::Random, &mut noise);
        let matrix = Matrix::new(format, rows, cols, &bytes).expect("a matrix");
        let mut values = vec![0.0f32; rows * cols];
        for (row, values) in values.chunks_exact_mut(cols).enumerate() {
            matrix.row_to_f32(row, values);
        }
        let mut plain = vec![0; 4 * values.len()];
        quantize_row(Format::F32, &values, &mut plain);
        let plain = Matrix::new(Format::F32, rows, cols, &plain).expect("a matrix");
        let x = noise.values(tokens * cols);
        for isa in Isa::available() {
            let kernels = Kernels::with_isa(isa).expect("available");
            let found = product(&kernels, &matrix, ActivationForm::F32, &x);
            let expected = product(&kernels, &plain, ActivationForm::F32, &x);
            assert!(found.iter().zip(&expected).all(|(a, b)| same(*a, *b)), "{isa} {format}");
        }
    }
}

#[test]
fn results_do_not_depend_on_threads() {
    let (rows, cols, tokens) = (1000, 256, 5);
    for format in Format::ALL {
        let mut noise = Noise(5);
        let weights = noise.values(rows * cols);
        let mut bytes = vec![0; format.row_bytes(weights.len()).expect("whole blocks")];
        quantize_row(format, &weights, &mut bytes);
        let matrix = Matrix::new(format, rows, cols, &bytes).expect("a matrix");
        let kernels = Kernels::detect();
        let mut x = Activations::new();
        let form = format.activation_form(Precision::Int8);
        x.fill(&kernels, form, &noise.values(tokens * cols), cols);
        let results = [1, 2, 3, 7].map(|threads| {
            let mut out = vec![0.0; rows * tokens];
            matmul(&mut Team::new(threads), &kernels, &matrix, &x, &mut out);
            out
        });
        assert!(results.iter().all(|out| *out == results[0]), "{format}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_shape(kind in 0usize..6, rows in 1usize..50, blocks in 1usize..9, tokens in 1usize..80, seed: u64) {
        let format = QUANTIZED[kind];
        check_random(format, &Shape { rows, cols: blocks * format.block_len(), tokens }, seed);
    }
}
