//! The adapter for MQTT 5.

use std::time::Duration;

use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{
    ConnectReturnCode, Filter, LastWill, Packet, Publish, PublishProperties, RetainForwardRule,
};
use rumqttc::v5::{AsyncClient, ConnectionError, Event, EventLoop, MqttOptions, StateError};
use tokio::sync::mpsc;

use super::link::{
    AckToken, CONNECT_TIMEOUT, Delivery, Fault, INCOMING_BYTES_MAX, INFLIGHT_MAX, KEEP_ALIVE,
    LinkEvent, LinkOptions, Outgoing, REQUESTS_MAX, SESSION_EXPIRY,
};

pub(super) fn client(options: &LinkOptions) -> (AsyncClient, EventLoop) {
    let mut mqtt = MqttOptions::new(&options.client_id, &options.host, options.port);
    mqtt.set_transport(options.transport())
        .set_keep_alive(KEEP_ALIVE)
        .set_connection_timeout(CONNECT_TIMEOUT.as_secs())
        .set_clean_start(!options.keeps_session)
        .set_session_expiry_interval(Some(match options.keeps_session {
            true => whole_seconds(SESSION_EXPIRY),
            false => 0,
        }))
        .set_receive_maximum(Some(options.receive_max))
        .set_max_packet_size(Some(INCOMING_BYTES_MAX))
        .set_outgoing_inflight_upper_limit(INFLIGHT_MAX)
        .set_manual_acks(true)
        .set_last_will(LastWill::new(
            &options.will_topic,
            options.will_payload,
            QoS::AtLeastOnce,
            true,
            None,
        ));
    if let Some(username) = &options.username {
        mqtt.set_credentials(username, options.password.as_deref().unwrap_or_default());
    }
    AsyncClient::new(mqtt, REQUESTS_MAX)
}

/// Polls until the connection ends.
pub(super) async fn drive(mut eventloop: EventLoop, events: mpsc::Sender<LinkEvent>) -> Fault {
    let mut up = false;
    loop {
        let event = match eventloop.poll().await {
            Ok(event) => event,
            Err(error) => return fault(&error, up),
        };
        let Some(event) = translate(event) else { continue };
        up |= matches!(event, LinkEvent::Up { .. });
        if events.send(event).await.is_err() {
            return Fault::Broken("nobody listens".to_owned());
        }
    }
}

/// Subscribes without getting our own messages, or retained ones: they would replay at each connect.
pub(super) fn subscribe(client: &AsyncClient, options: &LinkOptions) -> bool {
    let filters = options.filters.iter().map(|path| Filter {
        path: path.clone(),
        qos: QoS::AtLeastOnce,
        // A shared subscription must not ask for that (MQTT 5 §3.8.3.1).
        nolocal: !path.starts_with("$share/"),
        preserve_retain: true,
        retain_forward_rule: RetainForwardRule::Never,
    });
    client.try_subscribe_many(filters).is_ok()
}

pub(super) fn publish(client: &AsyncClient, message: &Outgoing) -> bool {
    let qos = if message.assured { QoS::AtLeastOnce } else { QoS::AtMostOnce };
    let properties = PublishProperties {
        payload_format_indicator: Some(1),
        message_expiry_interval: message.expiry.map(whole_seconds),
        correlation_data: message.correlation.clone(),
        content_type: message.json.then(|| "application/json".to_owned()),
        ..PublishProperties::default()
    };
    client
        .try_publish_with_properties(
            message.topic.as_str(),
            qos,
            message.retain,
            message.payload.clone(),
            properties,
        )
        .is_ok()
}

fn translate(event: Event) -> Option<LinkEvent> {
    match event {
        Event::Incoming(Packet::ConnAck(connack)) => {
            let limit = connack.properties.and_then(|properties| properties.max_packet_size);
            Some(LinkEvent::Up { packet_bytes_max: limit.map(|bytes| bytes as usize) })
        }
        Event::Incoming(Packet::PubAck(ack)) => Some(LinkEvent::Acked(ack.pkid)),
        Event::Incoming(Packet::Publish(publish)) => {
            Some(LinkEvent::Message(Box::new(delivery(publish))))
        }
        Event::Outgoing(rumqttc::Outgoing::Publish(pkid)) => Some(LinkEvent::Sent(pkid)),
        _ => None,
    }
}

fn delivery(publish: Publish) -> Delivery {
    let properties = publish.properties.clone().unwrap_or_default();
    let sender = properties.user_properties.into_iter().find(|(key, _)| key == SENDER_PROPERTY);
    Delivery {
        topic: String::from_utf8_lossy(&publish.topic).into_owned(),
        payload: publish.payload.clone(),
        retain: publish.retain,
        dup: publish.dup,
        response_topic: properties.response_topic,
        correlation: properties.correlation_data,
        expiry: properties.message_expiry_interval.map(|s| Duration::from_secs(s.into())),
        sender: sender.map(|(_, client)| client),
        ack: AckToken::V5(publish),
    }
}

fn fault(error: &ConnectionError, up: bool) -> Fault {
    use ConnectReturnCode::{RefusedProtocolVersion, UnsupportedProtocolVersion};
    match error {
        ConnectionError::ConnectionRefused(RefusedProtocolVersion | UnsupportedProtocolVersion) => {
            Fault::Version
        }
        ConnectionError::ConnectionRefused(code) => Fault::Refused(format!("{code:?}")),
        ConnectionError::MqttState(StateError::OutgoingPacketTooLarge { .. }) => {
            Fault::TooLarge(error.to_string())
        }
        // A 3.1.1 broker's CONNACK does not parse here, or it just hangs up.
        ConnectionError::MqttState(_) | ConnectionError::NotConnAck(_) if !up => {
            Fault::Aborted(error.to_string())
        }
        _ => Fault::Broken(error.to_string()),
    }
}

fn whole_seconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_secs()).unwrap_or(u32::MAX)
}

/// The embedded broker adds the sender's client id under this name.
const SENDER_PROPERTY: &str = "x-mqtt-client-id";
