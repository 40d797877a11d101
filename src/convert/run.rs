//! Carrying a plan out: threads, journal, checks, and the file's final name.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use sha2::{Digest, Sha256};

use super::error::ConvertError;
use super::input::Input;
use super::journal::{self, Entry, Journal};
use super::pieces::{Piece, Worker, cut, worker_bytes};
use super::plan::{Plan, plan};
use super::recipe::Recipe;
use super::report::{Loss, Report, TensorReport};
use crate::gguf::{Gguf, Mapping};

/// A conversion to be done.
#[derive(Clone, Debug)]
pub struct Options {
    /// A folder with a checkpoint, or a GGUF file.
    pub source: PathBuf,
    pub target: PathBuf,
    pub recipe: Recipe,
    /// `general.name`; that of the folder or file if absent.
    pub name: Option<String>,
    /// The model knows its tools from training, so a template without a place for tools stays without them
    /// (`scoutd.template.lists_tools` = false).
    pub knows_tools: bool,
    /// Of tensors in the file; a power of two.
    pub alignment: u32,
    /// All cores if absent. Fewer are used where more would exceed the memory bound.
    pub threads: Option<usize>,
    /// Go on with an interrupted conversion.
    pub resume: bool,
    /// Replace the target, and the remains of an interrupted conversion.
    pub force: bool,
}

/// Who is told how far the conversion is; called from several threads.
pub trait Observer: Sync {
    /// Planned; nothing is written yet.
    fn planned(&self, plan: &Plan);
    /// A part begins in which `bytes` pass.
    fn begin(&self, part: Part, bytes: u64);
    /// So many more have passed.
    fn passed(&self, bytes: u64);
}

/// The parts of a conversion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Reading back what an interrupted run has written.
    Resume,
    Convert,
    /// Reading the finished file back.
    Check,
}

/// Tells nobody.
pub struct Silent;

impl Observer for Silent {
    fn planned(&self, _: &Plan) {}
    fn begin(&self, _: Part, _: u64) {}
    fn passed(&self, _: u64) {}
}

/// Converts. The target appears under its name only when it is complete and was read back.
///
/// # Errors
/// Whatever is wrong with source, recipe, disk or target, with the file and the tensor it is about.
pub fn convert(options: &Options, observer: &dyn Observer) -> Result<Report, ConvertError> {
    if options.target.exists() && !options.force {
        return Err(ConvertError::TargetExists(options.target.clone()));
    }
    plan(options, |plan, input| {
        observer.planned(&plan);
        let started = Instant::now();
        Run::new(options, observer, plan, input).run(started)
    })
}

struct Run<'a> {
    options: &'a Options,
    observer: &'a dyn Observer,
    input: &'a dyn Input,
    plan: Plan,
    pieces: Vec<Piece>,
    threads: usize,
    partial: PathBuf,
    journal: PathBuf,
}

impl<'a> Run<'a> {
    fn new(
        options: &'a Options,
        observer: &'a dyn Observer,
        plan: Plan,
        input: &'a dyn Input,
    ) -> Run<'a> {
        let pieces = cut(&plan.tensors);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let fit = WORKERS_BYTES / worker_bytes(&plan.tensors, &pieces).max(1);
        let threads = options.threads.unwrap_or(cores).clamp(1, (fit as usize).max(1));
        let partial = with_suffix(&options.target, ".partial");
        let journal = with_suffix(&options.target, ".journal");
        Run { options, observer, input, plan, pieces, threads, partial, journal }
    }

    fn run(&self, started: Instant) -> Result<Report, ConvertError> {
        let was_there = self.partial.exists();
        if was_there && !self.options.resume && !self.options.force {
            return Err(ConvertError::Unfinished(self.partial.clone()));
        }
        let file = self.open()?;
        let fingerprint = self.fingerprint()?;
        let resuming = was_there && self.options.resume;
        let (mut entries, journal) = if resuming {
            self.resume(&file, &fingerprint)?
        } else {
            file.set_len(0).map_err(ConvertError::io(&self.partial))?;
            let journal = Journal::create(&self.journal, &fingerprint);
            (BTreeMap::new(), journal.map_err(ConvertError::io(&self.journal))?)
        };
        let resumed_pieces = entries.len();
        self.reserve(&file, resuming)?;
        file.write_all_at(&self.plan.header, 0).map_err(self.write_failed())?;
        match self.convert_pieces(&file, &entries, journal) {
            Ok(new) => entries.extend(new),
            Err(error) => {
                // The disk may be made free, but bad input stays bad: resuming would not help.
                if !matches!(error, ConvertError::Io { .. } | ConvertError::DiskFull { .. }) {
                    self.remove_remains();
                }
                return Err(error);
            }
        }
        file.sync_all().map_err(self.write_failed())?;
        drop(file);
        self.read_back(&entries)?;
        fs::rename(&self.partial, &self.options.target)
            .map_err(ConvertError::io(&self.options.target))?;
        let dir = self.dir();
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(ConvertError::io(dir))?;
        fs::remove_file(&self.journal).map_err(ConvertError::io(&self.journal))?;
        Ok(self.report(&entries, resumed_pieces, started))
    }

    /// Opens the temporary file and locks it, so that two conversions cannot share it.
    fn open(&self) -> Result<File, ConvertError> {
        let mut how = OpenOptions::new();
        how.read(true).write(true).create(true).truncate(false);
        let file = how.open(&self.partial).map_err(ConvertError::io(&self.partial))?;
        match file.try_lock() {
            Err(fs::TryLockError::WouldBlock) => Err(ConvertError::Resume {
                path: self.partial.clone(),
                reason: "another conversion is writing it".to_owned(),
            }),
            // Some file systems have no locks.
            Err(fs::TryLockError::Error(_)) | Ok(()) => Ok(file),
        }
    }

    /// Changes with anything that changes the file's bytes.
    fn fingerprint(&self) -> Result<[u8; 32], ConvertError> {
        let mut hash = Sha256::new();
        hash.update(&self.plan.header);
        hash.update(self.input.fingerprint()?);
        hash.update((self.pieces.len() as u64).to_le_bytes());
        Ok(hash.finalize().into())
    }

    /// The pieces of an interrupted run that are on disk as they were recorded.
    fn resume(
        &self,
        file: &File,
        fingerprint: &[u8; 32],
    ) -> Result<(BTreeMap<usize, Entry>, Journal), ConvertError> {
        let refused = |reason: &str| ConvertError::Resume {
            path: self.partial.clone(),
            reason: format!("{reason}; --force starts anew"),
        };
        let text =
            fs::read_to_string(&self.journal).map_err(|error| refused(&error.to_string()))?;
        let (mut entries, keep) = journal::parse(&text, fingerprint)
            .ok_or_else(|| refused("source, recipe or version differ from the interrupted run"))?;
        entries.retain(|&index, _| index < self.pieces.len());
        let recorded: Vec<usize> = entries.keys().copied().collect();
        let good = self.hashes_hold(file, &recorded, &entries, Part::Resume)?;
        entries.retain(|index, _| good.contains(index));
        let journal = Journal::append(&self.journal, keep);
        Ok((entries, journal.map_err(ConvertError::io(&self.journal))?))
    }

    /// Takes the whole file's space at once: a full disk shows before hours of work.
    fn reserve(&self, file: &File, resuming: bool) -> Result<(), ConvertError> {
        let dir = self.dir();
        let disk = rustix::fs::statvfs(dir)
            .map_err(|error| ConvertError::Io { path: dir.to_path_buf(), source: error.into() })?;
        let held = file.metadata().map_err(ConvertError::io(&self.partial))?.blocks() * 512;
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        let needed = self.plan.bytes.saturating_sub(held);
        let full = || {
            if !resuming {
                self.remove_remains();
            }
            ConvertError::DiskFull { dir: dir.to_path_buf(), needed, free }
        };
        if needed > free {
            return Err(full());
        }
        let mode = rustix::fs::FallocateFlags::empty();
        match rustix::fs::fallocate(file, mode, 0, self.plan.bytes) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::NOSPC) => Err(full()),
            // Not every file system can; then the length alone is set.
            Err(_) => file.set_len(self.plan.bytes).map_err(|error| {
                if !resuming {
                    self.remove_remains();
                }
                ConvertError::io(&self.partial)(error)
            }),
        }
    }

    /// Converts what `done` lacks.
    fn convert_pieces(
        &self,
        file: &File,
        done: &BTreeMap<usize, Entry>,
        journal: Journal,
    ) -> Result<Vec<(usize, Entry)>, ConvertError> {
        let missing: Vec<usize> =
            (0..self.pieces.len()).filter(|index| !done.contains_key(index)).collect();
        let bytes = missing.iter().map(|&index| self.piece_bytes(index)).sum();
        self.observer.begin(Part::Convert, bytes);
        let journal = Mutex::new(journal);
        self.in_parallel(&missing, Worker::default, |worker, index| {
            let piece = &self.pieces[index];
            let tensor = &self.plan.tensors[piece.tensor];
            let mut hash = Sha256::new();
            let loss = worker.convert(self.input, tensor, piece, &mut |at, bytes| {
                file.write_all_at(bytes, at).map_err(self.write_failed())?;
                hash.update(bytes);
                self.observer.passed(bytes.len() as u64);
                Ok(())
            })?;
            let entry = Entry { hash: hash.finalize().into(), loss };
            let mut journal = journal.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            journal.record(index, &entry).map_err(ConvertError::io(&self.journal))?;
            Ok(entry)
        })
    }

    /// Parses the finished file as any reader would, and compares every piece with what was written.
    fn read_back(&self, entries: &BTreeMap<usize, Entry>) -> Result<(), ConvertError> {
        let wrong = |reason: String| ConvertError::Verify { path: self.partial.clone(), reason };
        let mapping = Mapping::open(&self.partial).map_err(|error| wrong(error.to_string()))?;
        let gguf = Gguf::parse(mapping.bytes()).map_err(|error| wrong(error.to_string()))?;
        let same = gguf.tensors().len() == self.plan.tensors.len()
            && gguf.tensors().iter().zip(&self.plan.tensors).all(|(found, wanted)| {
                found.name == wanted.name
                    && found.format == wanted.format
                    && found.shape == wanted.shape
                    && found.offset == wanted.offset
                    && found.bytes == wanted.bytes
            });
        if !same {
            return Err(wrong("its list of tensors differs from the plan".to_owned()));
        }
        let all: Vec<usize> = (0..self.pieces.len()).collect();
        // Through the file: touched pages of a mapping would count as ours.
        let file = File::open(&self.partial).map_err(ConvertError::io(&self.partial))?;
        let good = self.hashes_hold(&file, &all, entries, Part::Check)?;
        match all.iter().find(|index| !good.contains(index)) {
            None => Ok(()),
            Some(&bad) => {
                let tensor = &self.plan.tensors[self.pieces[bad].tensor].name;
                Err(wrong(format!("tensor `{tensor}` has other bytes on disk")))
            }
        }
    }

    /// Which of `indices` have on disk the bytes that `entries` say.
    fn hashes_hold(
        &self,
        file: &File,
        indices: &[usize],
        entries: &BTreeMap<usize, Entry>,
        part: Part,
    ) -> Result<Vec<usize>, ConvertError> {
        let bytes = indices.iter().map(|&index| self.piece_bytes(index)).sum();
        self.observer.begin(part, bytes);
        let buffer = || vec![0; READ_BYTES];
        let found = self.in_parallel(indices, buffer, |buffer, index| {
            let piece = &self.pieces[index];
            let place = self.plan.tensors[piece.tensor].place(piece);
            let mut hash = Sha256::new();
            let mut at = place.start;
            while at < place.end {
                let len = (place.end - at).min(buffer.len() as u64) as usize;
                match file.read_exact_at(&mut buffer[..len], at) {
                    Ok(()) => {}
                    // Cut off: not what was written.
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
                    Err(error) => return Err(ConvertError::io(&self.partial)(error)),
                }
                hash.update(&buffer[..len]);
                self.observer.passed(len as u64);
                at += len as u64;
            }
            let hash: [u8; 32] = hash.finalize().into();
            Ok(entries.get(&index).is_some_and(|entry| entry.hash == hash))
        })?;
        let mut good: Vec<usize> =
            found.into_iter().filter_map(|(index, holds)| holds.then_some(index)).collect();
        good.sort_unstable();
        Ok(good)
    }

    /// Runs `work` for each index on all threads. The first error stops the others.
    fn in_parallel<S, T: Send>(
        &self,
        indices: &[usize],
        state: impl Fn() -> S + Sync,
        work: impl Fn(&mut S, usize) -> Result<T, ConvertError> + Sync,
    ) -> Result<Vec<(usize, T)>, ConvertError> {
        let next = AtomicUsize::new(0);
        let stop = AtomicBool::new(false);
        let (results, failure) = (Mutex::new(Vec::new()), Mutex::new(None));
        let one_thread = || {
            let mut state = state();
            while !stop.load(Ordering::Relaxed) {
                let Some(&index) = indices.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
                match work(&mut state, index) {
                    Ok(result) => lock(&results).push((index, result)),
                    Err(error) => {
                        stop.store(true, Ordering::Relaxed);
                        lock(&failure).get_or_insert(error);
                    }
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..self.threads {
                scope.spawn(one_thread);
            }
            one_thread();
        });
        match failure.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
            Some(error) => Err(error),
            None => Ok(results.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner())),
        }
    }

    fn report(
        &self,
        entries: &BTreeMap<usize, Entry>,
        resumed_pieces: usize,
        started: Instant,
    ) -> Report {
        let mut losses = vec![Loss::default(); self.plan.tensors.len()];
        let mut whole = Loss::default();
        for (index, entry) in entries {
            losses[self.pieces[*index].tensor].merge(&entry.loss);
            whole.merge(&entry.loss);
        }
        let tensors = self.plan.tensors.iter().zip(&losses).map(|(tensor, loss)| TensorReport {
            name: tensor.name.clone(),
            shape: tensor.shape.clone(),
            format: tensor.format.name(),
            instead_of: tensor.instead_of.map(scoutd_kernels::Format::name),
            bytes: tensor.bytes,
            rms_error: loss.rms(),
            max_error: loss.max(),
        });
        let tensor_bytes: u64 = self.plan.tensors.iter().map(|tensor| tensor.bytes).sum();
        let parameters = self.plan.parameters();
        Report {
            file: self.options.target.display().to_string(),
            architecture: self.plan.architecture.clone(),
            name: self.plan.name.clone(),
            recipe: self.plan.recipe.clone(),
            parameters,
            bytes: self.plan.bytes,
            bits_per_weight: tensor_bytes as f64 * 8.0 / parameters as f64,
            rms_error: whole.rms(),
            tensors: tensors.collect(),
            skipped: self.plan.skipped.clone(),
            notes: self.plan.notes.clone(),
            seconds: started.elapsed().as_secs_f64(),
            threads: self.threads,
            resumed_pieces,
            pieces: self.pieces.len(),
        }
    }

    fn piece_bytes(&self, index: usize) -> u64 {
        let piece = &self.pieces[index];
        let place = self.plan.tensors[piece.tensor].place(piece);
        place.end - place.start
    }

    fn dir(&self) -> &Path {
        match self.options.target.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        }
    }

    fn write_failed(&self) -> impl Fn(io::Error) -> ConvertError + '_ {
        |error| {
            if error.kind() == io::ErrorKind::StorageFull {
                let (dir, needed) = (self.dir().to_path_buf(), self.plan.bytes);
                return ConvertError::DiskFull { dir, needed, free: 0 };
            }
            ConvertError::Io { path: self.partial.clone(), source: error }
        }
    }

    /// Best effort: an error is already on its way.
    fn remove_remains(&self) {
        drop(fs::remove_file(&self.partial));
        drop(fs::remove_file(&self.journal));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// What all workers together may hold; threads are fewer where pieces are large. Below the bound of
/// 1.5 GB there remain the vocabulary, the header and the program itself.
const WORKERS_BYTES: u64 = 1 << 30;
const READ_BYTES: usize = 1 << 20;
