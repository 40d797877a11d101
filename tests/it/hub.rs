//! Pulling models from a hub that behaves and from one that does not: the library, and the real binary.

mod http;
pub(crate) mod server;

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use serde_json::Value;

use scoutd::model::KvType;
use scoutd::store::{
    Access, Hub, Installed, Observer, PullPlan, PullRequest, Retry, Store, StoreError, Token,
};
use scoutd::units::Bytes;

use server::{FakeHub, Fault, Served, digest};

const REPO: &str = "house/nano-GGUF";
const NANO: &[u8] = include_bytes!("../../models/scout-nano-q4_0.gguf");

fn nano() -> FakeHub {
    let files = vec![
        Served::small("README.md", b"# nano"),
        Served::large("scout-nano-Q4_0.gguf", NANO.to_vec()),
        Served::large("scout-nano-Q8_0.gguf", b"not really".to_vec()),
    ];
    FakeHub::start(REPO, files)
}

/// Waits that a test can bear.
const QUICK: Retry = Retry {
    failures_max: 4,
    first: Duration::from_millis(2),
    longest: Duration::from_secs(5),
    stall: Duration::from_secs(20),
};

fn client(hub: &FakeHub, token: Option<&str>) -> Hub {
    let token = token.and_then(|token| Token::new(token).expect("a word"));
    let base = hub.url().parse().expect("an address");
    Hub::new(Access { base, token, extra_ca_pem: None, retry: QUICK }).expect("valid")
}

fn request(reference: &str) -> PullRequest {
    PullRequest {
        reference: reference.parse().expect("a reference"),
        revision: None,
        name: None,
        safetensors: false,
        kv_type: KvType::F16,
    }
}

/// What a pull told.
#[derive(Default)]
struct Told {
    passed: Mutex<u64>,
    restarts: Mutex<u32>,
    waits: Mutex<u32>,
    there: Mutex<u64>,
}

impl Observer for Told {
    fn begin(&self, _: &str, _: Option<u64>, there: u64) {
        *self.there.lock().expect("alive") += there;
    }

    fn passed(&self, bytes: u64) {
        *self.passed.lock().expect("alive") += bytes;
    }

    fn loading(&self) {}

    fn restarted(&self, _: &str, _: u64) {
        *self.restarts.lock().expect("alive") += 1;
    }

    fn waiting(&self, _: &StoreError, _: Duration) {
        *self.waits.lock().expect("alive") += 1;
    }

    fn done(&self, _: &str) {}
}

/// A store in a folder that is gone at the end.
struct Here {
    folder: tempfile::TempDir,
    store: Store,
}

impl Here {
    fn new() -> Here {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::new(folder.path().join("models"), Bytes(0));
        Here { folder, store }
    }

    async fn pull(&self, hub: &FakeHub, reference: &str) -> (Result<Installed, StoreError>, Told) {
        let told = Told::default();
        let client = client(hub, None);
        let result = async {
            let plan = self.store.plan_pull(&client, &request(reference)).await?;
            self.store.pull(&client, &plan, &told).await
        };
        (result.await, told)
    }

    async fn plan(&self, hub: &FakeHub, reference: &str) -> Result<PullPlan, StoreError> {
        self.store.plan_pull(&client(hub, None), &request(reference)).await
    }

    /// What lies in the folder, without the index.
    fn files(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.store.dir()) else { return Vec::new() };
        let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        let mut names: Vec<String> =
            names.filter(|name| name != "index.json" && name != ".lock").collect();
        names.sort();
        names
    }

    fn is_nano(&self) -> bool {
        let path = self.store.dir().join("scout-nano-Q4_0.gguf");
        std::fs::read(path).is_ok_and(|bytes| bytes == NANO)
    }
}

#[tokio::test]
async fn a_model_is_planned_and_pulled() {
    let (hub, here) = (nano(), Here::new());
    let plan = here.plan(&hub, REPO).await.expect("a plan");
    assert_eq!(plan.quantization.as_deref(), Some("Q4_0"));
    assert_eq!((plan.bytes, plan.name.as_str()), (Some(NANO.len() as u64), "scout-nano-Q4_0"));
    assert_eq!(plan.repository.license.as_deref(), Some("apache-2.0"));
    let outline = plan.outline.expect("the header was read");
    assert_eq!(outline.spec.architecture, "llama4");
    assert!(here.files().is_empty(), "planning writes nothing");

    let (model, told) = here.pull(&hub, REPO).await;
    let model = model.expect("pulled");
    assert!(here.is_nano());
    assert_eq!(here.files(), ["scout-nano-Q4_0.gguf"]);
    assert_eq!(*told.passed.lock().expect("alive"), NANO.len() as u64);
    let origin = model.origin.expect("it was pulled");
    assert_eq!((origin.repo.as_str(), origin.commit.as_str()), (REPO, server::COMMIT));
    assert_eq!(origin.sha256, Some(digest(NANO)));
    assert_eq!(model.facts.architecture.as_deref(), Some("llama4"));

    let again = here.plan(&hub, REPO).await.expect("a plan");
    assert!(again.installed, "the same content is not loaded twice");
}

#[tokio::test]
async fn the_token_goes_to_the_hub_and_to_nobody_else() {
    let files = vec![Served::large("m-Q4_0.gguf", NANO.to_vec())];
    let hub = FakeHub::start_with("house/private", files, Some("hf_secret"));
    let here = Here::new();
    let client = client(&hub, Some("hf_secret\n"));
    let plan = here.store.plan_pull(&client, &request("house/private")).await.expect("a plan");
    here.store.pull(&client, &plan, &Told::default()).await.expect("pulled");
    // The second host refuses whoever shows it a token, so the pull itself is the proof; look all the same.
    let seen = hub.seen();
    assert!(seen.iter().any(|seen| seen.large) && seen.iter().any(|seen| !seen.large));
    for seen in seen {
        assert_eq!(seen.header("authorization").is_some(), !seen.large, "{}", seen.head);
    }

    let error = here.plan(&hub, "house/private").await.expect_err("gated").to_string();
    assert!(error.contains("gated") && error.contains("HF_TOKEN"), "{error}");
}

#[tokio::test]
async fn what_is_not_there_or_not_for_us() {
    let (hub, here) = (nano(), Here::new());
    let error = here.plan(&hub, "house/nothing").await.expect_err("not there").to_string();
    assert!(error.contains("house/nothing"), "{error}");
    let error = here.plan(&hub, "house/nano-GGUF:Q5_K_M").await.expect_err("no such part");
    assert!(error.to_string().contains("scout-nano-Q8_0"), "{error}");
    let mut other = request(REPO);
    other.revision = Some("v9".to_owned());
    let error = here.store.plan_pull(&client(&hub, None), &other).await.expect_err("no revision");
    assert!(error.to_string().contains("no such revision"), "{error}");
    for (status, lines, word) in [
        (403, "X-Error-Code: GatedRepo\r\n", "accept its terms"),
        (403, "X-Error-Message: too late\r\n", "too late"),
        (404, "X-Error-Code: RepoNotFound\r\n", "has no"),
        (418, "", "418"),
        (429, "Retry-After: 3600\r\n", "3600 s"),
        (429, "RateLimit: \"api\";r=0;t=3601\r\n", "3601 s"),
    ] {
        hub.fail(Fault::Status(status, lines));
        let error = here.plan(&hub, REPO).await.expect_err("refused").to_string();
        assert!(error.contains(word), "{status}: {error}");
    }
    assert!(here.files().is_empty(), "{:?}", here.files());
}

#[tokio::test]
async fn trouble_that_passes_is_waited_for() {
    let (hub, here) = (nano(), Here::new());
    for fault in
        [Fault::Status(500, ""), Fault::Status(503, ""), Fault::Status(429, "Retry-After: 0\r\n")]
    {
        hub.fail(fault);
    }
    here.plan(&hub, REPO).await.expect("the fourth try");
    for _ in 0..QUICK.failures_max {
        hub.fail(Fault::Status(502, ""));
    }
    let error = here.plan(&hub, REPO).await.expect_err("given up").to_string();
    assert!(error.contains("502"), "{error}");
}

#[tokio::test]
async fn a_cut_connection_is_resumed_where_it_was() {
    let (hub, here) = (nano(), Here::new());
    let plan = here.plan(&hub, REPO).await.expect("a plan");
    let planned = hub.ranges().len();
    hub.fail_large(Fault::Cut(1_000_000));
    hub.fail_large(Fault::Status(503, ""));
    hub.fail_large(Fault::Cut(500_000));
    let told = Told::default();
    here.store.pull(&client(&hub, None), &plan, &told).await.expect("pulled");
    assert!(here.is_nano());
    assert_eq!(
        &hub.ranges()[planned..],
        ["-", "bytes=1000000-", "bytes=1000000-", "bytes=1500000-"]
    );
    let resumed = hub.seen().into_iter().rfind(|seen| seen.large).expect("asked");
    assert_eq!(resumed.header("if-range"), Some("\"blob\""));
    assert_eq!(*told.waits.lock().expect("alive"), 3);
}

#[tokio::test]
async fn a_part_is_gone_on_with_by_the_next_pull() {
    let (hub, here) = (nano(), Here::new());
    let plan = here.plan(&hub, REPO).await.expect("a plan");
    hub.fail_large(Fault::Cut(2_000_000));
    (0..QUICK.failures_max).for_each(|_| hub.fail_large(Fault::Status(500, "")));
    let pulled = here.store.pull(&client(&hub, None), &plan, &Told::default()).await;
    pulled.expect_err("given up");
    assert_eq!(here.files(), ["scout-nano-Q4_0.gguf.part", "scout-nano-Q4_0.gguf.part.json"]);
    let left = here.store.unfinished().expect("a folder");
    assert_eq!((left[0].bytes, left[0].of_bytes), (2_000_000, Some(NANO.len() as u64)));
    let reference = left[0].reference.clone().expect("the journal says");

    let plan = here.plan(&hub, &reference).await.expect("a plan");
    assert_eq!(plan.there_bytes, 2_000_000);
    let (pulled, told) = here.pull(&hub, &reference).await;
    pulled.expect("pulled");
    assert!(here.is_nano());
    assert_eq!(hub.ranges().last().map(String::as_str), Some("bytes=2000000-"));
    assert_eq!(*told.there.lock().expect("alive"), 2_000_000);
    assert_eq!(here.files(), ["scout-nano-Q4_0.gguf"]);
}

#[tokio::test]
async fn ranges_that_are_ignored_cost_a_new_beginning_only() {
    let (hub, here) = (nano(), Here::new());
    let plan = here.plan(&hub, REPO).await.expect("a plan");
    hub.fail_large(Fault::Cut(100_000));
    hub.fail_large(Fault::NoRange);
    let told = Told::default();
    here.store.pull(&client(&hub, None), &plan, &told).await.expect("pulled");
    assert!(here.is_nano());
    assert_eq!(*told.restarts.lock().expect("alive"), 1);
}

#[tokio::test]
async fn wrong_bytes_are_never_a_model() {
    let (hub, here) = (nano(), Here::new());
    let plan = here.plan(&hub, REPO).await.expect("a plan");
    let client = client(&hub, None);
    hub.fail_large(Fault::Flipped);
    let error = here.store.pull(&client, &plan, &Told::default()).await.expect_err("wrong");
    assert!(matches!(error, StoreError::Checksum { .. }), "{error}");
    assert!(here.files().is_empty(), "{:?}", here.files());

    hub.fail_large(Fault::Longer);
    let error = here.store.pull(&client, &plan, &Told::default()).await.expect_err("wrong");
    assert!(matches!(error, StoreError::Length { .. }), "{error}");
    assert!(here.files().is_empty(), "{:?}", here.files());
}

/// As a power cut leaves it: the length is there, the bytes are not.
#[tokio::test]
async fn a_damaged_part_is_loaded_anew() {
    let (hub, here) = (nano(), Here::new());
    let plan = here.plan(&hub, REPO).await.expect("a plan");
    hub.fail_large(Fault::Cut(2_000_000));
    (0..QUICK.failures_max).for_each(|_| hub.fail_large(Fault::Status(500, "")));
    let pulled = here.store.pull(&client(&hub, None), &plan, &Told::default()).await;
    pulled.expect_err("given up");
    let part = here.store.dir().join("scout-nano-Q4_0.gguf.part");
    let mut bytes = std::fs::read(&part).expect("the part");
    bytes[1_000_000..1_100_000].fill(0);
    std::fs::write(&part, bytes).expect("writable");
    let (pulled, told) = here.pull(&hub, REPO).await;
    pulled.expect("pulled");
    assert!(here.is_nano());
    assert_eq!(*told.restarts.lock().expect("alive"), 1);
}

#[tokio::test]
async fn redirects_have_limits() {
    let (hub, here) = (nano(), Here::new());
    for to in ["ftp://elsewhere/x", "relative", ""] {
        hub.fail(Fault::Redirect(to.to_owned()));
        let error = here.plan(&hub, REPO).await.expect_err("no way there");
        assert!(matches!(error, StoreError::Redirect { .. }), "{to}: {error}");
    }
    for _ in 0..7 {
        hub.fail(Fault::Redirect("/api/models/house/nano-GGUF?again".to_owned()));
    }
    let error = here.plan(&hub, REPO).await.expect_err("a circle").to_string();
    assert!(error.contains("too many redirects"), "{error}");
    let Err(error) = Hub::new(Access {
        base: "http://hub.example".parse().expect("an address"),
        token: Token::new("secret").expect("a word"),
        extra_ca_pem: None,
        retry: QUICK,
    }) else {
        panic!("a token in the clear")
    };
    assert!(error.to_string().contains("unencrypted"), "{error}");
}

#[tokio::test]
async fn a_full_disk_is_said_before_anything_is_loaded() {
    let (hub, here) = (nano(), Here::new());
    let store = Store::new(here.store.dir().to_owned(), Bytes(u64::MAX / 2));
    let error = store.plan_pull(&client(&hub, None), &request(REPO)).await.expect_err("no room");
    assert!(matches!(error, StoreError::DiskFull { .. }), "{error}");
}

#[tokio::test]
async fn one_writer_a_file() {
    let (hub, here) = (nano(), Here::new());
    let plan = here.plan(&hub, REPO).await.expect("a plan");
    let (release, held) = sync_channel(1);
    hub.fail_large(Fault::Held(1_000_000, held));
    let client = client(&hub, None);
    let told = Told::default();
    let first = here.store.pull(&client, &plan, &told);
    tokio::pin!(first);
    // Once bytes have come, the part is locked.
    while *told.passed.lock().expect("alive") == 0 {
        tokio::select! {
            _ = &mut first => panic!("it is held"),
            () = tokio::task::yield_now() => {}
        }
    }
    let error = here.store.pull(&client, &plan, &Told::default()).await.expect_err("busy");
    assert!(matches!(error, StoreError::Busy(_)), "{error}");
    release.send(()).expect("the hub waits");
    first.await.expect("pulled");
    assert!(here.is_nano());
}

#[tokio::test]
async fn the_index_is_made_anew_from_the_files() {
    let (hub, here) = (nano(), Here::new());
    here.pull(&hub, REPO).await.0.expect("pulled");
    let index = here.store.dir().join("index.json");
    std::fs::write(&index, "{\"version\":1,\"models\":[{").expect("writable");
    // And a file that somebody copied in by hand.
    std::fs::write(here.store.dir().join("copied.gguf"), NANO).expect("writable");
    std::fs::write(here.store.dir().join("broken.gguf"), b"GGUF").expect("writable");
    let models = here.store.list().expect("readable");
    let names: Vec<&str> = models.iter().map(|model| model.name.as_str()).collect();
    assert_eq!(names, ["broken", "copied", "scout-nano-Q4_0"]);
    assert!(models[0].facts.problem.is_some());
    assert_eq!(models[1].facts.quantization.as_deref(), Some("Q4_0"));
    assert_eq!(models[2].origin, None, "only the index knew");
    assert!(std::fs::read_to_string(&index).expect("written").contains("copied"));
    let found = here.store.find("COPIED:latest").expect("readable").expect("there");
    assert_eq!(here.store.path(&found), here.store.dir().join("copied.gguf"));

    let error = here.plan(&hub, REPO).await.expect_err("another of this name").to_string();
    assert!(error.contains("--name"), "{error}");

    here.store.remove("copied").expect("removed");
    let error = here.store.remove("copied").expect_err("gone").to_string();
    assert!(error.contains("broken, scout-nano-Q4_0"), "{error}");
    for name in ["../x", "", ".", "index", "a/b"] {
        assert!(matches!(here.store.remove(name), Err(StoreError::Unknown { .. })), "{name}");
    }
}

#[tokio::test]
async fn a_mapped_model_is_not_removed() {
    let (hub, here) = (nano(), Here::new());
    let model = here.pull(&hub, REPO).await.0.expect("pulled");
    let mapping = scoutd::gguf::Mapping::open(&here.store.path(&model)).expect("a file");
    let error = here.store.remove(&model.name).expect_err("mapped");
    assert!(matches!(error, StoreError::InUse(_)), "{error}");
    drop(mapping);
    here.store.remove(&model.name).expect("removed");
    assert!(here.files().is_empty());
}

#[tokio::test]
async fn checkpoints_come_as_a_folder() {
    let files = vec![
        Served::small("config.json", b"{}"),
        Served::small("tokenizer.json", b"{\"a\":1}"),
        Served::small("model.safetensors.index.json", b"{}"),
        Served::large("model-00001-of-00002.safetensors", vec![1; 100_000]),
        Served::large("model-00002-of-00002.safetensors", vec![2; 100_000]),
    ];
    let hub = FakeHub::start("house/checkpoint", files);
    let here = Here::new();
    let client = client(&hub, None);
    let wanted = PullRequest { safetensors: true, ..request("house/checkpoint") };
    let plan = here.store.plan_pull(&client, &wanted).await.expect("a plan");
    hub.fail_large(Fault::Cut(50_000));
    (0..QUICK.failures_max).for_each(|_| hub.fail_large(Fault::Status(500, "")));
    here.store.pull(&client, &plan, &Told::default()).await.expect_err("given up");
    assert_eq!(here.files(), ["checkpoint.parts"], "no half folder under the final name");
    let left = here.store.unfinished().expect("a folder");
    assert_eq!(left[0].reference.as_deref(), Some("house/checkpoint"));

    let model = here.store.pull(&client, &plan, &Told::default()).await.expect("pulled");
    assert_eq!(here.files(), ["checkpoint"]);
    let path = here.store.path(&model);
    let second = std::fs::read(path.join("model-00002-of-00002.safetensors")).expect("there");
    assert_eq!(second, vec![2; 100_000]);
    assert!(hub.ranges().contains(&"bytes=50000-".to_owned()), "{:?}", hub.ranges());
    here.store.remove("checkpoint").expect("removed");
}

/// The parts of a split model, with as many tensors as the first one announces.
fn part(number: u32, tensors: &[&str]) -> Vec<u8> {
    let mut header = scoutd::gguf::GgufHeader::new(32);
    if number == 1 {
        header.str("general.architecture", "house").u32("split.tensors.count", 3);
    }
    header.u32("split.no", number - 1);
    for name in tensors {
        header.tensor(name, scoutd_kernels::Format::F32, &[1000]);
    }
    let mut writer = header.start(Vec::new()).expect("a valid header");
    for name in tensors {
        writer.tensor(name, &vec![number as u8; 4000]).expect("announced");
    }
    writer.finish().expect("complete")
}

#[tokio::test]
async fn a_model_in_parts_becomes_one_file() {
    let files = vec![
        Served::large("m-Q4_0-00001-of-00002.gguf", part(1, &["a", "b"])),
        Served::large("m-Q4_0-00002-of-00002.gguf", part(2, &["c"])),
    ];
    let (hub, here) = (FakeHub::start("house/parts", files), Here::new());
    hub.fail_large(Fault::Cut(usize::MAX));
    hub.fail_large(Fault::Cut(1000));
    (0..QUICK.failures_max).for_each(|_| hub.fail_large(Fault::Status(500, "")));
    here.pull(&hub, "house/parts").await.0.expect_err("given up");
    assert_eq!(here.files(), ["m-Q4_0.parts"]);
    let model = here.pull(&hub, "house/parts").await.0.expect("pulled");
    assert_eq!(here.files(), ["m-Q4_0.gguf"]);
    assert!(hub.ranges().contains(&"bytes=1000-".to_owned()), "{:?}", hub.ranges());
    let bytes = std::fs::read(here.store.path(&model)).expect("there");
    let gguf = scoutd::gguf::Gguf::parse(&bytes).expect("a whole file");
    let tensors: Vec<(&str, u8)> =
        gguf.tensors().iter().map(|it| (it.name.as_str(), gguf.data(it)[0])).collect();
    assert_eq!(tensors, [("a", 1), ("b", 1), ("c", 2)]);
    let problem = model.facts.problem.expect("no architecture that runs here");
    assert!(problem.contains("house"), "{problem}");
}

fn scoutd(hub: &FakeHub, here: &Here, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_scoutd"));
    command
        .args(args)
        .arg("--set")
        .arg(format!("store.path={}", here.store.dir().display()))
        .args(["--set", "store.keep_free_bytes=0"])
        .env("HF_ENDPOINT", hub.url())
        .env_remove("HF_TOKEN")
        .env("HOME", here.folder.path())
        .stdin(Stdio::null());
    command
}

fn done(command: &mut Command) -> (String, String) {
    let Output { status, stdout, stderr } = command.output().expect("the binary starts");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    let (stdout, stderr) = (text(stdout), text(stderr));
    assert!(status.success(), "{stdout}{stderr}");
    (stdout, stderr)
}

#[test]
fn the_binary_pulls_lists_asks_and_removes() {
    let (hub, here) = (nano(), Here::new());
    let refused = scoutd(&hub, &here, &["pull", REPO]).output().expect("the binary starts");
    assert_eq!(refused.status.code(), Some(64), "nobody can be asked");
    assert!(!Path::new(here.store.dir()).exists());

    let (plan, _) = done(&mut scoutd(&hub, &here, &["pull", REPO, "--dry-run"]));
    for part in ["Q4_0", "apache-2.0", "https://example.org/licence", "resident"] {
        assert!(plan.contains(part), "no {part} in {plan}");
    }
    let (text, _) = done(&mut scoutd(&hub, &here, &["pull", REPO, "--yes", "--json"]));
    let json: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(json["installed"]["origin"]["sha256"], digest(NANO));
    assert!(here.is_nano());

    let (text, _) = done(&mut scoutd(&hub, &here, &["list", "--json"]));
    let json: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(json["models"][0]["name"], "scout-nano-Q4_0");
    assert_eq!(json["models"][0]["quantization"], "Q4_0");
    let (table, _) = done(&mut scoutd(&hub, &here, &["list"]));
    assert!(table.contains("scout-nano-Q4_0") && table.contains("llama4"), "{table}");

    let ask = ["ask", "hello", "--model", "scout-nano-q4_0", "--max-tokens", "4"];
    let (answer, _) = done(&mut scoutd(&hub, &here, &ask));
    assert!(!answer.trim().is_empty());
    let (text, _) = done(&mut scoutd(&hub, &here, &["inspect", "scout-nano-Q4_0"]));
    assert!(text.contains("llama4"), "{text}");
    let unknown = scoutd(&hub, &here, &["ask", "hello", "--model", "nothing"]).output();
    let unknown = unknown.expect("the binary starts");
    assert_eq!(unknown.status.code(), Some(69));
    let text = String::from_utf8_lossy(&unknown.stderr).into_owned();
    assert!(text.contains("it has scout-nano-Q4_0"), "{text}");

    let (text, _) = done(&mut scoutd(&hub, &here, &["rm", "scout-nano-Q4_0", "--yes"]));
    assert!(text.contains("freed"), "{text}");
    assert!(here.files().is_empty());
    let gone = scoutd(&hub, &here, &["rm", "scout-nano-Q4_0", "--yes"]).output();
    assert_eq!(gone.expect("the binary starts").status.code(), Some(1));
}

#[test]
fn ctrl_c_and_a_kill_leave_a_part_to_go_on_with() {
    let (hub, here) = (nano(), Here::new());
    let mut had = 0;
    for (signal, bytes) in [("INT", 1_000_000), ("KILL", 2_000_000)] {
        let (release, held) = sync_channel(1);
        hub.fail_large(Fault::Cut(usize::MAX));
        hub.fail_large(Fault::Held(bytes - had, held));
        let child = scoutd(&hub, &here, &["pull", REPO, "--yes"])
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("the binary starts");
        wait_for_part(&here, bytes as u64);
        let pid = rustix::process::Pid::from_raw(child.id() as i32).expect("a process");
        let signal = match signal {
            "INT" => rustix::process::Signal::INT,
            _ => rustix::process::Signal::KILL,
        };
        rustix::process::kill_process(pid, signal).expect("it runs");
        let output = child.wait_with_output().expect("it ends");
        assert!(!output.status.success());
        if signal == rustix::process::Signal::INT {
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(text.contains("what was loaded is kept"), "{text}");
        }
        drop(release);
        had = bytes;
        let (text, _) = done(&mut scoutd(&hub, &here, &["list"]));
        assert!(text.contains("unfinished: scout-nano-Q4_0"), "{text}");
        assert!(!here.is_nano());
    }
    done(&mut scoutd(&hub, &here, &["pull", REPO, "--yes"]));
    assert!(here.is_nano());
    let ranges = hub.ranges();
    assert!(ranges.contains(&"bytes=1000000-".to_owned()), "{ranges:?}");
    assert_eq!(ranges.last().map(String::as_str), Some("bytes=2000000-"));
}

/// Until the part has as many bytes as the hub has let go.
fn wait_for_part(here: &Here, bytes: u64) {
    let part = here.store.dir().join("scout-nano-Q4_0.gguf.part");
    let start = std::time::Instant::now();
    while std::fs::metadata(&part).map_or(0, |metadata| metadata.len()) < bytes {
        assert!(start.elapsed() < crate::http::PATIENCE, "nothing came");
        std::thread::yield_now();
    }
}
