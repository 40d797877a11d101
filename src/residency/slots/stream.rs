//! The experts of one layer after the other, as a pass needs them: those in slots first, the others as they arrive.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use serde::Deserialize;

use super::table::{Expert, Staging, Table};
use super::{ExpertSlots, PARTS, Pages, ReadError};
use crate::residency::readers::{ReadId, Urgency};

/// Whether the next layer's likely expert is read while the disk is idle.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ahead {
    /// As long as enough of it is needed.
    #[default]
    Auto,
    /// Always, whether it pays or not: for measuring.
    Always,
    /// Never; the guesses are still counted.
    Never,
}

/// What kind of step runs through a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Each sequence writes a token: what it uses is worth keeping.
    Decode,
    /// A piece of a prompt: it uses many experts once, and nothing kept is given up for them.
    Prompt,
    /// A piece so long that it needs nearly all experts of every layer: what the next layer lacks is read in the
    /// pauses.
    Sweep,
}

/// One pass's way through the experts. Made by [`ExpertSlots::stream`]; a model has one.
#[derive(Debug)]
pub struct ExpertStream {
    slots: Arc<ExpertSlots>,
    layer: usize,
    wanted: Vec<usize>,
    step: Step,
    /// In memory.
    ready: VecDeque<(usize, Expert)>,
    /// On their way.
    coming: VecDeque<Coming>,
    /// Without a buffer yet.
    waiting: VecDeque<usize>,
    current: Option<Current>,
    /// Read on a guess, for a later layer.
    ahead: Vec<Coming>,
    guesses: Guesses,
}

/// Where an expert's buffers go when they have been used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Home {
    Slot,
    Staging,
    /// Staging, and was read on a guess that came true: it should become a slot.
    Guessed,
}

#[derive(Debug)]
struct Coming {
    layer: usize,
    expert: usize,
    reads: [ReadId; PARTS],
    home: Home,
}

/// The expert being computed with.
#[derive(Debug)]
struct Current {
    expert: usize,
    home: Home,
    pages: [Option<Pages>; PARTS],
    reads: [Option<ReadId>; PARTS],
}

/// The guesses at the experts of one layer, and how good guesses have been.
#[derive(Debug)]
struct Guesses {
    mode: Ahead,
    layer: Option<usize>,
    experts: Vec<usize>,
    /// Moving share of guesses that saved a read, among those that asked for one.
    useful: f64,
    on: bool,
}

impl Guesses {
    fn note(&mut self, saved: bool) {
        let sample = if saved { 1.0 } else { 0.0 };
        self.useful += (sample - self.useful) / USEFUL_WINDOW;
        // A wrong guess costs little, as it waits for an idle disk: the bar is low, with some distance between.
        self.on = self.useful >= if self.on { USEFUL_OFF } else { USEFUL_ON };
    }

    fn reads(&self) -> bool {
        match self.mode {
            Ahead::Auto => self.on,
            Ahead::Always => true,
            Ahead::Never => false,
        }
    }
}

/// Guesses over which their use is averaged.
const USEFUL_WINDOW: f64 = 128.0;
/// Reading ahead ends below this share of useful reads, and begins again above the other.
const USEFUL_OFF: f64 = 0.20;
const USEFUL_ON: f64 = 0.30;

impl ExpertSlots {
    /// The way through the experts for a pass.
    pub fn stream(self: &Arc<ExpertSlots>, ahead: Ahead) -> ExpertStream {
        ExpertStream {
            slots: Arc::clone(self),
            layer: 0,
            wanted: Vec::new(),
            step: Step::Decode,
            ready: VecDeque::new(),
            coming: VecDeque::new(),
            waiting: VecDeque::new(),
            current: None,
            ahead: Vec::new(),
            guesses: Guesses {
                mode: ahead,
                layer: None,
                experts: Vec::new(),
                useful: 0.5,
                on: true,
            },
        }
    }
}

impl ExpertStream {
    /// The slots it draws from.
    pub fn slots(&self) -> &Arc<ExpertSlots> {
        &self.slots
    }

    /// The experts of `layer` that a step needs, each once. What is missing begins to be read.
    ///
    /// # Errors
    /// If there is no memory for what is missing.
    pub fn start(
        &mut self,
        layer: usize,
        wanted: impl IntoIterator<Item = usize>,
        step: Step,
    ) -> Result<(), ReadError> {
        self.abandon();
        self.layer = layer;
        self.step = step;
        self.wanted.clear();
        self.wanted.extend(wanted);
        let slots = Arc::clone(&self.slots);
        let mut missing = Vec::new();
        {
            let mut table = slots.table();
            if step == Step::Decode {
                table.layer(layer).history.turn(self.wanted.iter().copied());
            }
            for &expert in &self.wanted {
                match table.take(layer, expert) {
                    Some(pages) => self.ready.push_back((expert, pages)),
                    None => {
                        table.count_miss(layer);
                        missing.push(expert);
                    }
                }
            }
        }
        let counters = &slots.counters;
        counters.uses.fetch_add(self.wanted.len() as u64, Ordering::Relaxed);
        counters.hits.fetch_add(self.ready.len() as u64, Ordering::Relaxed);
        self.check_guesses(&missing);
        self.use_ahead(&mut missing);
        self.waiting.extend(missing);
        self.feed()
    }

    /// The layer's next expert, whichever can be computed first: its gate and up matrices are there. The one
    /// before is given back. `None` when all have been.
    ///
    /// # Errors
    /// If it could not be read; the layer is then abandoned.
    pub fn next_expert(&mut self) -> Result<Option<usize>, ReadError> {
        self.give_back();
        self.feed()?;
        if let Some((expert, pages)) = self.ready.pop_front() {
            let pages = pages.map(Some);
            self.current = Some(Current { expert, home: Home::Slot, pages, reads: [None; PARTS] });
            return Ok(Some(expert));
        }
        if self.coming.is_empty() && !self.waiting.is_empty() {
            // All staging is lent to guesses: what is needed goes before.
            self.drop_ahead(|_| true);
            self.feed()?;
        }
        let Some(coming) = self.coming.pop_front() else { return Ok(None) };
        let Coming { expert, reads, home, .. } = coming;
        let pages = [const { None }; PARTS];
        self.current = Some(Current { expert, home, pages, reads: reads.map(Some) });
        self.collect(0)?;
        self.collect(1)?;
        Ok(Some(expert))
    }

    /// The bytes of a matrix of the expert that [`next_expert`](ExpertStream::next_expert) gave: 0 is gate, 1 is
    /// up, 2 is down. The last one is waited for if need be.
    ///
    /// # Errors
    /// If it could not be read; the layer is then abandoned.
    ///
    /// # Panics
    /// If there is no such expert or part.
    pub fn part(&mut self, part: usize) -> Result<&[u8], ReadError> {
        self.collect(part)?;
        Ok(self.arrived(part))
    }

    /// As [`part`](ExpertStream::part), for what is there for certain: gate and up.
    ///
    /// # Panics
    /// If there is no such expert or part, or it has not been waited for.
    pub fn arrived(&self, part: usize) -> &[u8] {
        let current = self.current.as_ref().expect("an expert was asked for");
        let pages = current.pages[part].as_ref().expect("it was waited for");
        let span = self.slots.layers[self.layer].span(current.expert, part);
        &pages.bytes()[span.wanted()]
    }

    /// Says which experts of `layer`, a later one, will probably be needed.
    pub fn expect(&mut self, layer: usize, experts: impl IntoIterator<Item = usize>) {
        self.guesses.layer = Some(layer);
        self.guesses.experts.clear();
        for expert in experts {
            if !self.guesses.experts.contains(&expert) {
                self.guesses.experts.push(expert);
            }
        }
        if !self.guesses.reads() {
            return;
        }
        for index in 0..self.guesses.experts.len() {
            let expert = self.guesses.experts[index];
            if !self.slots.table().keeps(layer, expert) && !self.read_ahead(layer, expert) {
                return;
            }
        }
    }

    /// Compares the guesses at this layer with what it needs.
    fn check_guesses(&mut self, missing: &[usize]) {
        if self.guesses.layer.take() != Some(self.layer) || self.step != Step::Decode {
            return;
        }
        let counters = &self.slots.counters;
        for index in 0..self.guesses.experts.len() {
            let expert = self.guesses.experts[index];
            let right = self.wanted.contains(&expert);
            counters.guesses.fetch_add(1, Ordering::Relaxed);
            counters.right_guesses.fetch_add(u64::from(right), Ordering::Relaxed);
            // What was kept anyway tells nothing about the use of reading.
            if !right {
                let kept = self.slots.table().keeps(self.layer, expert);
                if !kept {
                    self.guesses.note(false);
                }
            } else if missing.contains(&expert) {
                self.guesses.note(true);
            }
        }
    }

    /// Takes over what was read ahead and is needed now; the rest of this layer's and of those before is dropped.
    fn use_ahead(&mut self, missing: &mut Vec<usize>) {
        let mut at = 0;
        while at < self.ahead.len() {
            let Coming { layer, expert, reads, .. } = self.ahead[at];
            if layer != self.layer || !missing.contains(&expert) {
                at += 1;
                continue;
            }
            for read in reads {
                self.slots.readers.hurry(read);
            }
            missing.retain(|&other| other != expert);
            self.slots.counters.ahead_hits.fetch_add(1, Ordering::Relaxed);
            let home = if self.step == Step::Decode { Home::Guessed } else { Home::Staging };
            let coming = self.ahead.remove(at);
            self.coming.push_back(Coming { home, ..coming });
        }
        let layer = self.layer;
        self.drop_ahead(|ahead| ahead.layer == layer);
    }

    /// Begins to read what waits for a buffer, as far as there are buffers, and what comes after.
    fn feed(&mut self) -> Result<(), ReadError> {
        while let Some(&expert) = self.waiting.front() {
            let Some((pages, home)) = self.buffers()? else { return Ok(()) };
            self.waiting.pop_front();
            let reads = self.submit(self.layer, expert, pages, Urgency::Now);
            self.coming.push_back(Coming { layer: self.layer, expert, reads, home });
        }
        if self.step == Step::Sweep {
            self.feed_next_layer();
        }
        Ok(())
    }

    /// In a sweep the next layer will need all its experts.
    fn feed_next_layer(&mut self) {
        let next = self.layer + 1;
        let Some(layer) = self.slots.layers.get(next) else { return };
        for expert in 0..layer.experts {
            let known = self.ahead.iter().any(|a| a.layer == next && a.expert == expert);
            if known || self.slots.table().keeps(next, expert) {
                continue;
            }
            if !self.read_ahead(next, expert) {
                return;
            }
        }
    }

    /// Begins to read an expert of a later layer into staging; false if there is none.
    fn read_ahead(&mut self, layer: usize, expert: usize) -> bool {
        if self.ahead.iter().any(|ahead| ahead.layer == layer && ahead.expert == expert) {
            return true;
        }
        self.collect_spare();
        let Some(staging) = self.slots.table().borrow_staging() else { return false };
        let Ok(pages) = self.complete(staging) else { return false };
        let reads = self.submit(layer, expert, pages, Urgency::Ahead);
        self.slots.counters.ahead_reads.fetch_add(1, Ordering::Relaxed);
        self.ahead.push(Coming { layer, expert, reads, home: Home::Staging });
        true
    }

    fn submit(
        &self,
        layer: usize,
        expert: usize,
        pages: Expert,
        urgency: Urgency,
    ) -> [ReadId; PARTS] {
        let mut part = 0;
        pages.map(|pages| {
            let span = self.slots.layers[layer].span(expert, part);
            part += 1;
            self.slots.readers.submit(span, pages, urgency)
        })
    }

    /// Buffers for an expert of this layer: a new slot, that of a victim, or staging. None if all staging is lent.
    fn buffers(&self) -> Result<Option<(Expert, Home)>, ReadError> {
        self.collect_spare();
        let slots = &self.slots;
        let mut table = slots.table();
        if table.may_grow(self.layer) {
            table.add_slot(self.layer);
            drop(table);
            return match self.new_expert(|part| slots.layers[self.layer].part_bytes(part)) {
                Ok(pages) => Ok(Some((pages, Home::Slot))),
                Err(error) => {
                    slots.table().forget_slot(self.layer);
                    Err(error)
                }
            };
        }
        if self.step == Step::Decode
            && let Some(victim) = table.evict(self.layer, &self.wanted)
        {
            return Ok(Some((victim, Home::Slot)));
        }
        let staging = table.borrow_staging();
        drop(table);
        match staging {
            None => Ok(None),
            Some(staging) => Ok(Some((self.complete(staging)?, Home::Staging))),
        }
    }

    /// Staging with the buffers that were missing.
    fn complete(&self, staging: Staging) -> Result<Expert, ReadError> {
        let Staging { pages: [gate, up, down], bytes } = staging;
        let make = |pages: Option<Pages>| match pages {
            Some(pages) => Ok(pages),
            None => self.slots.pages(bytes),
        };
        match (make(gate), make(up), make(down)) {
            (Ok(gate), Ok(up), Ok(down)) => Ok([gate, up, down]),
            (Err(error), ..) | (_, Err(error), _) | (.., Err(error)) => {
                self.slots.table().return_staging(None);
                Err(error)
            }
        }
    }

    fn new_expert(&self, bytes: impl Fn(usize) -> usize) -> Result<Expert, ReadError> {
        let make = |part: usize| self.slots.pages(bytes(part));
        Ok([make(0)?, make(1)?, make(2)?])
    }

    /// Waits for a part of the current expert.
    fn collect(&mut self, part: usize) -> Result<(), ReadError> {
        let Some(current) = &mut self.current else { return Ok(()) };
        let Some(read) = current.reads[part].take() else { return Ok(()) };
        let start = Instant::now();
        let collected = self.slots.readers.wait(read);
        let waited = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.slots.counters.wait_ns.fetch_add(waited, Ordering::Relaxed);
        let result = match collected {
            Some(collected) => {
                current.pages[part] = Some(collected.pages);
                collected.result
            }
            None => Err(ReadError::Stopped),
        };
        if result.is_err() {
            self.abandon();
        }
        result
    }

    /// Puts the expert that was computed with where it belongs.
    fn give_back(&mut self) {
        let Some(current) = self.current.take() else { return };
        let Current { expert, home, pages: [Some(gate), Some(up), Some(down)], reads } = current
        else {
            self.current = Some(current);
            return self.discard_current();
        };
        // A part that nobody asked for would still be on its way, and its place empty.
        debug_assert!(reads.iter().all(Option::is_none));
        let pages = [gate, up, down];
        let freed = {
            let mut table = self.slots.table();
            match home {
                Home::Slot => table.keep(self.layer, expert, pages),
                Home::Staging => {
                    table.return_staging(Some(pages));
                    None
                }
                Home::Guessed => self.install(&mut table, expert, pages),
            }
        };
        drop(freed);
    }

    /// Makes a slot of staging buffers whose guess came true. Returns what must be freed.
    fn install(&self, table: &mut Table, expert: usize, pages: Expert) -> Option<Expert> {
        if table.may_grow(self.layer) {
            table.return_staging(None);
            table.add_slot(self.layer);
            return table.keep(self.layer, expert, pages);
        }
        match table.evict(self.layer, &self.wanted) {
            Some(victim) => {
                table.return_staging(Some(victim));
                table.keep(self.layer, expert, pages)
            }
            None => {
                table.return_staging(Some(pages));
                None
            }
        }
    }

    /// Gives up what a layer still has on its way, after an error or where a pass ended early.
    fn abandon(&mut self) {
        self.give_back();
        self.waiting.clear();
        while let Some((expert, pages)) = self.ready.pop_front() {
            let freed = self.slots.table().keep(self.layer, expert, pages);
            drop(freed);
        }
        while let Some(coming) = self.coming.pop_front() {
            self.call_off(&coming);
        }
    }

    /// Gives up an expert of which not all parts are there.
    fn discard_current(&mut self) {
        let Some(current) = self.current.take() else { return };
        for read in current.reads.into_iter().flatten() {
            self.slots.readers.call_off(read);
        }
        let mut table = self.slots.table();
        match current.home {
            Home::Slot => table.forget_slot(self.layer),
            Home::Staging | Home::Guessed => table.return_staging(None),
        }
        for pages in current.pages.into_iter().flatten() {
            table.add_staging(pages);
        }
    }

    fn drop_ahead(&mut self, which: impl Fn(&Coming) -> bool) {
        let mut at = 0;
        while at < self.ahead.len() {
            if which(&self.ahead[at]) {
                let coming = self.ahead.swap_remove(at);
                self.call_off(&coming);
            } else {
                at += 1;
            }
        }
    }

    /// The buffers come back as spare ones, some of them later.
    fn call_off(&self, coming: &Coming) {
        for read in coming.reads {
            self.slots.readers.call_off(read);
        }
        {
            let mut table = self.slots.table();
            match coming.home {
                Home::Slot => table.forget_slot(coming.layer),
                Home::Staging | Home::Guessed => table.return_staging(None),
            }
        }
        self.collect_spare();
    }

    fn collect_spare(&self) {
        while let Some(pages) = self.slots.readers.take_spare() {
            self.slots.table().add_staging(pages);
        }
    }
}

impl Drop for ExpertStream {
    fn drop(&mut self) {
        self.abandon();
        self.drop_ahead(|_| true);
    }
}
