//! Products of weights and activations: decode in bytes per second, beside what the memory of this machine streams,
//! and prefill in operations per second (two for each weight and token).
//!
//! `cargo bench -p scoutd-kernels -- decode` for one kind, `-- Q4_0` for one format. `SCOUTD_BENCH_THREADS` (1) sets
//! the team. Every timed product is checked against the scalar reference of the same rows.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use scoutd_kernels::quantize::quantize_row;
use scoutd_kernels::{
    Activations, Format, Isa, Kernels, Matrix, Precision, Team, matmul, matmul_many,
};

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
            let sums: Vec<_> = (0..parts).map(|_| AtomicU64::new(0)).collect();
            team.run(&|part| {
                let share = words.len() / parts;
                let sum: u64 = words[part * share..(part + 1) * share].iter().sum();
                sums[part].store(sum, Relaxed);
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

/// What a product of a small model costs beyond its work: the first is done by the caller alone, the other by the team.
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

/// A job that does nothing: what waking the team and waiting for it costs.
fn team(c: &mut Criterion) {
    let mut team = Team::new(threads().max(2));
    let calls = AtomicUsize::new(0);
    let mut runs = 0;
    c.bench_function("team/empty job", |b| {
        b.iter(|| {
            runs += 1;
            team.run(&|_| {
                calls.fetch_add(1, Relaxed);
            });
        });
    });
    assert_eq!(calls.into_inner(), runs * team.parts());
}

/// All products of a token of SmolLM2-135M in its own formats (Q4_1, head Q8_0).
struct SmallModel {
    layer: Vec<(usize, usize, Vec<u8>)>,
    head: Vec<u8>,
}

impl SmallModel {
    const HIDDEN: usize = 576;
    const FEED_FORWARD: usize = 1536;
    const VOCABULARY: usize = 49_152;
    const LAYERS: usize = 30;

    fn new() -> SmallModel {
        let (hidden, wide) = (Self::HIDDEN, Self::FEED_FORWARD);
        let shapes = [
            (hidden, hidden),
            (192, hidden),
            (192, hidden),
            (hidden, hidden),
            (wide, hidden),
            (wide, hidden),
            (hidden, wide),
        ];
        // Each layer has weights of its own, as in a model they come from memory.
        let layer = (0..Self::LAYERS).flat_map(|_| shapes).map(|(rows, cols)| {
            let mut bytes = vec![0; Format::Q4_1.row_bytes(rows * cols).expect("whole blocks")];
            quantize_row(Format::Q4_1, &noise(rows * cols), &mut bytes);
            (rows, cols, bytes)
        });
        let len = Self::VOCABULARY * hidden;
        let mut head = vec![0; Format::Q8_0.row_bytes(len).expect("whole blocks")];
        quantize_row(Format::Q8_0, &noise(len), &mut head);
        SmallModel { layer: layer.collect(), head }
    }

    /// The products of `tokens` tokens; logits of one.
    fn run(&self, team: &mut Team, kernels: &Kernels, x: &mut Activations, tokens: usize) -> f32 {
        let input = noise(tokens * Self::FEED_FORWARD);
        let (narrow, wide) = (&input[..tokens * Self::HIDDEN], &input[..]);
        let mut out = [(); 3].map(|()| vec![0.0; tokens * Self::FEED_FORWARD]);
        let form = Format::Q4_1.activation_form(Precision::Int8);
        for layer in self.layer.chunks(7) {
            for some in [&layer[..3], &layer[3..4], &layer[4..6], &layer[6..]] {
                let cols = some[0].1;
                x.fill(kernels, form, if cols == Self::HIDDEN { narrow } else { wide }, cols);
                let mut products: Vec<(Matrix<'_>, &mut [f32])> = some
                    .iter()
                    .zip(&mut out)
                    .map(|((rows, cols, bytes), out)| {
                        let matrix = Matrix::new(Format::Q4_1, *rows, *cols, bytes);
                        (matrix.expect("a matrix"), &mut out[..tokens * rows])
                    })
                    .collect();
                matmul_many(team, kernels, &mut products, x);
            }
        }
        let head = Matrix::new(Format::Q8_0, Self::VOCABULARY, Self::HIDDEN, &self.head);
        let mut logits = vec![0.0; Self::VOCABULARY];
        x.fill(kernels, form, &input[..Self::HIDDEN], Self::HIDDEN);
        matmul(team, kernels, &head.expect("a matrix"), x, &mut logits);
        logits[0] + out[0][0]
    }
}

fn model(c: &mut Criterion) {
    let mut team = Team::new(threads());
    let mut group = c.benchmark_group("SmolLM2-135M products");
    let model = SmallModel::new();
    let mut x = Activations::new();
    for tokens in [1, 128] {
        let scalar = Kernels::with_isa(Isa::Scalar).expect("everywhere");
        let expected = model.run(&mut team, &scalar, &mut x, tokens);
        group.throughput(Throughput::Elements(tokens as u64));
        for isa in Isa::available().filter(|isa| *isa != Isa::Scalar) {
            let kernels = Kernels::with_isa(isa).expect("available");
            group.bench_function(BenchmarkId::new(format!("{tokens} tokens"), isa), |b| {
                b.iter(|| assert_eq!(model.run(&mut team, &kernels, &mut x, tokens), expected));
            });
        }
    }
    group.finish();
}

criterion_group! {
    name = products;
    config = Criterion::default().sample_size(10)
        .warm_up_time(std::time::Duration::from_millis(200))
        .measurement_time(std::time::Duration::from_millis(800));
    targets = stream, decode, prefill, small, team, model
}
criterion_main!(products);
