//! How another machine can fail while answering for us, as a value.

use std::fmt;
use std::time::Duration;

/// A failure of one upstream answer: what happened, and when asking again may help.
#[derive(Clone, Debug, PartialEq)]
pub struct Fault {
    /// What happened.
    pub reason: FaultReason,
    /// When the upstream said, or we think, that it can be asked again.
    pub retry_after: Option<Duration>,
    /// Whose fault it is and what is known beyond the reason. Our own words, never the upstream's.
    pub detail: String,
}

/// The state of a member after a request, in the words of the reply object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum MemberState {
    /// A whole usable answer.
    Ok,
    /// What came before the end of its time is usable.
    Partial,
    /// Nothing usable came in time.
    Timeout,
    /// It does not want to, or may not, answer this.
    Refused,
    /// It is not on the LAN and nobody allowed it to be asked.
    RefusedWan,
    /// The connection broke.
    Reset,
    /// Its server failed.
    Http5xx,
    /// It has too much to do.
    Busy,
    /// An answer without text.
    Empty,
    /// An answer that is not what its API promises.
    BadJson,
    /// More than the bound on one answer.
    TooLarge,
    /// An answer without the asked-for form.
    Invalid,
    /// Not asked: it has not the memory.
    SkippedRam,
    /// Not asked.
    Skipped,
    /// Its answer was no longer needed.
    Cancelled,
}

/// Why a member did not give a whole answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum FaultReason {
    /// The answer is not what its API promises.
    BadJson,
    /// The breaker is open after repeated failures.
    BreakerOpen,
    /// 429 or 503, or a full queue.
    Busy,
    /// The client has gone.
    ClientGone,
    /// Nobody listens there.
    ConnectRefused,
    /// No connection in time.
    ConnectTimeout,
    /// The deadline passed.
    Deadline,
    /// The others had decided.
    EarlyStop,
    /// No first byte in time.
    FirstByteTimeout,
    /// The grace after the quorum was over.
    GraceOver,
    /// Throttled by heat.
    Hot,
    /// Another status below 500.
    Http4xx,
    /// A status of 500 or more that is not "busy".
    Http5xx(u16),
    /// The asked-for form is missing.
    InvalidFormat,
    /// The token bound came before the end.
    Length,
    /// More requests than the pool can carry.
    Load,
    /// Its memory does not hold the request.
    NoHeadroom,
    /// Too few usable answers, and the request asked for an error then.
    NoQuorum,
    /// Its host name has no address.
    NoSuchHost,
    /// No text at all.
    NoText,
    /// Nothing but reasoning.
    ReasoningOnly,
    /// A redirect, which is never followed.
    Redirect,
    /// The connection broke.
    Reset,
    /// Bytes stopped coming.
    Stall,
    /// The connection could not be made secure.
    Tls,
    /// More than the bound on one answer.
    TooLarge,
    /// It would not be ready in time.
    TooLate,
    /// Nothing but tool calls.
    ToolOnly,
    /// 401 or 403.
    Unauthorized,
    /// Its address is not on the LAN.
    WanAddress,
    /// Its name leads outside the LAN.
    WanDns,
    /// Its model runs somewhere else.
    WanModel,
    /// Two stronger members are asked already.
    WeakBesideStrong,
    /// Nothing but white space.
    Whitespace,
    /// It answered with another model.
    WrongModel,
}

impl Fault {
    /// A fault with nothing to add.
    pub fn new(reason: FaultReason) -> Fault {
        Fault { reason, retry_after: None, detail: String::new() }
    }

    /// A fault of `reason`, explained.
    pub fn explained(reason: FaultReason, detail: impl Into<String>) -> Fault {
        Fault { detail: detail.into(), ..Fault::new(reason) }
    }

    /// When asking again may help: what the upstream said, and a guess where it surely passes by itself.
    pub fn retry_after(&self) -> Option<Duration> {
        let passes = matches!(
            self.reason,
            FaultReason::Busy | FaultReason::Load | FaultReason::NoHeadroom | FaultReason::NoQuorum
        );
        self.retry_after.or(passes.then_some(RETRY_AFTER))
    }

    /// Too much to do; ask again after `retry_after`.
    pub fn busy(retry_after: Duration) -> Fault {
        Fault { retry_after: Some(retry_after), ..Fault::new(FaultReason::Busy) }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.reason.fmt(f)?;
        if !self.detail.is_empty() {
            write!(f, " ({})", self.detail)?;
        }
        Ok(())
    }
}

impl FaultReason {
    /// The state of a member from which, for this reason, nothing usable came.
    pub fn state(self) -> MemberState {
        use FaultReason as R;
        match self {
            R::BadJson => MemberState::BadJson,
            R::Busy => MemberState::Busy,
            R::ClientGone | R::EarlyStop | R::GraceOver => MemberState::Cancelled,
            R::ConnectTimeout | R::Deadline | R::FirstByteTimeout | R::Stall => {
                MemberState::Timeout
            }
            R::ConnectRefused
            | R::Http4xx
            | R::NoQuorum
            | R::NoSuchHost
            | R::Redirect
            | R::Tls
            | R::Unauthorized
            | R::WrongModel => MemberState::Refused,
            R::Http5xx(_) => MemberState::Http5xx,
            R::InvalidFormat => MemberState::Invalid,
            R::Length | R::NoText | R::ReasoningOnly | R::ToolOnly | R::Whitespace => {
                MemberState::Empty
            }
            R::NoHeadroom => MemberState::SkippedRam,
            R::Reset => MemberState::Reset,
            R::TooLarge => MemberState::TooLarge,
            R::BreakerOpen | R::Hot | R::Load | R::TooLate | R::WeakBesideStrong => {
                MemberState::Skipped
            }
            R::WanAddress | R::WanDns | R::WanModel => MemberState::RefusedWan,
        }
    }

    /// The family of the reason, one word for metrics.
    pub fn as_str(self) -> &'static str {
        use FaultReason as R;
        match self {
            R::BadJson => "bad_json",
            R::BreakerOpen => "breaker_open",
            R::Busy => "busy",
            R::ClientGone => "client_gone",
            R::ConnectRefused => "connect_refused",
            R::ConnectTimeout => "connect_timeout",
            R::Deadline => "deadline",
            R::EarlyStop => "early_stop",
            R::FirstByteTimeout => "first_byte_timeout",
            R::GraceOver => "grace_over",
            R::Hot => "hot",
            R::Http4xx => "http_4xx",
            R::Http5xx(_) => "http_5xx",
            R::InvalidFormat => "invalid_format",
            R::Length => "length",
            R::Load => "load",
            R::NoHeadroom => "no_headroom",
            R::NoQuorum => "no_quorum",
            R::NoSuchHost => "no_such_host",
            R::NoText => "no_text",
            R::ReasoningOnly => "reasoning_only",
            R::Redirect => "redirect",
            R::Reset => "reset",
            R::Stall => "stall",
            R::Tls => "tls",
            R::TooLarge => "too_large",
            R::TooLate => "too_late",
            R::ToolOnly => "tool_only",
            R::Unauthorized => "unauthorized",
            R::WanAddress => "wan_address",
            R::WanDns => "wan_dns",
            R::WanModel => "wan_model",
            R::WeakBesideStrong => "weak_beside_strong",
            R::Whitespace => "whitespace",
            R::WrongModel => "wrong_model",
        }
    }

    /// Whether the member itself is at fault, so that its breaker counts it.
    pub fn counts_against(self) -> bool {
        matches!(
            self.state(),
            MemberState::Timeout
                | MemberState::Refused
                | MemberState::Reset
                | MemberState::Http5xx
                | MemberState::BadJson
                | MemberState::TooLarge
        )
    }
}

impl fmt::Display for FaultReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FaultReason::Http5xx(status) => write!(f, "http_{status}"),
            other => f.write_str(other.as_str()),
        }
    }
}

impl MemberState {
    /// The word of the reply object.
    pub fn as_str(self) -> &'static str {
        match self {
            MemberState::Ok => "ok",
            MemberState::Partial => "partial",
            MemberState::Timeout => "timeout",
            MemberState::Refused => "refused",
            MemberState::RefusedWan => "refused_wan",
            MemberState::Reset => "reset",
            MemberState::Http5xx => "http_5xx",
            MemberState::Busy => "busy",
            MemberState::Empty => "empty",
            MemberState::BadJson => "bad_json",
            MemberState::TooLarge => "too_large",
            MemberState::Invalid => "invalid",
            MemberState::SkippedRam => "skipped_ram",
            MemberState::Skipped => "skipped",
            MemberState::Cancelled => "cancelled",
        }
    }
}

/// When to ask a busy upstream again that did not say when.
const RETRY_AFTER: Duration = Duration::from_secs(2);
