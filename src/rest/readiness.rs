//! Whether requests can be answered, as load balancers and service managers ask.

use std::sync::atomic::{AtomicBool, Ordering};

/// Set by whoever wires the daemon, read by the door.
#[derive(Debug)]
pub struct Readiness {
    loading: AtomicBool,
    draining: AtomicBool,
    no_headroom: AtomicBool,
}

impl Readiness {
    /// Loading, until [`set_ready`](Readiness::set_ready).
    pub fn new() -> Readiness {
        Readiness {
            loading: AtomicBool::new(true),
            draining: AtomicBool::new(false),
            no_headroom: AtomicBool::new(false),
        }
    }

    /// The default model can answer.
    pub fn set_ready(&self) {
        self.loading.store(false, Ordering::Release);
    }

    /// The daemon is shutting down; there is no way back.
    pub fn set_draining(&self) {
        self.draining.store(true, Ordering::Release);
    }

    /// Whether memory is too short for any request.
    pub fn set_no_headroom(&self, short: bool) {
        self.no_headroom.store(short, Ordering::Release);
    }

    /// Whether the default model cannot answer yet.
    pub fn is_loading(&self) -> bool {
        self.loading.load(Ordering::Acquire)
    }

    /// Whether the daemon is shutting down.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// Why it is not ready; empty if it is.
    pub fn reasons(&self) -> Vec<&'static str> {
        let all = [
            ("loading", self.is_loading()),
            ("draining", self.is_draining()),
            ("no headroom", self.no_headroom.load(Ordering::Acquire)),
        ];
        all.into_iter().filter(|(_, holds)| *holds).map(|(reason, _)| reason).collect()
    }
}

impl Default for Readiness {
    fn default() -> Readiness {
        Readiness::new()
    }
}
