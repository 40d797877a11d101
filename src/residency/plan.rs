//! The residency plan: whether a model is held whole, streams its experts, or is refused. Pure.
//!
//! What every token reads must be in memory: attention, norms, routers, shared experts, the output matrix.
//! Routed experts may lie on disk and come into *expert slots*. Each layer has its own slots: a pass sweeps
//! over all layers, so a pool shared by the layers would evict every expert just before it is used again.
//! The embedding table is read by rows, a few kilobytes for each token, and is never pinned.

use crate::units::Bytes;

/// What a model needs, as its file, the context and the size of a pass give it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Weights that every token reads whole, [`shared`](Needs::shared) included. A table that also serves as
    /// output matrix belongs here.
    pub dense: Bytes,
    /// Part of [`dense`](Needs::dense): shared experts, which are computed while a routed one is read.
    pub shared: Bytes,
    /// The embedding table where it is only read by rows.
    pub table: Bytes,
    /// The layers that have routed experts, in their order.
    pub expert_layers: Vec<ExpertLayer>,
    /// Routed experts that a token uses in each of these layers.
    pub experts_used: u32,
    /// Keys and values of the context.
    pub kv: Bytes,
    /// Buffers of the largest pass.
    pub scratch: Bytes,
}

/// The routed experts of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertLayer {
    /// How many.
    pub count: u32,
    /// Bytes of one expert: what a read moves and what a slot takes.
    pub bytes: Bytes,
}

impl ExpertLayer {
    /// All experts of the layer.
    pub fn all(self) -> Bytes {
        times(self.bytes, u64::from(self.count))
    }
}

impl Needs {
    /// All routed experts of all layers.
    pub fn experts(&self) -> Bytes {
        self.expert_layers.iter().map(|layer| layer.all()).sum()
    }

    /// Every weight of the file.
    pub fn weights(&self) -> Bytes {
        self.dense.saturating_add(self.table).saturating_add(self.experts())
    }

    /// Expert bytes that one token uses, wherever they lie.
    pub fn experts_per_token(&self) -> Bytes {
        self.expert_layers.iter().map(|&layer| self.used_in(layer)).sum()
    }

    /// Least memory to run at all: the dense weights, KV, scratch, and of the experts either a slot in each
    /// layer and the staging, or all of them where that is less.
    pub fn least(&self) -> Bytes {
        let streaming = self.first_slots().saturating_add(self.staging());
        self.fixed().saturating_add(self.experts().min(streaming))
    }

    /// Memory to read nothing from disk but rows of the table.
    pub fn resident(&self) -> Bytes {
        self.fixed().saturating_add(self.experts())
    }

    /// What cannot be given up for anything.
    fn fixed(&self) -> Bytes {
        self.dense.saturating_add(self.kv).saturating_add(self.scratch)
    }

    /// Buffers that experts are read into before a slot is given up for them.
    fn staging(&self) -> Bytes {
        let largest = self.expert_layers.iter().map(|layer| layer.bytes).max();
        times(largest.unwrap_or_default(), STAGING_EXPERTS)
    }

    fn first_slots(&self) -> Bytes {
        self.expert_layers.iter().map(|layer| layer.bytes).sum()
    }

    fn used_in(&self, layer: ExpertLayer) -> Bytes {
        times(layer.bytes, u64::from(self.experts_used.min(layer.count)))
    }
}

/// What becomes of a model in a given headroom.
#[derive(Clone, Debug, PartialEq)]
pub enum Plan {
    /// Every weight that a token may read stays in memory.
    Resident(Parts),
    /// The dense weights stay in memory; experts come and go.
    Streams(Streaming),
    /// It cannot run.
    Refuse(Refusal),
}

/// Where the bytes lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    /// Weights that stay in memory, locked where that is allowed.
    pub pinned: Bytes,
    /// The embedding table, if there is room for it in the page cache.
    pub cached: Bytes,
    /// Weights that are read when they are needed.
    pub on_disk: Bytes,
    /// Keys and values.
    pub kv: Bytes,
    /// Buffers of a pass.
    pub scratch: Bytes,
    /// Headroom that the plan does not use.
    pub left: Bytes,
}

/// A plan with expert slots.
#[derive(Clone, Debug, PartialEq)]
pub struct Streaming {
    /// Where the other bytes lie.
    pub parts: Parts,
    /// For each layer with experts its slots: at least one, at most its experts.
    pub slots_per_layer: Vec<u32>,
    /// Bytes of all slots.
    pub slots: Bytes,
    /// Bytes of the buffers that experts are read into: [`STAGING_EXPERTS`] of the largest.
    pub staging: Bytes,
    /// Share of the uses of experts that find theirs in a slot, if all experts are equally likely. Real routing
    /// is skewed, so this errs on the low side.
    pub hit_ratio: f64,
    /// Bytes read from disk for each token at that ratio.
    pub read_bytes_per_token: Bytes,
}

/// Why a model cannot run, and what could.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Headroom that is missing for the least that would run.
    pub missing: Bytes,
    /// Keys and values for which there is room beside this model; `None` if there is none even for the weights.
    pub kv_max: Option<Bytes>,
    /// Weights for which there is room beside the wanted keys and values.
    pub weights_max: Bytes,
}

impl Plan {
    /// Headroom that the plan takes.
    pub fn takes(&self) -> Bytes {
        match self {
            Plan::Resident(parts) => parts.in_memory(),
            Plan::Streams(streaming) => streaming
                .parts
                .in_memory()
                .saturating_add(streaming.slots)
                .saturating_add(streaming.staging),
            Plan::Refuse(_) => Bytes(0),
        }
    }
}

impl Parts {
    fn in_memory(&self) -> Bytes {
        [self.pinned, self.cached, self.kv, self.scratch].into_iter().sum()
    }
}

/// Experts in flight: one arrives while the next is asked for.
pub const STAGING_EXPERTS: u64 = 2;

/// Plans a model that has the needs `needs` into `headroom`, which is what may be promised: whatever is kept
/// free for others has been taken off. More headroom never yields less: not a worse kind of plan, not fewer
/// slots in any layer, not more bytes to read.
pub fn plan(needs: &Needs, headroom: Bytes) -> Plan {
    if needs.resident() <= headroom {
        let left = headroom.saturating_sub(needs.resident());
        let pinned = needs.dense.saturating_add(needs.experts());
        return Plan::Resident(parts(needs, pinned, Bytes(0), left));
    }
    if needs.least() > headroom {
        return Plan::Refuse(refusal(needs, headroom));
    }
    let staging = needs.staging();
    let room = headroom.saturating_sub(needs.fixed()).saturating_sub(staging);
    let slots_per_layer = slots(&needs.expert_layers, room);
    let held = || needs.expert_layers.iter().zip(&slots_per_layer);
    let slots = held().map(|(layer, &slots)| times(layer.bytes, u64::from(slots))).sum();
    let read = |(&layer, &slots): (&ExpertLayer, &u32)| {
        needs.used_in(layer).0 as f64 * (1.0 - f64::from(slots) / f64::from(layer.count))
    };
    let hits = held().map(|(layer, &slots)| f64::from(slots) / f64::from(layer.count)).sum::<f64>();
    let missing_experts = needs.experts().saturating_sub(slots);
    Plan::Streams(Streaming {
        parts: parts(needs, needs.dense, missing_experts, room.saturating_sub(slots)),
        hit_ratio: hits / slots_per_layer.len() as f64,
        read_bytes_per_token: Bytes(held().map(read).sum::<f64>().round() as u64),
        slots_per_layer,
        slots,
        staging,
    })
}

/// Where the weights lie if `pinned` stay, `left` is left, and `experts_on_disk` have no slot. The table is
/// cached if it fits into what is left.
fn parts(needs: &Needs, pinned: Bytes, experts_on_disk: Bytes, left: Bytes) -> Parts {
    let cached = if needs.table <= left { needs.table } else { Bytes(0) };
    let table_on_disk = needs.table.saturating_sub(cached);
    Parts {
        pinned,
        cached,
        on_disk: experts_on_disk.saturating_add(table_on_disk),
        kv: needs.kv,
        scratch: needs.scratch,
        left: left.saturating_sub(cached),
    }
}

/// Slots for each layer, from `room` bytes. They are handed out in rounds, one to each layer that has experts
/// without one, the first layers first: these gain most from a cache. The order is the same whatever the room
/// and ends with the first slot that does not fit, so more room only adds slots.
fn slots(layers: &[ExpertLayer], room: Bytes) -> Vec<u32> {
    let mut slots = vec![0; layers.len()];
    let mut left = room;
    let rounds = layers.iter().map(|layer| layer.count).max().unwrap_or(0);
    for round in 0..rounds {
        for (index, layer) in layers.iter().enumerate().filter(|(_, layer)| round < layer.count) {
            if layer.bytes > left {
                return slots;
            }
            left = left.saturating_sub(layer.bytes);
            slots[index] += 1;
        }
    }
    slots
}

fn refusal(needs: &Needs, headroom: Bytes) -> Refusal {
    let missing = needs.least().saturating_sub(headroom);
    let without_kv = needs.least().saturating_sub(needs.kv);
    Refusal {
        missing,
        kv_max: (without_kv <= headroom).then(|| headroom.saturating_sub(without_kv)),
        weights_max: headroom.saturating_sub(needs.kv).saturating_sub(needs.scratch),
    }
}

fn times(bytes: Bytes, count: u64) -> Bytes {
    Bytes(bytes.0.saturating_mul(count))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Scout at Q4_0 with a context of 4096 in F16: the figures of its configuration.
    fn scout() -> Needs {
        const EXPERT: u64 = 3 * 5120 * 8192 / 32 * 18;
        let layer = ExpertLayer { count: 16, bytes: Bytes(EXPERT) };
        let attention = 2 * 5120 * (5120 + 1024) / 32 * 18;
        let head = 5120 * 202_048 / 32 * 18;
        Needs {
            dense: Bytes(48 * (attention + EXPERT) + head),
            shared: Bytes(48 * EXPERT),
            table: Bytes(head),
            expert_layers: vec![layer; 48],
            experts_used: 1,
            kv: Bytes(196_608 * 4096),
            // Together with two experts of staging 0.3 GB.
            scratch: Bytes(300_000_000 - 2 * EXPERT),
        }
    }

    fn gb(bytes: Bytes) -> f64 {
        (bytes.0 as f64 / 1e7).round() / 100.0
    }

    #[test]
    fn scout_has_the_size_of_its_configuration() {
        let scout = scout();
        assert_eq!(scout.expert_layers[0].bytes, Bytes(70_778_880));
        assert_eq!(gb(scout.dense), 5.68);
        assert_eq!(gb(scout.shared), 3.4);
        assert_eq!(gb(scout.table), 0.58);
        assert_eq!(gb(scout.experts()), 54.36);
        assert_eq!(gb(scout.weights()), 60.62);
        assert_eq!(gb(scout.experts_per_token()), 3.4);
        assert_eq!(gb(scout.kv), 0.81);
    }

    #[test]
    fn scout_streams_on_16_gb_with_104_slots() {
        let headroom = Bytes(15_400_000_000 - 1_200_000_000);
        let Plan::Streams(streaming) = plan(&scout(), headroom) else { panic!("it streams") };
        let slots = &streaming.slots_per_layer;
        assert_eq!(slots.iter().sum::<u32>(), 104);
        // Two rounds, and the first layers have the rest.
        assert!(slots[..8].iter().all(|&slots| slots == 3));
        assert!(slots[8..].iter().all(|&slots| slots == 2));
        assert_eq!(streaming.hit_ratio, 104.0 / 768.0);
        assert_eq!(streaming.read_bytes_per_token, Bytes(48 * 70_778_880 * 664 / 768));
        assert_eq!(gb(streaming.slots), 7.36);
        assert_eq!(gb(streaming.staging), 0.14);
        assert_eq!(gb(streaming.parts.pinned), 5.68);
        // The table finds no room beside the slots.
        assert_eq!(streaming.parts.cached, Bytes(0));
        assert_eq!(gb(streaming.parts.on_disk), 47.58);
        assert!(streaming.parts.left < Bytes(70_778_880));
        let all = plan(&scout(), headroom).takes().saturating_add(streaming.parts.left);
        assert_eq!(all, headroom);
    }

    #[test]
    fn scout_is_refused_on_8_gb_and_resident_on_64() {
        let Plan::Refuse(refusal) = plan(&scout(), Bytes(6_600_000_000)) else {
            panic!("8 GB are too little");
        };
        // 5.68 dense, 0.81 KV, 0.3 staging and scratch, and a slot in each layer.
        assert_eq!(gb(refusal.missing), 3.58);
        assert_eq!(refusal.kv_max, None);
        assert_eq!(gb(refusal.weights_max), 5.64);
        assert!(matches!(plan(&scout(), Bytes(63_000_000_000)), Plan::Resident(_)));
    }

    #[test]
    fn a_dense_model_is_resident_or_refused() {
        let needs = Needs {
            dense: Bytes(1000),
            table: Bytes(100),
            kv: Bytes(50),
            scratch: Bytes(10),
            ..Needs::default()
        };
        let Plan::Refuse(refusal) = plan(&needs, Bytes(1040)) else { panic!("20 are missing") };
        let expected =
            Refusal { missing: Bytes(20), kv_max: Some(Bytes(30)), weights_max: Bytes(980) };
        assert_eq!(refusal, expected);
        let Plan::Resident(parts) = plan(&needs, Bytes(1159)) else { panic!("it fits") };
        assert_eq!((parts.cached, parts.on_disk, parts.left), (Bytes(0), Bytes(100), Bytes(99)));
        let Plan::Resident(parts) = plan(&needs, Bytes(1160)) else { panic!("it fits") };
        assert_eq!((parts.cached, parts.on_disk, parts.left), (Bytes(100), Bytes(0), Bytes(0)));
    }

    #[test]
    fn layers_of_different_sizes_each_get_their_first_slot() {
        let layer = |count, bytes| ExpertLayer { count, bytes: Bytes(bytes) };
        let needs = Needs {
            expert_layers: vec![layer(4, 30), layer(2, 10), layer(8, 20)],
            experts_used: 3,
            ..Needs::default()
        };
        assert_eq!(needs.experts_per_token(), Bytes(90 + 20 + 60));
        assert_eq!(needs.least(), Bytes(60 + 60));
        let slots = |headroom| match plan(&needs, Bytes(headroom)) {
            Plan::Streams(streaming) => streaming.slots_per_layer,
            other => panic!("{other:?}"),
        };
        assert!(matches!(plan(&needs, Bytes(119)), Plan::Refuse(_)));
        assert_eq!(slots(120), [1, 1, 1]);
        assert_eq!(slots(149), [1, 1, 1]);
        assert_eq!(slots(150), [2, 1, 1]);
        assert_eq!(slots(230), [3, 2, 3]);
        assert!(matches!(plan(&needs, Bytes(300)), Plan::Resident(_)));
    }

    fn needs() -> impl Strategy<Value = Needs> {
        let layer = (1..20_u32, 0..5000_u64)
            .prop_map(|(count, bytes)| ExpertLayer { count, bytes: Bytes(bytes) });
        let layers = proptest::collection::vec(layer, 0..12);
        let sizes = (0..50_000_u64, 0..5000_u64, 0..9000_u64, 0..3000_u64);
        (sizes, layers, 1..4_u32).prop_map(|((dense, table, kv, scratch), expert_layers, used)| {
            Needs {
                dense: Bytes(dense),
                shared: Bytes(dense / 2),
                table: Bytes(table),
                expert_layers,
                experts_used: used,
                kv: Bytes(kv),
                scratch: Bytes(scratch),
            }
        })
    }

    fn rank(plan: &Plan) -> u8 {
        match plan {
            Plan::Refuse(_) => 0,
            Plan::Streams(_) => 1,
            Plan::Resident(_) => 2,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn more_memory_never_yields_less(
            needs in needs(),
            headroom in 0..800_000_u64,
            more in 0..100_000_u64,
        ) {
            let (small, large) = (plan(&needs, Bytes(headroom)), plan(&needs, Bytes(headroom + more)));
            prop_assert!(rank(&small) <= rank(&large));
            match (&small, &large) {
                (Plan::Refuse(small), Plan::Refuse(large)) => {
                    prop_assert!(small.missing >= large.missing);
                    prop_assert!(small.kv_max <= large.kv_max);
                    prop_assert!(small.weights_max <= large.weights_max);
                }
                (Plan::Streams(small), Plan::Streams(large)) => {
                    let mut slots = small.slots_per_layer.iter().zip(&large.slots_per_layer);
                    prop_assert!(slots.all(|(small, large)| small <= large));
                    prop_assert!(small.read_bytes_per_token >= large.read_bytes_per_token);
                    prop_assert!(small.hit_ratio <= large.hit_ratio);
                }
                _ => {}
            }
        }

        #[test]
        fn a_plan_keeps_to_the_headroom(needs in needs(), headroom in 0..800_000_u64) {
            let plan = plan(&needs, Bytes(headroom));
            let takes = plan.takes();
            prop_assert!(takes <= Bytes(headroom));
            match &plan {
                Plan::Resident(parts) => {
                    let weights = parts.pinned.0 + parts.cached.0 + parts.on_disk.0;
                    prop_assert_eq!(weights, needs.weights().0);
                    prop_assert_eq!(takes.0 + parts.left.0, headroom);
                }
                Plan::Streams(streaming) => {
                    let parts = &streaming.parts;
                    let weights = parts.pinned.0 + parts.cached.0 + parts.on_disk.0;
                    prop_assert_eq!(weights + streaming.slots.0, needs.weights().0);
                    prop_assert_eq!(takes.0 + parts.left.0, headroom);
                    let mut layers = streaming.slots_per_layer.iter().zip(&needs.expert_layers);
                    prop_assert!(layers.all(|(&slots, layer)| 1 <= slots && slots <= layer.count));
                    prop_assert!((0.0..=1.0).contains(&streaming.hit_ratio));
                }
                Plan::Refuse(refusal) => {
                    prop_assert_eq!(refusal.missing.0 + headroom, needs.least().0);
                }
            }
        }
    }
}
