//! Which requests run or ran lately: a redelivered one never runs twice, a running one can be cancelled.
//!
//! Pure: the clock is an argument.

use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::link::Outgoing;
use crate::chat::RequestId;

/// Where the answer goes, and the request's id: clients choose ids without knowing of each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Key {
    pub(super) topic: String,
    pub(super) id: RequestId,
}

/// Why a running request is told to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    Cancelled,
    Draining,
}

/// What is known about a request that arrives.
#[derive(Debug, PartialEq)]
pub(super) enum Seen {
    /// Another request runs under this id.
    Clash,
    /// It ended; this was its end.
    Ended(Outgoing),
    /// Too many run.
    Full,
    /// It may run. Cancelled by what the receiver gets.
    New,
    /// It runs already.
    Running,
}

/// What came of a cancel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CancelResult {
    Finished,
    Stopped,
    Unknown,
}

/// The requests of the last minutes, oldest first.
pub(super) struct Requests {
    entries: VecDeque<Entry>,
    running_max: usize,
}

struct Entry {
    key: Key,
    fingerprint: u64,
    state: State,
}

enum State {
    Ended { at: Instant, answer: Outgoing },
    Running { stop: Option<oneshot::Sender<Stop>> },
}

impl Requests {
    /// At most `running_max` run at once.
    pub(super) fn new(running_max: usize) -> Requests {
        Requests { entries: VecDeque::new(), running_max }
    }

    /// What is to be done with a request that arrives; `New` must be followed by [`Requests::run`].
    pub(super) fn look(&mut self, key: &Key, fingerprint: u64, now: Instant) -> Seen {
        self.forget(now);
        if let Some(at) = self.entries.iter().position(|entry| entry.key == *key) {
            let entry = &self.entries[at];
            match &entry.state {
                State::Running { .. } if entry.fingerprint == fingerprint => return Seen::Running,
                State::Running { .. } => return Seen::Clash,
                State::Ended { answer, .. } if entry.fingerprint == fingerprint => {
                    return Seen::Ended(answer.clone());
                }
                State::Ended { .. } => {
                    self.entries.remove(at);
                }
            }
        }
        if self.running() >= self.running_max { Seen::Full } else { Seen::New }
    }

    /// Notes that a request runs; whoever holds the receiver learns when it is to stop.
    pub(super) fn run(&mut self, key: Key, fingerprint: u64) -> oneshot::Receiver<Stop> {
        let (stop, stopped) = oneshot::channel();
        let state = State::Running { stop: Some(stop) };
        self.entries.push_back(Entry { key, fingerprint, state });
        stopped
    }

    /// Notes how a request ended.
    pub(super) fn end(&mut self, key: &Key, answer: Outgoing, now: Instant) {
        if let Some(entry) = self.entries.iter_mut().find(|entry| entry.key == *key) {
            entry.state = State::Ended { at: now, answer };
        }
        self.forget(now);
    }

    /// Stops every running request of this id.
    pub(super) fn cancel(&mut self, id: &RequestId) -> CancelResult {
        let mut result = CancelResult::Unknown;
        for entry in self.entries.iter_mut().filter(|entry| entry.key.id == *id) {
            match &mut entry.state {
                State::Running { stop } => {
                    send(stop, Stop::Cancelled);
                    result = CancelResult::Stopped;
                }
                State::Ended { .. } if result == CancelResult::Unknown => {
                    result = CancelResult::Finished;
                }
                State::Ended { .. } => {}
            }
        }
        result
    }

    /// Stops all.
    pub(super) fn stop_all(&mut self, why: Stop) {
        for entry in &mut self.entries {
            if let State::Running { stop } = &mut entry.state {
                send(stop, why);
            }
        }
    }

    /// How many run.
    pub(super) fn running(&self) -> usize {
        let running = |entry: &&Entry| matches!(entry.state, State::Running { .. });
        self.entries.iter().filter(running).count()
    }

    /// Forgets what ended long ago, and the oldest ends when there are too many or they are too large.
    fn forget(&mut self, now: Instant) {
        self.entries.retain(|entry| match &entry.state {
            State::Ended { at, .. } => now.saturating_duration_since(*at) < REMEMBERED,
            State::Running { .. } => true,
        });
        loop {
            let (mut count, mut bytes) = (0, 0);
            for entry in &self.entries {
                if let State::Ended { answer, .. } = &entry.state {
                    count += 1;
                    bytes += answer.packet_bytes();
                }
            }
            if count <= ENDED_MAX && bytes <= ENDED_BYTES_MAX {
                return;
            }
            let ended = |entry: &Entry| matches!(entry.state, State::Ended { .. });
            let Some(oldest) = self.entries.iter().position(ended) else { return };
            self.entries.remove(oldest);
        }
    }
}

fn send(stop: &mut Option<oneshot::Sender<Stop>>, why: Stop) {
    if let Some(stop) = stop.take() {
        // A request that has just ended does not listen any more.
        let _ = stop.send(why);
    }
}

/// Tells a redelivery from another request under the same id.
pub(super) fn fingerprint(payload: &[u8], correlation: Option<&[u8]>) -> u64 {
    let mut hasher = DefaultHasher::new();
    payload.hash(&mut hasher);
    correlation.hash(&mut hasher);
    hasher.finish()
}

/// How long an end is kept for redelivered requests.
const REMEMBERED: Duration = Duration::from_secs(600);
const ENDED_MAX: usize = 256;
const ENDED_BYTES_MAX: usize = 4 << 20;

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn key(topic: &str, id: &str) -> Key {
        Key { topic: topic.to_owned(), id: RequestId::parse(id).expect("a plain id") }
    }

    fn answer(bytes: usize) -> Outgoing {
        Outgoing {
            topic: "t".to_owned(),
            payload: Bytes::from(vec![b'x'; bytes]),
            assured: true,
            retain: false,
            correlation: None,
            json: true,
            expiry: None,
        }
    }

    #[test]
    fn a_redelivered_request_runs_once() {
        let mut requests = Requests::new(8);
        let now = Instant::now();
        assert_eq!(requests.look(&key("t", "a"), 1, now), Seen::New);
        let _stopped = requests.run(key("t", "a"), 1);
        assert_eq!(requests.look(&key("t", "a"), 1, now), Seen::Running);
        assert_eq!(requests.look(&key("t", "a"), 2, now), Seen::Clash);
        assert_eq!(requests.look(&key("other", "a"), 1, now), Seen::New);
        requests.end(&key("t", "a"), answer(3), now);
        assert_eq!(requests.look(&key("t", "a"), 1, now), Seen::Ended(answer(3)));
        assert_eq!(requests.look(&key("t", "a"), 1, now + REMEMBERED), Seen::New);
    }

    #[test]
    fn another_request_may_take_the_id_of_one_that_ended() {
        let mut requests = Requests::new(8);
        let now = Instant::now();
        let _stopped = requests.run(key("t", "a"), 1);
        requests.end(&key("t", "a"), answer(3), now);
        assert_eq!(requests.look(&key("t", "a"), 2, now), Seen::New);
        let _stopped = requests.run(key("t", "a"), 2);
        assert_eq!(requests.running(), 1);
    }

    #[test]
    fn cancel_is_idempotent_and_says_what_it_found() {
        let mut requests = Requests::new(8);
        let now = Instant::now();
        let id = RequestId::parse("a").expect("a plain id");
        assert_eq!(requests.cancel(&id), CancelResult::Unknown);
        let mut stopped = requests.run(key("t", "a"), 1);
        assert_eq!(requests.cancel(&id), CancelResult::Stopped);
        assert_eq!(stopped.try_recv(), Ok(Stop::Cancelled));
        assert_eq!(requests.cancel(&id), CancelResult::Stopped);
        requests.end(&key("t", "a"), answer(1), now);
        assert_eq!(requests.cancel(&id), CancelResult::Finished);
    }

    #[test]
    fn running_requests_are_bounded() {
        let mut requests = Requests::new(1);
        let now = Instant::now();
        let _stopped = requests.run(key("t", "a"), 1);
        assert_eq!(requests.look(&key("t", "b"), 1, now), Seen::Full);
        requests.end(&key("t", "a"), answer(1), now);
        assert_eq!(requests.look(&key("t", "b"), 1, now), Seen::New);
    }

    #[test]
    fn kept_ends_are_bounded_in_number_and_bytes() {
        let mut requests = Requests::new(usize::MAX);
        let now = Instant::now();
        for i in 0..ENDED_MAX + 10 {
            let key = key("t", &i.to_string());
            let _stopped = requests.run(key.clone(), 1);
            requests.end(&key, answer(1), now);
        }
        assert_eq!(requests.entries.len(), ENDED_MAX);
        let large = key("t", "large");
        let _stopped = requests.run(large.clone(), 1);
        requests.end(&large, answer(ENDED_BYTES_MAX - 1000), now);
        assert!(requests.entries.len() < ENDED_MAX / 2);
        assert_eq!(requests.entries.back().map(|entry| entry.key.clone()), Some(large));
    }
}
