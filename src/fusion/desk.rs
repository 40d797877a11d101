//! The judge's desk: one question after the other, as answers land.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use super::judge;
use super::member::Member;
use super::plan::Event;
use crate::chat::{
    BoxFuture, ChatError, Message, ModelName, Origin, Priority, RequestId, ScoreRequest, Usage,
};

/// What all questions of one fusion have in common.
#[derive(Clone)]
pub(super) struct Case {
    pub(super) id: RequestId,
    pub(super) client: Arc<str>,
    pub(super) priority: Priority,
    pub(super) messages: Arc<[Message]>,
    pub(super) nonce: Arc<str>,
    pub(super) deadline: Instant,
    pub(super) swap: bool,
}

/// A judge at work. Dropping it cancels what it does.
pub(super) struct Desk {
    judge: Member,
    case: Case,
    waiting: VecDeque<Job>,
    running: Option<BoxFuture<'static, Verdict>>,
    /// What the judge says to an empty answer, once it was asked.
    prior: Option<Vec<[f64; 2]>>,
    usage: Usage,
}

enum Job {
    Point { hash: String, text: String },
    Pair { first: String, second: String },
}

struct Verdict {
    event: Event,
    prior: Option<Vec<[f64; 2]>>,
    usage: Usage,
}

impl Desk {
    pub(super) fn new(judge: Member, case: Case) -> Desk {
        Desk {
            judge,
            case,
            waiting: VecDeque::new(),
            running: None,
            prior: None,
            usage: Usage::default(),
        }
    }

    pub(super) fn judge(&self) -> &Member {
        &self.judge
    }

    /// Tokens read so far.
    pub(super) fn usage(&self) -> Usage {
        self.usage
    }

    pub(super) fn score(&mut self, hash: String, text: String) {
        self.waiting.push_back(Job::Point { hash, text });
    }

    pub(super) fn compare(&mut self, first: String, second: String) {
        self.waiting.push_back(Job::Pair { first, second });
    }

    /// The next verdict.
    pub(super) fn poll(&mut self, context: &mut Context<'_>) -> Poll<Event> {
        if self.running.is_none()
            && let Some(job) = self.waiting.pop_front()
        {
            let clerk = Clerk { judge: self.judge.clone(), case: self.case.clone() };
            self.running = Some(match job {
                Job::Point { hash, text } => Box::pin(clerk.point(hash, text, self.prior.clone())),
                Job::Pair { first, second } => Box::pin(clerk.pair(first, second)),
            });
        }
        let Some(running) = &mut self.running else { return Poll::Pending };
        let Poll::Ready(verdict) = running.as_mut().poll(context) else { return Poll::Pending };
        self.running = None;
        self.usage = add(self.usage, verdict.usage);
        self.prior = verdict.prior.or(self.prior.take());
        Poll::Ready(verdict.event)
    }
}

/// Asks one question; owns what it needs.
struct Clerk {
    judge: Member,
    case: Case,
}

impl Clerk {
    async fn point(self, hash: String, text: String, known: Option<Vec<[f64; 2]>>) -> Verdict {
        let mut usage = Usage::default();
        let judged = async {
            let scores = self.phrasings(&text, &mut usage).await?;
            let prior = match known {
                Some(prior) => prior,
                None => self.phrasings("", &mut usage).await?,
            };
            Ok((judge::point_milli(&scores, &prior), prior))
        };
        let (event, prior) = match judged.await {
            Ok((Some(milli), prior)) => (Event::Scored { hash, milli }, Some(prior)),
            Ok((None, _)) => (Event::JudgeFailed { reason: "judge_failed" }, None),
            Err(error) => (Event::JudgeFailed { reason: reason(&error) }, None),
        };
        Verdict { event, prior, usage }
    }

    async fn pair(self, first: String, second: String) -> Verdict {
        let mut usage = Usage::default();
        let Case { messages, nonce, swap, .. } = &self.case;
        let compared = async {
            let ask = judge::pair(messages, &first, &second, nonce);
            let in_front = self.ask(ask, judge::SLOTS, &mut usage).await?;
            let behind = match swap {
                true => {
                    let ask = judge::pair(messages, &second, &first, nonce);
                    Some(self.ask(ask, judge::SLOTS, &mut usage).await?)
                }
                false => None,
            };
            Ok(judge::pair_milli(in_front, behind))
        };
        let event = match compared.await {
            Ok(Some(milli)) => Event::Compared { milli },
            Ok(None) => Event::JudgeFailed { reason: "judge_failed" },
            Err(error) => Event::JudgeFailed { reason: reason(&error) },
        };
        Verdict { event, prior: None, usage }
    }

    async fn phrasings(&self, text: &str, usage: &mut Usage) -> Result<Vec<[f64; 2]>, ChatError> {
        let mut scores = Vec::with_capacity(judge::PHRASINGS.len());
        for phrasing in judge::PHRASINGS {
            let ask = judge::point(&self.case.messages, text, &self.case.nonce, phrasing);
            scores.push(self.ask(ask, judge::VERDICTS, usage).await?);
        }
        Ok(scores)
    }

    async fn ask(
        &self,
        messages: Vec<Message>,
        candidates: [&str; 2],
        usage: &mut Usage,
    ) -> Result<[f64; 2], ChatError> {
        let request = ScoreRequest {
            id: self.case.id.clone(),
            origin: Origin::Fusion { depth: 1 },
            client: Arc::clone(&self.case.client),
            model: ModelName::new(self.judge.model.as_str()),
            digest: self.judge.digest.as_deref().map(str::to_owned),
            messages,
            candidates: candidates.map(str::to_owned).to_vec(),
            deadline: self.case.deadline,
            priority: self.case.priority,
        };
        let reply = self.judge.backend.score(request).await?;
        let read = Usage {
            prompt_tokens: reply.prompt_tokens,
            cached_tokens: reply.cached_tokens,
            completion_tokens: 0,
        };
        *usage = add(*usage, read);
        match reply.logprobs.as_slice() {
            &[one, other] => Ok([one, other]),
            _ => Err(ChatError::Internal("a judge gave another number of scores".to_owned())),
        }
    }
}

/// Why a judge failed, in one word.
fn reason(error: &ChatError) -> &'static str {
    match error {
        ChatError::NotSupported(_) => "judge_no_logprobs",
        ChatError::NoHeadroom { .. } => "no_headroom",
        ChatError::QueueFull { .. } => "busy",
        ChatError::DeadlineUnmeetable { .. } => "late",
        ChatError::ContextTooLong { .. } => "context_too_long",
        ChatError::Upstream(fault) => fault.reason.as_str(),
        _ => "judge_failed",
    }
}

/// Token counts together.
pub(super) fn add(a: Usage, b: Usage) -> Usage {
    Usage {
        prompt_tokens: a.prompt_tokens.saturating_add(b.prompt_tokens),
        cached_tokens: a.cached_tokens.saturating_add(b.cached_tokens),
        completion_tokens: a.completion_tokens.saturating_add(b.completion_tokens),
    }
}
