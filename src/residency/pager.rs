//! What the kernel is asked to do with pages: lock, populate, drop, and lend empty ones. The only room that locks
//! or drops pages.
//!
//! Sizes are bytes and are rounded to the machine's pages here (4 KB on most machines, 16 KB on a Raspberry Pi 5).
//! Errors are values: a refused lock or an unknown advice costs speed, never an answer.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::gguf::Mapping;

/// Bytes of a page of this machine.
pub fn page_bytes() -> usize {
    static PAGE: OnceLock<usize> = OnceLock::new();
    *PAGE.get_or_init(|| {
        // SAFETY: reads a constant of the system.
        #[expect(unsafe_code, reason = "sysconf has no safe form in the standard library")]
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        usize::try_from(page).ok().filter(|page| page.is_power_of_two()).unwrap_or(4096)
    })
}

/// Bytes read in by one call of [`populate`]: between two of them others see to the memory.
pub const POPULATE_BYTES: usize = 64 << 20;

/// The whole pages that `range` of the mapping touches, as address and length.
fn pages(mapping: &Mapping, range: &Range<usize>) -> (*mut libc::c_void, usize) {
    let bytes = &mapping.bytes()[range.clone()];
    let page = page_bytes();
    let start = bytes.as_ptr().addr() & !(page - 1);
    let end = (bytes.as_ptr().addr() + bytes.len()).next_multiple_of(page);
    (std::ptr::without_provenance_mut(start), end - start)
}

/// Reads `range` of the mapping in, so that nobody waits for a page later. A page that cannot be read is an error
/// here (EFAULT) and not a signal. Kernels before 5.14 know no such advice and are asked to read ahead instead.
///
/// # Errors
/// If the file ends before the range does, or cannot be read.
///
/// # Panics
/// If the range is not inside the mapping.
pub fn populate(mapping: &Mapping, range: Range<usize>) -> io::Result<()> {
    let mut at = range.start;
    while at < range.end {
        let next = (at + POPULATE_BYTES).min(range.end);
        match advise(mapping, &(at..next), libc::MADV_POPULATE_READ) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                advise(mapping, &(at..next), libc::MADV_WILLNEED)?;
            }
            other => other?,
        }
        at = next;
    }
    Ok(())
}

/// Says that single places of `range` will be read: nothing around them is to be read along.
///
/// # Errors
/// If the system refuses.
///
/// # Panics
/// If the range is not inside the mapping.
pub fn expect_scattered(mapping: &Mapping, range: Range<usize>) -> io::Result<()> {
    advise(mapping, &range, libc::MADV_RANDOM)
}

/// Keeps `range` of the mapping in memory until it is unlocked. It should have been populated: what is missing is
/// read here.
///
/// # Errors
/// If the system refuses: usually `RLIMIT_MEMLOCK`.
///
/// # Panics
/// If the range is not inside the mapping.
pub fn lock(mapping: &Mapping, range: Range<usize>) -> io::Result<()> {
    let (address, len) = pages(mapping, &range);
    // SAFETY: locking pages changes no byte; the range lies in a mapping that lives at least as long as this call.
    #[expect(unsafe_code, reason = "a system call")]
    let result = unsafe { libc::mlock(address, len) };
    check(result)
}

/// Undoes [`lock`]. Ranges that share a page with the end of this one are unlocked there too.
///
/// # Errors
/// If the system refuses.
///
/// # Panics
/// If the range is not inside the mapping.
pub fn unlock(mapping: &Mapping, range: Range<usize>) -> io::Result<()> {
    let (address, len) = pages(mapping, &range);
    // SAFETY: as for `lock`.
    #[expect(unsafe_code, reason = "a system call")]
    let result = unsafe { libc::munlock(address, len) };
    check(result)
}

/// Gives the memory of `range` back: unlocks it, takes it out of our page tables and out of the page cache. The
/// next access reads the file again. Of a built-in model only the page tables are cleared.
///
/// # Errors
/// If the system refuses.
///
/// # Panics
/// If the range is not inside the mapping.
pub fn drop_pages(mapping: &Mapping, range: Range<usize>) -> io::Result<()> {
    unlock(mapping, range.clone())?;
    advise(mapping, &range, libc::MADV_DONTNEED)?;
    match mapping.file() {
        Some(file) => drop_cached(file, range.start as u64..range.end as u64),
        None => Ok(()),
    }
}

/// Asks the kernel to forget `range` of a file that it has cached. Pages that somebody has mapped or locked stay.
///
/// # Errors
/// If the system refuses.
pub fn drop_cached(file: &impl AsRawFd, range: Range<u64>) -> io::Result<()> {
    let offset = |value: u64| libc::off_t::try_from(value).unwrap_or(libc::off_t::MAX);
    let len = offset(range.end.saturating_sub(range.start));
    // SAFETY: an advice about the page cache; it changes no byte of any program.
    #[expect(unsafe_code, reason = "a system call")]
    let result = unsafe {
        libc::posix_fadvise(file.as_raw_fd(), offset(range.start), len, libc::POSIX_FADV_DONTNEED)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result)) }
}

/// Bytes of `range` that lie in memory, in whole pages.
///
/// Of a file that we neither own nor may write, the kernel calls every page resident: see
/// [`residency_is_told`].
///
/// # Errors
/// If the system refuses.
///
/// # Panics
/// If the range is not inside the mapping.
pub fn resident_bytes(mapping: &Mapping, range: Range<usize>) -> io::Result<u64> {
    let (address, len) = pages(mapping, &range);
    let mut states = vec![0_u8; len / page_bytes()];
    // SAFETY: `states` has a byte for each page of the range.
    #[expect(unsafe_code, reason = "a system call")]
    let result = unsafe { libc::mincore(address, len, states.as_mut_ptr()) };
    check(result)?;
    let resident = states.iter().filter(|&&state| state & 1 == 1).count();
    Ok(resident as u64 * page_bytes() as u64)
}

/// Whether [`resident_bytes`] tells the truth about a file: its owner and the superuser are told.
pub fn residency_is_told(mapping: &Mapping) -> bool {
    use std::os::unix::fs::MetadataExt;
    let Some(Ok(metadata)) = mapping.file().map(std::fs::File::metadata) else { return false };
    // SAFETY: reads the identity of the process; it cannot fail.
    #[expect(unsafe_code, reason = "a system call")]
    let user = unsafe { libc::geteuid() };
    user == 0 || user == metadata.uid()
}

fn advise(mapping: &Mapping, range: &Range<usize>, advice: libc::c_int) -> io::Result<()> {
    let (address, len) = pages(mapping, range);
    // SAFETY: the advices given here read pages in, drop clean pages of a read-only file mapping, which come back
    // with the same bytes, or change what is read along: no byte that a program can see changes.
    #[expect(unsafe_code, reason = "a system call")]
    let result = unsafe { libc::madvise(address, len, advice) };
    check(result)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Empty memory straight from the kernel, page aligned. Dropping it gives it back at once, locked or not.
#[derive(Debug)]
pub struct Pages {
    start: NonNull<u8>,
    len: usize,
    locked: bool,
}

// SAFETY: the memory belongs to the value alone, as that of a `Box<[u8]>` does.
#[expect(unsafe_code, reason = "owned memory may change its thread")]
unsafe impl Send for Pages {}
// SAFETY: shared references only read.
#[expect(unsafe_code, reason = "as for a slice")]
unsafe impl Sync for Pages {}

impl Pages {
    /// At least `bytes`, rounded up to whole pages; not touched yet.
    ///
    /// # Errors
    /// If the system has no more, or an address space limit forbids it.
    pub fn new(bytes: usize) -> io::Result<Pages> {
        let len = Pages::rounded(bytes);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        #[expect(unsafe_code, reason = "a system call")]
        let address = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) };
        match NonNull::new(address.cast::<u8>()) {
            Some(start) if address != libc::MAP_FAILED => Ok(Pages { start, len, locked: false }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// What [`new`](Pages::new) makes of `bytes`.
    pub fn rounded(bytes: usize) -> usize {
        bytes.max(1).next_multiple_of(page_bytes())
    }

    /// Touches all pages and keeps them from being swapped.
    ///
    /// # Errors
    /// If the system refuses; the memory is good all the same.
    pub fn lock(&mut self) -> io::Result<()> {
        // SAFETY: the range is this value's own mapping.
        #[expect(unsafe_code, reason = "a system call")]
        let result = unsafe { libc::mlock(self.start.as_ptr().cast(), self.len) };
        check(result)?;
        self.locked = true;
        Ok(())
    }

    /// Whether [`lock`](Pages::lock) succeeded.
    pub fn is_locked(&self) -> bool {
        self.locked
    }

    /// Bytes of the memory.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: there is at least a page.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of it.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping has `len` readable bytes, which are zero where nobody wrote, and lives as long as
        // `self`; writing needs `&mut self`.
        #[expect(unsafe_code, reason = "memory from the kernel as a slice")]
        unsafe {
            std::slice::from_raw_parts(self.start.as_ptr(), self.len)
        }
    }

    /// All of it, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `bytes`, and nobody else has a reference.
        #[expect(unsafe_code, reason = "memory from the kernel as a slice")]
        unsafe {
            std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len)
        }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, made in `new`, and nobody has a reference any more. Unmapping
        // also unlocks. It cannot fail for such a range.
        #[expect(unsafe_code, reason = "a system call")]
        unsafe {
            libc::munmap(self.start.as_ptr().cast(), self.len);
        }
    }
}

/// A mapping watched by [`guard`]: as long as this lives, an access to a page that the file no longer has reads
/// zeros and is remembered, instead of killing the process (SIGBUS).
#[derive(Debug)]
pub struct Guard {
    place: &'static Place,
}

impl Guard {
    /// Whether bytes of the mapping were lost: nothing computed from them since then is worth anything, and the
    /// mapping reads as zeros from now on.
    pub fn is_damaged(&self) -> bool {
        self.place.damaged.load(Ordering::SeqCst)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.place.end.store(0, Ordering::SeqCst);
        self.place.start.store(0, Ordering::SeqCst);
        self.place.damaged.store(false, Ordering::SeqCst);
        self.place.taken.store(false, Ordering::SeqCst);
    }
}

/// A guarded range, as the signal handler reads it.
#[derive(Debug)]
struct Place {
    taken: AtomicBool,
    start: AtomicUsize,
    end: AtomicUsize,
    damaged: AtomicBool,
}

/// Mappings that can be guarded at once; a further one is merely not guarded.
const PLACES: usize = 8;

static GUARDED: [Place; PLACES] = [const {
    Place {
        taken: AtomicBool::new(false),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        damaged: AtomicBool::new(false),
    }
}; PLACES];

/// What SIGBUS did before us, for faults that are not ours.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// Guards a mapped file against being cut, and against read errors, under our feet.
///
/// `None` for a built-in model, which needs none, if too many are guarded, or if the system refuses the handler.
/// The guard must be dropped before the mapping.
pub fn guard(mapping: &Mapping) -> Option<Guard> {
    mapping.file()?;
    install_handler()?;
    let place = GUARDED.iter().find(|place| !place.taken.swap(true, Ordering::SeqCst))?;
    let (address, len) = pages(mapping, &(0..mapping.bytes().len()));
    place.start.store(address.addr(), Ordering::SeqCst);
    place.end.store(address.addr() + len, Ordering::SeqCst);
    Some(Guard { place })
}

fn install_handler() -> Option<()> {
    static INSTALLED: OnceLock<bool> = OnceLock::new();
    let installed = *INSTALLED.get_or_init(|| {
        // SAFETY: all-zero is a valid `sigaction`; the pointers are to live values; the handler below keeps to
        // what a handler of a synchronous fault may do. `BEFORE` is set before the handler can run.
        #[expect(unsafe_code, reason = "installing a signal handler")]
        unsafe {
            let mut before: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut before) != 0 {
                return false;
            }
            if BEFORE.set(before).is_err() {
                return false;
            }
            let mut ours: libc::sigaction = std::mem::zeroed();
            ours.sa_sigaction = on_bus_error as *const () as usize;
            ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigemptyset(&mut ours.sa_mask);
            libc::sigaction(libc::SIGBUS, &ours, std::ptr::null_mut()) == 0
        }
    });
    installed.then_some(())
}

/// Runs on the thread whose access failed. For a guarded mapping it puts zero pages in the place of all of it, so
/// that the access succeeds when it is tried again; for any other address it restores what was before, and the
/// access fails again into that.
extern "C" fn on_bus_error(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes a valid `siginfo_t` to a handler with SA_SIGINFO; for SIGBUS it has an address.
    #[expect(unsafe_code, reason = "the kernel's description of the fault")]
    let address = unsafe { (*info).si_addr() }.addr();
    let place = GUARDED.iter().find(|place| {
        let (start, end) = (place.start.load(Ordering::SeqCst), place.end.load(Ordering::SeqCst));
        (start..end).contains(&address)
    });
    if let Some(place) = place
        && replace_by_zeros(place)
    {
        return;
    }
    if let Some(before) = BEFORE.get() {
        // SAFETY: restores an action that the system gave us; async-signal-safe.
        #[expect(unsafe_code, reason = "a system call")]
        unsafe {
            libc::sigaction(libc::SIGBUS, before, std::ptr::null_mut());
        }
    }
}

fn replace_by_zeros(place: &Place) -> bool {
    place.damaged.store(true, Ordering::SeqCst);
    let (start, end) = (place.start.load(Ordering::SeqCst), place.end.load(Ordering::SeqCst));
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: the range is exactly the pages of a read-only file mapping that its `Guard` keeps registered while it
    // is mapped; every byte stays readable, as a file that somebody else writes to would change it too. `mmap` is a
    // plain system call: it takes no lock of this process and allocates nothing. `errno` is the interrupted code's.
    #[expect(unsafe_code, reason = "the mapping is replaced in place")]
    unsafe {
        let errno = libc::__errno_location();
        let saved = *errno;
        let address = std::ptr::without_provenance_mut(start);
        let result = libc::mmap(address, end - start, libc::PROT_READ, flags, -1, 0);
        *errno = saved;
        result != libc::MAP_FAILED
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use super::*;

    fn mapped(dir: &tempfile::TempDir, len: usize) -> (Mapping, File) {
        let path = dir.path().join("model.gguf");
        let mut file = File::create(&path).expect("a file");
        let bytes: Vec<u8> = (0..len).map(|n| (n % 251) as u8 + 1).collect();
        file.write_all(&bytes).expect("room for it");
        (Mapping::open(&path).expect("a regular file"), file)
    }

    #[test]
    fn ranges_are_locked_read_in_and_dropped_without_changing_a_byte() {
        let dir = tempfile::tempdir().expect("a directory");
        let len = 3 * page_bytes() + 100;
        let (mapping, file) = mapped(&dir, len);
        file.sync_all().expect("on disk");
        let before = mapping.bytes().to_vec();
        populate(&mapping, 10..len - 5).expect("the file is there");
        assert_eq!(resident_bytes(&mapping, 0..len).expect("mincore"), 4 * page_bytes() as u64);
        // A machine that forbids locking is no fault of ours.
        let locked = lock(&mapping, 0..len).is_ok();
        drop_pages(&mapping, 0..len).expect("advice");
        assert_eq!(mapping.bytes(), before, "locked before: {locked}");
        assert!(residency_is_told(&mapping));
    }

    #[test]
    fn populating_a_cut_file_is_an_error() {
        let dir = tempfile::tempdir().expect("a directory");
        let len = 8 * page_bytes();
        let (mapping, file) = mapped(&dir, len);
        file.set_len(page_bytes() as u64).expect("cut");
        assert!(populate(&mapping, 0..len).is_err());
    }

    #[test]
    fn pages_are_aligned_writable_and_zero() {
        let mut pages = Pages::new(3 * page_bytes() + 1).expect("memory");
        assert_eq!(pages.len(), 4 * page_bytes());
        assert!(pages.bytes().as_ptr().addr().is_multiple_of(page_bytes()));
        assert!(pages.bytes().iter().all(|&byte| byte == 0));
        *pages.bytes_mut().last_mut().expect("not empty") = 7;
        assert_eq!(pages.bytes().last(), Some(&7));
        let locked = pages.lock().is_ok();
        assert_eq!(pages.is_locked(), locked);
        assert!(Pages::new(usize::MAX >> 2).is_err());
    }

    #[test]
    fn a_guarded_mapping_survives_being_cut() {
        let dir = tempfile::tempdir().expect("a directory");
        let len = 8 * page_bytes();
        let (mapping, file) = mapped(&dir, len);
        let guarded = guard(&mapping).expect("a handler");
        assert_eq!(mapping.bytes()[5 * page_bytes()], mapping.bytes()[5 * page_bytes()]);
        assert!(!guarded.is_damaged());
        file.set_len(page_bytes() as u64).expect("cut");
        let sum: u64 = mapping.bytes().iter().map(|&byte| u64::from(byte)).sum();
        assert!(guarded.is_damaged());
        assert!(sum < 251 * page_bytes() as u64, "{sum}");
        drop(guarded);
        let (again, _file) = mapped(&dir, len);
        assert!(!guard(&again).expect("a place is free again").is_damaged());
    }
}
