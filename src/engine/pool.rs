//! A few plain threads that make requests into prompts: neither the engine thread nor an async worker may be
//! held up by a long conversation.

use std::io;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use super::submission::Job;

/// The threads and their bounded queue; dropping it lets them finish what is queued and ends them.
#[derive(Debug)]
pub(super) struct Pool {
    jobs: Option<SyncSender<Job>>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// # Errors
    /// If a thread cannot be started.
    pub(super) fn start(
        threads: usize,
        queue_max: usize,
        work: impl Fn(Job) + Send + Sync + 'static,
    ) -> io::Result<Pool> {
        let (sender, receiver) = sync_channel(queue_max);
        let receiver = Arc::new(Mutex::new(receiver));
        let work = Arc::new(work);
        let mut pool = Pool { jobs: Some(sender), threads: Vec::new() };
        for index in 0..threads {
            let (receiver, work) = (Arc::clone(&receiver), Arc::clone(&work));
            let thread = thread::Builder::new().name(format!("prepare-{index}"));
            pool.threads.push(thread.spawn(move || {
                while let Some(job) = next(&receiver) {
                    work(job);
                }
            })?);
        }
        Ok(pool)
    }

    /// Queues a job; gives it back if the queue is full.
    pub(super) fn submit(&self, job: Job) -> Result<(), Box<Job>> {
        match &self.jobs {
            None => Err(Box::new(job)),
            Some(jobs) => jobs.try_send(job).map_err(|error| match error {
                TrySendError::Full(job) | TrySendError::Disconnected(job) => Box::new(job),
            }),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        drop(self.jobs.take());
        for thread in self.threads.drain(..) {
            // A panic has already been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// One thread waits for the next job, the others for the lock; `None` when there will be none.
fn next(receiver: &Mutex<Receiver<Job>>) -> Option<Job> {
    receiver.lock().unwrap_or_else(PoisonError::into_inner).recv().ok()
}
