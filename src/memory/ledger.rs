//! Promises of memory: reserved before it exists, given back by dropping.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Holdings;
use crate::units::Bytes;

/// What a promise is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Purpose {
    /// Mapped weights of a model. *Touched* means locked here: unlocked pages still count as available.
    Weights,
    /// Expert slots of a streamed model, and the buffers its experts are read into.
    Experts,
    /// Keys and values of sequences that wait or run.
    Kv,
    /// Keys and values of finished sequences, kept for the next prompt; given up when others need room.
    Prefix,
    /// Buffers of the forward pass, logits, grammars.
    Scratch,
    /// Bodies, queues and send buffers of the doors.
    Doors,
}

impl Purpose {
    /// All of them, in the order of the start-up table.
    pub const ALL: [Purpose; 6] = [
        Purpose::Weights,
        Purpose::Experts,
        Purpose::Kv,
        Purpose::Prefix,
        Purpose::Scratch,
        Purpose::Doors,
    ];

    /// The word used in metrics and tables.
    pub fn name(self) -> &'static str {
        match self {
            Purpose::Weights => "weights",
            Purpose::Experts => "experts",
            Purpose::Kv => "kv",
            Purpose::Prefix => "prefix",
            Purpose::Scratch => "scratch",
            Purpose::Doors => "doors",
        }
    }
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A request for more than can be promised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{needed} needed, {free} can be promised")]
pub struct Shortfall {
    /// What was asked for.
    pub needed: Bytes,
    /// What could have been promised.
    pub free: Bytes,
}

/// Who holds how much.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// What for.
    pub purpose: Purpose,
    /// Which model, request or buffer.
    pub label: String,
    /// Bytes promised.
    pub bytes: Bytes,
    /// Bytes of them that have left the kernel's "available".
    pub touched: Bytes,
}

/// All promises of the process. The sum of permits never exceeds what could be promised when they were given.
#[derive(Debug)]
pub struct Ledger {
    book: Mutex<Book>,
}

#[derive(Debug)]
struct Book {
    /// Most that may be promised in all, permits already given included.
    budget: u64,
    promised: u64,
    /// Nothing is promised, whatever the budget.
    closed: bool,
    next: u64,
    entries: BTreeMap<u64, Entry>,
}

#[derive(Debug)]
struct Entry {
    purpose: Purpose,
    label: String,
    bytes: u64,
    touched: Arc<AtomicU64>,
}

impl Ledger {
    /// A ledger that may promise `budget` in all.
    pub fn new(budget: Bytes) -> Arc<Ledger> {
        let book = Book {
            budget: budget.0,
            promised: 0,
            closed: false,
            next: 0,
            entries: BTreeMap::new(),
        };
        Arc::new(Ledger { book: Mutex::new(book) })
    }

    /// Sets what may be promised in all: the measured headroom plus [`promised`](Ledger::promised) as it was
    /// when the measuring began, since what is promised has already been subtracted there. Permits already
    /// given stay good.
    pub fn set_headroom(&self, budget: Bytes) {
        self.book().budget = budget.0;
    }

    /// Promises nothing more while `closed`, whatever is given back: memory is so tight that what comes back must
    /// stay free. Permits already given stay good.
    pub fn set_closed(&self, closed: bool) {
        self.book().closed = closed;
    }

    /// Bytes promised now.
    pub fn promised(&self) -> Bytes {
        Bytes(self.book().promised)
    }

    /// Bytes promised now for one purpose.
    pub fn promised_for(&self, purpose: Purpose) -> Bytes {
        let book = self.book();
        let entries = book.entries.values().filter(|entry| entry.purpose == purpose);
        Bytes(entries.map(|entry| entry.bytes).sum())
    }

    /// Bytes that could be promised now.
    pub fn free(&self) -> Bytes {
        self.book().free()
    }

    /// Promises `bytes`; dropping the permit gives them back.
    ///
    /// # Errors
    /// If that is more than can be promised.
    pub fn try_reserve(
        self: &Arc<Ledger>,
        purpose: Purpose,
        label: &str,
        bytes: Bytes,
    ) -> Result<Permit, Shortfall> {
        let mut book = self.book();
        book.take(bytes.0)?;
        Ok(self.enter(&mut book, purpose, label.to_owned(), bytes.0))
    }

    /// Everything promised, by purpose, then in the order of reservation.
    pub fn table(&self) -> Vec<Holder> {
        let book = self.book();
        let mut holders: Vec<Holder> = book
            .entries
            .values()
            .map(|entry| Holder {
                purpose: entry.purpose,
                label: entry.label.clone(),
                bytes: Bytes(entry.bytes),
                touched: Bytes(entry.touched.load(Ordering::Relaxed).min(entry.bytes)),
            })
            .collect();
        holders.sort_by_key(|holder| holder.purpose);
        holders
    }

    /// What is promised and what of it the kernel's "available" still contains, in one look.
    /// `resident_file` is how much of our file mappings lies in memory: it divides unlocked weights into
    /// those in the page cache and those still to come, which changes neither their sum nor the headroom.
    pub fn holdings(&self, resident_file: Bytes) -> (Bytes, Holdings) {
        let book = self.book();
        let (mut unlocked, mut locked, mut untouched) = (0_u64, 0_u64, 0_u64);
        for entry in book.entries.values() {
            let touched = entry.touched.load(Ordering::Relaxed).min(entry.bytes);
            if entry.purpose == Purpose::Weights {
                unlocked = unlocked.saturating_add(entry.bytes - touched);
                locked = locked.saturating_add(touched);
            } else {
                untouched = untouched.saturating_add(entry.bytes - touched);
            }
        }
        let soft = unlocked.min(resident_file.0.saturating_sub(locked));
        let untouched = untouched.saturating_add(unlocked - soft);
        (Bytes(book.promised), Holdings { soft: Bytes(soft), untouched: Bytes(untouched) })
    }

    fn enter(
        self: &Arc<Ledger>,
        book: &mut Book,
        purpose: Purpose,
        label: String,
        bytes: u64,
    ) -> Permit {
        let id = book.next;
        book.next += 1;
        let touched = Arc::new(AtomicU64::new(0));
        book.entries.insert(id, Entry { purpose, label, bytes, touched: Arc::clone(&touched) });
        Permit { ledger: Arc::clone(self), id, bytes, touched }
    }

    /// The book stays right even if a holder of the lock panicked: each change is complete before the next
    /// thing that could fail.
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Book {
    fn free(&self) -> Bytes {
        match self.closed {
            true => Bytes(0),
            false => Bytes(self.budget.saturating_sub(self.promised)),
        }
    }

    fn take(&mut self, bytes: u64) -> Result<(), Shortfall> {
        let free = self.free();
        if bytes > free.0 {
            return Err(Shortfall { needed: Bytes(bytes), free });
        }
        self.promised += bytes;
        Ok(())
    }

    fn give_back(&mut self, bytes: u64) {
        assert!(self.promised >= bytes, "no more is given back than was promised");
        self.promised -= bytes;
    }

    fn entry(&mut self, id: u64) -> &mut Entry {
        self.entries.get_mut(&id).expect("a permit's entry lives as long as the permit")
    }
}

/// Bytes promised to its holder; dropping it gives them back.
#[derive(Debug)]
pub struct Permit {
    ledger: Arc<Ledger>,
    id: u64,
    bytes: u64,
    touched: Arc<AtomicU64>,
}

impl Permit {
    /// Bytes promised.
    pub fn bytes(&self) -> Bytes {
        Bytes(self.bytes)
    }

    /// Says how many of the bytes have left the kernel's "available": touched anonymous memory, locked weights.
    pub fn set_touched(&self, bytes: Bytes) {
        self.touched.store(bytes.0, Ordering::Relaxed);
    }

    /// Changes what the promise is for.
    pub fn set_purpose(&mut self, purpose: Purpose) {
        self.ledger.book().entry(self.id).purpose = purpose;
    }

    /// Asks for `bytes` more.
    ///
    /// # Errors
    /// If that is more than can be promised; the permit is unchanged.
    pub fn grow(&mut self, bytes: Bytes) -> Result<(), Shortfall> {
        let mut book = self.ledger.book();
        book.take(bytes.0)?;
        self.bytes += bytes.0;
        book.entry(self.id).bytes = self.bytes;
        Ok(())
    }

    /// Gives back all but `bytes`; holding less already changes nothing.
    pub fn shrink_to(&mut self, bytes: Bytes) {
        if bytes.0 >= self.bytes {
            return;
        }
        let mut book = self.ledger.book();
        book.give_back(self.bytes - bytes.0);
        self.bytes = bytes.0;
        book.entry(self.id).bytes = self.bytes;
    }

    /// Moves `bytes` of this promise (at most all of it) into one of its own.
    pub fn split(&mut self, bytes: Bytes) -> Permit {
        let ledger = Arc::clone(&self.ledger);
        let mut book = ledger.book();
        let bytes = bytes.0.min(self.bytes);
        self.bytes -= bytes;
        let entry = book.entry(self.id);
        entry.bytes = self.bytes;
        let (purpose, label) = (entry.purpose, entry.label.clone());
        ledger.enter(&mut book, purpose, label, bytes)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut book = self.ledger.book();
        book.give_back(self.bytes);
        book.entries.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_permit_gives_back_what_it_holds() {
        let ledger = Ledger::new(Bytes(100));
        let mut permit =
            ledger.try_reserve(Purpose::Kv, "a", Bytes(60)).expect("60 of 100 are free");
        let refused = ledger.try_reserve(Purpose::Kv, "b", Bytes(41)).expect_err("40 are free");
        assert_eq!(refused, Shortfall { needed: Bytes(41), free: Bytes(40) });
        permit.shrink_to(Bytes(50));
        permit.grow(Bytes(50)).expect("50 are free");
        assert_eq!(ledger.free(), Bytes(0));
        let part = permit.split(Bytes(30));
        assert_eq!((permit.bytes(), part.bytes()), (Bytes(70), Bytes(30)));
        drop(permit);
        assert_eq!(ledger.promised(), Bytes(30));
        drop(part);
        assert_eq!((ledger.promised(), ledger.table()), (Bytes(0), Vec::new()));
    }

    #[test]
    fn a_smaller_budget_leaves_permits_alone() {
        let ledger = Ledger::new(Bytes(100));
        let permit = ledger.try_reserve(Purpose::Kv, "a", Bytes(80)).expect("80 of 100 are free");
        ledger.set_headroom(Bytes(50));
        assert_eq!((ledger.free(), permit.bytes()), (Bytes(0), Bytes(80)));
        assert!(ledger.try_reserve(Purpose::Kv, "b", Bytes(1)).is_err());
        drop(permit);
        assert_eq!(ledger.free(), Bytes(50));
    }

    #[test]
    fn holdings_count_each_byte_once() {
        let ledger = Ledger::new(Bytes(10_000));
        let weights =
            ledger.try_reserve(Purpose::Weights, "m", Bytes(4000)).expect("the ledger is empty");
        let kv = ledger.try_reserve(Purpose::Kv, "a", Bytes(1000)).expect("6000 are free");
        kv.set_touched(Bytes(300));
        let holdings = |resident| ledger.holdings(Bytes(resident)).1;
        // Nothing cached: the weights are all to come.
        assert_eq!(holdings(0), Holdings { soft: Bytes(0), untouched: Bytes(4700) });
        assert_eq!(holdings(1500), Holdings { soft: Bytes(1500), untouched: Bytes(3200) });
        // Half locked: those bytes have left "available" and are in neither term.
        weights.set_touched(Bytes(2000));
        assert_eq!(holdings(4100), Holdings { soft: Bytes(2000), untouched: Bytes(700) });
        assert_eq!(ledger.holdings(Bytes(0)).0, Bytes(5000));
    }

    #[derive(Clone, Debug)]
    enum Op {
        Reserve(u64),
        Drop(usize),
        Grow(usize, u64),
        Shrink(usize, u64),
        Split(usize, u64),
        Budget(u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            (0..400_u64).prop_map(Op::Reserve),
            any::<usize>().prop_map(Op::Drop),
            (any::<usize>(), 0..200_u64).prop_map(|(i, n)| Op::Grow(i, n)),
            (any::<usize>(), 0..400_u64).prop_map(|(i, n)| Op::Shrink(i, n)),
            (any::<usize>(), 0..400_u64).prop_map(|(i, n)| Op::Split(i, n)),
            (0..2000_u64).prop_map(Op::Budget),
        ]
    }

    proptest! {
        #[test]
        fn permits_never_exceed_the_budget_when_promised(
            ops in proptest::collection::vec(op(), 0..200),
        ) {
            let mut budget = 1000;
            let ledger = Ledger::new(Bytes(budget));
            let mut permits: Vec<Permit> = Vec::new();
            for op in ops {
                let before = ledger.promised().0;
                let len = permits.len().max(1);
                match op {
                    Op::Reserve(bytes) => {
                        let got = ledger.try_reserve(Purpose::Kv, "x", Bytes(bytes));
                        prop_assert_eq!(got.is_ok(), bytes <= budget.saturating_sub(before));
                        permits.extend(got);
                    }
                    Op::Drop(i) => {
                        if !permits.is_empty() {
                            permits.swap_remove(i % len);
                        }
                    }
                    Op::Grow(i, bytes) => {
                        if let Some(permit) = permits.get_mut(i % len) {
                            let fits = bytes <= budget.saturating_sub(before);
                            prop_assert_eq!(permit.grow(Bytes(bytes)).is_ok(), fits);
                        }
                    }
                    Op::Shrink(i, bytes) => {
                        if let Some(permit) = permits.get_mut(i % len) {
                            permit.shrink_to(Bytes(bytes));
                        }
                    }
                    Op::Split(i, bytes) => {
                        if let Some(permit) = permits.get_mut(i % len) {
                            let part = permit.split(Bytes(bytes));
                            permits.push(part);
                        }
                    }
                    Op::Budget(bytes) => {
                        budget = bytes;
                        ledger.set_headroom(Bytes(bytes));
                    }
                }
                let promised = ledger.promised().0;
                prop_assert!(promised <= before.max(budget));
                prop_assert_eq!(promised, permits.iter().map(|p| p.bytes().0).sum::<u64>());
                prop_assert_eq!(ledger.table().len(), permits.len());
            }
            drop(permits);
            prop_assert_eq!(ledger.promised(), Bytes(0));
            prop_assert!(ledger.table().is_empty());
        }
    }
}
