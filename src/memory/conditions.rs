//! What the watch has found, for whoever acts on it: one value that is read without waiting.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

use super::{Room, Rung};

/// Rung and heat now, and who wants to be woken when they change.
#[derive(Debug)]
pub struct Conditions {
    rung: AtomicU8,
    hot: AtomicBool,
    /// Held for the length of a copy, never while allocating.
    room: Mutex<Room>,
    /// The model runs from disk because the operator wants it to.
    forced: AtomicBool,
    /// Until when, in milliseconds after `start`, a load excuses stalls; `u64::MAX` while it lasts.
    loading_until: AtomicU64,
    start: Instant,
    wakers: Mutex<Vec<Waker>>,
}

/// After the last page of a model has come in, stalls take this long to fade from the counters.
const AFTER_LOAD: Duration = Duration::from_secs(10);

impl Conditions {
    /// Green, cool, nothing loading.
    pub fn new() -> Arc<Conditions> {
        Arc::new(Conditions {
            rung: AtomicU8::new(0),
            hot: AtomicBool::new(false),
            room: Mutex::new(Room::default()),
            forced: AtomicBool::new(false),
            loading_until: AtomicU64::new(0),
            start: Instant::now(),
            wakers: Mutex::new(Vec::new()),
        })
    }

    /// The rung we stand on.
    pub fn rung(&self) -> Rung {
        Rung::from_number(self.rung.load(Ordering::Relaxed))
    }

    /// Whether the processor is too warm to work at full width.
    pub fn is_hot(&self) -> bool {
        self.hot.load(Ordering::Relaxed)
    }

    /// How far headroom is from where caches may rest.
    pub fn room(&self) -> Room {
        *self.room.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has `waker` woken at each change, from now on.
    pub fn wake_on_change(&self, waker: Waker) {
        self.wakers.lock().unwrap_or_else(PoisonError::into_inner).push(waker);
    }

    /// From now on stalls, refaults and reclaim are no sign of pressure: weights that have no room come from disk
    /// again and again, as the operator wants it.
    pub fn set_forced(&self) {
        self.forced.store(true, Ordering::Relaxed);
    }

    /// Excuses stalls until the returned guard is dropped, and ten seconds longer: a model is coming in.
    pub fn loading(self: &Arc<Conditions>) -> Loading {
        self.loading_until.store(u64::MAX, Ordering::Relaxed);
        Loading(Arc::clone(self))
    }

    /// Sets what the watch has found and wakes whoever asked for it. Allocates nothing.
    pub fn set(&self, rung: Rung, hot: bool) {
        let rung_before = self.rung.swap(rung.number(), Ordering::Relaxed);
        let hot_before = self.hot.swap(hot, Ordering::Relaxed);
        if rung_before != rung.number() || hot_before != hot {
            let wakers = self.wakers.lock().unwrap_or_else(PoisonError::into_inner);
            wakers.iter().for_each(Waker::wake_by_ref);
        }
    }

    /// Sets what [`room`](Conditions::room) tells.
    pub(super) fn set_room(&self, room: Room) {
        *self.room.lock().unwrap_or_else(PoisonError::into_inner) = room;
    }

    /// Whether stalls are excused now.
    pub(super) fn exempt(&self) -> bool {
        let now = self.start.elapsed().as_millis() as u64;
        self.forced.load(Ordering::Relaxed) || now < self.loading_until.load(Ordering::Relaxed)
    }

    fn loaded(&self) {
        let until = self.start.elapsed() + AFTER_LOAD;
        self.loading_until.store(until.as_millis() as u64, Ordering::Relaxed);
    }
}

/// A load in progress.
#[derive(Debug)]
pub struct Loading(Arc<Conditions>);

impl Drop for Loading {
    fn drop(&mut self) {
        self.0.loaded();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::task::Wake;

    use super::*;

    #[derive(Default)]
    struct Counter(AtomicUsize);

    impl Wake for Counter {
        fn wake(self: Arc<Counter>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn whoever_asked_is_woken_at_each_change_only() {
        let conditions = Conditions::new();
        let counter = Arc::new(Counter::default());
        conditions.wake_on_change(Waker::from(Arc::clone(&counter)));
        conditions.set(Rung::Red, false);
        conditions.set(Rung::Red, false);
        conditions.set(Rung::Red, true);
        conditions.set(Rung::Green, false);
        assert_eq!(counter.0.load(Ordering::SeqCst), 3);
        assert_eq!((conditions.rung(), conditions.is_hot()), (Rung::Green, false));
    }

    #[test]
    fn loads_and_force_excuse_stalls() {
        let conditions = Conditions::new();
        assert!(!conditions.exempt());
        let loading = conditions.loading();
        assert!(conditions.exempt());
        drop(loading);
        assert!(conditions.exempt(), "stalls fade for a while");
        let other = Conditions::new();
        other.set_forced();
        assert!(other.exempt());
    }
}
