//! Pulling a model: a plan first, then its files, then its place in the index.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::choice::{Choice, RemoteFile, choose_gguf, choose_safetensors};
use super::download::{Download, Journal, Observer, with_ending};
use super::error::StoreError;
use super::facts::Facts;
use super::hub::{Hub, Repository};
use super::index::{Installed, Kind, Origin, Store, write_whole};
use super::join::join;
use super::reference::{Reference, is_name, to_name};
use crate::gguf::Gguf;
use crate::model::{KvType, Outline};
use crate::units::Bytes;

/// What is to be pulled.
#[derive(Clone, Debug)]
pub struct PullRequest {
    /// The repository, and what of it.
    pub reference: Reference,
    /// A branch, tag or commit; the main branch if absent.
    pub revision: Option<String>,
    /// What to call it; the file's or repository's name if absent.
    pub name: Option<String>,
    /// The files that `convert` reads instead of a GGUF file.
    pub safetensors: bool,
    /// How keys and values would be kept, for the outline.
    pub kv_type: KvType,
}

/// What a pull will do.
#[derive(Clone, Debug)]
pub struct PullPlan {
    /// Where from, and under which terms.
    pub repository: Repository,
    /// What it will be called.
    pub name: String,
    /// File or folder.
    pub kind: Kind,
    /// What is loaded.
    pub files: Vec<RemoteFile>,
    /// The quantization that the name says.
    pub quantization: Option<String>,
    /// Why these files.
    pub reason: String,
    /// Bytes of all files, if the hub says them.
    pub bytes: Option<u64>,
    /// Bytes of them that an earlier try left here.
    pub there_bytes: u64,
    /// Free bytes of the store's disk.
    pub free: Bytes,
    /// What the model takes, from its header; `None` for checkpoints, for models in parts, and for what does
    /// not run here.
    pub outline: Option<Outline>,
    /// What the header says.
    pub facts: Facts,
    /// The store has it already, with the same content.
    pub installed: bool,
}

impl Store {
    /// Looks at the repository and the disk, and loads the header of a GGUF file.
    ///
    /// # Errors
    /// What the hub says; if it is not clear which file; if another model has the name; if the disk is too full.
    pub async fn plan_pull(
        &self,
        hub: &Hub,
        request: &PullRequest,
    ) -> Result<PullPlan, StoreError> {
        let repo = &request.reference.repo;
        let repository = hub.repository(repo, request.revision.as_deref()).await?;
        let mut plan = self.choose(repository, request)?;
        plan.installed = self.has(&plan)?;
        if plan.installed {
            return Ok(plan);
        }
        if let (Kind::Gguf, [file]) = (plan.kind, &mut plan.files[..]) {
            let header = header(hub, &plan.repository, file, request.kv_type).await?;
            (plan.facts, plan.outline) = header;
            plan.bytes = file.bytes;
        }
        plan.there_bytes = self.there(&plan);
        self.check_room(&plan)?;
        Ok(plan)
    }

    /// Loads what is planned and puts it in its place.
    ///
    /// # Errors
    /// As the hub, the way and the disk say. What was loaded stays for the next try.
    pub async fn pull(
        &self,
        hub: &Hub,
        plan: &PullPlan,
        observer: &dyn Observer,
    ) -> Result<Installed, StoreError> {
        self.make_dir()?;
        let mut origin = Origin {
            repo: plan.repository.repo.to_string(),
            commit: plan.repository.commit.clone(),
            file: None,
            sha256: None,
            pulled_unix_s: now_unix_s(),
        };
        if plan.kind == Kind::Gguf {
            origin.file = plan.files.first().map(|file| file.path.clone());
        }
        match (plan.kind, &plan.files[..]) {
            (Kind::Gguf, [file]) => {
                let target = self.file(&plan.name);
                let done = self.download(hub, plan, file, &target, observer).await?;
                origin.sha256 = Some(done);
            }
            (kind, files) => {
                let staging = self.stage(plan)?;
                let mut paths = Vec::with_capacity(files.len());
                for file in files {
                    let path = staging.join(last(&file.path));
                    // Names without a part are complete: they got them after the check.
                    if !path.exists() {
                        let digest = self.download(hub, plan, file, &path, observer).await?;
                        origin.sha256.get_or_insert(digest);
                    }
                    paths.push(path);
                }
                origin.sha256 = files[0].sha256.clone().or(origin.sha256);
                self.unstage(kind, &staging, paths, &plan.name).await?;
            }
        }
        self.record(&plan.name, origin)
    }

    fn choose(
        &self,
        repository: Repository,
        request: &PullRequest,
    ) -> Result<PullPlan, StoreError> {
        let (kind, choice) = if request.safetensors {
            let files = choose_safetensors(&repository.files)?;
            let stem = repository.repo.name().to_owned();
            let reason = "what convert reads".to_owned();
            (Kind::Checkpoint, Choice { files, quantization: None, reason, stem })
        } else {
            let part = request.reference.part.as_deref();
            (Kind::Gguf, choose_gguf(&repository.files, part)?)
        };
        let Choice { files, quantization, reason, stem } = choice;
        let name = match &request.name {
            Some(name) if is_name(name) => name.clone(),
            Some(name) => {
                let message = format!("`{name}` is no name; letters, digits, `-`, `_` and `.` are");
                return Err(StoreError::Name(message));
            }
            None => to_name(&stem),
        };
        Ok(PullPlan {
            name,
            kind,
            bytes: files.iter().map(|file| file.bytes).sum(),
            files,
            quantization,
            reason,
            repository,
            there_bytes: 0,
            free: self.free()?,
            outline: None,
            facts: Facts::default(),
            installed: false,
        })
    }

    /// Whether this very content is in the store under the plan's name.
    fn has(&self, plan: &PullPlan) -> Result<bool, StoreError> {
        let Some(model) = self.list()?.into_iter().find(|model| model.name == plan.name) else {
            return Ok(false);
        };
        let first = plan.files.first();
        let repo = plan.repository.repo.as_str();
        match &model.origin {
            Some(origin) if origin.repo == repo && model.kind == plan.kind => {
                let wanted = first.and_then(|file| file.sha256.as_ref());
                Ok(match (wanted, &origin.sha256) {
                    (Some(wanted), Some(there)) => wanted == there,
                    _ => origin.commit == plan.repository.commit,
                })
            }
            Some(origin) => {
                let origin = format!("from {}", origin.repo);
                Err(StoreError::Exists { name: model.name, origin })
            }
            None => {
                let origin = "not from the hub".to_owned();
                Err(StoreError::Exists { name: model.name, origin })
            }
        }
    }

    /// Bytes that earlier tries left.
    fn there(&self, plan: &PullPlan) -> u64 {
        let len = |path: &Path| fs::metadata(path).map_or(0, |metadata| metadata.len());
        if let (Kind::Gguf, [file]) = (plan.kind, &plan.files[..]) {
            let target = self.file(&plan.name);
            let journal = Journal::load(&with_ending(&target, ".part.json"));
            let same = journal.is_some_and(|it| match (&it.sha256, &file.sha256) {
                (Some(there), Some(wanted)) => there == wanted,
                _ => it.commit == plan.repository.commit && it.file == file.path,
            });
            return if same { len(&with_ending(&target, ".part")) } else { 0 };
        }
        let staging = self.staging(&plan.name);
        if Staged::load(&staging).is_none_or(|staged| !staged.is_of(plan)) {
            return 0;
        }
        let files = plan.files.iter().map(|file| staging.join(last(&file.path)));
        files.map(|path| len(&path).max(len(&with_ending(&path, ".part")))).sum()
    }

    fn check_room(&self, plan: &PullPlan) -> Result<(), StoreError> {
        let Some(bytes) = plan.bytes else { return Ok(()) };
        // Joining parts needs the whole once more.
        let joined = if plan.kind == Kind::Gguf && plan.files.len() > 1 { bytes } else { 0 };
        let needed = Bytes(bytes.saturating_sub(plan.there_bytes).saturating_add(joined));
        if needed.saturating_add(self.keep_free) <= plan.free {
            return Ok(());
        }
        let (free, keep_free) = (plan.free, self.keep_free);
        Err(StoreError::DiskFull { dir: self.dir().to_owned(), needed, free, keep_free })
    }

    async fn download(
        &self,
        hub: &Hub,
        plan: &PullPlan,
        file: &RemoteFile,
        target: &Path,
        observer: &dyn Observer,
    ) -> Result<String, StoreError> {
        let (repo, commit) = (&plan.repository.repo, plan.repository.commit.as_str());
        let download = Download { hub, repo, commit, file, target, observer };
        download.run().await
    }

    /// The folder in which files are gathered; one of another content is emptied.
    fn stage(&self, plan: &PullPlan) -> Result<PathBuf, StoreError> {
        let staging = self.staging(&plan.name);
        let same = Staged::load(&staging).is_some_and(|staged| staged.is_of(plan));
        if !same && staging.exists() {
            fs::remove_dir_all(&staging).map_err(StoreError::io(&staging))?;
        }
        fs::create_dir_all(&staging).map_err(StoreError::io(&staging))?;
        let text = serde_json::to_vec(&Staged::new(plan)).expect("texts serialize");
        write_whole(&staging.join(STAGED), &text)?;
        Ok(staging)
    }

    /// Makes the gathered files the model.
    async fn unstage(
        &self,
        kind: Kind,
        staging: &Path,
        paths: Vec<PathBuf>,
        name: &str,
    ) -> Result<(), StoreError> {
        let staging = staging.to_owned();
        let target = match kind {
            Kind::Gguf => self.file(name),
            Kind::Checkpoint => self.dir().join(name),
        };
        let work = move || {
            let io =
                |path: &Path, result: std::io::Result<()>| result.map_err(StoreError::io(path));
            if kind == Kind::Gguf {
                join(&paths, &target)?;
                return io(&staging, fs::remove_dir_all(&staging));
            }
            io(&staging, fs::remove_file(staging.join(STAGED)))?;
            if target.exists() {
                io(&target, fs::remove_dir_all(&target))?;
            }
            io(&target, fs::rename(&staging, &target))?;
            super::index::sync_folder(&target)
        };
        let task = tokio::task::spawn_blocking(work);
        task.await.unwrap_or_else(|error| Err(StoreError::Hub(format!("joining: {error}"))))
    }
}

/// What a folder of gathered files is to become.
#[derive(PartialEq, Eq, Serialize, Deserialize)]
struct Staged {
    repo: String,
    commit: String,
    /// The first of its files.
    file: String,
}

impl Staged {
    fn new(plan: &PullPlan) -> Staged {
        Staged {
            repo: plan.repository.repo.to_string(),
            commit: plan.repository.commit.clone(),
            file: plan.files.first().map_or_else(String::new, |file| file.path.clone()),
        }
    }

    fn load(folder: &Path) -> Option<Staged> {
        serde_json::from_slice(&fs::read(folder.join(STAGED)).ok()?).ok()
    }

    fn is_of(&self, plan: &PullPlan) -> bool {
        *self == Staged::new(plan)
    }
}

/// What to pull to go on with a folder of gathered files.
pub(super) fn staged_reference(folder: &Path) -> Option<String> {
    let staged = Staged::load(folder)?;
    let is_gguf = staged.file.ends_with(".gguf");
    Some(if is_gguf { format!("{}:{}", staged.repo, staged.file) } else { staged.repo })
}

/// What the header of a file on the hub says, from as little of the file as that takes. The hub's word on size and
/// checksum is noted in `file` where it was missing.
async fn header(
    hub: &Hub,
    repository: &Repository,
    file: &mut RemoteFile,
    kv_type: KvType,
) -> Result<(Facts, Option<Outline>), StoreError> {
    let mut want = HEADER_FIRST;
    loop {
        let beginning =
            hub.patiently(async || beginning(hub, repository, file, want).await).await?;
        file.bytes = file.bytes.or(beginning.file_bytes);
        file.sha256 = file.sha256.take().or(beginning.sha256);
        let size = file.bytes.unwrap_or(u64::MAX);
        let whole = (beginning.bytes.len() as u64) < want || want >= HEADER_MAX;
        match Gguf::parse_header(&beginning.bytes, size) {
            Ok(gguf) => {
                let outline = Outline::from_gguf(&gguf, kv_type).ok();
                return Ok((Facts::of_header(&gguf), outline));
            }
            Err(error) if whole => {
                let problem = Some(error.to_string());
                return Ok((Facts { problem, ..Facts::default() }, None));
            }
            Err(_) => want *= 4,
        }
    }
}

struct Beginning {
    bytes: Vec<u8>,
    file_bytes: Option<u64>,
    sha256: Option<String>,
}

async fn beginning(
    hub: &Hub,
    repository: &Repository,
    file: &RemoteFile,
    want: u64,
) -> Result<Beginning, StoreError> {
    let Repository { repo, commit, .. } = repository;
    let mut opened = hub.file(repo, commit, &file.path, (0, Some(want)), None).await?;
    let mut bytes = Vec::new();
    while let Some(chunk) = opened.response.chunk().await? {
        let room = (want as usize).saturating_sub(bytes.len());
        bytes.extend_from_slice(&chunk[..chunk.len().min(room)]);
        // A server without ranges would send the whole file.
        if bytes.len() as u64 >= want {
            break;
        }
    }
    let file_bytes = opened.linked_bytes.or_else(|| opened.whole_size());
    Ok(Beginning { bytes, file_bytes, sha256: opened.linked_sha256 })
}

fn last(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

fn now_unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The note in a folder of gathered files.
const STAGED: &str = ".pull.json";
/// Enough for the header of most models; a vocabulary of 200,000 tokens takes about 10 MB.
const HEADER_FIRST: u64 = 1 << 20;
const HEADER_MAX: u64 = 64 << 20;
