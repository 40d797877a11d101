//! Expert slots: buffers in which routed experts are kept, as many as memory allows.
//!
//! A slot belongs to a layer, because a pass goes through all layers before it comes back to one: in a common pool
//! each layer would push out what the others are about to need. Buffers change hands by value. While an expert is
//! computed with, the pass owns it; otherwise the table does, and whoever shrinks the table frees it at once.

mod stream;
mod table;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::warn;

use super::pager::Pages;
use super::policy::Policy;
use super::readers::Readers;
use super::source::{ReadError, Source, Span};
use crate::gguf::Mapping;
use crate::memory::{Ledger, Purpose, Shortfall};
use crate::units::Bytes;

pub use stream::{Ahead, ExpertStream, Step};
use table::Table;

#[cfg(test)]
mod tests;

/// Matrices of an expert: gate, up and down.
pub const PARTS: usize = 3;

/// Where the routed experts of a layer lie in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerFile {
    /// How many there are.
    pub experts: usize,
    /// The matrices gate, up and down, each for all experts one behind the other.
    pub parts: [PartFile; PARTS],
}

/// One of the matrices, for all experts of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartFile {
    /// Where the first expert's begins in the file.
    pub offset: u64,
    /// Bytes of one expert's.
    pub bytes: usize,
}

impl LayerFile {
    fn span(&self, expert: usize, part: usize) -> Span {
        let PartFile { offset, bytes } = self.parts[part];
        Span::new(offset + expert as u64 * bytes as u64, bytes)
    }

    /// Bytes of a buffer that takes this part of any expert, wherever its bytes lie in a block.
    fn part_bytes(&self, part: usize) -> usize {
        let bytes = (0..self.experts).map(|expert| self.span(expert, part).buffer_bytes());
        Pages::rounded(bytes.max().unwrap_or(0))
    }

    /// Bytes that a slot of this layer takes.
    pub fn slot_bytes(&self) -> u64 {
        (0..PARTS).map(|part| self.part_bytes(part) as u64).sum()
    }
}

/// How experts are kept and read.
#[derive(Clone, Debug, PartialEq)]
pub struct SlotsOptions {
    /// Bytes for slots; what is not enough for a whole slot is left.
    pub slots_bytes: Bytes,
    /// Experts that can be on their way at once without a slot: at least one.
    pub staging: usize,
    /// Threads that read.
    pub threads: usize,
    /// Read past the page cache where the file system can.
    pub direct: bool,
    /// Which expert goes when another needs its slot.
    pub policy: Policy,
    /// Keep slots from being swapped.
    pub lock: bool,
    /// Read the next layer's likely expert while the disk is idle.
    pub ahead: Ahead,
}

impl Default for SlotsOptions {
    fn default() -> SlotsOptions {
        SlotsOptions {
            slots_bytes: Bytes(0),
            staging: 2,
            threads: 2,
            direct: true,
            policy: Policy::default(),
            lock: true,
            ahead: Ahead::default(),
        }
    }
}

/// Why experts cannot be kept in slots.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SlotsError {
    /// No descriptor or no thread, or a model without a file.
    #[error("experts cannot be read from the file: {0}")]
    Io(#[from] io::Error),
    /// The ledger has not as much to promise.
    #[error("no headroom for expert slots: {0}")]
    Shortfall(#[from] Shortfall),
}

/// What the slots have done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotStats {
    /// Slots that may exist.
    pub slots: u64,
    /// Bytes of slots and staging that exist.
    pub held_bytes: u64,
    /// Times that a step needed an expert of a layer.
    pub uses: u64,
    /// Times that it was in a slot.
    pub hits: u64,
    /// Times that it had been read ahead, at least in part.
    pub ahead_hits: u64,
    /// Experts of which reading ahead began.
    pub ahead_reads: u64,
    /// Guesses at the next layer's expert.
    pub guesses: u64,
    /// Guesses that were right.
    pub right_guesses: u64,
    /// Bytes read from the file.
    pub bytes_read: u64,
    /// Nanoseconds that a step waited for reads.
    pub wait_ns: u64,
    /// Nanoseconds during which something was being read.
    pub busy_ns: u64,
    /// Whether reads go past the page cache.
    pub direct: bool,
}

impl SlotStats {
    /// What has happened since `earlier`; the state is that of now.
    pub fn since(&self, earlier: &SlotStats) -> SlotStats {
        SlotStats {
            uses: self.uses - earlier.uses,
            hits: self.hits - earlier.hits,
            ahead_hits: self.ahead_hits - earlier.ahead_hits,
            ahead_reads: self.ahead_reads - earlier.ahead_reads,
            guesses: self.guesses - earlier.guesses,
            right_guesses: self.right_guesses - earlier.right_guesses,
            bytes_read: self.bytes_read - earlier.bytes_read,
            wait_ns: self.wait_ns - earlier.wait_ns,
            busy_ns: self.busy_ns - earlier.busy_ns,
            ..*self
        }
    }

    /// Share of the uses that found their expert in a slot.
    pub fn hit_ratio(&self) -> f64 {
        ratio(self.hits, self.uses)
    }

    /// Share of the guesses at the next layer's expert that were right.
    pub fn guess_ratio(&self) -> f64 {
        ratio(self.right_guesses, self.guesses)
    }
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

#[derive(Debug, Default)]
struct Counters {
    uses: AtomicU64,
    hits: AtomicU64,
    ahead_hits: AtomicU64,
    ahead_reads: AtomicU64,
    guesses: AtomicU64,
    right_guesses: AtomicU64,
    wait_ns: AtomicU64,
}

/// The experts of a model: those in slots, and the way to all others. Shared between the pass that needs them and
/// whoever decides how much memory they may take.
#[derive(Debug)]
pub struct ExpertSlots {
    layers: Vec<LayerFile>,
    readers: Readers,
    table: Mutex<Table>,
    counters: Counters,
    lock: bool,
    lock_refused: AtomicBool,
}

impl ExpertSlots {
    /// Prepares `layers` of the file behind `mapping`. Slots fill as experts are used. With a ledger their bytes
    /// are promised here, under `label`.
    ///
    /// # Errors
    /// If the ledger has too little, or the file cannot be read from.
    pub fn open(
        mapping: &Mapping,
        layers: Vec<LayerFile>,
        options: &SlotsOptions,
        ledger: Option<(&Arc<Ledger>, &str)>,
    ) -> Result<Arc<ExpertSlots>, SlotsError> {
        let table = Table::new(&layers, options);
        let permit = match ledger {
            None => None,
            Some((ledger, label)) => {
                let bytes = Bytes(table.target_bytes());
                Some(ledger.try_reserve(Purpose::Experts, label, bytes)?)
            }
        };
        let source = Source::open(mapping, options.direct)?;
        let slots = ExpertSlots {
            readers: Readers::start(source, options.threads)?,
            table: Mutex::new(table.with_permit(permit)),
            counters: Counters::default(),
            lock: options.lock,
            lock_refused: AtomicBool::new(false),
            layers,
        };
        Ok(Arc::new(slots))
    }

    /// Makes slots for at most `bytes` out of it, from now on. Growing asks the ledger first and fills as experts
    /// are used; shrinking gives memory back before this returns, except what a running step is computing with:
    /// that follows when it is done. Returns what the slots may take now.
    ///
    /// # Errors
    /// If the ledger has not so much to promise; then nothing has changed.
    pub fn set_slots(&self, bytes: Bytes) -> Result<Bytes, Shortfall> {
        let (freed, now) = {
            let mut table = self.table();
            (table.set_slots(&self.layers, bytes)?, table.slots_bytes(&self.layers))
        };
        // Unmapping takes milliseconds; a step that needs the table does not wait for it.
        drop(freed);
        Ok(now)
    }

    /// Bytes of an expert in the file; the mean, where layers differ.
    pub fn expert_bytes(&self) -> Bytes {
        let bytes =
            |layer: &LayerFile| layer.parts.iter().map(|part| part.bytes as u64).sum::<u64>();
        Bytes(self.layers.iter().map(bytes).sum::<u64>() / self.layers.len().max(1) as u64)
    }

    /// Bytes that the slots of all experts would take.
    pub fn bytes_of_all(&self) -> Bytes {
        let all = self.layers.iter().map(|layer| layer.slot_bytes() * layer.experts as u64);
        Bytes(all.sum())
    }

    /// Bytes that the slots may take now, staging apart.
    pub fn slots_bytes(&self) -> Bytes {
        self.table().slots_bytes(&self.layers)
    }

    /// What has been done so far.
    pub fn stats(&self) -> SlotStats {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.counters;
        let table = self.table();
        SlotStats {
            slots: table.slots(),
            held_bytes: table.held_bytes(),
            uses: load(&counters.uses),
            hits: load(&counters.hits),
            ahead_hits: load(&counters.ahead_hits),
            ahead_reads: load(&counters.ahead_reads),
            guesses: load(&counters.guesses),
            right_guesses: load(&counters.right_guesses),
            bytes_read: self.readers.bytes(),
            wait_ns: load(&counters.wait_ns),
            busy_ns: self.readers.busy_ns(),
            direct: self.readers.is_direct(),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// New memory, locked where that is wanted and allowed.
    fn pages(&self, bytes: usize) -> Result<Pages, ReadError> {
        let mut pages = Pages::new(bytes).map_err(ReadError::Memory)?;
        if self.lock
            && let Err(error) = pages.lock()
            && !self.lock_refused.swap(true, Ordering::Relaxed)
        {
            warn!(target: "residency", error:%; "expert slots cannot be locked and may be swapped; raise LimitMEMLOCK");
        }
        Ok(pages)
    }
}
