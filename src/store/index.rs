//! The folder of models and its index.
//!
//! The folder is the truth, the index remembers what reading it again would cost (headers) or could not tell
//! (where a model came from). Whatever lies in the folder as `NAME.gguf` is a model, however it got there; a
//! missing or damaged index is made anew from the files.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use log::warn;
use serde::{Deserialize, Serialize};

use super::download::Journal;
use super::error::StoreError;
use super::facts::Facts;
use super::reference::is_name;
use crate::units::Bytes;

/// A folder of models.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
    /// Bytes of its disk that downloads leave free.
    pub(super) keep_free: Bytes,
}

/// A model in the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Installed {
    /// What it is called here.
    pub name: String,
    /// File or folder.
    pub kind: Kind,
    /// All its bytes.
    pub bytes: u64,
    /// When it was last changed: seconds since 1970, and the nanoseconds that tell two changes apart.
    pub modified: (i64, i64),
    /// What it says about itself.
    pub facts: Facts,
    /// Where it was pulled from; `None` if somebody put it here.
    pub origin: Option<Origin>,
}

/// What a model is on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A folder that `scoutd convert` reads.
    Checkpoint,
    /// A file that is run.
    Gguf,
}

/// Where a model came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The repository.
    pub repo: String,
    /// Its commit.
    pub commit: String,
    /// The file, or the first of its parts; absent for a checkpoint.
    pub file: Option<String>,
    /// SHA-256 of that file, in hexadecimal.
    pub sha256: Option<String>,
    /// When, in seconds since 1970.
    pub pulled_unix_s: u64,
}

/// A download that was cut off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfinished {
    /// What it was to be called.
    pub name: String,
    /// What to pull to go on with it, as `owner/name:file`.
    pub reference: Option<String>,
    /// Bytes that are there.
    pub bytes: u64,
    /// Bytes it will have, if known.
    pub of_bytes: Option<u64>,
}

#[derive(Default, Serialize, Deserialize)]
struct Index {
    version: u32,
    models: Vec<Installed>,
}

impl Store {
    /// The store in `dir`, which is made when something is put into it.
    pub fn new(dir: PathBuf, keep_free: Bytes) -> Store {
        Store { dir, keep_free }
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// All models by name. What changed in the folder since the last look is read again.
    ///
    /// # Errors
    /// If the folder cannot be read; one that is not there is empty.
    pub fn list(&self) -> Result<Vec<Installed>, StoreError> {
        let known = self.load();
        let found = self.scan(&known)?;
        if found != known {
            // A folder that cannot be written is still read.
            if let Err(error) = self.locked(|| self.save(self.scan(&self.load())?)) {
                warn!(target: "store", error:%; "index not written");
            }
        }
        Ok(found)
    }

    /// The model of this name; case does not matter, nor does `:latest`.
    ///
    /// # Errors
    /// As [`Store::list`].
    pub fn find(&self, name: &str) -> Result<Option<Installed>, StoreError> {
        let name = plain_name(name);
        let mut models = self.list()?;
        let exact = models.iter().position(|model| model.name == name);
        let alike = || models.iter().position(|model| model.name.eq_ignore_ascii_case(name));
        Ok(exact.or_else(alike).map(|at| models.swap_remove(at)))
    }

    /// Where a model lies.
    pub fn path(&self, model: &Installed) -> PathBuf {
        match model.kind {
            Kind::Checkpoint => self.dir.join(&model.name),
            Kind::Gguf => self.file(&model.name),
        }
    }

    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.gguf"))
    }

    /// Downloads that were cut off.
    ///
    /// # Errors
    /// As [`Store::list`].
    pub fn unfinished(&self) -> Result<Vec<Unfinished>, StoreError> {
        let mut found = Vec::new();
        for (file, path) in entries(&self.dir)? {
            if let Some(name) = file.strip_suffix(".gguf.part") {
                let journal = Journal::load(&super::download::with_ending(&path, ".json"));
                found.push(Unfinished {
                    name: name.to_owned(),
                    reference: journal.as_ref().map(|it| format!("{}:{}", it.repo, it.file)),
                    bytes: fs::metadata(&path).map_or(0, |metadata| metadata.len()),
                    of_bytes: journal.and_then(|journal| journal.bytes),
                });
            } else if let Some(name) = file.strip_suffix(STAGING)
                && path.is_dir()
            {
                let reference = super::pull::staged_reference(&path);
                let bytes = folder_bytes(&path);
                found.push(Unfinished { name: name.to_owned(), reference, bytes, of_bytes: None });
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// Deletes a model or what is left of a download, and says how many bytes that freed.
    ///
    /// # Errors
    /// `Unknown` if the store has no such model, `InUse` if a process has it mapped.
    pub fn remove(&self, name: &str) -> Result<u64, StoreError> {
        let name = plain_name(name);
        if let Some(model) = self.find(name)? {
            self.locked(|| {
                remove_path(&self.path(&model), &model.name)?;
                self.save(self.scan(&self.load())?)
            })?;
            return Ok(model.bytes);
        }
        if let Some(left) = self.unfinished()?.into_iter().find(|left| left.name == name) {
            let file = self.file(&left.name);
            for ending in [".part", ".part.json"] {
                let path = super::download::with_ending(&file, ending);
                if path.exists() {
                    remove_path(&path, &left.name)?;
                }
            }
            let staging = self.staging(&left.name);
            if staging.is_dir() {
                remove_path(&staging, &left.name)?;
            }
            return Ok(left.bytes);
        }
        let known = self.list()?.into_iter().map(|model| model.name).collect();
        Err(StoreError::Unknown { name: name.to_owned(), known })
    }

    /// Remembers where the model called `name`, which is in its place now, came from.
    pub(super) fn record(&self, name: &str, origin: Origin) -> Result<Installed, StoreError> {
        let missing = || StoreError::Unknown { name: name.to_owned(), known: Vec::new() };
        self.locked(|| {
            let mut models = self.scan(&self.load())?;
            let model = models.iter_mut().find(|model| model.name == name).ok_or_else(missing)?;
            model.origin = Some(origin);
            let model = model.clone();
            self.save(models)?;
            Ok(model)
        })
    }

    /// Where the files of a model in several files are gathered.
    pub(super) fn staging(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}{STAGING}"))
    }

    /// Free bytes of the disk on which the store is or will be.
    pub(super) fn free(&self) -> Result<Bytes, StoreError> {
        let there = self.dir.ancestors().find(|dir| dir.is_dir()).unwrap_or(Path::new("/"));
        let disk =
            rustix::fs::statvfs(there).map_err(|error| StoreError::io(there)(error.into()))?;
        Ok(Bytes(disk.f_bavail.saturating_mul(disk.f_frsize)))
    }

    pub(super) fn make_dir(&self) -> Result<(), StoreError> {
        fs::create_dir_all(&self.dir).map_err(StoreError::io(&self.dir))
    }

    /// What the index says; nothing if it is missing or damaged.
    fn load(&self) -> Vec<Installed> {
        let path = self.dir.join(INDEX);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    warn!(target: "store", path:% = path.display(), error:%; "index not read");
                }
                return Vec::new();
            }
        };
        match serde_json::from_slice::<Index>(&text) {
            Ok(index) if index.version == VERSION => index.models,
            Ok(_) => Vec::new(),
            Err(error) => {
                warn!(target: "store", path:% = path.display(), error:%; "index damaged, made anew");
                Vec::new()
            }
        }
    }

    fn save(&self, models: Vec<Installed>) -> Result<(), StoreError> {
        let index = Index { version: VERSION, models };
        let text = serde_json::to_vec_pretty(&index).expect("texts and numbers serialize");
        write_whole(&self.dir.join(INDEX), &text)
    }

    /// What lies in the folder, with what is `known` of it.
    fn scan(&self, known: &[Installed]) -> Result<Vec<Installed>, StoreError> {
        let mut found: Vec<Installed> = entries(&self.dir)?
            .into_iter()
            .filter_map(|(file, path)| examine(&file, &path, known))
            .collect();
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// Runs `work` while no other process changes the index.
    fn locked<T>(&self, work: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
        let path = self.dir.join(LOCK);
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(StoreError::io(&path))?;
        file.lock().map_err(StoreError::io(&path))?;
        work()
    }
}

/// An entry of the folder as a model, if it is one.
fn examine(file: &str, path: &Path, known: &[Installed]) -> Option<Installed> {
    // A link may point anywhere, and mapping refuses it.
    let metadata = fs::symlink_metadata(path).ok()?;
    let (name, kind, bytes) = match file.strip_suffix(".gguf") {
        Some(name) if metadata.is_file() => (name, Kind::Gguf, metadata.len()),
        None if metadata.is_dir()
            && !file.ends_with(STAGING)
            && path.join("config.json").is_file() =>
        {
            (file, Kind::Checkpoint, folder_bytes(path))
        }
        _ => return None,
    };
    if !is_name(name) {
        return None;
    }
    let modified = (metadata.mtime(), metadata.mtime_nsec());
    let before = known.iter().find(|model| model.name == name && model.kind == kind);
    if let Some(before) = before
        && (before.bytes, before.modified) == (bytes, modified)
    {
        return Some(before.clone());
    }
    let facts = match kind {
        Kind::Gguf => Facts::of_file(path),
        Kind::Checkpoint => Facts::default(),
    };
    Some(Installed { name: name.to_owned(), kind, bytes, modified, facts, origin: None })
}

/// The names and paths in a folder; none if it is not there.
fn entries(dir: &Path) -> Result<Vec<(String, PathBuf)>, StoreError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(StoreError::io(dir)(error)),
    };
    let named = |entry: fs::DirEntry| Some((entry.file_name().to_str()?.to_owned(), entry.path()));
    Ok(entries.flatten().filter_map(named).collect())
}

fn folder_bytes(dir: &Path) -> u64 {
    let files = entries(dir).unwrap_or_default();
    files.iter().filter_map(|(_, path)| fs::metadata(path).ok()).map(|file| file.len()).sum()
}

/// Deletes a file that nobody has locked, or a folder.
fn remove_path(path: &Path, name: &str) -> Result<(), StoreError> {
    let io = || StoreError::io(path);
    if fs::symlink_metadata(path).map_err(io())?.is_dir() {
        fs::remove_dir_all(path).map_err(io())?;
    } else {
        let file = File::open(path).map_err(io())?;
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            return Err(StoreError::InUse(name.to_owned()));
        }
        fs::remove_file(path).map_err(io())?;
    }
    sync_folder(path)
}

/// Replaces a small file in one step, durably.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let new = super::download::with_ending(path, ".new");
    let write = || {
        let mut file = File::create(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, path)
    };
    write().map_err(StoreError::io(path))?;
    sync_folder(path)
}

/// Makes a rename in the folder of `path` last.
pub(super) fn sync_folder(path: &Path) -> Result<(), StoreError> {
    let Some(dir) = path.parent() else { return Ok(()) };
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(StoreError::io(dir))
}

/// `x:latest` is `x`.
fn plain_name(name: &str) -> &str {
    name.strip_suffix(":latest").unwrap_or(name)
}

const INDEX: &str = "index.json";
const LOCK: &str = ".lock";
const VERSION: u32 = 1;
/// Of folders in which a model in several files is gathered.
const STAGING: &str = ".parts";
