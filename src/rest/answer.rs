//! From requests to an answer: whole, or as a body that streams.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime};

use actix_web::body::{BodySize, MessageBody};
use actix_web::web::Bytes;
use tokio::time::{Instant, Sleep};

use super::active::ActiveGuard;
use super::error::Problem;
use crate::chat::{
    Backend, ChatError, ChatEvent, ChatRequest, ChatStream, Reply, ReplyBuilder, Router,
};
use crate::wire::StreamWriter;

/// What a handler of an endpoint that answers comes back with.
pub(super) enum Answer {
    /// One JSON object.
    Whole(Vec<u8>),
    /// Events as they come.
    Stream(Box<EventBody>),
}

/// Several requests of one client: a few run at once, their events interleave.
pub(super) struct Jobs {
    router: Router,
    waiting: VecDeque<(usize, ChatRequest)>,
    running: Vec<(usize, ChatStream)>,
    /// Where the next look begins, so that no stream is favoured.
    turn: usize,
    choices: usize,
}

/// How many requests of one client's request run at once.
const AT_ONCE: usize = 4;

impl Jobs {
    /// Starts the first of `requests`; their places in the list are their choices' indices.
    pub(super) fn start(router: &Router, requests: Vec<ChatRequest>) -> Jobs {
        let choices = requests.len();
        let mut jobs = Jobs {
            router: router.clone(),
            waiting: requests.into_iter().enumerate().collect(),
            running: Vec::with_capacity(AT_ONCE.min(choices)),
            turn: 0,
            choices,
        };
        jobs.refill();
        jobs
    }

    /// The events that are there when the first one is: if any of them is a refusal, that is the answer.
    pub(super) async fn first(&mut self) -> Result<VecDeque<(usize, ChatEvent)>, Problem> {
        let mut events = VecDeque::new();
        std::future::poll_fn(|context| {
            for _ in 0..self.running.len() {
                match self.poll_next(context) {
                    Poll::Ready(Some((index, Ok(event)))) => events.push_back((index, event)),
                    Poll::Ready(Some((_, Err(error)))) => return Poll::Ready(Err(error)),
                    Poll::Ready(None) | Poll::Pending => break,
                }
            }
            if events.is_empty() { Poll::Pending } else { Poll::Ready(Ok(())) }
        })
        .await
        .map_err(Problem::of_backend)?;
        Ok(events)
    }

    /// Reads to the end; the replies in the order of the choices.
    pub(super) async fn collect(mut self) -> Result<Vec<Reply>, Problem> {
        let mut builders: Vec<_> = (0..self.choices).map(|_| ReplyBuilder::default()).collect();
        let mut replies = vec![None; self.choices];
        while let Some((index, event)) =
            std::future::poll_fn(|context| self.poll_next(context)).await
        {
            if let Some(reply) = builders[index].add(event.map_err(Problem::of_backend)?) {
                replies[index] = Some(reply);
            }
        }
        replies
            .into_iter()
            .map(|reply| {
                let missing = || ChatError::Internal("a choice is missing".to_owned());
                reply.ok_or_else(|| missing().into())
            })
            .collect()
    }

    fn refill(&mut self) {
        while self.running.len() < AT_ONCE
            && let Some((index, request)) = self.waiting.pop_front()
        {
            self.running.push((index, self.router.chat(request)));
        }
    }

    /// The next event of any choice; `None` after the last one's `Done`.
    fn poll_next(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Option<(usize, Result<ChatEvent, ChatError>)>> {
        if self.running.is_empty() {
            return Poll::Ready(None);
        }
        for step in 0..self.running.len() {
            let at = (self.turn + step) % self.running.len();
            let (index, stream) = &mut self.running[at];
            let index = *index;
            let Poll::Ready(item) = stream.poll_next(context) else { continue };
            self.turn = at + 1;
            let item = item.unwrap_or_else(|| {
                Err(ChatError::Internal("the answer broke off without an end".to_owned()))
            });
            if !matches!(item, Ok(ref event) if !matches!(event, ChatEvent::Done(_))) {
                self.running.swap_remove(at);
                self.refill();
            }
            return Poll::Ready(Some((index, item)));
        }
        Poll::Pending
    }
}

/// A response body made of events. Dropping it, which the server does when the client has gone, drops the
/// streams and so stops the work.
pub(super) struct EventBody {
    jobs: Jobs,
    writer: Box<dyn StreamWriter>,
    first: VecDeque<(usize, ChatEvent)>,
    heartbeat: Pin<Box<Sleep>>,
    /// Nothing of substance has come yet.
    silent: bool,
    cut: Pin<Box<dyn Future<Output = bool> + Send>>,
    ended: bool,
    _active: Option<ActiveGuard>,
}

/// Why an answer ends that was told to.
pub(super) fn cut_short(replaced: bool) -> ChatError {
    match replaced {
        true => ChatError::Cancelled,
        false => ChatError::Draining { retry_after: Duration::from_secs(5) },
    }
}

/// Bytes gathered before they are handed on, if more events are there already.
const PIECE_BYTES: usize = 8 * 1024;

impl EventBody {
    pub(super) fn new(
        active: &ActiveGuard,
        jobs: Jobs,
        first: VecDeque<(usize, ChatEvent)>,
        writer: Box<dyn StreamWriter>,
    ) -> EventBody {
        EventBody {
            heartbeat: Box::pin(tokio::time::sleep(writer.heartbeat_period())),
            cut: Box::pin(active.until_cut()),
            jobs,
            writer,
            first,
            silent: true,
            ended: false,
            _active: None,
        }
    }

    /// The stream's media type.
    pub(super) fn content_type(&self) -> &'static str {
        self.writer.content_type()
    }

    /// The answer is under way until the body falls.
    pub(super) fn holding(mut self, active: ActiveGuard) -> EventBody {
        self._active = Some(active);
        self
    }

    fn gather(&mut self, context: &mut Context<'_>, out: &mut Vec<u8>) {
        while out.len() < PIECE_BYTES && !self.ended {
            let item = match self.first.pop_front() {
                Some((index, event)) => Some((index, Ok(event))),
                None => match self.jobs.poll_next(context) {
                    Poll::Ready(item) => item,
                    Poll::Pending => return,
                },
            };
            match item {
                Some((index, Ok(event))) => self.event(index, event, out),
                Some((_, Err(error))) => self.fail(&error, out),
                None => {
                    self.writer.end(out);
                    self.ended = true;
                }
            }
        }
    }

    fn event(&mut self, index: usize, event: ChatEvent, out: &mut Vec<u8>) {
        self.silent &= matches!(
            event,
            ChatEvent::Accepted { .. } | ChatEvent::Prompt(_) | ChatEvent::Progress(_)
        );
        self.writer.event(index, event, SystemTime::now(), out);
    }

    fn fail(&mut self, error: &ChatError, out: &mut Vec<u8>) {
        if let ChatError::Internal(text) = error {
            log::error!(target: "rest", text; "internal error");
        }
        self.writer.error(error, out);
        self.ended = true;
    }

    fn poll_piece(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let mut out = Vec::new();
        self.gather(context, &mut out);
        if out.is_empty()
            && !self.ended
            && let Poll::Ready(replaced) = self.cut.as_mut().poll(context)
        {
            self.fail(&cut_short(replaced), &mut out);
        }
        if out.is_empty() && !self.ended && self.silent {
            ready!(self.heartbeat.as_mut().poll(context));
            self.writer.heartbeat(SystemTime::now(), &mut out);
            let next = Instant::now() + self.writer.heartbeat_period();
            self.heartbeat.as_mut().reset(next);
        }
        match (out.is_empty(), self.ended) {
            (false, _) => Poll::Ready(Some(out.into())),
            (true, true) => Poll::Ready(None),
            (true, false) => Poll::Pending,
        }
    }
}

impl MessageBody for EventBody {
    type Error = Infallible;

    fn size(&self) -> BodySize {
        BodySize::Stream
    }

    fn poll_next(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, Infallible>>> {
        let body = self.get_mut();
        let piece = catch_unwind(AssertUnwindSafe(|| body.poll_piece(context)));
        let piece = piece.unwrap_or_else(|_| {
            let mut out = Vec::new();
            let was_ended = std::mem::replace(&mut body.ended, true);
            if !was_ended {
                body.fail(&ChatError::Internal("a panic while streaming".to_owned()), &mut out);
            }
            Poll::Ready((!out.is_empty()).then(|| out.into()))
        });
        piece.map(|piece| piece.map(Ok))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::active::Active;
    use super::*;
    use crate::chat::{
        ChatSender, Completion, FinishReason, Input, ModelCard, Origin, Timings, Usage,
    };
    use crate::wire::ollama::{LineWriter, Shape};
    use crate::wire::openai::{ChatWriter, Head};

    /// A backend that has one stream to give away.
    struct Once(std::sync::Mutex<Option<ChatStream>>);

    impl Backend for Once {
        fn models(&self) -> Vec<ModelCard> {
            vec![ModelCard {
                name: crate::chat::ModelName::new("m"),
                architecture: String::new(),
                parameters: 0,
                quantization: String::new(),
                file_bytes: 0,
                digest: String::new(),
                modified_unix_s: 0,
                context_tokens: 0,
                trained_context_tokens: 0,
                embedding_len: 0,
                vocabulary_len: 0,
                template: String::new(),
            }]
        }

        fn chat(&self, _request: ChatRequest) -> ChatStream {
            self.0.lock().expect("no panic").take().expect("asked once")
        }
    }

    async fn started(writer: Box<dyn StreamWriter>) -> (ChatSender, EventBody) {
        let (sender, stream) = ChatStream::channel(4);
        let router = Router::new(vec![Arc::new(Once(Some(stream).into()))]);
        let input = Input::Text("x".to_owned());
        let parts = crate::chat::ChatRequestParts::new(
            Origin::Terminal,
            "me",
            input,
            std::time::Instant::now(),
        );
        let request = ChatRequest::try_from(parts).expect("valid");
        let mut jobs = Jobs::start(&router, vec![request]);
        let accepted = ChatEvent::Accepted { position: 1, predicted_first_token: None };
        sender.send(Ok(accepted)).await.expect("read");
        let first = jobs.first().await.expect("accepted");
        let active = Arc::new(Active::default()).enter();
        (sender, EventBody::new(&active, jobs, first, writer))
    }

    async fn piece(body: &mut EventBody) -> Option<String> {
        let bytes = std::future::poll_fn(|context| body.poll_piece(context)).await?;
        Some(String::from_utf8(bytes.to_vec()).expect("UTF-8"))
    }

    fn sse() -> Box<dyn StreamWriter> {
        let head = Head { id: "x".to_owned(), created: 0, model: "m".to_owned() };
        Box::new(ChatWriter::new(head, 1, false, false))
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_stream_pings_until_the_first_token() {
        let (sender, mut body) = started(sse()).await;
        let began = Instant::now();
        for count in 1..=3 {
            assert_eq!(piece(&mut body).await.as_deref(), Some(": ping\n\n"));
            assert_eq!(began.elapsed().as_secs(), 10 * count);
        }
        let delta = ChatEvent::Delta { text: "a".to_owned(), logprobs: Vec::new() };
        sender.send(Ok(delta)).await.expect("read");
        assert!(piece(&mut body).await.expect("text").contains("\"content\":\"a\""));
        let hour = Duration::from_secs(3600);
        assert!(tokio::time::timeout(hour, piece(&mut body)).await.is_err(), "no ping afterwards");
    }

    #[tokio::test(start_paused = true)]
    async fn lines_are_never_blank() {
        let writer = LineWriter::new("m".to_owned(), Shape::Chat, false);
        let (_sender, mut body) = started(Box::new(writer)).await;
        let began = Instant::now();
        let line = piece(&mut body).await.expect("a heartbeat");
        assert_eq!(began.elapsed().as_secs(), 15);
        assert!(
            line.ends_with(
                "\"message\":{\"role\":\"assistant\",\"content\":\"\"},\"done\":false}\n"
            )
        );
        assert_eq!(line.lines().count(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_without_an_end_is_an_error() {
        let (sender, mut body) = started(sse()).await;
        drop(sender);
        let last = piece(&mut body).await.expect("an error");
        assert!(last.contains("\"message\":\"internal error\""), "{last}");
        assert_eq!(piece(&mut body).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn done_is_the_end() {
        let (sender, mut body) = started(sse()).await;
        let completion = Completion {
            finish: FinishReason::Deadline,
            usage: Usage::default(),
            timings: Timings::default(),
            fusion: None,
        };
        sender.send(Ok(ChatEvent::Done(completion))).await.expect("read");
        let last = piece(&mut body).await.expect("the end");
        assert!(
            last.contains("\"finish_reason\":\"length\"") && last.ends_with("data: [DONE]\n\n")
        );
        assert_eq!(piece(&mut body).await, None);
    }
}
