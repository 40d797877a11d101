//! A model in memory, read only: a mapped file, or bytes that are part of the program.

use std::fs::{self, File, Metadata, OpenOptions, TryLockError};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::GgufError;

/// A model's bytes: a mapped file, or the ones built into the program. Only regular files are mapped: a device, a pipe or a directory is refused, and so is a
/// symbolic link as the last component, because a model folder may be filled by others.
///
/// **The file must not shrink while it is mapped**: reading beyond its end kills the process (SIGBUS). The
/// store therefore replaces files by renaming only. A shared lock is held, so that writers who ask for
/// one see that it is in use, and [`Mapping::check_unchanged`] finds a file that was changed in place.
#[derive(Debug)]
pub struct Mapping {
    source: Source,
    path: PathBuf,
}

#[derive(Debug)]
enum Source {
    File { map: Mmap, file: File, identity: Identity },
    Program(&'static [u8]),
}

/// What tells that a file is still the one that was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
}

impl Mapping {
    /// Maps the file at `path`.
    ///
    /// # Errors
    /// If it cannot be opened, is no regular file, is empty, or is locked by a writer.
    pub fn open(path: &Path) -> Result<Mapping, GgufError> {
        let io = |source| GgufError::Io { path: path.to_owned(), source };
        let link = fs::symlink_metadata(path).map_err(io)?;
        refuse_unless_regular(path, &link)?;
        // Between the look and the opening the path may have been replaced: by a link, which is refused
        // here, or by a pipe, which must not block.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path)
            .map_err(io)?;
        let metadata = file.metadata().map_err(io)?;
        refuse_unless_regular(path, &metadata)?;
        if metadata.len() == 0 {
            return Err(GgufError::Empty);
        }
        // Some file systems have no locks: then nothing is promised, and nothing refused.
        if let Err(TryLockError::WouldBlock) = file.try_lock_shared() {
            let source = std::io::Error::other("the file is locked by a program that writes it");
            return Err(io(source));
        }
        let map = map(&file).map_err(io)?;
        let identity = Identity { bytes: map.len() as u64, ..Identity::of(&metadata) };
        Ok(Mapping { source: Source::File { map, file, identity }, path: path.to_owned() })
    }

    /// Bytes that are part of the program, under a name that stands where others have a path.
    pub fn built_in(name: &str, bytes: &'static [u8]) -> Mapping {
        Mapping { source: Source::Program(bytes), path: PathBuf::from(name) }
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        match &self.source {
            Source::File { map, .. } => map,
            Source::Program(bytes) => bytes,
        }
    }

    /// The mapped file, read only; none if the bytes are part of the program.
    pub fn file(&self) -> Option<&File> {
        match &self.source {
            Source::File { file, .. } => Some(file),
            Source::Program(_) => None,
        }
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Fails if the file was written to or cut since it was opened. A file renamed over its path changes
    /// nothing here: the mapping keeps the old one.
    ///
    /// # Errors
    /// [`GgufError::Replaced`].
    pub fn check_unchanged(&self) -> Result<(), GgufError> {
        let Source::File { file, identity, .. } = &self.source else {
            return Ok(());
        };
        let path = self.path.clone();
        match file.metadata() {
            Ok(metadata) if Identity::of(&metadata) == *identity => Ok(()),
            Ok(_) => Err(GgufError::Replaced { path }),
            Err(source) => Err(GgufError::Io { path, source }),
        }
    }
}

impl Identity {
    fn of(metadata: &Metadata) -> Identity {
        Identity {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

fn refuse_unless_regular(path: &Path, metadata: &Metadata) -> Result<(), GgufError> {
    let kind = metadata.file_type();
    let kind = match kind {
        _ if kind.is_file() => return Ok(()),
        _ if kind.is_dir() => "a directory",
        _ if kind.is_symlink() => "a symbolic link; name the file it points to",
        _ if kind.is_fifo() => "a pipe",
        _ if kind.is_socket() => "a socket",
        _ if kind.is_block_device() || kind.is_char_device() => "a device",
        _ => "something else",
    };
    Err(GgufError::NotAFile { path: path.to_owned(), kind })
}

#[expect(unsafe_code, reason = "mapping a file is unsafe: another process may change it")]
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the file was opened read only and the mapping is never written. That nobody cuts it while
    // it is mapped is a documented duty of the operator, see `Mapping`.
    unsafe { Mmap::map(file) }
}
