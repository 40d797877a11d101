//! Test clients: rumqttc in both versions behind one face.

use std::collections::VecDeque;
use std::time::Duration;

use rumqttc::v5::mqttbytes::v5 as packets5;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// What a client received.
#[derive(Clone, Debug)]
pub(super) struct Message {
    pub(super) topic: String,
    pub(super) payload: Vec<u8>,
    pub(super) retain: bool,
    pub(super) correlation: Option<Vec<u8>>,
    pub(super) content_type: Option<String>,
}

impl Message {
    pub(super) fn json(&self) -> Value {
        serde_json::from_slice(&self.payload).expect("answers are JSON")
    }

    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.payload).into_owned()
    }
}

enum Event {
    Message(Message),
    Ready,
}

/// A connected client.
pub(super) struct Client {
    kind: Kind,
    events: mpsc::Receiver<Event>,
    /// Read while waiting for something else.
    early: VecDeque<Message>,
    task: JoinHandle<()>,
}

enum Kind {
    V311(rumqttc::AsyncClient),
    V5(rumqttc::v5::AsyncClient),
}

impl Client {
    /// An MQTT 5 client that reads `filters`; connected and subscribed when this returns.
    pub(super) async fn v5(name: &str, port: u16, filters: &[&str]) -> Client {
        let mut options = rumqttc::v5::MqttOptions::new(name, "127.0.0.1", port);
        options.set_max_packet_size(Some(2 << 20));
        let (client, mut eventloop) = rumqttc::v5::AsyncClient::new(options, 64);
        let (sender, events) = mpsc::channel(1024);
        let task = tokio::spawn(async move {
            while let Ok(event) = eventloop.poll().await {
                use rumqttc::v5::Event::Incoming;
                let event = match event {
                    Incoming(packets5::Packet::ConnAck(_) | packets5::Packet::SubAck(_)) => {
                        Event::Ready
                    }
                    Incoming(packets5::Packet::Publish(publish)) => {
                        Event::Message(message(publish))
                    }
                    _ => continue,
                };
                if sender.send(event).await.is_err() {
                    return;
                }
            }
        });
        let mut connected = Client { kind: Kind::V5(client), events, early: VecDeque::new(), task };
        connected.ready().await;
        connected.subscribe(filters).await;
        connected
    }

    /// The same in MQTT 3.1.1.
    pub(super) async fn v311(name: &str, port: u16, filters: &[&str]) -> Client {
        let mut options = rumqttc::MqttOptions::new(name, "127.0.0.1", port);
        options.set_max_packet_size(2 << 20, 2 << 20);
        let (client, mut eventloop) = rumqttc::AsyncClient::new(options, 64);
        let (sender, events) = mpsc::channel(1024);
        let task = tokio::spawn(async move {
            while let Ok(event) = eventloop.poll().await {
                use rumqttc::Event::Incoming;
                let event = match event {
                    Incoming(rumqttc::Packet::ConnAck(_) | rumqttc::Packet::SubAck(_)) => {
                        Event::Ready
                    }
                    Incoming(rumqttc::Packet::Publish(publish)) => Event::Message(Message {
                        topic: publish.topic,
                        payload: publish.payload.to_vec(),
                        retain: publish.retain,
                        correlation: None,
                        content_type: None,
                    }),
                    _ => continue,
                };
                if sender.send(event).await.is_err() {
                    return;
                }
            }
        });
        let mut connected =
            Client { kind: Kind::V311(client), events, early: VecDeque::new(), task };
        connected.ready().await;
        connected.subscribe(filters).await;
        connected
    }

    async fn subscribe(&mut self, filters: &[&str]) {
        for filter in filters {
            match &self.kind {
                Kind::V5(client) => {
                    let qos = rumqttc::v5::mqttbytes::QoS::AtLeastOnce;
                    client.subscribe(*filter, qos).await.expect("the client runs");
                }
                Kind::V311(client) => {
                    let qos = rumqttc::QoS::AtLeastOnce;
                    client.subscribe(*filter, qos).await.expect("the client runs");
                }
            }
            self.ready().await;
        }
    }

    /// Waits for an acknowledgement; retained messages may come before that of their subscription.
    async fn ready(&mut self) {
        loop {
            match timeout(PATIENCE, self.events.recv()).await.expect("the broker answers in time") {
                Some(Event::Ready) => return,
                Some(Event::Message(message)) => self.early.push_back(message),
                None => panic!("the broker refused the client"),
            }
        }
    }

    /// Publishes, QoS 1.
    pub(super) async fn publish(&self, topic: &str, payload: impl Into<Vec<u8>>) {
        self.send(topic, payload.into(), false, None).await;
    }

    /// Publishes for those who come later.
    pub(super) async fn retain(&self, topic: &str, payload: impl Into<Vec<u8>>) {
        self.send(topic, payload.into(), true, None).await;
    }

    /// Publishes with a response topic and correlation data.
    pub(super) async fn request(
        &self,
        topic: &str,
        payload: impl Into<Vec<u8>>,
        response: &str,
        correlation: &[u8],
    ) {
        let properties = packets5::PublishProperties {
            response_topic: Some(response.to_owned()),
            correlation_data: Some(correlation.to_vec().into()),
            ..packets5::PublishProperties::default()
        };
        self.send(topic, payload.into(), false, Some(properties)).await;
    }

    async fn send(
        &self,
        topic: &str,
        payload: Vec<u8>,
        retain: bool,
        properties: Option<packets5::PublishProperties>,
    ) {
        match &self.kind {
            Kind::V5(client) => {
                let qos = rumqttc::v5::mqttbytes::QoS::AtLeastOnce;
                let properties = properties.unwrap_or_default();
                client
                    .publish_with_properties(topic, qos, retain, payload, properties)
                    .await
                    .expect("the client runs");
            }
            Kind::V311(client) => {
                let qos = rumqttc::QoS::AtLeastOnce;
                client.publish(topic, qos, retain, payload).await.expect("the client runs");
            }
        }
    }

    /// The next message, in whatever topic.
    pub(super) async fn next(&mut self) -> Message {
        if let Some(message) = self.early.pop_front() {
            return message;
        }
        loop {
            match timeout(PATIENCE, self.events.recv()).await.expect("a message in time") {
                Some(Event::Message(message)) => return message,
                Some(Event::Ready) => {}
                None => panic!("the connection ended"),
            }
        }
    }

    /// The next message on `topic`, skipping others.
    pub(super) async fn on(&mut self, topic: &str) -> Message {
        loop {
            let message = self.next().await;
            if message.topic == topic {
                return message;
            }
        }
    }

    /// The next final answer on `topic`.
    pub(super) async fn final_on(&mut self, topic: &str) -> Value {
        loop {
            let json = self.on(topic).await.json();
            if json["type"] == "final" {
                return json;
            }
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn message(publish: packets5::Publish) -> Message {
    let properties = publish.properties.unwrap_or_default();
    Message {
        topic: String::from_utf8(publish.topic.to_vec()).expect("topics are UTF-8"),
        payload: publish.payload.to_vec(),
        retain: publish.retain,
        correlation: properties.correlation_data.map(|data| data.to_vec()),
        content_type: properties.content_type,
    }
}

/// Long enough for a machine that builds something else.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
