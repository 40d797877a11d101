//! A member of the pool as the process's wiring hands it over.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::chat::{Backend, ModelName, Scope};

/// The members of a pool, as they are now.
pub trait Roster: Send + Sync {
    /// All that are known, healthy or not, in an order that does not change by itself. Answers at once.
    fn members(&self) -> Vec<Member>;
}

/// One model on one machine that can be asked.
#[derive(Clone)]
pub struct Member {
    /// Its name in requests and reports, as `pi-a/llama3.2-3b`; unique in the pool. The local engine's begins
    /// with `local/`.
    pub id: Arc<str>,
    /// What answers there.
    pub kind: MemberKind,
    /// Where it is.
    pub scope: Scope,
    /// What its backend calls the model.
    pub model: ModelName,
    /// The digest of its file, where it is told: equal files are one family.
    pub digest: Option<Arc<str>>,
    /// Active and total weights, where they are told.
    pub parameters: Option<(u64, u64)>,
    /// The owner's word on its strength.
    pub tier: Option<Tier>,
    /// Whether it can judge by log-probabilities.
    pub score: ScoreKind,
    /// Requests it takes at once, if the owner said so.
    pub max_in_flight: Option<u16>,
    /// How it does.
    pub vitals: Vitals,
    /// The way to it. Failures come as `ChatError::Upstream` with their reason.
    pub backend: Arc<dyn Backend>,
}

/// What answers for a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MemberKind {
    /// A root of distributed-llama.
    Dllama,
    /// The engine of this process.
    Local,
    /// An Ollama server.
    Ollama,
    /// Any other server of OpenAI's dialect.
    OpenAi,
    /// Another scoutd.
    Scoutd,
}

/// How a member can score.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ScoreKind {
    /// Not at all.
    None,
    /// From the likeliest tokens that its server lists.
    TopK,
    /// Any continuation.
    Exact,
}

/// How strong a model is, roughly: by the geometric mean of its active and total weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tier {
    /// Below 2 billion.
    Tiny,
    /// Below 6 billion.
    Small,
    /// Below 16 billion.
    Medium,
    /// Above.
    Large,
}

/// What is known of a member's health and speed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Vitals {
    /// Whether it can be asked.
    pub health: Health,
    /// Throttled by heat.
    pub hot: bool,
    /// Bytes it could still promise; `None` if it does not tell.
    pub headroom: Option<u64>,
    /// Requests of ours it works on.
    pub in_flight: u16,
    /// Predicted wait before it begins.
    pub queue: Duration,
    /// Moving average, tokens per second; `None` before the first answer.
    pub prefill_per_s: Option<f64>,
    /// Moving average, tokens per second; `None` before the first answer.
    pub decode_per_s: Option<f64>,
}

/// Whether a member can be asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Health {
    /// Known, but it has not proved that it belongs to the pool.
    Candidate,
    /// It answers.
    #[default]
    Healthy,
    /// It has left.
    Left,
    /// Its breaker is open.
    Open,
}

impl Tier {
    /// The tier of a model of so many weights.
    pub fn of(active: u64, total: u64) -> Tier {
        let size = (active as f64 * total as f64).sqrt();
        match size {
            _ if size < 2e9 => Tier::Tiny,
            _ if size < 6e9 => Tier::Small,
            _ if size < 16e9 => Tier::Medium,
            _ => Tier::Large,
        }
    }
}

impl Member {
    /// The owner's word, else by size; a model of unknown size is taken for a tiny one.
    pub fn tier(&self) -> Tier {
        let by_size = self.parameters.map(|(active, total)| Tier::of(active, total));
        self.tier.or(by_size).unwrap_or(Tier::Tiny)
    }

    /// Whether it is asked at all.
    pub fn is_healthy(&self) -> bool {
        self.vitals.health == Health::Healthy
    }

    /// Whether a request means this member by `pattern`: its id, or the beginning or the end of it beside `*`.
    pub fn matches(&self, pattern: &str) -> bool {
        match (pattern.strip_suffix('*'), pattern.strip_prefix('*')) {
            (Some(head), _) => self.id.starts_with(head),
            (None, Some(tail)) => self.id.ends_with(tail),
            (None, None) => *self.id == *pattern,
        }
    }
}

impl Vitals {
    /// How long an answer of `output` tokens to a prompt of `prompt` tokens would take; `None` while its speed is
    /// not known.
    pub fn predict(&self, prompt: u32, output: u32) -> Option<Duration> {
        let seconds =
            f64::from(prompt) / self.prefill_per_s? + f64::from(output) / self.decode_per_s?;
        Duration::try_from_secs_f64(seconds).ok().map(|work| self.queue.saturating_add(work))
    }
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Member")
            .field("id", &self.id)
            .field("kind", &self.kind)
            .field("scope", &self.scope)
            .field("vitals", &self.vitals)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiers_go_by_the_geometric_mean() {
        let cases = [
            (1_000_000_000, 1_000_000_000, Tier::Tiny),
            (3_000_000_000, 3_000_000_000, Tier::Small),
            (8_000_000_000, 8_000_000_000, Tier::Medium),
            (3_300_000_000, 30_500_000_000, Tier::Medium),
            (17_000_000_000, 109_000_000_000, Tier::Large),
            (0, u64::MAX, Tier::Tiny),
        ];
        for (active, total, expected) in cases {
            assert_eq!(Tier::of(active, total), expected, "{active} of {total}");
        }
    }

    #[test]
    fn predictions_need_both_speeds() {
        let vitals = Vitals {
            queue: Duration::from_secs(1),
            prefill_per_s: Some(25.0),
            decode_per_s: Some(5.0),
            ..Vitals::default()
        };
        assert_eq!(vitals.predict(50, 200), Some(Duration::from_secs(43)));
        assert_eq!(Vitals { decode_per_s: None, ..vitals }.predict(50, 200), None);
        assert_eq!(Vitals { decode_per_s: Some(0.0), ..vitals }.predict(50, 200), None);
    }
}
