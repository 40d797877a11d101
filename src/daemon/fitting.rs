//! Whether the configured model fits, before anything of it is touched, and the promises for what it takes.

use log::warn;

use super::StartError;
use super::facts::machine_record;
use crate::config::Config;
use crate::gguf::{Gguf, Mapping};
use crate::memory::{Ledger, MemorySample, Permit, Purpose, Shortfall};
use crate::model::{self, KvType, Outline, StreamedExperts};
use crate::residency::Plan;
use crate::store::{self, CONTEXT_MIN, Fit, Instead, Machine, MachineRecord, Rates, Wish};
use crate::units::Bytes;
use std::sync::Arc;

/// The longest context offered where the configuration does not say.
const CONTEXT_DEFAULT_MAX: u32 = 8192;

/// A context of `asked` tokens for a model trained on `trained`; 0 is the model's own, but at most 8192.
pub fn context(asked: u32, trained: u32) -> u32 {
    match asked {
        0 => trained.min(CONTEXT_DEFAULT_MAX),
        asked => asked,
    }
}

/// A model that has its promises.
pub(super) struct Fitted {
    pub(super) fit: Fit,
    pub(super) permits: Vec<Permit>,
    /// How its experts are kept, if they are not simply mapped. Their promise is made when the slots are.
    pub(super) streaming: Option<StreamedExperts>,
}

/// Plans the model of `mapping` in what `ledger` may promise, and reserves it.
///
/// # Errors
/// If the file cannot be run, or does not fit and nobody forced it; the error says what is missing and what would
/// fit.
pub(super) fn fit_and_reserve(
    config: &Config,
    mapping: &Mapping,
    name: &str,
    ledger: &Arc<Ledger>,
    sample: &MemorySample,
) -> Result<Fitted, StartError> {
    let path = mapping.path();
    let unusable = |message: String| StartError::Model { path: path.to_owned(), message };
    let gguf = Gguf::parse(mapping.bytes()).map_err(|error| unusable(error.to_string()))?;
    let outline = Outline::from_gguf(&gguf, KvType::from(config.model.kv))
        .map_err(|error| unusable(error.to_string()))?;
    let trained = outline.spec.context_len;
    if config.model.context_tokens > trained {
        return Err(StartError::Config(format!(
            "model.context_tokens of {} exceeds the model's {trained}",
            config.model.context_tokens
        )));
    }
    let machine = machine(config, ledger, sample);
    let fit = best_fit(config, &outline, &machine);
    let too_large =
        |fit: &Fit| StartError::NoHeadroom { path: path.to_owned(), plan: text(fit, &machine) };
    let slots = slots(config, mapping, &outline, &fit.plan);
    let needs = outline.needs(fit.context_tokens, pass_tokens(config, slots.is_some()));
    let weights = match &fit.plan {
        _ if slots.is_some() => needs.dense,
        Plan::Resident(parts) => parts.pinned.saturating_add(parts.cached),
        _ if config.model.force => {
            // What is not reserved stays in the file and comes through the page cache, page by page.
            let others = needs.scratch.saturating_add(needs.kv);
            warn!(target: "daemon", model = name; "forced: {}; its weights will be read from disk again and again", fit.summary());
            needs.weights().min(ledger.free().saturating_sub(others))
        }
        _ => return Err(too_large(&fit)),
    };
    let reserve = |purpose, label: &str, bytes| ledger.try_reserve(purpose, label, bytes);
    let permits =
        [(Purpose::Weights, name, weights), (Purpose::Scratch, "forward pass", needs.scratch)]
            .into_iter()
            .map(|(purpose, label, bytes)| reserve(purpose, label, bytes))
            .collect::<Result<Vec<Permit>, Shortfall>>();
    // The plan was made in what the ledger had free; others may have taken of it in between.
    let permits = permits.map_err(|_| too_large(&fit))?;
    let streaming = slots.map(|bytes| StreamedExperts {
        slots: config.residency.slots_options(bytes),
        ledger: Some(Arc::clone(ledger)),
        label: name.to_owned(),
    });
    Ok(Fitted { fit, permits, streaming })
}

/// How a model is opened where nobody keeps account: as it would be served.
pub(super) fn streaming_without_ledger(
    config: &Config,
    mapping: &Mapping,
    sample: &MemorySample,
) -> Option<StreamedExperts> {
    let gguf = Gguf::parse(mapping.bytes()).ok()?;
    let outline = Outline::from_gguf(&gguf, KvType::from(config.model.kv)).ok()?;
    let kept_free = sample.total.0 as f64 * config.memory.keep_free_percent / 100.0;
    let ledger = Ledger::new(sample.available.saturating_sub(Bytes(kept_free as u64)));
    let fit = best_fit(config, &outline, &machine(config, &ledger, sample));
    let bytes = slots(config, mapping, &outline, &fit.plan)?;
    let slots = config.residency.slots_options(bytes);
    Some(StreamedExperts { slots, ledger: None, label: String::new() })
}

/// Bytes for expert slots, if the model streams: as many as are configured, or as the plan found.
fn slots(config: &Config, mapping: &Mapping, outline: &Outline, plan: &Plan) -> Option<Bytes> {
    let has_experts = !outline.needs(0, 0).expert_layers.is_empty();
    if mapping.file().is_none() || !has_experts {
        return None;
    }
    match (config.residency.expert_slots_bytes, plan) {
        (Some(bytes), _) => Some(Bytes(bytes)),
        (None, Plan::Streams(streaming)) => Some(streaming.slots),
        (None, _) => None,
    }
}

/// Tokens of the largest pass.
fn pass_tokens(config: &Config, streams: bool) -> usize {
    let wanted = if streams { model::STREAMED_PASS_TOKENS } else { 1 };
    config.engine.prefill_tokens_max.max(wanted)
}

/// This machine as the ledger sees it.
fn machine(config: &Config, ledger: &Ledger, sample: &MemorySample) -> Machine {
    let share = config.memory.keep_free_percent / 100.0;
    Machine {
        name: "this machine".to_owned(),
        total: sample.total,
        headroom: ledger.free(),
        keep_free: Bytes((sample.total.0 as f64 * share) as u64),
        rates: machine_record(sample.total)
            .map_or(Rates::PI_5, |record| MachineRecord::rates(&record)),
    }
}

/// The fit with the configured context. Where none is configured, a shorter one is taken if only that fits.
fn best_fit(config: &Config, outline: &Outline, machine: &Machine) -> Fit {
    let asked = config.model.context_tokens;
    let mut wish = Wish {
        context_tokens: context(asked, outline.spec.context_len),
        pass_tokens: pass_tokens(config, false),
    };
    let mut fit = store::fit(outline, machine, wish);
    if matches!(fit.plan, Plan::Streams(_)) {
        wish.pass_tokens = pass_tokens(config, true);
        fit = store::fit(outline, machine, wish);
    }
    match fit.instead.first() {
        Some(Instead::Context { tokens }) if asked == 0 && *tokens >= CONTEXT_MIN => {
            let context_tokens = *tokens;
            warn!(target: "daemon", context_tokens; "context shortened to what fits");
            store::fit(outline, machine, Wish { context_tokens, ..wish })
        }
        _ => fit,
    }
}

fn text(fit: &Fit, machine: &Machine) -> String {
    let whole = if matches!(fit.plan, Plan::Streams(_)) { "does not fit whole; it " } else { "" };
    let mut lines = vec![format!(
        "{whole}{} ({} may be promised, {} kept free)",
        fit.summary(),
        machine.headroom,
        machine.keep_free
    )];
    lines.extend(fit.details());
    lines.push(
        "`--force` runs it all the same: from disk, slowly, at the cost of every other program"
            .to_owned(),
    );
    lines.join("\n  ")
}
