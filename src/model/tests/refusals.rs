//! Files and batches that must be refused, by name.

use super::fixture::{Key, Parts, exact, forward, row, tokens};
use crate::gguf::{Gguf, GgufHeader};
use crate::model::{Batch, BatchRow, KvType, LogitsWanted, Model, ModelError, inspect};
use crate::units::SlotId;

fn llama() -> Parts {
    Parts::random("llama")
}

#[track_caller]
fn refused(change: impl FnOnce(&mut Parts), parts: Parts, message: &str) {
    let mut parts = parts;
    change(&mut parts);
    assert_eq!(parts.refusal().to_string(), message);
}

#[test]
fn the_spec_is_read_from_keys_and_tensors() {
    let mapping = Parts::tiny(false).mapping();
    let gguf = Gguf::parse(mapping.bytes()).expect("made by our writer");
    let spec = inspect(&gguf, KvType::F16).expect("a good model");
    assert_eq!((spec.architecture.as_str(), spec.name.as_str()), ("llama4", "Tiny"));
    assert_eq!((spec.layers, spec.hidden, spec.heads, spec.kv_heads), (5, 64, 4, 2));
    assert_eq!((spec.head_len, spec.context_len, spec.vocab_len), (16, 16384, 512));
    assert_eq!((spec.chunk, spec.local_layers, spec.page_tokens), (Some(32), 4, 32));
    assert_eq!(spec.kv_token_bytes, 2 * 2 * 16 * 2);
    assert_eq!(spec.parameters, 589_768);
    assert_eq!((spec.weights_bytes, spec.quantization.as_str()), (4 * 589_768, "F32"));
    // One global layer of three pages, four local ones of one.
    assert_eq!(spec.kv_bytes(65), 128 * (3 * 32 + 4 * 32));
}

#[test]
fn zero_and_absurd_numbers_are_named() {
    for (prefix, parts) in [("llama", llama()), ("llama4", Parts::random("llama4"))] {
        let numbers: Vec<String> = parts
            .keys
            .iter()
            .filter(|(key, value)| key.starts_with(prefix) && matches!(value, Key::U32(_)))
            .map(|(key, _)| key.clone())
            .collect();
        assert!(numbers.len() >= 10, "{numbers:?}");
        for key in numbers {
            for value in [0, u32::MAX, 7] {
                let mut parts = parts.clone();
                parts.set(&key, Key::U32(value));
                // Any length of context is possible, and so are these chunks and steps.
                let possible = value > 0
                    && (key.ends_with("context_length") || key.ends_with("sliding_window"));
                let unused = prefix == "llama" && key.ends_with("expert_count");
                if possible || unused {
                    parts.open(&exact(1));
                    continue;
                }
                let message = parts.refusal().to_string();
                let named = message.contains(&key) || message.contains("tensor `");
                assert!(named, "{key} = {value}: {message}");
            }
        }
        for name in ["attention.layer_norm_rms_epsilon", "rope.freq_base"] {
            let key = format!("{prefix}.{name}");
            for value in [0.0, -1.0, f32::NAN, f32::INFINITY] {
                let mut parts = parts.clone();
                parts.set(&key, Key::F32(value));
                let message = format!("key `{key}` has the impossible value {value}");
                assert_eq!(parts.refusal().to_string(), message);
            }
        }
    }
}

#[test]
fn what_is_not_computed_is_refused() {
    let cases = [
        (
            "general.architecture",
            Key::Str("qwen3".to_owned()),
            "architecture `qwen3` is not supported; llama and llama4 are",
        ),
        (
            "llama.expert_count",
            Key::U32(8),
            "key `llama.expert_count` has the value 8, which is not supported",
        ),
        (
            "llama.rope.scaling.type",
            Key::Str("yarn".to_owned()),
            "key `llama.rope.scaling.type` has the value yarn, which is not supported",
        ),
        (
            "llama.rope.scaling.factor",
            Key::F32(4.0),
            "key `llama.rope.scaling.factor` has the value 4, which is not supported",
        ),
        (
            "llama.rope.scale_linear",
            Key::F32(2.0),
            "key `llama.rope.scale_linear` has the value 2, which is not supported",
        ),
        (
            "llama.rope.dimension_count",
            Key::U32(32),
            "key `llama.rope.dimension_count` has the value 32, which is not supported",
        ),
        (
            "llama.attention.causal",
            Key::Bool(false),
            "key `llama.attention.causal` has the value false, which is not supported",
        ),
        (
            "llama.attention.sliding_window",
            Key::U32(4096),
            "key `llama.attention.sliding_window` has the value 4096, which is not supported",
        ),
        (
            "llama.vocab_size",
            Key::U32(97),
            "key `llama.vocab_size` counts 97 tokens, the tensor `token_embd.weight` 96",
        ),
        (
            "llama.attention.head_count_kv",
            Key::U32(3),
            "key `llama.attention.head_count_kv` has the impossible value 3",
        ),
        (
            "llama.attention.head_count",
            Key::Str("4".to_owned()),
            "key `llama.attention.head_count` must be an integer from 0 to 4294967295, \
          and is a string",
        ),
    ];
    for (key, value, message) in cases {
        refused(|parts| parts.set(key, value), llama(), message);
    }
    let llama4 = || Parts::random("llama4");
    refused(
        |parts| parts.set("llama4.expert_used_count", Key::U32(2)),
        llama4(),
        "key `llama4.expert_used_count` has the value 2, which is not supported",
    );
    refused(
        |parts| parts.set("llama4.attention.sliding_window", Key::U32(0)),
        llama4(),
        "key `llama4.attention.sliding_window` has the value 0, which is not supported",
    );
    refused(
        |parts| parts.set("scoutd.attn_floor_scale", Key::F32(-2.0)),
        llama4(),
        "key `scoutd.attn_floor_scale` has the impossible value -2",
    );
}

#[test]
fn every_key_that_is_needed_is_named_when_missing() {
    let needed = [
        "general.architecture",
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
    ];
    for key in needed {
        let message = format!("key `{key}` is missing");
        refused(|parts| parts.keys.retain(|(other, _)| other != key), llama(), &message);
    }
    let optional = ["llama.vocab_size", "llama.rope.dimension_count", "llama.attention.key_length"];
    for key in optional {
        let mut parts = llama();
        parts.keys.retain(|(other, _)| other != key);
        parts.open(&exact(1));
    }
}

#[test]
fn every_tensor_is_needed_in_its_shape() {
    for parts in [llama(), Parts::random("llama4")] {
        for name in parts.tensors.keys().filter(|name| *name != "rope_freqs.weight") {
            let mut missing = parts.clone();
            missing.tensors.remove(name);
            assert_eq!(missing.refusal().to_string(), format!("tensor `{name}` is missing"));
            let mut wrong = parts.clone();
            let (shape, values) = wrong.tensors.get_mut(name).expect("there");
            shape[0] *= 2;
            values.extend_from_within(..);
            let message = wrong.refusal().to_string();
            let start = format!("tensor `{name}` has the shape");
            assert!(message.starts_with(&start), "{message}");
        }
    }
    let bias = (vec![256], vec![0.0; 256]);
    refused(
        |parts| drop(parts.tensors.insert("blk.0.attn_q.bias".to_owned(), bias)),
        llama(),
        "tensor `blk.0.attn_q.bias` is not supported in architecture llama",
    );
}

#[test]
fn an_untied_output_is_used() {
    let mut parts = llama();
    let (shape, mut values) = parts.tensors["token_embd.weight"].clone();
    values.iter_mut().for_each(|value| *value = -*value);
    let tied = forward(&mut parts.open(&exact(1)), vec![row(0, &[5], LogitsWanted::Last)]);
    parts.tensors.insert("output.weight".to_owned(), (shape, values));
    let untied = forward(&mut parts.open(&exact(1)), vec![row(0, &[5], LogitsWanted::Last)]);
    assert!(tied.iter().zip(&untied).all(|(a, b)| *a == -*b));
}

#[test]
fn norms_that_are_no_numbers_are_refused_at_load() {
    for name in ["blk.1.attn_norm.weight", "output_norm.weight", "rope_freqs.weight"] {
        for value in [f32::NAN, f32::NEG_INFINITY] {
            refused(
                |parts| parts.tensors.get_mut(name).expect("there").1[3] = value,
                llama(),
                &format!("tensor `{name}` holds an impossible number"),
            );
        }
    }
}

#[test]
fn rows_whose_logits_are_no_numbers_are_named() {
    let mut parts = llama();
    parts.tensors.get_mut("token_embd.weight").expect("there").1[256 * 7] = f32::NAN;
    let output = parts.tensors["blk.0.attn_norm.weight"].clone();
    assert_eq!(output.0, [256]);
    // The head must not see the broken row.
    let (shape, values) = parts.tensors["token_embd.weight"].clone();
    let values = values.into_iter().map(|value| if value.is_nan() { 0.0 } else { value }).collect();
    parts.tensors.insert("output.weight".to_owned(), (shape, values));
    let mut model = parts.open(&exact(3));
    let rows = vec![
        row(0, &[1, 2], LogitsWanted::Last),
        row(1, &[1, 7], LogitsWanted::All),
        row(2, &[7], LogitsWanted::None),
    ];
    let mut logits = Vec::new();
    let error = model.forward(&Batch { rows }, &mut logits).expect_err("a broken row");
    assert!(matches!(error, ModelError::NotFinite { rows } if rows == [1]));
    let good = forward(&mut parts.open(&exact(1)), vec![row(0, &[1, 2], LogitsWanted::Last)]);
    assert_eq!(logits[..96], good);
}

#[test]
fn batches_that_contradict_the_slots_change_nothing() {
    let mut model = llama().open(&exact(2));
    let long = tokens(1, 513, 96);
    let refused: [(Vec<BatchRow>, &str); 5] = [
        (vec![row(2, &[1], LogitsWanted::Last)], "batch: row 0: slot 2 of 2"),
        (
            vec![row(0, &[1], LogitsWanted::Last), row(0, &[1], LogitsWanted::Last)],
            "batch: row 1: slot 0 has a row already",
        ),
        (vec![row(0, &[], LogitsWanted::Last)], "batch: row 0: no tokens"),
        (vec![row(0, &[96], LogitsWanted::Last)], "batch: row 0: token 96 in a vocabulary of 96"),
        (
            vec![row(1, &[1], LogitsWanted::Last), row(0, &long, LogitsWanted::Last)],
            "batch: row 1: 513 tokens in a context of 512",
        ),
    ];
    for (rows, message) in refused {
        let error = model.forward(&Batch { rows }, &mut Vec::new()).expect_err(message);
        assert_eq!(error.to_string(), message);
    }
    assert_eq!((model.len(SlotId(0)), model.len(SlotId(1)), model.kv_bytes_in_use()), (0, 0, 0));
    forward(&mut model, vec![row(0, &long[..512], LogitsWanted::Last)]);
    // Slots that do not exist are empty, and nothing happens to them.
    model.clear(SlotId(9));
    assert_eq!(model.share_prefix(SlotId(0), SlotId(9), 4), 0);
    assert_eq!(model.share_prefix(SlotId(9), SlotId(0), 4), 0);
    assert_eq!((model.len(SlotId(9)), model.len(SlotId(0))), (0, 512));
}

#[test]
fn a_file_without_tensors_is_no_model() {
    let mut header = GgufHeader::new(32);
    header.str("general.architecture", "llama");
    let bytes = header.start(Vec::new()).and_then(crate::gguf::GgufWriter::finish).expect("empty");
    let gguf = Gguf::parse(&bytes).expect("valid");
    let error = inspect(&gguf, KvType::F16).expect_err("no keys");
    assert_eq!(error.to_string(), "key `llama.feed_forward_length` is missing");
}
