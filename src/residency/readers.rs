//! Threads that read. Whoever computes waits for them as for a disk, never on a page fault.
//!
//! A buffer belongs to a job from submission to collection, so nobody can look into it while it is being filled.
//! What is needed now goes before what may be needed next.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Instant;

use super::pager::Pages;
use super::source::{ReadError, Source, Span};

/// A read that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ReadId(u64);

/// Whether somebody waits for a read, or may want it soon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Urgency {
    Now,
    Ahead,
}

/// A buffer that came back, and whether it holds what it should.
#[derive(Debug)]
pub(super) struct Collected {
    pub(super) pages: Pages,
    pub(super) result: Result<(), ReadError>,
}

/// The threads and what lies between them and those who wait.
#[derive(Debug)]
pub(super) struct Readers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    source: Source,
    state: Mutex<State>,
    /// Something to read.
    work: Condvar,
    /// Something was read.
    done: Condvar,
    bytes: AtomicU64,
    busy_ns: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    now: VecDeque<Job>,
    ahead: VecDeque<Job>,
    running: Vec<Running>,
    finished: Vec<(ReadId, Collected)>,
    /// Buffers of reads that were called off.
    spare: Vec<Pages>,
    /// When the disk became busy, while any thread reads.
    busy_since: Option<Instant>,
    stop: bool,
}

#[derive(Debug)]
struct Job {
    id: ReadId,
    span: Span,
    pages: Pages,
    /// Bytes that have arrived.
    done: usize,
}

/// A job whose next piece is being read.
#[derive(Debug)]
struct Running {
    id: ReadId,
    urgency: Urgency,
    called_off: bool,
}

impl Readers {
    /// Starts `threads` threads (at least one) on `source`.
    ///
    /// # Errors
    /// If not even one thread can be started.
    pub(super) fn start(source: Source, threads: usize) -> io::Result<Readers> {
        let shared = Arc::new(Shared {
            source,
            state: Mutex::default(),
            work: Condvar::new(),
            done: Condvar::new(),
            bytes: AtomicU64::new(0),
            busy_ns: AtomicU64::new(0),
        });
        let mut readers = Readers { shared, threads: Vec::new() };
        for number in 1..=threads.max(1) {
            let shared = Arc::clone(&readers.shared);
            let thread = Builder::new()
                .name(format!("experts-{number}"))
                .spawn(move || shared.read_until_stopped());
            match thread {
                Ok(thread) => readers.threads.push(thread),
                Err(error) if readers.threads.is_empty() => return Err(error),
                Err(_) => break,
            }
        }
        Ok(readers)
    }

    /// Whether reads go past the page cache.
    pub(super) fn is_direct(&self) -> bool {
        self.shared.source.is_direct()
    }

    /// Bytes read so far, whole blocks counted.
    pub(super) fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::Relaxed)
    }

    /// Time during which at least one thread was reading, in nanoseconds; what runs now is not in it.
    pub(super) fn busy_ns(&self) -> u64 {
        self.shared.busy_ns.load(Ordering::Relaxed)
    }

    /// Asks for `span` in `pages`, which must be large enough.
    pub(super) fn submit(&self, span: Span, pages: Pages, urgency: Urgency) -> ReadId {
        let mut state = self.shared.state();
        let id = ReadId(state.next);
        state.next += 1;
        let job = Job { id, span, pages, done: 0 };
        match urgency {
            Urgency::Now => state.now.push_back(job),
            Urgency::Ahead => state.ahead.push_back(job),
        }
        drop(state);
        self.shared.work.notify_one();
        id
    }

    /// Somebody needs `id` now.
    pub(super) fn hurry(&self, id: ReadId) {
        let mut state = self.shared.state();
        if let Some(running) = state.running.iter_mut().find(|running| running.id == id) {
            running.urgency = Urgency::Now;
        } else if let Some(at) = state.ahead.iter().position(|job| job.id == id)
            && let Some(job) = state.ahead.remove(at)
        {
            state.now.push_back(job);
            drop(state);
            self.shared.work.notify_one();
        }
    }

    /// Nobody needs `id` any more. Its buffer comes back through [`take_spare`](Readers::take_spare), now or when
    /// the piece being read has arrived.
    pub(super) fn call_off(&self, id: ReadId) {
        let mut guard = self.shared.state();
        let state = &mut *guard;
        for queue in [&mut state.now, &mut state.ahead] {
            if let Some(at) = queue.iter().position(|job| job.id == id)
                && let Some(job) = queue.remove(at)
            {
                state.spare.push(job.pages);
                return;
            }
        }
        if let Some(at) = state.finished.iter().position(|(other, _)| *other == id) {
            let (_, collected) = state.finished.swap_remove(at);
            state.spare.push(collected.pages);
            return;
        }
        if let Some(running) = state.running.iter_mut().find(|running| running.id == id) {
            running.called_off = true;
        }
    }

    /// A buffer of a read that was called off, if one has come back.
    pub(super) fn take_spare(&self) -> Option<Pages> {
        self.shared.state().spare.pop()
    }

    /// Waits until `id` has been read. `None` if there is no such read.
    pub(super) fn wait(&self, id: ReadId) -> Option<Collected> {
        let mut state = self.shared.state();
        loop {
            if let Some(at) = state.finished.iter().position(|(other, _)| *other == id) {
                return Some(state.finished.swap_remove(at).1);
            }
            let queued = state.now.iter().chain(&state.ahead).any(|job| job.id == id);
            if !queued && !state.running.iter().any(|running| running.id == id) {
                return None;
            }
            state = self.shared.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.stop = true;
        for running in &mut state.running {
            running.called_off = true;
        }
        drop(state);
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // A reader that panicked has said so; there is nothing to hear from it.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_until_stopped(&self) {
        let mut state = self.state();
        loop {
            if state.stop {
                return;
            }
            let Some((mut job, urgency)) = state.next_job() else {
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            state.running.push(Running { id: job.id, urgency, called_off: false });
            if state.busy_since.is_none() {
                state.busy_since = Some(Instant::now());
            }
            drop(state);
            let result = self.source.read_piece(job.span, &mut job.pages, job.done);
            if let Ok(done) = result {
                self.bytes.fetch_add((done - job.done) as u64, Ordering::Relaxed);
            }
            state = self.state();
            self.settle(&mut state, job, result);
        }
    }

    /// Puts a job whose piece has been read where it belongs.
    fn settle(&self, state: &mut State, mut job: Job, result: Result<usize, ReadError>) {
        let at = state.running.iter().position(|running| running.id == job.id);
        let running = at.map(|at| state.running.swap_remove(at));
        let (urgency, called_off) =
            running.map_or((Urgency::Ahead, true), |running| (running.urgency, running.called_off));
        let finished = match result {
            _ if called_off => None,
            Ok(done) if job.span.is_complete(done) => Some(Ok(())),
            Ok(done) => {
                job.done = done;
                // It goes on where it was, unless something more urgent has come.
                match urgency {
                    Urgency::Now => state.now.push_front(job),
                    Urgency::Ahead => state.ahead.push_front(job),
                }
                return;
            }
            Err(error) => Some(Err(error)),
        };
        match finished {
            Some(result) => state.finished.push((job.id, Collected { pages: job.pages, result })),
            None => state.spare.push(job.pages),
        }
        // A thread that finds more to do goes on at once, so the disk counts as busy in between.
        let more = !state.now.is_empty() || !state.ahead.is_empty();
        if state.running.is_empty()
            && !more
            && let Some(since) = state.busy_since.take()
        {
            let ns = u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.busy_ns.fetch_add(ns, Ordering::Relaxed);
        }
        // What waited for an idle disk may go now.
        self.work.notify_one();
        self.done.notify_all();
    }
}

impl State {
    /// What to read next. What is read ahead waits until nothing urgent is queued or being read.
    fn next_job(&mut self) -> Option<(Job, Urgency)> {
        if let Some(job) = self.now.pop_front() {
            return Some((job, Urgency::Now));
        }
        if self.running.iter().any(|running| running.urgency == Urgency::Now) {
            return None;
        }
        self.ahead.pop_front().map(|job| (job, Urgency::Ahead))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::Mapping;

    const LEN: usize = 3 << 20;

    fn content(offset: usize) -> u8 {
        (offset / 7 % 251) as u8
    }

    fn readers(threads: usize) -> (tempfile::TempDir, Readers) {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("model.gguf");
        let bytes: Vec<u8> = (0..8 * LEN).map(content).collect();
        std::fs::write(&path, bytes).expect("room for it");
        let mapping = Mapping::open(&path).expect("a regular file");
        let source = Source::open(&mapping, true).expect("a file");
        (dir, Readers::start(source, threads).expect("threads"))
    }

    fn submit(readers: &Readers, number: usize, urgency: Urgency) -> (Span, ReadId) {
        let span = Span::new((number * LEN + 32) as u64, LEN - 64);
        let pages = Pages::new(span.buffer_bytes()).expect("memory");
        (span, readers.submit(span, pages, urgency))
    }

    fn is_right(number: usize, span: Span, collected: &Collected) -> bool {
        let bytes = &collected.pages.bytes()[span.wanted()];
        let first = number * LEN + 32;
        collected.result.is_ok()
            && bytes.iter().enumerate().all(|(at, &byte)| byte == content(first + at))
    }

    #[test]
    fn every_read_is_collected_once_with_its_bytes() {
        let (_dir, readers) = readers(3);
        let reads: Vec<(Span, ReadId)> = (0..7)
            .map(|n| submit(&readers, n, if n % 2 == 0 { Urgency::Now } else { Urgency::Ahead }))
            .collect();
        for (number, &(span, id)) in reads.iter().enumerate().rev() {
            let collected = readers.wait(id).expect("it was asked for");
            assert!(is_right(number, span, &collected), "{number}");
            assert!(readers.wait(id).is_none(), "it was collected");
        }
        assert!(readers.bytes() >= 7 * (LEN as u64 - 64));
        assert!(readers.busy_ns() > 0);
    }

    #[test]
    fn what_is_called_off_gives_its_buffer_back() {
        let (_dir, readers) = readers(1);
        let reads: Vec<(Span, ReadId)> =
            (0..6).map(|n| submit(&readers, n, Urgency::Ahead)).collect();
        for (_, id) in &reads[..5] {
            readers.call_off(*id);
        }
        readers.hurry(reads[5].1);
        let collected = readers.wait(reads[5].1).expect("it was asked for");
        assert!(is_right(5, reads[5].0, &collected));
        let mut spare = 0;
        while spare < 5 {
            if readers.take_spare().is_some() {
                spare += 1;
            } else {
                std::thread::yield_now();
            }
        }
        assert!(readers.wait(reads[0].1).is_none());
    }

    #[test]
    fn dropping_the_readers_ends_them() {
        let (_dir, readers) = readers(2);
        for number in 0..6 {
            submit(&readers, number, Urgency::Now);
        }
        drop(readers);
    }
}
