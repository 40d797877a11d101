//! The part of a model that every token reads: brought into memory before anybody waits for it, and kept there.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use log::warn;

use super::pager;
use crate::gguf::Mapping;
use crate::units::Bytes;

/// Ranges of a mapping that are kept in memory as long as this lives.
#[derive(Debug)]
pub struct Pinned {
    mapping: Arc<Mapping>,
    locked: Vec<Range<usize>>,
}

impl Pinned {
    /// Reads `ranges` in, piece by piece, and locks them if `lock`. A refused lock is said once and costs only the
    /// certainty that the pages stay.
    ///
    /// # Errors
    /// If the file cannot be read, or has become shorter.
    pub fn new(mapping: Arc<Mapping>, ranges: Vec<Range<usize>>, lock: bool) -> io::Result<Pinned> {
        let mut refused = !lock;
        let mut locked: Vec<Range<usize>> = Vec::new();
        for range in joined(ranges, pager::page_bytes()) {
            let end = range.end;
            for start in range.step_by(pager::POPULATE_BYTES) {
                let piece = start..(start + pager::POPULATE_BYTES).min(end);
                pager::populate(&mapping, piece.clone())?;
                if refused {
                    continue;
                }
                match pager::lock(&mapping, piece.clone()) {
                    Ok(()) => locked.push(piece),
                    Err(error) => {
                        refused = true;
                        warn!(target: "residency", error:%; "weights cannot be locked and may be dropped under pressure; raise LimitMEMLOCK");
                    }
                }
            }
        }
        Ok(Pinned { mapping, locked })
    }

    /// Bytes that are locked.
    pub fn locked(&self) -> Bytes {
        Bytes(self.locked.iter().map(|range| range.len() as u64).sum())
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        for range in &self.locked {
            // Whoever else maps the file keeps it; if this fails the end of the mapping unlocks all the same.
            let _ = pager::unlock(&self.mapping, range.clone());
        }
    }
}

/// Ranges in order, those that share a page or touch made one.
fn joined(mut ranges: Vec<Range<usize>>, page: usize) -> Vec<Range<usize>> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<usize>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start / page <= last.end.div_ceil(page) => {
                last.end = last.end.max(range.end);
            }
            _ => joined.push(range),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_share_a_page_become_one() {
        let check = |ranges: &[(usize, usize)], wanted: &[(usize, usize)]| {
            let ranges = ranges.iter().map(|&(start, end)| start..end).collect();
            let wanted: Vec<_> = wanted.iter().map(|&(start, end)| start..end).collect();
            assert_eq!(joined(ranges, 4096), wanted);
        };
        check(&[], &[]);
        check(&[(5, 5)], &[]);
        check(&[(9000, 9500), (0, 100)], &[(0, 100), (9000, 9500)]);
        check(&[(0, 100), (4000, 4100), (8192, 9000)], &[(0, 9000)]);
        check(&[(0, 20_000), (100, 200), (50_000, 50_001)], &[(0, 20_000), (50_000, 50_001)]);
    }

    #[test]
    fn pinned_ranges_are_in_memory() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("model.gguf");
        let page = pager::page_bytes();
        std::fs::write(&path, vec![7; 10 * page]).expect("room for it");
        let mapping = Arc::new(Mapping::open(&path).expect("a regular file"));
        let ranges = vec![10..100, 3 * page..5 * page + 1];
        let pinned = Pinned::new(Arc::clone(&mapping), ranges, true).expect("the file is whole");
        let resident = pager::resident_bytes(&mapping, 3 * page..6 * page).expect("mincore");
        assert_eq!(resident, 3 * page as u64);
        // Where locking is forbidden nothing is locked and all is well.
        assert!(pinned.locked().0 == 0 || pinned.locked().0 == 90 + 2 * page as u64 + 1);
    }
}
