//! Which slot a sequence gets, what of its prompt is already there, and what becomes of a slot afterwards.

use std::sync::Arc;
use std::time::Instant;

use super::{Engine, Prepared, Retired, SlotId, SlotMemory, TokenId, common_prefix};
use crate::engine::prefix::Resting;
use crate::units::SequenceId;

/// A beginning shorter than this is not worth a copied page.
const SHARED_TOKENS_MIN: usize = 8;

impl Engine {
    /// Gives slots to whoever may start.
    pub(super) fn start_waiting(&mut self) {
        while let Some(sequence) = self.scheduler.startable() {
            let id = sequence.id;
            let reusable = self.best_shared(&sequence.prompt, sequence.scores_from);
            let Some(mut request) = self.requests.remove(&id) else {
                // Every waiting sequence has its request; were one lost, its slot must not be.
                self.scheduler.cancel_waiting(id);
                continue;
            };
            let (slot, held) = match (&mut request.memory, reusable) {
                (Some(memory), Some((from, len))) => self.share(memory, from, len),
                _ => (self.free_slot(), 0),
            };
            self.scheduler.start(slot, held);
            request.start(held, &self.shared.metrics, Instant::now());
            self.requests.insert(id, request);
        }
    }

    /// The slot that holds most of a prompt, and how much, if that is of use.
    pub(super) fn best_prefix(&self, prepared: &Prepared) -> Option<(SlotId, usize)> {
        self.best_shared(&prepared.prompt, prepared.scores.as_ref().map(|scores| scores.from))
    }

    fn best_shared(
        &self,
        prompt: &[TokenId],
        scores_from: Option<usize>,
    ) -> Option<(SlotId, usize)> {
        // Positions that are already there have no logits, and those of the last prompt token are needed.
        let useful = &prompt[..scores_from.unwrap_or(prompt.len() - 1)];
        let running = self
            .scheduler
            .slots()
            .map(|(slot, tokens, held)| (slot, common_prefix(&tokens[..held], useful)));
        running
            .chain(self.resting.best(useful))
            .filter(|(_, len)| *len >= SHARED_TOKENS_MIN)
            .max_by_key(|(_, len)| *len)
    }

    /// A slot that begins with the first `len` tokens of `from`, or with as many as the model can give.
    fn share(&mut self, memory: &mut SlotMemory, from: SlotId, len: usize) -> (SlotId, usize) {
        let kept = self.resting.iter().find(|resting| resting.slot == from);
        // What would be lost of the other's tokens is less than what a copy would cost.
        if kept.is_some_and(|resting| len * 4 >= resting.tokens.len() * 3)
            && let Some(resting) = self.resting.take(from)
        {
            let held = self.model.share_prefix(from, from, len);
            // The newcomer's own permit covers all pages from here on.
            drop(resting.memory);
            return (from, self.checked(from, held, len));
        }
        let to = self.free_slot();
        let held = self.model.share_prefix(from, to, len);
        let held = self.checked(to, held, len);
        let shared = Arc::clone(&self.shared);
        if held > 0 {
            if let Some(other) = self.resting.touch(from) {
                other.share_with(memory, &shared.spec, held);
            } else if let Some(other) = self.running_memory(from) {
                other.share_with(memory, &shared.spec, held);
            }
        }
        (to, held)
    }

    /// A model may give fewer tokens than asked for, never others; anything else is not used.
    fn checked(&mut self, slot: SlotId, held: usize, asked: usize) -> usize {
        if held <= asked && self.model.len(slot) == held {
            return held;
        }
        self.model.clear(slot);
        0
    }

    fn running_memory(&mut self, slot: SlotId) -> Option<&mut SlotMemory> {
        let id = self.running_in(slot)?;
        self.requests.get_mut(&id)?.memory.as_mut()
    }

    fn running_in(&self, slot: SlotId) -> Option<SequenceId> {
        self.requests.keys().copied().find(|id| self.scheduler.slot(*id) == Some(slot))
    }

    fn free_slot(&mut self) -> SlotId {
        if self.free_slots.is_empty() {
            self.give_up_resting(None);
        }
        self.free_slots.pop().expect("running and resting sequences together have fewer slots")
    }

    /// Clears the least recently used resting slot, `except` only if it is the last. Whether there was one.
    pub(super) fn give_up_resting(&mut self, except: Option<SlotId>) -> bool {
        let Some(resting) = self.resting.take_oldest(except) else { return false };
        self.model.clear(resting.slot);
        self.free_slots.push(resting.slot);
        true
    }

    /// A sequence has left its slot: its tokens stay for the next prompt that begins alike.
    pub(super) fn rest(&mut self, retired: Retired, memory: Option<SlotMemory>) {
        let Retired { slot, mut tokens, held, .. } = retired;
        tokens.truncate(held);
        let max = usize::from(self.shared.preparer.config.resting_slots);
        match memory {
            Some(memory)
                if max > 0
                    && self.heeded.may_keep()
                    && held >= SHARED_TOKENS_MIN
                    && self.model.len(slot) == held =>
            {
                if !self.heeded.may_keep_more() {
                    self.give_up_resting(None);
                }
                self.resting.add(&self.shared.spec, Resting { slot, tokens, memory });
                while self.resting.len() > max {
                    self.give_up_resting(None);
                }
            }
            _ => {
                self.model.clear(slot);
                self.free_slots.push(slot);
            }
        }
    }
}
