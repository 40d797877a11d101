//! `scoutd bench --machine`: what memory, processor and disk of this machine give, measured once and kept.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use scoutd_kernels::quantize::quantize_row;
use scoutd_kernels::{Activations, Format, Kernels, Matrix, Precision, Team, matmul};
use serde_json::json;

use crate::daemon;
use crate::memory::{MemoryProbe, ProcProbe};
use crate::store::{DiskRecord, MachineRecord};
use crate::units::Bytes;

/// Where to measure and where to keep it.
pub(super) struct Request {
    /// Folder whose disk is measured; the state folder if absent.
    pub(super) disk: Option<PathBuf>,
    /// Folder of the record; the usual one if absent.
    pub(super) state: Option<PathBuf>,
    /// Threads of the figures with all threads.
    pub(super) threads: usize,
    pub(super) json: bool,
}

/// Measures, keeps and prints.
pub(super) fn run(request: &Request) -> anyhow::Result<ExitCode> {
    let state = match &request.state {
        Some(state) => state.clone(),
        None => daemon::state_folder()
            .context("no folder to keep the figures in; name one with --state")?,
    };
    let sample = ProcProbe::new().and_then(|mut probe| probe.sample()).context("memory")?;
    let threads = request.threads;
    let (one, all) = memory(sample.available, threads);
    let folder = request.disk.clone().unwrap_or_else(|| state.clone());
    let disk = fs::create_dir_all(&folder).and_then(|()| disk(&folder));
    if let Err(error) = &disk {
        eprintln!("scoutd: disk of {} not measured: {error}", folder.display());
    }
    let kernels = Kernels::detect();
    let record = MachineRecord {
        date: jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        machine: daemon::machine_name(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        isa: kernels.isa().name().to_owned(),
        threads,
        memory_bytes: sample.total.0,
        memory_read_one_thread: one,
        memory_read_all_threads: all,
        int8_ops: int8_ops(kernels, threads),
        disk: disk.ok(),
    };
    let file =
        record.save(&state).with_context(|| format!("cannot write into {}", state.display()))?;
    if request.json {
        println!("{}", json!({"file": file, "record": record}));
    } else {
        print(&record, &file);
    }
    Ok(ExitCode::SUCCESS)
}

fn print(record: &MachineRecord, file: &Path) {
    let gb = |bytes_per_s: f64| format!("{:.2} GB/s", bytes_per_s / 1e9);
    println!("{}, {}, {}", record.machine, Bytes(record.memory_bytes), record.isa);
    println!("memory read, one thread      {:>12}", gb(record.memory_read_one_thread));
    println!(
        "memory read, {:>2} threads      {:>12}",
        record.threads,
        gb(record.memory_read_all_threads)
    );
    println!("4-bit × 8-bit products       {:>8.0} GOPS", record.int8_ops / 1e9);
    if let Some(disk) = &record.disk {
        println!("disk, 1 MB in order          {:>12}", gb(disk.sequential_read));
        println!("disk, 1 MB at random         {:>12}", gb(disk.random_read));
        if !disk.direct {
            println!(
                "  the file system of {} has no direct reads: the page cache may have helped,",
                disk.folder.display()
            );
            println!("  so plans do not use these two figures");
        }
    }
    println!("kept in {}", file.display());
}

/// Runs of a figure; the median counts.
const RUNS: usize = 5;
/// A run lasts at least this long.
const RUN: Duration = Duration::from_millis(150);

/// The median of several runs, each given as work per second.
fn median(mut run: impl FnMut() -> f64) -> f64 {
    let mut rates: Vec<f64> = (0..RUNS).map(|_| run()).collect();
    rates.sort_by(f64::total_cmp);
    rates[RUNS / 2]
}

/// Bytes a second of reading memory in one stream and in one stream per thread.
fn memory(available: Bytes, threads: usize) -> (f64, f64) {
    let bytes = (available.0 / 8).clamp(16 << 20, 256 << 20);
    let words = vec![0x5555_5555_5555_5555_u64; bytes as usize / 8];
    // The first pass maps the pages and is not counted.
    std::hint::black_box(fold(&words));
    let read = |threads: usize| {
        let part = words.len().div_ceil(threads.max(1));
        let start = Instant::now();
        let mut passes = 0;
        while start.elapsed() < RUN {
            std::thread::scope(|scope| {
                for part in words.chunks(part) {
                    scope.spawn(|| std::hint::black_box(fold(part)));
                }
            });
            passes += 1;
        }
        (passes * words.len() * 8) as f64 / start.elapsed().as_secs_f64()
    };
    (median(|| read(1)), median(|| read(threads)))
}

/// Reads every word. Independent lanes, so that the compiler makes wide loads of them.
fn fold(words: &[u64]) -> u64 {
    let mut lanes = [0_u64; 32];
    let chunks = words.chunks_exact(lanes.len());
    let rest = chunks.remainder().iter().fold(0, |all, word| all ^ word);
    for chunk in chunks {
        for (lane, word) in lanes.iter_mut().zip(chunk) {
            *lane ^= *word;
        }
    }
    lanes.iter().fold(rest, |all, lane| all ^ lane)
}

/// Operations a second of a product that stays in the cache, as reading a prompt does it.
fn int8_ops(kernels: Kernels, threads: usize) -> f64 {
    const COLS: usize = 2048;
    const ROWS: usize = 256;
    const TOKENS: usize = 64;
    let values: Vec<f32> =
        (0..ROWS.max(TOKENS) * COLS).map(|n| (n % 251) as f32 / 125.0 - 1.0).collect();
    let bytes = Format::Q4_0.row_bytes(ROWS * COLS).expect("whole blocks");
    let mut weights = vec![0; bytes];
    quantize_row(Format::Q4_0, &values[..ROWS * COLS], &mut weights);
    let Ok(matrix) = Matrix::new(Format::Q4_0, ROWS, COLS, &weights) else { return 0.0 };
    let mut x = Activations::new();
    let form = Format::Q4_0.activation_form(Precision::Int8);
    x.fill(&kernels, form, &values[..TOKENS * COLS], COLS);
    let mut out = vec![0.0; ROWS * TOKENS];
    let mut team = Team::new(threads);
    median(|| {
        let start = Instant::now();
        let mut products = 0;
        while start.elapsed() < RUN {
            matmul(&mut team, &kernels, &matrix, &x, &mut out);
            products += 1;
        }
        std::hint::black_box(&out);
        (2 * ROWS * COLS * TOKENS * products) as f64 / start.elapsed().as_secs_f64()
    })
}

/// One read, as experts are read.
const PIECE: usize = 1 << 20;
/// Pieces of the file that is read: more than the cache of any small drive.
const PIECES: u64 = 256;
/// Random pieces of a run.
const RANDOM: u64 = 64;
/// Alignment of direct reads: no drive in use asks for more.
const BLOCK: usize = 4096;

/// Reads a large model of the folder, or a file written for the purpose.
fn disk(folder: &Path) -> io::Result<DiskRecord> {
    if rustix::fs::statfs(folder)?.f_type as u64 == TMPFS_MAGIC {
        return Err(io::Error::other("it lies in memory"));
    }
    let own = folder.join(".scoutd-bench");
    let model = largest_model(folder).filter(|(_, bytes)| *bytes >= PIECES * PIECE as u64);
    let (path, bytes) = match &model {
        Some((path, bytes)) => (path.as_path(), *bytes),
        None => {
            write_file(&own).inspect_err(|_| drop(fs::remove_file(&own)))?;
            (own.as_path(), PIECES * PIECE as u64)
        }
    };
    let measured = read_file(folder, path, bytes / PIECE as u64);
    if model.is_none() {
        fs::remove_file(&own)?;
    }
    measured
}

fn read_file(folder: &Path, path: &Path, pieces: u64) -> io::Result<DiskRecord> {
    let mut buffer = vec![0; PIECE + BLOCK];
    let offset = buffer.as_ptr().addr().wrapping_neg() % BLOCK;
    let buffer = &mut buffer[offset..offset + PIECE];
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path);
    // Some file systems open the file and refuse the first read.
    let direct = direct.and_then(|file| file.read_exact_at(buffer, 0).map(|()| file));
    let (file, is_direct) = match direct {
        Ok(file) => (file, true),
        Err(_) => (File::open(path)?, false),
    };
    let mut places = Places { state: 1, pieces };
    let mut read = |pieces: &mut dyn Iterator<Item = u64>| {
        if !is_direct {
            // Asks for the cache to be emptied of this file; nobody says whether it was.
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        }
        let start = Instant::now();
        let mut bytes = 0;
        for piece in pieces {
            file.read_exact_at(buffer, piece * PIECE as u64)?;
            bytes += PIECE;
        }
        io::Result::Ok(bytes as f64 / start.elapsed().as_secs_f64())
    };
    let mut sequential = Vec::with_capacity(DISK_RUNS);
    let mut random = Vec::with_capacity(DISK_RUNS);
    for _ in 0..DISK_RUNS {
        sequential.push(read(&mut (0..pieces.min(PIECES)))?);
        random.push(read(&mut places.by_ref().take(RANDOM as usize))?);
    }
    sequential.sort_by(f64::total_cmp);
    random.sort_by(f64::total_cmp);
    Ok(DiskRecord {
        folder: folder.to_owned(),
        sequential_read: sequential[DISK_RUNS / 2],
        random_read: random[DISK_RUNS / 2],
        direct: is_direct,
    })
}

/// Runs of a disk's figure: each reads a quarter of a gigabyte, which a card takes seconds for.
const DISK_RUNS: usize = 3;

/// `f_type` of a file system in memory.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// Numbers of pieces in no order, by a linear congruential generator.
struct Places {
    state: u64,
    pieces: u64,
}

impl Iterator for Places {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        Some((self.state >> 33) % self.pieces.max(1))
    }
}

fn largest_model(folder: &Path) -> Option<(PathBuf, u64)> {
    let entries = fs::read_dir(folder).ok()?.flatten();
    entries
        .filter(|entry| entry.path().extension().is_some_and(|extension| extension == "gguf"))
        .filter_map(|entry| Some((entry.path(), entry.metadata().ok()?.len())))
        .max_by_key(|(_, bytes)| *bytes)
}

/// Noise, so that no drive or file system can compress it away.
fn write_file(path: &Path) -> io::Result<()> {
    let mut file = File::create(path)?;
    let mut state = 1_u64;
    let mut piece = vec![0; PIECE];
    for _ in 0..PIECES {
        for word in piece.chunks_exact_mut(8) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            word.copy_from_slice(&(state ^ (state >> 29)).to_le_bytes());
        }
        file.write_all(&piece)?;
    }
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_measured_and_left_as_it_was() {
        let folder = tempfile::Builder::new()
            .tempdir_in(env!("CARGO_MANIFEST_DIR"))
            .expect("the repository can be written to");
        // On a file system in memory there is nothing to measure, and that is said.
        match disk(folder.path()) {
            Ok(record) => assert!(record.sequential_read > 0.0 && record.random_read > 0.0),
            Err(error) => assert_eq!(error.to_string(), "it lies in memory"),
        }
        assert_eq!(fs::read_dir(folder.path()).expect("the folder is there").count(), 0);
    }

    #[test]
    fn places_stay_inside_the_file() {
        let places = Places { state: 1, pieces: 7 };
        let seen: std::collections::BTreeSet<u64> = places.take(100).collect();
        assert_eq!(seen, (0..7).collect());
    }

    #[test]
    fn every_word_is_read() {
        let mut words = vec![0; 67];
        words[63] = 5;
        words[2] = 8;
        words[66] = 16;
        assert_eq!(fold(&words), 29);
    }
}
