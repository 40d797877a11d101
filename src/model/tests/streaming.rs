//! A model whose experts come from slots answers bit for bit as one whose experts are mapped.

use std::fs::OpenOptions;
use std::sync::Arc;

use scoutd_kernels::{Format, Precision};

use super::fixture::{Parts, all_logits, exact, forward, row, tokens};
use crate::gguf::Mapping;
use crate::memory::{Ledger, Purpose};
use crate::model::forward::Transformer;
use crate::model::{Batch, LogitsWanted, Model, ModelError, ModelOptions, StreamedExperts};
use crate::residency::{Ahead, Policy, SlotsOptions};
use crate::units::{Bytes, SlotId};

const SEQUENCES: usize = 4;

fn options(precision: Precision) -> ModelOptions {
    // Streamed models take long passes; bits are equal where passes are.
    ModelOptions { precision, pass_tokens_max: 1024, ..exact(SEQUENCES) }
}

fn streamed(mapping: &Arc<Mapping>, precision: Precision, slots: SlotsOptions) -> Transformer {
    let streaming = Some(StreamedExperts { slots, ..StreamedExperts::default() });
    let options = ModelOptions { streaming, ..options(precision) };
    Transformer::new(Arc::clone(mapping), &options).expect("a good model")
}

fn slots(bytes: u64) -> SlotsOptions {
    SlotsOptions { slots_bytes: Bytes(bytes), ..SlotsOptions::default() }
}

/// Bytes of one slot in each layer.
fn one_each(mapping: &Arc<Mapping>, experts: u64) -> u64 {
    let model = streamed(mapping, Precision::Exact, slots(0));
    model.expert_slots().expect("it streams").bytes_of_all().0 / experts
}

/// A prompt, tokens after it, and then a batch of several sequences, one of them still reading.
fn run(model: &mut Transformer, vocab: u32) -> Vec<f32> {
    let mut all = Vec::new();
    let long = tokens(1, 100, vocab);
    all.extend(forward(model, vec![row(0, &long, LogitsWanted::All)]));
    for &token in &tokens(2, 12, vocab) {
        all.extend(forward(model, vec![row(0, &[token], LogitsWanted::Last)]));
    }
    for slot in 1..SEQUENCES as u16 {
        let prompt = tokens(3 + u64::from(slot), 5 * usize::from(slot), vocab);
        all.extend(forward(model, vec![row(slot, &prompt, LogitsWanted::Last)]));
    }
    for step in 0..10 {
        let next = tokens(20 + step, SEQUENCES, vocab);
        let rows = next
            .iter()
            .enumerate()
            .map(|(slot, &token)| row(slot as u16, &[token], LogitsWanted::Last));
        all.extend(forward(model, rows.collect()));
    }
    let mixed = vec![
        row(0, &tokens(40, 1, vocab), LogitsWanted::Last),
        row(1, &tokens(41, 30, vocab), LogitsWanted::All),
    ];
    all.extend(forward(model, mixed));
    all
}

fn is_equal(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

#[test]
fn streamed_equals_resident_bit_for_bit() {
    let models = [
        (Parts::tiny(false), 512, 4, Precision::Exact),
        (Parts::random("llama4"), 96, 3, Precision::Exact),
        (Parts::random("llama4").format(Format::Q4_0), 96, 3, Precision::Int8),
        (Parts::random("llama4").format(Format::Q6K), 96, 3, Precision::Int8),
    ];
    for (parts, vocab, experts, precision) in models {
        let dir = tempfile::tempdir().expect("a directory");
        let mapping = parts.file(dir.path());
        let mut resident =
            Transformer::new(Arc::clone(&mapping), &options(precision)).expect("a good model");
        let wanted = run(&mut resident, vocab);
        let one_each = one_each(&mapping, experts);
        for slots in [
            slots(one_each),
            slots(0),
            SlotsOptions { threads: 4, ..slots(one_each * experts) },
            SlotsOptions { direct: false, threads: 1, ahead: Ahead::Always, ..slots(one_each) },
            SlotsOptions { policy: Policy::Lru, ahead: Ahead::Never, ..slots(2 * one_each) },
        ] {
            let mut model = streamed(&mapping, precision, slots.clone());
            assert!(is_equal(&run(&mut model, vocab), &wanted), "{slots:?}");
            let stats = model.expert_slots().expect("it streams").stats();
            let all = slots.slots_bytes.0 == one_each * experts;
            assert!(stats.hits < stats.uses && (all || stats.bytes_read > 0), "{stats:?}");
            // A second time every expert is where it was.
            for slot in 0..SEQUENCES as u16 {
                model.clear(SlotId(slot));
            }
            assert!(is_equal(&run(&mut model, vocab), &wanted), "again {slots:?}");
            let again = model.expert_slots().expect("it streams").stats().since(&stats);
            assert!(!all || again.hits == again.uses && again.bytes_read == 0, "{again:?}");
        }
    }
}

#[test]
fn slots_change_while_it_runs() {
    let dir = tempfile::tempdir().expect("a directory");
    let mapping = Parts::tiny(false).file(dir.path());
    let text = tokens(7, 60, 512);
    let mut resident =
        Transformer::new(Arc::clone(&mapping), &options(Precision::Exact)).expect("a good model");
    let ledger = Ledger::new(Bytes(1 << 30));
    let streaming = StreamedExperts {
        slots: slots(u64::MAX >> 1),
        ledger: Some(Arc::clone(&ledger)),
        label: "tiny".to_owned(),
    };
    let options = ModelOptions { streaming: Some(streaming), ..options(Precision::Exact) };
    let mut model = Transformer::new(mapping, &options).expect("a good model");
    let handle = model.expert_slots().expect("it streams");
    assert!(ledger.promised_for(Purpose::Experts) >= handle.bytes_of_all());
    let all = handle.bytes_of_all().0;
    for share in [1, 4, 2, u64::MAX, 1] {
        handle.set_slots(Bytes(all / share)).expect("room");
        assert!(is_equal(&all_logits(&mut model, &text), &all_logits(&mut resident, &text)));
    }
    drop(model);
    drop(handle);
    assert_eq!(ledger.promised(), Bytes(0));
}

#[test]
fn a_cut_file_is_an_error_before_anything_of_it_is_read() {
    let dir = tempfile::tempdir().expect("a directory");
    let mapping = Parts::tiny(false).file(dir.path());
    let mut model = streamed(&mapping, Precision::Exact, slots(0));
    let text = tokens(7, 60, 512);
    let wanted = all_logits(&mut model, &text);
    let file = OpenOptions::new().write(true).open(mapping.path()).expect("ours");
    let len = mapping.bytes().len() as u64;
    file.set_len(len / 8).expect("cut");
    let mut logits = Vec::new();
    let batch = Batch { rows: vec![row(1, &text, LogitsWanted::Last)] };
    let result = model.forward(&batch, &mut logits);
    assert!(matches!(result, Err(ModelError::File(_))), "{result:?}");
    assert!(wanted.iter().all(|value| value.is_finite()));
}

#[test]
fn a_model_without_experts_or_file_does_not_stream() {
    let dir = tempfile::tempdir().expect("a directory");
    let mapping = Parts::random("llama").file(dir.path());
    assert!(streamed(&mapping, Precision::Exact, slots(0)).expert_slots().is_none());
    let streaming = Some(StreamedExperts::default());
    let options = ModelOptions { streaming, ..options(Precision::Exact) };
    let built_in = Parts::tiny(false).mapping();
    assert!(matches!(Transformer::new(built_in, &options), Err(ModelError::Slots(_))));
}
