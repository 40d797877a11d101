//! The threads of the engine: persistent, waiting by a short spin and then parked.
//!
//! A job is cut into as many parts as the team has threads. A part belongs to whoever takes it first, so a thread
//! that is late (parked, or off its core because of a neighbour) costs nothing: the others do its part. The caller
//! waits only for parts that somebody has begun. Neither allocation nor lock is on the way of a job; a mutex is
//! touched where a thread sleeps and where a part panics.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

type Job = *const (dyn Fn(usize) + Sync);

/// A fixed number of threads, the calling one among them.
pub struct Team {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    epoch: u32,
}

struct Shared {
    /// High half: number of the job. Low half: its next part that nobody has taken.
    ticket: Line<AtomicU64>,
    finished: Line<AtomicU32>,
    job: UnsafeCell<Option<Job>>,
    parts: u32,
    /// For each worker, whether it is parked or about to be.
    parked: Box<[Line<AtomicBool>]>,
    caller_waits: AtomicBool,
    sleep: Mutex<()>,
    done: Condvar,
    panicked: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
}

/// A value alone on its cache lines.
#[repr(align(128))]
struct Line<T>(T);

// SAFETY: `job` is written by the caller while no part is open, and read only by a thread that has taken a part of
// the job it belongs to; taking a part (a read-modify-write of `ticket`) comes after the write (the store to it).
// What it points to is `Sync`. All other fields are `Sync` and `Send` by themselves.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl Team {
    /// A team of `threads`, the caller of [`Team::run`] being one of them; 0 counts as 1.
    ///
    /// Fewer threads are started where the system refuses more: [`Team::threads`] says how many there are.
    pub fn new(threads: usize) -> Team {
        let wanted = u32::try_from(threads.clamp(1, MAX_THREADS)).expect("a small number");
        let shared = Arc::new(Shared {
            ticket: Line(AtomicU64::new(u64::from(wanted))),
            finished: Line(AtomicU32::new(0)),
            job: UnsafeCell::new(None),
            parts: wanted,
            parked: (1..wanted).map(|_| Line(AtomicBool::new(false))).collect(),
            caller_waits: AtomicBool::new(false),
            sleep: Mutex::new(()),
            done: Condvar::new(),
            panicked: AtomicBool::new(false),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
        });
        let workers = (0..wanted as usize - 1)
            .map_while(|index| {
                let shared = Arc::clone(&shared);
                thread::Builder::new()
                    .name(format!("kernels-{}", index + 1))
                    .spawn(move || work(&shared, index))
                    .ok()
            })
            .collect();
        Team { shared, workers, epoch: 0 }
    }

    /// Threads of the team, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Parts of a job: `run` calls its argument with each number below this.
    pub fn parts(&self) -> usize {
        self.shared.parts as usize
    }

    /// Calls `part` once with each number below [`Team::parts`], on whatever threads are free, and returns when
    /// all calls have returned.
    ///
    /// # Panics
    /// With the panic of a part, after the other parts have returned.
    pub fn run(&mut self, part: &(dyn Fn(usize) + Sync)) {
        if self.shared.parts == 1 {
            return part(0);
        }
        let shared = &*self.shared;
        // SAFETY: only the lifetime is erased; every call of the job ends before this function returns.
        let job = unsafe {
            std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(part)
        };
        // SAFETY: the parts of the last job are all finished and the ticket is exhausted, so nobody reads the cell.
        unsafe { *shared.job.get() = Some(job) };
        shared.finished.0.store(0, SeqCst);
        self.epoch = self.epoch.wrapping_add(1);
        shared.ticket.0.store(u64::from(self.epoch) << 32, SeqCst);
        for (worker, parked) in self.workers.iter().zip(&shared.parked) {
            if parked.0.load(SeqCst) && parked.0.swap(false, SeqCst) {
                worker.thread().unpark();
            }
        }
        shared.take_parts(self.epoch);
        shared.wait_until_finished();
        if shared.panicked.load(SeqCst) {
            shared.panicked.store(false, SeqCst);
            let payload = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
            resume_unwind(payload.unwrap_or_else(|| Box::new("a part of a team panicked")));
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of its parts, so there is nothing to hear from it.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// Takes parts of the job `epoch` until none is left.
    fn take_parts(&self, epoch: u32) {
        while let Some(part) = self.take_part(epoch) {
            // SAFETY: an open part of this job is ours, so `run` has not returned: the cell holds its job, and
            // nobody writes it until `finished` is complete.
            let job = unsafe { (*self.job.get()).expect("a job is set before its ticket") };
            // SAFETY: as above, the closure is still borrowed by `run`.
            let result = catch_unwind(AssertUnwindSafe(|| unsafe { (*job)(part) }));
            if let Err(payload) = result {
                *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(payload);
                self.panicked.store(true, SeqCst);
            }
            if self.finished.0.fetch_add(1, SeqCst) + 1 == self.parts
                && self.caller_waits.load(SeqCst)
            {
                drop(self.sleep.lock().unwrap_or_else(PoisonError::into_inner));
                self.done.notify_one();
            }
        }
    }

    fn take_part(&self, epoch: u32) -> Option<usize> {
        let mut ticket = self.ticket.0.load(SeqCst);
        loop {
            let next = ticket as u32;
            if (ticket >> 32) as u32 != epoch || next >= self.parts {
                return None;
            }
            match self.ticket.0.compare_exchange_weak(ticket, ticket + 1, SeqCst, SeqCst) {
                Ok(_) => return Some(next as usize),
                Err(now) => ticket = now,
            }
        }
    }

    fn is_finished(&self) -> bool {
        self.finished.0.load(SeqCst) == self.parts
    }

    fn wait_until_finished(&self) {
        if spin_until(|| self.is_finished()) {
            return;
        }
        self.caller_waits.store(true, SeqCst);
        let mut guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
        while !self.is_finished() {
            guard = self.done.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.caller_waits.store(false, SeqCst);
    }

    fn epoch(&self) -> u32 {
        (self.ticket.0.load(SeqCst) >> 32) as u32
    }
}

fn work(shared: &Shared, index: usize) {
    let mut seen = 0;
    loop {
        let called = || shared.epoch() != seen || shared.stop.load(SeqCst);
        if !spin_until(called) {
            while !called() {
                shared.parked[index].0.store(true, SeqCst);
                if !called() {
                    thread::park();
                }
            }
            shared.parked[index].0.store(false, SeqCst);
        }
        if shared.stop.load(SeqCst) {
            return;
        }
        seen = shared.epoch();
        shared.take_parts(seen);
    }
}

/// Waits for a condition without giving up the core, but not for long.
fn spin_until(condition: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    loop {
        for _ in 0..SPINS_BETWEEN_CLOCK_READS {
            if condition() {
                return true;
            }
            std::hint::spin_loop();
        }
        if start.elapsed() > SPIN_LIMIT {
            return condition();
        }
    }
}

/// Longer than the work between two products of a small model, shorter than anything a neighbour would notice.
const SPIN_LIMIT: Duration = Duration::from_micros(40);
const SPINS_BETWEEN_CLOCK_READS: u32 = 16;
const MAX_THREADS: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn every_part_runs_once() {
        for threads in [0, 1, 2, 5] {
            let mut team = Team::new(threads);
            let counts: Vec<AtomicUsize> = (0..team.parts()).map(|_| AtomicUsize::new(0)).collect();
            for round in 1..=300 {
                team.run(&|part| {
                    counts[part].fetch_add(1, SeqCst);
                });
                assert!(counts.iter().all(|count| count.load(SeqCst) == round));
            }
        }
    }

    #[test]
    fn parked_workers_are_woken() {
        let mut team = Team::new(3);
        let sum = AtomicUsize::new(0);
        for _ in 0..20 {
            // Parts that wait for each other need every thread: the job ends only if the parked ones come.
            let met = AtomicUsize::new(0);
            let parts = team.parts();
            while !team.shared.parked.iter().all(|parked| parked.0.load(SeqCst)) {
                thread::yield_now();
            }
            team.run(&|part| {
                met.fetch_add(1, SeqCst);
                while met.load(SeqCst) < parts {
                    thread::yield_now();
                }
                sum.fetch_add(part, SeqCst);
            });
        }
        assert_eq!(sum.load(SeqCst), 20 * 3);
    }

    #[test]
    fn a_panic_of_a_part_is_a_panic_of_run() {
        let mut team = Team::new(4);
        let finished = AtomicUsize::new(0);
        for bad in 0..team.parts() {
            finished.store(0, SeqCst);
            let result = catch_unwind(AssertUnwindSafe(|| {
                team.run(&|part| {
                    assert!(part != bad, "part {part} is bad");
                    finished.fetch_add(1, SeqCst);
                });
            }));
            let payload = result.expect_err("the panic arrives");
            let message = payload.downcast_ref::<String>().expect("a formatted message");
            assert_eq!(message, &format!("part {bad} is bad"));
            assert_eq!(finished.load(SeqCst), team.parts() - 1);
        }
        team.run(&|_| {
            finished.fetch_add(1, SeqCst);
        });
        assert_eq!(finished.load(SeqCst), 2 * team.parts() - 1);
    }
}
