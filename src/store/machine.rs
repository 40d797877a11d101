//! What was measured of this machine, kept in one file so that it is measured once.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::fit::{DECODE_SHARE, Rates};
use crate::units::Bytes;

/// The file in the state folder.
const FILE: &str = "machine.json";

/// Share of the kernels' speed in the cache that a whole prompt reaches: attention, norms and memory take the rest.
const PREFILL_SHARE: f64 = 0.8;

/// Memory may differ by this share before a record counts as another machine's: firmware and kernel take more or
/// less of it from one version to the next.
const SAME_MEMORY: f64 = 0.1;

/// The measurements of a machine. Bandwidths are bytes a second, medians of several runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineRecord {
    /// When it was measured, as RFC 3339.
    pub date: String,
    /// The board or the host's name.
    pub machine: String,
    /// Version of scoutd that measured.
    pub version: String,
    /// Instruction set of the products.
    pub isa: String,
    /// Threads of the figures with all threads.
    pub threads: usize,
    /// All memory.
    pub memory_bytes: u64,
    /// Reading memory in one stream.
    pub memory_read_one_thread: f64,
    /// Reading memory with all threads.
    pub memory_read_all_threads: f64,
    /// Operations a second of 4-bit weights against 8-bit activations inside the cache, all threads.
    pub int8_ops: f64,
    /// The disk, if it could be measured.
    pub disk: Option<DiskRecord>,
}

/// What a disk gives.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// The folder whose disk it is.
    pub folder: PathBuf,
    /// One megabyte after the other.
    pub sequential_read: f64,
    /// Megabytes from random places, one at a time.
    pub random_read: f64,
    /// Whether the page cache was out of the way. If not, the figures may be those of memory.
    pub direct: bool,
}

impl MachineRecord {
    /// The record in `folder`; `None` if there is none.
    ///
    /// # Errors
    /// If the file cannot be read or is no record.
    pub fn load(folder: &Path) -> io::Result<Option<MachineRecord>> {
        let text = match fs::read_to_string(folder.join(FILE)) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        serde_json::from_str(&text).map(Some).map_err(io::Error::from)
    }

    /// Puts the record into `folder`, which is made if need be, in one step. Returns the file.
    ///
    /// # Errors
    /// If the folder or the file cannot be written.
    pub fn save(&self, folder: &Path) -> io::Result<PathBuf> {
        fs::create_dir_all(folder)?;
        let (file, new) = (folder.join(FILE), folder.join(format!("{FILE}.new")));
        fs::write(&new, format!("{:#}\n", serde_json::to_value(self)?))?;
        fs::rename(&new, &file)?;
        Ok(file)
    }

    /// Whether it can be of a machine with this much memory.
    pub fn is_of(&self, memory: Bytes) -> bool {
        let (own, other) = (self.memory_bytes as f64, memory.0 as f64);
        (own - other).abs() <= SAME_MEMORY * other
    }

    /// What speeds are estimated from. Of a disk that could not be measured without the page cache nothing is
    /// believed but what a Raspberry Pi 5 would give.
    pub fn rates(&self) -> Rates {
        let read = self.memory_read_one_thread.max(self.memory_read_all_threads);
        let disk = self.disk.as_ref().filter(|disk| disk.direct);
        Rates {
            decode_bytes_per_s: DECODE_SHARE * read,
            prefill_ops_per_s: PREFILL_SHARE * self.int8_ops,
            disk_bytes_per_s: disk.map_or(Rates::PI_5.disk_bytes_per_s, |disk| disk.random_read),
            measured: true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> MachineRecord {
        MachineRecord {
            date: "2026-01-02T03:04:05Z".to_owned(),
            machine: "board".to_owned(),
            version: "0.1.0".to_owned(),
            isa: "neon-dotprod".to_owned(),
            threads: 4,
            memory_bytes: 8_000_000_000,
            memory_read_one_thread: 14.9e9,
            memory_read_all_threads: 14e9,
            int8_ops: 400e9,
            disk: Some(DiskRecord {
                folder: "/var/lib/scoutd".into(),
                sequential_read: 0.9e9,
                random_read: 0.8e9,
                direct: true,
            }),
        }
    }

    #[test]
    fn a_record_is_kept_and_found_again() {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let inside = folder.path().join("state/scoutd");
        assert!(MachineRecord::load(&inside).expect("absent is no error").is_none());
        record().save(&inside).expect("the folder can be made");
        record().save(&inside).expect("a second time replaces the first");
        assert_eq!(MachineRecord::load(&inside).expect("it can be read"), Some(record()));
        assert_eq!(fs::read_dir(&inside).expect("the folder is there").count(), 1);
        fs::write(inside.join(FILE), "{").expect("the file can be written");
        assert!(MachineRecord::load(&inside).is_err());
    }

    #[test]
    fn the_better_of_one_and_all_threads_counts_and_a_cached_disk_does_not() {
        let rates = record().rates();
        assert!((rates.decode_bytes_per_s - 12.5e9).abs() < 1.0);
        assert_eq!((rates.disk_bytes_per_s, rates.prefill_ops_per_s), (0.8e9, 320e9));
        let mut cached = record();
        cached.disk.as_mut().expect("it has a disk").direct = false;
        assert_eq!(cached.rates().disk_bytes_per_s, Rates::PI_5.disk_bytes_per_s);
        assert!(record().is_of(Bytes(8_300_000_000)) && !record().is_of(Bytes(16_000_000_000)));
    }
}
