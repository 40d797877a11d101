//! Members are on the LAN: what leads elsewhere is refused and counted, and nothing is sent there.

use std::io::Write;
use std::sync::Mutex;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use scoutd::chat::FaultReason;
use scoutd::peer::{Config, Kind, MemberConfig};

use super::{Home, answers, member, read_request, serve};

const LONG: Duration = Duration::from_secs(5);

fn at(url: &str) -> MemberConfig {
    let address = "127.0.0.1:1".parse().expect("an address");
    MemberConfig { url: url.to_owned(), ..member(Kind::OpenAi, address) }
}

#[test]
fn addresses_outside_are_no_members() {
    for url in [
        "http://8.8.8.8",
        "http://[::ffff:8.8.8.8]",
        "http://100.64.0.1:80",
        "https://[2001:db8::1]",
    ] {
        let error = Home::try_new(Config { members: vec![at(url)], ..Config::default() });
        let error = error.err().expect(url).to_string();
        assert!(error.contains("outside the LAN"), "{url}: {error}");
        for (wan, allow_wan) in [(true, false), (false, true)] {
            let members = vec![MemberConfig { wan, ..at(url) }];
            let half = Home::try_new(Config { members, allow_wan, ..Config::default() });
            assert!(half.is_err(), "{url}: both switches are needed");
        }
        let members = vec![MemberConfig { wan: true, ..at(url) }];
        assert!(Home::try_new(Config { members, allow_wan: true, ..Config::default() }).is_ok());
    }
    let lan_cidrs = vec!["100.64.0.0/10".to_owned()];
    let members = vec![at("http://100.64.0.1:80")];
    assert!(Home::try_new(Config { members, lan_cidrs, ..Config::default() }).is_ok());
}

#[test]
fn names_that_lead_outside_are_refused_when_they_do() {
    // The system's resolver reads a number as the address it is; to us it is a name.
    let home = Home::new(Config { members: vec![at("http://134744072:80")], ..Config::default() });
    assert_eq!(home.fault(LONG), FaultReason::WanDns);
    assert_eq!(home.metrics.fusion_egress_refused.get(), 1);
    assert!(home.is_idle());
}

#[test]
fn models_in_a_cloud_are_outside_however_near_their_server_is() {
    let (asked, paths) = sync_channel(256);
    let asked = Mutex::new(asked);
    let address = serve(move |mut stream| {
        let (head, _) = read_request(&mut stream);
        let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
        asked.lock().expect("no panic").send(path).expect("the test listens");
        let body = r#"{"models":[{"name":"far:latest","remote_host":"https://ollama.example"},{"name":"near"}]}"#;
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            body.len()
        );
        let _ = stream.write_all(format!("{head}{body}").as_bytes());
    });
    for (model, asks) in [("big:120b-cloud", false), ("far", true)] {
        let members =
            vec![MemberConfig { model: Some(model.to_owned()), ..member(Kind::Ollama, address) }];
        let home = Home::new(Config { members, ..Config::default() });
        assert_eq!(home.fault(LONG), FaultReason::WanModel);
        assert_eq!(home.metrics.fusion_egress_refused.get(), 1);
        assert_eq!(paths.try_recv().ok().as_deref(), asks.then_some("/api/tags"));
        assert!(paths.try_recv().is_err(), "no prompt is sent");
    }
}

#[test]
fn a_redirect_is_not_followed() {
    let (asked, arrivals) = sync_channel(256);
    let asked = Mutex::new(asked);
    let elsewhere =
        serve(move |_| asked.lock().expect("no panic").send(()).expect("the test listens"));
    for status in ["301 Moved", "302 Found", "307 Temporary", "308 Permanent"] {
        let answer = format!(
            "HTTP/1.1 {status}\r\nLocation: http://{elsewhere}/v1/chat/completions\r\nContent-Length: 0\r\n\r\n"
        );
        let home = Home::with(Kind::OpenAi, answers(answer));
        assert_eq!(home.fault(LONG), FaultReason::Redirect);
    }
    assert!(arrivals.try_recv().is_err(), "somebody followed");
}
