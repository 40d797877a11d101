//! What a plan is told and what it says.

use std::time::Duration;

use super::super::answer::Form;
use super::super::member::Tier;
use super::Decision;
use crate::chat::{
    Fault, FaultReason, FinishReason, FusionMode, FusionProgress, JudgeMethod, MergeStyle, NoQuorum,
};

/// What one fusion sets out with.
#[derive(Clone, Debug)]
pub struct Setup {
    /// What the client asked for.
    pub mode: FusionMode,
    /// How a merge is written.
    pub style: MergeStyle,
    /// Rounds of a debate.
    pub rounds: u8,
    /// Usable answers that are enough.
    pub quorum: u8,
    /// All the time there is.
    pub deadline: Duration,
    /// Time for stragglers, if the client set it.
    pub grace: Option<Duration>,
    /// What to do below the quorum.
    pub on_no_quorum: NoQuorum,
    /// The form of the answer.
    pub form: Form,
    /// How to judge.
    pub method: JudgeMethod,
    /// Whether pairs are judged in both orders.
    pub swap: bool,
    /// Who may judge.
    pub judge: Judge,
    /// Who is asked at once.
    pub asks: Vec<Ask>,
    /// Who is asked if connecting to one of those fails, in this order.
    pub spares: Vec<Ask>,
    /// Whether the answers are to be compared sentence by sentence.
    pub analysis: bool,
}

/// What is known of the judge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judge {
    /// At least as strong as every member: it may write.
    Strong,
    /// Weaker than the best member: it may only score.
    Weaker,
    /// Nobody; why.
    Absent(&'static str),
}

/// One question to one member.
#[derive(Clone, Debug, PartialEq)]
pub struct Ask {
    /// Index of the member, for whoever carries the plan out.
    pub member: usize,
    /// Its name in the report.
    pub id: String,
    /// Weight of its vote in thousandths.
    pub weight: u32,
    /// Its strength.
    pub tier: Tier,
    /// The engine of this process.
    pub local: bool,
    /// Asked only so that there is an answer if all others fail; it has no vote.
    pub fallback: bool,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// An attempt said more.
    Text {
        /// Which.
        attempt: usize,
        /// What.
        text: String,
    },
    /// An attempt wants to call a tool.
    Call {
        /// Which.
        attempt: usize,
    },
    /// An attempt has ended by itself.
    Ended {
        /// Which.
        attempt: usize,
        /// How.
        finish: FinishReason,
    },
    /// An attempt has failed.
    Failed {
        /// Which.
        attempt: usize,
        /// Why.
        reason: FaultReason,
    },
    /// The judge has scored a text.
    Scored {
        /// SHA-256 of the text.
        hash: String,
        /// Thousandths of a logit.
        milli: i64,
    },
    /// The judge has compared a pair.
    Compared {
        /// How much better the first is, in thousandths of a logit.
        milli: i64,
    },
    /// The judge cannot go on.
    JudgeFailed {
        /// Why, in one word.
        reason: &'static str,
    },
    /// The judge has written the merge, or as much of it as there was time for.
    Written {
        /// The text.
        text: String,
        /// How it ended.
        finish: FinishReason,
    },
    /// The judge has written nothing.
    NotWritten,
    /// Time has passed.
    Tick,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Start this attempt.
    Ask(usize),
    /// Start this attempt with what was said so far.
    Argue {
        /// The attempt.
        attempt: usize,
        /// The member's own answer.
        own: String,
        /// The others', in canonical order.
        others: Vec<String>,
    },
    /// Close this attempt's stream.
    Drop(usize),
    /// Let the judge score this text.
    Score {
        /// SHA-256 of the text.
        hash: String,
        /// The text.
        text: String,
    },
    /// Let the judge compare these texts.
    Compare {
        /// One.
        first: String,
        /// The other.
        second: String,
    },
    /// Let the judge write a new answer from these, in canonical order.
    Write {
        /// The texts.
        drafts: Vec<String>,
    },
    /// Close the judge's stream; what it has written is the answer.
    StopWriting,
    /// Tell the client.
    Tell(FusionProgress),
    /// That is the answer.
    Decide(Box<Decision>),
    /// There is none.
    Refuse(Fault),
}
