//! One file from the hub to the disk: into a part beside its place, checked, then renamed.
//!
//! The part `X.part` has a journal `X.part.json` that says what it is a part of. Bytes are hashed while they are
//! written; a later run hashes what is there and goes on behind it. A part that turns out wrong after a resume
//! (a power cut can leave holes) is thrown away once and loaded anew.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use super::choice::RemoteFile;
use super::error::StoreError;
use super::hub::{Hub, Opened};
use super::reference::Repo;
use crate::egress::Bytes;

/// Who is told how far a pull is; called from several threads.
pub trait Observer: Sync {
    /// A file's turn has come: its path and size; `there` bytes of it lie here already and are hashed now.
    fn begin(&self, file: &str, bytes: Option<u64>, there: u64);
    /// So many more bytes are hashed or loaded.
    fn passed(&self, bytes: u64);
    /// What was there is hashed; what comes now comes from the hub.
    fn loading(&self);
    /// These bytes of the file are thrown away; it begins anew.
    fn restarted(&self, file: &str, lost: u64);
    /// A request failed and is tried again after this time.
    fn waiting(&self, error: &StoreError, wait: std::time::Duration);
    /// The file is complete, and its checksum right if there was one.
    fn done(&self, file: &str);
}

/// What a part is a part of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Journal {
    pub(super) repo: String,
    pub(super) commit: String,
    pub(super) file: String,
    pub(super) bytes: Option<u64>,
    pub(super) sha256: Option<String>,
    /// Of the host that sent the bytes.
    etag: Option<String>,
}

impl Journal {
    /// Whether bytes of `self` are bytes of `other`: the same content, or the same file of the same commit.
    fn is_of(&self, other: &Journal) -> bool {
        let same_file = self.repo == other.repo && self.file == other.file;
        let same_size = match (self.bytes, other.bytes) {
            (Some(ours), Some(theirs)) => ours == theirs,
            _ => true,
        };
        match (&self.sha256, &other.sha256) {
            (Some(ours), Some(theirs)) => ours == theirs,
            _ => same_file && same_size && self.commit == other.commit,
        }
    }

    pub(super) fn load(path: &Path) -> Option<Journal> {
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }

    fn save(&self, path: &Path) -> Result<(), StoreError> {
        let text = serde_json::to_vec(self).expect("texts and numbers serialize");
        super::index::write_whole(path, &text)
    }
}

/// A running download.
pub(super) struct Download<'a> {
    pub(super) hub: &'a Hub,
    pub(super) repo: &'a Repo,
    pub(super) commit: &'a str,
    pub(super) file: &'a RemoteFile,
    pub(super) target: &'a Path,
    pub(super) observer: &'a dyn Observer,
}

impl Download<'_> {
    /// Loads the file, puts it in its place and returns the SHA-256 of its bytes, in hexadecimal.
    ///
    /// # Errors
    /// What the hub, the network or the disk says; the part stays unless it is empty or its content was wrong.
    pub(super) async fn run(&self) -> Result<String, StoreError> {
        let part = with_ending(self.target, ".part");
        let journal = with_ending(self.target, ".part.json");
        let sink = Sink::open(&part)?;
        let result = self.run_into(sink, &part, &journal).await;
        if let Err(error) = &result {
            let wrong = matches!(error, StoreError::Checksum { .. } | StoreError::Length { .. });
            if wrong || fs::metadata(&part).is_ok_and(|metadata| metadata.len() == 0) {
                let _ = fs::remove_file(&part);
                let _ = fs::remove_file(&journal);
            }
        }
        result
    }

    async fn run_into(
        &self,
        mut sink: Sink,
        part: &Path,
        journal_path: &Path,
    ) -> Result<String, StoreError> {
        let mut journal = Journal {
            repo: self.repo.to_string(),
            commit: self.commit.to_owned(),
            file: self.file.path.clone(),
            bytes: self.file.bytes,
            sha256: self.file.sha256.clone(),
            etag: None,
        };
        match Journal::load(journal_path).filter(|there| there.is_of(&journal)) {
            Some(there) => journal.etag = there.etag,
            None => sink.clear()?,
        }
        journal.save(journal_path)?;
        if journal.bytes.is_some_and(|bytes| sink.found > bytes) {
            sink.clear()?;
        }
        self.observer.begin(&self.file.path, self.file.bytes, sink.found);
        let resumed = sink.found > 0;
        let progress = Progress { observer: self.observer };
        sink = progress.watch(move |passed| sink.rehash(passed)).await?;
        self.observer.loading();
        sink = self.fill(sink, &mut journal, journal_path, &progress).await?;
        match check(&self.file.path, &journal, &sink) {
            Err(_) if resumed => {
                self.observer.restarted(&self.file.path, sink.at);
                sink.clear()?;
                journal.etag = None;
                sink = self.fill(sink, &mut journal, journal_path, &progress).await?;
                check(&self.file.path, &journal, &sink)?;
            }
            result => result?,
        }
        let digest = sink.digest();
        sink.finish(self.target, part).await?;
        let _ = fs::remove_file(journal_path);
        self.observer.done(&self.file.path);
        Ok(digest)
    }

    /// Loads until the end, over as many connections as it takes.
    async fn fill(
        &self,
        mut sink: Sink,
        journal: &mut Journal,
        journal_path: &Path,
        progress: &Progress<'_>,
    ) -> Result<Sink, StoreError> {
        let mut failures = 0;
        loop {
            if journal.bytes == Some(sink.at) {
                return Ok(sink);
            }
            let before = sink.at;
            let (after, result) = self.connection(sink, journal, journal_path, progress).await?;
            sink = after;
            let error = match result {
                Ok(()) => return Ok(sink),
                Err(error) => error,
            };
            failures = if sink.at > before { 1 } else { failures + 1 };
            let Some(wait) = self.hub.retry.wait(&error, failures) else { return Err(error) };
            self.observer.waiting(&error, wait);
            tokio::time::sleep(wait).await;
        }
    }

    /// One connection. The outer error is the disk's, the inner one the way's: then the sink goes on.
    async fn connection(
        &self,
        mut sink: Sink,
        journal: &mut Journal,
        journal_path: &Path,
        progress: &Progress<'_>,
    ) -> Result<(Sink, Result<(), StoreError>), StoreError> {
        let validator = journal.etag.clone();
        let range = (sink.at, None);
        let path = &self.file.path;
        let opened = self.hub.file(self.repo, self.commit, path, range, validator.as_deref()).await;
        let mut opened = match opened {
            Ok(opened) => opened,
            // Nothing lies behind what we have: the check at the end says whether that is right.
            Err(StoreError::Server { status: 416, .. }) if sink.at > 0 => {
                return Ok((sink, Ok(())));
            }
            Err(error) => return Ok((sink, Err(error))),
        };
        if sink.at > 0 && opened.begins_at() != Some(sink.at) {
            // The range was ignored, or the file is another one now.
            self.observer.restarted(path, sink.at);
            sink.clear()?;
            if opened.begins_at() != Some(0) {
                let message = format!("{path}: the answer begins in the middle");
                return Ok((sink, Err(StoreError::Hub(message))));
            }
        }
        let sizes = [journal.bytes, opened.linked_bytes, opened.whole_size()];
        let mut known = sizes.iter().flatten();
        if let Some(&wanted) = known.next() {
            if let Some(&found) = known.find(|&&size| size != wanted) {
                return Err(StoreError::Length { file: path.clone(), wanted, found });
            }
            journal.bytes = Some(wanted);
        }
        journal.sha256 = journal.sha256.take().or_else(|| opened.linked_sha256.take());
        journal.etag = opened.strong_etag();
        journal.save(journal_path)?;
        progress.pour(sink, opened, journal.bytes).await
    }
}

/// Bytes from a connection through a bounded queue to the disk, so that both go on at once.
struct Progress<'a> {
    observer: &'a dyn Observer,
}

impl Progress<'_> {
    /// Runs blocking work elsewhere and passes on what it counts.
    async fn watch<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn Fn(u64)) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (count, mut counted) = mpsc::channel(QUEUE);
        let task = tokio::task::spawn_blocking(move || {
            // Nobody listens any more if the pull was given up.
            work(&|bytes| {
                let _ = count.blocking_send(bytes);
            })
        });
        while let Some(bytes) = counted.recv().await {
            self.observer.passed(bytes);
        }
        task.await.unwrap_or_else(|error| Err(gone(&error)))
    }

    async fn pour(
        &self,
        sink: Sink,
        mut opened: Opened,
        limit: Option<u64>,
    ) -> Result<(Sink, Result<(), StoreError>), StoreError> {
        let (queue, mut queued) = mpsc::channel::<Bytes>(QUEUE);
        let start = sink.at;
        let task = tokio::task::spawn_blocking(move || {
            let mut sink = sink;
            while let Some(bytes) = queued.blocking_recv() {
                sink.append(&bytes)?;
            }
            sink.flush()?;
            Ok(sink)
        });
        let mut came = start;
        let result = loop {
            let bytes = match opened.response.chunk().await {
                Ok(Some(bytes)) => bytes,
                Ok(None) => break Ok(()),
                Err(error) => break Err(StoreError::Network(error)),
            };
            came += bytes.len() as u64;
            if limit.is_some_and(|limit| came > limit) {
                break Err(StoreError::Hub("the hub sends more than it announced".to_owned()));
            }
            let count = bytes.len() as u64;
            // The writer is gone: it has the reason.
            if queue.send(bytes).await.is_err() {
                break Ok(());
            }
            self.observer.passed(count);
        };
        drop(queue);
        let sink = task.await.unwrap_or_else(|error| Err(gone(&error)))?;
        Ok((sink, result))
    }
}

fn gone(error: &tokio::task::JoinError) -> StoreError {
    StoreError::Hub(format!("the writing thread ended: {error}"))
}

/// The part on disk with the hash of all that is written.
struct Sink {
    file: File,
    path: PathBuf,
    hasher: Sha256,
    /// Bytes that were there before.
    found: u64,
    /// Bytes written and hashed.
    at: u64,
    unsynced: u64,
}

impl Sink {
    fn open(path: &Path) -> Result<Sink, StoreError> {
        let io = || StoreError::io(path);
        let mut options = OpenOptions::new();
        let file =
            options.read(true).write(true).create(true).truncate(false).open(path).map_err(io())?;
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            return Err(StoreError::Busy(path.to_owned()));
        }
        let found = file.metadata().map_err(io())?.len();
        let path = path.to_owned();
        Ok(Sink { file, path, hasher: Sha256::new(), found, at: 0, unsynced: 0 })
    }

    fn clear(&mut self) -> Result<(), StoreError> {
        self.file.set_len(0).map_err(StoreError::io(&self.path))?;
        self.file.seek(SeekFrom::Start(0)).map_err(StoreError::io(&self.path))?;
        self.hasher = Sha256::new();
        (self.found, self.at) = (0, 0);
        Ok(())
    }

    /// Hashes what is there and stands behind it.
    fn rehash(mut self, passed: &dyn Fn(u64)) -> Result<Sink, StoreError> {
        let mut buffer = vec![0; CHUNK];
        while self.at < self.found {
            let want = CHUNK.min((self.found - self.at) as usize);
            match self.file.read(&mut buffer[..want]) {
                Ok(0) => break,
                Ok(count) => {
                    self.hasher.update(&buffer[..count]);
                    self.at += count as u64;
                    passed(count as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(StoreError::io(&self.path)(error)),
            }
        }
        Ok(self)
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.file.write_all(bytes).map_err(StoreError::io(&self.path))?;
        self.hasher.update(bytes);
        self.at += bytes.len() as u64;
        self.unsynced += bytes.len() as u64;
        if self.unsynced >= SYNC_EVERY { self.flush() } else { Ok(()) }
    }

    /// A power cut then takes at most the last stretch, and no heap of unwritten pages builds up.
    fn flush(&mut self) -> Result<(), StoreError> {
        self.unsynced = 0;
        self.file.sync_data().map_err(StoreError::io(&self.path))
    }

    fn digest(&self) -> String {
        self.hasher.clone().finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Gives the part its final name, durably.
    async fn finish(self, target: &Path, part: &Path) -> Result<(), StoreError> {
        let (target, part) = (target.to_owned(), part.to_owned());
        let work = tokio::task::spawn_blocking(move || {
            self.file.sync_all().map_err(StoreError::io(&self.path))?;
            fs::rename(&part, &target).map_err(StoreError::io(&target))?;
            super::index::sync_folder(&target)
        });
        work.await.unwrap_or_else(|error| Err(gone(&error)))
    }
}

fn check(file: &str, journal: &Journal, sink: &Sink) -> Result<(), StoreError> {
    let file = file.to_owned();
    if let Some(wanted) = journal.bytes.filter(|&bytes| bytes != sink.at) {
        return Err(StoreError::Length { file, wanted, found: sink.at });
    }
    let found = sink.digest();
    match &journal.sha256 {
        Some(wanted) if *wanted != found => {
            Err(StoreError::Checksum { file, wanted: wanted.clone(), found })
        }
        _ => Ok(()),
    }
}

/// `path` with more at its end.
pub(super) fn with_ending(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    PathBuf::from(name)
}

/// Pieces between the network and the disk.
const QUEUE: usize = 32;
const CHUNK: usize = 1 << 20;
const SYNC_EVERY: u64 = 64 << 20;
