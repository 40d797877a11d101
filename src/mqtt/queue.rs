//! The pool's line of requests: each is taken by one node of the pool, through a shared subscription.
//!
//! A connection of its own, because it wants other things of the broker than the door: no session (one that outlives
//! its node would keep requests nobody works on), and one unacknowledged request at a time. A request is acknowledged
//! when it is claimed and there is room for another; whoever asked is told by `accepted` who works on it and how long
//! to believe that. Nobody trusts the broker to deliver a lost request again: after the lease the asker sends it anew
//! under the same id.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use tokio::time::{self, MissedTickBehavior};

use super::answer::{self, Job, Said, Target};
use super::door::{Retry, chat_request, echo, next_event, request_id};
use super::link::{
    AckToken, Delivery, Fault, Link, LinkEvent, LinkOptions, OUTGOING_BYTES_MAX, Outgoing, Protocol,
};
use super::outbox::{Keep, Outbox};
use super::requests::{Key, Requests, Seen, Stop, fingerprint};
use super::topics::PoolTopics;
use crate::chat::{Backend, ChatError, Origin, Router};
use crate::metrics::Metrics;
use crate::peer::{Announcement, Pool};
use crate::wire::Caller;
use crate::wire::mqtt::{self, Answer};
use crate::wire::upstream::{Capacity, Claim, capacity, claimed, read_capacity_url};

/// What the pool's line is made of.
#[derive(Clone)]
pub struct PoolLine {
    /// The other machines: who is announced over MQTT is tried out there.
    pub pool: Arc<Pool>,
    /// Requests taken at once.
    pub at_once: u16,
    /// Where other nodes reach this one over HTTP, as a number; `None` announces nothing.
    pub url: Option<String>,
}

/// The state of the line.
pub(super) struct Queue {
    topics: PoolTopics,
    options: LinkOptions,
    line: PoolLine,
    router: Router,
    metrics: Arc<Metrics>,
    default_deadline: Duration,
    link: Option<Link>,
    link_number: u64,
    up_since: Option<Instant>,
    retry: Retry,
    packet_bytes_max: Arc<AtomicUsize>,
    outbox: Outbox,
    requests: Requests,
    /// Requests claimed, but not yet acknowledged.
    claimed: Vec<(Key, u64, AckToken)>,
    said: mpsc::Receiver<Said>,
    say: mpsc::Sender<Said>,
}

/// What the line is opened with.
pub(super) struct QueueParts {
    pub(super) topics: PoolTopics,
    pub(super) options: LinkOptions,
    pub(super) line: PoolLine,
    pub(super) router: Router,
    pub(super) metrics: Arc<Metrics>,
    pub(super) default_deadline: Duration,
}

impl Queue {
    pub(super) fn new(parts: QueueParts) -> Queue {
        let (say, said) = mpsc::channel(SAID_MAX);
        Queue {
            topics: parts.topics,
            options: parts.options,
            requests: Requests::new(usize::from(parts.line.at_once).max(1) + 1),
            line: parts.line,
            router: parts.router,
            metrics: parts.metrics,
            default_deadline: parts.default_deadline,
            link: None,
            link_number: 0,
            up_since: None,
            retry: Retry::new(super::ProtocolChoice::V5),
            packet_bytes_max: Arc::new(AtomicUsize::new(OUTGOING_BYTES_MAX)),
            outbox: Outbox::default(),
            claimed: Vec::new(),
            said,
            say,
        }
    }

    /// Runs until told to stop, then ends what it took.
    pub(super) async fn run(mut self, mut stop: oneshot::Receiver<()>) {
        let mut tick = time::interval(CAPACITY_PERIOD);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = &mut stop => break,
                event = next_event(&mut self.link) => self.on_event(event),
                Some(said) = self.said.recv() => self.on_said(said),
                () = time::sleep_until(self.retry.at), if self.link.is_none() => {
                    self.link_number += 1;
                    self.link = Some(Link::open(Protocol::V5, &self.options));
                }
                _ = tick.tick() => self.tell_capacity(),
            }
            self.flush();
        }
        self.requests.stop_all(Stop::Draining);
        let ended = async {
            while self.requests.running() > 0
                || !self.outbox.is_settled() && self.up_since.is_some()
            {
                tokio::select! {
                    event = next_event(&mut self.link) => self.on_event(event),
                    Some(said) = self.said.recv() => self.on_said(said),
                }
                self.flush();
            }
        };
        let _ = time::timeout(GOODBYE_TIMEOUT, ended).await;
        // Without a goodbye the broker publishes our will, which says `offline`.
    }

    fn on_event(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Up { packet_bytes_max } => {
                let limit = packet_bytes_max.unwrap_or(usize::MAX).min(OUTGOING_BYTES_MAX);
                self.packet_bytes_max.store(limit, Ordering::Relaxed);
                self.up_since = Some(Instant::now());
                if !self.link.as_ref().is_some_and(|link| link.subscribe(&self.options)) {
                    log::warn!(target: "mqtt", "no room to subscribe to the pool's requests");
                }
                self.retain(self.topics.status(), b"online".to_vec(), false);
                self.tell_capacity();
            }
            LinkEvent::Message(delivery) => self.on_delivery(*delivery),
            LinkEvent::Sent(pkid) => self.outbox.sent(pkid),
            LinkEvent::Acked(pkid) => self.outbox.acked(pkid),
            LinkEvent::Down(fault) => {
                let lasted = self.up_since.take().map(|since| since.elapsed());
                self.link = None;
                self.claimed.clear();
                self.outbox.link_lost(matches!(fault, Fault::TooLarge(_)));
                log::debug!(target: "mqtt", fault:%; "the pool's line is down");
                self.retry.failed(&fault, lasted, time::Instant::now(), rand::random());
            }
        }
    }

    fn on_delivery(&mut self, delivery: Delivery) {
        if let Some(node) = self.topics.capacity_of(&delivery.topic) {
            if node != self.topics.node() {
                self.on_capacity(&node, &delivery.payload);
            }
            return self.outbox.ack(delivery.ack);
        }
        if delivery.retain || delivery.payload.is_empty() {
            return self.outbox.ack(delivery.ack);
        }
        if self.topics.is_cancel(&delivery.topic) {
            // All hear it, who took the request acts.
            if let (_, Ok(id)) = mqtt::read_cancel(&delivery.payload) {
                self.requests.cancel(&id);
            }
            return self.outbox.ack(delivery.ack);
        }
        self.on_chat(delivery);
    }

    /// Somebody says where he is. He is tried out like everybody: over HTTP, with the pool key.
    fn on_capacity(&self, node: &str, payload: &[u8]) {
        let Some(url) = read_capacity_url(payload) else { return };
        let announced = Announcement {
            node: node.to_owned(),
            pool: self.line.pool.name().to_owned(),
            url,
            source: "mqtt",
        };
        let pool = Arc::clone(&self.line.pool);
        tokio::spawn(async move { pool.found(announced).await });
    }

    fn on_chat(&mut self, delivery: Delivery) {
        let now = Instant::now();
        let (pairing, command) = mqtt::read_chat(&delivery.payload);
        let id = request_id(&delivery, &pairing);
        let asked = pairing.reply_to.as_deref().or(delivery.response_topic.as_deref());
        let topic = match asked {
            Some(topic) if self.topics.is_answer(topic) => topic.to_owned(),
            _ => self.topics.response(id.as_str()),
        };
        let key = Key { topic: topic.clone(), id: id.clone() };
        let print = fingerprint(&delivery.payload, delivery.correlation.as_deref());
        let target = Target::Reply {
            topic,
            correlation: delivery.correlation.clone(),
            echo: echo(&pairing, &id),
            stream: command.as_ref().is_ok_and(|command| command.stream),
        };
        let request = command.and_then(|command| {
            let deadline = mqtt::earliest_deadline(
                now,
                delivery.expiry,
                command.deadline,
                self.default_deadline,
            );
            let origin = Origin::Mqtt { topic: delivery.topic.clone() };
            let caller =
                Caller { id: id.clone(), origin, client: key.topic.clone().into(), deadline };
            chat_request(&command.body, &caller, command.priority)
        });
        match (self.requests.look(&key, print, now), request) {
            (Seen::New, Ok(request)) => self.take(key, print, target, request, delivery.ack),
            (Seen::New, Err(error)) => self.refuse(&target, &error, delivery.ack),
            (Seen::Ended(answer), _) => {
                self.outbox.push(answer, Keep::Final);
                self.outbox.ack(delivery.ack);
            }
            (Seen::Running, _) => self.outbox.ack(delivery.ack),
            (Seen::Clash, _) => {
                let error = ChatError::invalid("id", "another request runs under this id");
                self.refuse(&target, &error, delivery.ack);
            }
            (Seen::Full, _) => {
                let error = ChatError::QueueFull { retry_after: RETRY_AFTER };
                self.refuse(&target, &error, delivery.ack);
            }
        }
    }

    /// Claims a request: whoever asked is told, and the answer begins.
    fn take(
        &mut self,
        key: Key,
        print: u64,
        target: Target,
        request: crate::chat::ChatRequest,
        ack: AckToken,
    ) {
        let stopped = self.requests.run(key.clone(), print);
        let rest = request.parts().deadline.saturating_duration_since(Instant::now());
        if let Target::Reply { echo, .. } = &target {
            let claim = Claim { node: self.topics.node(), lease: self.lease(&request, rest) };
            let payload = claimed(echo, &claim);
            self.outbox.push(message(&target, payload), Keep::Final);
        }
        self.claimed.push((key.clone(), self.link_number, ack));
        let model = self.router.find(request.model());
        let job = Job {
            key,
            target,
            model: model.map_or_else(String::new, |card| card.name.to_string()),
            deadline: request.parts().deadline.into(),
            packet_bytes_max: self.packet_bytes_max.clone(),
        };
        let stream = self.router.chat(request);
        tokio::spawn(answer::answer(job, stream, stopped, self.say.clone()));
        self.acknowledge();
    }

    /// Twice what the answer should take at the measured speed, and never beyond the deadline.
    fn lease(&self, request: &crate::chat::ChatRequest, rest: Duration) -> Duration {
        let (prefill, decode) =
            (self.metrics.prefill_tokens_per_s.get(), self.metrics.decode_tokens_per_s.get());
        if prefill <= 0.0 || decode <= 0.0 {
            return rest;
        }
        let tokens = f64::from(request.parts().max_tokens.unwrap_or(DEFAULT_TOKENS));
        let predicted = PROMPT_TOKENS / prefill + tokens / decode;
        let lease = Duration::try_from_secs_f64(2.0 * predicted).unwrap_or(rest);
        lease.max(LEASE_MIN).min(rest)
    }

    fn refuse(&mut self, target: &Target, error: &ChatError, ack: AckToken) {
        if let Target::Reply { echo, .. } = target {
            let payload = mqtt::final_error(echo, error, &Answer::default());
            self.outbox.push(message(target, payload), Keep::Final);
        }
        self.metrics.requests.with_label_values(&["mqtt", error.code()]).inc();
        self.outbox.ack(ack);
    }

    fn on_said(&mut self, said: Said) {
        match said {
            // The claim says it already.
            Said::Settled { .. } | Said::Accepted { .. } => {}
            Said::Chunk { .. } if self.up_since.is_none() => {}
            Said::Chunk { message } => {
                self.outbox.push(message, Keep::Chunk);
            }
            Said::Ended { key, message, .. } => {
                self.requests.end(&key, message.clone(), Instant::now());
                self.outbox.push(message, Keep::Final);
                self.acknowledge();
            }
        }
    }

    /// Acknowledges what was claimed, while there is room for the next: an acknowledgement is what brings it here
    /// instead of to another node.
    fn acknowledge(&mut self) {
        if self.requests.running() >= usize::from(self.line.at_once).max(1) {
            return;
        }
        for (_, link_number, token) in self.claimed.drain(..) {
            if link_number == self.link_number && self.link.is_some() {
                self.outbox.ack(token);
            }
        }
    }

    fn tell_capacity(&mut self) {
        if self.up_since.is_none() {
            return;
        }
        let count = |value: i64| u32::try_from(value).unwrap_or(0);
        let measured = |value: f64| Some(value).filter(|value| value.is_finite() && *value > 0.0);
        let payload = capacity(&Capacity {
            node: self.topics.node(),
            url: self.line.url.as_deref(),
            models: self.router.models().iter().map(|card| card.name.to_string()).collect(),
            prefill_tokens_per_s: measured(self.metrics.prefill_tokens_per_s.get()),
            decode_tokens_per_s: measured(self.metrics.decode_tokens_per_s.get()),
            headroom_bytes: self.metrics.headroom_bytes.get().max(0.0) as u64,
            running: count(self.metrics.requests_running.get()),
            waiting: count(self.metrics.requests_waiting.get()),
        });
        self.retain(self.topics.capacity(), payload, true);
    }

    fn retain(&mut self, topic: String, payload: Vec<u8>, json: bool) {
        let message = Outgoing {
            topic,
            payload: payload.into(),
            assured: true,
            retain: true,
            correlation: None,
            json,
            expiry: None,
        };
        self.outbox.push(message, Keep::Retained);
    }

    fn flush(&mut self) {
        let (Some(link), Some(_)) = (&self.link, self.up_since) else { return };
        let limit = self.packet_bytes_max.load(Ordering::Relaxed);
        for dropped in self.outbox.flush(link, limit) {
            log::warn!(target: "mqtt", topic = dropped.topic; "message larger than the broker takes, dropped");
        }
    }
}

fn message(target: &Target, payload: Vec<u8>) -> Outgoing {
    let (topic, correlation) = match target {
        Target::Last { topic } => (topic.clone(), None),
        Target::Reply { topic, correlation, .. } => (topic.clone(), correlation.clone()),
    };
    Outgoing {
        topic,
        payload: payload.into(),
        assured: true,
        retain: false,
        correlation,
        json: true,
        expiry: Some(ANSWER_EXPIRY),
    }
}

/// Messages of request tasks read ahead of the line.
const SAID_MAX: usize = 64;

/// At most one message about a node's capacity in this time.
const CAPACITY_PERIOD: Duration = Duration::from_secs(10);

/// How long the broker keeps an answer for who is away.
const ANSWER_EXPIRY: Duration = Duration::from_secs(300);

const RETRY_AFTER: Duration = Duration::from_secs(5);
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(3);

/// A lease shorter than this would be over before anybody noticed.
const LEASE_MIN: Duration = Duration::from_secs(5);

/// What a request is taken for whose prompt has not been read.
const PROMPT_TOKENS: f64 = 200.0;
const DEFAULT_TOKENS: u32 = 512;
