//! What the watch sleeps on: the next sample is due, stalls ring a bell, or it is told to stop.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Rings when tasks have stalled on memory for 140 ms within 2 s. Without privileges a window must be a multiple
/// of two seconds, so this is the bell that wakes a watch that sleeps long; the fast path is the counter.
const TRIGGER: &[u8] = b"some 140000 2000000\0";

/// Sleeps without allocating.
#[derive(Debug)]
pub(super) struct Alarm {
    stop: UnixStream,
    stalls: Option<File>,
}

/// Why it woke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Woken {
    Due,
    Stop,
}

impl Alarm {
    /// An alarm, and the end that stops it by being dropped. It has the kernel's bell under `root` if that can be had.
    ///
    /// # Errors
    /// If there are no descriptors left.
    pub(super) fn new(root: &Path) -> io::Result<(Alarm, UnixStream)> {
        let (stop, end) = UnixStream::pair()?;
        Ok((Alarm { stop, stalls: bell(root).ok() }, end))
    }

    /// Sleeps for `period`, or shorter if stalls ring.
    pub(super) fn sleep(&mut self, period: Duration) -> Woken {
        let timeout = Timespec::try_from(period).ok();
        let stop = PollFd::new(&self.stop, PollFlags::IN);
        let (stopped, broken) = match &self.stalls {
            None => {
                let mut files = [stop];
                // An interrupted sleep is a short one.
                let _ = poll(&mut files, timeout.as_ref());
                (!files[0].revents().is_empty(), false)
            }
            Some(bell) => {
                let mut files = [stop, PollFd::new(bell, PollFlags::PRI)];
                let _ = poll(&mut files, timeout.as_ref());
                (!files[0].revents().is_empty(), files[1].revents().contains(PollFlags::ERR))
            }
        };
        if broken {
            // The kernel has taken the trigger away; without it the sleep has its full length.
            self.stalls = None;
        }
        if stopped { Woken::Stop } else { Woken::Due }
    }
}

/// Whether the kernel grants a bell.
pub(super) fn has_bell(root: &Path) -> bool {
    bell(root).is_ok()
}

fn bell(root: &Path) -> io::Result<File> {
    let path = root.join("proc/pressure/memory");
    let mut file = OpenOptions::new().read(true).write(true).open(path)?;
    file.write_all(TRIGGER)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn it_sleeps_until_due_and_stops_at_once() {
        let empty = tempfile::tempdir().expect("a temporary folder can be made");
        let (mut alarm, end) = Alarm::new(empty.path()).expect("there are descriptors");
        assert!(!has_bell(empty.path()));
        assert_eq!(alarm.sleep(Duration::from_millis(1)), Woken::Due);
        drop(end);
        let start = Instant::now();
        assert_eq!(alarm.sleep(Duration::from_secs(60)), Woken::Stop);
        assert!(start.elapsed() < Duration::from_secs(30));
    }
}
