//! What the engine thread is told: submissions, wake-ups from its clients' channels, and the order to stop.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Wake;
use std::time::Instant;

use super::submission::Submission;

/// The engine thread's letter box. Its length is bounded by the places of the engine: each submission holds
/// one.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    content: Mutex<Content>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Content {
    submissions: Vec<Submission>,
    woken: bool,
    stop: bool,
}

/// What has come since the last look.
#[derive(Debug)]
pub(super) struct Letters {
    pub(super) submissions: Vec<Submission>,
    pub(super) stop: bool,
}

impl Inbox {
    pub(super) fn submit(&self, submission: Submission) {
        self.content().submissions.push(submission);
        self.changed.notify_one();
    }

    pub(super) fn stop(&self) {
        self.content().stop = true;
        self.changed.notify_one();
    }

    /// Takes what is there, without waiting.
    pub(super) fn take(&self) -> Letters {
        let mut content = self.content();
        content.woken = false;
        Letters { submissions: std::mem::take(&mut content.submissions), stop: content.stop }
    }

    /// Waits until something is there, a client's channel has changed, or it is `until`.
    pub(super) fn wait(&self, until: Option<Instant>) {
        let mut content = self.content();
        while !content.woken && !content.stop && content.submissions.is_empty() {
            content = match until {
                None => self.changed.wait(content).unwrap_or_else(PoisonError::into_inner),
                Some(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return;
                    }
                    let (content, _) = self
                        .changed
                        .wait_timeout(content, left)
                        .unwrap_or_else(PoisonError::into_inner);
                    content
                }
            };
        }
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A channel that has room again or whose reader is gone wakes the thread.
impl Wake for Inbox {
    fn wake(self: Arc<Inbox>) {
        self.content().woken = true;
        self.changed.notify_one();
    }
}
