//! The one vocabulary of every door and every backend.
//!
//! A door turns bytes into [`ChatRequestParts`], the check makes a [`ChatRequest`] of them, a [`Backend`]
//! answers with a [`ChatStream`] of [`ChatEvent`]s. A refusal is the stream's first and only item, and
//! dropping the stream cancels the work.

mod backend;
mod error;
mod event;
mod fault;
mod fusion;
mod message;
mod report;
mod request;
mod score;

pub use backend::{Backend, ModelCard, Router};
pub use error::ChatError;
pub use event::{
    Alternative, ChatEvent, ChatSender, ChatStream, Completion, FinishReason, Reply, ReplyBuilder,
    Timings, TokenLogprob, Usage,
};
pub use fault::{Fault, FaultReason, MemberState};
pub use fusion::{
    AnswerForm, FusionMode, FusionRequest, Include, JudgeChoice, JudgeMethod, MergeStyle, NoQuorum,
};
pub use message::{Message, Role, Tool, ToolCall, ToolChoice};
pub use report::{
    Analysis, FusionProgress, FusionReport, FusionTiming, JudgeReport, MemberReport, MemberUsage,
    ModeUsed, QuorumReport, Scope, SentenceReport,
};
pub use request::{
    ChatRequest, ChatRequestParts, Input, Limits, ModelName, Origin, OutputFormat, Priority,
    RequestId, SamplingParams,
};
pub use score::{BoxFuture, ScoreReply, ScoreRequest};
