//! Which pieces are on disk: the record that `--resume` goes by.
//!
//! One line a piece: its number, the SHA-256 of its bytes, and its loss. Nothing is synced while
//! converting; instead a resumed run reads every recorded piece back and trusts only what still has
//! its hash, so it survives a power cut as well as a kill.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use super::report::Loss;

/// What is known about a written piece.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Entry {
    pub(super) hash: [u8; 32],
    pub(super) loss: Loss,
}

/// The open journal of a running conversion.
pub(super) struct Journal {
    file: File,
}

impl Journal {
    /// Begins a journal for the conversion with this fingerprint.
    pub(super) fn create(path: &Path, fingerprint: &[u8; 32]) -> io::Result<Journal> {
        let mut file = File::create(path)?;
        file.write_all(format!("{MAGIC} {}\n", hex(fingerprint)).as_bytes())?;
        Ok(Journal { file })
    }

    /// Goes on with a journal, after `keep` bytes of it: behind them lies a torn line at most.
    pub(super) fn append(path: &Path, keep: u64) -> io::Result<Journal> {
        let mut file = OpenOptions::new().write(true).open(path)?;
        file.set_len(keep)?;
        io::Seek::seek(&mut file, io::SeekFrom::End(0))?;
        Ok(Journal { file })
    }

    pub(super) fn record(&mut self, piece: usize, entry: &Entry) -> io::Result<()> {
        let line = format!("{piece} {} {}\n", hex(&entry.hash), entry.loss.to_text());
        self.file.write_all(line.as_bytes())
    }
}

/// The entries of a journal and the length of its whole lines, if it belongs to `fingerprint`.
pub(super) fn parse(text: &str, fingerprint: &[u8; 32]) -> Option<(BTreeMap<usize, Entry>, u64)> {
    let first = format!("{MAGIC} {}\n", hex(fingerprint));
    let mut rest = text.strip_prefix(&first)?;
    let mut entries = BTreeMap::new();
    // A kill can tear the last line only; what follows a torn line is not believed.
    while let Some((line, after)) = rest.split_once('\n') {
        let Some((piece, entry)) = parse_line(line) else { break };
        entries.insert(piece, entry);
        rest = after;
    }
    Some((entries, (text.len() - rest.len()) as u64))
}

fn parse_line(line: &str) -> Option<(usize, Entry)> {
    let (piece, rest) = line.split_once(' ')?;
    let (hash, loss) = rest.split_once(' ')?;
    Some((piece.parse().ok()?, Entry { hash: unhex(hash)?, loss: Loss::from_text(loss)? }))
}

fn hex(bytes: &[u8; 32]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let mut out = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (at, byte) in out.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).ok()?;
    }
    Some(out)
}

const MAGIC: &str = "scoutd-convert-1";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_line_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut loss = Loss::default();
        loss.add(&[1.0, 2.0], &[1.0, 1.5]);
        let entry = Entry { hash: [7; 32], loss };
        let mut journal = Journal::create(&path, &[1; 32]).unwrap();
        journal.record(3, &entry).unwrap();
        journal.record(4, &entry).unwrap();
        let whole = std::fs::read_to_string(&path).unwrap();
        let (entries, len) = parse(&whole, &[1; 32]).unwrap();
        assert_eq!(entries.into_iter().collect::<Vec<_>>(), [(3, entry), (4, entry)]);
        assert_eq!(len, whole.len() as u64);
        assert!(parse(&whole, &[2; 32]).is_none(), "another conversion");

        std::fs::write(&path, &whole[..whole.len() - 3]).unwrap();
        let torn = std::fs::read_to_string(&path).unwrap();
        let (entries, keep) = parse(&torn, &[1; 32]).unwrap();
        assert_eq!(entries.len(), 1);
        Journal::append(&path, keep).unwrap().record(9, &entry).unwrap();
        let (entries, _) = parse(&std::fs::read_to_string(&path).unwrap(), &[1; 32]).unwrap();
        assert_eq!(entries.keys().copied().collect::<Vec<_>>(), [3, 9]);
    }
}
