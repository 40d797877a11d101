//! Cases by hand, and random operations against the invariants.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const LIMITS: SchedulerLimits = SchedulerLimits {
    running_max: 3,
    waiting_max: 4,
    prefill_tokens_max: 8,
    prefill_tokens_beside_decode: 4,
    score_tokens_max: 2,
};

fn sequence(id: u64, prompt_len: usize, max_tokens: u32) -> Sequence {
    Sequence {
        id: SequenceId(id),
        client: "client".into(),
        priority: Priority::Normal,
        prompt: (0..prompt_len as u32).map(TokenId).collect(),
        max_tokens,
        scores_from: None,
    }
}

/// Starts whatever may start, in the lowest free slots.
fn start_all(scheduler: &mut Scheduler) {
    while scheduler.startable().is_some() {
        let taken: BTreeSet<SlotId> = scheduler.slots().map(|(slot, ..)| slot).collect();
        let slot = (0..).map(SlotId).find(|slot| !taken.contains(slot)).expect("slots never end");
        scheduler.start(slot, 0);
    }
}

/// Rows of a plan as (id, first, len, samples).
fn rows(plan: &Plan) -> Vec<(u64, usize, usize, bool)> {
    plan.rows.iter().map(|row| (row.id.0, row.first, row.len, row.samples)).collect()
}

fn commit(scheduler: &mut Scheduler, plan: &Plan, token: Sampled) -> Vec<(u64, Ended)> {
    let count = plan.rows.iter().filter(|row| row.samples).count();
    let ended = scheduler.commit(plan, &vec![token; count]);
    ended.into_iter().map(|(retired, reason)| (retired.id.0, reason)).collect()
}

const GO_ON: Sampled = Sampled::Token(TokenId(7));

#[test]
fn a_prompt_is_read_in_pieces_beside_a_decode() {
    let mut scheduler = Scheduler::new(LIMITS);
    scheduler.submit(sequence(1, 3, 10)).expect("the line is empty");
    start_all(&mut scheduler);
    let plan = scheduler.plan().expect("one runs");
    assert_eq!(rows(&plan), [(1, 0, 3, true)]);
    assert!(commit(&mut scheduler, &plan, GO_ON).is_empty());

    scheduler.submit(sequence(2, 6, 1)).expect("the line is empty");
    start_all(&mut scheduler);
    let plan = scheduler.plan().expect("two run");
    assert_eq!(rows(&plan), [(1, 3, 1, true), (2, 0, 4, false)]);
    assert_eq!(plan.batch.rows[1].wants_logits, LogitsWanted::None);
    commit(&mut scheduler, &plan, GO_ON);
    let plan = scheduler.plan().expect("two run");
    assert_eq!(rows(&plan), [(1, 4, 1, true), (2, 4, 2, true)]);
    assert_eq!(commit(&mut scheduler, &plan, GO_ON), [(2, Ended::Length)]);
}

#[test]
fn it_ends_with_the_token_that_reaches_the_limit() {
    let mut scheduler = Scheduler::new(LIMITS);
    scheduler.submit(sequence(1, 2, 2)).expect("the line is empty");
    start_all(&mut scheduler);
    let plan = scheduler.plan().expect("it runs");
    assert!(commit(&mut scheduler, &plan, GO_ON).is_empty());
    let plan = scheduler.plan().expect("it runs");
    let ended = scheduler.commit(&plan, &[GO_ON]);
    let (retired, reason) = &ended[0];
    assert_eq!((retired.tokens.len(), retired.held, *reason), (4, 3, Ended::Length));
    assert!(scheduler.plan().is_none());
}

#[test]
fn max_tokens_zero_ends_with_the_prompt() {
    let mut scheduler = Scheduler::new(LIMITS);
    let scored = Sequence { scores_from: Some(0), ..sequence(1, 3, 0) };
    scheduler.submit(scored).expect("the line is empty");
    start_all(&mut scheduler);
    let plan = scheduler.plan().expect("it runs");
    assert_eq!(rows(&plan), [(1, 0, 2, false)]);
    assert_eq!(plan.batch.rows[0].wants_logits, LogitsWanted::All);
    assert!(commit(&mut scheduler, &plan, GO_ON).is_empty());
    let plan = scheduler.plan().expect("a token is left");
    assert_eq!(rows(&plan), [(1, 2, 1, false)]);
    assert_eq!(commit(&mut scheduler, &plan, GO_ON), [(1, Ended::Length)]);
}

#[test]
fn a_shared_prefix_is_not_read_again() {
    let mut scheduler = Scheduler::new(LIMITS);
    scheduler.submit(sequence(1, 5, 1)).expect("the line is empty");
    scheduler.start(SlotId(9), 4);
    let plan = scheduler.plan().expect("it runs");
    assert_eq!(rows(&plan), [(1, 4, 1, true)]);
    assert_eq!(plan.batch.rows[0].tokens, [TokenId(4)]);
}

#[test]
fn a_full_line_gives_the_sequence_back() {
    let mut scheduler = Scheduler::new(LIMITS);
    for id in 0..7 {
        scheduler.submit(sequence(id, 1, 1)).expect("3 may run and 4 wait");
    }
    let back = scheduler.submit(sequence(7, 1, 1)).expect_err("the line is full");
    assert_eq!(back.id, SequenceId(7));
}

#[test]
fn places_are_counted_from_the_free_slots() {
    let mut scheduler = Scheduler::new(LIMITS);
    let ahead: Vec<usize> =
        (0..5).map(|id| scheduler.submit(sequence(id, 1, 9)).expect("the line has room")).collect();
    assert_eq!(ahead, [0, 0, 0, 1, 2]);
}

#[test]
fn a_paused_sequence_keeps_its_slot() {
    let mut scheduler = Scheduler::new(LIMITS);
    scheduler.submit(sequence(1, 1, 5)).expect("the line is empty");
    start_all(&mut scheduler);
    scheduler.pause(SequenceId(1));
    assert_eq!((scheduler.plan(), scheduler.running_len()), (None, 1));
    scheduler.resume(SequenceId(1));
    assert!(scheduler.plan().is_some());
}

#[test]
fn a_prompt_that_fills_the_step_delays_the_next_start() {
    let mut scheduler = Scheduler::new(LIMITS);
    scheduler.submit(sequence(1, 10, 1)).expect("the line is empty");
    scheduler.submit(sequence(2, 10, 1)).expect("the line has room");
    start_all(&mut scheduler);
    assert_eq!((scheduler.running_len(), scheduler.waiting_len()), (1, 1));
    let plan = scheduler.plan().expect("one runs");
    commit(&mut scheduler, &plan, GO_ON);
    start_all(&mut scheduler);
    let plan = scheduler.plan().expect("both run");
    assert_eq!(rows(&plan), [(1, 8, 2, true), (2, 0, 6, false)]);
}

#[derive(Clone, Debug)]
enum Op {
    Submit { client: u8, priority: u8, prompt: usize, max_tokens: u32, scores: bool },
    Cancel(usize),
    Pause(usize),
    Resume(usize),
    Step { stop: bool },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (0..4_u8, 0..3_u8, 1..30_usize, 0..8_u32, any::<bool>()).prop_map(
            |(client, priority, prompt, max_tokens, scores)| Op::Submit {
                client, priority, prompt, max_tokens, scores
            }
        ),
        1 => any::<usize>().prop_map(Op::Cancel),
        1 => any::<usize>().prop_map(Op::Pause),
        1 => any::<usize>().prop_map(Op::Resume),
        6 => prop::bool::weighted(0.1).prop_map(|stop| Op::Step { stop }),
    ]
}

/// What the test knows of a sequence without asking the scheduler.
#[derive(Debug)]
struct Mirror {
    prompt: Vec<TokenId>,
    max_tokens: u32,
    fed: Vec<TokenId>,
    generated: Vec<TokenId>,
    paused: bool,
    slot: Option<SlotId>,
}

#[derive(Default)]
struct World {
    alive: BTreeMap<u64, Mirror>,
    submitted: usize,
    ended: usize,
    tokens: u32,
}

impl World {
    fn pick(&self, index: usize) -> Option<u64> {
        self.alive.keys().nth(index % self.alive.len().max(1)).copied()
    }

    fn start(&mut self, scheduler: &mut Scheduler) {
        while let Some(next) = scheduler.startable() {
            let id = next.id.0;
            let taken: BTreeSet<SlotId> = scheduler.slots().map(|(slot, ..)| slot).collect();
            let slot = (0..).map(SlotId).find(|slot| !taken.contains(slot));
            let slot = slot.expect("slots never end");
            let mirror = self.alive.get_mut(&id).expect("only live sequences wait");
            // Pretend that half of the prompt is already there.
            let held = mirror.prompt.len() / 2;
            mirror.fed = mirror.prompt[..held].to_vec();
            mirror.slot = Some(slot);
            scheduler.start(slot, held);
        }
    }

    fn step(&mut self, scheduler: &mut Scheduler, stop: bool) -> Result<bool, TestCaseError> {
        self.start(scheduler);
        let Some(plan) = scheduler.plan() else {
            let idle = self.alive.values().all(|m| m.slot.is_none() || m.paused);
            prop_assert!(idle, "somebody could run");
            return Ok(false);
        };
        let total: usize = plan.batch.rows.iter().map(|row| row.tokens.len()).sum();
        prop_assert!(total <= LIMITS.prefill_tokens_max + LIMITS.running_max);
        let scored: usize = plan
            .rows
            .iter()
            .zip(&plan.batch.rows)
            .filter(|(row, _)| row.scores)
            .map(|(row, batch)| match batch.wants_logits {
                LogitsWanted::All => row.len,
                _ => 1,
            })
            .sum();
        prop_assert!(scored <= LIMITS.score_tokens_max);
        let slots: BTreeSet<SlotId> = plan.batch.rows.iter().map(|row| row.slot).collect();
        prop_assert_eq!(slots.len(), plan.rows.len(), "a slot occurs once");
        let mut sampled = Vec::new();
        for (row, batch) in plan.rows.iter().zip(&plan.batch.rows) {
            let mirror = self.alive.get_mut(&row.id.0);
            let mirror = mirror.expect("only live sequences are planned");
            prop_assert!(!mirror.paused);
            prop_assert_eq!(mirror.slot, Some(batch.slot));
            prop_assert_eq!(mirror.fed.len(), row.first);
            mirror.fed.extend(&batch.tokens);
            if row.samples {
                self.tokens += 1;
                let token = TokenId(1000 + self.tokens);
                mirror.generated.push(token);
                sampled.push(if stop { Sampled::Last(token) } else { Sampled::Token(token) });
            }
        }
        for (retired, reason) in scheduler.commit(&plan, &sampled) {
            let mirror = self.alive.remove(&retired.id.0).expect("it ends once");
            self.ended += 1;
            let text: Vec<TokenId> =
                mirror.prompt.iter().chain(&mirror.generated).copied().collect();
            prop_assert_eq!(&retired.tokens, &text);
            prop_assert_eq!(&retired.tokens[..retired.held], &mirror.fed[..]);
            prop_assert_eq!(Some(retired.slot), mirror.slot);
            let full = mirror.generated.len() == mirror.max_tokens as usize;
            prop_assert!(full || reason == Ended::Stop);
        }
        for mirror in self.alive.values() {
            prop_assert!(mirror.generated.len() < mirror.max_tokens.max(1) as usize);
            let text = mirror.prompt.iter().chain(&mirror.generated);
            prop_assert!(text.take(mirror.fed.len()).eq(&mirror.fed), "fed in order, each once");
        }
        Ok(true)
    }
}

proptest! {
    #[test]
    fn random_operations_keep_the_invariants(ops in prop::collection::vec(op(), 0..300)) {
        let mut scheduler = Scheduler::new(LIMITS);
        let mut world = World::default();
        for op in ops {
            match op {
                Op::Submit { client, priority, prompt, max_tokens, scores } => {
                    let id = world.submitted as u64;
                    world.submitted += 1;
                    let sequence = Sequence {
                        client: format!("client {client}").into(),
                        priority: [Priority::Low, Priority::Normal, Priority::High]
                            [usize::from(priority)],
                        scores_from: scores.then_some(prompt / 2),
                        ..sequence(id, prompt, max_tokens)
                    };
                    let mirror = Mirror {
                        prompt: sequence.prompt.clone(),
                        max_tokens,
                        fed: Vec::new(),
                        generated: Vec::new(),
                        paused: false,
                        slot: None,
                    };
                    match scheduler.submit(sequence) {
                        Ok(_) => { world.alive.insert(id, mirror); }
                        Err(_) => {
                            world.ended += 1;
                            let full = LIMITS.waiting_max + LIMITS.running_max;
                            prop_assert!(world.alive.len() >= full, "only a full line refuses");
                        }
                    }
                }
                Op::Cancel(index) => {
                    if let Some(id) = world.pick(index) {
                        let mirror = world.alive.remove(&id).expect("it was picked from there");
                        let retired = scheduler.cancel_running(SequenceId(id));
                        prop_assert_eq!(retired.map(|r| r.slot), mirror.slot);
                        let waited = scheduler.cancel_waiting(SequenceId(id));
                        prop_assert_eq!(waited, mirror.slot.is_none());
                        world.ended += 1;
                    }
                }
                Op::Pause(index) => {
                    if let Some(id) = world.pick(index) {
                        scheduler.pause(SequenceId(id));
                        let mirror = world.alive.get_mut(&id).expect("it was picked from there");
                        mirror.paused = mirror.slot.is_some();
                    }
                }
                Op::Resume(index) => {
                    if let Some(id) = world.pick(index) {
                        scheduler.resume(SequenceId(id));
                        world.alive.get_mut(&id).expect("it was picked from there").paused = false;
                    }
                }
                Op::Step { stop } => { world.step(&mut scheduler, stop)?; }
            }
            prop_assert_eq!(world.alive.len(), scheduler.running_len() + scheduler.waiting_len());
            prop_assert!(scheduler.running_len() <= LIMITS.running_max);
        }
        for (id, mirror) in &mut world.alive {
            scheduler.resume(SequenceId(*id));
            mirror.paused = false;
        }
        // At most 7 live sequences of 29 prompt tokens, read at 2 or more a step, and 7 written ones.
        let mut steps = 0;
        while world.step(&mut scheduler, false)? {
            steps += 1;
            prop_assert!(steps <= 7 * (29 / 2 + 1 + 7), "everything ends");
        }
        prop_assert_eq!(world.ended, world.submitted);
        prop_assert_eq!(scheduler.running_len() + scheduler.waiting_len(), 0);
    }
}
