//! The topics of one node: how they are spelled, what arrives on them, and where answers may go.
//!
//! Pure: no connection, no clock. Nothing outside [`crate::mqtt`] knows a topic.

/// Topics of one node under one base.
#[derive(Clone, Debug)]
pub(super) struct Topics {
    /// `<base>/<node>`, without a slash at the end.
    root: String,
    node: String,
    discovery_prefix: String,
    /// Beginnings outside our own tree on which clients may have answers published.
    answer_prefixes: Vec<String>,
}

/// Topics of the pool's line, under `<base>/pool/<pool>`.
#[derive(Clone, Debug)]
pub(super) struct PoolTopics {
    root: String,
    pool: String,
    node: String,
}

impl PoolTopics {
    /// `pool` and `node` were checked: they hold nothing that a topic cannot.
    pub(super) fn new(base: &str, pool: &str, node: &str) -> PoolTopics {
        let root = format!("{}/pool/{pool}", base.trim_end_matches('/'));
        PoolTopics { root, pool: pool.to_owned(), node: node.to_owned() }
    }

    /// The node's name.
    pub(super) fn node(&self) -> &str {
        &self.node
    }

    /// Requests are shared: each reaches one node. Cancels and capacities reach all.
    pub(super) fn filters(&self) -> Vec<String> {
        vec![
            format!("$share/scoutd-{}/{}/request/chat", self.pool, self.root),
            format!("{}/request/cancel", self.root),
            format!("{}/member/+/capacity", self.root),
        ]
    }

    /// Where answers go that name no topic of their own.
    pub(super) fn response(&self, id: &str) -> String {
        format!("{}/response/{id}", self.root)
    }

    /// Whether a client may have its answer published there.
    pub(super) fn is_answer(&self, topic: &str) -> bool {
        let own = format!("{}/response/", self.root);
        topic.strip_prefix(&own).is_some_and(|rest| !rest.is_empty())
            && is_plain(topic)
            && topic.len() <= ANSWER_TOPIC_BYTES_MAX
    }

    /// `online` or `offline`, retained.
    pub(super) fn status(&self) -> String {
        format!("{}/member/{}/status", self.root, self.node)
    }

    /// What this node can do now, retained.
    pub(super) fn capacity(&self) -> String {
        format!("{}/member/{}/capacity", self.root, self.node)
    }

    /// Whose capacity arrives on `topic`.
    pub(super) fn capacity_of(&self, topic: &str) -> Option<String> {
        let node = topic.strip_prefix(&self.root)?.strip_prefix("/member/")?;
        node.strip_suffix("/capacity").filter(|node| is_node(node)).map(str::to_owned)
    }

    /// Whether `topic` asks to cancel.
    pub(super) fn is_cancel(&self, topic: &str) -> bool {
        topic.strip_prefix(&self.root) == Some("/request/cancel")
    }
}

/// What a message asks for, by its topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arrival {
    /// Home Assistant says that it has come or gone.
    Birth,
    /// `request/<verb>`.
    Request(Verb),
    /// `<setting>/set`.
    Set(Setting),
    /// `request/<something else>`.
    UnknownVerb,
}

/// What can be requested.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Verb {
    Cancel,
    Chat,
    Models,
    Status,
}

/// What can be set; every one of them takes plain text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Setting {
    Ask,
    Cancel,
    MaxTokens,
    Model,
    Prompt,
    Temperature,
}

/// Why a base, a node or a prefix cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum TopicError {
    #[error("mqtt.base must be 1 to 64 characters without `+`, `#`, `$` or NUL: `{0}`")]
    Base(String),
    #[error("mqtt.discovery_prefix must differ from mqtt.base: `{0}`")]
    BaseIsPrefix(String),
    #[error("mqtt.node must be 1 to 64 of `a-z A-Z 0-9 _ -`, and not `pool`: `{0}`")]
    Node(String),
    #[error("mqtt.{0} must be a topic without `+`, `#`, `$` or NUL: `{1}`")]
    Prefix(&'static str, String),
}

impl Topics {
    /// Checks the names once, so that every topic made of them is one that a broker accepts.
    pub(super) fn new(
        base: &str,
        node: &str,
        discovery_prefix: &str,
        answer_prefixes: &[String],
    ) -> Result<Topics, TopicError> {
        let base = base.trim_end_matches('/');
        let discovery_prefix = discovery_prefix.trim_end_matches('/');
        if !is_plain(base) || base.len() > 64 {
            return Err(TopicError::Base(base.to_owned()));
        }
        if !is_node(node) {
            return Err(TopicError::Node(node.to_owned()));
        }
        if !is_plain(discovery_prefix) {
            return Err(TopicError::Prefix("discovery_prefix", discovery_prefix.to_owned()));
        }
        if discovery_prefix == base {
            return Err(TopicError::BaseIsPrefix(base.to_owned()));
        }
        if let Some(bad) = answer_prefixes.iter().find(|prefix| !is_plain(prefix)) {
            return Err(TopicError::Prefix("answer_prefixes", bad.clone()));
        }
        Ok(Topics {
            root: format!("{base}/{node}"),
            node: node.to_owned(),
            discovery_prefix: discovery_prefix.to_owned(),
            answer_prefixes: answer_prefixes.to_vec(),
        })
    }

    /// The node's name.
    pub(super) fn node(&self) -> &str {
        &self.node
    }

    /// `<base>/<node>`.
    pub(super) fn root(&self) -> &str {
        &self.root
    }

    /// A topic of our own tree: `leaf` is `state`, `info`, `last` and so on.
    pub(super) fn own(&self, leaf: &str) -> String {
        format!("{}/{leaf}", self.root)
    }

    /// Where answers go that name no topic of their own.
    pub(super) fn response(&self, verb: Verb) -> String {
        format!("{}/response/{}", self.root, verb.name())
    }

    /// Where a setting is sent.
    pub(super) fn set(&self, setting: Setting) -> String {
        format!("{}/{}/set", self.root, setting.name())
    }

    /// The retained device description for Home Assistant.
    pub(super) fn discovery(&self) -> String {
        format!("{}/device/{}/config", self.discovery_prefix, self.device_id())
    }

    /// The device's id for Home Assistant: stable, and only of characters it accepts.
    pub(super) fn device_id(&self) -> String {
        format!("scoutd_{}", self.node)
    }

    /// Where Home Assistant says `online` after a start.
    pub(super) fn birth(&self) -> String {
        format!("{}/status", self.discovery_prefix)
    }

    /// What we subscribe to besides [`Topics::birth`]; never everything.
    pub(super) fn filters(&self) -> [String; 2] {
        [format!("{}/request/#", self.root), format!("{}/+/set", self.root)]
    }

    /// What arrived on `topic`; `None` for what we never asked for.
    pub(super) fn arrival(&self, topic: &str) -> Option<Arrival> {
        if topic == self.birth() {
            return Some(Arrival::Birth);
        }
        let leaf = topic.strip_prefix(&self.root)?.strip_prefix('/')?;
        if let Some(verb) = leaf.strip_prefix("request/") {
            return Some(Verb::parse(verb).map_or(Arrival::UnknownVerb, Arrival::Request));
        }
        Setting::parse(leaf.strip_suffix("/set")?).map(Arrival::Set)
    }

    /// Whether a client may have its answer published on `topic`; else it could make us write where it may not.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn check_answer_topic(&self, topic: &str) -> Result<(), String> {
        let response = format!("{}/response/", self.root);
        let allowed = topic.strip_prefix(&response).is_some_and(|rest| !rest.is_empty())
            || self.answer_prefixes.iter().any(|prefix| topic.starts_with(prefix.as_str()));
        if allowed && is_plain(topic) && topic.len() <= ANSWER_TOPIC_BYTES_MAX && !is_set(topic) {
            return Ok(());
        }
        let shown: String = topic.chars().take(128).collect();
        Err(format!("answers go only to topics under `{response}`, not to `{shown}`"))
    }
}

impl Verb {
    const ALL: [Verb; 4] = [Verb::Cancel, Verb::Chat, Verb::Models, Verb::Status];

    pub(super) fn name(self) -> &'static str {
        match self {
            Verb::Cancel => "cancel",
            Verb::Chat => "chat",
            Verb::Models => "models",
            Verb::Status => "status",
        }
    }

    fn parse(name: &str) -> Option<Verb> {
        Verb::ALL.into_iter().find(|verb| verb.name() == name)
    }
}

impl Setting {
    const ALL: [Setting; 6] = [
        Setting::Ask,
        Setting::Cancel,
        Setting::MaxTokens,
        Setting::Model,
        Setting::Prompt,
        Setting::Temperature,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Setting::Ask => "ask",
            Setting::Cancel => "cancel",
            Setting::MaxTokens => "max_tokens",
            Setting::Model => "model",
            Setting::Prompt => "prompt",
            Setting::Temperature => "temperature",
        }
    }

    fn parse(name: &str) -> Option<Setting> {
        Setting::ALL.into_iter().find(|setting| setting.name() == name)
    }
}

/// A node's name made of a host's: what a topic cannot hold becomes `_`.
pub(super) fn node_of_host(host: &str) -> String {
    let short = host.split('.').next().unwrap_or_default();
    let keep = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
    let node: String = short.chars().take(64).map(keep).collect();
    if is_node(&node) { node } else { format!("scout{node}") }
}

fn is_node(node: &str) -> bool {
    (1..=64).contains(&node.len())
        && node != "pool"
        && node.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

/// A topic that may be published on: no wildcards, no `$` at the front, no control characters.
fn is_plain(topic: &str) -> bool {
    !topic.is_empty()
        && !topic.starts_with('$')
        && !topic.contains(|c: char| c == '+' || c == '#' || c.is_control())
}

fn is_set(topic: &str) -> bool {
    topic == "set" || topic.ends_with("/set")
}

/// Longest answer topic taken from a client.
const ANSWER_TOPIC_BYTES_MAX: usize = 512;

#[cfg(test)]
mod tests {
    use super::*;

    fn topics() -> Topics {
        Topics::new("scoutd", "pi5", "homeassistant", &["house/answers/".to_owned()])
            .expect("the names are valid")
    }

    #[test]
    fn topics_are_spelled_under_base_and_node() {
        let topics = topics();
        assert_eq!(topics.own("state"), "scoutd/pi5/state");
        assert_eq!(topics.response(Verb::Chat), "scoutd/pi5/response/chat");
        assert_eq!(topics.set(Setting::Ask), "scoutd/pi5/ask/set");
        assert_eq!(topics.discovery(), "homeassistant/device/scoutd_pi5/config");
        assert_eq!(topics.birth(), "homeassistant/status");
        assert_eq!(topics.filters(), ["scoutd/pi5/request/#", "scoutd/pi5/+/set"]);
    }

    #[test]
    fn arrivals_are_told_apart() {
        let cases = [
            ("scoutd/pi5/request/chat", Some(Arrival::Request(Verb::Chat))),
            ("scoutd/pi5/request/cancel", Some(Arrival::Request(Verb::Cancel))),
            ("scoutd/pi5/request/models", Some(Arrival::Request(Verb::Models))),
            ("scoutd/pi5/request/status", Some(Arrival::Request(Verb::Status))),
            ("scoutd/pi5/request/chat/more", Some(Arrival::UnknownVerb)),
            ("scoutd/pi5/request/", Some(Arrival::UnknownVerb)),
            ("scoutd/pi5/ask/set", Some(Arrival::Set(Setting::Ask))),
            ("scoutd/pi5/max_tokens/set", Some(Arrival::Set(Setting::MaxTokens))),
            ("scoutd/pi5/nonsense/set", None),
            ("scoutd/pi5/request", None),
            ("scoutd/pi55/request/chat", None),
            ("scoutd/pool/request/chat", None),
            ("homeassistant/status", Some(Arrival::Birth)),
            ("", None),
        ];
        for (topic, expected) in cases {
            assert_eq!(topics().arrival(topic), expected, "{topic}");
        }
    }

    #[test]
    fn every_name_is_read_back() {
        for verb in Verb::ALL {
            let topic = topics().own(&format!("request/{}", verb.name()));
            assert_eq!(topics().arrival(&topic), Some(Arrival::Request(verb)));
        }
        for setting in Setting::ALL {
            assert_eq!(topics().arrival(&topics().set(setting)), Some(Arrival::Set(setting)));
        }
    }

    #[test]
    fn answers_stay_where_clients_may_have_them() {
        for good in ["scoutd/pi5/response/kitchen", "scoutd/pi5/response/a/b", "house/answers/1"] {
            assert_eq!(topics().check_answer_topic(good), Ok(()), "{good}");
        }
        let long = format!("scoutd/pi5/response/{}", "x".repeat(512));
        let bad = [
            "",
            "scoutd/pi5/response/",
            "scoutd/pi5/response",
            "scoutd/pi5/response/+",
            "scoutd/pi5/response/#",
            "scoutd/pi5/response/a/set",
            "scoutd/pi5/response/set",
            "scoutd/pi5/response/a\0b",
            "scoutd/pi5/availability",
            "scoutd/other/response/x",
            "$SYS/x",
            "homeassistant/status",
            "house/answers/lamp/set",
            &long,
        ];
        for topic in bad {
            assert!(topics().check_answer_topic(topic).is_err(), "{topic}");
        }
    }

    #[test]
    fn bad_names_are_refused_by_name() {
        let check = |base, node, prefix| Topics::new(base, node, prefix, &[]).map(|_| ());
        assert!(check("house/scoutd", "pi5", "homeassistant").is_ok());
        assert_eq!(check("a+b", "pi5", "ha"), Err(TopicError::Base("a+b".into())));
        assert_eq!(check("$SYS", "pi5", "ha"), Err(TopicError::Base("$SYS".into())));
        for node in ["", "pool", "a/b", "ü", "a b", "#"] {
            assert_eq!(check("scoutd", node, "ha"), Err(TopicError::Node(node.into())));
        }
        assert_eq!(check("ha", "pi5", "ha/"), Err(TopicError::BaseIsPrefix("ha".into())));
        assert!(check("scoutd", "pi5", "").is_err());
    }

    #[test]
    fn hosts_become_nodes() {
        let cases = [
            ("pi5", "pi5"),
            ("pi5.local", "pi5"),
            ("Küche Pi", "K_che_Pi"),
            ("", "scout"),
            ("pool", "scoutpool"),
        ];
        for (host, node) in cases {
            assert_eq!(node_of_host(host), node, "{host}");
        }
    }
}
