//! Brokers that misbehave: refuse the version, hang up, take only small packets, go away in the middle.

use std::time::Duration;

use scoutd::chat::FinishReason;
use scoutd::mqtt::Secrets;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::client::Client;
use super::script::{delta, done};
use super::{House, embedded, guest};

/// A packet: its first byte and the rest.
struct Packet {
    kind: u8,
    body: Vec<u8>,
}

impl Packet {
    /// The protocol level of a CONNECT.
    fn level(&self) -> u8 {
        assert_eq!(self.kind >> 4, 1, "a CONNECT");
        assert_eq!(&self.body[..6], b"\x00\x04MQTT");
        self.body[6]
    }
}

async fn listen() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has ports");
    let port = listener.local_addr().expect("it is bound").port();
    (listener, port)
}

/// A door on a broker that the test itself plays.
async fn unanswered(port: u16) -> House {
    House::try_with(guest(port, "b"), Secrets::default()).await.expect("the door opens")
}

async fn accept(listener: &TcpListener) -> (TcpStream, Packet) {
    let accepted = timeout(Duration::from_secs(30), listener.accept()).await;
    let (mut stream, _) = accepted.expect("the door connects").expect("accepting works");
    let connect = read(&mut stream).await.expect("a CONNECT comes first");
    (stream, connect)
}

async fn read(stream: &mut TcpStream) -> Option<Packet> {
    let kind = stream.read_u8().await.ok()?;
    let (mut len, mut shift) = (0usize, 0);
    loop {
        let byte = stream.read_u8().await.ok()?;
        len |= usize::from(byte & 0x7f) << shift;
        shift += 7;
        if byte & 0x80 == 0 {
            break;
        }
    }
    let mut body = vec![0; len];
    stream.read_exact(&mut body).await.ok()?;
    Some(Packet { kind, body })
}

#[tokio::test]
async fn a_broker_that_refuses_mqtt5_is_spoken_to_in_311() {
    let (listener, port) = listen().await;
    let _house = unanswered(port).await;
    let (mut stream, connect) = accept(&listener).await;
    assert_eq!(connect.level(), 5);
    // Unsupported protocol version, no properties.
    stream.write_all(&[0x20, 3, 0, 0x84, 0]).await.expect("the door reads");
    let (_stream, connect) = accept(&listener).await;
    assert_eq!(connect.level(), 4);
}

#[tokio::test]
async fn a_broker_that_hangs_up_twice_is_spoken_to_in_311() {
    let (listener, port) = listen().await;
    let _house = unanswered(port).await;
    let mut levels = Vec::new();
    for _ in 0..3 {
        let (mut stream, connect) = accept(&listener).await;
        levels.push(connect.level());
        // What a 3.1.1 broker answers: version refused, in a form that MQTT 5 does not know.
        stream.write_all(&[0x20, 2, 0, 1]).await.expect("the door reads");
    }
    assert_eq!(levels, [5, 5, 4]);
}

#[tokio::test]
async fn no_packet_exceeds_what_the_broker_takes() {
    let (listener, port) = listen().await;
    let house = unanswered(port).await;
    let (mut stream, _) = accept(&listener).await;
    const MAX: u32 = 2000;
    let mut connack = vec![0x20, 8, 0, 0, 5, 0x27];
    connack.extend(MAX.to_be_bytes());
    stream.write_all(&connack).await.expect("the door reads");
    let mut topics = Vec::new();
    while !topics.iter().any(|topic| topic == "scoutd/b/health") {
        let packet = timeout(Duration::from_secs(30), read(&mut stream)).await;
        let packet = packet.expect("packets come").expect("the connection stands");
        assert!(packet.body.len() < MAX as usize, "{} bytes", packet.body.len());
        if packet.kind >> 4 == 3 {
            let len = usize::from(u16::from_be_bytes([packet.body[0], packet.body[1]]));
            topics.push(String::from_utf8_lossy(&packet.body[2..2 + len]).into_owned());
        }
    }
    assert!(topics.iter().any(|topic| topic == "scoutd/b/availability"), "{topics:?}");
    assert!(!topics.iter().any(|topic| topic.ends_with("/config")), "discovery is larger");
    assert_eq!(house.metrics.mqtt_connected.get(), 1);
}

#[tokio::test]
async fn garbage_from_a_broker_ends_only_the_connection() {
    let (listener, port) = listen().await;
    let house = unanswered(port).await;
    let (mut stream, _) = accept(&listener).await;
    stream.write_all(&[0x20, 3, 0, 0, 0]).await.expect("the door reads");
    stream.write_all(&[0xff; 64]).await.expect("the door reads");
    let (_stream, connect) = accept(&listener).await;
    assert_eq!(connect.level(), 5);
    assert_eq!(house.metrics.mqtt_connected.get(), 0);
}

#[tokio::test]
async fn a_final_survives_a_restart_of_the_broker() {
    let first = House::open().await;
    let port = first.port();
    let node = House::with(guest(port, "b")).await;
    let answer = "scoutd/b/response/t";
    let mut client = Client::v5("client", port, &["scoutd/b/availability", answer]).await;
    while client.on("scoutd/b/availability").await.text() != "online" {}
    let request = r#"{"id":"long","prompt":"hold","stream":true}"#;
    client.request("scoutd/b/request/chat", request, answer, b"c").await;
    let (_, sender) = node.script.held().await;
    sender.send(Ok(delta("before "))).await.expect("the door reads");
    assert_eq!(client.on(answer).await.json()["delta"], "before ");
    first.door.stop().await;
    sender.send(Ok(delta("after"))).await.expect("the door reads");
    let mut config = embedded();
    config.listen = ([127, 0, 0, 1], port).into();
    let _second = House::with(config).await;
    let mut client = Client::v5("client", port, &[answer]).await;
    sender.send(Ok(done(FinishReason::Stop))).await.expect("the door reads");
    let last = client.final_on(answer).await;
    assert_eq!(last["id"], "long");
    assert_eq!(last["data"]["text"], "before after");
}
