//! Every form of the vector operations that this machine runs, against F64: lengths around all register
//! widths, guard zones behind the outputs, worst cases.

use scoutd_kernels::{Attention, Isa, Kernels, KvPages, Vector};

/// xorshift64*: repeatable, and good enough for test data.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// In -1..1.
    fn value(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn values(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.value()).collect()
    }
}

const GUARD: f32 = 12345.0;

/// Calls `f` with an output of `len` values between guards and checks that these survive.
fn guarded(len: usize, f: impl FnOnce(&mut [f32])) -> Vec<f32> {
    let mut out = vec![GUARD; len + 32];
    f(&mut out[16..16 + len]);
    assert!(out[..16].iter().chain(&out[16 + len..]).all(|&x| x == GUARD), "wrote past the end");
    out[16..16 + len].to_vec()
}

#[track_caller]
fn check_close(name: &str, found: &[f32], expected: &[f64], relative: f64, absolute: f64) {
    assert_eq!(found.len(), expected.len());
    for (i, (&f, &e)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(f) - e).abs();
        assert!(error <= relative * e.abs() + absolute, "{name}: [{i}] is {f}, expected {e}");
    }
}

fn lengths() -> impl Iterator<Item = usize> {
    (1..70).chain([127, 128, 576, 1000, 5120])
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// Every set this machine runs, each once.
fn available() -> impl Iterator<Item = Vector> {
    Isa::available().filter_map(Kernels::with_isa).map(|kernels| kernels.vector())
}

#[test]
fn rms_norm_agrees() {
    for vector in available() {
        let mut random = Random(1);
        for n in lengths() {
            let (x, w) = (random.values(n), random.values(n));
            let squares: f64 = wide(&x).iter().map(|x| x * x).sum();
            let factor = 1.0 / (squares / n as f64 + 1e-5).sqrt();
            let plain: Vec<f64> = wide(&x).iter().map(|x| x * factor).collect();
            let weighted: Vec<f64> = plain.iter().zip(wide(&w)).map(|(x, w)| x * w).collect();
            let name = vector.isa().name();
            check_close(
                name,
                &guarded(n, |out| vector.rms_norm(&x, Some(&w), 1e-5, out)),
                &weighted,
                8e-7,
                0.0,
            );
            check_close(
                name,
                &guarded(n, |out| vector.rms_norm(&x, None, 1e-5, out)),
                &plain,
                8e-7,
                0.0,
            );
            let heads = guarded(3 * n, |out| {
                for head in out.chunks_exact_mut(n) {
                    head.copy_from_slice(&x);
                }
                vector.rms_norm_heads(out, n, 1e-5);
            });
            for head in heads.chunks_exact(n) {
                check_close(name, head, &plain, 8e-7, 0.0);
            }
        }
    }
}

#[test]
fn rms_norm_of_zeros_is_zero() {
    for vector in available() {
        let mut out = [1.0; 40];
        vector.rms_norm(&[0.0; 40], None, 1e-5, &mut out);
        assert_eq!(out, [0.0; 40]);
    }
}

#[test]
fn rotation_agrees_and_leaves_the_rest() {
    for vector in available() {
        let mut random = Random(2);
        for head_len in (2..70).step_by(2).chain([128, 256]) {
            for turned in [head_len, head_len / 4 * 2] {
                let x = random.values(3 * head_len);
                let turn: Vec<f32> = (0..turned / 2)
                    .flat_map(|i| {
                        let angle = (i as f32 * 0.7).sin_cos();
                        [angle.1, angle.0]
                    })
                    .collect();
                let mut expected = wide(&x);
                for head in expected.chunks_exact_mut(head_len) {
                    for i in (0..turned).step_by(2) {
                        let (a, b) = (head[i], head[i + 1]);
                        let (cos, sin) = (f64::from(turn[i]), f64::from(turn[i + 1]));
                        head[i] = a * cos - b * sin;
                        head[i + 1] = a * sin + b * cos;
                    }
                }
                let found = guarded(x.len(), |out| {
                    out.copy_from_slice(&x);
                    vector.rope_interleaved(out, head_len, &turn);
                });
                check_close(vector.isa().name(), &found, &expected, 0.0, 2.5e-7);
            }
        }
    }
}

#[test]
fn gating_agrees_over_the_whole_range() {
    for vector in available() {
        for n in lengths() {
            // From -104 to 104: past both ends of what exp can represent.
            let gate: Vec<f32> = (0..n).map(|i| (i as f32 / n as f32 - 0.5) * 208.0).collect();
            let up: Vec<f32> = Random(3).values(n);
            let scale = 0.75f32;
            let expected: Vec<f64> = gate
                .iter()
                .zip(&up)
                .map(|(&g, &u)| {
                    let (g, u) = (f64::from(g * scale), f64::from(u * scale));
                    g / (1.0 + (-g).exp()) * u
                })
                .collect();
            let found = guarded(n, |out| vector.silu_mul(&gate, &up, scale, out));
            check_close(vector.isa().name(), &found, &expected, 6e-7, 1e-36);
        }
    }
}

/// `exp` is seen through softmax: the ratio of two entries is the exponential of their difference.
#[test]
fn exponentials_are_exact_to_the_stated_bound() {
    for vector in available() {
        let n = 16384;
        let x: Vec<f32> = (0..n).map(|i| -87.0 * i as f32 / n as f32).collect();
        let mut found = x.clone();
        vector.softmax(&mut found);
        let first = f64::from(found[0]);
        for (x, found) in x.iter().zip(&found) {
            let error = f64::from(*found) / first / f64::from(*x).exp() - 1.0;
            // Twice the rounding of the final product, and 2e-7 of exp itself; below 1e-38 numbers are coarse.
            let bound = if *found > 1.2e-38 { 3.5e-7 } else { 1.0 };
            assert!(error.abs() <= bound, "{}: exp({x}) is off by {error:e}", vector.isa());
        }
    }
}

#[test]
fn softmax_agrees() {
    for vector in available() {
        let mut random = Random(4);
        for n in lengths() {
            let x: Vec<f32> = random.values(n).iter().map(|x| 30.0 * x).collect();
            let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let e: Vec<f64> = x.iter().map(|x| f64::from(x - largest).exp()).collect();
            let sum: f64 = e.iter().sum();
            let expected: Vec<f64> = e.iter().map(|e| e / sum).collect();
            let found = guarded(n, |out| {
                out.copy_from_slice(&x);
                vector.softmax(out);
            });
            check_close(vector.isa().name(), &found, &expected, 8e-7, 0.0);
        }
        vector.softmax(&mut []);
    }
}

#[test]
fn sums_products_and_dots_agree() {
    for vector in available() {
        let mut random = Random(5);
        for n in 0..70 {
            let (x, y) = (random.values(n), random.values(n));
            let sum = guarded(n, |out| {
                out.copy_from_slice(&x);
                vector.add_assign(out, &y);
            });
            let product = guarded(n, |out| {
                out.copy_from_slice(&x);
                vector.scale(out, 0.3);
            });
            for i in 0..n {
                assert_eq!(sum[i], x[i] + y[i], "one rounding each");
                assert_eq!(product[i], x[i] * 0.3);
            }
        }
        for n in lengths().chain([0]) {
            let (x, y) = (random.values(n), random.values(n));
            let products: Vec<f64> = wide(&x).iter().zip(wide(&y)).map(|(x, y)| x * y).collect();
            let size: f64 = products.iter().map(|p| p.abs()).sum();
            let expected: f64 = products.iter().sum();
            let error = (f64::from(vector.dot(&x, &y)) - expected).abs();
            assert!(error <= 4e-7 * size, "{}: dot of {n} is off by {error:e}", vector.isa());
        }
    }
}

#[test]
fn argmax_finds_the_first_of_equals() {
    for vector in available() {
        let mut random = Random(6);
        assert_eq!(vector.argmax(&[]), 0);
        assert_eq!(vector.argmax(&[f32::NEG_INFINITY; 9]), 0);
        assert_eq!(vector.argmax(&[f32::NAN; 300]), 0);
        for n in lengths() {
            let mut x = random.values(n);
            let first = random.next() as usize % n;
            for i in [first, (first + n / 2).max(first).min(n - 1), n - 1] {
                x[i] = 2.0;
            }
            assert_eq!(vector.argmax(&x), first, "{} of {n}", vector.isa());
            if first > 0 {
                x[random.next() as usize % first] = f32::NAN;
                assert_eq!(vector.argmax(&x), first, "{} of {n} with NaN", vector.isa());
            }
        }
    }
}

#[test]
fn halves_convert_exactly() {
    for vector in available() {
        let all: Vec<u16> = (0..=u16::MAX).collect();
        let mut wide = vec![0.0; all.len()];
        vector.f16_to_f32(&all, &mut wide);
        for (&bits, &wide) in all.iter().zip(&wide) {
            let expected = half::f16::from_bits(bits).to_f32();
            assert!(wide == expected || wide.is_nan() && expected.is_nan(), "{bits:#x}");
        }
        // Around every half: itself, the tie with its successor, and the neighbours of the tie.
        let mut x = Vec::new();
        for &wide in wide.iter().filter(|x| x.is_finite()) {
            let tie = f32::from_bits(wide.to_bits() + 0x1000);
            x.extend([
                wide,
                tie,
                f32::from_bits(tie.to_bits() + 1),
                f32::from_bits(tie.to_bits() - 1),
            ]);
        }
        x.extend([
            f32::INFINITY,
            f32::NEG_INFINITY,
            1e-30,
            -1e-30,
            65519.9,
            65520.0,
            1e38,
            0.0,
            -0.0,
        ]);
        let mut narrow = vec![0; x.len()];
        vector.f32_to_f16(&x, &mut narrow);
        for (&x, &narrow) in x.iter().zip(&narrow) {
            assert_eq!(narrow, half::f16::from_f32(x).to_bits(), "{x} by {}", vector.isa());
        }
        for n in 0..70 {
            let found = guarded(n, |out| vector.f16_to_f32(&all[20000..20000 + n], out));
            assert_eq!(found, wide[20000..20000 + n]);
        }
    }
}

/// Attention of one shape.
struct Shape {
    head_len: usize,
    group: usize,
    tokens: usize,
    page_tokens: usize,
    keys: std::ops::Range<usize>,
}

/// Pages of random rows, as many as the shape reaches; pages before the first key are empty.
fn pages(random: &mut Random, shape: &Shape) -> Vec<Vec<f32>> {
    let last = shape.keys.end + shape.tokens - 1;
    (0..last.div_ceil(shape.page_tokens))
        .map(|page| {
            let used = (page + 1) * shape.page_tokens > shape.keys.start;
            random.values(if used { shape.page_tokens * shape.head_len } else { 0 })
        })
        .collect()
}

fn naive(
    shape: &Shape,
    queries: &[f32],
    stride: usize,
    k: &[Vec<f32>],
    v: &[Vec<f32>],
    scale: f32,
) -> Vec<f64> {
    let d = shape.head_len;
    let row = |pages: &[Vec<f32>], i: usize| {
        wide(&pages[i / shape.page_tokens][i % shape.page_tokens * d..][..d])
    };
    let mut out = Vec::new();
    for token in 0..shape.tokens {
        for head in 0..shape.group {
            let q = wide(&queries[token * stride + head * d..][..d]);
            let seen = shape.keys.start..shape.keys.end + token;
            let scores: Vec<f64> = seen
                .clone()
                .map(|i| {
                    q.iter().zip(row(k, i)).map(|(q, k)| q * k).sum::<f64>() * f64::from(scale)
                })
                .collect();
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - largest).exp()).sum();
            let mut mixed = vec![0.0; d];
            for (i, score) in seen.zip(&scores) {
                let weight = (score - largest).exp() / sum;
                for (mixed, v) in mixed.iter_mut().zip(row(v, i)) {
                    *mixed += weight * v;
                }
            }
            out.extend(mixed);
        }
    }
    out
}

fn check_attention(shape: &Shape, sharpness: f32) {
    let mut random = Random(7);
    let d = shape.head_len;
    let stride = (shape.group + 2) * d;
    let queries = random.values(shape.tokens * stride);
    let (k, v) = (pages(&mut random, shape), pages(&mut random, shape));
    let scale = sharpness / (d as f32).sqrt();
    let halves = |pages: &[Vec<f32>]| -> Vec<Vec<u16>> {
        pages
            .iter()
            .map(|p| p.iter().map(|&x| half::f16::from_f32(x).to_bits()).collect())
            .collect()
    };
    let back = |pages: &[Vec<u16>]| -> Vec<Vec<f32>> {
        pages
            .iter()
            .map(|p| p.iter().map(|&x| half::f16::from_bits(x).to_f32()).collect())
            .collect()
    };
    let (k16, v16) = (halves(&k), halves(&v));
    let expected = naive(shape, &queries, stride, &k, &v, scale);
    let expected16 = naive(shape, &queries, stride, &back(&k16), &back(&v16), scale);
    for vector in available() {
        let name = format!(
            "{} D {d} group {} tokens {} keys {:?}",
            vector.isa(),
            shape.group,
            shape.tokens,
            shape.keys
        );
        let (ks, vs): (Vec<&[f32]>, Vec<&[f32]>) =
            (k.iter().map(|p| &p[..]).collect(), v.iter().map(|p| &p[..]).collect());
        let (ks16, vs16): (Vec<&[u16]>, Vec<&[u16]>) =
            (k16.iter().map(|p| &p[..]).collect(), v16.iter().map(|p| &p[..]).collect());
        let mut attention = Attention {
            queries: &queries,
            query_stride: stride,
            group: shape.group,
            head_len: d,
            tokens: shape.tokens,
            pages: KvPages::F32 { keys: &ks, values: &vs },
            page_tokens: shape.page_tokens,
            keys: shape.keys.clone(),
            scale,
        };
        // Values lie within -1..1. Scores of size s carry a rounding of about s * 2^-24, which their
        // exponential passes on as a relative error.
        let bound = 6e-7 * f64::from(sharpness.max(1.0));
        let found = guarded(expected.len(), |out| vector.attend(&attention, out));
        check_close(&name, &found, &expected, 0.0, bound);
        attention.pages = KvPages::F16 { keys: &ks16, values: &vs16 };
        let found = guarded(expected.len(), |out| vector.attend(&attention, out));
        check_close(&name, &found, &expected16, 0.0, bound);
    }
}

#[test]
fn attention_of_one_token_agrees() {
    for head_len in [16, 24, 32, 48, 64, 80, 128, 256] {
        for (group, keys) in [
            (1, 0..1),
            (1, 0..2),
            (2, 0..33),
            (3, 5..64),
            (4, 63..65),
            (5, 0..200),
            (8, 64..129),
            (40, 100..131),
        ] {
            check_attention(&Shape { head_len, group, tokens: 1, page_tokens: 64, keys }, 1.0);
        }
    }
}

#[test]
fn attention_of_many_tokens_is_causal() {
    for (head_len, group, tokens, page_tokens, keys) in [
        (16, 1, 2, 8, 0..1),
        (64, 3, 7, 16, 0..1),
        (128, 5, 40, 64, 0..1),
        (128, 5, 33, 64, 96..150),
        (64, 1, 100, 32, 31..40),
        (32, 2, 70, 64, 64..65),
        (40, 2, 9, 64, 3..65),
    ] {
        check_attention(&Shape { head_len, group, tokens, page_tokens, keys }, 1.0);
    }
}

/// Sharp scores: rows whose maximum rises late and whose other keys all but vanish.
#[test]
fn sharp_attention_agrees() {
    for group in [1, 5] {
        let shape = Shape { head_len: 64, group, tokens: 9, page_tokens: 64, keys: 0..300 };
        check_attention(&shape, 64.0);
    }
}

#[test]
fn a_long_context_keeps_its_accuracy() {
    check_attention(
        &Shape { head_len: 64, group: 2, tokens: 1, page_tokens: 64, keys: 0..8192 },
        1.0,
    );
}

#[test]
#[should_panic(expected = "sees no key")]
fn attention_without_keys_is_refused() {
    let page: &[f32] = &[0.0; 16];
    let attention = Attention {
        queries: &[0.0; 16],
        query_stride: 16,
        group: 1,
        head_len: 16,
        tokens: 1,
        pages: KvPages::F32 { keys: &[page], values: &[page] },
        page_tokens: 1,
        keys: 1..1,
        scale: 1.0,
    };
    Vector::detect().attend(&attention, &mut [0.0; 16]);
}

#[test]
#[should_panic(expected = "page 0 is shorter")]
fn a_short_page_is_refused() {
    let page: &[f32] = &[0.0; 16];
    let attention = Attention {
        queries: &[0.0; 16],
        query_stride: 16,
        group: 1,
        head_len: 16,
        tokens: 1,
        pages: KvPages::F32 { keys: &[page], values: &[page] },
        page_tokens: 2,
        keys: 0..2,
        scale: 1.0,
    };
    Vector::detect().attend(&attention, &mut [0.0; 16]);
}
