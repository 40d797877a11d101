//! How many requests the engine has in hand, from the first look at them to their last event.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A bounded number of places.
#[derive(Debug)]
pub(super) struct Places {
    max: usize,
    taken: Mutex<usize>,
    freed: Condvar,
}

/// A taken place; dropping it frees it.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
}

impl Places {
    pub(super) fn new(max: usize) -> Arc<Places> {
        Arc::new(Places { max, taken: Mutex::new(0), freed: Condvar::new() })
    }

    /// A place, if one is free.
    pub(super) fn take(self: &Arc<Places>) -> Option<Place> {
        let mut taken = self.taken();
        if *taken >= self.max {
            return None;
        }
        *taken += 1;
        Some(Place { places: Arc::clone(self) })
    }

    /// How many are taken.
    pub(super) fn len(&self) -> usize {
        *self.taken()
    }

    /// Waits until no place is taken, but not longer than `limit`; whether it came to that.
    pub(super) fn wait_until_empty(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        let mut taken = self.taken();
        while *taken > 0 {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            (taken, _) =
                self.freed.wait_timeout(taken, left).unwrap_or_else(PoisonError::into_inner);
        }
        true
    }

    fn taken(&self) -> MutexGuard<'_, usize> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        *self.places.taken() -= 1;
        self.places.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_bounded_and_come_back() {
        let places = Places::new(2);
        let first = places.take().expect("both are free");
        let second = places.take().expect("one is free");
        assert!(places.take().is_none());
        assert!(!places.wait_until_empty(Duration::ZERO));
        drop(first);
        assert_eq!(places.len(), 1);
        assert!(places.take().is_some());
        drop(second);
        assert!(places.wait_until_empty(Duration::ZERO));
    }
}
