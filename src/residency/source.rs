//! A model file for positioned reads of large pieces, past the page cache where the file system allows.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};

use super::pager::{self, Pages};
use crate::gguf::Mapping;

/// Direct reads begin and end at multiples of this: a multiple of the blocks of every usual disk.
pub(super) const BLOCK_BYTES: u64 = 4096;

/// Bytes asked for by one read. Other reads can go before between two of them.
const PIECE_BYTES: usize = 4 << 20;

/// The file behind a mapping, opened for reading pieces of it.
#[derive(Debug)]
pub(super) struct Source {
    direct: Option<File>,
    buffered: File,
    use_direct: AtomicBool,
}

/// A piece of a file, as it comes to lie in a buffer: read from block to block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    /// Where reading begins.
    start: u64,
    /// Bytes before the wanted ones.
    head: usize,
    /// Wanted bytes.
    bytes: usize,
}

impl Span {
    /// The piece `bytes` long at `offset` of the file.
    pub(super) fn new(offset: u64, bytes: usize) -> Span {
        let start = offset & !(BLOCK_BYTES - 1);
        Span { start, head: (offset - start) as usize, bytes }
    }

    /// Bytes a buffer for it must have.
    pub(super) fn buffer_bytes(self) -> usize {
        (self.head + self.bytes).next_multiple_of(BLOCK_BYTES as usize)
    }

    /// Whether all wanted bytes are there when the first `done` of the buffer are.
    pub(super) fn is_complete(self, done: usize) -> bool {
        done >= self.wanted().end
    }

    /// Where the wanted bytes lie in the buffer.
    pub(super) fn wanted(self) -> Range<usize> {
        self.head..self.head + self.bytes
    }
}

/// Why a piece did not arrive.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The disk or the file system says so.
    #[error("reading an expert at byte {offset}: {error}")]
    Io { offset: u64, error: io::Error },
    /// A buffer could not be had.
    #[error("no memory to read an expert into: {0}")]
    Memory(io::Error),
    /// The threads that read have ended.
    #[error("nobody reads any more")]
    Stopped,
    /// The file is shorter than it was.
    #[error("the model file ends at byte {end}, an expert lies behind it")]
    Truncated { end: u64 },
}

impl Source {
    /// Opens the file of `mapping` a second time, for direct reads if `direct` and if a first one succeeds.
    ///
    /// # Errors
    /// If the model is built in and has no file, or no further descriptor is to be had.
    pub(super) fn open(mapping: &Mapping, direct: bool) -> io::Result<Source> {
        let no_file = || io::Error::new(io::ErrorKind::Unsupported, "a built-in model has no file");
        let buffered = mapping.file().ok_or_else(no_file)?.try_clone()?;
        let direct = if direct { open_direct(mapping, &buffered) } else { None };
        let use_direct = AtomicBool::new(direct.is_some());
        Ok(Source { direct, buffered, use_direct })
    }

    /// Whether reads go past the page cache.
    pub(super) fn is_direct(&self) -> bool {
        self.use_direct.load(Ordering::Relaxed)
    }

    /// Reads the next piece of `span` into `pages`, of which `done` bytes are there; returns how many are now.
    /// All of it has arrived when that is [`is_complete`](Span::is_complete).
    ///
    /// # Errors
    /// See [`ReadError`].
    ///
    /// # Panics
    /// If `pages` has fewer bytes than the span needs.
    pub(super) fn read_piece(
        &self,
        span: Span,
        pages: &mut Pages,
        done: usize,
    ) -> Result<usize, ReadError> {
        if let Some(file) = self.direct.as_ref().filter(|_| self.is_direct()) {
            match read_piece(file, span, &mut pages.bytes_mut()[..span.buffer_bytes()], done) {
                // Some file systems refuse only when it comes to reading.
                Err(ReadError::Io { error, .. }) if error.raw_os_error() == Some(libc::EINVAL) => {
                    self.use_direct.store(false, Ordering::Relaxed);
                }
                other => return other,
            }
        }
        let end = span.wanted().end;
        let now = read_piece(&self.buffered, span, &mut pages.bytes_mut()[..end], done)?;
        // The slot is the copy that counts; a second one in the page cache would take the place of a slot.
        let range = span.start + done as u64..span.start + now as u64;
        let _ = pager::drop_cached(&self.buffered, range);
        Ok(now)
    }
}

fn read_piece(file: &File, span: Span, out: &mut [u8], done: usize) -> Result<usize, ReadError> {
    let end = (done + PIECE_BYTES).min(out.len());
    let offset = span.start + done as u64;
    let count = loop {
        match file.read_at(&mut out[done..end], offset) {
            Ok(count) => break count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(ReadError::Io { offset, error }),
        }
    };
    // A direct read that ends off a block has met the end of the file.
    let ended = count == 0 || !(offset + count as u64).is_multiple_of(BLOCK_BYTES);
    if ended && done + count < span.wanted().end {
        return Err(ReadError::Truncated { end: offset + count as u64 });
    }
    Ok(done + count)
}

/// A descriptor for direct reads, if the same file is still there and a first read of it succeeds.
fn open_direct(mapping: &Mapping, same: &File) -> Option<File> {
    let flags = libc::O_DIRECT | libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(mapping.path()).ok()?;
    let (a, b) = (file.metadata().ok()?, same.metadata().ok()?);
    if (a.dev(), a.ino()) != (b.dev(), b.ino()) {
        return None;
    }
    let mut first = Pages::new(BLOCK_BYTES as usize).ok()?;
    file.read_at(&mut first.bytes_mut()[..BLOCK_BYTES as usize], 0).ok()?;
    Some(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file_of(bytes: &[u8]) -> (tempfile::TempDir, Mapping) {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("model.gguf");
        std::fs::write(&path, bytes).expect("room for it");
        let mapping = Mapping::open(&path).expect("a regular file");
        (dir, mapping)
    }

    fn content(len: usize) -> Vec<u8> {
        (0..len).map(|n| (n * 7 % 253) as u8).collect()
    }

    fn read(source: &Source, span: Span, pages: &mut Pages) -> Result<(), ReadError> {
        let mut done = 0;
        while !span.is_complete(done) {
            done = source.read_piece(span, pages, done)?;
        }
        Ok(())
    }

    #[test]
    fn pieces_arrive_wherever_they_lie() {
        let bytes = content(9 * 4096 + 777);
        let (_dir, mapping) = file_of(&bytes);
        for direct in [true, false] {
            let source = Source::open(&mapping, direct).expect("a file");
            for (offset, len) in
                [(0, 1), (1, 4096), (32, 8192), (4095, 2), (8192, 4096), (36_000, 1641)]
            {
                let span = Span::new(offset as u64, len);
                let mut pages = Pages::new(span.buffer_bytes()).expect("memory");
                read(&source, span, &mut pages).expect("it is there");
                let wanted = &bytes[offset..offset + len];
                assert_eq!(&pages.bytes()[span.wanted()], wanted, "{offset} {direct}");
            }
        }
    }

    #[test]
    fn what_the_file_no_longer_has_is_an_error() {
        let (_dir, mapping) = file_of(&content(64 * 1024));
        let writer = OpenOptions::new().write(true).open(mapping.path()).expect("ours");
        writer.set_len(10_000).expect("cut");
        for direct in [true, false] {
            let source = Source::open(&mapping, direct).expect("a file");
            for offset in [9_000_u64, 12_000, 40_000] {
                let span = Span::new(offset, 4096);
                let mut pages = Pages::new(span.buffer_bytes()).expect("memory");
                let result = read(&source, span, &mut pages);
                assert!(matches!(result, Err(ReadError::Truncated { .. })), "{offset}: {result:?}");
            }
        }
    }

    #[test]
    fn a_built_in_model_has_nothing_to_read_from() {
        let mapping = Mapping::built_in("nothing", &[0; 16]);
        assert!(Source::open(&mapping, true).is_err());
    }
}
