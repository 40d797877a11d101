//! What is retained: availability, state, models, discovery; and the manners around a restart.

use serde_json::Value;

use super::client::Client;
use super::{House, embedded, guest};

#[tokio::test]
async fn the_retained_topics_tell_who_comes_later() {
    let house = House::open().await;
    house.metrics.headroom_bytes.set(5e8);
    let root = house.door.topic_root().to_owned();
    assert_eq!(root, "scoutd/pi5");
    let mut first = Client::v5("first", house.port(), &["scoutd/pi5/health"]).await;
    first.on("scoutd/pi5/health").await;
    let filters = ["scoutd/pi5/availability", "scoutd/pi5/info", "scoutd/pi5/models"];
    let mut client = Client::v5("later", house.port(), &filters).await;
    let availability = client.on("scoutd/pi5/availability").await;
    assert!(availability.retain);
    assert_eq!(availability.text(), "online");
    let info = client.on("scoutd/pi5/info").await.json();
    assert_eq!(info["version"], "0.1.0");
    let models = client.on("scoutd/pi5/models").await.json();
    assert_eq!(models["models"][0]["name"], "parrot");
    let mut client = Client::v5("state", house.port(), &["scoutd/pi5/state"]).await;
    let state = client.on("scoutd/pi5/state").await.json();
    for key in ["state", "model", "headroom_bytes", "requests_running", "soc_temperature_celsius"] {
        assert!(state.get(key).is_some(), "{key} is missing in {state}");
    }
    assert_eq!(house.metrics.mqtt_connected.get(), 1);
}

#[tokio::test]
async fn a_change_of_the_headroom_is_published() {
    let house = House::open().await;
    house.metrics.headroom_bytes.set(1e9);
    let mut client = Client::v311("test", house.port(), &["scoutd/pi5/state"]).await;
    client.on("scoutd/pi5/state").await;
    house.metrics.headroom_bytes.set(7e8);
    while client.on("scoutd/pi5/state").await.json()["headroom_bytes"] != 700_000_000 {}
}

#[tokio::test]
async fn discovery_is_retained_and_birth_brings_fresh_states() {
    let house = House::open().await;
    let discovery = "homeassistant/device/scoutd_pi5/config";
    let mut client = Client::v5("ha", house.port(), &[discovery]).await;
    let message = client.on(discovery).await;
    let payload: Value = message.json();
    assert_eq!(payload["dev"]["ids"][0], "scoutd_pi5");
    assert_eq!(payload["cmps"]["model"]["options"][0], "parrot");
    let mut client = Client::v5("ha2", house.port(), &["scoutd/pi5/availability"]).await;
    client.on("scoutd/pi5/availability").await;
    client.publish("homeassistant/status", "online").await;
    let again = client.on("scoutd/pi5/availability").await;
    assert!(!again.retain, "published now, not kept from before");
    assert_eq!(again.text(), "online");
}

#[tokio::test]
async fn without_discovery_home_assistant_hears_nothing() {
    let mut config = embedded();
    config.discovery = false;
    let house = House::with(config).await;
    let mut first = Client::v5("first", house.port(), &["scoutd/pi5/health"]).await;
    first.on("scoutd/pi5/health").await;
    let mut client = Client::v5("all", house.port(), &["homeassistant/#", "scoutd/pi5/info"]).await;
    assert_eq!(client.next().await.topic, "scoutd/pi5/info");
}

#[tokio::test]
async fn retained_requests_are_ignored() {
    let house = House::open().await;
    let client = Client::v5("test", house.port(), &[]).await;
    let request = r#"{"id":"old","reply_to":"scoutd/b/response/t","prompt":"old"}"#;
    client.retain("scoutd/b/request/chat", request).await;
    client.retain("scoutd/b/ask/set", "old").await;
    for version in ["5", "3.1.1"] {
        let mut config = guest(house.port(), "b");
        config.protocol = serde_json::from_value(version.into()).expect("a known version");
        let other = House::with(config).await;
        let mut reader =
            Client::v311(version, house.port(), &["scoutd/b/health", "scoutd/b/response/t"]).await;
        let health = reader.on("scoutd/b/health").await.json();
        assert_eq!(health["mqtt"]["protocol"], version);
        let request = r#"{"reply_to":"scoutd/b/response/t","prompt":"new"}"#;
        reader.publish("scoutd/b/request/chat", request).await;
        assert_eq!(reader.final_on("scoutd/b/response/t").await["data"]["text"], "new");
        assert_eq!(other.script.asked(), 1);
        other.door.stop().await;
    }
}

#[tokio::test]
async fn a_clean_stop_says_offline_and_ends_what_runs() {
    let house = House::open().await;
    let guest = House::with(guest(house.port(), "b")).await;
    let filters = ["scoutd/b/availability", "scoutd/b/response/t"];
    let mut client = Client::v5("test", house.port(), &filters).await;
    client.on("scoutd/b/availability").await;
    client
        .request("scoutd/b/request/chat", r#"{"prompt":"hold"}"#, "scoutd/b/response/t", b"c")
        .await;
    let (_, sender) = guest.script.held().await;
    guest.door.stop().await;
    sender.closed().await;
    let answer = client.next().await.json();
    assert_eq!(answer["code"], "draining");
    assert!(answer["retry_after_ms"].as_u64().is_some());
    let offline = client.on("scoutd/b/availability").await;
    assert_eq!(offline.text(), "offline");
    assert_eq!(guest.metrics.mqtt_connected.get(), 0);
}

#[tokio::test]
async fn who_vanishes_is_declared_offline_by_the_broker() {
    let house = House::open().await;
    let guest = House::with(guest(house.port(), "b")).await;
    let mut client = Client::v5("test", house.port(), &["scoutd/b/availability"]).await;
    while client.on("scoutd/b/availability").await.text() != "online" {}
    drop(guest);
    assert_eq!(client.on("scoutd/b/availability").await.text(), "offline");
}
