//! Products of weights and activations: decode in bytes per second, beside what the memory of this machine streams,
//! and prefill in operations per second (two for each weight and token).
//!
//! `cargo bench -p scoutd-kernels -- decode` for one kind, `-- Q4_0` for one format. `SCOUTD_BENCH_THREADS` (1) sets
//! the team. Every timed product is checked against the scalar reference of the same rows.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use scoutd_kernels::quantize::quantize_row;
use scoutd_kernels::{Activations, Format, Isa, Kernels, Matrix, Precision, Team, matmul};

/// Columns of the matrices: the width of a model of one billion parameters.
const COLS: usize = 2048;
/// Rows for decode: larger than the caches with every format.
const DECODE_ROWS: usize = 49_152;
const PREFILL_ROWS: usize = 2048;
const PREFILL_TOKENS: usize = 128;
/// Rows whose results are compared.
const CHECKED_ROWS: usize = 64;

fn threads() -> usize {
    std::env::var("SCOUTD_BENCH_THREADS").ok().and_then(|n| n.parse().ok()).unwrap_or(1)
}

fn noise(len: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// Rows of blocks: the first ones rounded from noise, the others copies of these.
fn weights(format: Format, rows: usize) -> Vec<u8> {
    let mut first = vec![0; format.row_bytes(64 * COLS).expect("whole blocks")];
    quantize_row(format, &noise(64 * COLS), &mut first);
    let mut bytes = first.repeat(rows / 64);
    bytes.truncate(format.row_bytes(rows * COLS).expect("whole blocks"));
    bytes
}

struct Case<'a> {
    kernels: Kernels,
    matrix: Matrix<'a>,
    x: Activations,
    out: Vec<f32>,
}

impl<'a> Case<'a> {
    fn new(kernels: Kernels, matrix: Matrix<'a>, tokens: usize) -> Case<'a> {
        let mut x = Activations::new();
        let form = matrix.format().activation_form(Precision::Int8);
        x.fill(&kernels, form, &noise(tokens * COLS), COLS);
        Case { kernels, matrix, x, out: vec![0.0; tokens * matrix.rows()] }
    }

    fn run(&mut self, team: &mut Team) {
        matmul(team, &self.kernels, &self.matrix, &self.x, &mut self.out);
        black_box(&self.out);
    }

    /// The first rows of the last token against the scalar kernels.
    fn check(&self) {
        let scalar = Kernels::with_isa(Isa::Scalar).expect("everywhere");
        let matrix = self.matrix.rows_range(0..CHECKED_ROWS);
        let mut expected = vec![0.0; self.x.tokens() * CHECKED_ROWS];
        matmul(&mut Team::new(1), &scalar, &matrix, &self.x, &mut expected);
        let found = &self.out[(self.x.tokens() - 1) * self.matrix.rows()..][..CHECKED_ROWS];
        for (found, expected) in found.iter().zip(&expected[expected.len() - CHECKED_ROWS..]) {
            assert!((found - expected).abs() < 1e-3, "{found} for {expected}");
        }
    }
}

fn stream(c: &mut Criterion) {
    let words = vec![1u64; (DECODE_ROWS * COLS * 9 / 16) / 8];
    let mut group = c.benchmark_group("memory");
    group.throughput(Throughput::Bytes(8 * words.len() as u64));
    let mut team = Team::new(threads());
    group.bench_function("streaming read", |b| {
        b.iter(|| {
            let parts = team.parts();
            let sums: Vec<_> = (0..parts).map(|_| std::sync::atomic::AtomicU64::new(0)).collect();
            team.run(&|part| {
                let share = words.len() / parts;
                let sum: u64 = words[part * share..(part + 1) * share].iter().sum();
                sums[part].store(sum, std::sync::atomic::Ordering::Relaxed);
            });
            let sum: u64 = sums.into_iter().map(|sum| sum.into_inner()).sum();
            assert_eq!(sum, (words.len() / parts * parts) as u64);
        });
    });
    group.finish();
}

fn decode(c: &mut Criterion) {
    let mut team = Team::new(threads());
    let mut group = c.benchmark_group("decode");
    for format in Format::ALL {
        let rows = if format.block_len() == 1 { DECODE_ROWS / 4 } else { DECODE_ROWS };
        let bytes = weights(format, rows);
        let matrix = Matrix::new(format, rows, COLS, &bytes).expect("a matrix");
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        for isa in Isa::available().filter(|isa| *isa != Isa::Scalar) {
            let mut case = Case::new(Kernels::with_isa(isa).expect("available"), matrix, 1);
            group.bench_function(BenchmarkId::new(format.name(), isa), |b| {
                b.iter(|| case.run(&mut team));
            });
            case.run(&mut team);
            case.check();
        }
    }
    group.finish();
}

fn prefill(c: &mut Criterion) {
    let mut team = Team::new(threads());
    let mut group = c.benchmark_group("prefill");
    for format in Format::ALL {
        let bytes = weights(format, PREFILL_ROWS);
        let matrix = Matrix::new(format, PREFILL_ROWS, COLS, &bytes).expect("a matrix");
        group.throughput(Throughput::Elements((2 * PREFILL_ROWS * COLS * PREFILL_TOKENS) as u64));
        for isa in Isa::available().filter(|isa| *isa != Isa::Scalar) {
            let kernels = Kernels::with_isa(isa).expect("available");
            let mut case = Case::new(kernels, matrix, PREFILL_TOKENS);
            group.bench_function(BenchmarkId::new(format.name(), isa), |b| {
                b.iter(|| case.run(&mut team));
            });
            case.run(&mut team);
            case.check();
        }
    }
    group.finish();
}

/// What a product of a small model costs beyond its work: 192 x 64 is done by the caller alone, the other by the team.
fn small(c: &mut Criterion) {
    let mut team = Team::new(threads());
    let kernels = Kernels::detect();
    let mut group = c.benchmark_group("small");
    for rows in [16, 576] {
        let bytes = weights(Format::Q4_0, 640);
        let matrix = Matrix::new(Format::Q4_0, 640, COLS, &bytes).expect("a matrix");
        let mut case = Case::new(kernels, matrix.rows_range(0..rows), 1);
        group.bench_function(BenchmarkId::from_parameter(format!("{rows} x {COLS}")), |b| {
            b.iter(|| case.run(&mut team));
        });
    }
    let mut x = Activations::new();
    let values = noise(COLS);
    let form = Format::Q4_0.activation_form(Precision::Int8);
    group.bench_function(BenchmarkId::new("activations", COLS), |b| {
        b.iter(|| x.fill(&kernels, form, black_box(&values), COLS));
    });
    group.finish();
}

criterion_group! {
    name = products;
    config = Criterion::default().sample_size(10)
        .warm_up_time(std::time::Duration::from_millis(200))
        .measurement_time(std::time::Duration::from_millis(800));
    targets = stream, decode, prefill, small
}
criterion_main!(products);
