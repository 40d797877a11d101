//! Expert slots follow memory: they shrink while it is tight and grow while there is room to spare.
//!
//! A thread of its own does it, since a step of a streamed model takes seconds and memory must be back in less.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::{Wake, Waker};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use log::{info, warn};

use super::ExpertSlots;
use crate::memory::{Conditions, Room, Rung};
use crate::metrics::Metrics;
use crate::units::Bytes;

/// Keeps the slots of one model; dropping it stops the thread.
#[derive(Debug)]
pub struct Keeper {
    signal: Arc<Signal>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Lets `slots` follow `conditions` from now on. What they may take now is the plan that they come back to.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub fn start(
        slots: Arc<ExpertSlots>,
        conditions: Arc<Conditions>,
        metrics: Arc<Metrics>,
    ) -> io::Result<Keeper> {
        let signal = Arc::new(Signal::default());
        conditions.wake_on_change(Waker::from(Arc::clone(&signal)));
        let heard = Arc::clone(&signal);
        let thread = thread::Builder::new().name("slot-keeper".to_owned()).spawn(move || {
            let mut pace = Pace::new(slots.slots_bytes(), slots.bytes_of_all());
            let start = Instant::now();
            let mut tight = false;
            loop {
                let rung = conditions.rung();
                if let Some(bytes) = pace.next(start.elapsed(), rung, conditions.room()) {
                    set(&slots, bytes, &mut pace, &metrics);
                }
                if tight != (rung >= Rung::Orange) {
                    tight = rung >= Rung::Orange;
                    let bytes = slots.slots_bytes();
                    match tight {
                        true => info!(target: "residency", bytes:%; "expert slots shrink"),
                        false => info!(target: "residency", bytes:%; "expert slots may grow again"),
                    }
                }
                if heard.wait(if tight { STEP_TIGHT } else { STEP_CALM }) {
                    return;
                }
            }
        })?;
        Ok(Keeper { signal, thread: Some(thread) })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.signal.tell(|state| state.stop = true);
        if let Some(thread) = self.thread.take() {
            // A panic in the thread has already been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

fn set(slots: &ExpertSlots, bytes: Bytes, pace: &mut Pace, metrics: &Metrics) {
    let before = slots.slots_bytes();
    match slots.set_slots(bytes) {
        Ok(now) if now != before => {
            let act = if now < before { "shrink_slots" } else { "grow_slots" };
            metrics.memory_acts.with_label_values(&[act]).inc();
            // The engine says it after each step, but it may be idle for long.
            metrics.expert_slots.set(slots.stats().slots as f64);
        }
        Ok(_) => {}
        // Others were faster; the next step tries again.
        Err(shortfall) => {
            pace.wanted = before;
            warn!(target: "residency", shortfall:%; "expert slots do not grow");
        }
    }
}

/// Between two steps while memory is tight, and while it is not.
const STEP_TIGHT: Duration = Duration::from_millis(100);
const STEP_CALM: Duration = Duration::from_secs(6);

/// Memory falling this soon after the slots grew is their doing.
const TOO_MUCH: Duration = Duration::from_secs(60);

/// How fast slots shrink and grow. Pure.
#[derive(Clone, Debug)]
struct Pace {
    /// What they had at the start.
    plan: Bytes,
    /// They never grow beyond this.
    most: Bytes,
    /// What they should take, of which whole slots are taken.
    wanted: Bytes,
    grown: Option<Duration>,
    shrunk: Option<Duration>,
    /// The look at memory that was last acted on.
    look: Option<u64>,
}

impl Pace {
    fn new(plan: Bytes, all: Bytes) -> Pace {
        Pace { plan, most: all, wanted: plan, grown: None, shrunk: None, look: None }
    }

    /// What the slots should take from now on, if that is something else.
    fn next(&mut self, at: Duration, rung: Rung, room: Room) -> Option<Bytes> {
        let mut wanted = match rung {
            Rung::Critical => Bytes(0),
            Rung::Red | Rung::Orange => self.smaller(at, room),
            Rung::Yellow => self.wanted,
            Rung::Green => self.larger(at, room),
        };
        if rung >= Rung::Orange {
            if self.grown.is_some_and(|grown| at.saturating_sub(grown) < TOO_MUCH) {
                self.most = Bytes(self.wanted.0 / 10 * 9);
                wanted = wanted.min(self.most);
            }
            self.grown = None;
        }
        if wanted == self.wanted {
            return None;
        }
        if wanted < self.wanted {
            self.shrunk = Some(at);
        }
        if wanted > self.wanted {
            self.grown = Some(at);
        }
        self.wanted = wanted;
        Some(wanted)
    }

    /// At once what is missing, at least a tenth of the plan; where stalls alone ask for it, a tenth each second. Once
    /// for each look at memory: what was given back since is not in it.
    fn smaller(&mut self, at: Duration, room: Room) -> Bytes {
        let waited = self.shrunk.is_none_or(|shrunk| at.saturating_sub(shrunk) >= SECOND);
        let asked = room.missing > Bytes(0) || (room.pressing && waited);
        if !asked || self.look == Some(room.look) {
            return self.wanted;
        }
        self.look = Some(room.look);
        self.wanted.saturating_sub(Bytes(room.missing.0.max(self.plan.0 / 10)))
    }

    /// A twentieth of the plan each step, but at most half of what is to spare: the nearer to yellow, the smaller.
    fn larger(&self, at: Duration, room: Room) -> Bytes {
        let since = |moment: Option<Duration>| {
            moment.is_none_or(|moment| at.saturating_sub(moment) >= STEP_CALM)
        };
        let step = (self.plan.0 / 20).max(self.most.0 / 100).min(room.spare.0 / 2);
        if !since(self.grown) || !since(self.shrunk) || step < self.plan.0 / 100 {
            return self.wanted;
        }
        self.wanted.saturating_add(Bytes(step)).min(self.most.max(self.wanted))
    }
}

const SECOND: Duration = Duration::from_secs(1);

/// Wakes the thread.
#[derive(Debug, Default)]
struct Signal {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    told: bool,
    stop: bool,
}

impl Signal {
    fn tell(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_one();
    }

    /// Waits to be told something, or for `limit`; whether it is the end.
    fn wait(&self, limit: Duration) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut state, _) = self
            .changed
            .wait_timeout_while(state, limit, |state| !state.told && !state.stop)
            .unwrap_or_else(PoisonError::into_inner);
        state.told = false;
        state.stop
    }
}

impl Wake for Signal {
    fn wake(self: Arc<Signal>) {
        self.tell(|state| state.told = true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Pace {
        /// Ten steps a second; what is wanted at the end.
        fn play(&mut self, from_s: u64, to_s: u64, rung: Rung, room: Room) -> Bytes {
            for tenth in from_s * 10..to_s * 10 {
                self.next(Duration::from_millis(tenth * 100), rung, room);
            }
            self.wanted
        }
    }

    /// The finding of look number `look`.
    fn missing(look: u64, bytes: u64) -> Room {
        Room { missing: Bytes(bytes), pressing: true, look, ..Room::default() }
    }

    fn spare(bytes: u64) -> Room {
        Room { spare: Bytes(bytes), ..Room::default() }
    }

    #[test]
    fn slots_follow_the_rung_and_the_ledger_gets_its_bytes() {
        use super::super::{LayerFile, PartFile, SlotsOptions};
        use crate::gguf::Mapping;
        use crate::memory::Ledger;

        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let path = folder.path().join("experts");
        std::fs::write(&path, vec![1; 4 * 3 * 5000]).expect("it can be written");
        let mapping = Mapping::open(&path).expect("a regular file");
        let parts = [0, 1, 2].map(|part| PartFile { offset: part * 4 * 5000, bytes: 5000 });
        let layers = vec![LayerFile { experts: 4, parts }];
        let ledger = Ledger::new(Bytes(1 << 20));
        let options =
            SlotsOptions { slots_bytes: Bytes(1 << 17), lock: false, ..SlotsOptions::default() };
        let slots = ExpertSlots::open(&mapping, layers, &options, Some((&ledger, "model")));
        let slots = Arc::new(slots.expect("there is room"));
        let (planned, promised) = (slots.slots_bytes(), ledger.promised());
        assert!(planned > Bytes(0));
        let (conditions, metrics) = (Conditions::new(), Arc::new(Metrics::new()));
        let keeper =
            Keeper::start(Arc::clone(&slots), Arc::clone(&conditions), Arc::clone(&metrics))
                .expect("a thread can be started");
        conditions.set(Rung::Critical, false);
        let start = Instant::now();
        while metrics.memory_acts.with_label_values(&["shrink_slots"]).get() == 0 {
            assert!(start.elapsed() < TOO_MUCH, "the slots do not shrink");
            thread::yield_now();
        }
        assert_eq!(slots.slots_bytes(), Bytes(0));
        assert_eq!(ledger.promised(), promised.saturating_sub(planned));
        drop(keeper);
        // Nobody keeps them any more.
        conditions.set(Rung::Green, false);
        assert_eq!(slots.slots_bytes(), Bytes(0));
    }

    #[test]
    fn slots_give_at_once_what_is_missing() {
        let mut pace = Pace::new(Bytes(1000), Bytes(5000));
        assert_eq!(pace.next(SECOND, Rung::Orange, missing(1, 350)), Some(Bytes(650)));
        assert_eq!(pace.next(SECOND, Rung::Orange, missing(1, 350)), None, "once for each look");
        assert_eq!(pace.next(SECOND, Rung::Orange, missing(2, 20)), Some(Bytes(550)));
        assert_eq!(pace.next(SECOND, Rung::Critical, missing(3, 20)), Some(Bytes(0)));
        assert_eq!(pace.next(SECOND, Rung::Red, missing(4, 20)), None);
    }

    #[test]
    fn stalls_alone_cost_a_tenth_each_second() {
        let mut pace = Pace::new(Bytes(1000), Bytes(5000));
        let at = |ms| Duration::from_millis(ms);
        assert_eq!(pace.next(at(0), Rung::Orange, missing(1, 0)), Some(Bytes(900)));
        assert_eq!(pace.next(at(500), Rung::Orange, missing(2, 0)), None);
        assert_eq!(pace.next(at(1000), Rung::Orange, missing(3, 0)), Some(Bytes(800)));
        // The rung is held for a while; nothing asks for more.
        let calm = Room { look: 4, ..spare(0) };
        assert_eq!(pace.next(at(5000), Rung::Orange, calm), None);
    }

    #[test]
    fn they_come_back_to_the_plan_and_beyond_while_there_is_room() {
        let mut pace = Pace::new(Bytes(1000), Bytes(1200));
        pace.next(SECOND, Rung::Critical, missing(1, 1));
        assert_eq!(pace.play(2, 60, Rung::Yellow, spare(10_000)), Bytes(0));
        assert_eq!(pace.play(60, 90, Rung::Green, spare(15)), Bytes(0), "too little to spare");
        let back = pace.play(90, 240, Rung::Green, spare(10_000));
        assert!(back >= Bytes(1000), "{back:?}");
        assert_eq!(pace.play(240, 600, Rung::Green, spare(10_000)), Bytes(1200));
    }

    #[test]
    fn a_fall_soon_after_a_growth_lowers_what_they_grow_to() {
        let mut pace = Pace::new(Bytes(1000), Bytes(2000));
        pace.play(10, 23, Rung::Green, spare(10_000));
        let grown = pace.wanted;
        assert!(grown > Bytes(1000));
        pace.next(Duration::from_secs(30), Rung::Orange, missing(1, 100));
        assert_eq!(pace.most, Bytes(grown.0 / 10 * 9));
        let most = pace.most;
        assert!(pace.play(60, 600, Rung::Green, spare(10_000)) <= most);
    }
}
