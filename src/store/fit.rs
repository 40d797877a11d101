//! Whether a model will fit a machine, how fast it would be there, and what would fit instead. Pure: what `plan`,
//! `pull` and `serve` say comes from here.
//!
//! Speeds are estimates from bandwidths: a token costs reading the weights that it uses, from memory or from disk;
//! a prompt costs multiplying them. They hold for the beginning of a context; keys and values of a long one are
//! read on top.

use super::catalogue::catalogue;
use crate::model::{KvType, Outline, STREAMED_PASS_TOKENS};
use crate::residency::{Needs, Parts, Plan, Refusal, Streaming, plan};
use crate::units::Bytes;

/// A machine to plan for.
#[derive(Clone, Debug, PartialEq)]
pub struct Machine {
    /// What to call it.
    pub name: String,
    /// All its memory.
    pub total: Bytes,
    /// What may be promised: available memory without what is kept free.
    pub headroom: Bytes,
    /// What is kept free for others.
    pub keep_free: Bytes,
    /// What its memory, disk and processor reach.
    pub rates: Rates,
}

/// What speeds are estimated from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Bytes of weights that decoding reads from memory in a second.
    pub decode_bytes_per_s: f64,
    /// Operations, a multiply-add counted as two, that reading a prompt reaches in a second.
    pub prefill_ops_per_s: f64,
    /// Bytes read from the disk in a second, in pieces of a megabyte.
    pub disk_bytes_per_s: f64,
    /// Whether they were measured on the machine.
    pub measured: bool,
}

impl Rates {
    /// A Raspberry Pi 5 at 2.4 GHz with an NVMe drive at PCIe Gen 3. Nothing was measured: one core is reported to
    /// read 14.9 GB/s, of which decoding is to reach 12.5; four cores make at most 614 GOPS of 8-bit products, of
    /// which prefill is to reach 45 %; the link gives 0.85 GB/s.
    pub const PI_5: Rates = Rates {
        decode_bytes_per_s: DECODE_SHARE * 14.9e9,
        prefill_ops_per_s: 0.45 * 614e9,
        disk_bytes_per_s: 0.85e9,
        measured: false,
    };
}

/// Share of a plain read of memory that decoding reaches.
pub const DECODE_SHARE: f64 = 12.5 / 14.9;

/// Memory of the boards, in GiB.
pub const PI_5_GIB: [u64; 3] = [4, 8, 16];

/// Share of the memory that is available where nothing else runs: 15.4 GB are reported of a 16 GiB board. The
/// smaller boards are assumed to be alike.
const IDLE_SHARE: f64 = 15.4e9 / (16u64 << 30) as f64;

impl Machine {
    /// A machine with `total` memory on which only the system runs, and `keep_free_percent` of it kept free.
    pub fn idle(name: &str, total: Bytes, keep_free_percent: f64, rates: Rates) -> Machine {
        let share = |share: f64| Bytes((total.0 as f64 * share) as u64);
        let keep_free = share(keep_free_percent / 100.0);
        let headroom = share(IDLE_SHARE).saturating_sub(keep_free);
        Machine { name: name.to_owned(), total, headroom, keep_free, rates }
    }

    /// A machine with `total` memory of which `available` is free now.
    pub fn now(
        name: &str,
        total: Bytes,
        available: Bytes,
        keep_free_percent: f64,
        rates: Rates,
    ) -> Machine {
        let keep_free = Bytes((total.0 as f64 * keep_free_percent / 100.0) as u64);
        let headroom = available.saturating_sub(keep_free);
        Machine { name: name.to_owned(), total, headroom, keep_free, rates }
    }

    /// A Raspberry Pi 5 of `gib` GiB.
    pub fn pi_5(gib: u64, keep_free_percent: f64) -> Machine {
        let name = format!("Raspberry Pi 5, {gib} GB");
        Machine::idle(&name, Bytes(gib << 30), keep_free_percent, Rates::PI_5)
    }
}

/// How a model is to be run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wish {
    /// Tokens of the longest sequence.
    pub context_tokens: u32,
    /// Tokens of the largest pass.
    pub pass_tokens: usize,
}

/// What became of a model on a machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Fit {
    /// Where its bytes lie, or why it cannot run.
    pub plan: Plan,
    /// The context it was planned with.
    pub context_tokens: u32,
    /// Estimated speed of one sequence; `None` if it cannot run.
    pub speed: Option<Speed>,
    /// What would fit instead, if it cannot run; the best first.
    pub instead: Vec<Instead>,
}

/// Estimated tokens a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speed {
    /// Writing.
    pub decode_tokens_per_s: f64,
    /// Reading a long prompt.
    pub prefill_tokens_per_s: f64,
}

/// Something that would fit.
#[derive(Clone, Debug, PartialEq)]
pub enum Instead {
    /// The same model with a shorter context.
    Context {
        /// Tokens of it.
        tokens: u32,
    },
    /// A model of the catalogue in Q4_0, resident.
    Model {
        /// Its word.
        name: &'static str,
        /// All its weights.
        weights: Bytes,
        /// Its speed there.
        speed: Speed,
    },
}

/// Plans a model on a machine.
pub fn fit(outline: &Outline, machine: &Machine, wish: Wish) -> Fit {
    let mut pass_tokens = wish.pass_tokens;
    let mut needs = outline.needs(wish.context_tokens, pass_tokens);
    let mut planned = plan(&needs, machine.headroom);
    if matches!(planned, Plan::Streams(_)) && pass_tokens < STREAMED_PASS_TOKENS {
        // A pass reads most of the file, so it is made large; its buffers come out of the slots.
        pass_tokens = STREAMED_PASS_TOKENS;
        needs = outline.needs(wish.context_tokens, pass_tokens);
        planned = plan(&needs, machine.headroom);
    }
    let plan = planned;
    let speed = speed(outline, &needs, &plan, machine.rates, pass_tokens);
    let instead = match &plan {
        Plan::Refuse(refusal) => instead(outline, machine, wish, refusal),
        _ => Vec::new(),
    };
    Fit { plan, context_tokens: wish.context_tokens, speed, instead }
}

/// A context shorter than this is no conversation: a home's instructions and devices have about 500 tokens.
pub const CONTEXT_MIN: u32 = 1024;

fn instead(outline: &Outline, machine: &Machine, wish: Wish, refusal: &Refusal) -> Vec<Instead> {
    let mut found = Vec::new();
    let tokens = refusal.kv_max.map_or(0, |kv| context_in(outline, kv, wish.context_tokens));
    if tokens >= CONTEXT_MIN {
        found.push(Instead::Context { tokens });
    }
    let resident = catalogue().into_iter().find_map(|(name, blueprint)| {
        let other = blueprint.outline_q4_0(KvType::F16);
        let context = wish.context_tokens.min(other.spec.context_len);
        let needs = other.needs(context, wish.pass_tokens);
        let plan = plan(&needs, machine.headroom);
        let Plan::Resident(_) = plan else { return None };
        let speed = speed(&other, &needs, &plan, machine.rates, wish.pass_tokens)?;
        Some(Instead::Model { name, weights: needs.weights(), speed })
    });
    found.extend(resident);
    found
}

/// The longest context, in steps of 256 tokens and at most `most`, whose keys and values take no more than `kv`.
pub fn context_in(outline: &Outline, kv: Bytes, most: u32) -> u32 {
    const STEP: u32 = 256;
    let (mut fits, mut too_long) = (0, most / STEP + 1);
    while fits + 1 < too_long {
        let middle = fits + (too_long - fits) / 2;
        match outline.spec.kv_bytes(middle * STEP) <= kv.0 {
            true => fits = middle,
            false => too_long = middle,
        }
    }
    fits * STEP
}

fn speed(
    outline: &Outline,
    needs: &Needs,
    plan: &Plan,
    rates: Rates,
    pass_tokens: usize,
) -> Option<Speed> {
    let streaming = match plan {
        Plan::Resident(_) => None,
        Plan::Streams(streaming) => Some(streaming),
        Plan::Refuse(_) => return None,
    };
    let decode_s = match streaming {
        None => {
            let read = needs.dense.saturating_add(needs.experts_per_token());
            read.0 as f64 / rates.decode_bytes_per_s
        }
        Some(streaming) => streamed_token_s(needs, streaming, rates),
    };
    let compute_s = 2.0 * outline.active_parameters as f64 / rates.prefill_ops_per_s;
    let read_s = streaming.map_or(0.0, |streaming| {
        pass_bytes(needs, streaming, pass_tokens) / rates.disk_bytes_per_s / pass_tokens as f64
    });
    Some(Speed {
        decode_tokens_per_s: 1.0 / decode_s.max(f64::MIN_POSITIVE),
        prefill_tokens_per_s: 1.0 / compute_s.max(read_s).max(f64::MIN_POSITIVE),
    })
}

/// Seconds of one token: in each layer that misses its expert, the shared and the routed one are computed while
/// the disk is read; everything else is added.
fn streamed_token_s(needs: &Needs, streaming: &Streaming, rates: Rates) -> f64 {
    let layers = needs.expert_layers.len().max(1) as f64;
    let shared = needs.shared.0 as f64 / layers;
    let used = f64::from(needs.experts_used);
    let experts = needs.expert_layers.iter().zip(&streaming.slots_per_layer);
    let experts_s: f64 = experts
        .map(|(layer, &slots)| {
            let hit = f64::from(slots) / f64::from(layer.count.max(1));
            let routed = layer.bytes.0 as f64 * used.min(f64::from(layer.count));
            let compute_s = (shared + routed) / rates.decode_bytes_per_s;
            let miss_s = (routed / rates.disk_bytes_per_s).max(compute_s);
            hit * compute_s + (1.0 - hit) * miss_s
        })
        .sum();
    let rest = needs.dense.saturating_sub(needs.shared).0 as f64;
    rest / rates.decode_bytes_per_s + experts_s
}

/// Bytes that a pass of `tokens` tokens reads from disk: each expert that some token uses and that has no slot,
/// once. Experts are taken to be equally likely.
fn pass_bytes(needs: &Needs, streaming: &Streaming, tokens: usize) -> f64 {
    let layers = needs.expert_layers.iter().zip(&streaming.slots_per_layer);
    layers
        .map(|(layer, &slots)| {
            let count = f64::from(layer.count.max(1));
            let used = f64::from(needs.experts_used).min(count) / count;
            let touched = 1.0 - (1.0 - used).powf(tokens as f64);
            (count - f64::from(slots)) * touched * layer.bytes.0 as f64
        })
        .sum()
}

impl Fit {
    /// One word: `resident`, `streams` or `refused`.
    pub fn verdict(&self) -> &'static str {
        match self.plan {
            Plan::Resident(_) => "resident",
            Plan::Streams(_) => "streams",
            Plan::Refuse(_) => "refused",
        }
    }

    /// Its numbers under the names that JSON, `/metrics` and MQTT have for them; see [`crate::metrics::PLAN`].
    /// What does not apply is left out.
    pub fn figures(&self) -> Vec<(&'static str, f64)> {
        let mut figures = Vec::new();
        let mut put = |name, value: f64| figures.push((name, value));
        let parts = match &self.plan {
            Plan::Resident(parts) => Some(parts),
            Plan::Streams(streaming) => Some(&streaming.parts),
            Plan::Refuse(refusal) => {
                put("plan_missing_bytes", refusal.missing.0 as f64);
                None
            }
        };
        if let Some(Parts { pinned, cached, on_disk, kv, scratch, left }) = parts {
            put("plan_pinned_bytes", pinned.0 as f64);
            put("plan_cached_bytes", cached.0 as f64);
            put("plan_on_disk_bytes", on_disk.0 as f64);
            put("plan_kv_bytes", kv.0 as f64);
            put("plan_scratch_bytes", scratch.0 as f64);
            put("plan_left_bytes", left.0 as f64);
        }
        if let Plan::Streams(streaming) = &self.plan {
            let slots: u64 = streaming.slots_per_layer.iter().map(|&slots| u64::from(slots)).sum();
            put("plan_expert_slots", slots as f64);
            put("plan_expert_slot_bytes", streaming.slots.0 as f64);
            put("plan_staging_bytes", streaming.staging.0 as f64);
            put("plan_expert_hit_ratio", streaming.hit_ratio);
            put("plan_read_bytes_per_token", streaming.read_bytes_per_token.0 as f64);
        }
        if let Some(speed) = self.speed {
            put("plan_decode_tokens_per_second", speed.decode_tokens_per_s);
            put("plan_prefill_tokens_per_second", speed.prefill_tokens_per_s);
        }
        figures
    }
}

/// Text for people. What `plan`, `pull` and `serve` print.
impl Fit {
    /// The verdict in one line.
    pub fn summary(&self) -> String {
        match (&self.plan, self.speed) {
            (Plan::Refuse(refusal), _) => format!("does not fit: {} missing", refusal.missing),
            (Plan::Resident(_), Some(speed)) => format!("resident, {speed}"),
            (Plan::Streams(_), Some(speed)) => format!("streams its experts, {speed}"),
            (_, None) => self.verdict().to_owned(),
        }
    }

    /// Where the bytes lie, or what would fit instead; a few lines.
    pub fn details(&self) -> Vec<String> {
        match &self.plan {
            Plan::Resident(parts) => {
                let mut lines = vec![in_memory(parts, self.context_tokens)];
                lines.extend(table_on_disk(parts));
                lines
            }
            Plan::Streams(streaming) => streaming_lines(streaming, self.context_tokens),
            Plan::Refuse(_) => self.instead.iter().map(ToString::to_string).collect(),
        }
    }
}

fn in_memory(parts: &Parts, context_tokens: u32) -> String {
    let Parts { pinned, cached, kv, scratch, .. } = parts;
    let table = match cached {
        Bytes(0) => String::new(),
        bytes => format!(" + {bytes} embedding table"),
    };
    format!(
        "in memory: {pinned} weights{table} + {kv} keys and values of {context_tokens} tokens + {scratch} scratch"
    )
}

fn table_on_disk(parts: &Parts) -> Option<String> {
    let on_disk = parts.on_disk;
    (on_disk > Bytes(0)).then(|| format!("on disk: {on_disk} embedding table, read by rows"))
}

fn streaming_lines(streaming: &Streaming, context_tokens: u32) -> Vec<String> {
    let slots = &streaming.slots_per_layer;
    let (least, most) = (slots.iter().min().unwrap_or(&0), slots.iter().max().unwrap_or(&0));
    let each = if least == most { least.to_string() } else { format!("{least} to {most}") };
    vec![
        in_memory(&streaming.parts, context_tokens),
        format!(
            "           + {} in {} expert slots, {each} in each layer, + {} staging",
            streaming.slots,
            slots.iter().sum::<u32>(),
            streaming.staging
        ),
        format!(
            "on disk: {}; {} are read for each token, as {:.0} % of the experts are found in slots",
            streaming.parts.on_disk,
            streaming.read_bytes_per_token,
            100.0 * streaming.hit_ratio
        ),
    ]
}

impl std::fmt::Display for Speed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (decode, prefill) =
            (digits(self.decode_tokens_per_s), digits(self.prefill_tokens_per_s));
        write!(f, "about {decode} tokens/s, prompts at {prefill} tokens/s")
    }
}

/// Two digits that count; more would pretend to know.
fn digits(rate: f64) -> String {
    match rate {
        rate if rate < 1.0 => format!("{rate:.2}"),
        rate if rate < 10.0 => format!("{rate:.1}"),
        rate => format!("{rate:.0}"),
    }
}

impl std::fmt::Display for Instead {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Instead::Context { tokens } => write!(f, "would fit: a context of {tokens} tokens"),
            Instead::Model { name, weights, speed } => {
                write!(f, "would fit: {name} in Q4_0 ({weights}), {speed}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::find;

    const KEEP_FREE: f64 = 7.0;

    fn outline(word: &str) -> Outline {
        find(word).expect("it is in the catalogue").outline_q4_0(KvType::F16)
    }

    fn on(word: &str, gib: u64) -> Fit {
        let wish = Wish { context_tokens: 4096, pass_tokens: 256 };
        fit(&outline(word), &Machine::pi_5(gib, KEEP_FREE), wish)
    }

    fn near(value: f64, expected: f64, tolerance: f64) -> bool {
        (value - expected).abs() <= tolerance * expected
    }

    #[test]
    fn scout_on_16_gb_is_what_its_arithmetic_says() {
        let found = on("scout", 16);
        let Plan::Streams(streaming) = &found.plan else { panic!("it streams") };
        let slots: u32 = streaming.slots_per_layer.iter().sum();
        // 104 slots where scratch and staging take 0.3 GB; buffers of a pass of 1024 tokens alone take half a GB.
        assert!((98..=102).contains(&slots), "{slots}");
        let speed = found.speed.expect("it runs");
        assert!(near(speed.decode_tokens_per_s, 0.27, 0.02), "{speed:?}");
        assert_eq!(found.summary().split(',').next(), Some("streams its experts"));
    }

    #[test]
    fn a_slower_link_costs_what_the_arithmetic_says() {
        let mut machine = Machine::pi_5(16, KEEP_FREE);
        machine.rates.disk_bytes_per_s = 0.45e9;
        let wish = Wish { context_tokens: 4096, pass_tokens: 1024 };
        let speed = fit(&outline("scout"), &machine, wish).speed.expect("it runs");
        assert!(near(speed.decode_tokens_per_s, 0.15, 0.03), "{speed:?}");
        // 32 GOP a token at 276 GOPS; reading all missing experts once for 1024 tokens takes a little less.
        assert!(near(speed.prefill_tokens_per_s, 8.6, 0.02), "{speed:?}");
    }

    #[test]
    fn small_boards_refuse_scout_and_name_what_fits() {
        for (gib, model) in [(4, "llama-3.2-3b"), (8, "llama-3.1-8b")] {
            let found = on("scout", gib);
            assert_eq!(found.verdict(), "refused");
            let [Instead::Model { name, speed, .. }] = &found.instead[..] else {
                panic!("{:?}", found.instead)
            };
            assert_eq!(*name, model);
            assert!(speed.decode_tokens_per_s > 2.0);
            assert!(found.summary().contains("missing"));
            assert!(found.details()[0].contains(model));
        }
    }

    #[test]
    fn the_targets_of_small_models_follow_from_the_bandwidth() {
        for (word, decode, prefill) in [
            ("llama-3.2-1b", 16.0, 110.0),
            ("llama-3.2-3b", 6.4, 43.0),
            ("llama-3.1-8b", 2.8, 17.0),
        ] {
            let speed = on(word, 16).speed.expect("it is resident");
            assert!(near(speed.decode_tokens_per_s, decode, 0.15), "{word} {speed:?}");
            assert!(near(speed.prefill_tokens_per_s, prefill, 0.15), "{word} {speed:?}");
        }
    }

    #[test]
    fn a_long_context_that_does_not_fit_becomes_a_shorter_one() {
        let outline = outline("llama-3.2-3b");
        let wish = Wish { context_tokens: 131_072, pass_tokens: 256 };
        let machine = Machine::pi_5(8, KEEP_FREE);
        let refused = fit(&outline, &machine, wish);
        let Some(Instead::Context { tokens }) = refused.instead.first() else {
            panic!("{:?}", refused.instead)
        };
        assert!(*tokens >= 32_768 && tokens.is_multiple_of(256));
        let shorter = Wish { context_tokens: *tokens, ..wish };
        assert_eq!(fit(&outline, &machine, shorter).verdict(), "resident");
        let longer = Wish { context_tokens: tokens + 512, ..wish };
        assert_eq!(fit(&outline, &machine, longer).verdict(), "refused");
    }

    #[test]
    fn every_figure_has_a_metric() {
        let refused = on("scout", 4);
        for (name, value) in
            [on("scout", 16), on("llama-3.2-1b", 8), refused].iter().flat_map(Fit::figures)
        {
            assert!(crate::metrics::PLAN.iter().any(|(known, _)| *known == name), "{name}");
            assert!(value.is_finite(), "{name} is {value}");
        }
    }
}
