//! The pool of this process: the local engine and the other machines, as members that a fusion can ask.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;

use super::assembly::Assembly;
use super::{StartError, facts};
use crate::chat::{Backend, ModelName, Scope};
use crate::config::Config;
use crate::fusion::{
    Calibration, Fusion, FusionParts, Health, Member, MemberKind, Roster, ScoreKind, Settings,
    Tier, Vitals,
};
use crate::metrics::Metrics;
use crate::peer::{Announced, Discovery, Kind, Peer, Pool, PoolParts, Scoring, Standing, Strength};

/// This node's name in the pool: the MQTT node's, else the host's.
pub(super) fn node(config: &Config) -> String {
    config.mqtt.node.clone().unwrap_or_else(facts::host)
}

/// The pool as it is configured, not yet looked at.
///
/// # Errors
/// If a key cannot be used, or a member's address.
pub(super) fn open(
    config: &Config,
    assembly: &Assembly,
    runtime: &Handle,
) -> Result<Arc<Pool>, StartError> {
    let parts = PoolParts {
        node: node(config),
        state: facts::state_folder(),
        runtime: runtime.clone(),
        metrics: Arc::clone(&assembly.metrics),
    };
    Pool::new(config.fusion.clone(), parts)
        .map_err(|error| StartError::Config(format!("fusion: {error}")))
}

/// Where other machines reach this one, if they can: an address that is bound to a network. One that is bound to all
/// of them is not known by number here.
pub(super) fn url(http: &[SocketAddr]) -> Option<String> {
    let reachable =
        |address: &&SocketAddr| !address.ip().is_loopback() && !address.ip().is_unspecified();
    http.iter().find(reachable).map(|address| format!("http://{address}"))
}

/// Announces this node and looks for others, if that is wished. A network without multicast is no reason not to
/// start: members can be named.
pub(super) fn discover(
    config: &Config,
    pool: &Arc<Pool>,
    http: &[SocketAddr],
    runtime: &Handle,
) -> Option<Discovery> {
    if !config.fusion.mdns {
        return None;
    }
    let reachable = http.iter().find(|address| !address.ip().is_loopback());
    if reachable.is_none() {
        log::warn!(target: "daemon", "fusion.mdns: HTTP listens on loopback only, so this node is not announced");
    }
    let own = Announced { node: node(config), address: reachable.copied() };
    match Discovery::start(pool, &own, runtime) {
        Ok(discovery) => Some(discovery),
        Err(error) => {
            log::warn!(target: "daemon", error:%; "no other nodes are looked for");
            None
        }
    }
}

/// The pool as a backend, with what was learnt of its members earlier.
pub(super) fn fusion(
    config: &Config,
    assembly: &Assembly,
    pool: &Arc<Pool>,
    runtime: &Handle,
) -> Arc<Fusion> {
    let roster = Everybody {
        local: Arc::clone(&assembly.local) as Arc<dyn Backend>,
        pool: Arc::clone(pool),
        metrics: Arc::clone(&assembly.metrics),
    };
    let settings = Settings { pool: config.fusion.pool.clone(), ..Settings::default() };
    Arc::new(Fusion::new(FusionParts {
        settings,
        roster: Arc::new(roster),
        calibration: calibration(config),
        metrics: Arc::clone(&assembly.metrics),
        runtime: runtime.clone(),
    }))
}

/// Where it is kept how often each model was right.
pub(super) fn calibration_file(config: &Config) -> Option<PathBuf> {
    Some(facts::state_folder()?.join(format!("calibration-{}.json", config.fusion.pool)))
}

fn calibration(config: &Config) -> Calibration {
    let Some(path) = calibration_file(config) else { return Calibration::default() };
    let Ok(text) = fs::read_to_string(&path) else { return Calibration::default() };
    serde_json::from_str(&text).unwrap_or_else(|error| {
        log::warn!(target: "daemon", path:% = path.display(), error:%; "calibration not read: all members weigh the same");
        Calibration::default()
    })
}

/// Everybody who may be asked: the local engine first.
pub(super) struct Everybody {
    pub(super) local: Arc<dyn Backend>,
    pub(super) pool: Arc<Pool>,
    pub(super) metrics: Arc<Metrics>,
}

impl Roster for Everybody {
    fn members(&self) -> Vec<Member> {
        let mut members: Vec<Member> = self.local_member().into_iter().collect();
        members.extend(self.pool.peers().into_iter().map(remote_member));
        members
    }
}

impl Everybody {
    fn local_member(&self) -> Option<Member> {
        let card = self.local.models().into_iter().next()?;
        let measured = |value: f64| Some(value).filter(|value| value.is_finite() && *value > 0.0);
        let metrics = &self.metrics;
        Some(Member {
            id: format!("local/{}", card.name).into(),
            kind: MemberKind::Local,
            scope: Scope::Local,
            model: card.name,
            digest: Some(card.digest.into()),
            parameters: Some((card.parameters, card.parameters)),
            tier: None,
            score: ScoreKind::Exact,
            max_in_flight: None,
            vitals: Vitals {
                health: Health::Healthy,
                hot: false,
                headroom: None,
                in_flight: u16::try_from(metrics.requests_running.get()).unwrap_or(0),
                queue: Duration::ZERO,
                prefill_per_s: measured(metrics.prefill_tokens_per_s.get()),
                decode_per_s: measured(metrics.decode_tokens_per_s.get()),
            },
            backend: Arc::clone(&self.local),
        })
    }
}

fn remote_member(peer: Peer) -> Member {
    let seen = peer.snapshot();
    Member {
        id: seen.id.into(),
        kind: match seen.kind {
            Kind::Dllama => MemberKind::Dllama,
            Kind::Ollama => MemberKind::Ollama,
            Kind::OpenAi => MemberKind::OpenAi,
            Kind::Scoutd => MemberKind::Scoutd,
        },
        scope: seen.scope,
        model: ModelName::new(&seen.model),
        digest: seen.digest.map(Into::into),
        parameters: seen.parameters.map(|count| (count, count)),
        tier: seen.strength.map(|strength| match strength {
            Strength::Tiny => Tier::Tiny,
            Strength::Small => Tier::Small,
            Strength::Medium => Tier::Medium,
            Strength::Large => Tier::Large,
        }),
        score: match seen.scoring {
            Scoring::Exact => ScoreKind::Exact,
            Scoring::None => ScoreKind::None,
            Scoring::TopK => ScoreKind::TopK,
        },
        max_in_flight: seen.max_in_flight,
        vitals: Vitals {
            health: match seen.standing {
                Standing::Candidate => Health::Candidate,
                Standing::Healthy => Health::Healthy,
                Standing::Left => Health::Left,
                Standing::Open => Health::Open,
            },
            hot: seen.hot,
            headroom: seen.headroom,
            in_flight: seen.in_flight,
            queue: seen.queue,
            prefill_per_s: seen.prefill_per_s,
            decode_per_s: seen.decode_per_s,
        },
        backend: Arc::new(peer),
    }
}
