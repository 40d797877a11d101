//! Whatever is asked for in whatever order arrives with its own bytes, and memory stays within what was allowed.

use proptest::prelude::*;

use super::*;

const EXPERTS: usize = 6;
const BYTES: [usize; PARTS] = [6000, 6000, 9000];

/// Three layers of experts, whose bytes tell who they are.
fn file() -> (tempfile::TempDir, Mapping, Vec<LayerFile>) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("model.gguf");
    let mut bytes = vec![0; 100];
    let mut layers = Vec::new();
    for layer in 0..3 {
        let parts = [0, 1, 2].map(|part| {
            let offset = bytes.len() as u64;
            for expert in 0..EXPERTS {
                bytes.extend((0..BYTES[part]).map(|at| byte(layer, expert, part, at)));
            }
            PartFile { offset, bytes: BYTES[part] }
        });
        layers.push(LayerFile { experts: EXPERTS, parts });
    }
    std::fs::write(&path, &bytes).expect("room for it");
    (dir, Mapping::open(&path).expect("a regular file"), layers)
}

fn byte(layer: usize, expert: usize, part: usize, at: usize) -> u8 {
    (at.wrapping_mul(31) + layer * 101 + expert * 17 + part * 7) as u8
}

fn is_right(bytes: &[u8], layer: usize, expert: usize, part: usize) -> bool {
    bytes.len() == BYTES[part]
        && bytes.iter().enumerate().all(|(at, &found)| found == byte(layer, expert, part, at))
}

fn options(slots_bytes: u64) -> SlotsOptions {
    SlotsOptions { slots_bytes: Bytes(slots_bytes), ..SlotsOptions::default() }
}

/// Takes what a layer needs and checks every byte; the order it came in.
fn take(stream: &mut ExpertStream, layer: usize, wanted: &[usize], step: Step) -> Vec<usize> {
    stream.start(layer, wanted.iter().copied(), step).expect("memory");
    let mut order = Vec::new();
    while let Some(expert) = stream.next_expert().expect("the file is whole") {
        assert!(is_right(stream.arrived(0), layer, expert, 0), "gate of {expert} in {layer}");
        assert!(is_right(stream.arrived(1), layer, expert, 1), "up of {expert} in {layer}");
        let down = stream.part(2).expect("the file is whole");
        assert!(is_right(down, layer, expert, 2), "down of {expert} in {layer}");
        order.push(expert);
    }
    let mut sorted = order.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, wanted, "each once");
    order
}

#[test]
fn kept_experts_come_first_and_without_a_read() {
    let (_dir, mapping, layers) = file();
    let row: u64 = layers.iter().map(LayerFile::slot_bytes).sum();
    let slots = ExpertSlots::open(&mapping, layers, &options(2 * row), None).expect("a file");
    let mut stream = slots.stream(Ahead::Never);
    take(&mut stream, 0, &[4], Step::Decode);
    take(&mut stream, 0, &[5], Step::Decode);
    let before = slots.stats();
    assert_eq!(take(&mut stream, 0, &[5], Step::Decode), [5]);
    assert_eq!(slots.stats().since(&before).bytes_read, 0);
    assert_eq!(take(&mut stream, 0, &[1, 5], Step::Decode), [5, 1]);
    let stats = slots.stats();
    assert_eq!((stats.uses, stats.hits, stats.slots), (5, 2, 6));
    // A layer's slots are its own.
    take(&mut stream, 1, &[0], Step::Decode);
    assert_eq!(take(&mut stream, 0, &[5], Step::Decode), [5]);
    assert_eq!(slots.stats().hits, 3);
}

#[test]
fn a_sweep_gives_up_nothing_kept_and_reads_each_expert_once() {
    let (_dir, mapping, layers) = file();
    let row: u64 = layers.iter().map(LayerFile::slot_bytes).sum();
    let slots = ExpertSlots::open(&mapping, layers, &options(row), None).expect("a file");
    let mut stream = slots.stream(Ahead::Never);
    for layer in 0..3 {
        take(&mut stream, layer, &[3], Step::Decode);
    }
    let before = slots.stats();
    let all: Vec<usize> = (0..EXPERTS).collect();
    for layer in 0..3 {
        let order = take(&mut stream, layer, &all, Step::Sweep);
        assert_eq!(order[0], 3);
    }
    let swept = slots.stats().since(&before);
    assert_eq!((swept.uses, swept.hits), (18, 3));
    let missed = 3 * 5 * BYTES.iter().sum::<usize>() as u64;
    // Whole blocks are read: at most two more for each matrix.
    assert!((missed..missed + 3 * 5 * 3 * 8192).contains(&swept.bytes_read), "{swept:?}");
    assert!(swept.ahead_reads > 0 && swept.ahead_hits == swept.ahead_reads, "{swept:?}");
    for layer in 0..3 {
        take(&mut stream, layer, &[3], Step::Decode);
    }
    assert_eq!(slots.stats().since(&before).hits, 6);
}

#[test]
fn a_right_guess_is_read_ahead_and_kept() {
    let (_dir, mapping, layers) = file();
    let row: u64 = layers.iter().map(LayerFile::slot_bytes).sum();
    let slots = ExpertSlots::open(&mapping, layers, &options(row), None).expect("a file");
    let mut stream = slots.stream(Ahead::Auto);
    take(&mut stream, 0, &[0], Step::Decode);
    stream.expect(1, [2]);
    take(&mut stream, 1, &[2], Step::Decode);
    stream.expect(2, [1]);
    take(&mut stream, 2, &[4], Step::Decode);
    let stats = slots.stats();
    assert_eq!((stats.guesses, stats.right_guesses), (2, 1));
    assert_eq!((stats.ahead_reads, stats.ahead_hits), (2, 1));
    take(&mut stream, 1, &[2], Step::Decode);
    assert_eq!(slots.stats().hits, 1);
}

#[test]
fn reading_ahead_ends_where_it_does_not_pay() {
    let (_dir, mapping, layers) = file();
    let row: u64 = layers.iter().map(LayerFile::slot_bytes).sum();
    let slots = ExpertSlots::open(&mapping, layers, &options(row), None).expect("a file");
    let mut stream = slots.stream(Ahead::Auto);
    for turn in 0..300 {
        stream.expect(1, [turn % 3]);
        take(&mut stream, 1, &[3 + turn % 3], Step::Decode);
    }
    let wrong = slots.stats();
    assert!(wrong.ahead_reads < 250, "{wrong:?}");
    for turn in 0..300 {
        stream.expect(1, [turn % 6]);
        take(&mut stream, 1, &[turn % 6], Step::Decode);
    }
    // Right guesses are counted although nothing is read, so it begins again.
    let right = slots.stats().since(&wrong);
    assert!(right.ahead_hits > 100, "{right:?}");
}

#[test]
fn shrinking_gives_memory_back_and_growing_asks_the_ledger() {
    let (_dir, mapping, layers) = file();
    let row: u64 = layers.iter().map(LayerFile::slot_bytes).sum();
    let ledger = Ledger::new(Bytes(20 * row));
    let label = Some((&ledger, "model"));
    let slots = ExpertSlots::open(&mapping, layers, &options(4 * row), label).expect("room");
    let staging = ledger.promised().0 - 4 * row;
    let mut stream = slots.stream(Ahead::Never);
    let all: Vec<usize> = (0..EXPERTS).collect();
    for layer in 0..3 {
        take(&mut stream, layer, &all, Step::Sweep);
    }
    assert!(slots.stats().held_bytes >= 4 * row);
    assert_eq!(slots.set_slots(Bytes(row)).expect("less"), Bytes(row));
    assert_eq!(ledger.promised().0, row + staging);
    assert!(slots.stats().held_bytes <= row + staging);
    slots.set_slots(Bytes(100 * row)).expect("all experts fit the ledger");
    assert_eq!(slots.slots_bytes(), slots.bytes_of_all());
    slots.set_slots(Bytes(0)).expect("less");
    let _other = ledger.try_reserve(Purpose::Kv, "other", ledger.free()).expect("what is left");
    assert!(slots.set_slots(Bytes(row)).is_err());
    assert_eq!(slots.slots_bytes(), Bytes(0));
    // Without any slot staging alone serves.
    take(&mut stream, 2, &all, Step::Decode);
    drop(stream);
    drop(slots);
    drop(_other);
    assert_eq!(ledger.promised(), Bytes(0));
}

#[test]
fn a_cut_file_fails_the_step_and_nothing_else() {
    let (_dir, mapping, layers) = file();
    let row: u64 = layers.iter().map(LayerFile::slot_bytes).sum();
    let end = layers[2].parts[0].offset;
    let slots = ExpertSlots::open(&mapping, layers, &options(row), None).expect("a file");
    let mut stream = slots.stream(Ahead::Auto);
    take(&mut stream, 2, &[0], Step::Decode);
    let writer = std::fs::OpenOptions::new().write(true).open(mapping.path()).expect("ours");
    writer.set_len(end).expect("cut");
    for step in [Step::Decode, Step::Prompt, Step::Sweep] {
        stream.start(2, [0, 3, 4], step).expect("memory");
        let mut last = Ok(None);
        for _ in 0..4 {
            last = stream.next_expert();
            if last.is_err() {
                break;
            }
            assert!(stream.part(2).is_ok(), "the one that was kept");
        }
        assert!(matches!(last, Err(ReadError::Truncated { .. })), "{last:?}");
    }
    // What was kept and what lies before the cut go on.
    take(&mut stream, 0, &[1, 2], Step::Decode);
    take(&mut stream, 2, &[0], Step::Decode);
}

#[derive(Clone, Debug)]
enum Act {
    Use { layer: usize, wanted: Vec<usize>, step: u8, leave_after: usize },
    Expect { layer: usize, expert: usize },
    Resize { rows: u64 },
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let wanted = proptest::collection::btree_set(0..EXPERTS, 1..EXPERTS + 1);
    let used = (0..3_usize, wanted, 0..3_u8, 0..12_usize).prop_map(|(layer, set, step, leave)| {
        Act::Use { layer, wanted: set.into_iter().collect(), step, leave_after: leave }
    });
    let act = prop_oneof![
        6 => used,
        2 => (0..3_usize, 0..EXPERTS).prop_map(|(layer, expert)| Act::Expect { layer, expert }),
        1 => (0..8_u64).prop_map(|rows| Act::Resize { rows }),
    ];
    proptest::collection::vec(act, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Random steps, some left early, guesses and resizings.
    #[test]
    fn bytes_are_right_and_memory_is_bounded(acts in acts(), direct in any::<bool>()) {
        let (_dir, mapping, layers) = file();
        let row: u64 = layers.iter().map(LayerFile::slot_bytes).sum();
        let ledger = Ledger::new(Bytes(100 * row));
        let options = SlotsOptions { direct, ahead: Ahead::Always, ..options(row) };
        let slots = ExpertSlots::open(&mapping, layers, &options, Some((&ledger, "model")))
            .expect("room");
        let mut stream = slots.stream(options.ahead);
        for act in acts {
            match act {
                Act::Resize { rows } => {
                    let now = slots.set_slots(Bytes(rows * row)).expect("room");
                    prop_assert!(now.0 <= rows * row);
                }
                Act::Expect { layer, expert } => stream.expect(layer, [expert]),
                Act::Use { layer, wanted, step, leave_after } => {
                    let step = [Step::Decode, Step::Prompt, Step::Sweep][usize::from(step)];
                    if leave_after >= wanted.len() {
                        take(&mut stream, layer, &wanted, step);
                    } else {
                        stream.start(layer, wanted, step).expect("memory");
                        for _ in 0..leave_after {
                            let expert = stream.next_expert().expect("whole").expect("more");
                            prop_assert!(is_right(stream.arrived(0), layer, expert, 0));
                        }
                    }
                }
            }
            let holder = &ledger.table()[0];
            prop_assert!(slots.stats().held_bytes <= ledger.promised().0, "{holder:?}");
        }
        drop(stream);
        drop(slots);
        prop_assert_eq!(ledger.promised(), Bytes(0));
    }
}
