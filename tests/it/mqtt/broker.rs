//! The embedded broker's own manners.

use scoutd::mqtt::{Config, Secrets};

use super::client::Client;
use super::{House, embedded};

#[tokio::test]
async fn a_taken_port_is_named_with_what_to_do() {
    let house = House::open().await;
    let config = Config { listen: ([127, 0, 0, 1], house.port()).into(), ..Config::default() };
    let error = House::try_with(config, Secrets::default()).await.err().expect("it is taken");
    let error = error.to_string();
    let address = format!("127.0.0.1:{}", house.port());
    assert!(error.contains(&address), "{error}");
    assert!(error.contains(&format!("mqtt.broker = \"{address}\"")), "{error}");
}

#[tokio::test]
async fn the_network_needs_a_password() {
    let mut config = embedded();
    config.listen = ([0, 0, 0, 0], 0).into();
    let error = House::try_with(config.clone(), Secrets::default()).await.err();
    let error = error.expect("it would be open").to_string();
    assert!(error.contains("mqtt.password_file"), "{error}");
    config.username = Some("house".to_owned());
    let secrets = Secrets { password: Some("hunter2".to_owned()), ca_pem: None };
    let house = House::try_with(config, secrets).await.expect("it has a password");
    let connect = |name: &'static str, password: Option<&'static str>| {
        let mut options = rumqttc::MqttOptions::new(name, "127.0.0.1", house.port());
        if let Some(password) = password {
            options.set_credentials("house", password);
        }
        async {
            let (_client, mut eventloop) = rumqttc::AsyncClient::new(options, 8);
            eventloop.poll().await
        }
    };
    assert!(connect("right", Some("hunter2")).await.is_ok());
    for (name, password) in [("wrong", Some("hunter3")), ("none", None)] {
        let refused = connect(name, password).await.expect_err("the password is not right");
        assert!(matches!(refused, rumqttc::ConnectionError::ConnectionRefused(_)), "{refused}");
    }
}

#[tokio::test]
async fn nothing_is_written_where_we_stand() {
    let house = House::open().await;
    let client = Client::v5("test", house.port(), &[]).await;
    client.retain("some/topic", "kept").await;
    let mut reader = Client::v5("reader", house.port(), &["some/topic"]).await;
    assert_eq!(reader.on("some/topic").await.text(), "kept");
    house.door.stop().await;
    assert!(!std::path::Path::new("mqtt_storage").exists());
    assert!(!std::path::Path::new("/nonexistent").exists());
}

#[tokio::test]
async fn a_stopped_broker_frees_its_port() {
    let house = House::open().await;
    let port = house.port();
    house.door.stop().await;
    let config = Config { listen: ([127, 0, 0, 1], port).into(), ..Config::default() };
    House::try_with(config, Secrets::default()).await.expect("the port is free again");
}
