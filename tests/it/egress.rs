//! The outgoing client against servers that are raw sockets, so that they can do what servers should not.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use scoutd::egress::{Client, ClientConfig, EgressError, Method, Reach, Request, Url};

use crate::certificate::Certificate;
use crate::http::PATIENCE;

/// A server for one connection: gets the stream after the request's head was read, and that head.
fn serve_once<T: Send + 'static>(
    act: impl FnOnce(&mut BufReader<TcpStream>, &str) -> T + Send + 'static,
) -> (SocketAddr, JoinHandle<T>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let address = listener.local_addr().expect("bound");
    let thread = std::thread::spawn(move || {
        let (stream, _) = listener.accept().expect("the client connects");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let mut stream = BufReader::new(stream);
        let head = read_head(&mut stream);
        act(&mut stream, &head)
    });
    (address, thread)
}

/// What the server saw; the client's connections go on meanwhile.
async fn joined<T: Send + 'static>(server: JoinHandle<T>) -> T {
    let joined = tokio::task::spawn_blocking(move || server.join()).await;
    joined.expect("not cancelled").expect("the server ran")
}

fn read_head(stream: &mut impl BufRead) -> String {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert!(stream.read_line(&mut head).expect("text") > 0, "the client left: {head}");
    }
    head
}

fn lan() -> ClientConfig {
    ClientConfig::new(Reach::Lan { also: Vec::new() })
}

fn client(config: ClientConfig) -> Client {
    Client::new(config).expect("a valid configuration")
}

fn url(text: &str) -> Url {
    text.parse().expect("an address")
}

fn get(text: &str) -> Request {
    Request::get(url(text))
}

#[tokio::test]
async fn a_request_and_its_answer() {
    let (address, server) = serve_once(|stream, head| {
        let mut body = [0; 2];
        stream.read_exact(&mut body).expect("the body");
        let answer = "HTTP/1.1 201 Created\r\nX-Thing: a\r\nTransfer-Encoding: chunked\r\n\r\n\
                      3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n";
        stream.get_mut().write_all(answer.as_bytes()).expect("the client reads");
        (head.to_owned(), body)
    });
    let target = url(&format!("http://{address}/path?q=1"));
    let mut answer = client(lan()).send(Request::post_json(target, "{}")).await.expect("an answer");
    assert_eq!((answer.status, answer.header("x-thing")), (201, Some("a")));
    assert_eq!(answer.remote, address);
    assert_eq!(answer.body(5).await.expect("the body"), b"abcde");
    let (head, body) = joined(server).await;
    assert!(head.starts_with("POST /path?q=1 HTTP/1.1\r\n"), "{head}");
    for line in ["Content-Type: application/json", "Content-Length: 2", "User-Agent: scoutd/"] {
        assert!(head.contains(line), "no `{line}` in {head}");
    }
    assert!(head.contains(&format!("Host: {address}\r\n")), "{head}");
    assert_eq!(&body, b"{}");
}

#[tokio::test]
async fn addresses_outside_are_refused_before_anything_is_sent() {
    let client = client(lan());
    for host in ["8.8.8.8", "[::ffff:8.8.8.8]", "0x08080808", "[64:ff9b::8.8.8.8]", "0.0.0.0"] {
        let error = client.send(get(&format!("http://{host}:9/"))).await.expect_err("refused");
        assert!(matches!(error, EgressError::NotAllowed { .. }), "{host}: {error}");
    }
    let outside = Client::new(ClientConfig::new(Reach::Wan)).expect("valid");
    for host in ["127.0.0.1", "[::1]", "169.254.169.254", "0x7f000001", "[::ffff:127.0.0.1]"] {
        let error = outside.send(get(&format!("http://{host}:9/"))).await.expect_err("refused");
        assert!(matches!(error, EgressError::NotAllowed { .. }), "{host}: {error}");
    }
}

#[tokio::test]
async fn other_spellings_of_loopback_are_resolved_then_checked() {
    for host in ["0x7f000001", "2130706433", "[::ffff:127.0.0.1]", "localhost"] {
        let (address, server) = serve_once(|stream, _| {
            let answer = b"HTTP/1.1 204 No Content\r\n\r\n";
            stream.get_mut().write_all(answer).expect("the client reads");
        });
        let url = format!("http://{host}:{}/", address.port());
        let answer = client(lan()).send(get(&url)).await.expect(host);
        assert_eq!(answer.status, 204);
        assert!(answer.remote.ip().to_canonical().is_loopback());
        joined(server).await;
    }
}

#[tokio::test]
async fn redirects_are_returned() {
    let (address, server) = serve_once(|stream, _| {
        let answer = "HTTP/1.1 302 Found\r\nLocation: /there\r\nContent-Length: 0\r\n\r\n";
        stream.get_mut().write_all(answer.as_bytes()).expect("the client reads");
    });
    let answer = client(lan()).send(get(&format!("http://{address}/"))).await.expect("an answer");
    assert_eq!((answer.status, answer.header("location")), (302, Some("/there")));
    joined(server).await;
}

#[tokio::test]
async fn refused_and_unknown() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let address = listener.local_addr().expect("bound");
    drop(listener);
    let error = client(lan()).send(get(&format!("http://{address}/"))).await.expect_err("closed");
    assert_eq!(error, EgressError::ConnectRefused { host: "127.0.0.1".to_owned() });
    let error = client(lan()).send(get("http://nowhere.invalid/")).await.expect_err("no name");
    assert!(matches!(error, EgressError::Resolve { .. }), "{error}");
}

#[tokio::test]
async fn resets_before_and_in_the_body() {
    let (address, server) = serve_once(|_, _| {});
    let error = client(lan()).send(get(&format!("http://{address}/"))).await.expect_err("cut");
    assert!(matches!(error, EgressError::Reset { .. }), "{error}");
    joined(server).await;

    for head in ["Content-Length: 10\r\n\r\nabc", "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"]
    {
        let (address, server) = serve_once(move |stream, _| {
            let answer = format!("HTTP/1.1 200 OK\r\n{head}");
            stream.get_mut().write_all(answer.as_bytes()).expect("the client reads");
        });
        let mut answer =
            client(lan()).send(get(&format!("http://{address}/"))).await.expect("a head");
        let error = answer.body(100).await.expect_err("cut");
        assert!(matches!(error, EgressError::Reset { .. }), "{head:?}: {error}");
        joined(server).await;
    }
}

#[tokio::test]
async fn what_is_not_http_and_what_is_too_long() {
    for nonsense in ["SSH-2.0-OpenSSH\r\n", "HTTP/1.1 abc\r\n\r\n"] {
        let (address, server) = serve_once(move |stream, _| {
            stream.get_mut().write_all(nonsense.as_bytes()).expect("the client reads");
        });
        let error = client(lan()).send(get(&format!("http://{address}/"))).await.expect_err("bad");
        assert!(matches!(error, EgressError::Protocol { .. }), "{nonsense:?}: {error}");
        joined(server).await;
    }
    let (address, server) = serve_once(|stream, _| {
        let answer = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n";
        stream.get_mut().write_all(answer.as_bytes()).expect("the client reads");
    });
    let mut answer = client(lan()).send(get(&format!("http://{address}/"))).await.expect("a head");
    let error = answer.chunk().await.expect_err("no chunk size");
    assert!(matches!(error, EgressError::Protocol { .. }), "{error}");
    joined(server).await;

    let (address, server) = serve_once(|stream, _| {
        let answer = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabcde";
        stream.get_mut().write_all(answer.as_bytes()).expect("the client reads");
    });
    let mut answer = client(lan()).send(get(&format!("http://{address}/"))).await.expect("a head");
    let error = answer.body(4).await.expect_err("five bytes");
    assert!(matches!(error, EgressError::TooLong { limit: 4, .. }), "{error}");
    joined(server).await;
}

/// A listener whose queue is full takes no further connection and refuses none: packets to it vanish.
#[tokio::test]
async fn a_black_hole_is_a_connect_timeout() {
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::STREAM,
        None,
    )
    .expect("a socket");
    rustix::net::bind(&socket, &SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).expect("a free port");
    rustix::net::listen(&socket, 0).expect("bound");
    let address: SocketAddr =
        rustix::net::getsockname(socket.as_fd()).expect("bound").try_into().expect("IPv4");
    let mut fillers = Vec::new();
    while let Ok(filler) = TcpStream::connect_timeout(&address, Duration::from_millis(200)) {
        fillers.push(filler);
        assert!(fillers.len() < 64, "the queue never fills");
    }
    let config = ClientConfig { connect_timeout: Duration::from_millis(300), ..lan() };
    let start = Instant::now();
    let error = client(config).send(get(&format!("http://{address}/"))).await.expect_err("silence");
    assert!(matches!(error, EgressError::ConnectTimeout { .. }), "{error}");
    assert!(start.elapsed() < PATIENCE);
}

#[tokio::test]
async fn silence_is_bounded() {
    let config = || ClientConfig { stall_timeout: Some(Duration::from_millis(100)), ..lan() };
    let until_gone =
        |stream: &mut BufReader<TcpStream>| stream.read_to_end(&mut Vec::new()).is_ok();
    let (address, server) = serve_once(move |stream, _| until_gone(stream));
    let error =
        client(config()).send(get(&format!("http://{address}/"))).await.expect_err("silence");
    assert!(matches!(error, EgressError::Stalled { .. }), "{error}");
    assert!(joined(server).await, "the connection was closed");

    let (address, server) = serve_once(move |stream, _| {
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc";
        stream.get_mut().write_all(answer).expect("the client reads");
        until_gone(stream)
    });
    let mut answer = client(config()).send(get(&format!("http://{address}/"))).await.expect("head");
    assert_eq!(answer.chunk().await.expect("a chunk").as_deref(), Some(&b"abc"[..]));
    let error = answer.chunk().await.expect_err("silence");
    assert!(matches!(error, EgressError::Stalled { .. }), "{error}");
    drop(answer);
    assert!(joined(server).await, "the connection was closed");
}

#[tokio::test]
async fn dropping_a_response_or_a_request_closes_the_connection() {
    // The server writes until the client is gone; it would block for ever on a client that only stops reading.
    let (address, server) = serve_once(|stream, _| {
        let stream = stream.get_mut();
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n").expect("alive");
        stream.set_write_timeout(Some(PATIENCE)).expect("a socket");
        let error = std::iter::repeat_with(|| stream.write_all(&[0; 65536]))
            .find_map(Result::err)
            .expect("an end");
        error.kind()
    });
    let mut answer = client(lan()).send(get(&format!("http://{address}/"))).await.expect("a head");
    assert!(answer.chunk().await.expect("bytes").is_some());
    drop(answer);
    let kind = joined(server).await;
    assert!(
        matches!(kind, std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset),
        "{kind:?}"
    );

    let (ask, mut asked) = tokio::sync::mpsc::channel(1);
    let (address, server) = serve_once(move |stream, _| {
        ask.blocking_send(()).expect("the test waits");
        stream.read(&mut [0]).map_or(true, |bytes| bytes == 0)
    });
    let client = client(lan());
    tokio::select! {
        _ = client.send(get(&format!("http://{address}/"))) => panic!("no answer was sent"),
        _ = asked.recv() => {}
    }
    assert!(joined(server).await, "the connection was closed");
}

#[tokio::test]
async fn connections_are_reused_and_few_are_kept() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let address = listener.local_addr().expect("bound");
    // Answers each request of each connection with the connection's number.
    std::thread::spawn(move || {
        for (number, stream) in listener.incoming().flatten().enumerate() {
            std::thread::spawn(move || {
                let mut stream = BufReader::new(stream);
                let mut line = String::new();
                while stream.read_line(&mut line).is_ok_and(|bytes| bytes > 0) {
                    if line.ends_with("\r\n\r\n") {
                        line.clear();
                        let body = number.to_string();
                        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}", body.len());
                        let _ =
                            stream.get_mut().write_all(format!("{head}\r\n\r\n{body}").as_bytes());
                    }
                }
            });
        }
    });
    let client = client(lan());
    let mut seen = Vec::new();
    for _ in 0..3 {
        let mut answer = client.send(get(&format!("http://{address}/"))).await.expect("an answer");
        seen.push(String::from_utf8(answer.body(9).await.expect("a number")).expect("text"));
    }
    assert_eq!(seen, ["0", "0", "0"], "one connection serves requests in a row");
}

#[tokio::test]
async fn tls_to_whom_we_trust_and_to_nobody_else() {
    let ours = Certificate::new(Ipv4Addr::LOCALHOST.into());
    let elsewhere = Certificate::new(Ipv6Addr::LOCALHOST.into());
    let ask = async |shown: &Certificate, trusted: Option<&Certificate>| {
        let (address, server) = serve_tls_once(shown);
        let config = ClientConfig { extra_ca_pem: trusted.map(Certificate::pem), ..lan() };
        let mut request = get(&format!("https://{address}/"));
        request.method = Method::HEAD;
        let result = client(config).send(request).await.map(|answer| answer.status);
        joined(server).await;
        result
    };
    assert_eq!(ask(&ours, Some(&ours)).await, Ok(204));
    for (shown, trusted) in
        [(&ours, None), (&ours, Some(&elsewhere)), (&elsewhere, Some(&elsewhere))]
    {
        let error = ask(shown, trusted).await.expect_err("not to be trusted");
        assert!(matches!(error, EgressError::Tls { .. }), "{error}");
    }
    // Plain HTTP where TLS is expected.
    let (address, server) = plain_for_tls();
    let error = client(lan()).send(get(&format!("https://{address}/"))).await.expect_err("no TLS");
    assert!(matches!(error, EgressError::Tls { .. }), "{error}");
    joined(server).await;
}

fn serve_tls_once(certificate: &Certificate) -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let address = listener.local_addr().expect("bound");
    let config = certificate.server();
    let thread = std::thread::spawn(move || {
        let (stream, _) = listener.accept().expect("the client connects");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let session = rustls::ServerConnection::new(Arc::clone(&config)).expect("a valid config");
        let mut stream = BufReader::new(rustls::StreamOwned::new(session, stream));
        // A client that does not trust us leaves in the handshake.
        let mut line = String::new();
        while stream.read_line(&mut line).is_ok_and(|bytes| bytes > 0) {
            if line.ends_with("\r\n\r\n") {
                let _ = stream
                    .get_mut()
                    .write_all(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n");
                break;
            }
        }
    });
    (address, thread)
}

fn plain_for_tls() -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let address = listener.local_addr().expect("bound");
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("the client connects");
        let mut hello = [0; 5];
        stream.read_exact(&mut hello).expect("a TLS record");
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").expect("the client reads");
        // Read what is left, so that closing does not reset what was written.
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    });
    (address, thread)
}
