//! Managing the store over HTTP, in Ollama's dialect: what is installed, pull, delete.
//!
//! Everything here touches disks and other machines, so it runs on threads of its own; the door only passes lines on.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use actix_web::HttpResponse;
use actix_web::body::{BodySize, MessageBody};
use actix_web::http::StatusCode;
use actix_web::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use actix_web::web::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::Shared;
use super::active::ActiveGuard;
use super::answer::cut_short;
use super::door::json;
use super::error::Problem;
use super::openai::known_model;
use crate::chat::{ChatError, ModelCard, ModelName};
use crate::store::{
    Hub, Installed, Kind, Observer, PullRequest, Reference, RemoteFile, Store, StoreError,
};
use crate::wire::ollama;

/// What the door knows of the store.
#[derive(Clone)]
pub struct ModelDoor {
    store: Store,
    open_hub: OpenHub,
    /// The last listing, for when the disk is slow.
    last: Arc<Mutex<Vec<Installed>>>,
    /// One pull at a time: the disk and the line are shared with everybody else.
    pulling: Arc<Semaphore>,
}

/// Makes the hub's client when the first pull comes: reading the system's certificates would delay every start.
type OpenHub = Arc<dyn Fn() -> Result<Hub, String> + Send + Sync>;

impl ModelDoor {
    /// A door to `store`; `open_hub` is called for each pull.
    pub fn new(
        store: Store,
        open_hub: impl Fn() -> Result<Hub, String> + Send + Sync + 'static,
    ) -> ModelDoor {
        ModelDoor {
            store,
            open_hub: Arc::new(open_hub),
            last: Arc::default(),
            pulling: Arc::new(Semaphore::new(1)),
        }
    }

    /// What is installed. A disk that does not answer at once has the last answer stand in for it.
    async fn installed(&self) -> Vec<Installed> {
        let (store, last) = (self.store.clone(), Arc::clone(&self.last));
        let look = tokio::task::spawn_blocking(move || {
            if let Ok(models) = store.list() {
                *last.lock().unwrap_or_else(PoisonError::into_inner) = models;
            }
        });
        let _ = tokio::time::timeout(LISTING_PATIENCE, look).await;
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// `/api/tags`: what is served, then what else is installed.
pub(super) async fn tags(shared: &Shared) -> HttpResponse {
    let served = shared.router.models();
    let mut others = Vec::new();
    if let Some(door) = &shared.models {
        for model in door.installed().await {
            let is_served = |card: &ModelCard| Some(&card.digest) == model.facts.digest.as_ref();
            if model.kind == Kind::Gguf && !served.iter().any(is_served) {
                others.push(card(&model));
            }
        }
    }
    json(ollama::tags(&served, &others))
}

/// As much of a card as a listing shows.
fn card(model: &Installed) -> ModelCard {
    let facts = model.facts.clone();
    ModelCard {
        name: ModelName::new(&model.name),
        architecture: facts.architecture.unwrap_or_default(),
        parameters: facts.parameters.unwrap_or_default(),
        quantization: facts.quantization.unwrap_or_default(),
        file_bytes: model.bytes,
        digest: facts.digest.unwrap_or_else(|| "0".repeat(64)),
        modified_unix_s: u64::try_from(model.modified.0).unwrap_or(0),
        context_tokens: facts.context_tokens.unwrap_or_default(),
        trained_context_tokens: facts.context_tokens.unwrap_or_default(),
        embedding_len: 0,
        vocabulary_len: 0,
        template: String::new(),
    }
}

/// `/api/delete`.
pub(super) async fn delete(shared: &Shared, body: &[u8]) -> Result<HttpResponse, Problem> {
    let door = door(shared)?;
    let name = ollama::model_name(body)?.to_string();
    let store = door.store.clone();
    let removed = tokio::task::spawn_blocking(move || store.remove(&name)).await;
    match removed {
        Ok(result) => result.map_err(|error| problem(&error))?,
        Err(error) => return Err(ChatError::Internal(error.to_string()).into()),
    };
    Ok(HttpResponse::Ok().finish())
}

/// `/api/pull`.
pub(super) async fn pull(
    shared: &Shared,
    active: ActiveGuard,
    body: &[u8],
) -> Result<HttpResponse, Problem> {
    let door = door(shared)?;
    let asked = ollama::pull_asked(body)?;
    let model = asked.model.strip_suffix(":latest").unwrap_or(&asked.model).to_owned();
    // Clients pull what they are about to use, by its name here.
    let is_here = known_model(shared, &ModelName::new(&model)).is_ok();
    let permit = Arc::clone(&door.pulling).try_acquire_owned().map_err(|_| {
        let message = "another pull is running; ask again when it is done";
        Problem::new(StatusCode::CONFLICT, "conflict_error", message)
    })?;
    let (lines, mut queue) = mpsc::channel(LINES);
    let work = door.clone();
    tokio::task::spawn_blocking(move || run(&work, &model, is_here, &lines, permit));
    if asked.stream {
        let body =
            LinesBody { queue, cut: Box::pin(active.until_cut()), ended: false, _active: active };
        return Ok(HttpResponse::Ok()
            .insert_header((CONTENT_TYPE, "application/x-ndjson"))
            .insert_header((CACHE_CONTROL, "no-cache"))
            .message_body(body)
            .expect("constant headers are valid")
            .map_into_boxed_body());
    }
    loop {
        match queue.recv().await {
            Some(Item::Line(_)) => {}
            Some(Item::End(Ok(()))) => return Ok(json(ollama::status_line("success"))),
            Some(Item::End(Err(error))) => return Err(problem(&error)),
            None => return Err(ChatError::Internal("the pull ended without a word".into()).into()),
        }
    }
}

fn door(shared: &Shared) -> Result<&ModelDoor, Problem> {
    let message = "this server does not manage models over HTTP";
    shared.models.as_ref().ok_or_else(|| Problem::not_implemented(message))
}

/// From the pulling thread to the door.
enum Item {
    Line(Vec<u8>),
    End(Result<(), StoreError>),
}

/// Pulls on this thread until it is done or nobody listens any more.
fn run(
    door: &ModelDoor,
    model: &str,
    is_here: bool,
    lines: &mpsc::Sender<Item>,
    permit: OwnedSemaphorePermit,
) {
    let mut permit = Some(permit);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            let error = StoreError::Config(format!("no async runtime: {error}"));
            let _ = lines.blocking_send(Item::End(Err(error)));
            return;
        }
    };
    runtime.block_on(async {
        let result = tokio::select! {
            result = work(door, model, is_here, lines) => result,
            // What was loaded is kept for the next try.
            () = lines.closed() => return,
        };
        // Whoever hears of the end may ask for the next one at once.
        permit.take();
        let _ = lines.send(Item::End(result)).await;
    });
    // A pull that was given up may still be writing its last bytes: the runtime waits for that.
    drop(runtime);
    drop(permit);
}

async fn work(
    door: &ModelDoor,
    model: &str,
    is_here: bool,
    lines: &mpsc::Sender<Item>,
) -> Result<(), StoreError> {
    let say = async |status: &str| {
        let _ = lines.send(Item::Line(ollama::status_line(status))).await;
    };
    say("pulling manifest").await;
    if is_here || !model.contains('/') && door.store.find(model)?.is_some() {
        return Ok(());
    }
    if !model.contains('/') {
        return Err(StoreError::NotFound(format!(
            "model '{model}' not found; models come from the Hugging Face hub, as owner/name[:QUANT]"
        )));
    }
    let hub = (door.open_hub)().map_err(StoreError::Config)?;
    let reference: Reference = model.parse()?;
    let request = PullRequest {
        reference,
        revision: None,
        name: None,
        safetensors: false,
        kv_type: Default::default(),
    };
    let plan = door.store.plan_pull(&hub, &request).await?;
    if !plan.installed {
        let progress = Progress::new(lines.clone(), plan.files.clone());
        door.store.pull(&hub, &plan, &progress).await?;
        progress.last().await;
        say("verifying sha256 digest").await;
        say("writing manifest").await;
    }
    log::info!(target: "rest", model = plan.name.as_str(), repo:% = plan.repository.repo; "pulled");
    Ok(())
}

/// Turns what a pull tells into lines, a few a second; a client that does not read them misses some.
struct Progress {
    lines: mpsc::Sender<Item>,
    files: Vec<RemoteFile>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    file: usize,
    completed: u64,
    said: Option<Instant>,
}

impl Progress {
    fn new(lines: mpsc::Sender<Item>, files: Vec<RemoteFile>) -> Progress {
        Progress { lines, files, state: Mutex::default() }
    }

    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn line(&self, state: &State) -> Vec<u8> {
        let file = &self.files[state.file.min(self.files.len() - 1)];
        let total = file.bytes.unwrap_or(state.completed);
        match &file.sha256 {
            Some(sha256) => ollama::progress_line(sha256, total, state.completed),
            None => ollama::status_line(&format!("pulling {}", file.path)),
        }
    }

    /// The last file's last line, which no client may miss.
    async fn last(&self) {
        let line = self.with(|state| self.line(state));
        let _ = self.lines.send(Item::Line(line)).await;
    }
}

impl Observer for Progress {
    fn begin(&self, path: &str, _: Option<u64>, _: u64) {
        self.with(|state| {
            let at = self.files.iter().position(|file| file.path == path);
            *state = State { file: at.unwrap_or(0), ..State::default() };
        });
    }

    fn passed(&self, bytes: u64) {
        self.with(|state| {
            state.completed += bytes;
            if state.said.is_none_or(|said| said.elapsed() >= LINE_EVERY) {
                state.said = Some(Instant::now());
                let _ = self.lines.try_send(Item::Line(self.line(state)));
            }
        });
    }

    fn loading(&self) {}

    fn restarted(&self, _: &str, lost: u64) {
        self.with(|state| state.completed = state.completed.saturating_sub(lost));
    }

    fn waiting(&self, error: &StoreError, wait: Duration) {
        log::warn!(target: "rest", error:%, wait_ms = wait.as_millis() as u64; "pull interrupted");
    }

    fn done(&self, _: &str) {}
}

/// A response body of lines. Dropping it, which the server does when the client has gone, ends the pull.
struct LinesBody {
    queue: mpsc::Receiver<Item>,
    cut: Pin<Box<dyn Future<Output = bool> + Send>>,
    ended: bool,
    _active: ActiveGuard,
}

impl MessageBody for LinesBody {
    type Error = Infallible;

    fn size(&self) -> BodySize {
        BodySize::Stream
    }

    fn poll_next(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, Infallible>>> {
        let body = self.get_mut();
        if body.ended {
            return Poll::Ready(None);
        }
        let line = match body.queue.poll_recv(context) {
            Poll::Ready(Some(Item::Line(line))) => line,
            Poll::Ready(Some(Item::End(result))) => {
                body.ended = true;
                match result {
                    Ok(()) => ollama::status_line("success"),
                    Err(error) => ollama::error_line(&error.to_string()),
                }
            }
            Poll::Ready(None) => return Poll::Ready(None),
            Poll::Pending => match body.cut.as_mut().poll(context) {
                Poll::Ready(replaced) => {
                    body.ended = true;
                    ollama::error_line(&ollama::error_text(&cut_short(replaced)))
                }
                Poll::Pending => return Poll::Pending,
            },
        };
        Poll::Ready(Some(Ok(line.into())))
    }
}

/// A refusal of the store as HTTP.
fn problem(error: &StoreError) -> Problem {
    let (status, kind) = match error {
        StoreError::NotFound(_) | StoreError::Unknown { .. } => {
            (StatusCode::NOT_FOUND, "not_found_error")
        }
        StoreError::Ambiguous { .. } | StoreError::Name(_) => {
            (StatusCode::BAD_REQUEST, "invalid_request_error")
        }
        StoreError::Busy(_) | StoreError::Exists { .. } | StoreError::InUse(_) => {
            (StatusCode::CONFLICT, "conflict_error")
        }
        // Not 401: the client's own key was good.
        StoreError::Gated { .. } | StoreError::Unauthorized(_) => {
            (StatusCode::FORBIDDEN, "permission_error")
        }
        StoreError::DiskFull { .. } | StoreError::NoSpace(_) => {
            (StatusCode::INSUFFICIENT_STORAGE, "storage_error")
        }
        StoreError::Config(_) | StoreError::Io { .. } => {
            (StatusCode::INTERNAL_SERVER_ERROR, "internal_error")
        }
        _ => (StatusCode::BAD_GATEWAY, "upstream_error"),
    };
    Problem::new(status, kind, &error.to_string())
}

/// Lines that a slow client may leave unread.
const LINES: usize = 64;
const LINE_EVERY: Duration = Duration::from_millis(100);
/// Listings answer in 100 ms whatever the disk does.
const LISTING_PATIENCE: Duration = Duration::from_millis(50);
