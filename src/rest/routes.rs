//! Which paths exist, which methods they take, and which key opens them.

use super::error::Dialect;
use super::keys::Scope;

/// What a path stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Endpoint {
    /// Something of the dialect's that this server does not have.
    Absent(&'static str),
    Chat,
    Completions,
    Health,
    Live,
    Metrics,
    Model(String),
    Models,
    OllamaChat,
    OllamaDelete,
    OllamaGenerate,
    OllamaPs,
    OllamaPull,
    OllamaShow,
    OllamaTags,
    OllamaVersion,
    PoolCalibrate,
    PoolMember(String),
    PoolMembers,
    PoolReceipt(String),
    PoolScore,
    PoolSelf,
    PoolState,
    Props,
    Ready,
    Root,
}

/// A path's rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) endpoint: Endpoint,
    pub(super) methods: &'static str,
    pub(super) scope: Scope,
}

const READ: &str = "GET, HEAD";
const ACT: &str = "POST";

impl Route {
    /// The scope that a key must have for this method: members are listed for everybody who may ask, and changed
    /// by the owner alone.
    pub(super) fn scope_for(&self, method: &str) -> Scope {
        match (&self.endpoint, method) {
            (Endpoint::PoolMembers, "POST") => Scope::Admin,
            _ => self.scope,
        }
    }
}

/// The dialect in which a path's errors are.
pub(super) fn dialect(path: &str) -> Dialect {
    if path == "/api" || path.starts_with("/api/") { Dialect::Ollama } else { Dialect::OpenAi }
}

/// The route of `path`, as it stands in the request line without the query.
pub(super) fn find(path: &str) -> Option<Route> {
    let path = match path.strip_suffix('/') {
        Some(shorter) if !shorter.is_empty() && !shorter.ends_with('/') => shorter,
        _ => path,
    };
    let route = |endpoint, methods, scope| Some(Route { endpoint, methods, scope });
    let absent = |what| route(Endpoint::Absent(what), ACT, Scope::Inference);
    let admin = |what, methods| route(Endpoint::Absent(what), methods, Scope::Admin);
    if let Some(name) = path.strip_prefix("/v1/models/").or(path.strip_prefix("/models/")) {
        return route(Endpoint::Model(decode(name)?), READ, Scope::Inference);
    }
    if let Some(name) = path.strip_prefix("/fusion/v1/members/") {
        return route(Endpoint::PoolMember(decode(name)?), "DELETE", Scope::Admin);
    }
    if let Some(id) = path.strip_prefix("/fusion/v1/receipts/") {
        return route(Endpoint::PoolReceipt(decode(id)?), READ, Scope::Inference);
    }
    if path.starts_with("/api/blobs/") {
        return admin("this server does not store blobs", "HEAD, POST");
    }
    match path {
        "/" => route(Endpoint::Root, READ, Scope::Public),
        "/health" | "/v1/health" => route(Endpoint::Health, READ, Scope::Public),
        "/healthz" => route(Endpoint::Live, READ, Scope::Public),
        "/readyz" => route(Endpoint::Ready, READ, Scope::Public),
        "/metrics" => route(Endpoint::Metrics, READ, Scope::Metrics),
        "/props" => route(Endpoint::Props, READ, Scope::Inference),
        "/fusion/v1/self" => route(Endpoint::PoolSelf, READ, Scope::Pool),
        "/fusion/v1/score" => route(Endpoint::PoolScore, ACT, Scope::Pool),
        "/fusion/v1/pool" => route(Endpoint::PoolState, READ, Scope::Inference),
        "/fusion/v1/calibrate" => route(Endpoint::PoolCalibrate, ACT, Scope::Admin),
        "/fusion/v1/members" => route(Endpoint::PoolMembers, "GET, HEAD, POST", Scope::Inference),
        "/v1/models" | "/models" => route(Endpoint::Models, READ, Scope::Inference),
        "/v1/chat/completions" | "/chat/completions" => {
            route(Endpoint::Chat, ACT, Scope::Inference)
        }
        "/v1/completions" | "/completions" => route(Endpoint::Completions, ACT, Scope::Inference),
        "/v1/embeddings" | "/embeddings" => absent("this server has no embedding model"),
        "/v1/responses" | "/responses" => absent("use /v1/chat/completions"),
        "/v1/messages" | "/messages" => absent("use /v1/chat/completions"),
        "/api/version" => route(Endpoint::OllamaVersion, READ, Scope::Inference),
        "/api/tags" => route(Endpoint::OllamaTags, READ, Scope::Inference),
        "/api/ps" => route(Endpoint::OllamaPs, READ, Scope::Inference),
        "/api/show" => route(Endpoint::OllamaShow, ACT, Scope::Inference),
        "/api/chat" => route(Endpoint::OllamaChat, ACT, Scope::Inference),
        "/api/generate" => route(Endpoint::OllamaGenerate, ACT, Scope::Inference),
        "/api/embed" | "/api/embeddings" => absent("this server has no embedding model"),
        "/api/pull" => route(Endpoint::OllamaPull, ACT, Scope::Admin),
        "/api/push" => admin("this server does not push models", ACT),
        "/api/create" => admin("this server does not create models over HTTP", ACT),
        "/api/copy" => admin("this server does not copy models", ACT),
        "/api/delete" => route(Endpoint::OllamaDelete, "DELETE", Scope::Admin),
        _ => None,
    }
}

/// Undoes `%XX`.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        rest = after;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let [high, low, after @ ..] = rest else { return None };
        let digit = |byte: &u8| char::from(*byte).to_digit(16);
        bytes.push((digit(high)? * 16 + digit(low)?) as u8);
        rest = after;
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_with_and_without_version() {
        for path in ["models", "chat/completions", "completions", "embeddings"] {
            let (with, without) = (find(&format!("/v1/{path}")), find(&format!("/{path}")));
            assert!(with.is_some() && with == without, "{path}");
            assert_eq!(find(&format!("/v1/{path}/")), with, "{path}");
        }
        for path in ["", "/v2/models", "/v1", "/api", "/api/nothing", "//", "/v1/chat", "/API/tags"]
        {
            assert_eq!(find(path), None, "{path}");
        }
    }

    #[test]
    fn names_of_models_in_paths() {
        for (path, name) in [
            ("/v1/models/scout%3Alatest", Some("scout:latest")),
            ("/models/org/scout", Some("org/scout")),
            ("/v1/models/%zz", None),
            ("/v1/models/%f", None),
            ("/v1/models/%ff", None),
        ] {
            let found = find(path).map(|route| route.endpoint);
            assert_eq!(found, name.map(|name| Endpoint::Model(name.to_owned())), "{path}");
        }
    }

    #[test]
    fn members_are_changed_by_the_owner() {
        let members = find("/fusion/v1/members").expect("a path");
        assert_eq!(members.scope_for("GET"), Scope::Inference);
        assert_eq!(members.scope_for("POST"), Scope::Admin);
        let member = find("/fusion/v1/members/pi-a").expect("a path");
        assert_eq!((member.scope_for("DELETE"), member.methods), (Scope::Admin, "DELETE"));
    }

    #[test]
    fn management_needs_the_admin_key() {
        for path in ["/api/pull", "/api/delete", "/api/copy", "/api/blobs/sha256:00"] {
            assert_eq!(find(path).map(|route| route.scope), Some(Scope::Admin), "{path}");
        }
    }
}
