//! The running daemon: doors in front of an [`Assembly`], signals, the service manager, and the way down.

use std::fs;
use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::task::{Wake, Waker};
use std::time::{Duration, Instant};

use log::{info, warn};
use serde_json::{Map, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::assembly::Assembly;
use super::{StartError, facts, notify, pool};
use crate::chat::Backend;
use crate::config::Config;
use crate::engine::Local;
use crate::memory::{Conditions, Rung};
use crate::mqtt::{self, MqttDoor, MqttError, MqttParts, PoolLine};
use crate::peer::{Discovery, Pool};
use crate::rest::{self, BoundServer, Keys, ModelDoor, PoolDoor, Readiness, RestParts, StopHandle};

/// Runs the daemon until it is told to stop. `announce` gets the lines that say how to ask it, once it answers.
///
/// # Errors
/// If the model cannot be used, a door cannot be opened, or the system refuses threads or signals.
pub fn serve(config: Config, announce: impl FnOnce(&[String])) -> Result<(), StartError> {
    let start = Instant::now();
    super::log::install(&config.log.level).map_err(StartError::Config)?;
    let mut assembly = Assembly::open(&config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("doors")
        .enable_all()
        .build()
        .map_err(|error| StartError::System(format!("no async runtime: {error}")))?;
    runtime.block_on(async {
        let mut signals = Signals::new()?;
        let doors = Doors::open(&config, &mut assembly).await?;
        info!(target: "daemon", version = env!("CARGO_PKG_VERSION"), ready_ms = start.elapsed().as_millis() as u64; "ready: {}", assembly.summary());
        info!(target: "daemon", verdict = assembly.fit.verdict(), context_tokens = assembly.fit.context_tokens; "plan: {}; {}", assembly.fit.summary(), assembly.fit.details().join("; "));
        for holder in assembly.ledger.table() {
            info!(target: "daemon", purpose:% = holder.purpose.name(), bytes:% = holder.bytes; "reserved");
        }
        announce(&banner(&assembly, &doors, start.elapsed()));
        notify::ready(assembly.summary());
        let watchdog = tokio::spawn(watchdog(Arc::clone(&assembly.local), doors.addresses.first().copied()));
        let name = signals.next().await;
        watchdog.abort();
        info!(target: "daemon", signal = name; "draining");
        notify::stopping();
        tokio::select! {
            () = doors.close(&assembly, Duration::from_secs(config.daemon.drain_s)) => {}
            name = signals.next() => warn!(target: "daemon", signal = name; "draining cut short"),
        }
        Ok(())
    })
}

/// The open doors.
struct Doors {
    readiness: Arc<Readiness>,
    addresses: Vec<SocketAddr>,
    http: Option<StopHandle>,
    mqtt: Option<MqttDoor>,
    // Kept for as long as the doors are open.
    _pool: Arc<Pool>,
    _discovery: Option<Discovery>,
}

impl Doors {
    /// Opens HTTP first: a busy port is the likeliest fault and the cheapest to find.
    async fn open(config: &Config, assembly: &mut Assembly) -> Result<Doors, StartError> {
        let readiness = Arc::new(Readiness::new());
        let runtime = Handle::current();
        let pool = pool::open(config, assembly, &runtime)?;
        let fusion = pool::fusion(config, assembly, &pool, &runtime);
        assembly.join(Arc::clone(&fusion) as Arc<dyn Backend>);
        let door = PoolDoor {
            pool: Arc::clone(&pool),
            local: Arc::clone(&assembly.local) as Arc<dyn Backend>,
            node: pool::node(config),
            fusion: Some(fusion),
            calibration_file: pool::calibration_file(config),
        };
        let bound = open_http(config, assembly, &readiness, door)?;
        let addresses = bound.addresses().to_vec();
        let http = (!addresses.is_empty()).then(|| {
            let handle = bound.handle();
            tokio::spawn(async {
                if let Err(error) = bound.run().await {
                    log::error!(target: "daemon", error:%; "the HTTP door broke");
                }
            });
            handle
        });
        let mqtt = if config.mqtt.enabled {
            let line = config.fusion.mqtt.then(|| PoolLine {
                pool: Arc::clone(&pool),
                at_once: config.engine.slots,
                url: pool::url(&addresses),
            });
            Some(open_mqtt(config, assembly, addresses.first().copied(), line).await?)
        } else {
            None
        };
        pool.watch();
        let discovery = pool::discover(config, &pool, &addresses, &runtime);
        follow_pressure(&readiness, &assembly.conditions);
        readiness.set_ready();
        Ok(Doors { readiness, addresses, http, mqtt, _pool: pool, _discovery: discovery })
    }

    /// Refuses what is new, lets what runs end for at most `grace`, and closes.
    async fn close(self, assembly: &Assembly, grace: Duration) {
        self.readiness.set_draining();
        let local = Arc::clone(&assembly.local);
        // Waits on a condition variable, so it stays off the async workers.
        let engine = tokio::task::spawn_blocking(move || local.drain(grace));
        let http = async {
            if let Some(http) = self.http {
                http.stop(grace).await;
            }
        };
        let mqtt = async {
            if let Some(mqtt) = self.mqtt {
                mqtt.stop().await;
            }
        };
        let _ = tokio::join!(engine, http, mqtt);
    }
}

/// Keeps readiness in step with memory: on red, load balancers should ask somebody else.
fn follow_pressure(readiness: &Arc<Readiness>, conditions: &Arc<Conditions>) {
    struct Follow {
        readiness: Arc<Readiness>,
        // Weak, since the conditions hold this.
        conditions: Weak<Conditions>,
    }
    impl Wake for Follow {
        fn wake(self: Arc<Follow>) {
            if let Some(conditions) = self.conditions.upgrade() {
                self.readiness.set_no_headroom(conditions.rung() >= Rung::Red);
            }
        }
    }
    let follow = Arc::new(Follow {
        readiness: Arc::clone(readiness),
        conditions: Arc::downgrade(conditions),
    });
    conditions.wake_on_change(Waker::from(Arc::clone(&follow)));
    follow.wake();
}

/// The store over HTTP. The hub's client is made when it is needed, with the settings of the start.
/// None where no folder can be had for it.
fn model_door(config: &Config) -> Option<ModelDoor> {
    let store = super::open_store(config).ok()?;
    let config = config.clone();
    Some(ModelDoor::new(store, move || super::open_hub(&config).map_err(|error| error.to_string())))
}

fn open_http(
    config: &Config,
    assembly: &Assembly,
    readiness: &Arc<Readiness>,
    pool: PoolDoor,
) -> Result<BoundServer, StartError> {
    let keys = match &config.rest.keys_file {
        None => Keys::default(),
        Some(path) => {
            let named = |error: String| {
                StartError::Config(format!("rest.keys_file {}: {error}", path.display()))
            };
            let text = fs::read_to_string(path).map_err(|error| named(error.to_string()))?;
            Keys::parse(&text).map_err(|error| named(error.to_string()))?
        }
    };
    let parts = RestParts {
        router: assembly.router.clone(),
        metrics: Arc::clone(&assembly.metrics),
        readiness: Arc::clone(readiness),
        keys,
        default_deadline: Duration::from_secs(config.daemon.deadline_s),
        slots: config.engine.slots,
        pool: Some(pool),
        models: model_door(config),
    };
    rest::bind(&config.rest, parts).map_err(|source| StartError::Door {
        door: "http",
        address: config.rest.listen.join(", "),
        source,
    })
}

async fn open_mqtt(
    config: &Config,
    assembly: &Assembly,
    http: Option<SocketAddr>,
    line: Option<PoolLine>,
) -> Result<MqttDoor, StartError> {
    let mut info = Map::new();
    info.insert("os".to_owned(), json!(facts::operating_system()));
    info.insert("model".to_owned(), json!(assembly.summary()));
    let host = facts::host();
    let url = http
        .filter(|address| !address.ip().is_loopback())
        .map(|address| format!("http://{host}.local:{}/", address.port()));
    let parts = MqttParts {
        router: assembly.router.clone(),
        metrics: Arc::clone(&assembly.metrics),
        host,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        board: facts::board(),
        url,
        info,
        secrets: config.mqtt.read_secrets().map_err(mqtt_error)?,
        line,
    };
    mqtt::start(config.mqtt.clone(), parts).await.map_err(mqtt_error)
}

fn mqtt_error(error: MqttError) -> StartError {
    match error {
        MqttError::Bind { listen, source } => {
            StartError::Door { door: "mqtt", address: listen.to_string(), source }
        }
        other => StartError::Config(other.to_string()),
    }
}

fn banner(assembly: &Assembly, doors: &Doors, took: Duration) -> Vec<String> {
    let mut lines = vec![
        format!("scoutd {}: {}", env!("CARGO_PKG_VERSION"), assembly.summary()),
        format!(
            "plan: {}; {} tokens of context",
            assembly.fit.summary(),
            assembly.fit.context_tokens
        ),
        format!(
            "ready in {:.2} s; {} of memory promised, {} free to promise",
            took.as_secs_f64(),
            assembly.ledger.promised(),
            assembly.ledger.free()
        ),
    ];
    if let Some(address) = doors.addresses.first() {
        let question = r#"{"messages":[{"role":"user","content":"hello, who are you?"}]}"#;
        lines.push(String::new());
        lines.push(format!(
            "HTTP  http://{address}   (OpenAI at /v1, Ollama at /api, a page for browsers)"
        ));
        lines.push(format!("  curl -s http://{address}/v1/chat/completions -d '{question}'"));
    }
    if let Some(door) = &doors.mqtt {
        let (host, port) = door.broker().rsplit_once(':').unwrap_or((door.broker(), "1883"));
        let root = door.topic_root();
        let kind = if door.embedded_address().is_some() { "embedded broker" } else { "broker" };
        lines.push(String::new());
        lines.push(format!("MQTT  {host}:{port} ({kind}), topics below {root}"));
        lines.push(format!(
            "  mosquitto_rr -V 5 -h {host} -p {port} -t {root}/request/chat -e {root}/response/chat \
             -m '{{\"prompt\":\"hello, who are you?\"}}'"
        ));
    }
    lines.push(String::new());
    lines.push("Ctrl-C stops.".to_owned());
    lines
}

/// SIGTERM and SIGINT.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> Result<Signals, StartError> {
        let listen = |kind| {
            signal(kind).map_err(|error| StartError::System(format!("no signal handler: {error}")))
        };
        Ok(Signals {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// Tells the service manager that we live, as long as the engine can and the HTTP door really does answer.
async fn watchdog(engine: Arc<Local>, http: Option<SocketAddr>) {
    let Some(period) = notify::watchdog_period() else { return };
    let mut clock = tokio::time::interval(period);
    loop {
        clock.tick().await;
        let alive = match http {
            Some(address) => answers(address, period).await,
            None => true,
        };
        if !engine.is_usable() {
            warn!(target: "daemon", "the engine is not usable");
        } else if !alive {
            warn!(target: "daemon", address:? = http; "the HTTP door does not answer");
        } else {
            notify::watchdog();
        }
    }
}

async fn answers(address: SocketAddr, patience: Duration) -> bool {
    let ask = async {
        let mut stream = TcpStream::connect(address).await?;
        stream
            .write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            .await?;
        let mut head = [0; 12];
        stream.read_exact(&mut head).await?;
        std::io::Result::Ok(&head == b"HTTP/1.1 200")
    };
    matches!(tokio::time::timeout(patience, ask).await, Ok(Ok(true)))
}
