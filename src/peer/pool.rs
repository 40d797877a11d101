//! Everybody who may be asked: configured, added at run time, or found and proved.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::JoinSet;

use super::config::{Config, Kind, MemberConfig};
use super::member::{Peer, PeerParts, Snapshot, Standing};
use super::trust::{Gate, PoolKey, Signer};
use crate::chat::Scope;
use crate::egress::{Client, ClientConfig, EgressError, Reach, Url, scope_of};
use crate::metrics::Metrics;
use crate::wire::upstream::{CandidateReport, PeerReport, PoolReport};

/// The members of a pool, and what it takes to reach them.
pub struct Pool {
    config: Config,
    clients: Clients,
    key: Option<PoolKey>,
    signer: Option<Arc<Signer>>,
    gate: Option<Gate>,
    /// This node's name, to know its own announcements.
    node: String,
    members: RwLock<Vec<Peer>>,
    candidates: Mutex<BTreeMap<String, Candidate>>,
    /// Where members added at run time are kept.
    state: Option<PathBuf>,
    runtime: Handle,
    metrics: Arc<Metrics>,
}

struct Clients {
    lan: Client,
    wan: Client,
}

/// Somebody who was announced.
#[derive(Clone, Debug)]
struct Candidate {
    announced: Announcement,
    reason: String,
}

/// What somebody says about himself on the network. Nothing of it is believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announcement {
    /// The node's name.
    pub node: String,
    /// The pool it says it belongs to.
    pub pool: String,
    /// Where it says it is.
    pub url: String,
    /// `mdns` or `mqtt`.
    pub source: &'static str,
}

/// What a pool is made of beside its configuration.
pub struct PoolParts {
    /// This node's name.
    pub node: String,
    /// A folder for what must outlive the process; `None` keeps nothing.
    pub state: Option<PathBuf>,
    /// Where requests run.
    pub runtime: Handle,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

/// Why a pool cannot be, or a member cannot be added.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// The member's address or the TLS set-up is wrong.
    #[error("{0}")]
    Egress(#[from] EgressError),
    /// The configuration contradicts itself.
    #[error("{0}")]
    Invalid(String),
    /// A key cannot be used.
    #[error("{path}: {message}")]
    Key {
        /// Its file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
}

/// How often members are looked at.
const LOOK_PERIOD: Duration = Duration::from_secs(10);

/// A found member that was away for so long is forgotten.
const FORGET_AFTER: Duration = Duration::from_secs(600);

/// From a name to a usable connection, in the house and beyond.
const CONNECT_LAN: Duration = Duration::from_secs(1);
const CONNECT_WAN: Duration = Duration::from_secs(4);

/// Members and candidates of one pool: a stranger cannot fill the memory with announcements.
const MEMBERS_MAX: usize = 64;
const CANDIDATES_MAX: usize = 64;

impl Pool {
    /// A pool of the configured members.
    ///
    /// # Errors
    /// The first key or address that cannot be used.
    pub fn new(config: Config, parts: PoolParts) -> Result<Arc<Pool>, PoolError> {
        if let Some(error) = config.check().into_iter().next() {
            return Err(PoolError::Invalid(error));
        }
        let key = config.key_file.as_deref().map(read_pool_key).transpose()?;
        let pool = Pool {
            clients: Clients {
                lan: client(Reach::Lan { also: config.lan() }, CONNECT_LAN)?,
                wan: client(Reach::Anywhere, CONNECT_WAN)?,
            },
            signer: key.clone().map(|key| Arc::new(Signer::new(key))),
            gate: key.clone().map(Gate::new),
            key,
            node: parts.node,
            members: RwLock::default(),
            candidates: Mutex::default(),
            state: parts.state,
            runtime: parts.runtime,
            metrics: parts.metrics,
            config,
        };
        for member in pool.config.members.clone() {
            pool.join(member, false)?;
        }
        for member in pool.remembered() {
            let name = member.name.clone();
            if let Err(error) = pool.join(member, false) {
                log::warn!(target: "peer", member = name.as_str(), error:%; "a member added earlier is left out");
            }
        }
        Ok(Arc::new(pool))
    }

    /// Looks at every member now and then, for as long as the pool lives.
    pub fn watch(self: &Arc<Pool>) {
        let pool = Arc::downgrade(self);
        self.runtime.spawn(async move {
            let mut clock = tokio::time::interval(LOOK_PERIOD);
            clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                clock.tick().await;
                let Some(pool) = pool.upgrade() else { return };
                pool.look_around().await;
            }
        });
    }

    /// Looks at every member once.
    pub async fn look_around(&self) {
        let mut looks = JoinSet::new();
        for peer in self.peers() {
            looks.spawn_on(
                async move {
                    let _ = peer.look().await;
                },
                &self.runtime,
            );
        }
        while looks.join_next().await.is_some() {}
        self.forget_the_gone();
        self.count();
    }

    /// The pool's name.
    pub fn name(&self) -> &str {
        &self.config.pool
    }

    /// What checks requests of other nodes; without a key there is none, and none is let in.
    pub fn gate(&self) -> Option<&Gate> {
        self.gate.as_ref()
    }

    /// Everybody, in the order in which they came.
    pub fn peers(&self) -> Vec<Peer> {
        self.members.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Adds a member; the owner says so.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn add(&self, member: MemberConfig) -> Result<Peer, PoolError> {
        if let Some(error) = member.check() {
            return Err(PoolError::Invalid(error));
        }
        let peer = self.join(member, false)?;
        self.candidates().retain(|_, candidate| candidate.announced.url != peer.url().to_string());
        self.remember();
        let looked = peer.clone();
        self.runtime.spawn(async move {
            let _ = looked.look().await;
        });
        log::info!(target: "peer", member = peer.name(), url:% = peer.url(); "joined");
        Ok(peer)
    }

    /// Removes the member of this name; what it still answers is read to its end. Whether there was one.
    pub fn remove(&self, name: &str) -> bool {
        let mut members = self.members.write().unwrap_or_else(PoisonError::into_inner);
        let before = members.len();
        members.retain(|peer| peer.name() != name);
        let removed = members.len() < before;
        drop(members);
        if removed {
            self.remember();
            log::info!(target: "peer", member = name; "left");
        }
        removed
    }

    /// Somebody announced himself. He becomes a member if he proves the pool key; without that he is listed for
    /// the owner, and nothing is ever sent to him.
    pub async fn found(&self, announced: Announcement) {
        if announced.node == self.node {
            return;
        }
        let known = self.peers().into_iter().find(|peer| {
            peer.name() == announced.node
                || peer.url().to_string().trim_end_matches('/') == announced.url
        });
        if let Some(known) = known {
            let _ = known.look().await;
            return;
        }
        let why_not = match self.try_out(&announced).await {
            Ok(peer) => {
                log::info!(target: "peer", member = peer.name(), url:% = peer.url(); "found");
                return;
            }
            Err(why) => why,
        };
        let mut candidates = self.candidates();
        if candidates.len() < CANDIDATES_MAX || candidates.contains_key(&announced.node) {
            candidates.insert(announced.node.clone(), Candidate { announced, reason: why_not });
        }
    }

    /// An announcement was taken back.
    pub fn gone(&self, node: &str) {
        self.candidates().remove(node);
    }

    async fn try_out(&self, announced: &Announcement) -> Result<Peer, String> {
        if self.signer.is_none() {
            return Err("this node has no pool key".to_owned());
        }
        if announced.pool != self.config.pool {
            return Err("another pool".to_owned());
        }
        let config = MemberConfig {
            name: announced.node.clone(),
            kind: Kind::Scoutd,
            url: announced.url.clone(),
            model: None,
            key_file: None,
            tier: None,
            wan: false,
            max_in_flight: None,
            context_tokens: None,
        };
        if let Some(error) = config.check() {
            return Err(error);
        }
        let peer = self.peer(config, true).map_err(|error| error.to_string())?;
        peer.look().await.map_err(|fault| fault.to_string())?;
        self.enter(peer.clone()).map_err(|error| error.to_string())?;
        self.candidates().remove(&announced.node);
        Ok(peer)
    }

    fn join(&self, config: MemberConfig, discovered: bool) -> Result<Peer, PoolError> {
        let peer = self.peer(config, discovered)?;
        self.enter(peer.clone())?;
        Ok(peer)
    }

    fn enter(&self, peer: Peer) -> Result<(), PoolError> {
        let mut members = self.members.write().unwrap_or_else(PoisonError::into_inner);
        if members.iter().any(|other| other.name() == peer.name()) {
            let message = format!("there is a member `{}` already", peer.name());
            return Err(PoolError::Invalid(message));
        }
        if members.len() >= MEMBERS_MAX {
            return Err(PoolError::Invalid(format!("there are {MEMBERS_MAX} members already")));
        }
        members.push(peer);
        Ok(())
    }

    fn peer(&self, config: MemberConfig, discovered: bool) -> Result<Peer, PoolError> {
        let url: Url = config.url.parse()?;
        if config.kind == Kind::Scoutd && self.signer.is_none() {
            let message = format!(
                "{}: a scoutd can be a member only with a pool key (fusion.key_file)",
                config.name
            );
            return Err(PoolError::Invalid(message));
        }
        let bearer = config.key_file.as_deref().map(read_secret).transpose()?;
        // Where a name leads is only known when it is connected to, and checked there each time.
        let outside = url.host().parse().is_ok_and(|address| {
            scope_of(address) == crate::egress::Scope::Wan
                && !self.config.lan().iter().any(|net| net.contains(&address))
        });
        let allowed = config.wan && self.config.allow_wan;
        if outside && !allowed {
            self.metrics.fusion_egress_refused.inc();
            let message = format!(
                "{}: {} is outside the LAN: that needs wan = true here and fusion.allow_wan = true",
                config.name,
                url.host()
            );
            return Err(PoolError::Invalid(message));
        }
        Ok(Peer::new(PeerParts {
            scope: if config.wan { Scope::Wan } else { Scope::Lan },
            client: if allowed { self.clients.wan.clone() } else { self.clients.lan.clone() },
            signer: self.signer.clone().filter(|_| config.kind == Kind::Scoutd),
            bearer,
            url,
            discovered,
            runtime: self.runtime.clone(),
            metrics: Arc::clone(&self.metrics),
            config,
        }))
    }

    fn candidates(&self) -> MutexGuard<'_, BTreeMap<String, Candidate>> {
        self.candidates.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget_the_gone(&self) {
        let gone = |peer: &Peer| {
            let snapshot = peer.snapshot();
            peer.is_discovered()
                && snapshot.standing == Standing::Left
                && snapshot.seen.is_none_or(|seen| seen > FORGET_AFTER)
        };
        self.members.write().unwrap_or_else(PoisonError::into_inner).retain(|peer| !gone(peer));
    }

    fn count(&self) {
        let peers = self.peers();
        for standing in [Standing::Candidate, Standing::Healthy, Standing::Left, Standing::Open] {
            let count = peers.iter().filter(|peer| peer.snapshot().standing == standing).count();
            self.metrics.fusion_members.with_label_values(&[standing.as_str()]).set(count as f64);
        }
    }

    /// The pool as its owner sees it; `local` is the member in this process.
    pub fn report(&self, local: Vec<PeerReport>) -> PoolReport {
        let mut members = local;
        members.extend(self.peers().iter().map(|peer| peer_report(peer, peer.snapshot())));
        let candidates = self.candidates();
        PoolReport {
            pool: self.config.pool.clone(),
            key: self.key.is_some(),
            key_fingerprint: self.key.as_ref().map(PoolKey::fingerprint),
            allow_wan: self.config.allow_wan,
            members,
            candidates: candidates
                .values()
                .map(|candidate| CandidateReport {
                    name: candidate.announced.node.clone(),
                    url: candidate.announced.url.clone(),
                    pool: candidate.announced.pool.clone(),
                    source: candidate.announced.source.to_owned(),
                    reason: candidate.reason.clone(),
                })
                .collect(),
        }
    }

    /// Members that were added at run time, from the state folder.
    fn remembered(&self) -> Vec<MemberConfig> {
        let Some(path) = self.state_file() else { return Vec::new() };
        let Ok(text) = fs::read_to_string(&path) else { return Vec::new() };
        #[derive(serde::Deserialize)]
        struct File {
            #[serde(default)]
            members: Vec<MemberConfig>,
        }
        match toml::from_str::<File>(&text) {
            Ok(file) => file.members,
            Err(error) => {
                log::warn!(target: "peer", path:% = path.display(), error:%; "members added earlier cannot be read");
                Vec::new()
            }
        }
    }

    /// Writes those down that neither the configuration names nor the network announces.
    fn remember(&self) {
        let Some(path) = self.state_file() else { return };
        let mut text = "# Members added at run time. Written by scoutd.\n".to_owned();
        let configured =
            |peer: &Peer| self.config.members.iter().any(|own| own.name == peer.name());
        for peer in self.peers().iter().filter(|peer| !peer.is_discovered() && !configured(peer)) {
            text.push_str(&peer.shared.parts.config.to_toml());
        }
        let part = path.with_extension("part");
        let written = fs::write(&part, text).and_then(|()| fs::rename(&part, &path));
        if let Err(error) = written {
            log::warn!(target: "peer", path:% = path.display(), error:%; "the member will be forgotten at the next start");
        }
    }

    fn state_file(&self) -> Option<PathBuf> {
        Some(self.state.as_ref()?.join("pool-members.toml"))
    }
}

/// A member as its owner sees it.
fn peer_report(peer: &Peer, snapshot: Snapshot) -> PeerReport {
    PeerReport {
        id: snapshot.id,
        kind: snapshot.kind.as_str().to_owned(),
        scope: snapshot.scope.as_str().to_owned(),
        url: Some(peer.url().to_string()),
        state: snapshot.standing.as_str().to_owned(),
        reason: snapshot.last_fault.map(|reason| reason.to_string()),
        tier: snapshot.strength.map(|strength| strength.as_str().to_owned()),
        score: snapshot.scoring.as_str().to_owned(),
        in_flight: snapshot.in_flight.into(),
        max_in_flight: snapshot.max_in_flight,
        prefill_tokens_per_s: snapshot.prefill_per_s,
        decode_tokens_per_s: snapshot.decode_per_s,
        digest: snapshot.digest,
        seen_ms: snapshot.seen.map(|seen| u64::try_from(seen.as_millis()).unwrap_or(u64::MAX)),
    }
}

fn client(reach: Reach, connect_timeout: Duration) -> Result<Client, EgressError> {
    Client::new(ClientConfig { connect_timeout, ..ClientConfig::new(reach) })
}

/// The pool key's file. Others must not be able to read it.
fn read_pool_key(path: &Path) -> Result<PoolKey, PoolError> {
    let text = read_secret(path)?;
    PoolKey::parse(&text)
        .map_err(|error| PoolError::Key { path: path.to_owned(), message: error.to_string() })
}

/// The first line of a file that only its owner can read.
fn read_secret(path: &Path) -> Result<String, PoolError> {
    let wrong = |message: String| PoolError::Key { path: path.to_owned(), message };
    let metadata = fs::metadata(path).map_err(|error| wrong(error.to_string()))?;
    if metadata.permissions().mode() & 0o077 != 0 {
        return Err(wrong("a key that others can read is none: chmod 600".to_owned()));
    }
    let text = fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}
