//! The adapter for MQTT 3.1.1: no properties, so requests are paired by `reply_to` and `id` in their JSON.

use rumqttc::{
    AsyncClient, ConnectReturnCode, ConnectionError, Event, EventLoop, LastWill, MqttOptions,
    Packet, Publish, QoS, StateError, SubscribeFilter,
};
use tokio::sync::mpsc;

use super::link::{
    AckToken, CONNECT_TIMEOUT, Delivery, Fault, INCOMING_BYTES_MAX, INFLIGHT_MAX, KEEP_ALIVE,
    LinkEvent, LinkOptions, OUTGOING_BYTES_MAX, Outgoing, REQUESTS_MAX,
};

pub(super) fn client(options: &LinkOptions) -> (AsyncClient, EventLoop) {
    let mut mqtt = MqttOptions::new(&options.client_id, &options.host, options.port);
    mqtt.set_transport(options.transport())
        .set_keep_alive(KEEP_ALIVE)
        // The age of a parked command cannot be known here, so none is parked.
        .set_clean_session(true)
        .set_max_packet_size(INCOMING_BYTES_MAX as usize, OUTGOING_BYTES_MAX)
        .set_inflight(INFLIGHT_MAX)
        .set_manual_acks(true)
        .set_last_will(LastWill::new(
            &options.will_topic,
            options.will_payload,
            QoS::AtLeastOnce,
            true,
        ));
    if let Some(username) = &options.username {
        mqtt.set_credentials(username, options.password.as_deref().unwrap_or_default());
    }
    let (client, mut eventloop) = AsyncClient::new(mqtt, REQUESTS_MAX);
    eventloop.network_options.set_connection_timeout(CONNECT_TIMEOUT.as_secs());
    (client, eventloop)
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

pub(super) fn subscribe(client: &AsyncClient, options: &LinkOptions) -> bool {
    let filters =
        options.filters.iter().map(|path| SubscribeFilter::new(path.clone(), QoS::AtLeastOnce));
    client.try_subscribe_many(filters).is_ok()
}

pub(super) fn publish(client: &AsyncClient, message: &Outgoing) -> bool {
    let qos = if message.assured { QoS::AtLeastOnce } else { QoS::AtMostOnce };
    client
        .try_publish(message.topic.as_str(), qos, message.retain, message.payload.as_ref())
        .is_ok()
}

fn translate(event: Event) -> Option<LinkEvent> {
    match event {
        Event::Incoming(Packet::ConnAck(_)) => Some(LinkEvent::Up { packet_bytes_max: None }),
        Event::Incoming(Packet::PubAck(ack)) => Some(LinkEvent::Acked(ack.pkid)),
        Event::Incoming(Packet::Publish(publish)) => {
            Some(LinkEvent::Message(Box::new(delivery(publish))))
        }
        Event::Outgoing(rumqttc::Outgoing::Publish(pkid)) => Some(LinkEvent::Sent(pkid)),
        _ => None,
    }
}

fn delivery(publish: Publish) -> Delivery {
    Delivery {
        topic: publish.topic.clone(),
        payload: publish.payload.clone(),
        retain: publish.retain,
        dup: publish.dup,
        response_topic: None,
        correlation: None,
        expiry: None,
        sender: None,
        ack: AckToken::V311(publish),
    }
}

fn fault(error: &ConnectionError, up: bool) -> Fault {
    match error {
        ConnectionError::ConnectionRefused(ConnectReturnCode::RefusedProtocolVersion) => {
            Fault::Version
        }
        ConnectionError::ConnectionRefused(code) => Fault::Refused(format!("{code:?}")),
        ConnectionError::MqttState(StateError::Deserialization(
            rumqttc::mqttbytes::Error::OutgoingPacketTooLarge { .. },
        )) => Fault::TooLarge(error.to_string()),
        ConnectionError::MqttState(_) | ConnectionError::NotConnAck(_) if !up => {
            Fault::Aborted(error.to_string())
        }
        _ => Fault::Broken(error.to_string()),
    }
}
