//! Who is in which slot, and what that takes. Nothing here waits or reads.

use super::{LayerFile, PARTS, Pages, SlotsOptions};
use crate::memory::{Permit, Shortfall};
use crate::residency::policy::History;
use crate::units::Bytes;

/// An expert's matrices in memory.
pub(super) type Expert = [Pages; PARTS];

#[derive(Debug)]
pub(super) struct Table {
    layers: Vec<LayerTable>,
    /// Free buffers that fit any part of any expert.
    staging: Vec<Pages>,
    /// Staging buffers that somebody has.
    lent: usize,
    staging_max: usize,
    staging_bytes: usize,
    /// Bytes of slots that exist, those being computed with included.
    slot_bytes_held: u64,
    permit: Option<Permit>,
}

#[derive(Debug)]
pub(super) struct LayerTable {
    /// By expert.
    kept: Vec<Option<Expert>>,
    /// Slots that exist: those in `kept`, and those that a step has.
    held: usize,
    /// Slots that may exist.
    quota: usize,
    slot_bytes: u64,
    pub(super) history: History,
    misses: u64,
}

impl Table {
    pub(super) fn new(layers: &[LayerFile], options: &SlotsOptions) -> Table {
        let widest = layers.iter().flat_map(|layer| (0..PARTS).map(|part| layer.part_bytes(part)));
        let tables = layers.iter().map(|layer| LayerTable {
            kept: (0..layer.experts).map(|_| None).collect(),
            held: 0,
            quota: 0,
            slot_bytes: layer.slot_bytes(),
            history: History::new(options.policy, layer.experts),
            misses: 0,
        });
        let mut table = Table {
            staging: Vec::new(),
            lent: 0,
            staging_max: PARTS * options.staging.max(1),
            staging_bytes: widest.max().unwrap_or(0),
            slot_bytes_held: 0,
            permit: None,
            layers: tables.collect(),
        };
        table.set_quotas(options.slots_bytes);
        table
    }

    pub(super) fn with_permit(mut self, permit: Option<Permit>) -> Table {
        self.permit = permit;
        self
    }

    /// Bytes of all slots that may exist, and of staging.
    pub(super) fn target_bytes(&self) -> u64 {
        let slots = self.layers.iter().map(|layer| layer.quota as u64 * layer.slot_bytes);
        slots.sum::<u64>() + self.staging_max_bytes()
    }

    fn staging_max_bytes(&self) -> u64 {
        (self.staging_max * self.staging_bytes) as u64
    }

    pub(super) fn slots_bytes(&self, layers: &[LayerFile]) -> Bytes {
        let slots = self.layers.iter().zip(layers);
        Bytes(slots.map(|(table, layer)| table.quota as u64 * layer.slot_bytes()).sum())
    }

    pub(super) fn slots(&self) -> u64 {
        self.layers.iter().map(|layer| layer.quota as u64).sum()
    }

    pub(super) fn held_bytes(&self) -> u64 {
        self.slot_bytes_held + ((self.staging.len() + self.lent) * self.staging_bytes) as u64
    }

    /// Tells the ledger how much exists, and gives back what neither exists nor may.
    pub(super) fn settle(&mut self) {
        let held = self.held_bytes();
        let staging = self.staging_max_bytes();
        let wanted = self.target_bytes().max(self.slot_bytes_held + staging);
        if let Some(permit) = &mut self.permit {
            permit.shrink_to(Bytes(wanted));
            permit.set_touched(Bytes(held));
        }
    }

    /// Changes how many slots may exist. Returns what must be freed; what a step has goes when it comes back.
    pub(super) fn set_slots(
        &mut self,
        layers: &[LayerFile],
        bytes: Bytes,
    ) -> Result<Vec<Expert>, Shortfall> {
        let before: Vec<usize> = self.layers.iter().map(|layer| layer.quota).collect();
        self.set_quotas(bytes);
        let target = self.target_bytes();
        if let Some(permit) = &mut self.permit
            && let Some(more) = target.checked_sub(permit.bytes().0)
            && let Err(shortfall) = permit.grow(Bytes(more))
        {
            for (layer, quota) in self.layers.iter_mut().zip(before) {
                layer.quota = quota;
            }
            return Err(shortfall);
        }
        let mut freed = Vec::new();
        for layer in 0..layers.len() {
            while self.layers[layer].held > self.layers[layer].quota {
                let Some(expert) = self.evict(layer, &[]) else { break };
                freed.push(expert);
                self.forget_slot(layer);
            }
        }
        self.settle();
        Ok(freed)
    }

    /// As many slots for each layer as all can have; what is left goes one by one to the layers that miss most,
    /// the first ones before others.
    fn set_quotas(&mut self, bytes: Bytes) {
        let row: u64 = self.layers.iter().map(|layer| layer.slot_bytes).sum();
        let each = bytes.0.checked_div(row).unwrap_or(0);
        let mut left = bytes.0;
        for layer in &mut self.layers {
            layer.quota = usize::try_from(each).unwrap_or(usize::MAX).min(layer.kept.len());
            left -= layer.quota as u64 * layer.slot_bytes;
        }
        let mut order: Vec<usize> = (0..self.layers.len()).collect();
        order.sort_by_key(|&layer| (std::cmp::Reverse(self.layers[layer].misses), layer));
        for index in order {
            let layer = &mut self.layers[index];
            if layer.quota < layer.kept.len() && left >= layer.slot_bytes {
                layer.quota += 1;
                left -= layer.slot_bytes;
            }
        }
    }

    pub(super) fn layer(&mut self, layer: usize) -> &mut LayerTable {
        &mut self.layers[layer]
    }

    /// Whether the layer keeps `expert`.
    pub(super) fn keeps(&self, layer: usize, expert: usize) -> bool {
        self.layers[layer].kept[expert].is_some()
    }

    /// Takes a kept expert out; it goes on to count as a slot.
    pub(super) fn take(&mut self, layer: usize, expert: usize) -> Option<Expert> {
        self.layers[layer].kept[expert].take()
    }

    pub(super) fn count_miss(&mut self, layer: usize) {
        self.layers[layer].misses += 1;
    }

    /// Whether the layer may have one slot more.
    pub(super) fn may_grow(&self, layer: usize) -> bool {
        self.layers[layer].held < self.layers[layer].quota
    }

    /// A slot of this layer that did not exist before does now.
    pub(super) fn add_slot(&mut self, layer: usize) {
        self.layers[layer].held += 1;
        self.slot_bytes_held += self.layers[layer].slot_bytes;
        self.settle();
    }

    /// A slot of this layer exists no more.
    pub(super) fn forget_slot(&mut self, layer: usize) {
        self.layers[layer].held -= 1;
        self.slot_bytes_held -= self.layers[layer].slot_bytes;
        self.settle();
    }

    /// Takes out the kept expert that the policy gives up, but none of `wanted`.
    pub(super) fn evict(&mut self, layer: usize, wanted: &[usize]) -> Option<Expert> {
        let table = &mut self.layers[layer];
        let kept = table.kept.iter().enumerate().filter(|(_, expert)| expert.is_some());
        let victims = kept.map(|(number, _)| number).filter(|number| !wanted.contains(number));
        let victim = table.history.victim(victims)?;
        table.kept[victim].take()
    }

    /// Puts an expert back or in its place, unless the layer has too many slots now: then it is returned, to be
    /// freed.
    pub(super) fn keep(&mut self, layer: usize, number: usize, expert: Expert) -> Option<Expert> {
        let table = &mut self.layers[layer];
        if table.held > table.quota {
            self.forget_slot(layer);
            return Some(expert);
        }
        table.kept[number].replace(expert)
    }

    /// Free staging buffers for an expert, or how large new ones must be; none if as many as may be are lent.
    pub(super) fn borrow_staging(&mut self) -> Option<Staging> {
        if self.lent + PARTS > self.staging_max {
            return None;
        }
        self.lent += PARTS;
        let mut take = || self.staging.pop();
        let staging = Staging { pages: [take(), take(), take()], bytes: self.staging_bytes };
        self.settle();
        Some(staging)
    }

    /// What was lent comes back as these buffers, or not at all.
    pub(super) fn return_staging(&mut self, expert: Option<Expert>) {
        self.lent -= PARTS;
        for pages in expert.into_iter().flatten() {
            self.add_staging(pages);
        }
        self.settle();
    }

    /// Takes a buffer that somebody has left over, if it is of use.
    pub(super) fn add_staging(&mut self, pages: Pages) {
        if pages.len() >= self.staging_bytes && self.staging.len() + self.lent < self.staging_max {
            self.staging.push(pages);
        }
    }
}

/// Lent buffers: those that are missing are to be made.
pub(super) struct Staging {
    pub(super) pages: [Option<Pages>; PARTS],
    pub(super) bytes: usize,
}
