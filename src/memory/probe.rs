//! What the kernel says about memory: `/proc`, pressure stalls, cgroups of both versions, the processor's
//! temperature. The only place that reads them.
//!
//! Files are opened once and read into one buffer, so sampling allocates nothing even when memory is gone.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};

use super::board::{self, Board};
use crate::units::Bytes;

/// Looks at memory; the watch calls it again and again.
pub trait MemoryProbe: Send {
    /// Memory now.
    ///
    /// # Errors
    /// If the kernel's own figures cannot be read. What is optional (pressure, cgroups) is left out instead.
    fn sample(&mut self) -> io::Result<MemorySample>;
}

/// Memory at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MemorySample {
    /// Physical memory, or the smallest limit between our cgroup and the root.
    pub total: Bytes,
    /// What the kernel calls available, or what the tightest cgroup leaves (reclaimable file pages included).
    pub available: Bytes,
    /// Free swap; never counted on.
    pub swap_free: Bytes,
    /// All swap.
    pub swap_total: Bytes,
    /// Pages of files that this process has mapped in.
    pub own_file: Bytes,
    /// Anonymous memory of this process.
    pub own_anonymous: Bytes,
    /// Memory this process has locked.
    pub own_locked: Bytes,
    /// Stalls on memory; `None` where the kernel does not count them (Raspberry Pi OS without `psi=1`).
    pub pressure: Option<Pressure>,
    /// Pages of files in memory that the kernel could drop.
    pub file_cache: Bytes,
    /// What freeing memory has cost since start.
    pub reclaim: Reclaim,
    /// Memory that compressed swap takes.
    pub zram: Bytes,
    /// Tasks killed for memory since start: of our cgroups if they count them, else of the machine.
    pub kills: u64,
    /// The processor's temperature, where it has a sensor.
    pub temperature_celsius: Option<f32>,
    /// The firmware's state: bits 0 to 3 are under-voltage, clock capped, throttled, soft limit; 16 to 19 the same
    /// since start. `None` where it does not say.
    pub throttled: Option<u32>,
    /// The clock as a share of the highest.
    pub clock_ratio: Option<f32>,
}

/// Counters of pages and events since start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reclaim {
    /// Pages of files that were read again soon after they had been dropped.
    pub refaults: u64,
    /// Allocations that had to wait for pages to be freed, and the pages looked at for it.
    pub stalls: u64,
    /// Pages read back from swap.
    pub swapped_in: u64,
    /// Pages written to swap.
    pub swapped_out: u64,
}

/// Time that tasks spent waiting for memory.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pressure {
    /// At least one task waited.
    pub some: Stall,
    /// All tasks waited.
    pub full: Stall,
}

/// One line of a pressure file.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stall {
    /// Percent of the last ten seconds.
    pub avg10: f32,
    /// Microseconds since start.
    pub total_us: u64,
}

/// The real kernel, or a directory tree that looks like it.
#[derive(Debug)]
pub struct ProcProbe {
    meminfo: File,
    status: File,
    pressure: Option<File>,
    vmstat: Option<File>,
    zram: Vec<File>,
    board: Board,
    groups: Vec<Group>,
    buffer: Vec<u8>,
}

/// The files of one cgroup that may limit us.
#[derive(Debug)]
struct Group {
    version: Version,
    limit: File,
    usage: File,
    stat: File,
    /// Where it counts kills, and in version 2 also how often it was at its limit.
    events: Option<File>,
    /// Where version 1 counts how often it was at its limit.
    failures: Option<File>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// Bytes of the read buffer; the longest file (`memory.stat`) has about 3 KB.
const BUFFER_BYTES: usize = 32 * 1024;

impl ProcProbe {
    /// The running kernel.
    ///
    /// # Errors
    /// If `/proc/meminfo` or `/proc/self/status` cannot be opened.
    pub fn new() -> io::Result<ProcProbe> {
        ProcProbe::at(Path::new("/"))
    }

    /// The tree under `root`, which has `proc` and `sys` as the kernel would show them.
    ///
    /// # Errors
    /// As [`ProcProbe::new`].
    pub fn at(root: &Path) -> io::Result<ProcProbe> {
        Ok(ProcProbe {
            meminfo: open(root, "proc/meminfo")?,
            status: open(root, "proc/self/status")?,
            pressure: open(root, "proc/pressure/memory").ok(),
            vmstat: open(root, "proc/vmstat").ok(),
            zram: board::zram(root),
            board: Board::find(root),
            groups: find_groups(root),
            buffer: vec![0; BUFFER_BYTES],
        })
    }

    /// Bytes of a page of memory: 4 KiB, or 16 KiB on a Raspberry Pi 5.
    pub fn page_bytes() -> Bytes {
        Bytes(rustix::param::page_size() as u64)
    }

    /// How much this process may lock; `None` is no limit.
    pub fn lockable() -> Option<Bytes> {
        rustix::process::getrlimit(rustix::process::Resource::Memlock).current.map(Bytes)
    }
}

impl MemoryProbe for ProcProbe {
    fn sample(&mut self) -> io::Result<MemorySample> {
        let mut sample = MemorySample::default();
        let text = read(&self.meminfo, &mut self.buffer)?;
        sample.total = kib(text, "MemTotal:").ok_or_else(|| missing("meminfo", "MemTotal"))?;
        sample.available =
            kib(text, "MemAvailable:").ok_or_else(|| missing("meminfo", "MemAvailable"))?;
        sample.swap_free = kib(text, "SwapFree:").unwrap_or_default();
        sample.swap_total = kib(text, "SwapTotal:").unwrap_or_default();
        let list = |key| kib(text, key).unwrap_or_default();
        sample.file_cache = list("Active(file):").saturating_add(list("Inactive(file):"));

        let text = read(&self.status, &mut self.buffer)?;
        sample.own_file = kib(text, "RssFile:").unwrap_or_default();
        sample.own_anonymous = kib(text, "RssAnon:").unwrap_or_default();
        sample.own_locked = kib(text, "VmLck:").unwrap_or_default();

        let memory_total = sample.total;
        for group in &self.groups {
            if let Some((limit, left)) = group.left(memory_total, &mut self.buffer) {
                sample.total = sample.total.min(limit);
                sample.available = sample.available.min(left);
            }
        }
        sample.pressure = self.pressure.as_ref().and_then(|file| {
            let text = read(file, &mut self.buffer).ok()?;
            Some(Pressure { some: stall(text, "some")?, full: stall(text, "full")? })
        });
        let mut kills = None;
        if let Some(text) = self.vmstat.as_ref().and_then(|f| read(f, &mut self.buffer).ok()) {
            sample.reclaim = Reclaim::parse(text);
            kills = number(text, "oom_kill");
        }
        // Ours comes first; a limit further up has its own events, but those are not all about us.
        if let Some(events) = self.groups.first().and_then(|group| group.events(&mut self.buffer)) {
            kills = events.kills.or(kills);
            sample.reclaim.stalls = sample.reclaim.stalls.saturating_add(events.at_limit);
        }
        sample.kills = kills.unwrap_or(0);
        for file in &self.zram {
            let text = read(file, &mut self.buffer).unwrap_or_default();
            let used = text.split_whitespace().nth(2).and_then(|word| word.parse().ok());
            sample.zram = sample.zram.saturating_add(Bytes(used.unwrap_or(0)));
        }
        self.board.sample(&mut sample, &mut self.buffer);
        Ok(sample)
    }
}

impl Group {
    fn open(directory: &Path, version: Version) -> Option<Group> {
        let (limit, usage, events) = match version {
            Version::One => {
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.oom_control")
            }
            Version::Two => ("memory.max", "memory.current", "memory.events"),
        };
        Some(Group {
            version,
            limit: File::open(directory.join(limit)).ok()?,
            usage: File::open(directory.join(usage)).ok()?,
            stat: File::open(directory.join("memory.stat")).ok()?,
            events: File::open(directory.join(events)).ok(),
            failures: File::open(directory.join("memory.failcnt")).ok(),
        })
    }

    /// The limit, and what it leaves: limit − usage + reclaimable file pages. `None` without a limit; version 1
    /// writes "unlimited" as a huge number that depends on the page size, so anything from the physical memory
    /// upwards is none.
    fn left(&self, memory_total: Bytes, buffer: &mut [u8]) -> Option<(Bytes, Bytes)> {
        let limit: u64 = read(&self.limit, buffer).ok()?.trim().parse().ok()?;
        if limit >= memory_total.0 {
            return None;
        }
        let usage: u64 = read(&self.usage, buffer).ok()?.trim().parse().ok()?;
        let text = read(&self.stat, buffer).ok()?;
        let (active, inactive) = match self.version {
            Version::One => ("total_active_file", "total_inactive_file"),
            Version::Two => ("active_file", "inactive_file"),
        };
        let file_pages = number(text, active).unwrap_or(0) + number(text, inactive).unwrap_or(0);
        // The pages are part of the usage: what is left can be at most the limit.
        let left = limit.saturating_sub(usage.saturating_sub(file_pages));
        Some((Bytes(limit), Bytes(left)))
    }
}

impl Group {
    /// Kills for memory in this cgroup and below, and how often it was at its limit and had to free pages.
    fn events(&self, buffer: &mut [u8]) -> Option<Events> {
        let text = read(self.events.as_ref()?, buffer).ok()?;
        let kills = number(text, "oom_kill");
        let mut at_limit = number(text, "max").unwrap_or(0) + number(text, "high").unwrap_or(0);
        if let Some(text) = self.failures.as_ref().and_then(|file| read(file, buffer).ok()) {
            at_limit = at_limit.saturating_add(text.trim().parse().unwrap_or(0));
        }
        Some(Events { kills, at_limit })
    }
}

/// What happened in a cgroup since it was made.
struct Events {
    kills: Option<u64>,
    at_limit: u64,
}

impl Reclaim {
    /// `/proc/vmstat`: a name and a number a line.
    fn parse(text: &str) -> Reclaim {
        let mut reclaim = Reclaim::default();
        for line in text.lines() {
            let Some((name, value)) = line.split_once(' ') else { continue };
            let counter = match name {
                "workingset_refault_file" => &mut reclaim.refaults,
                "pgscan_direct" => &mut reclaim.stalls,
                name if name.starts_with("allocstall") => &mut reclaim.stalls,
                "pswpin" => &mut reclaim.swapped_in,
                "pswpout" => &mut reclaim.swapped_out,
                _ => continue,
            };
            *counter = counter.saturating_add(value.trim().parse().unwrap_or(0));
        }
        reclaim
    }
}

/// The memory cgroups from ours up to the root, of both versions.
fn find_groups(root: &Path) -> Vec<Group> {
    let read = |path| fs::read_to_string(root.join(path)).unwrap_or_default();
    let (memberships, mounts) = (read("proc/self/cgroup"), read("proc/self/mountinfo"));
    let mut groups = Vec::new();
    for line in memberships.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let version = match controllers {
            "" => Version::Two,
            list if list.split(',').any(|name| name == "memory") => Version::One,
            _ => continue,
        };
        for mount in mounts.lines().filter_map(|line| Mount::parse(line, version)) {
            let top = root.join(mount.point.trim_start_matches('/'));
            for directory in ancestors(&top, mount.inside(path)) {
                groups.extend(Group::open(&directory, version));
            }
        }
    }
    groups
}

/// A mounted cgroup tree.
struct Mount<'a> {
    /// Which directory of the tree is mounted.
    subtree: &'a str,
    point: &'a str,
}

impl<'a> Mount<'a> {
    /// One line of `mountinfo`: `id parent major:minor subtree point options… - type source options`.
    fn parse(line: &'a str, version: Version) -> Option<Mount<'a>> {
        let (left, right) = line.split_once(" - ")?;
        let mut right = right.split(' ');
        let (kind, options) = (right.next()?, right.nth(1)?);
        let wanted = match version {
            Version::One => kind == "cgroup" && options.split(',').any(|name| name == "memory"),
            Version::Two => kind == "cgroup2",
        };
        let mut left = left.split(' ').skip(3);
        wanted.then_some(Mount { subtree: left.next()?, point: left.next()? })
    }

    /// Our cgroup relative to the mount point; empty if the mount does not show it, then the mount point
    /// itself is the closest limit we can see.
    fn inside<'p>(&self, path: &'p str) -> &'p str {
        let relative = path.strip_prefix(self.subtree).unwrap_or("");
        let plain = Path::new(relative.trim_start_matches('/'))
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
        if plain { relative } else { "" }
    }
}

/// `top/relative` and every directory above it, down to `top` itself.
fn ancestors(top: &Path, relative: &str) -> Vec<PathBuf> {
    let below = top.join(relative.trim_start_matches('/'));
    below.ancestors().take_while(|path| path.starts_with(top)).map(Path::to_path_buf).collect()
}

pub(super) fn open(root: &Path, path: &str) -> io::Result<File> {
    File::open(root.join(path))
        .map_err(|error| io::Error::new(error.kind(), format!("/{path}: {error}")))
}

/// Reads a kept file from its beginning; the kernel makes the text anew each time.
pub(super) fn read<'b>(file: &File, buffer: &'b mut [u8]) -> io::Result<&'b str> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    str::from_utf8(&buffer[..filled])
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// The value of a line `Key:   123 kB`.
fn kib(text: &str, key: &str) -> Option<Bytes> {
    number(text, key).map(|kib| Bytes(kib.saturating_mul(1024)))
}

/// The number after `key` at the beginning of a line.
fn number(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some(key)).then(|| words.next()?.parse().ok()).flatten()
    })
}

/// A line `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`.
fn stall(text: &str, kind: &str) -> Option<Stall> {
    let line = text.lines().find(|line| line.split(' ').next() == Some(kind))?;
    let value = |key| line.split(' ').find_map(|word| word.strip_prefix(key));
    Some(Stall { avg10: value("avg10=")?.parse().ok()?, total_us: value("total=")?.parse().ok()? })
}

fn missing(file: &str, key: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{file} has no {key}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str = "MemTotal:       8000000 kB\nMemFree:         100000 kB\n\
        MemAvailable:   6000000 kB\nSwapTotal:       200000 kB\nSwapFree:        150000 kB\n";
    const STATUS: &str =
        "Name:\tscoutd\nVmLck:\t      64 kB\nRssAnon:\t    1000 kB\nRssFile:\t    2000 kB\n";
    const V2_MOUNT: &str =
        "41 31 0:38 / /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
    const V1_MOUNT: &str =
        "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n";

    /// A directory tree as the kernel would show it.
    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new() -> Tree {
            let tree = Tree(tempfile::tempdir().expect("a temporary directory can be made"));
            tree.file("proc/meminfo", MEMINFO);
            tree.file("proc/self/status", STATUS);
            tree
        }

        fn file(&self, path: &str, text: &str) -> &Tree {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().expect("the path has a directory"))
                .expect("the directory can be made");
            fs::write(path, text).expect("the file can be written");
            self
        }

        fn v2(&self, group: &str, limit: &str, current: u64, file_pages: u64) -> &Tree {
            let stat =
                format!("anon 5\nfile 7\ninactive_file {file_pages}\nactive_file {file_pages}\n");
            self.file(&format!("sys/fs/cgroup{group}/memory.max"), limit)
                .file(&format!("sys/fs/cgroup{group}/memory.current"), &current.to_string())
                .file(&format!("sys/fs/cgroup{group}/memory.stat"), &stat)
        }

        fn v1(&self, group: &str, limit: u64, usage: u64) -> &Tree {
            let stat = "active_file 1\ntotal_inactive_file 300\ntotal_active_file 200\n";
            let directory = format!("sys/fs/cgroup/memory{group}");
            self.file(&format!("{directory}/memory.limit_in_bytes"), &limit.to_string())
                .file(&format!("{directory}/memory.usage_in_bytes"), &usage.to_string())
                .file(&format!("{directory}/memory.stat"), stat)
        }

        fn sample(&self) -> MemorySample {
            ProcProbe::at(self.0.path())
                .and_then(|mut probe| probe.sample())
                .expect("the tree has what is required")
        }
    }

    #[test]
    fn a_plain_machine_without_pressure_or_cgroups() {
        let sample = Tree::new().sample();
        assert_eq!(
            sample,
            MemorySample {
                total: Bytes(8_000_000 << 10),
                available: Bytes(6_000_000 << 10),
                swap_free: Bytes(150_000 << 10),
                swap_total: Bytes(200_000 << 10),
                own_file: Bytes(2000 << 10),
                own_anonymous: Bytes(1000 << 10),
                own_locked: Bytes(64 << 10),
                ..MemorySample::default()
            }
        );
    }

    #[test]
    fn pressure_and_temperature_are_read() {
        let tree = Tree::new();
        tree.file(
            "proc/pressure/memory",
            "some avg10=1.53 avg60=0.20 avg300=0.00 total=123456\n\
             full avg10=0.25 avg60=0.00 avg300=0.00 total=99\n",
        )
        .file("sys/class/thermal/thermal_zone0/temp", "56100\n");
        let sample = tree.sample();
        assert_eq!(
            sample.pressure,
            Some(Pressure {
                some: Stall { avg10: 1.53, total_us: 123_456 },
                full: Stall { avg10: 0.25, total_us: 99 },
            })
        );
        assert_eq!(sample.temperature_celsius, Some(56.1));
    }

    #[test]
    fn reclaim_swap_and_kills_are_counted() {
        let tree = Tree::new();
        let meminfo = format!("{MEMINFO}Active(file): 300 kB\nInactive(file): 200 kB\n");
        tree.file("proc/meminfo", &meminfo)
            .file(
                "proc/vmstat",
                "nr_free_pages 1\nworkingset_refault_file 7\nworkingset_refault_anon 99\npswpin 3\n\
                 pswpout 4\nallocstall_normal 10\nallocstall_movable 20\npgscan_direct 5\n\
                 pgscan_direct_throttle 1000\noom_kill 2\n",
            )
            .file("sys/block/zram0/mm_stat", "  4096  1024  8192 0 0 0 0\n");
        let sample = tree.sample();
        let expected = Reclaim { refaults: 7, stalls: 35, swapped_in: 3, swapped_out: 4 };
        assert_eq!((sample.reclaim, sample.kills), (expected, 2));
        assert_eq!((sample.file_cache, sample.zram), (Bytes(500 << 10), Bytes(8192)));
        // Our own cgroup counts before the machine does.
        tree.file("proc/self/cgroup", "0::/house\n")
            .file("proc/self/mountinfo", V2_MOUNT)
            .v2("/house", "max\n", 10, 1)
            .file("sys/fs/cgroup/house/memory.events", "low 0\nhigh 3\nmax 1\noom 1\noom_kill 1\n");
        let sample = tree.sample();
        assert_eq!((sample.kills, sample.reclaim.stalls), (1, 35 + 3 + 1));
    }

    #[test]
    fn the_board_tells_heat_throttling_and_clock() {
        let tree = Tree::new();
        tree.file(
            "sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled",
            "50005\n",
        )
        .file("sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq", "1800000\n")
        .file("sys/devices/system/cpu/cpufreq/policy0/cpuinfo_max_freq", "2400000\n");
        let sample = tree.sample();
        assert_eq!((sample.throttled, sample.clock_ratio), (Some(0x50005), Some(0.75)));
    }

    #[test]
    fn v2_takes_the_tightest_limit_up_to_the_root() {
        let tree = Tree::new();
        tree.file("proc/self/cgroup", "0::/system.slice/scoutd.service\n")
            .file("proc/self/mountinfo", V2_MOUNT)
            .v2("/system.slice/scoutd.service", "max\n", 10, 1)
            .v2("/system.slice", "1000000\n", 700_000, 100_000);
        let sample = tree.sample();
        assert_eq!(sample.total, Bytes(1_000_000));
        assert_eq!(sample.available, Bytes(1_000_000 - 700_000 + 200_000));
    }

    #[test]
    fn v1_unlimited_is_a_huge_number() {
        let tree = Tree::new();
        tree.file("proc/self/cgroup", "5:cpu:/x\n4:memory:/house/scoutd\n0::/\n")
            .file("proc/self/mountinfo", V1_MOUNT)
            .v1("", 9_223_372_036_854_771_712, 1)
            .v1("/house", 50_000, 20_000)
            .v1("/house/scoutd", 9_223_372_036_854_771_712, 1);
        let sample = tree.sample();
        assert_eq!((sample.total, sample.available), (Bytes(50_000), Bytes(30_500)));
    }

    #[test]
    fn a_container_sees_its_own_cgroup_at_the_mount_point() {
        let tree = Tree::new();
        let mount = "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n";
        tree.file("proc/self/cgroup", "4:memory:/docker/abc\n")
            .file("proc/self/mountinfo", mount)
            .v1("", 70_000, 10_000);
        assert_eq!(tree.sample().available, Bytes(60_500));
    }

    #[test]
    fn paths_outside_the_mount_fall_back_to_the_mount_point() {
        let tree = Tree::new();
        tree.file("proc/self/cgroup", "0::/../../other\n")
            .file("proc/self/mountinfo", V2_MOUNT)
            .v2("", "60000\n", 10_000, 0);
        assert_eq!(tree.sample().available, Bytes(50_000));
    }

    #[test]
    fn a_kernel_without_available_is_an_error() {
        let tree = Tree::new();
        tree.file("proc/meminfo", "MemTotal: 10 kB\n");
        let error = ProcProbe::at(tree.0.path())
            .and_then(|mut probe| probe.sample())
            .expect_err("MemAvailable is missing");
        assert_eq!(error.to_string(), "/proc/meminfo has no MemAvailable");
    }

    #[test]
    fn this_machine_can_be_sampled() {
        let mut probe = ProcProbe::new().expect("Linux has /proc");
        let sample = probe.sample().expect("Linux counts memory");
        assert!(sample.available <= sample.total);
        assert!(sample.own_anonymous > Bytes(0));
        assert!(ProcProbe::page_bytes().0.is_power_of_two());
    }
}
