//! Kept prefixes: slots whose sequence has ended rest with their tokens and pages until somebody needs the
//! room, and who pays for pages that several sequences share.

use std::sync::Arc;

use crate::memory::{Permit, Purpose};
use crate::model::ModelSpec;
use crate::units::{Bytes, SlotId, TokenId};

/// The permits behind one slot's pages.
#[derive(Debug)]
pub(super) struct SlotMemory {
    /// Pages of this slot alone.
    own: Permit,
    /// Pages shared with other slots, by rising end; each is paid once, until the last of its users is gone.
    shared: Vec<SharedPages>,
    /// Tokens the slot may come to hold.
    total: usize,
}

#[derive(Clone, Debug)]
struct SharedPages {
    /// The pages hold the tokens before this one.
    end: usize,
    permit: Arc<Permit>,
}

impl SlotMemory {
    /// `own` was promised for `total` tokens.
    pub(super) fn new(own: Permit, total: usize) -> SlotMemory {
        SlotMemory { own, shared: Vec::new(), total }
    }

    /// Bytes that come back when this slot's sequence is gone.
    pub(super) fn bytes(&self) -> Bytes {
        let last = self.shared.iter().filter(|pages| Arc::strong_count(&pages.permit) == 1);
        let shared: Bytes = last.map(|pages| pages.permit.bytes()).sum();
        shared.saturating_add(self.own.bytes())
    }

    /// Says that the slot now holds `held` tokens.
    pub(super) fn touch(&self, spec: &ModelSpec, held: usize) {
        let shared = self.shared.last().map_or(0, |pages| pages.end);
        self.own.set_touched(Bytes(kv_bytes(spec, held).saturating_sub(kv_bytes(spec, shared))));
    }

    /// The first `tokens` tokens of `self` are now also `other`'s: whole pages of them move into promises that
    /// both hold, and `other`, which had been promised all of its tokens, gives its share back.
    pub(super) fn share_with(&mut self, other: &mut SlotMemory, spec: &ModelSpec, tokens: usize) {
        let total = other.total;
        // Past a chunk border local layers drop shared pages and fill new ones of their own, so nothing of the
        // worst case may be given back.
        if spec.chunk.is_some_and(|chunk| total.max(self.total) > chunk as usize) {
            return;
        }
        let page = spec.page_tokens.max(1) as usize;
        let end = tokens / page * page;
        let already = self.shared.last().map_or(0, |pages| pages.end);
        if end > already {
            let bytes = kv_bytes(spec, end) - kv_bytes(spec, already);
            let mut permit = self.own.split(Bytes(bytes));
            permit.set_purpose(Purpose::Prefix);
            permit.set_touched(permit.bytes());
            self.shared.push(SharedPages { end, permit: Arc::new(permit) });
        }
        // One that reaches beyond `end` is held too: that keeps more than needed, never less.
        let mut covered = 0;
        for pages in &self.shared {
            if covered >= end {
                break;
            }
            covered = pages.end;
            other.shared.push(SharedPages { end: pages.end.min(end), ..pages.clone() });
        }
        let left = kv_bytes(spec, total).saturating_sub(kv_bytes(spec, end));
        other.own.shrink_to(Bytes(left));
    }

    /// The sequence has ended with `held` tokens: the rest of the worst case is given back, what remains is
    /// reversible.
    fn rest(&mut self, spec: &ModelSpec, held: usize) {
        let shared = self.shared.last().map_or(0, |pages| pages.end);
        let left = kv_bytes(spec, held).saturating_sub(kv_bytes(spec, shared));
        self.own.shrink_to(Bytes(left));
        self.own.set_purpose(Purpose::Prefix);
        self.own.set_touched(self.own.bytes());
        self.total = held;
    }
}

/// Bytes of a sequence of `tokens` tokens.
pub(super) fn kv_bytes(spec: &ModelSpec, tokens: usize) -> u64 {
    spec.kv_bytes(u32::try_from(tokens).unwrap_or(u32::MAX))
}

/// How many tokens two sequences have in common at the beginning.
pub(super) fn common_prefix(a: &[TokenId], b: &[TokenId]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// A slot whose sequence has ended.
#[derive(Debug)]
pub(super) struct Resting {
    pub(super) slot: SlotId,
    /// Exactly the tokens that the slot holds.
    pub(super) tokens: Vec<TokenId>,
    pub(super) memory: SlotMemory,
}

/// The resting slots, least recently used first.
#[derive(Debug, Default)]
pub(super) struct RestingSlots {
    slots: Vec<Resting>,
}

impl RestingSlots {
    /// Lets a slot rest, as the most recently used one.
    pub(super) fn add(&mut self, spec: &ModelSpec, mut resting: Resting) {
        resting.memory.rest(spec, resting.tokens.len());
        self.slots.push(resting);
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Resting> {
        self.slots.iter()
    }

    /// Bytes that giving up all of them would give back.
    pub(super) fn bytes(&self) -> Bytes {
        self.slots.iter().map(|resting| resting.memory.bytes()).sum()
    }

    /// The slot that shares most with `prompt`, and how much.
    pub(super) fn best(&self, prompt: &[TokenId]) -> Option<(SlotId, usize)> {
        self.slots
            .iter()
            .map(|resting| (resting.slot, common_prefix(&resting.tokens, prompt)))
            .filter(|(_, len)| *len > 0)
            .max_by_key(|(_, len)| *len)
    }

    /// Takes one out by slot.
    pub(super) fn take(&mut self, slot: SlotId) -> Option<Resting> {
        let index = self.slots.iter().position(|resting| resting.slot == slot)?;
        Some(self.slots.remove(index))
    }

    /// Takes the least recently used one out, but `except` only if it is the last.
    pub(super) fn take_oldest(&mut self, except: Option<SlotId>) -> Option<Resting> {
        let index = self.slots.iter().position(|resting| Some(resting.slot) != except);
        match index {
            Some(index) => Some(self.slots.remove(index)),
            None => self.slots.pop(),
        }
    }

    /// A slot's memory, to share it; it becomes the most recently used one.
    pub(super) fn touch(&mut self, slot: SlotId) -> Option<&mut SlotMemory> {
        let resting = self.take(slot)?;
        self.slots.push(resting);
        self.slots.last_mut().map(|resting| &mut resting.memory)
    }

    pub(super) fn clear(&mut self) {
        self.slots.clear();
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::memory::Ledger;

    /// 10 bytes per token, pages of 4 tokens.
    pub(in crate::engine) fn spec() -> ModelSpec {
        ModelSpec {
            architecture: "scripted".to_owned(),
            name: "scripted".to_owned(),
            layers: 1,
            hidden: 8,
            heads: 1,
            kv_heads: 1,
            head_len: 8,
            context_len: 1024,
            vocab_len: 64,
            chunk: None,
            local_layers: 0,
            page_tokens: 4,
            kv_token_bytes: 10,
            scratch_token_bytes: 0,
            weights_bytes: 0,
            parameters: 0,
            quantization: "F32".to_owned(),
        }
    }

    fn tokens(ids: &[u32]) -> Vec<TokenId> {
        ids.iter().copied().map(TokenId).collect()
    }

    fn memory(ledger: &Arc<Ledger>, tokens: usize) -> SlotMemory {
        let bytes = Bytes(kv_bytes(&spec(), tokens));
        let permit = ledger.try_reserve(Purpose::Kv, "x", bytes).expect("the ledger is large");
        SlotMemory::new(permit, tokens)
    }

    #[test]
    fn shared_pages_are_paid_once_until_the_last_user_is_gone() {
        let spec = spec();
        let ledger = Ledger::new(Bytes(100_000));
        let mut a = memory(&ledger, 40);
        let mut b = memory(&ledger, 40);
        assert_eq!(ledger.promised(), Bytes(800));
        // 18 tokens in common: four whole pages.
        a.share_with(&mut b, &spec, 18);
        assert_eq!(ledger.promised(), Bytes(400 + 240));
        let mut c = memory(&ledger, 40);
        // C shares six pages with A; the first four already have their own promise.
        a.share_with(&mut c, &spec, 24);
        assert_eq!(ledger.promised(), Bytes(400 + 240 + 160));
        assert_eq!(a.bytes(), Bytes(160));
        drop(a);
        assert_eq!(ledger.promised(), Bytes(160 + 240 + 80 + 160));
        drop(b);
        assert_eq!(ledger.promised(), Bytes(160 + 80 + 160));
        assert_eq!(c.bytes(), ledger.promised());
        drop(c);
        assert_eq!(ledger.promised(), Bytes(0));
    }

    #[test]
    fn a_chain_of_sharing_never_promises_too_little() {
        let spec = spec();
        let ledger = Ledger::new(Bytes(100_000));
        let mut a = memory(&ledger, 40);
        let mut b = memory(&ledger, 40);
        a.share_with(&mut b, &spec, 24);
        let mut c = memory(&ledger, 40);
        // C takes less from B than B took from A: it holds the whole promise, and its own for the rest.
        b.share_with(&mut c, &spec, 8);
        drop((a, b));
        assert!(ledger.promised() >= Bytes(400));
        assert_eq!(c.own.bytes(), Bytes(320));
    }

    #[test]
    fn past_a_chunk_border_nothing_is_given_back() {
        let spec = ModelSpec { chunk: Some(16), local_layers: 1, ..spec() };
        let ledger = Ledger::new(Bytes(100_000));
        let (mut a, mut b) = (memory(&ledger, 16), memory(&ledger, 40));
        let before = ledger.promised();
        a.share_with(&mut b, &spec, 12);
        b.share_with(&mut a, &spec, 12);
        assert_eq!(ledger.promised(), before);
        let mut c = memory(&ledger, 16);
        let before = ledger.promised();
        a.share_with(&mut c, &spec, 12);
        assert!(ledger.promised() < before);
    }

    #[test]
    fn resting_gives_back_what_was_not_used() {
        let spec = spec();
        let ledger = Ledger::new(Bytes(100_000));
        let mut slots = RestingSlots::default();
        let memory = memory(&ledger, 40);
        slots.add(&spec, Resting { slot: SlotId(1), tokens: tokens(&[1; 9]), memory });
        assert_eq!(ledger.promised_for(Purpose::Kv), Bytes(0));
        assert_eq!(ledger.promised_for(Purpose::Prefix), Bytes(120));
        assert_eq!(slots.bytes(), Bytes(120));
        assert!(slots.take_oldest(Some(SlotId(1))).is_some(), "the exception goes last");
        assert_eq!((slots.len(), ledger.promised()), (0, Bytes(0)));
    }

    #[test]
    fn the_longest_prefix_wins_and_the_oldest_goes() {
        let spec = spec();
        let ledger = Ledger::new(Bytes(100_000));
        let mut slots = RestingSlots::default();
        for (slot, ids) in [(0, [1, 2, 3]), (1, [1, 2, 9]), (2, [7, 7, 7])] {
            let memory = memory(&ledger, 3);
            slots.add(&spec, Resting { slot: SlotId(slot), tokens: tokens(&ids), memory });
        }
        assert_eq!(slots.best(&tokens(&[1, 2, 9, 9])), Some((SlotId(1), 3)));
        assert_eq!(slots.best(&tokens(&[5])), None);
        assert!(slots.touch(SlotId(0)).is_some());
        let oldest = slots.take_oldest(Some(SlotId(1))).map(|resting| resting.slot);
        assert_eq!(oldest, Some(SlotId(2)));
    }
}
