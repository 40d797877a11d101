//! What transformers computes, and the same in other formats and cuts.

use safetensors::SafeTensors;
use scoutd_kernels::{Format, Precision};

use super::fixture::{Parts, all_logits, assert_close, exact, forward, row, tokens};
use crate::model::forward::Transformer;
use crate::model::{KvType, LogitsWanted, Model, ModelOptions};
use crate::units::SlotId;

/// Largest difference allowed against transformers in F32.
const BOUND: f32 = 2e-5;
const PROMPTS: [&str; 3] = ["p0", "p1", "p2"];

struct Golden<'a> {
    tensors: SafeTensors<'a>,
}

impl Golden<'_> {
    fn read() -> Golden<'static> {
        let bytes = include_bytes!("../../../tests/golden/tiny/golden.safetensors");
        Golden { tensors: SafeTensors::deserialize(bytes).expect("the golden file") }
    }

    fn words(&self, name: &str) -> Vec<[u8; 4]> {
        let tensor = self.tensors.tensor(name).expect(name);
        tensor.data().chunks_exact(4).map(|four| four.try_into().expect("four")).collect()
    }

    fn f32s(&self, name: &str) -> Vec<f32> {
        self.words(name).into_iter().map(f32::from_le_bytes).collect()
    }

    fn u32s(&self, name: &str) -> Vec<u32> {
        self.words(name).into_iter().map(u32::from_le_bytes).collect()
    }
}

/// Logits of positions around the border of the default chunk and floor, and of the last token.
const LONG_POSITIONS: [usize; 5] = [8190, 8191, 8192, 8193, 8399];

/// The tokens of `long.f32`: a linear congruence, so that any language makes them again.
fn long_tokens() -> Vec<u32> {
    let mut state = 12_345_u64;
    let next = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005);
        state = state.wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32 % 512
    };
    (0..8400).map(next).collect()
}

/// The next 16 tokens after `prompt`, the likeliest each time.
fn greedy(model: &mut Transformer, prompt: &[u32]) -> Vec<u32> {
    model.clear(SlotId(0));
    let mut next = prompt.to_vec();
    let mut out = Vec::new();
    while out.len() < 16 {
        let logits = forward(model, vec![row(0, &next, LogitsWanted::Last)]);
        let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
        next = vec![best.expect("a vocabulary").0 as u32];
        out.push(next[0]);
    }
    out
}

#[test]
fn tiny_equals_transformers() {
    let golden = Golden::read();
    let mut model = Parts::tiny(false).open(&exact(1));
    model.trace.enabled = true;
    for prompt in PROMPTS {
        let ids = golden.u32s(&format!("{prompt}.ids"));
        model.trace.rows.clear();
        model.trace.experts.clear();
        let logits = all_logits(&mut model, &ids);
        assert_close(&logits, &golden.f32s(&format!("{prompt}.logits")), BOUND, prompt);
        for layer in 0..5 {
            let mine = || {
                let all = model.trace.experts.iter().filter(|(index, _)| *index == layer);
                all.flat_map(|(_, chosen)| chosen.iter().copied())
            };
            let experts: Vec<u32> = mine().map(|(expert, _)| expert as u32).collect();
            assert_eq!(experts, golden.u32s(&format!("{prompt}.expert.{layer}")), "{prompt}");
            let scores: Vec<f32> = mine().map(|(_, score)| score).collect();
            let wanted = golden.f32s(&format!("{prompt}.score.{layer}"));
            assert_close(&scores, &wanted, BOUND, "score");
        }
    }
}

#[test]
fn tiny_equals_transformers_layer_by_layer() {
    let golden = Golden::read();
    let mut model = Parts::tiny(false).open(&exact(1));
    model.trace.enabled = true;
    all_logits(&mut model, &golden.u32s("p1.ids"));
    for layer in 0..5 {
        for name in ["attn", "layer"] {
            let wanted = golden.f32s(&format!("p1.{name}.{layer}"));
            let what = format!("{name} {layer}");
            assert_close(&model.trace.all(name, Some(layer)), &wanted, BOUND, &what);
        }
    }
    assert_close(&model.trace.all("final", None), &golden.f32s("p1.final"), BOUND, "final norm");
}

#[test]
fn stock_chunk_and_floor_equal_transformers() {
    let golden = Golden::read();
    let mut model = Parts::tiny(true).open(&exact(1));
    for prompt in ["p1", "p2"] {
        let logits = all_logits(&mut model, &golden.u32s(&format!("{prompt}.ids")));
        assert_close(&logits, &golden.f32s(&format!("stock.{prompt}.logits")), BOUND, prompt);
    }
}

#[test]
fn long_contexts_cross_the_default_chunk() {
    let bytes = include_bytes!("../../../tests/golden/tiny/long.f32");
    let wanted: Vec<f32> = bytes
        .chunks_exact(4)
        .map(|four| f32::from_le_bytes(four.try_into().expect("four")))
        .collect();
    let mut model = Parts::tiny(true).open(&exact(1));
    let ids = long_tokens();
    let mut done = 0;
    for (position, wanted) in LONG_POSITIONS.into_iter().zip(wanted.chunks_exact(512)) {
        let rows = vec![row(0, &ids[done..=position], LogitsWanted::Last)];
        let logits = forward(&mut model, rows);
        assert_close(&logits, wanted, 1e-4, &format!("position {position}"));
        done = position + 1;
    }
}

#[test]
fn greedy_tokens_equal_transformers() {
    let golden = Golden::read();
    for (stock, prefix) in [(false, ""), (true, "stock.")] {
        let mut model = Parts::tiny(stock).open(&exact(1));
        for prompt in PROMPTS {
            let ids = golden.u32s(&format!("{prompt}.ids"));
            let wanted = golden.u32s(&format!("{prefix}{prompt}.greedy"));
            assert_eq!(greedy(&mut model, &ids), wanted, "{prefix}{prompt}");
        }
    }
}

#[test]
fn prompts_in_pieces_give_the_same() {
    let golden = Golden::read();
    let ids = golden.u32s("p2.ids");
    let wanted = golden.f32s("p2.logits");
    for pass_tokens_max in [5, 256] {
        let options = ModelOptions { pass_tokens_max, ..exact(1) };
        let mut model = Parts::tiny(false).open(&options);
        for piece in [1, 2, 7, 16, 31, 32, 33, 64, 65, 109] {
            model.clear(SlotId(0));
            let mut logits = Vec::new();
            for piece in ids.chunks(piece) {
                logits.extend(forward(&mut model, vec![row(0, piece, LogitsWanted::All)]));
            }
            assert_close(&logits, &wanted, BOUND, &format!("pieces of {piece}"));
        }
    }
}

#[test]
fn half_precision_files_hold_these_weights_exactly() {
    let golden = Golden::read();
    for format in [Format::F16, Format::Bf16] {
        let mut model = Parts::tiny(false).format(format).open(&exact(1));
        for prompt in PROMPTS {
            let logits = all_logits(&mut model, &golden.u32s(&format!("{prompt}.ids")));
            assert_close(&logits, &golden.f32s(&format!("{prompt}.logits")), BOUND, prompt);
        }
    }
}

#[test]
fn quantized_files_equal_their_dequantized_twins() {
    let golden = Golden::read();
    let ids = golden.u32s("p2.ids");
    for format in [Format::Q4_0, Format::Q4_1, Format::Q8_0] {
        let parts = Parts::tiny(false).format(format);
        let logits = all_logits(&mut parts.open(&exact(1)), &ids);
        let twin = all_logits(&mut parts.dequantized().open(&exact(1)), &ids);
        assert_close(&logits, &twin, BOUND, format.name());
    }
    // Rows of 64 are no whole blocks of 256.
    let ids = tokens(1, 20, 96);
    for architecture in ["llama", "llama4"] {
        for format in Format::ALL {
            let parts = Parts::random(architecture).format(format);
            let logits = all_logits(&mut parts.open(&exact(1)), &ids);
            let twin = all_logits(&mut parts.dequantized().open(&exact(1)), &ids);
            assert_close(&logits, &twin, BOUND, format.name());
        }
    }
}

#[test]
fn eight_bit_activations_stay_near_and_do_not_depend_on_the_cut() {
    let ids = tokens(2, 60, 96);
    for format in [Format::Q4_0, Format::Q4_1, Format::Q8_0, Format::Q4K, Format::Q5K, Format::Q6K]
    {
        let parts = Parts::random("llama").format(format);
        let wanted = all_logits(&mut parts.open(&exact(1)), &ids);
        let options = ModelOptions { precision: Precision::Int8, ..exact(1) };
        let mut model = parts.open(&options);
        let logits = all_logits(&mut model, &ids);
        let largest = wanted.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
        assert_close(&logits, &wanted, 0.05 * largest, format.name());
        model.clear(SlotId(0));
        let mut pieces = Vec::new();
        for piece in ids.chunks(7) {
            pieces.extend(forward(&mut model, vec![row(0, piece, LogitsWanted::All)]));
        }
        assert_close(&pieces, &logits, 2e-2 * largest, format.name());
    }
}

#[test]
fn a_cache_of_half_precision_stays_near() {
    let golden = Golden::read();
    let ids = golden.u32s("p1.ids");
    let options = ModelOptions { kv_type: KvType::F16, ..exact(1) };
    let mut model = Parts::tiny(false).open(&options);
    let logits = all_logits(&mut model, &ids);
    assert_close(&logits, &golden.f32s("p1.logits"), 1e-2, "F16 cache");
}

#[test]
fn threads_do_not_change_the_result() {
    let golden = Golden::read();
    let ids = golden.u32s("p2.ids");
    let logits = |threads| {
        let options = ModelOptions { threads, ..exact(1) };
        all_logits(&mut Parts::tiny(false).open(&options), &ids)
    };
    let alone = logits(1);
    assert_eq!(logits(2), alone);
    assert_eq!(logits(5), alone);
}
