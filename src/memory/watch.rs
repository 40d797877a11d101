//! The thread that keeps ledger, ladder and metrics in step with the kernel.
//!
//! It samples, steps the ladder, and tells what follows: the ledger closes on red, and whoever asked is woken. The
//! acts are theirs. After its start the thread allocates nothing: what is to be logged goes to a thread of its own.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use log::{error, info, warn};
use prometheus::{Gauge, IntCounter};

use super::alarm::{Alarm, Woken};
use super::heat::Heat;
use super::pressure::{Change, Ladder, Reading};
use super::{Conditions, Config, Ledger, MemoryProbe, MemorySample, Purpose, Room, Rung, headroom};
use crate::metrics::Metrics;
use crate::units::Bytes;

/// A running watch; dropping it stops the threads and waits for them.
#[derive(Debug)]
pub struct Watch {
    stop: Option<UnixStream>,
    threads: Vec<JoinHandle<()>>,
    latest: Arc<Mutex<MemorySample>>,
}

/// What the watch works on.
#[derive(Clone)]
pub struct WatchParts {
    /// Gets what may be promised, and is closed on red.
    pub ledger: Arc<Ledger>,
    /// Where numbers are published.
    pub metrics: Arc<Metrics>,
    /// Where rung and heat are told.
    pub conditions: Arc<Conditions>,
}

impl Watch {
    /// Samples once, so that ledger and metrics are right when this returns, then again and again on a thread of
    /// its own: every `sample_ms`, and sooner the less headroom there is, as a program can take some gigabytes in a
    /// second.
    ///
    /// # Errors
    /// If the first sample fails or a thread cannot be started. Later failures are logged once in a row and leave the
    /// last good figures.
    pub fn start(
        probe: Box<dyn MemoryProbe>,
        parts: WatchParts,
        config: &Config,
    ) -> io::Result<Watch> {
        let latest = Arc::new(Mutex::new(MemorySample::default()));
        let (reports, received) = mpsc::sync_channel(REPORTS);
        let mut round = Round::new(probe, parts, config, Arc::clone(&latest), reports);
        let mut left = round.run()?;
        let longest = Duration::from_millis(config.sample_ms);
        let (mut alarm, stop) = Alarm::new(Path::new("/"))?;
        let log = thread::Builder::new()
            .name("memory-log".to_owned())
            .spawn(move || write_reports(&received))?;
        let watch = thread::Builder::new().name("memory-watch".to_owned()).spawn(move || {
            let mut failing = false;
            while alarm.sleep(period(left, longest)) == Woken::Due {
                match round.run() {
                    Ok(now) => (left, failing) = (now, false),
                    Err(_) if failing => {}
                    Err(error) => {
                        failing = true;
                        round.report(Report::Blind(error.kind()));
                    }
                }
            }
        })?;
        Ok(Watch { stop: Some(stop), threads: vec![watch, log], latest })
    }

    /// The last sample.
    pub fn latest(&self) -> MemorySample {
        *self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.stop.take());
        for thread in self.threads.drain(..) {
            // A panic in the thread has already been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// Bytes a second that a greedy program takes at most.
const GREED: f64 = 6.0 * (1_u64 << 30) as f64;
const PERIOD_MIN: Duration = Duration::from_millis(100);

/// Time to the next sample: before that, what is left cannot be gone.
fn period(left: Bytes, longest: Duration) -> Duration {
    Duration::from_secs_f64(left.0 as f64 / GREED).clamp(PERIOD_MIN.min(longest), longest)
}

/// Something for the log.
#[derive(Clone, Copy, Debug)]
enum Report {
    Rung(Change),
    Hot(bool),
    /// Tasks of ours or beside us were killed for memory: how many since the last sample.
    Kills(u64),
    Blind(io::ErrorKind),
}

/// Reports that may wait for the log; more are dropped, the metrics have counted them.
const REPORTS: usize = 64;

fn write_reports(received: &Receiver<Report>) {
    for report in received {
        match report {
            Report::Rung(Change { from, to, cause, headroom }) => {
                let (from, to_name, cause) = (from.name(), to.name(), cause.name());
                match to >= Rung::Red {
                    true => {
                        warn!(target: "memory", from, cause, headroom:%; "memory pressure {to_name}")
                    }
                    false => {
                        info!(target: "memory", from, cause, headroom:%; "memory pressure {to_name}")
                    }
                }
            }
            Report::Hot(true) => {
                warn!(target: "memory", "processor hot or throttled: prompts are read in smaller pieces");
            }
            Report::Hot(false) => info!(target: "memory", "processor cool again"),
            Report::Kills(count) => error!(target: "memory", count; "the kernel killed for memory"),
            Report::Blind(kind) => {
                warn!(target: "memory", error:% = kind; "memory cannot be sampled")
            }
        }
    }
}

/// One look at memory and what follows from it.
struct Round {
    probe: Box<dyn MemoryProbe>,
    parts: WatchParts,
    /// Share of the total that is never promised.
    keep_free: f64,
    start: Instant,
    /// Samples taken.
    looks: u64,
    ladder: Ladder,
    heat: Heat,
    hot: bool,
    /// Kills at the last sample; `None` before the first.
    kills: Option<u64>,
    latest: Arc<Mutex<MemorySample>>,
    reports: SyncSender<Report>,
    /// Looked up by label beforehand: a look-up allocates.
    reserved: [Gauge; Purpose::ALL.len()],
    changes: [IntCounter; Rung::ALL.len()],
}

impl Round {
    fn new(
        probe: Box<dyn MemoryProbe>,
        parts: WatchParts,
        config: &Config,
        latest: Arc<Mutex<MemorySample>>,
        reports: SyncSender<Report>,
    ) -> Round {
        let metrics = &parts.metrics;
        let reserved = Purpose::ALL.map(|p| metrics.reserved_bytes.with_label_values(&[p.name()]));
        let changes =
            Rung::ALL.map(|rung| metrics.memory_rung_changes.with_label_values(&[rung.name()]));
        Round {
            probe,
            keep_free: config.keep_free_percent / 100.0,
            start: Instant::now(),
            looks: 0,
            ladder: Ladder::default(),
            heat: Heat::default(),
            hot: false,
            kills: None,
            latest,
            reports,
            reserved,
            changes,
            parts,
        }
    }

    /// Returns the headroom.
    fn run(&mut self) -> io::Result<Bytes> {
        // The book first: what is promised, touched or given back while the probe looks then errs on the safe
        // side, and only until the next sample.
        let known = self.latest.lock().unwrap_or_else(PoisonError::into_inner).own_file;
        let (promised, ours) = self.parts.ledger.holdings(known);
        let sample = self.probe.sample()?;
        let left = headroom(sample.available, ours);
        let keep_free = Bytes((sample.total.0 as f64 * self.keep_free) as u64);
        self.parts.ledger.set_headroom(left.saturating_add(promised).saturating_sub(keep_free));
        self.judge(&sample, left);
        self.publish(&sample, left);
        *self.latest.lock().unwrap_or_else(PoisonError::into_inner) = sample;
        Ok(left)
    }

    /// Rung, heat and kills, and whom they concern.
    fn judge(&mut self, sample: &MemorySample, left: Bytes) {
        let exempt = self.parts.conditions.exempt();
        let reading = Reading { at: self.start.elapsed(), sample, headroom: left, exempt };
        let change = self.ladder.step(&reading);
        let hot = self.heat.step(sample);
        let rung = self.ladder.rung();
        self.parts.ledger.set_closed(rung >= Rung::Red);
        self.looks += 1;
        let pressing = self.ladder.demands() >= Rung::Orange;
        let room = Room { pressing, look: self.looks, ..Room::of(sample.total, left) };
        self.parts.conditions.set_room(room);
        self.parts.conditions.set(rung, hot);
        if let Some(change) = change {
            self.changes[usize::from(change.to.number())].inc();
            self.report(Report::Rung(change));
        }
        if hot != self.hot {
            self.hot = hot;
            self.report(Report::Hot(hot));
        }
        let new = self.kills.map_or(0, |known| sample.kills.saturating_sub(known));
        if new > 0 {
            self.report(Report::Kills(new));
        }
        self.kills = Some(sample.kills);
    }

    fn report(&self, report: Report) {
        // A full channel means that the log is slower than the pressure; the metrics know.
        let _ = self.reports.try_send(report);
    }

    fn publish(&self, sample: &MemorySample, left: Bytes) {
        let (metrics, ledger) = (&self.parts.metrics, &self.parts.ledger);
        metrics.memory_available_bytes.set(sample.available.0 as f64);
        metrics.headroom_bytes.set(left.0 as f64);
        metrics.memory_rung.set(self.ladder.rung().number().into());
        metrics.oom_kills.set(i64::try_from(sample.kills).unwrap_or(i64::MAX));
        let swap = sample.swap_total.saturating_sub(sample.swap_free);
        metrics.swap_used_bytes.set(swap.0 as f64);
        metrics.zram_bytes.set(sample.zram.0 as f64);
        let ratio = |percent: Option<f32>| percent.map_or(f64::NAN, |p| f64::from(p) / 100.0);
        metrics.psi_memory_some_ratio.set(ratio(sample.pressure.map(|p| p.some.avg10)));
        metrics.psi_memory_full_ratio.set(ratio(sample.pressure.map(|p| p.full.avg10)));
        metrics.soc_temperature_celsius.set(sample.temperature_celsius.map_or(f64::NAN, f64::from));
        metrics.soc_throttled.set(sample.throttled.map_or(f64::NAN, f64::from));
        metrics.soc_clock_ratio.set(sample.clock_ratio.map_or(f64::NAN, f64::from));
        for (purpose, gauge) in Purpose::ALL.into_iter().zip(&self.reserved) {
            gauge.set(ledger.promised_for(purpose).0 as f64);
        }
        let weights = ledger.promised_for(Purpose::Weights);
        metrics.resident_weight_bytes.set(weights.min(sample.own_file).0 as f64);
        let kv = ledger.promised_for(Purpose::Kv).0 + ledger.promised_for(Purpose::Prefix).0;
        let room = kv as f64 + ledger.free().0 as f64;
        metrics.kv_cache_usage_ratio.set(if room > 0.0 { kv as f64 / room } else { 0.0 });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives the samples of a script, one per call, and says when each was asked for.
    struct ScriptedProbe {
        samples: Vec<MemorySample>,
        asked: mpsc::SyncSender<usize>,
        next: usize,
    }

    impl MemoryProbe for ScriptedProbe {
        fn sample(&mut self) -> io::Result<MemorySample> {
            let _ = self.asked.try_send(self.next);
            let sample = self.samples.get(self.next.min(self.samples.len() - 1)).copied();
            self.next += 1;
            sample.ok_or_else(|| io::Error::other("the script is empty"))
        }
    }

    fn sample(total: u64, available: u64, own_file: u64) -> MemorySample {
        MemorySample {
            total: Bytes(total),
            available: Bytes(available),
            own_file: Bytes(own_file),
            ..MemorySample::default()
        }
    }

    fn parts(ledger: &Arc<Ledger>, metrics: &Arc<Metrics>) -> (WatchParts, Arc<Conditions>) {
        let conditions = Conditions::new();
        let parts = WatchParts {
            ledger: Arc::clone(ledger),
            metrics: Arc::clone(metrics),
            conditions: Arc::clone(&conditions),
        };
        (parts, conditions)
    }

    #[test]
    fn the_less_is_left_the_sooner_it_looks_again() {
        let second = Duration::from_secs(1);
        assert_eq!(period(Bytes(12 << 30), second), second);
        assert_eq!(period(Bytes(3 << 30), second), second / 2);
        assert_eq!(period(Bytes(0), second), Duration::from_millis(100));
        assert_eq!(period(Bytes(0), Duration::from_millis(1)), Duration::from_millis(1));
    }

    #[test]
    fn on_red_nothing_is_promised_and_those_who_asked_are_woken() {
        struct Bell(SyncSender<()>);
        impl std::task::Wake for Bell {
            fn wake(self: Arc<Bell>) {
                let _ = self.0.try_send(());
            }
        }
        let (ledger, metrics) = (Ledger::new(Bytes(0)), Arc::new(Metrics::new()));
        let (asked, _asks) = mpsc::sync_channel(1);
        let samples = vec![sample(1000, 600, 0), sample(1000, 600, 0), sample(1000, 40, 0)];
        let probe = ScriptedProbe { samples, asked, next: 0 };
        let config = Config { keep_free_percent: 0.0, sample_ms: 5 };
        let (parts, conditions) = parts(&ledger, &metrics);
        let (bell, rung) = mpsc::sync_channel(1);
        conditions.wake_on_change(Arc::new(Bell(bell)).into());
        let watch = Watch::start(Box::new(probe), parts, &config).expect("the script has samples");
        let held = ledger.try_reserve(Purpose::Kv, "a", Bytes(10)).expect("green promises");
        rung.recv().expect("the rung changes");
        assert_eq!(conditions.rung(), Rung::Red);
        assert!(ledger.try_reserve(Purpose::Kv, "b", Bytes(1)).is_err());
        assert_eq!((ledger.free(), held.bytes()), (Bytes(0), Bytes(10)));
        drop(watch);
        assert_eq!(metrics.memory_rung.get(), 3);
        assert_eq!(metrics.memory_rung_changes.with_label_values(&["red"]).get(), 1);
    }

    #[test]
    fn the_ledger_follows_the_samples() {
        let ledger = Ledger::new(Bytes(0));
        let metrics = Arc::new(Metrics::new());
        let (asked, asks) = mpsc::sync_channel(1);
        let samples = vec![sample(1000, 600, 0), sample(1000, 500, 0)];
        let probe = ScriptedProbe { samples, asked, next: 0 };
        let config = Config { keep_free_percent: 10.0, sample_ms: 1 };
        let (parts, conditions) = parts(&ledger, &metrics);
        let watch = Watch::start(Box::new(probe), parts, &config).expect("the script has samples");
        assert_eq!(conditions.rung(), Rung::Green);
        asks.recv().expect("the first sample was taken");
        while asks.recv().expect("the watch goes on") < 2 {}
        // The sample before the last one asked for has been applied.
        assert_eq!(ledger.free(), Bytes(400));
        assert_eq!(watch.latest().available, Bytes(500));
        assert_eq!(metrics.headroom_bytes.get(), 500.0);
        assert!(metrics.psi_memory_some_ratio.get().is_nan());
        drop(watch);
        // Ends only if the thread, which holds the sending end, has ended.
        assert!(asks.iter().count() > 0 || asks.recv().is_err());
    }

    #[test]
    fn memory_touched_under_a_permit_is_not_counted_twice() {
        let ledger = Ledger::new(Bytes(1000));
        let weights =
            ledger.try_reserve(Purpose::Weights, "m", Bytes(300)).expect("the ledger is empty");
        let kv = ledger.try_reserve(Purpose::Kv, "a", Bytes(100)).expect("700 are free");
        kv.set_touched(Bytes(40));
        let (asked, _asks) = mpsc::sync_channel(1);
        // 1000 in all: 40 of the KV cache are taken, 200 of the weights lie in the page cache.
        let probe = ScriptedProbe { samples: vec![sample(1000, 960, 200)], asked, next: 0 };
        let config = Config { keep_free_percent: 0.0, sample_ms: 60_000 };
        let metrics = Arc::new(Metrics::new());
        let (parts, _) = parts(&ledger, &metrics);
        let _watch =
            Watch::start(Box::new(probe), parts, &config).expect("the script has a sample");
        assert_eq!(metrics.headroom_bytes.get(), 600.0);
        assert_eq!(ledger.free(), Bytes(600));
        assert_eq!(metrics.resident_weight_bytes.get(), 200.0);
        drop((weights, kv));
    }
}
