//! What a request may ask of a fusion of several models.

use std::time::Duration;

use regex::{Regex, RegexBuilder};

use super::ChatError;

/// The options of a fusion request. They are checked with the request that carries them.
#[derive(Clone, Debug, PartialEq)]
pub struct FusionRequest {
    /// How the answers become one.
    pub mode: FusionMode,
    /// How a merge is written.
    pub style: MergeStyle,
    /// Rounds of a debate.
    pub rounds: u8,
    /// Members that may be asked, by id or with `*` at an end; empty is all.
    pub members: Vec<String>,
    /// How many are asked; `None` is up to three.
    pub n: Option<u8>,
    /// Answers taken from each.
    pub samples: u8,
    /// Usable answers that are enough; `None` is two, or one if one is asked.
    pub quorum: Option<u8>,
    /// Time for everything; `None` is the request's own deadline or a prediction.
    pub deadline: Option<Duration>,
    /// Time for stragglers after the quorum; `None` is a share of the time it took.
    pub grace: Option<Duration>,
    /// What to do below the quorum.
    pub on_no_quorum: NoQuorum,
    /// What kind of answer is expected.
    pub answer: AnswerForm,
    /// Who judges, and how.
    pub judge: JudgeChoice,
    /// What of the answers the report repeats.
    pub include: Include,
    /// Whether the report compares the answers sentence by sentence.
    pub analysis: bool,
    /// Progress as named events instead of comments.
    pub events: bool,
    /// Seed of the first sample; the next ones count up.
    pub seed: Option<u64>,
    /// Keys that were accepted for compatibility and mean nothing here.
    pub ignored: Vec<String>,
}

impl Default for FusionRequest {
    fn default() -> FusionRequest {
        FusionRequest {
            mode: FusionMode::Auto,
            style: MergeStyle::Auto,
            rounds: 1,
            members: Vec::new(),
            n: None,
            samples: 1,
            quorum: None,
            deadline: None,
            grace: None,
            on_no_quorum: NoQuorum::BestAvailable,
            answer: AnswerForm::Text,
            judge: JudgeChoice::default(),
            include: Include::Summary,
            analysis: false,
            events: false,
            seed: None,
            ignored: Vec::new(),
        }
    }
}

/// How the answers of the members become one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum FusionMode {
    /// A vote if the answer is closed, else the best one.
    #[default]
    Auto,
    /// The best answer, word for word.
    BestOf,
    /// One round of arguments, then a vote.
    Debate,
    /// Sentences of several answers.
    Merge,
}

/// How a merge is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum MergeStyle {
    /// Extractive unless the judge is at least as strong as the best member.
    #[default]
    Auto,
    /// The members' own sentences.
    Extractive,
    /// Written anew by the judge.
    Generative,
}

/// What to do when too few answers are usable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum NoQuorum {
    /// The best of what there is.
    #[default]
    BestAvailable,
    /// Refuse.
    Error,
    /// The local model's answer.
    Local,
}

/// The kind of answer, which decides what counts as the same one.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum AnswerForm {
    /// One of these.
    Choice(Vec<String>),
    /// A JSON value.
    Json,
    /// A number.
    Number,
    /// What the first group of the pattern's last match says.
    Regex(String),
    /// Any text.
    #[default]
    Text,
}

/// Who judges, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct JudgeChoice {
    /// `auto`, `local`, or a member's id.
    pub model: String,
    /// How.
    pub method: JudgeMethod,
    /// Whether pairs are judged in both orders.
    pub swap: bool,
}

impl Default for JudgeChoice {
    fn default() -> JudgeChoice {
        JudgeChoice { model: "auto".to_owned(), method: JudgeMethod::Auto, swap: true }
    }
}

/// How a judge judges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum JudgeMethod {
    /// By log-probabilities, and close pairs by comparison.
    #[default]
    Auto,
    /// Each answer for itself, by the log-probabilities of "Yes" and "No".
    Logprob,
    /// Not at all: the strongest member's answer.
    None,
    /// Two answers against each other.
    Pairwise,
    /// Not at all: the weights of equal answers add up.
    Vote,
}

/// What of the answers the report repeats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Include {
    /// Every member's text.
    Answers,
    /// No report.
    None,
    /// Every sentence with whom it came from.
    Sentences,
    /// Members, votes, times.
    #[default]
    Summary,
}

impl FusionRequest {
    /// Most answers of one request: members times samples.
    pub const ANSWERS_MAX: u8 = 8;

    /// Most rounds of a debate.
    pub const ROUNDS_MAX: u8 = 2;

    /// Most choices of a closed answer.
    pub const CHOICES_MAX: usize = 64;

    /// # Errors
    /// `Invalid`, naming the field.
    pub(super) fn check(&self) -> Result<(), ChatError> {
        let answers_max = u64::from(FusionRequest::ANSWERS_MAX);
        between("fusion.rounds", self.rounds.into(), 1, FusionRequest::ROUNDS_MAX.into())?;
        between("fusion.samples", self.samples.into(), 1, answers_max)?;
        if let Some(n) = self.n {
            between("fusion.n", n.into(), 1, answers_max)?;
        }
        if let Some(quorum) = self.quorum {
            between("fusion.quorum", quorum.into(), 1, answers_max)?;
        }
        let asked = self.n.map(|n| n.saturating_mul(self.samples));
        if let Some(asked) = asked {
            between("fusion.samples", asked.into(), 1, answers_max).map_err(|_| {
                let message =
                    format!("fusion.n times fusion.samples must be at most {answers_max}");
                ChatError::invalid("fusion.samples", message)
            })?;
            if self.quorum.is_some_and(|quorum| quorum > asked) {
                let message =
                    format!("fusion.quorum must be at most the {asked} answers asked for");
                return Err(ChatError::invalid("fusion.quorum", message));
            }
        }
        if self.members.len() > 64 || self.members.iter().any(|id| id.is_empty() || id.len() > 256)
        {
            let message = "fusion.members must be at most 64 names of 1 to 256 bytes";
            return Err(ChatError::invalid("fusion.members", message));
        }
        if self.judge.model.is_empty() || self.judge.model.len() > 256 {
            let message = "fusion.judge.model must be \"auto\", \"local\" or a member's name";
            return Err(ChatError::invalid("fusion.judge.model", message));
        }
        self.answer.check()
    }
}

impl AnswerForm {
    /// The compiled pattern of a [`AnswerForm::Regex`].
    ///
    /// # Errors
    /// `Invalid` if it is not a regular expression of bearable size.
    pub fn compiled(pattern: &str) -> Result<Regex, ChatError> {
        const FIELD: &str = "fusion.answer.pattern";
        if pattern.is_empty() || pattern.len() > 1024 {
            return Err(ChatError::invalid(FIELD, format!("{FIELD} must have 1 to 1024 bytes")));
        }
        RegexBuilder::new(pattern).size_limit(1 << 20).build().map_err(|_| {
            ChatError::invalid(FIELD, format!("{FIELD} is not a regular expression we can run"))
        })
    }

    fn check(&self) -> Result<(), ChatError> {
        const FIELD: &str = "fusion.answer.choices";
        match self {
            AnswerForm::Choice(choices) => {
                let fits = (2..=FusionRequest::CHOICES_MAX).contains(&choices.len());
                let short = choices.iter().all(|choice| (1..=256).contains(&choice.trim().len()));
                if fits && short {
                    return Ok(());
                }
                let max = FusionRequest::CHOICES_MAX;
                let message = format!("{FIELD} must be 2 to {max} texts of 1 to 256 bytes");
                Err(ChatError::invalid(FIELD, message))
            }
            AnswerForm::Regex(pattern) => AnswerForm::compiled(pattern).map(drop),
            AnswerForm::Json | AnswerForm::Number | AnswerForm::Text => Ok(()),
        }
    }

    /// The word for this form.
    pub fn as_str(&self) -> &'static str {
        match self {
            AnswerForm::Choice(_) => "choice",
            AnswerForm::Json => "json",
            AnswerForm::Number => "number",
            AnswerForm::Regex(_) => "regex",
            AnswerForm::Text => "text",
        }
    }
}

impl FusionMode {
    /// The word for this mode.
    pub fn as_str(self) -> &'static str {
        match self {
            FusionMode::Auto => "auto",
            FusionMode::BestOf => "best_of",
            FusionMode::Debate => "debate",
            FusionMode::Merge => "merge",
        }
    }
}

impl JudgeMethod {
    /// The word for this method.
    pub fn as_str(self) -> &'static str {
        match self {
            JudgeMethod::Auto => "auto",
            JudgeMethod::Logprob => "logprob",
            JudgeMethod::None => "none",
            JudgeMethod::Pairwise => "pairwise",
            JudgeMethod::Vote => "vote",
        }
    }
}

fn between(field: &str, value: u64, min: u64, max: u64) -> Result<(), ChatError> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(ChatError::invalid(field, format!("{field} must be between {min} and {max}, not {value}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(change: impl FnOnce(&mut FusionRequest)) -> String {
        let mut request = FusionRequest::default();
        change(&mut request);
        request.check().expect_err("the change makes it invalid").to_string()
    }

    #[test]
    fn refusals_name_the_field() {
        assert!(FusionRequest::default().check().is_ok());
        let n = refusal(|r| r.n = Some(9));
        assert_eq!(n, "fusion.n must be between 1 and 8, not 9");
        let many = refusal(|r| (r.n, r.samples) = (Some(3), 3));
        assert_eq!(many, "fusion.n times fusion.samples must be at most 8");
        let quorum = refusal(|r| (r.n, r.quorum) = (Some(2), Some(3)));
        assert_eq!(quorum, "fusion.quorum must be at most the 2 answers asked for");
        let rounds = refusal(|r| r.rounds = 3);
        assert_eq!(rounds, "fusion.rounds must be between 1 and 2, not 3");
        for pattern in ["", "(", "a{1000}{1000}"] {
            let text = refusal(|r| r.answer = AnswerForm::Regex(pattern.to_owned()));
            assert!(text.starts_with("fusion.answer.pattern"), "{text}");
        }
        let one = refusal(|r| r.answer = AnswerForm::Choice(vec!["on".to_owned()]));
        assert!(one.starts_with("fusion.answer.choices"), "{one}");
    }
}
