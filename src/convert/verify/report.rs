//! What a comparison found, the limits, and the verdict.

use serde::Serialize;

/// The limits of the gate.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Gate {
    /// How much perplexity may rise, in percent.
    pub perplexity_rise_percent: f64,
    /// How much the rate of exactly right tool calls may fall, in points.
    pub calls_drop_points: f64,
    /// How many answers that set out to be JSON must be valid, in percent.
    pub json_valid_percent: f64,
}

impl Default for Gate {
    fn default() -> Gate {
        Gate { perplexity_rise_percent: 2.0, calls_drop_points: 2.0, json_valid_percent: 99.0 }
    }
}

/// One of the models.
#[derive(Clone, Debug, Serialize)]
pub struct Subject {
    pub path: String,
    pub name: String,
    pub architecture: String,
    /// The prevailing format of its weights.
    pub quantization: String,
    pub bytes: u64,
}

/// So many of so many.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Share {
    pub count: usize,
    pub of: usize,
}

impl Share {
    pub(super) fn new(count: usize, of: usize) -> Share {
        Share { count, of }
    }

    /// In percent; `None` of nothing.
    pub fn percent(&self) -> Option<f64> {
        (self.of > 0).then(|| 100.0 * self.count as f64 / self.of as f64)
    }
}

/// Divergence of the file's distributions from the reference's, in nats.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Divergence {
    pub mean: f64,
    pub median: f64,
    pub p99: f64,
    pub max: f64,
    /// Mean probability of the tokens that were compared as one; what they differ among themselves is missing
    /// from the divergence.
    pub mean_tail: f64,
}

/// Perplexity of both at the same positions.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Perplexity {
    pub reference: f64,
    pub file: f64,
    pub rise_percent: f64,
    /// Of the rise, from the differences position by position, taken as independent.
    pub standard_error_percent: f64,
}

/// How alike both are at some positions.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Likeness {
    pub positions: usize,
    pub perplexity: Perplexity,
    pub divergence: Divergence,
    /// Positions where both find the same token likeliest.
    pub same_top: Share,
}

/// One prompt and the reference's greedy answer to it, which the file read too.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PromptReport {
    pub prompt: String,
    pub answer: String,
    pub mean_divergence: f64,
    /// Largest difference of the log-probabilities of the answer's tokens.
    pub max_difference: f64,
    pub same_top: Share,
}

/// The answers to the requests.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ToolCalls {
    pub requests: usize,
    /// Of the requests that want calls.
    pub reference_exact: Share,
    pub file_exact: Share,
    /// Right in the reference, wrong in the file; and the other way round.
    pub lost: usize,
    pub gained: usize,
    /// McNemar's exact test on these two.
    pub p_value: f64,
    /// Of the answers that set out to be JSON.
    pub reference_json_valid: Share,
    pub file_json_valid: Share,
    /// Of the requests that want text: the same words.
    pub reference_texts: Share,
    pub file_texts: Share,
}

/// A request that only one of the models answered rightly, or that the file answered with broken JSON.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// The user's last words.
    pub request: String,
    pub expected: String,
    pub reference: String,
    pub file: String,
    /// Right in the reference, wrong in the file.
    pub lost: bool,
    /// The file's answer set out to be JSON and is none.
    pub broken_json: bool,
}

/// One condition of the gate.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Check {
    pub name: &'static str,
    pub value: Option<f64>,
    pub limit: f64,
    pub passed: bool,
    /// What a reader should know about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// The whole comparison.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub file: Subject,
    pub reference: Subject,
    /// How activations and cache were rounded, in both.
    pub arithmetic: &'static str,
    /// On the text, if one was given.
    pub text: Option<Likeness>,
    /// On the expected answers.
    pub answers: Option<Likeness>,
    /// On the reference's answers to the prompts.
    pub prompts: Option<Likeness>,
    pub each_prompt: Vec<PromptReport>,
    pub calls: ToolCalls,
    pub differences: Vec<Difference>,
    pub gate: Vec<Check>,
    pub passed: bool,
    pub seconds: f64,
}

/// The verdict on what was found.
pub(super) fn judge(
    gate: &Gate,
    text: Option<&Likeness>,
    answers: Option<&Likeness>,
    calls: &ToolCalls,
) -> Vec<Check> {
    let (name, likeness) = match text {
        Some(text) => ("perplexity rise on the text, percent", Some(text)),
        None => ("perplexity rise on expected answers, percent", answers),
    };
    let perplexity = likeness.map(|likeness| likeness.perplexity);
    let rise = perplexity.map(|perplexity| perplexity.rise_percent);
    let drop = calls.reference_exact.percent().zip(calls.file_exact.percent());
    let drop = drop.map(|(reference, file)| reference - file);
    vec![
        Check {
            name,
            value: rise,
            limit: gate.perplexity_rise_percent,
            // A number that is none does not pass.
            passed: rise.is_none_or(|rise| rise <= gate.perplexity_rise_percent),
            note: perplexity.and_then(|perplexity| near(&perplexity, gate)),
        },
        Check {
            name: "exact tool calls lost, points",
            value: drop,
            limit: gate.calls_drop_points,
            passed: drop.is_none_or(|drop| drop <= gate.calls_drop_points),
            note: calls_note(calls),
        },
        json_check(gate, calls),
    ]
}

/// A file cannot be asked for more than its source has: where that misses the limit, the file may miss it by as
/// many points more as calls may be lost.
fn json_check(gate: &Gate, calls: &ToolCalls) -> Check {
    let valid = calls.file_json_valid.percent();
    let of_reference = calls.reference_json_valid.percent();
    let reference_misses = of_reference.filter(|&percent| percent < gate.json_valid_percent);
    let limit = match reference_misses {
        Some(percent) => percent - gate.calls_drop_points,
        None => gate.json_valid_percent,
    };
    let note = match (valid, reference_misses) {
        (None, _) => Some("no answer set out to be JSON".to_owned()),
        (_, Some(percent)) => Some(format!(
            "the reference itself has {percent:.1}, below {}: the limit follows it",
            gate.json_valid_percent
        )),
        _ => None,
    };
    let name = "valid JSON, percent";
    Check { name, value: valid, limit, passed: valid.is_none_or(|valid| valid >= limit), note }
}

/// Where chance could have decided.
fn near(perplexity: &Perplexity, gate: &Gate) -> Option<String> {
    let distance = (perplexity.rise_percent - gate.perplexity_rise_percent).abs();
    (distance < 2.0 * perplexity.standard_error_percent)
        .then(|| "within two standard errors of the limit: a longer text would decide".to_owned())
}

fn calls_note(calls: &ToolCalls) -> Option<String> {
    if calls.reference_exact.of == 0 {
        return Some("no request wants a call".to_owned());
    }
    if calls.reference_exact.count == 0 {
        return Some("the reference gets none right, so this says nothing: give --requests that suit the model".to_owned());
    }
    let point = calls.reference_exact.of as f64 / 100.0;
    (point < 1.0).then(|| format!("one request is {:.1} points", 1.0 / point))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn calls(reference: usize, file: usize, valid: usize) -> ToolCalls {
        let of = |count| Share::new(count, 200);
        ToolCalls {
            requests: 200,
            reference_exact: of(reference),
            file_exact: of(file),
            lost: reference - file.min(reference),
            gained: 0,
            p_value: 1.0,
            reference_json_valid: of(200),
            file_json_valid: of(valid),
            reference_texts: Share::new(0, 0),
            file_texts: Share::new(0, 0),
        }
    }

    fn likeness(rise_percent: f64) -> Likeness {
        let divergence = Divergence { mean: 0.0, median: 0.0, p99: 0.0, max: 0.0, mean_tail: 0.0 };
        let perplexity =
            Perplexity { reference: 10.0, file: 10.0, rise_percent, standard_error_percent: 0.1 };
        let same_top = Share::new(9, 10);
        Likeness { positions: 10, perplexity, divergence, same_top }
    }

    fn passed(text: Option<f64>, answers: f64, calls: &ToolCalls) -> Vec<bool> {
        let (text, answers) = (text.map(likeness), likeness(answers));
        let checks = judge(&Gate::default(), text.as_ref(), Some(&answers), calls);
        checks.iter().map(|check| check.passed).collect()
    }

    #[test]
    fn limits_are_inclusive_and_each_counts() {
        let good = calls(150, 146, 198);
        assert_eq!(passed(Some(2.0), 9.0, &good), [true, true, true]);
        assert_eq!(passed(Some(2.1), 0.0, &good), [false, true, true]);
        assert_eq!(passed(None, 2.1, &good), [false, true, true], "answers stand in for a text");
        assert_eq!(passed(Some(-1.0), 0.0, &calls(150, 145, 198)), [true, false, true]);
        assert_eq!(passed(Some(f64::NAN), 0.0, &calls(150, 150, 197)), [false, true, false]);
    }

    #[test]
    fn where_the_reference_breaks_json_the_file_may_too() {
        let passed = |reference: usize, file: usize| {
            let mut calls = calls(150, 150, file);
            calls.reference_json_valid.count = reference;
            let checks = judge(&Gate::default(), None, None, &calls);
            (checks[2].passed, checks[2].note.is_some())
        };
        assert_eq!(passed(198, 198), (true, false));
        assert_eq!(passed(198, 197), (false, false), "99 % is reached by the reference");
        assert_eq!(passed(160, 156), (true, true));
        assert_eq!(passed(160, 155), (false, true));
    }

    #[test]
    fn what_says_little_is_noted() {
        let note = |calls: &ToolCalls| judge(&Gate::default(), None, None, calls)[1].note.clone();
        assert!(note(&calls(0, 0, 200)).unwrap().contains("none right"));
        assert_eq!(note(&calls(150, 150, 200)), None);
        let mut few = calls(0, 0, 200);
        (few.reference_exact, few.file_exact) = (Share::new(9, 10), Share::new(9, 10));
        assert_eq!(note(&few).unwrap(), "one request is 10.0 points");
    }
}
