//! Who is let in.

use scoutd::chat::Router;
use scoutd::metrics::Metrics;
use scoutd::rest::{self, Config, Keys, Readiness, RestParts};

use crate::doubles::says;
use crate::http::Server;

const BODY: &str = r#"{"messages":[{"role":"user","content":"x"}]}"#;

#[test]
fn foreign_hosts_and_pages_are_refused() {
    let config = Config {
        allowed_hosts: vec!["pi.example".to_owned()],
        allowed_origins: vec!["https://page.example".to_owned()],
        ..Config::default()
    };
    let server = Server::start_with(says(&["ok"]), config, "");
    let own = format!("Host: {}", server.address);
    let origin = format!("Origin: http://{}", server.address);
    let cases: &[(&[&str], u16)] = &[
        (&["Host: evil.example"], 403),
        (&["Host: evil.example:11434"], 403),
        (&["Host: a", "Host: localhost"], 400),
        (&["Host: "], 403),
        (&["Host: scoutd.local:11434"], 200),
        (&["Host: pi.example"], 200),
        (&[&own], 200),
        (&[&own, &origin], 200),
        (&["Origin: https://page.example", "Sec-Fetch-Site: cross-site"], 200),
        (&["Origin: http://evil.example", "Content-Type: text/plain"], 403),
        (&["Origin: null"], 403),
        (&["Sec-Fetch-Site: cross-site"], 403),
    ];
    for (headers, status) in cases {
        let response = server.request("POST", "/v1/chat/completions", headers, BODY);
        assert_eq!(response.status, *status, "{headers:?}: {}", response.text());
    }
    let evil = server.request("GET", "/api/tags", &["Host: evil.example"], "");
    assert_eq!(evil.status, 403);
    assert!(evil.json()["error"].is_string());
    let absolute = server.request("GET", "http://evil.example/api/tags", &[], "");
    assert_eq!(absolute.status, 403);
}

#[test]
fn only_known_pages_may_read_across_origins() {
    let config =
        Config { allowed_origins: vec!["https://page.example".to_owned()], ..Config::default() };
    let server = Server::start_with(says(&["ok"]), config, "");
    let known = ["Origin: https://page.example"];
    let response = server.request("GET", "/v1/models", &known, "");
    assert_eq!(response.header("access-control-allow-origin"), Some("https://page.example"));
    let response = server.request("GET", "/v1/models", &["Origin: http://evil.example"], "");
    assert_eq!((response.status, response.header("access-control-allow-origin")), (200, None));
    let ask = ["Origin: https://page.example", "Access-Control-Request-Headers: x-stainless-os"];
    let preflight = server.request("OPTIONS", "/v1/chat/completions", &ask, "");
    assert_eq!(preflight.status, 204);
    assert_eq!(preflight.header("access-control-allow-headers"), Some("x-stainless-os"));
    let foreign = server.request("OPTIONS", "/api/chat", &["Origin: http://evil.example"], "");
    assert_eq!(foreign.status, 403);
}

#[test]
fn keys_and_their_scopes() {
    let keys = "app inference 0123456789abcdef\nops metrics fedcba9876543210\n";
    let server = Server::start_with(says(&["ok"]), Config::default(), keys);
    let app = "Authorization: Bearer 0123456789abcdef";
    let ops = "Authorization: Bearer fedcba9876543210";
    for path in ["/", "/health", "/v1/health", "/healthz", "/readyz"] {
        assert_eq!(server.get(path).status, 200, "{path} is public");
    }
    let cases = [
        ("/v1/models", "X: y", 401),
        ("/v1/models", "Authorization: Bearer wrong", 401),
        ("/v1/models", app, 200),
        ("/v1/models", ops, 403),
        ("/metrics", app, 403),
        ("/metrics", ops, 200),
        ("/api/tags", app, 200),
    ];
    for (path, header, status) in cases {
        let response = server.request("GET", path, &[header], "");
        assert_eq!(response.status, status, "{path} {header}");
        let challenge = response.header("www-authenticate");
        assert_eq!(challenge, (status == 401).then_some("Bearer"));
    }
    assert_eq!(server.request("POST", "/api/pull", &[app], "{}").status, 403);
    assert_eq!(server.request("POST", "/api/pull", &[], "{}").status, 401);
    let error = server.get("/v1/models").json();
    assert_eq!(error["error"]["type"], "authentication_error");
}

#[test]
fn without_keys_any_key_will_do() {
    let server = Server::start(says(&["ok"]));
    let header = ["Authorization: Bearer sk-0000000000000000000"];
    assert_eq!(server.request("GET", "/v1/models", &header, "").status, 200);
}

#[test]
fn trusted_clients_need_no_key() {
    let config = Config { trusted_clients: vec!["127.0.0.0/8".to_owned()], ..Config::default() };
    let server = Server::start_with(says(&["ok"]), config, "app inference 0123456789abcdef");
    assert_eq!(server.get("/api/tags").status, 200);
    assert_eq!(server.get("/metrics").status, 401);
}

#[test]
fn an_open_lan_must_be_meant() {
    let parts = || RestParts {
        router: Router::new(Vec::new()),
        metrics: Metrics::new().into(),
        readiness: Readiness::new().into(),
        keys: Keys::default(),
        default_deadline: std::time::Duration::from_secs(1),
        slots: 1,
        pool: None,
        models: None,
    };
    let config = Config { listen: vec!["0.0.0.0:0".to_owned()], ..Config::default() };
    let error = rest::bind(&config, parts()).err().expect("refused").to_string();
    assert!(error.contains("allow_lan_without_key"), "{error}");
    let open = Config { allow_lan_without_key: true, ..config };
    assert!(rest::bind(&open, parts()).is_ok());
    let none = Config { listen: Vec::new(), ..Config::default() };
    assert_eq!(rest::bind(&none, parts()).expect("no HTTP is fine").addresses(), []);
    let nowhere = Config { listen: vec!["nowhere.invalid:1".to_owned()], ..Config::default() };
    let error = rest::bind(&nowhere, parts()).err().expect("unresolvable").to_string();
    assert!(error.starts_with("nowhere.invalid:1: "), "{error}");
}

#[test]
fn the_page_is_for_browsers() {
    let server = Server::start(says(&[]));
    let page = server.request("GET", "/", &["Accept: text/html,*/*;q=0.8"], "");
    assert_eq!(page.header("content-type"), Some("text/html; charset=utf-8"));
    let policy = page.header("content-security-policy").expect("a policy");
    assert!(policy.starts_with("default-src 'none'; script-src 'sha256-"), "{policy}");
    assert!(page.text().contains("<!doctype html>"));
}
