//! The thread that keeps the ledger and the metrics in step with the kernel.

use std::io;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use log::warn;

use super::{Config, Ledger, MemoryProbe, MemorySample, Purpose, headroom};
use crate::metrics::Metrics;
use crate::units::Bytes;

/// A running watch; dropping it stops the thread and waits for it.
#[derive(Debug)]
pub struct Watch {
    stop: Option<mpsc::SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
    latest: Arc<Mutex<MemorySample>>,
}

impl Watch {
    /// Samples once, so that the ledger and the metrics are right when this returns, then again every
    /// `sample_ms` on a thread of its own.
    ///
    /// # Errors
    /// If the first sample fails or the thread cannot be started. Later failures are logged once in a row and
    /// leave the last good figures.
    pub fn start(
        probe: Box<dyn MemoryProbe>,
        ledger: Arc<Ledger>,
        metrics: Arc<Metrics>,
        config: &Config,
    ) -> io::Result<Watch> {
        let latest = Arc::new(Mutex::new(MemorySample::default()));
        let mut round = Round {
            probe,
            ledger,
            metrics,
            keep_free: config.keep_free_percent / 100.0,
            latest: Arc::clone(&latest),
        };
        round.run()?;
        let period = Duration::from_millis(config.sample_ms);
        let (stop, stopped) = mpsc::sync_channel(1);
        let thread = thread::Builder::new().name("memory-watch".to_owned()).spawn(move || {
            let mut failing = false;
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(period) {
                let result = round.run();
                if let (Err(error), false) = (&result, failing) {
                    warn!(target: "memory", error:%; "memory cannot be sampled");
                }
                failing = result.is_err();
            }
        })?;
        Ok(Watch { stop: Some(stop), thread: Some(thread), latest })
    }

    /// The last sample.
    pub fn latest(&self) -> MemorySample {
        *self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic in the thread has already been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// One look at memory and what follows from it.
struct Round {
    probe: Box<dyn MemoryProbe>,
    ledger: Arc<Ledger>,
    metrics: Arc<Metrics>,
    /// Share of the total that is never promised.
    keep_free: f64,
    latest: Arc<Mutex<MemorySample>>,
}

impl Round {
    fn run(&mut self) -> io::Result<()> {
        // The book first: what is promised, touched or given back while the probe looks then errs on the safe
        // side, and only until the next sample.
        let known = self.latest.lock().unwrap_or_else(PoisonError::into_inner).own_file;
        let (promised, ours) = self.ledger.holdings(known);
        let sample = self.probe.sample()?;
        let left = headroom(sample.available, ours);
        let keep_free = Bytes((sample.total.0 as f64 * self.keep_free) as u64);
        self.ledger.set_headroom(left.saturating_add(promised).saturating_sub(keep_free));
        self.publish(&sample, left);
        *self.latest.lock().unwrap_or_else(PoisonError::into_inner) = sample;
        Ok(())
    }

    fn publish(&self, sample: &MemorySample, left: Bytes) {
        let metrics = &self.metrics;
        metrics.memory_available_bytes.set(sample.available.0 as f64);
        metrics.headroom_bytes.set(left.0 as f64);
        let ratio = |percent: Option<f32>| percent.map_or(f64::NAN, |p| f64::from(p) / 100.0);
        metrics.psi_memory_some_ratio.set(ratio(sample.pressure.map(|p| p.some.avg10)));
        metrics.psi_memory_full_ratio.set(ratio(sample.pressure.map(|p| p.full.avg10)));
        metrics.soc_temperature_celsius.set(sample.temperature_celsius.map_or(f64::NAN, f64::from));
        for purpose in Purpose::ALL {
            let promised = self.ledger.promised_for(purpose);
            metrics.reserved_bytes.with_label_values(&[purpose.name()]).set(promised.0 as f64);
        }
        let weights = self.ledger.promised_for(Purpose::Weights);
        metrics.resident_weight_bytes.set(weights.min(sample.own_file).0 as f64);
        let kv =
            self.ledger.promised_for(Purpose::Kv).0 + self.ledger.promised_for(Purpose::Prefix).0;
        let room = kv as f64 + self.ledger.free().0 as f64;
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

    #[test]
    fn the_ledger_follows_the_samples() {
        let ledger = Ledger::new(Bytes(0));
        let metrics = Arc::new(Metrics::new());
        let (asked, asks) = mpsc::sync_channel(1);
        let samples = vec![sample(1000, 600, 0), sample(1000, 500, 0)];
        let probe = ScriptedProbe { samples, asked, next: 0 };
        let config = Config { keep_free_percent: 10.0, sample_ms: 1 };
        let watch = Watch::start(Box::new(probe), ledger.clone(), metrics.clone(), &config)
            .expect("the script has samples");
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
        let _watch = Watch::start(Box::new(probe), ledger.clone(), metrics.clone(), &config)
            .expect("the script has a sample");
        assert_eq!(metrics.headroom_bytes.get(), 600.0);
        assert_eq!(ledger.free(), Bytes(600));
        assert_eq!(metrics.resident_weight_bytes.get(), 200.0);
        drop((weights, kv));
    }
}
