//! The MQTT door against its embedded broker, with real clients of both protocol versions and a scripted backend.

mod broker;
mod client;
mod faults;
mod line;
mod requests;
mod script;
mod state;

use std::sync::Arc;

use scoutd::chat::Router;
use scoutd::metrics::Metrics;
use scoutd::mqtt::{self, Config, MqttDoor, MqttError, MqttParts, PoolLine, Secrets};

use client::Client;
use script::Script;

/// A door on an embedded broker of its own, on a free port.
struct House {
    door: MqttDoor,
    script: Arc<Script>,
    metrics: Arc<Metrics>,
}

impl House {
    async fn open() -> House {
        House::with(embedded()).await
    }

    /// Opens and waits until the door has subscribed: what is published before that, nobody hears.
    async fn with(config: Config) -> House {
        let house = House::try_with(config, Secrets::default()).await.expect("the door opens");
        house.subscribed().await;
        house
    }

    async fn subscribed(&self) {
        let port = self.door.broker().rsplit_once(':').and_then(|(_, port)| port.parse().ok());
        let root = self.door.topic_root();
        let (request, answer) =
            (format!("{root}/request/status"), format!("{root}/response/status"));
        let mut client =
            Client::v311("waits", port.expect("an address has a port"), &[&answer]).await;
        // `info` is published after the subscription, on the same connection.
        let mut info = Client::v311(
            "waits-too",
            port.expect("an address has a port"),
            &[&format!("{root}/info")],
        )
        .await;
        info.next().await;
        client.publish(&request, "{}").await;
        client.next().await;
    }

    async fn try_with(config: Config, secrets: Secrets) -> Result<House, MqttError> {
        House::with_line(config, secrets, None).await
    }

    async fn with_line(
        config: Config,
        secrets: Secrets,
        line: Option<PoolLine>,
    ) -> Result<House, MqttError> {
        let script = Arc::new(Script::default());
        let metrics = Arc::new(Metrics::new());
        let parts = MqttParts {
            router: Router::new(vec![script.clone()]),
            metrics: metrics.clone(),
            host: "pi5.local".to_owned(),
            version: "0.1.0".to_owned(),
            board: Some("Raspberry Pi 5".to_owned()),
            url: None,
            info: serde_json::Map::new(),
            secrets,
            line,
        };
        let door = mqtt::start(config, parts).await?;
        Ok(House { door, script, metrics })
    }

    fn port(&self) -> u16 {
        self.door.embedded_address().expect("the broker is embedded").port()
    }
}

/// The defaults, on a free port.
fn embedded() -> Config {
    Config { listen: ([127, 0, 0, 1], 0).into(), ..Config::default() }
}

/// A node of its own on a broker that is already there.
fn guest(port: u16, node: &str) -> Config {
    Config { broker: format!("127.0.0.1:{port}"), node: Some(node.to_owned()), ..Config::default() }
}
