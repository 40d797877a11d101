//! How strong the members are, from items whose truth is known, and from nothing else.
//!
//! Agreement with the majority never counts: it would breed herds. Confidence that a model states of itself is
//! never read.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::answer::Form;
use super::member::Member;
use super::weight::{WRONG_UNCALIBRATED, strength, weight};

/// What is known of the members' strength. Whoever wires the process keeps it in a file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Calibration {
    /// By model (its digest, or the member's id where none is told) and kind of answer.
    pub models: BTreeMap<String, BTreeMap<String, Score>>,
    /// By kind of answer: how often two wrong answers to one item were the same.
    pub wrong: BTreeMap<String, Pairs>,
}

/// Right answers to items of known truth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Score {
    /// Right ones.
    pub right: u32,
    /// All.
    pub asked: u32,
}

/// Pairs of wrong answers of different models to the same item.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pairs {
    /// Those that were equal.
    pub equal: u32,
    /// All.
    pub all: u32,
}

/// A question with its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// What to ask.
    pub question: String,
    /// What is right.
    pub truth: String,
}

/// The answers of several models to one item, as they are compared; `None` where there was none.
#[derive(Clone, Debug)]
pub struct Graded {
    /// What is right, as it is compared.
    pub truth: String,
    /// Model and answer.
    pub answers: Vec<(String, Option<String>)>,
}

impl Calibration {
    /// The name under which a member's strength is kept: equal files are equally strong.
    pub fn model_of(member: &Member) -> &str {
        member.digest.as_deref().unwrap_or(&member.id)
    }

    /// Takes in the answers to one item of known truth.
    pub fn learn(&mut self, kind: &str, graded: &Graded) {
        let mut wrong: Vec<&str> = Vec::new();
        for (model, answer) in &graded.answers {
            let kinds = self.models.entry(model.clone()).or_default();
            let score = kinds.entry(kind.to_owned()).or_default();
            score.asked += 1;
            match answer {
                Some(answer) if *answer == graded.truth => score.right += 1,
                Some(answer) => wrong.push(answer),
                None => {}
            }
        }
        let pairs = self.wrong.entry(kind.to_owned()).or_default();
        for (index, one) in wrong.iter().enumerate() {
            for other in &wrong[index + 1..] {
                pairs.all += 1;
                pairs.equal += u32::from(one == other);
            }
        }
    }

    /// A member's score for a kind of answer.
    pub fn score(&self, member: &Member, kind: &str) -> Score {
        let kinds = self.models.get(Calibration::model_of(member));
        kinds.and_then(|kinds| kinds.get(kind)).copied().unwrap_or_default()
    }

    /// The effective number of wrong answers of this form.
    pub fn wrong_answers(&self, form: &Form) -> f64 {
        let measured = self.wrong.get(form.kind()).filter(|pairs| pairs.all >= PAIRS_MIN);
        let by_measure =
            measured.map(|pairs| f64::from(pairs.all) / f64::from(pairs.equal).max(1.0));
        let known = form.wrong_answers();
        let wrong = match (by_measure, known) {
            (Some(measured), Some(known)) => measured.min(known),
            (Some(measured), None) => measured,
            (None, Some(known)) => known.min(WRONG_UNCALIBRATED),
            (None, None) => WRONG_UNCALIBRATED,
        };
        wrong.clamp(1.0, 10.0)
    }

    /// The weight of a member's vote in thousandths.
    pub fn weight(&self, member: &Member, form: &Form) -> u32 {
        let score = self.score(member, form.kind());
        weight(strength(score.right, score.asked), self.wrong_answers(form))
    }

    /// Whether `one` is stronger than `other`: by measure if both have been measured enough, else by tier.
    pub fn is_stronger(&self, one: &Member, other: &Member, kind: &str) -> bool {
        let (a, b) = (self.score(one, kind), self.score(other, kind));
        if a.asked >= MEASURED_MIN && b.asked >= MEASURED_MIN {
            let margin = 0.05;
            return strength(a.right, a.asked) > strength(b.right, b.asked) + margin;
        }
        one.tier() > other.tier()
    }
}

/// Arithmetic of known truth: `a+b·c+d−e·f` with whole numbers from 0 to 29, the same for the same seed.
pub fn arithmetic(seed: u64, count: usize) -> Vec<Item> {
    let mut state = seed;
    let mut next = move || {
        // SplitMix64: small, and the same everywhere.
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % 30) as i64
    };
    (0..count)
        .map(|_| {
            let [a, b, c, d, e, f] = std::array::from_fn(|_| next());
            Item {
                question: format!("What is {a}+{b}*{c}+{d}-{e}*{f}? Answer with the number alone."),
                truth: (a + b * c + d - e * f).to_string(),
            }
        })
        .collect()
}

/// Fewer pairs of wrong answers say nothing about how often they are equal.
const PAIRS_MIN: u32 = 20;

/// Fewer items say too little about two models to set them against each other.
const MEASURED_MIN: u32 = 30;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat::{AnswerForm, OutputFormat};

    fn form(asked: AnswerForm) -> Form {
        Form::new(&asked, &OutputFormat::Text).expect("valid")
    }

    #[test]
    fn arithmetic_is_right_and_repeats() {
        let items = arithmetic(7, 100);
        assert_eq!(items, arithmetic(7, 100));
        assert_ne!(items, arithmetic(8, 100));
        for item in &items {
            let sum = item.question.trim_start_matches("What is ");
            let sum = sum.split('?').next().expect("a question mark");
            let n: Vec<i64> =
                sum.split(['+', '*', '-']).map(|n| n.parse().expect("a number")).collect();
            let truth = n[0] + n[1] * n[2] + n[3] - n[4] * n[5];
            assert_eq!(item.truth, truth.to_string(), "{sum}");
            assert!(n.iter().all(|n| (0..30).contains(n)));
        }
    }

    #[test]
    fn strength_comes_from_truth_alone() {
        let mut calibration = Calibration::default();
        let graded = |a: &str, b: &str| Graded {
            truth: "4".to_owned(),
            answers: vec![
                ("a".to_owned(), Some(a.to_owned())),
                ("b".to_owned(), Some(b.to_owned())),
            ],
        };
        for _ in 0..30 {
            // They agree, and are wrong.
            calibration.learn("number", &graded("5", "5"));
            calibration.learn("number", &graded("4", "7"));
        }
        assert_eq!(calibration.models["a"]["number"], Score { right: 30, asked: 60 });
        assert_eq!(calibration.models["b"]["number"], Score { right: 0, asked: 60 });
        assert_eq!(calibration.wrong["number"], Pairs { equal: 30, all: 30 });
        assert_eq!(calibration.wrong_answers(&form(AnswerForm::Number)), 1.0);
        assert_eq!(calibration.wrong_answers(&form(AnswerForm::Text)), 2.0);
        let two = AnswerForm::Choice(vec!["on".to_owned(), "off".to_owned()]);
        assert_eq!(calibration.wrong_answers(&form(two)), 1.0);
        let text = serde_json::to_string(&calibration).expect("it serializes");
        assert_eq!(serde_json::from_str::<Calibration>(&text).expect("valid"), calibration);
    }
}
