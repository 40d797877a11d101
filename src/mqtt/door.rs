//! The door's one task: keeps a connection, sorts what arrives, publishes what is due.
//!
//! It never waits for a backend or for the network: requests run in tasks of their own ([`super::answer`]), and
//! messages wait in the [`Outbox`].

use std::collections::VecDeque;
use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use log::{debug, info, warn};
use serde_json::{Map, Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{self, MissedTickBehavior};

use super::answer::{self, Job, Said, Target, reply};
use super::discovery::{self, Device};
use super::link::{
    AckToken, Delivery, Fault, Link, LinkEvent, LinkOptions, OUTGOING_BYTES_MAX, Outgoing, Protocol,
};
use super::outbox::{Keep, Outbox};
use super::requests::{CancelResult, Key, Requests, Seen, Stop, fingerprint};
use super::telemetry::{self, Telemetry};
use super::topics::{Arrival, Setting, Topics, Verb};
use super::{Config, MqttParts, ProtocolChoice};
use crate::chat::{Backend, ChatError, ChatRequest, ModelName, Origin, RequestId};
use crate::wire::Caller;
use crate::wire::mqtt::{self, AskSettings, Echo, Pairing};
use crate::wire::openai::ChatBody;

/// The state of the door.
pub(super) struct Door {
    config: Config,
    topics: Topics,
    options: LinkOptions,
    parts: MqttParts,
    /// The embedded broker tells senders' ids, and only it is believed.
    embedded: bool,
    link: Option<Link>,
    /// Counts connections: an acknowledgement belongs to one.
    link_number: u64,
    up_since: Option<Instant>,
    retry: Retry,
    packet_bytes_max: Arc<AtomicUsize>,
    outbox: Outbox,
    requests: Requests,
    /// Deliveries of requests not yet admitted.
    unsettled: Vec<(Key, u64, AckToken)>,
    said: mpsc::Receiver<Said>,
    say: mpsc::Sender<Said>,
    telemetry: Telemetry,
    ask: AskSettings,
    ask_model: Option<ModelName>,
    /// The last plain questions, to know a redelivered one.
    asked: VecDeque<u64>,
    /// What `models` says now.
    models: Value,
    birth_at: Option<time::Instant>,
    health_at: Instant,
    started: Instant,
    received: u64,
    draining: bool,
    last_error: Option<String>,
    told: Told,
}

/// What is logged once only.
#[derive(Default)]
struct Told {
    retained: bool,
    oversize: bool,
}

impl Door {
    pub(super) fn new(
        config: Config,
        topics: Topics,
        options: LinkOptions,
        parts: MqttParts,
        embedded: bool,
    ) -> Door {
        let (say, said) = mpsc::channel(SAID_MAX);
        let now = Instant::now();
        Door {
            retry: Retry::new(config.protocol),
            requests: Requests::new(config.requests_max.into()),
            config,
            topics,
            options,
            parts,
            embedded,
            link: None,
            link_number: 0,
            up_since: None,
            packet_bytes_max: Arc::new(AtomicUsize::new(OUTGOING_BYTES_MAX)),
            outbox: Outbox::default(),
            unsettled: Vec::new(),
            said,
            say,
            telemetry: Telemetry::default(),
            ask: AskSettings::default(),
            ask_model: None,
            asked: VecDeque::new(),
            models: Value::Null,
            birth_at: None,
            health_at: now,
            started: now,
            received: 0,
            draining: false,
            last_error: None,
            told: Told::default(),
        }
    }

    /// Runs until told to stop, then says goodbye.
    pub(super) async fn run(mut self, mut stop: oneshot::Receiver<()>) {
        let mut tick = time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = &mut stop => break,
                event = next_event(&mut self.link) => self.on_event(event),
                Some(said) = self.said.recv() => self.on_said(said),
                () = time::sleep_until(self.retry.at), if self.link.is_none() => self.connect(),
                () = sleep_until(self.birth_at) => self.on_birth(),
                _ = tick.tick() => self.on_tick(),
            }
            self.flush();
        }
        if time::timeout(GOODBYE_TIMEOUT, self.goodbye()).await.is_err() {
            debug!(target: "mqtt", "goodbye took too long");
        }
        self.parts.metrics.mqtt_connected.set(0);
    }

    fn connect(&mut self) {
        self.link_number += 1;
        self.link = Some(Link::open(self.retry.protocol, &self.options));
    }

    fn on_event(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Up { packet_bytes_max } => self.on_up(packet_bytes_max),
            LinkEvent::Message(delivery) => self.on_delivery(*delivery),
            LinkEvent::Sent(pkid) => self.outbox.sent(pkid),
            LinkEvent::Acked(pkid) => self.outbox.acked(pkid),
            LinkEvent::Down(fault) => self.on_down(&fault),
        }
    }

    fn on_up(&mut self, packet_bytes_max: Option<usize>) {
        let limit = packet_bytes_max.unwrap_or(usize::MAX).min(OUTGOING_BYTES_MAX);
        self.packet_bytes_max.store(limit, Ordering::Relaxed);
        self.up_since = Some(Instant::now());
        self.parts.metrics.mqtt_connected.set(1);
        let protocol = self.retry.protocol.name();
        info!(target: "mqtt", host = self.options.host, port = self.options.port, protocol; "connected");
        let subscribed = self.link.as_ref().is_some_and(|link| link.subscribe(&self.options));
        if !subscribed {
            warn!(target: "mqtt", "no room to subscribe");
        }
        self.publish_all();
    }

    /// Everything retained, at every connect: the broker may have lost it, and the will may have said `offline`.
    fn publish_all(&mut self) {
        self.retain("availability", b"online".to_vec(), false);
        self.retain("info", self.info(), true);
        self.models = Value::Null;
        self.publish_models();
        self.telemetry.reset();
        self.publish_state();
        self.publish_health();
    }

    fn on_down(&mut self, fault: &Fault) {
        let was_up = self.up_since.take();
        self.link = None;
        self.outbox.link_lost(matches!(fault, Fault::TooLarge(_)));
        self.parts.metrics.mqtt_connected.set(0);
        let lasted = was_up.map(|since| since.elapsed());
        self.retry.failed(fault, lasted, time::Instant::now(), rand::random::<f32>());
        let host = &self.options.host;
        let protocol = self.retry.protocol.name();
        let why = fault.to_string();
        if was_up.is_some() || self.last_error.as_ref() != Some(&why) {
            warn!(target: "mqtt", host, port = self.options.port, why, next_protocol = protocol; "not connected");
        }
        self.last_error = Some(why);
    }

    fn on_tick(&mut self) {
        if self.up_since.is_none() {
            return;
        }
        self.publish_models();
        self.publish_state();
        if Instant::now() >= self.health_at {
            self.publish_health();
        }
    }

    fn on_birth(&mut self) {
        self.birth_at = None;
        if self.up_since.is_some() {
            self.retain("availability", b"online".to_vec(), false);
            self.telemetry.reset();
            self.publish_state();
        }
    }

    /// Sorts what arrived.
    fn on_delivery(&mut self, delivery: Delivery) {
        self.received += 1;
        let Some(arrival) = self.topics.arrival(&delivery.topic) else {
            return self.outbox.ack(delivery.ack);
        };
        if arrival == Arrival::Birth {
            if delivery.payload.as_ref() == b"online" {
                let wait = BIRTH_SPREAD.mul_f32(rand::random::<f32>());
                self.birth_at = Some(time::Instant::now() + wait);
            }
            return self.outbox.ack(delivery.ack);
        }
        if delivery.retain || delivery.payload.is_empty() {
            if delivery.retain && !std::mem::replace(&mut self.told.retained, true) {
                let topic = delivery.topic.as_str();
                warn!(target: "mqtt", topic; "retained messages on request and set topics are ignored");
            }
            return self.outbox.ack(delivery.ack);
        }
        match arrival {
            Arrival::Request(Verb::Chat) => self.on_chat(delivery),
            Arrival::Request(verb) => {
                self.on_plain(verb, &delivery);
                self.outbox.ack(delivery.ack);
            }
            Arrival::Set(setting) => {
                self.on_set(setting, &delivery);
                self.outbox.ack(delivery.ack);
            }
            Arrival::UnknownVerb | Arrival::Birth => {
                let error =
                    ChatError::invalid("topic", "requests are chat, cancel, models or status");
                self.refuse(Verb::Chat, &delivery, Pairing::default(), &error);
                self.outbox.ack(delivery.ack);
            }
        }
    }

    /// A request for the model.
    fn on_chat(&mut self, delivery: Delivery) {
        let now = Instant::now();
        if let Err(error) = self.check_size(&delivery) {
            self.refuse(Verb::Chat, &delivery, Pairing::default(), &error);
            return self.outbox.ack(delivery.ack);
        }
        let (pairing, command) = mqtt::read_chat(&delivery.payload);
        let checked = command.and_then(|command| {
            let topic = self.answer_topic(Verb::Chat, &delivery, &pairing)?;
            Ok((command, topic))
        });
        let (command, topic) = match checked {
            Ok(checked) => checked,
            Err(error) => {
                self.refuse(Verb::Chat, &delivery, pairing, &error);
                return self.outbox.ack(delivery.ack);
            }
        };
        let id = request_id(&delivery, &pairing);
        let key = Key { topic: topic.clone(), id: id.clone() };
        let print = fingerprint(&delivery.payload, delivery.correlation.as_deref());
        if let Err(error) = self.seen(&key, print, now) {
            if let Some(error) = error {
                self.refuse(Verb::Chat, &delivery, pairing, &error);
            }
            return self.outbox.ack(delivery.ack);
        }
        let default = Duration::from_secs(self.config.deadline_s);
        let deadline = mqtt::earliest_deadline(now, delivery.expiry, command.deadline, default);
        let client = self.client(&delivery, &topic);
        let origin = Origin::Mqtt { topic: delivery.topic.clone() };
        let caller = Caller { id: id.clone(), origin, client: client.into(), deadline };
        let request = chat_request(&command.body, &caller, command.priority);
        let target = Target::Reply {
            topic,
            correlation: delivery.correlation.clone(),
            echo: echo(&pairing, &id),
            stream: command.stream,
        };
        match request {
            Ok(request) => self.spawn(key, print, target, request, Some(delivery.ack)),
            Err(error) => {
                self.refuse(Verb::Chat, &delivery, pairing, &error);
                self.outbox.ack(delivery.ack);
            }
        }
    }

    /// Whether the request may run. `Err(None)`: it ran or runs already, and whoever asked will get its answer.
    fn seen(&mut self, key: &Key, print: u64, now: Instant) -> Result<(), Option<ChatError>> {
        match self.requests.look(key, print, now) {
            Seen::New if self.draining => {
                Err(Some(ChatError::Draining { retry_after: RETRY_AFTER }))
            }
            Seen::New => Ok(()),
            Seen::Running => Err(None),
            Seen::Ended(answer) => {
                self.outbox.push(answer, Keep::Final);
                Err(None)
            }
            Seen::Full => Err(Some(ChatError::QueueFull { retry_after: RETRY_AFTER })),
            Seen::Clash => {
                let message = format!("another request runs under the id \"{}\"", key.id);
                Err(Some(ChatError::invalid("id", message)))
            }
        }
    }

    /// Starts answering in a task of its own.
    fn spawn(
        &mut self,
        key: Key,
        print: u64,
        target: Target,
        request: ChatRequest,
        ack: Option<AckToken>,
    ) {
        let stopped = self.requests.run(key.clone(), print);
        if let Some(ack) = ack {
            self.unsettled.push((key.clone(), self.link_number, ack));
        }
        let model = self.parts.router.find(request.model());
        if model.is_none() {
            // No backend will see it, so none counts it.
            self.count("unknown_model");
        }
        let job = Job {
            key,
            target,
            model: model.map_or_else(String::new, |card| card.name.to_string()),
            deadline: request.parts().deadline.into(),
            packet_bytes_max: self.packet_bytes_max.clone(),
        };
        let stream = self.parts.router.chat(request);
        tokio::spawn(answer::answer(job, stream, stopped, self.say.clone()));
    }

    /// `cancel`, `models`, `status`: answered at once.
    fn on_plain(&mut self, verb: Verb, delivery: &Delivery) {
        let (pairing, read) = match self.check_size(delivery) {
            Ok(()) => mqtt::read_plain(&delivery.payload),
            Err(error) => (Pairing::default(), Err(error)),
        };
        let topic = read.and_then(|()| self.answer_topic(verb, delivery, &pairing));
        let topic = match topic {
            Ok(topic) => topic,
            Err(error) => return self.refuse(verb, delivery, pairing, &error),
        };
        let echo = echo(&pairing, &request_id(delivery, &pairing));
        let payload = match verb {
            Verb::Cancel => match mqtt::read_cancel(&delivery.payload).1 {
                Ok(id) => mqtt::final_cancel(&echo, self.cancel(&id)),
                Err(error) => return self.refuse(verb, delivery, pairing, &error),
            },
            Verb::Models => mqtt::final_models(&echo, &self.parts.router.models()),
            Verb::Status => mqtt::final_status(&echo, &self.state()),
            Verb::Chat => return,
        };
        self.outbox.push(reply(topic, delivery.correlation.clone(), payload, true), Keep::Final);
    }

    fn cancel(&mut self, id: &RequestId) -> &'static str {
        match self.requests.cancel(id) {
            CancelResult::Stopped => "cancelled",
            CancelResult::Finished => "finished",
            CancelResult::Unknown => "unknown",
        }
    }

    /// Refuses a request where its answer would have gone, or on our own topic if that may not be.
    fn refuse(&mut self, verb: Verb, delivery: &Delivery, pairing: Pairing, error: &ChatError) {
        let own = |_| self.topics.response(verb);
        let topic = self.answer_topic(verb, delivery, &pairing).unwrap_or_else(own);
        let id = request_id(delivery, &pairing);
        debug!(target: "mqtt", id:% = id, code = error.code(); "request refused");
        let payload = mqtt::final_error(&echo(&pairing, &id), error, &mqtt::Answer::default());
        self.outbox.push(reply(topic, delivery.correlation.clone(), payload, true), Keep::Final);
        if verb == Verb::Chat {
            self.count(error.code());
            self.publish_completion("refused", id.as_str(), error.code());
        }
    }

    fn answer_topic(
        &self,
        verb: Verb,
        delivery: &Delivery,
        pairing: &Pairing,
    ) -> Result<String, ChatError> {
        let wanted = delivery.response_topic.as_ref().or(pairing.reply_to.as_ref());
        let Some(topic) = wanted else { return Ok(self.topics.response(verb)) };
        self.topics
            .check_answer_topic(topic)
            .map_err(|message| ChatError::invalid("reply_to", message))?;
        Ok(topic.clone())
    }

    fn check_size(&self, delivery: &Delivery) -> Result<(), ChatError> {
        let (bytes, max) = (delivery.payload.len(), self.config.payload_bytes_max);
        if bytes <= max {
            return Ok(());
        }
        let message = format!("payload of {bytes} bytes exceeds the limit of {max}");
        Err(ChatError::Invalid { message, param: None })
    }

    /// Who asks, for fairness: the sender if the broker is ours, else the answer's topic.
    fn client(&self, delivery: &Delivery, topic: &str) -> String {
        match &delivery.sender {
            Some(sender) if self.embedded => format!("mqtt:{sender}"),
            _ => format!("mqtt:{topic}"),
        }
    }

    /// A setting in plain text.
    fn on_set(&mut self, setting: Setting, delivery: &Delivery) {
        let Ok(text) = std::str::from_utf8(&delivery.payload) else {
            return warn!(target: "mqtt", setting = setting.name(); "setting is not text");
        };
        let result = match setting {
            Setting::Ask => self.on_ask(text, delivery),
            Setting::Prompt => {
                let shown: String = text.chars().take(255).collect();
                self.publish("prompt", shown.into_bytes(), false);
                self.on_ask(text, delivery)
            }
            Setting::Cancel => {
                self.requests.stop_all(Stop::Cancelled);
                Ok(())
            }
            Setting::MaxTokens => number(text, 1.0, 1_000_000.0)
                .map(|tokens| self.ask.max_tokens = Some(tokens as u32)),
            Setting::Temperature => {
                number(text, 0.0, 2.0).map(|value| self.ask.temperature = Some(value as f32))
            }
            Setting::Model => self.set_model(text),
        };
        if let Err(error) = result {
            warn!(target: "mqtt", setting = setting.name(), error:% = error; "setting refused");
        }
        self.publish_state();
    }

    fn set_model(&mut self, name: &str) -> Result<(), ChatError> {
        let name = ModelName::new(name);
        let card = self.parts.router.find(&name).ok_or(ChatError::UnknownModel(name))?;
        self.ask_model = Some(card.name);
        Ok(())
    }

    /// A plain question, answered on `last`.
    fn on_ask(&mut self, text: &str, delivery: &Delivery) -> Result<(), ChatError> {
        let topic = self.topics.own("last");
        let now = Instant::now();
        let print = fingerprint(&delivery.payload, Some(delivery.topic.as_bytes()));
        // The same question may be asked twice, but not by one message.
        if delivery.dup && self.asked.contains(&print) {
            return Ok(());
        }
        self.asked.truncate(ASKED_MAX - 1);
        self.asked.push_front(print);
        let id = RequestId::random();
        let key = Key { topic, id: id.clone() };
        let started = self.start_ask(text, &key, print, now);
        if let Err(error) = &started {
            let payload = mqtt::last(id.as_str(), &mqtt::Answer::default(), Err(error));
            self.outbox.push(reply(key.topic, None, payload, true), Keep::Final);
            self.count(error.code());
            self.publish_completion("refused", id.as_str(), error.code());
        }
        started
    }

    fn start_ask(
        &mut self,
        text: &str,
        key: &Key,
        print: u64,
        now: Instant,
    ) -> Result<(), ChatError> {
        if text.len() > self.config.payload_bytes_max {
            let max = self.config.payload_bytes_max;
            return Err(ChatError::invalid("ask", format!("more than {max} bytes were asked")));
        }
        match self.seen(key, print, now) {
            Ok(()) => {}
            Err(None) => return Ok(()),
            Err(Some(error)) => return Err(error),
        }
        let model = self.ask_model.as_ref().map(ModelName::as_str);
        let body = mqtt::question_body(text, model, &self.ask);
        let caller = Caller {
            id: key.id.clone(),
            origin: Origin::Mqtt { topic: self.topics.set(Setting::Ask) },
            client: "mqtt:ask".into(),
            deadline: now + Duration::from_secs(self.config.deadline_s),
        };
        let request = chat_request(&body, &caller, crate::chat::Priority::Normal)?;
        let target = Target::Last { topic: key.topic.clone() };
        self.spawn(key.clone(), print, target, request, None);
        Ok(())
    }

    fn on_said(&mut self, said: Said) {
        match said {
            Said::Settled { key } => self.settle(&key),
            Said::Accepted { message } => {
                self.outbox.push(message, Keep::Final);
            }
            // Without a connection there is nobody to read along; the final comes later.
            Said::Chunk { .. } if self.up_since.is_none() => {}
            Said::Chunk { message } => {
                self.outbox.push(message, Keep::Chunk);
            }
            Said::Ended { key, message, event, reason } => {
                self.settle(&key);
                self.requests.end(&key, message.clone(), Instant::now());
                self.outbox.push(message, Keep::Final);
                self.publish_completion(event, key.id.as_str(), reason);
                self.publish_state();
            }
        }
    }

    /// Acknowledges a request's delivery, if its connection still stands; else it will be delivered again and
    /// found known.
    fn settle(&mut self, key: &Key) {
        let Some(at) = self.unsettled.iter().position(|(waiting, ..)| waiting == key) else {
            return;
        };
        let (_, link_number, token) = self.unsettled.swap_remove(at);
        if link_number == self.link_number && self.link.is_some() {
            self.outbox.ack(token);
        }
    }

    fn count(&self, reason: &str) {
        self.parts.metrics.requests.with_label_values(&["mqtt", reason]).inc();
    }

    fn publish_completion(&mut self, event: &str, id: &str, reason: &str) {
        self.publish("completion", mqtt::completion_event(event, id, reason), true);
    }

    fn publish_models(&mut self) {
        let cards = self.parts.router.models();
        let models = mqtt::models(&cards);
        if models == self.models {
            return;
        }
        self.retain("models", models.to_string().into_bytes(), true);
        self.models = models;
        if self.config.discovery {
            let device = Device {
                version: self.parts.version.clone(),
                board: self.parts.board.clone(),
                url: self.parts.url.clone(),
                models: cards.iter().map(|card| card.name.to_string()).collect(),
            };
            let payload = discovery::payload(&self.topics, &device).to_string().into_bytes();
            self.retain_on(self.topics.discovery(), payload, true);
        }
    }

    fn publish_state(&mut self) {
        let state = self.state();
        if self.up_since.is_some() && self.telemetry.due(&state, Instant::now()) {
            self.retain("state", Value::Object(state).to_string().into_bytes(), true);
        }
    }

    fn state(&self) -> Map<String, Value> {
        let metrics = &self.parts.metrics;
        let busy = metrics.requests_running.get() > 0 || self.requests.running() > 0;
        let default = self.parts.router.models().into_iter().next().map(|card| card.name);
        let model = self.ask_model.clone().or(default);
        let state = match (self.draining, busy, &model) {
            (true, ..) => "draining",
            (_, _, None) => "starting",
            // Requests are refused, or stand still, for want of memory.
            _ if metrics.memory_rung.get() >= RUNG_RED => "degraded",
            (_, true, _) => "generating",
            (_, false, _) => "idle",
        };
        let mut more = Map::new();
        more.insert("state".into(), state.into());
        more.insert("model".into(), model.map(|name| name.to_string()).into());
        more.insert("uptime_seconds".into(), self.started.elapsed().as_secs().into());
        more.insert("ask_temperature".into(), self.ask.temperature.into());
        more.insert("ask_max_tokens".into(), self.ask.max_tokens.into());
        telemetry::state(&metrics.values(), more)
    }

    fn publish_health(&mut self) {
        self.health_at = Instant::now() + HEALTH_PERIOD;
        let health = json!({
            "uptime_s": self.started.elapsed().as_secs(),
            "requests_running": self.requests.running(),
            "mqtt": {
                "connected": self.up_since.is_some(),
                "protocol": self.retry.protocol.name(),
                "queued": self.outbox.queued(),
                "received": self.received,
                "published": self.outbox.published(),
            },
            "last_error": self.last_error,
        });
        self.retain("health", health.to_string().into_bytes(), true);
    }

    fn info(&self) -> Vec<u8> {
        let mut info = self.parts.info.clone();
        info.insert("version".into(), self.parts.version.as_str().into());
        info.insert("node".into(), self.topics.node().into());
        info.insert("board".into(), self.parts.board.clone().into());
        info.insert("url".into(), self.parts.url.clone().into());
        Value::Object(info).to_string().into_bytes()
    }

    fn retain(&mut self, leaf: &str, payload: Vec<u8>, json: bool) {
        self.retain_on(self.topics.own(leaf), payload, json);
    }

    fn retain_on(&mut self, topic: String, payload: Vec<u8>, json: bool) {
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

    fn publish(&mut self, leaf: &str, payload: Vec<u8>, json: bool) {
        let mut message = reply(self.topics.own(leaf), None, payload, true);
        message.json = json;
        self.outbox.push(message, Keep::Retained);
    }

    /// Hands over what waits, as far as the connection takes it.
    fn flush(&mut self) {
        let (Some(link), Some(_)) = (&self.link, self.up_since) else { return };
        let limit = self.packet_bytes_max.load(Ordering::Relaxed);
        for message in self.outbox.flush(link, limit) {
            let bytes = message.packet_bytes();
            if !std::mem::replace(&mut self.told.oversize, true) {
                warn!(target: "mqtt", topic = message.topic, bytes, limit; "message larger than the broker takes, dropped");
            }
        }
    }

    /// Ends what runs, says `offline`, which keeps the will from being published, and disconnects.
    async fn goodbye(&mut self) {
        self.draining = true;
        self.requests.stop_all(Stop::Draining);
        while self.requests.running() > 0 {
            tokio::select! {
                event = next_event(&mut self.link) => self.on_event(event),
                Some(said) = self.said.recv() => self.on_said(said),
            }
            self.flush();
        }
        if self.up_since.is_none() {
            return;
        }
        self.retain("availability", b"offline".to_vec(), false);
        self.flush();
        while self.up_since.is_some() && !self.outbox.is_settled() {
            let event = next_event(&mut self.link).await;
            self.on_event(event);
            self.flush();
        }
        if self.link.as_ref().is_some_and(Link::disconnect) {
            while let LinkEvent::Acked(_) | LinkEvent::Message(_) | LinkEvent::Sent(_) =
                next_event(&mut self.link).await
            {}
        }
    }
}

/// When to connect again, and in which version.
pub(super) struct Retry {
    choice: ProtocolChoice,
    protocol: Protocol,
    pub(super) at: time::Instant,
    /// Failures in a row.
    failures: u32,
    /// Aborted answers to CONNECT in a row, in this version.
    aborts: u32,
}

impl Retry {
    pub(super) fn new(choice: ProtocolChoice) -> Retry {
        let at = time::Instant::now();
        Retry { choice, protocol: choice.first(), at, failures: 0, aborts: 0 }
    }

    /// Chooses the next attempt after a failure; `lasted` is how long the connection had stood. `luck` in 0..1
    /// spreads attempts of several machines.
    pub(super) fn failed(
        &mut self,
        fault: &Fault,
        lasted: Option<Duration>,
        now: time::Instant,
        luck: f32,
    ) {
        // One that stood for a moment only (another machine takes our name) is a failure like any other.
        if lasted.is_some_and(|lasted| lasted >= STABLE_AFTER) {
            self.failures = 0;
        }
        self.aborts = if matches!(fault, Fault::Aborted(_)) { self.aborts + 1 } else { 0 };
        if self.choice == ProtocolChoice::Auto && (*fault == Fault::Version || self.aborts >= 2) {
            self.aborts = 0;
            self.protocol = match self.protocol {
                Protocol::V5 => Protocol::V311,
                Protocol::V311 => Protocol::V5,
            };
        }
        let backoff = RETRY_MIN * 2u32.saturating_pow(self.failures.min(10));
        self.failures = self.failures.saturating_add(1);
        self.at = now + backoff.min(RETRY_MAX).mul_f32(0.5 + 0.5 * luck);
    }
}

pub(super) async fn next_event(link: &mut Option<Link>) -> LinkEvent {
    match link {
        Some(link) => link.event().await,
        None => pending().await,
    }
}

async fn sleep_until(at: Option<time::Instant>) {
    match at {
        Some(at) => time::sleep_until(at).await,
        None => pending().await,
    }
}

pub(super) fn chat_request(
    body: &[u8],
    caller: &Caller,
    priority: crate::chat::Priority,
) -> Result<ChatRequest, ChatError> {
    let body = ChatBody::parse(body)?;
    if body.choices()? != 1 {
        return Err(ChatError::invalid("n", "n must be 1 over MQTT"));
    }
    let mut parts = body.into_parts(caller)?;
    parts.priority = priority;
    ChatRequest::try_from(parts)
}

/// The client's id, else the correlation data in hex if it is short enough, else one of ours.
pub(super) fn request_id(delivery: &Delivery, pairing: &Pairing) -> RequestId {
    let correlation = || {
        let data = delivery.correlation.as_deref().filter(|data| !data.is_empty())?;
        let hex: String = data.iter().take(33).map(|byte| format!("{byte:02x}")).collect();
        RequestId::parse(&hex)
    };
    pairing.request_id().or_else(correlation).unwrap_or_else(RequestId::random)
}

pub(super) fn echo(pairing: &Pairing, id: &RequestId) -> Echo {
    let id = pairing.id.clone().unwrap_or_else(|| id.as_str().into());
    Echo { id, transaction: pairing.transaction.clone() }
}

/// A number in plain text, as Home Assistant sends it.
fn number(text: &str, min: f64, max: f64) -> Result<f64, ChatError> {
    let value: Option<f64> = text.trim().parse().ok();
    value.filter(|value| (min..=max).contains(value)).ok_or_else(|| {
        let message = format!("must be a number from {min} to {max}");
        ChatError::Invalid { message, param: None }
    })
}

/// Messages of request tasks read ahead of the door.
const SAID_MAX: usize = 256;

/// Plain questions remembered.
const ASKED_MAX: usize = 32;

/// From this rung of memory pressure on, requests are refused.
const RUNG_RED: i64 = 3;
const TICK: Duration = Duration::from_secs(1);
const HEALTH_PERIOD: Duration = Duration::from_secs(60);

/// Many devices answer Home Assistant's birth; each waits its own while.
const BIRTH_SPREAD: Duration = Duration::from_secs(5);

const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(60);

/// A connection that stood so long starts the back-off anew.
const STABLE_AFTER: Duration = Duration::from_secs(10);

/// What a client refused by the door itself is told.
const RETRY_AFTER: Duration = Duration::from_secs(5);

const GOODBYE_TIMEOUT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    fn aborted() -> Fault {
        Fault::Aborted("closed".into())
    }

    #[test]
    fn attempts_back_off_with_jitter_up_to_a_minute() {
        let now = time::Instant::now();
        let mut retry = Retry::new(ProtocolChoice::V5);
        let mut waits = Vec::new();
        for _ in 0..8 {
            retry.failed(&Fault::Broken("refused".into()), None, now, 1.0);
            waits.push(retry.at.duration_since(now).as_secs());
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
        retry.failed(&aborted(), None, now, 0.0);
        assert_eq!(retry.at.duration_since(now).as_secs(), 30);
        retry.failed(&aborted(), Some(STABLE_AFTER), now, 1.0);
        assert_eq!(retry.at.duration_since(now).as_secs(), 1);
        retry.failed(&aborted(), Some(Duration::from_millis(5)), now, 1.0);
        assert_eq!(retry.at.duration_since(now).as_secs(), 2);
        assert_eq!(retry.protocol, Protocol::V5);
    }

    #[test]
    fn the_version_falls_back_when_refused_or_twice_aborted() {
        let now = time::Instant::now();
        let mut retry = Retry::new(ProtocolChoice::Auto);
        retry.failed(&Fault::Version, None, now, 0.0);
        assert_eq!(retry.protocol, Protocol::V311);
        let mut retry = Retry::new(ProtocolChoice::Auto);
        retry.failed(&aborted(), None, now, 0.0);
        assert_eq!(retry.protocol, Protocol::V5);
        retry.failed(&Fault::Broken("refused".into()), None, now, 0.0);
        retry.failed(&aborted(), None, now, 0.0);
        assert_eq!(retry.protocol, Protocol::V5, "not twice in a row");
        retry.failed(&aborted(), None, now, 0.0);
        assert_eq!(retry.protocol, Protocol::V311);
        let mut retry = Retry::new(ProtocolChoice::V311);
        retry.failed(&Fault::Version, None, now, 0.0);
        assert_eq!(retry.protocol, Protocol::V311);
    }

    #[test]
    fn numbers_are_read_as_home_assistant_sends_them() {
        assert_eq!(number("0.5", 0.0, 2.0).ok(), Some(0.5));
        assert_eq!(number(" 256.0\n", 1.0, 4096.0).ok(), Some(256.0));
        for bad in ["", "x", "nan", "inf", "-1", "3"] {
            assert!(number(bad, 0.0, 2.0).is_err(), "{bad}");
        }
    }
}
