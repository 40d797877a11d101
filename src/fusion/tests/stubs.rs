//! Doubles: members and judges whose answers and times are given.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::{Instant, sleep};

use crate::chat::{
    Backend, BoxFuture, ChatError, ChatEvent, ChatRequest, ChatRequestParts, ChatStream,
    Completion, Fault, FaultReason, FinishReason, FusionReport, FusionRequest, Input, Message,
    ModelCard, ModelName, Origin, Reply, Role, Scope, ScoreReply, ScoreRequest, Timings, Usage,
};
use crate::fusion::{
    Calibration, Fusion, FusionParts, Member, MemberKind, Roster, ScoreKind, Settings, Tier, Vitals,
};
use crate::metrics::Metrics;

/// What a stub does when it is asked.
#[derive(Clone)]
pub(super) enum Act {
    /// Waits, says a text, ends.
    Says(Duration, String),
    /// Says a word every so often and never ends, whatever the deadline.
    Drips(Duration, &'static str),
    /// Waits, says something, and breaks.
    Breaks(Duration, &'static str, FaultReason),
    /// Fails after a while.
    Fails(Duration, FaultReason),
    /// Never says anything.
    Hangs,
    /// Says megabytes.
    Floods,
}

/// What a stub has seen.
#[derive(Default)]
pub(super) struct Seen {
    /// The conversations it was asked, in order.
    pub(super) prompts: Mutex<Vec<Vec<Message>>>,
    /// When its streams were closed before their end.
    pub(super) closed: Mutex<Vec<Instant>>,
    /// Time it has spent scoring.
    pub(super) judged: Mutex<Duration>,
    /// What it was asked to score.
    pub(super) scored: Mutex<Vec<Vec<Message>>>,
}

type Answers = dyn Fn(usize, &ChatRequestParts) -> Act + Send + Sync;
type Judges = dyn Fn(&ScoreRequest, usize) -> (Duration, Vec<f64>) + Send + Sync;

/// A member that does what it is told.
pub(super) struct Stub {
    answers: Box<Answers>,
    judges: Option<Box<Judges>>,
    usage: Option<Usage>,
    pub(super) seen: Arc<Seen>,
}

pub(super) fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

impl Stub {
    pub(super) fn acts(
        answers: impl Fn(usize, &ChatRequestParts) -> Act + Send + Sync + 'static,
    ) -> Stub {
        Stub { answers: Box::new(answers), judges: None, usage: None, seen: Arc::default() }
    }

    pub(super) fn does(act: Act) -> Stub {
        Stub::acts(move |_, _| act.clone())
    }

    pub(super) fn says(after_ms: u64, text: &str) -> Stub {
        Stub::does(Act::Says(ms(after_ms), text.to_owned()))
    }

    pub(super) fn judging(
        mut self,
        judges: impl Fn(&ScoreRequest, usize) -> (Duration, Vec<f64>) + Send + Sync + 'static,
    ) -> Stub {
        self.judges = Some(Box::new(judges));
        self
    }

    pub(super) fn reporting(mut self, prompt_tokens: u32, completion_tokens: u32) -> Stub {
        self.usage = Some(Usage { prompt_tokens, cached_tokens: 0, completion_tokens });
        self
    }
}

impl Backend for Stub {
    fn models(&self) -> Vec<ModelCard> {
        Vec::new()
    }

    fn chat(&self, request: ChatRequest) -> ChatStream {
        let parts = request.into_parts();
        let number = {
            let mut prompts = self.seen.prompts.lock().unwrap_or_else(PoisonError::into_inner);
            let Input::Messages(messages) = &parts.input else { panic!("members get messages") };
            prompts.push(messages.clone());
            prompts.len() - 1
        };
        let act = (self.answers)(number, &parts);
        let usage = self.usage.unwrap_or_default();
        let seen = Arc::clone(&self.seen);
        let (sender, stream) = ChatStream::channel(4);
        tokio::spawn(async move {
            let delta =
                |text: &str| ChatEvent::Delta { text: text.to_owned(), logprobs: Vec::new() };
            let done = ChatEvent::Done(Completion {
                finish: FinishReason::Stop,
                usage,
                timings: Timings::default(),
                fusion: None,
            });
            let fault = |reason| Err(ChatError::Upstream(Fault::new(reason)));
            let play = async {
                match act {
                    Act::Says(after, text) => {
                        sleep(after).await;
                        let _ = sender.send(Ok(delta(&text))).await;
                        let _ = sender.send(Ok(done)).await;
                    }
                    Act::Drips(every, word) => loop {
                        sleep(every).await;
                        let _ = sender.send(Ok(delta(word))).await;
                    },
                    Act::Breaks(after, text, reason) => {
                        sleep(after).await;
                        let _ = sender.send(Ok(delta(text))).await;
                        let _ = sender.send(fault(reason)).await;
                    }
                    Act::Fails(after, reason) => {
                        sleep(after).await;
                        let _ = sender.send(fault(reason)).await;
                    }
                    Act::Hangs => std::future::pending().await,
                    Act::Floods => loop {
                        let _ = sender.send(Ok(delta(&"flood ".repeat(4096)))).await;
                    },
                }
            };
            tokio::select! {
                biased;
                () = sender.closed() => {
                    seen.closed.lock().unwrap_or_else(PoisonError::into_inner).push(Instant::now());
                }
                () = play => {}
            }
        });
        stream
    }

    fn score(&self, request: ScoreRequest) -> BoxFuture<'_, Result<ScoreReply, ChatError>> {
        Box::pin(async move {
            let Some(judges) = &self.judges else {
                return Err(ChatError::NotSupported("no scores here".to_owned()));
            };
            let number = {
                let mut scored = self.seen.scored.lock().unwrap_or_else(PoisonError::into_inner);
                scored.push(request.messages.clone());
                scored.len() - 1
            };
            let (takes, logprobs) = judges(&request, number);
            sleep(takes).await;
            *self.seen.judged.lock().unwrap_or_else(PoisonError::into_inner) += takes;
            Ok(ScoreReply {
                tokens: vec![1; logprobs.len()],
                logprobs,
                prompt_tokens: 50,
                cached_tokens: 0,
                digest: String::new(),
            })
        })
    }
}

/// A pool of stubs under the names `m0`, `m1`, …; the first may be the local one.
pub(super) struct Pool {
    pub(super) fusion: Fusion,
    pub(super) seen: Vec<Arc<Seen>>,
    pub(super) metrics: Arc<Metrics>,
}

struct Fixed(Vec<Member>);

impl Roster for Fixed {
    fn members(&self) -> Vec<Member> {
        self.0.clone()
    }
}

/// A member of the usual kind.
pub(super) fn member(index: usize, stub: Stub) -> Member {
    let score = if stub.judges.is_some() { ScoreKind::Exact } else { ScoreKind::None };
    Member {
        id: format!("m{index}").into(),
        kind: MemberKind::Scoutd,
        scope: Scope::Lan,
        model: ModelName::new("model"),
        digest: Some(format!("digest {index}").into()),
        parameters: None,
        tier: Some(Tier::Small),
        score,
        max_in_flight: None,
        vitals: Vitals::default(),
        backend: Arc::new(stub),
    }
}

pub(super) fn local(stub: Stub) -> Member {
    Member {
        id: "local/nano".into(),
        kind: MemberKind::Local,
        scope: Scope::Local,
        ..member(0, stub)
    }
}

pub(super) fn pool_of(members: Vec<(Member, Arc<Seen>)>, calibration: Calibration) -> Pool {
    let (members, seen) = members.into_iter().unzip();
    let metrics = Arc::new(Metrics::new());
    let fusion = Fusion::new(FusionParts {
        settings: Settings::default(),
        roster: Arc::new(Fixed(members)),
        calibration,
        metrics: Arc::clone(&metrics),
        runtime: Handle::current(),
    });
    Pool { fusion, seen, metrics }
}

pub(super) fn pool(stubs: Vec<Stub>) -> Pool {
    let members = stubs.into_iter().enumerate().map(|(index, stub)| {
        let seen = Arc::clone(&stub.seen);
        (member(index, stub), seen)
    });
    pool_of(members.collect(), Calibration::default())
}

/// A question with ten minutes' patience and these options.
pub(super) fn question(change: impl FnOnce(&mut FusionRequest)) -> ChatRequestParts {
    let input = Input::Messages(vec![Message::text(Role::User, "Is the lamp on?")]);
    let deadline = Instant::now().into_std() + Duration::from_secs(600);
    let mut parts = ChatRequestParts::new(Origin::Terminal, "client", input, deadline);
    parts.model = ModelName::new("fusion");
    parts.sampling.temperature = 0.0;
    let mut options = FusionRequest::default();
    change(&mut options);
    parts.fusion = Some(Box::new(options));
    parts
}

impl Pool {
    pub(super) async fn reply(&self, parts: ChatRequestParts) -> Result<Reply, ChatError> {
        self.fusion.chat(ChatRequest::try_from(parts)?).collect().await
    }

    pub(super) async fn ask(&self, change: impl FnOnce(&mut FusionRequest)) -> Reply {
        self.reply(question(change)).await.expect("it is answered")
    }
}

pub(super) fn report(reply: &Reply) -> &FusionReport {
    reply.completion.fusion.as_deref().expect("a fusion reports")
}

/// Judges by a number for each text: the log-odds of "Yes", or in pairs the difference.
pub(super) fn by_quality(
    quality: impl Fn(&str) -> f64 + Send + Sync + 'static,
    takes: Duration,
) -> impl Fn(&ScoreRequest, usize) -> (Duration, Vec<f64>) + Send + Sync + 'static {
    move |request, _| {
        let answers = answers_in(request);
        let odds = match answers.as_slice() {
            [one] => quality(one),
            [one, other] => quality(one) - quality(other),
            _ => 0.0,
        };
        (takes, vec![odds / 2.0, -odds / 2.0])
    }
}

/// The answers that a judge is shown.
pub(super) fn answers_in(request: &ScoreRequest) -> Vec<String> {
    let text = &request.messages[1].content;
    text.split("<<ANSWER")
        .skip(1)
        .map(|part| {
            let body = part.split_once(">>\n").map_or("", |(_, body)| body);
            body.split("\n<<END").next().unwrap_or("").to_owned()
        })
        .collect()
}
