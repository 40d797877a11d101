//! The pool's part of the configuration.

use std::path::PathBuf;

use ipnet::IpNet;
use serde::Deserialize;

use crate::egress::Url;

/// Whom the pool consists of, and how its nodes trust each other.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The pool's name, which is also a model: `fusion:<pool>`.
    pub pool: String,
    /// File with the key that scoutd nodes of the pool share; without it no other scoutd is asked or believed.
    pub key_file: Option<PathBuf>,
    /// Whether members outside the LAN may be asked; each needs `wan = true` besides.
    pub allow_wan: bool,
    /// Networks that belong to the LAN besides the private ones, such as a VPN's.
    pub lan_cidrs: Vec<String>,
    /// Announce this node by mDNS and look for others. Needs the key.
    pub mdns: bool,
    /// Take requests from the pool's line on the MQTT broker, and find others there.
    pub mqtt: bool,
    /// Members that are always there.
    pub members: Vec<MemberConfig>,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            pool: "default".to_owned(),
            key_file: None,
            allow_wan: false,
            lan_cidrs: Vec::new(),
            mdns: false,
            mqtt: false,
            members: Vec::new(),
        }
    }
}

/// A member that the owner names.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberConfig {
    /// Its name: 1 to 64 of `a-z A-Z 0-9 . _ -`.
    pub name: String,
    /// What it speaks.
    pub kind: Kind,
    /// `http://host:port`; a path before the API's own is kept, as in `https://openrouter.ai/api`.
    pub url: String,
    /// The model to ask; a scoutd's own default where absent.
    #[serde(default)]
    pub model: Option<String>,
    /// File with the key it wants as a bearer.
    #[serde(default)]
    pub key_file: Option<PathBuf>,
    /// How strong its model is, where its size does not say.
    #[serde(default)]
    pub tier: Option<Strength>,
    /// It may be outside the LAN.
    #[serde(default)]
    pub wan: bool,
    /// Requests of ours it gets at once.
    #[serde(default)]
    pub max_in_flight: Option<u16>,
    /// Ollama: the context to ask for, always the same; another one reloads its model.
    #[serde(default)]
    pub context_tokens: Option<u32>,
}

/// What a member speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// distributed-llama's root: one request at a time, few fields.
    Dllama,
    /// Ollama's `/api/chat`.
    Ollama,
    /// OpenAI's `/v1/chat/completions`.
    OpenAi,
    /// Another scoutd with the same pool key.
    Scoutd,
}

/// How strong a model is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strength {
    /// As a model of less than 2 billion weights.
    Tiny,
    /// Less than 6.
    Small,
    /// Less than 16.
    Medium,
    /// More.
    Large,
}

impl Kind {
    /// The word of the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Dllama => "dllama",
            Kind::Ollama => "ollama",
            Kind::OpenAi => "openai",
            Kind::Scoutd => "scoutd",
        }
    }

    /// The kind of this word.
    pub fn parse(word: &str) -> Option<Kind> {
        [Kind::Dllama, Kind::Ollama, Kind::OpenAi, Kind::Scoutd]
            .into_iter()
            .find(|kind| kind.as_str() == word)
    }
}

impl Strength {
    /// The word of the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Strength::Tiny => "tiny",
            Strength::Small => "small",
            Strength::Medium => "medium",
            Strength::Large => "large",
        }
    }

    /// The strength of this word.
    pub fn parse(word: &str) -> Option<Strength> {
        [Strength::Tiny, Strength::Small, Strength::Medium, Strength::Large]
            .into_iter()
            .find(|strength| strength.as_str() == word)
    }
}

impl Config {
    /// Everything wrong with the values themselves; empty is right.
    pub fn check(&self) -> Vec<String> {
        let mut errors = Vec::new();
        if !is_pool(&self.pool) {
            errors.push(format!("fusion.pool must be 1 to 32 of `a-z 0-9 -`: `{}`", self.pool));
        }
        if self.mdns && self.key_file.is_none() {
            errors.push("fusion.mdns needs fusion.key_file".to_owned());
        }
        for text in &self.lan_cidrs {
            if text.parse::<IpNet>().is_err() {
                errors.push(format!("fusion.lan_cidrs: \"{text}\" is no network"));
            }
        }
        for (index, member) in self.members.iter().enumerate() {
            errors
                .extend(member.check().into_iter().map(|error| format!("fusion.members: {error}")));
            if self.members[..index].iter().any(|other| other.name == member.name) {
                errors.push(format!("fusion.members: two are named `{}`", member.name));
            }
        }
        errors
    }

    pub(super) fn lan(&self) -> Vec<IpNet> {
        self.lan_cidrs.iter().filter_map(|text| text.parse().ok()).collect()
    }
}

impl MemberConfig {
    /// As a table of the configuration. Its values were checked, so they need no more than quotes.
    pub(super) fn to_toml(&self) -> String {
        let text = |value: &str| toml::Value::String(value.to_owned()).to_string();
        let mut table = format!(
            "\n[[members]]\nname = {}\nkind = \"{}\"\nurl = {}\n",
            text(&self.name),
            self.kind.as_str(),
            text(&self.url)
        );
        if let Some(model) = &self.model {
            table.push_str(&format!("model = {}\n", text(model)));
        }
        if let Some(tier) = self.tier {
            table.push_str(&format!("tier = \"{}\"\n", tier.as_str()));
        }
        if let Some(max) = self.max_in_flight {
            table.push_str(&format!("max_in_flight = {max}\n"));
        }
        table
    }

    /// What is wrong with it, if anything.
    pub fn check(&self) -> Option<String> {
        let name = &self.name;
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if !(1..=64).contains(&name.len()) || !name.bytes().all(plain) || name == "local" {
            return Some(format!(
                "a name must be 1 to 64 of `a-z A-Z 0-9 . _ -`, and not `local`: `{name}`"
            ));
        }
        if let Err(error) = self.url.parse::<Url>() {
            return Some(format!("{name}: {error}"));
        }
        let bare = matches!(self.kind, Kind::Ollama | Kind::OpenAi);
        if bare && self.model.as_deref().is_none_or(str::is_empty) {
            return Some(format!("{name}: a member of kind {} needs a model", self.kind.as_str()));
        }
        if self.model.as_ref().is_some_and(|model| model.len() > 128) {
            return Some(format!("{name}: the model's name has more than 128 bytes"));
        }
        None
    }
}

fn is_pool(name: &str) -> bool {
    (1..=32).contains(&name.len())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str, kind: Kind, url: &str, model: Option<&str>) -> MemberConfig {
        MemberConfig {
            name: name.to_owned(),
            kind,
            url: url.to_owned(),
            model: model.map(str::to_owned),
            key_file: None,
            tier: None,
            wan: false,
            max_in_flight: None,
            context_tokens: None,
        }
    }

    #[test]
    fn faults_are_named() {
        assert!(Config::default().check().is_empty());
        let good = member("pi-a", Kind::Scoutd, "http://192.168.1.5:11434", None);
        let cases = [
            (member("", Kind::Scoutd, "http://a", None), "a name must be"),
            (member("local", Kind::Scoutd, "http://a", None), "not `local`"),
            (member("a/b", Kind::Scoutd, "http://a", None), "a name must be"),
            (member("a", Kind::Scoutd, "192.168.1.5:11434", None), "a: "),
            (member("a", Kind::Ollama, "http://a", None), "needs a model"),
            (member("pi-a", Kind::Scoutd, "http://b", None), "two are named"),
        ];
        for (bad, expected) in cases {
            let config = Config { members: vec![good.clone(), bad], ..Config::default() };
            let errors = config.check();
            assert!(errors.len() == 1 && errors[0].contains(expected), "{errors:?}");
        }
        let config = Config {
            pool: "House".to_owned(),
            mdns: true,
            lan_cidrs: vec!["10.0.0.0/33".to_owned()],
            ..Config::default()
        };
        assert_eq!(config.check().len(), 3);
    }

    #[test]
    fn tables_read_back() {
        #[derive(Deserialize)]
        struct File {
            members: Vec<MemberConfig>,
        }
        let mut written = member("hub", Kind::Ollama, "http://hub.lan:11434", Some("a \"b\" \n c"));
        written.tier = Some(Strength::Medium);
        written.max_in_flight = Some(2);
        let file: File = toml::from_str(&written.to_toml()).expect("our own table");
        assert_eq!(file.members, [written]);
    }

    #[test]
    fn words() {
        for word in ["dllama", "ollama", "openai", "scoutd"] {
            assert_eq!(Kind::parse(word).map(Kind::as_str), Some(word));
        }
        assert_eq!(Kind::parse("local"), None);
        assert_eq!(Strength::parse("large"), Some(Strength::Large));
    }
}
