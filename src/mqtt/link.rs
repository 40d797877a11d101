//! One connection to a broker, whichever protocol it speaks.
//!
//! A link lives exactly as long as its connection. rumqttc would keep its event loop and with it unacknowledged
//! publishes, packet ids and late acknowledgements across reconnects; a fresh loop per connection has none of
//! them: an acknowledgement of an old connection ends in a closed channel, and a publish that broke a connection
//! is not resent for ever. What must survive a reconnect is kept by [`super::outbox`].

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rumqttc::{TlsConfiguration, Transport};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::{v5, v311};

/// Everything a connection is made of.
#[derive(Clone)]
pub(super) struct LinkOptions {
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) tls: Option<Arc<rustls::ClientConfig>>,
    pub(super) client_id: String,
    pub(super) username: Option<String>,
    pub(super) password: Option<String>,
    /// Published by the broker, retained, when we vanish.
    pub(super) will_topic: String,
    pub(super) will_payload: &'static str,
    /// How many unacknowledged messages the broker may have given us.
    pub(super) receive_max: u16,
    /// Whether the broker keeps our session while we are away.
    pub(super) keeps_session: bool,
    /// What we subscribe to at each connect.
    pub(super) filters: Vec<String>,
}

impl LinkOptions {
    pub(super) fn transport(&self) -> Transport {
        match &self.tls {
            Some(config) => Transport::Tls(TlsConfiguration::Rustls(config.clone())),
            None => Transport::Tcp,
        }
    }
}

/// A protocol version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    V5,
    V311,
}

impl Protocol {
    pub(super) fn name(self) -> &'static str {
        match self {
            Protocol::V5 => "5",
            Protocol::V311 => "3.1.1",
        }
    }
}

/// What a link reports.
#[derive(Debug)]
pub(super) enum LinkEvent {
    /// The broker has our publish of this packet id.
    Acked(u16),
    /// The last event.
    Down(Fault),
    /// A message for us.
    Message(Box<Delivery>),
    /// A publish went out, under this packet id; 0 for QoS 0. Publishes go out in the order they were handed in.
    Sent(u16),
    /// The broker accepted us, and takes packets of at most so many bytes.
    Up { packet_bytes_max: Option<usize> },
}

/// Why a link ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The connection ended before or at the broker's answer, in a way that a broker of another version causes.
    Aborted(String),
    /// Anything else: network, TLS, a wrong packet, a broker that stopped.
    Broken(String),
    /// The broker said no, and why.
    Refused(String),
    /// A packet exceeded what the broker takes.
    TooLarge(String),
    /// The broker does not speak this version.
    Version,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Aborted(why) => write!(f, "no answer to our CONNECT: {why}"),
            Fault::Broken(why) => f.write_str(why),
            Fault::Refused(why) => write!(f, "the broker refused us: {why}"),
            Fault::TooLarge(why) => write!(f, "a packet was too large: {why}"),
            Fault::Version => f.write_str("the broker does not speak this version of MQTT"),
        }
    }
}

/// A message as it came.
#[derive(Debug)]
pub(super) struct Delivery {
    pub(super) topic: String,
    pub(super) payload: Bytes,
    pub(super) retain: bool,
    pub(super) dup: bool,
    pub(super) response_topic: Option<String>,
    pub(super) correlation: Option<Bytes>,
    /// What is left of the message's life as the broker delivered it.
    pub(super) expiry: Option<Duration>,
    /// The sender's client id, where the embedded broker says it.
    pub(super) sender: Option<String>,
    pub(super) ack: AckToken,
}

/// Acknowledges one delivery, on the link it came from only.
#[derive(Clone, Debug)]
pub(super) enum AckToken {
    V311(rumqttc::Publish),
    V5(rumqttc::v5::mqttbytes::v5::Publish),
}

/// A message to publish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Outgoing {
    pub(super) topic: String,
    pub(super) payload: Bytes,
    /// QoS 1, else QoS 0.
    pub(super) assured: bool,
    pub(super) retain: bool,
    /// Copied byte for byte from the request.
    pub(super) correlation: Option<Bytes>,
    /// JSON, else plain text.
    pub(super) json: bool,
    /// How long the broker keeps it for who is away.
    pub(super) expiry: Option<Duration>,
}

impl Outgoing {
    /// Bytes of the packet, a little more rather than less.
    pub(super) fn packet_bytes(&self) -> usize {
        let correlation = self.correlation.as_ref().map_or(0, |data| data.len() + 3);
        self.payload.len() + self.topic.len() + correlation + PACKET_OVERHEAD_BYTES
    }
}

/// A running connection. Dropping it ends the connection without a goodbye.
pub(super) struct Link {
    client: Client,
    events: mpsc::Receiver<LinkEvent>,
    task: JoinHandle<()>,
}

enum Client {
    V311(rumqttc::AsyncClient),
    V5(rumqttc::v5::AsyncClient),
}

impl Link {
    /// Starts connecting; the first event says whether it worked.
    pub(super) fn open(protocol: Protocol, options: &LinkOptions) -> Link {
        let (sender, events) = mpsc::channel(EVENTS_MAX);
        match protocol {
            Protocol::V5 => {
                let (client, eventloop) = v5::client(options);
                let task = supervise(v5::drive(eventloop, sender.clone()), sender);
                Link { client: Client::V5(client), events, task }
            }
            Protocol::V311 => {
                let (client, eventloop) = v311::client(options);
                let task = supervise(v311::drive(eventloop, sender.clone()), sender);
                Link { client: Client::V311(client), events, task }
            }
        }
    }

    /// The next event; [`LinkEvent::Down`] is the last.
    pub(super) async fn event(&mut self) -> LinkEvent {
        let lost = || LinkEvent::Down(Fault::Broken("the connection ended".to_owned()));
        self.events.recv().await.unwrap_or_else(lost)
    }

    /// Subscribes to what `options` names. Right after the connection is up there is always room for it.
    pub(super) fn subscribe(&self, options: &LinkOptions) -> bool {
        match &self.client {
            Client::V5(client) => v5::subscribe(client, options),
            Client::V311(client) => v311::subscribe(client, options),
        }
    }

    /// Hands a message over; `false` if there is no room now.
    pub(super) fn publish(&self, message: &Outgoing) -> bool {
        match &self.client {
            Client::V5(client) => v5::publish(client, message),
            Client::V311(client) => v311::publish(client, message),
        }
    }

    /// Acknowledges; `false` if there is no room now. A delivery of another protocol's link is long gone.
    pub(super) fn ack(&self, token: &AckToken) -> bool {
        match (&self.client, token) {
            (Client::V5(client), AckToken::V5(publish)) => client.try_ack(publish).is_ok(),
            (Client::V311(client), AckToken::V311(publish)) => client.try_ack(publish).is_ok(),
            _ => true,
        }
    }

    /// Says goodbye, which keeps the broker from publishing our will.
    pub(super) fn disconnect(&self) -> bool {
        match &self.client {
            Client::V5(client) => client.try_disconnect().is_ok(),
            Client::V311(client) => client.try_disconnect().is_ok(),
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Runs a connection to its end and reports why it ended, a panic inside rumqttc included.
fn supervise(
    drive: impl Future<Output = Fault> + Send + 'static,
    events: mpsc::Sender<LinkEvent>,
) -> JoinHandle<()> {
    let inner = AbortOnDrop(tokio::spawn(drive));
    tokio::spawn(async move {
        let mut inner = inner;
        let fault = match (&mut inner.0).await {
            Ok(fault) => fault,
            Err(error) => Fault::Broken(format!("the connection's task failed: {error}")),
        };
        // A receiver that is gone does not ask why.
        let _ = events.send(LinkEvent::Down(fault)).await;
    })
}

struct AbortOnDrop<T>(JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Fixed header, packet id, property lengths, content type, expiry: 80 is more than they ever take.
const PACKET_OVERHEAD_BYTES: usize = 80;

/// Events read ahead of the door.
const EVENTS_MAX: usize = 64;

/// Requests read ahead of the network.
pub(super) const REQUESTS_MAX: usize = 64;

/// Unacknowledged publishes. Also bounds what rumqttc allocates at once: 13.9 MB without it.
pub(super) const INFLIGHT_MAX: u16 = 64;

/// Largest packet read. Larger requests than the door's cap must arrive to be refused; rumqttc's own limit of
/// 10 KiB would end the connection instead.
pub(super) const INCOMING_BYTES_MAX: u32 = 2 << 20;

/// Largest packet written where the broker names no limit.
pub(super) const OUTGOING_BYTES_MAX: usize = 1 << 20;

pub(super) const KEEP_ALIVE: Duration = Duration::from_secs(30);

/// How long connecting may take, TLS included.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the broker keeps our session while we are away.
pub(super) const SESSION_EXPIRY: Duration = Duration::from_secs(300);
