//! The embedded broker: zero set-up where no other broker is. The only file that knows the crate `mqtt5`.
//!
//! It keeps everything in memory, listens on loopback unless it asks for a password, and every queue of it is
//! bounded. What it cannot do (bridges, TLS, persistence) a broker of its own does better: `mqtt.broker`.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use log::{error, info};
use mqtt5::broker::config::{StorageBackend, StorageConfig};
use mqtt5::broker::{AuthProvider, AuthResult, BrokerConfig, MqttBroker};
use mqtt5::packet::connect::ConnectPacket;
use mqtt5::protocol::v5::reason_codes::ReasonCode;
use subtle::ConstantTimeEq;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::MqttError;

/// A name and a password that every client of the embedded broker must show.
#[derive(Clone)]
pub(super) struct Login {
    pub(super) username: String,
    pub(super) password: String,
}

/// A running broker.
pub(super) struct EmbeddedBroker {
    address: SocketAddr,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl EmbeddedBroker {
    /// Binds `listen` and starts serving; port 0 takes any free one.
    ///
    /// # Errors
    /// The address is taken, cannot be bound, or is open to the network without a password.
    pub(super) async fn start(
        listen: SocketAddr,
        login: Option<Login>,
    ) -> Result<EmbeddedBroker, MqttError> {
        if login.is_none() && !listen.ip().is_loopback() {
            return Err(MqttError::OpenBroker(listen));
        }
        let broker = bind(listen, login.as_ref()).await?;
        let address = broker.local_addr().unwrap_or(listen);
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(serve(broker, address, login, stopped));
        Ok(EmbeddedBroker { address, stop, task })
    }

    /// Where it listens.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends all connections and waits for the end, but not for ever.
    pub(super) async fn stop(mut self) {
        self.stop.send_replace(true);
        if tokio::time::timeout(STOP_TIMEOUT, &mut self.task).await.is_err() {
            self.task.abort();
        }
    }
}

impl Drop for EmbeddedBroker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn bind(listen: SocketAddr, login: Option<&Login>) -> Result<MqttBroker, MqttError> {
    // The crate's own error is prose about all its transports; a trial tells the plain reason.
    if let Err(source) = tokio::net::TcpListener::bind(listen).await {
        return Err(match source.kind() {
            io::ErrorKind::AddrInUse => MqttError::PortTaken(listen),
            _ => MqttError::Bind { listen, source },
        });
    }
    let broker = MqttBroker::with_config(config(listen)).await;
    let broker = broker.map_err(|error| MqttError::Broker(error.to_string()))?;
    Ok(match login {
        Some(login) => broker.with_auth_provider(Arc::new(login.clone())),
        None => broker,
    })
}

/// Serves until told to stop; a broker that ends by itself is started again on the same address.
async fn serve(
    mut broker: MqttBroker,
    address: SocketAddr,
    login: Option<Login>,
    mut stopped: watch::Receiver<bool>,
) {
    loop {
        match run(&mut broker, &mut stopped).await {
            None => return,
            Some(Ok(())) => error!(target: "mqtt", "embedded broker ended by itself"),
            Some(Err(error)) => error!(target: "mqtt", error:% = error; "embedded broker failed"),
        }
        drop(broker);
        broker = loop {
            tokio::select! {
                () = tokio::time::sleep(RESTART_DELAY) => {}
                _ = stopped.wait_for(|stop| *stop) => return,
            }
            match bind(address, login.as_ref()).await {
                Ok(broker) => break broker,
                Err(error) => {
                    error!(target: "mqtt", error:% = error; "embedded broker cannot start again")
                }
            }
        };
        info!(target: "mqtt", address:% = address; "embedded broker started again");
    }
}

/// Serves; `None` if it was told to stop.
async fn run(
    broker: &mut MqttBroker,
    stopped: &mut watch::Receiver<bool>,
) -> Option<mqtt5::error::Result<()>> {
    let shutdown = broker.shutdown_handle();
    let run = broker.run();
    tokio::pin!(run);
    tokio::select! {
        ended = &mut run => return Some(ended),
        _ = stopped.wait_for(|stop| *stop) => shutdown.shutdown(),
    }
    if let Err(error) = run.await {
        error!(target: "mqtt", error:% = error; "embedded broker did not stop cleanly");
    }
    None
}

fn config(listen: SocketAddr) -> BrokerConfig {
    let storage = StorageConfig::new()
        .with_backend(StorageBackend::Memory)
        // Never used with memory, but its default is a folder where we happen to stand.
        .with_base_dir("/nonexistent".into())
        .with_cleanup_interval(Duration::from_secs(60))
        .with_max_queued_messages_per_client(256)
        .with_max_queued_bytes_per_client(1 << 20);
    let mut config = BrokerConfig::new()
        .with_bind_addresses(vec![listen])
        .with_max_clients(64)
        .with_session_expiry(Duration::from_secs(3600))
        .with_max_packet_size(PACKET_BYTES_MAX)
        .with_max_subscriptions_per_client(64)
        .with_max_retained_messages(1024)
        .with_max_retained_message_size(128 << 10)
        .with_client_channel_capacity(256)
        .with_sys_topics_enabled(false)
        .with_storage(storage);
    config.topic_alias_maximum = 16;
    config
}

impl AuthProvider for Login {
    fn authenticate<'a>(
        &'a self,
        connect: &'a ConnectPacket,
        _client: SocketAddr,
    ) -> Pin<Box<dyn Future<Output = mqtt5::error::Result<AuthResult>> + Send + 'a>> {
        let username = connect.username.as_deref().unwrap_or_default().as_bytes();
        let password = connect.password.as_deref().unwrap_or_default();
        let right =
            username.ct_eq(self.username.as_bytes()) & password.ct_eq(self.password.as_bytes());
        let result = if right.into() {
            AuthResult::success_with_user(self.username.as_str())
        } else {
            AuthResult::fail(ReasonCode::BadUsernameOrPassword)
        };
        Box::pin(async { Ok(result) })
    }

    fn authorize_publish<'a>(
        &'a self,
        _client_id: &str,
        _user: Option<&'a str>,
        _topic: &'a str,
    ) -> Pin<Box<dyn Future<Output = bool> + Send + 'a>> {
        Box::pin(async { true })
    }

    fn authorize_subscribe<'a>(
        &'a self,
        _client_id: &str,
        _user: Option<&'a str>,
        _filter: &'a str,
    ) -> Pin<Box<dyn Future<Output = bool> + Send + 'a>> {
        Box::pin(async { true })
    }
}

/// Largest packet it takes: a request of the door's cap, with room for one that must be refused with an answer.
const PACKET_BYTES_MAX: usize = 1 << 20;

const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// Between attempts to come back.
const RESTART_DELAY: Duration = Duration::from_secs(1);
