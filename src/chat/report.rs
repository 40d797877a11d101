//! What a fusion tells about itself: progress while it works, and the report that goes with its answer.

use std::time::Duration;

use super::{FaultReason, FusionMode, Include, JudgeMethod, MemberState, Usage};

/// Something that happened while members were answering.
#[derive(Clone, Debug, PartialEq)]
pub enum FusionProgress {
    /// The answer will be less than was asked for.
    Degraded {
        /// Why, in one word.
        reason: &'static str,
    },
    /// A judge begins.
    JudgeStart {
        /// Its member id.
        judge: String,
        /// How it judges.
        method: JudgeMethod,
    },
    /// A member has ended.
    MemberDone {
        /// The member.
        id: String,
        /// How.
        state: MemberState,
        /// Why not better.
        reason: Option<FaultReason>,
        /// Since it was asked.
        elapsed: Duration,
    },
    /// Enough usable answers are there.
    Quorum {
        /// Usable answers.
        usable: u8,
        /// How many were needed.
        needed: u8,
    },
}

/// How the answers really became one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ModeUsed {
    /// The best answer, word for word.
    BestOf,
    /// Arguments, then a vote.
    Debate,
    /// The members' own sentences.
    MergeExtractive,
    /// Written by the judge.
    MergeGenerative,
    /// One member's answer, passed through.
    Single,
    /// The weightiest of equal answers.
    Vote,
}

impl ModeUsed {
    /// The word of the reply object.
    pub fn as_str(self) -> &'static str {
        match self {
            ModeUsed::BestOf => "best_of",
            ModeUsed::Debate => "debate",
            ModeUsed::MergeExtractive => "merge_extractive",
            ModeUsed::MergeGenerative => "merge_generative",
            ModeUsed::Single => "single",
            ModeUsed::Vote => "vote",
        }
    }
}

/// Where a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// In the same house.
    Lan,
    /// In this process.
    Local,
    /// Somewhere else.
    Wan,
}

impl Scope {
    /// The word of the reply object.
    pub fn as_str(self) -> &'static str {
        match self {
            Scope::Lan => "lan",
            Scope::Local => "local",
            Scope::Wan => "wan",
        }
    }
}

/// Everything the reply object tells.
#[derive(Clone, Debug, PartialEq)]
pub struct FusionReport {
    /// Its id, `fx_…`.
    pub id: String,
    /// What was asked for.
    pub mode_requested: FusionMode,
    /// What was done.
    pub mode_used: ModeUsed,
    /// Why that differs.
    pub mode_reason: Option<&'static str>,
    /// The member whose words these are, or begin with.
    pub winner: Option<String>,
    /// Less than was asked for.
    pub degraded: bool,
    /// Usable answers.
    pub quorum: QuorumReport,
    /// All members considered, in the order they were asked.
    pub members: Vec<MemberReport>,
    /// Each distinct answer with its number of votes, the weightiest first.
    pub votes: Vec<(String, u32)>,
    /// The answer's sentences with whom they came from.
    pub sentences: Vec<SentenceReport>,
    /// What a member said against the answer.
    pub dissent: Vec<SentenceReport>,
    /// A comparison of the answers, if it was asked for.
    pub analysis: Option<Analysis>,
    /// Who judged.
    pub judge: Option<JudgeReport>,
    /// Times.
    pub timing: FusionTiming,
    /// Tokens of each member, losers and judge included; whether any of them is an estimate.
    pub usage_by_member: Vec<MemberUsage>,
    /// Keys of the request that meant nothing.
    pub ignored: Vec<String>,
    /// `sha256:` and 64 hexadecimal digits, over everything that decided.
    pub receipt: String,
    /// What of all this the client wants to read.
    pub include: Include,
}

/// How many usable answers there were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QuorumReport {
    /// How many were needed.
    pub needed: u8,
    /// How many there were.
    pub usable: u8,
    /// How many were asked for.
    pub asked: u8,
}

/// One member's part.
#[derive(Clone, Debug, PartialEq)]
pub struct MemberReport {
    /// The member; further samples of one end in `#2`, `#3`, …
    pub id: String,
    /// Where it is.
    pub scope: Scope,
    /// How it ended.
    pub state: MemberState,
    /// Why not better.
    pub reason: Option<FaultReason>,
    /// From asking to its end.
    pub elapsed: Duration,
    /// Tokens of its answer.
    pub tokens: u32,
    /// The number is ours, not the member's.
    pub tokens_estimated: bool,
    /// The judge's score.
    pub score: Option<f64>,
    /// Its weight in the vote.
    pub weight: f64,
    /// Its answer, if it was usable.
    pub text: Option<String>,
}

/// A sentence and whose it is.
#[derive(Clone, Debug, PartialEq)]
pub struct SentenceReport {
    /// The words.
    pub text: String,
    /// The members that said it, or `judge`.
    pub from: Vec<String>,
    /// How many answers say the same.
    pub support: u32,
}

/// A comparison of the answers from their sentences.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Analysis {
    /// What most of the answers say.
    pub consensus: Vec<SentenceReport>,
    /// What stands against each other, in pairs.
    pub contradictions: Vec<(SentenceReport, SentenceReport)>,
    /// What more than one but not most of them say.
    pub partial_coverage: Vec<SentenceReport>,
    /// What only one says.
    pub unique_insights: Vec<SentenceReport>,
    /// What nobody says: it cannot be seen from the answers, so it stays empty.
    pub blind_spots: Vec<String>,
}

/// Who judged, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct JudgeReport {
    /// The judge's member id; `None` if nobody could be used.
    pub model: Option<String>,
    /// How it judged.
    pub method: JudgeMethod,
    /// The version of the question it was asked.
    pub prompt: &'static str,
    /// A pair was judged in both orders.
    pub swapped: bool,
    /// The judge had answered too.
    pub overlaps_panel: bool,
    /// Why the judge that was asked for, or any, was not used.
    pub reason: Option<&'static str>,
}

/// Times of a fusion.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct FusionTiming {
    /// From the start to the end of the last answer that was used.
    pub slowest_used: Duration,
    /// From the start to the answer.
    pub total: Duration,
}

impl FusionTiming {
    /// `total` in units of `slowest_used`.
    pub fn overhead_ratio(&self) -> Option<f64> {
        let slowest = self.slowest_used.as_secs_f64();
        (slowest > 0.0).then(|| self.total.as_secs_f64() / slowest)
    }
}

/// Tokens of one member.
#[derive(Clone, Debug, PartialEq)]
pub struct MemberUsage {
    /// The member.
    pub id: String,
    /// Its tokens, all samples, rounds and judgements together.
    pub usage: Usage,
    /// At least one of the numbers is ours, not the member's.
    pub estimated: bool,
}
