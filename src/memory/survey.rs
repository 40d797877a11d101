//! What this system offers for keeping memory, disk and clock: each thing found, what was expected, and what follows
//! from the difference. For `doctor`, and to say once at start what is missing.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{MemoryProbe, ProcProbe};
use crate::units::Bytes;

/// One thing looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What.
    pub name: &'static str,
    /// How it is.
    pub found: String,
    /// How it should be.
    pub expected: &'static str,
    /// How much it matters.
    pub verdict: Verdict,
    /// What follows from it, and what to change; empty if all is well.
    pub consequence: String,
}

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// As expected, or of no consequence.
    Good,
    /// Works, but something is lost.
    Note,
    /// Answers will be wrong, slow or broken off.
    Bad,
}

impl Verdict {
    /// The word in the table.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Good => "ok",
            Verdict::Note => "note",
            Verdict::Bad => "bad",
        }
    }
}

/// Where Raspberry Pi OS keeps the kernel's command line.
const CMDLINE: &str = "/boot/firmware/cmdline.txt";

/// Looks at the system under `root`, and at the disk of `folder`.
pub fn survey(root: &Path, folder: &Path) -> Vec<Finding> {
    let mut findings = memory_rows(root);
    findings.extend(disk_rows(root, folder));
    findings.extend(board_rows(root));
    findings
}

/// What the watch of memory has to do without: one line each, with what to change.
pub fn missing(root: &Path) -> Vec<String> {
    [cgroup(root), stalls(root)]
        .into_iter()
        .filter(|finding| finding.verdict > Verdict::Good)
        .map(|finding| format!("{}: {}; {}", finding.name, finding.found, finding.consequence))
        .collect()
}

fn memory_rows(root: &Path) -> Vec<Finding> {
    let mut rows = Vec::new();
    match ProcProbe::at(root).and_then(|mut probe| probe.sample()) {
        Ok(sample) => rows.push(good(
            "memory",
            format!("{} of {} available", sample.available, sample.total),
            "any",
        )),
        Err(error) => rows.push(Finding {
            name: "memory",
            found: error.to_string(),
            expected: "readable",
            verdict: Verdict::Bad,
            consequence: "nothing can be promised, so nothing is answered".to_owned(),
        }),
    }
    rows.extend([cgroup(root), stalls(root), bell(root), page(), lockable(), swap(root)]);
    rows.extend(nodes(root));
    rows
}

/// The memory controller. Raspberry Pi OS boots with it off, and then the service's limits are void without a word.
fn cgroup(root: &Path) -> Finding {
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
    let two =
        read("sys/fs/cgroup/cgroup.controllers").split_whitespace().any(|word| word == "memory");
    let one = read("proc/self/cgroup").lines().any(|line| {
        line.split(':').nth(1).is_some_and(|list| list.split(',').any(|name| name == "memory"))
    });
    match (two, one) {
        (true, _) => good("memory cgroup", "version 2".to_owned(), "on"),
        (_, true) => good("memory cgroup", "version 1".to_owned(), "on"),
        _ => note(
            "memory cgroup",
            "off".to_owned(),
            "on",
            format!(
                "MemoryHigh and MemoryMax do nothing; add cgroup_enable=memory to {CMDLINE} and reboot"
            ),
        ),
    }
}

fn stalls(root: &Path) -> Finding {
    match fs::read_to_string(root.join("proc/pressure/memory")) {
        Ok(text) if text.contains("some avg10=") => {
            good("pressure stalls", "counted".to_owned(), "counted")
        }
        _ => note(
            "pressure stalls",
            "not counted".to_owned(),
            "counted",
            format!(
                "pressure is seen by reclaim and swap alone, later; add psi=1 to {CMDLINE} and reboot"
            ),
        ),
    }
}

/// Whether the kernel would wake the watch. It sleeps a second at most, so little is lost.
fn bell(root: &Path) -> Finding {
    match super::alarm::has_bell(root) {
        true => good("pressure trigger", "granted".to_owned(), "granted"),
        false => good("pressure trigger", "refused, so memory is polled".to_owned(), "granted"),
    }
}

fn page() -> Finding {
    good("page size", ProcProbe::page_bytes().to_string(), "4 or 16 KiB")
}

fn lockable() -> Finding {
    match ProcProbe::lockable() {
        None => good("locked memory", "no limit".to_owned(), "no limit"),
        Some(limit) => note(
            "locked memory",
            format!("at most {limit}"),
            "no limit",
            "weights may leave memory under pressure; LimitMEMLOCK=infinity in the unit, or ulimit -l".to_owned(),
        ),
    }
}

fn swap(root: &Path) -> Finding {
    let text = fs::read_to_string(root.join("proc/swaps")).unwrap_or_default();
    let devices: Vec<String> = text
        .lines()
        .skip(1)
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (name, kib) = (words.next()?, words.nth(1)?.parse::<u64>().ok()?);
            let kind = if name.contains("zram") { ", which lies in memory" } else { "" };
            Some(format!("{name} {}{kind}", Bytes(kib << 10)))
        })
        .collect();
    let found = if devices.is_empty() { "none".to_owned() } else { devices.join(", ") };
    good("swap", found, "never counted on")
}

/// Emulated memory nodes, which spread accesses over the banks of a Raspberry Pi 5.
fn nodes(root: &Path) -> Option<Finding> {
    is_pi_5(root).then(|| {
        let count = entries(&root.join("sys/devices/system/node"))
            .iter()
            .filter(|path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                name.strip_prefix("node").is_some_and(|rest| rest.parse::<u32>().is_ok())
            })
            .count();
        match count {
            0 | 1 => note(
                "memory nodes",
                "1".to_owned(),
                "8, emulated",
                format!("memory is up to 18 % slower; numa=fake=8 in {CMDLINE}, or newer firmware"),
            ),
            count => good("memory nodes", format!("{count}, emulated"), "8, emulated"),
        }
    })
}

fn is_pi_5(root: &Path) -> bool {
    let model = fs::read_to_string(root.join("sys/firmware/devicetree/base/model"));
    model.is_ok_and(|model| model.contains("Raspberry Pi 5") || model.contains("Compute Module 5"))
}

fn disk_rows(root: &Path, folder: &Path) -> Vec<Finding> {
    let mut rows = Vec::new();
    if let Some(device) = device_of(root, folder) {
        let slow = device.starts_with("mmcblk");
        let expected = "NVMe, for models larger than memory";
        rows.push(match slow {
            true => note(
                "disk of the models",
                device,
                expected,
                "models load slowly, and one larger than memory answers 4 to 5 times slower than from NVMe".to_owned(),
            ),
            false => good("disk of the models", device, expected),
        });
    }
    for controller in entries(&root.join("sys/class/nvme")) {
        let speed = fs::read_to_string(controller.join("device/current_link_speed"));
        let Ok(speed) = speed else { continue };
        let speed = speed.trim().to_owned();
        rows.push(match speed.starts_with("2.5") || speed.starts_with("5.0") {
            true => note(
                "NVMe link",
                speed,
                "8.0 GT/s",
                "half the speed of the link: Scout on 16 GB writes about 0.15 tokens/s instead of 0.27; \
                 dtparam=pciex1_gen=3 in /boot/firmware/config.txt (not certified)"
                    .to_owned(),
            ),
            false => good("NVMe link", speed, "8.0 GT/s"),
        });
    }
    let host = root.join("sys/module/nvme/parameters/max_host_mem_size_mb");
    if let Ok(text) = fs::read_to_string(host)
        && text.trim() == "0"
    {
        rows.push(good(
            "NVMe host memory",
            "off: a drive without memory of its own is slower than its class; measure it"
                .to_owned(),
            "any",
        ));
    }
    rows
}

/// The block device that a folder lies on, by its kernel name.
fn device_of(root: &Path, folder: &Path) -> Option<String> {
    let existing = folder.ancestors().find(|path| path.exists())?;
    let number = fs::metadata(existing).ok()?.dev();
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let link = root.join(format!("sys/dev/block/{major}:{minor}"));
    let device = fs::canonicalize(link).ok()?;
    Some(device.file_name()?.to_string_lossy().into_owned())
}

fn board_rows(root: &Path) -> Vec<Finding> {
    let Ok(sample) = ProcProbe::at(root).and_then(|mut probe| probe.sample()) else {
        return Vec::new();
    };
    let mut rows = Vec::new();
    if let Some(celsius) = sample.temperature_celsius {
        let found = format!("{celsius:.0} °C");
        let (verdict, consequence) = match celsius {
            c if c >= 80.0 => {
                (Verdict::Bad, "the clock is lowered, up to a third of the speed; cool it")
            }
            c if c >= 70.0 => {
                (Verdict::Note, "close to 80 °C, where the clock is lowered; cool it")
            }
            _ => (Verdict::Good, ""),
        };
        let consequence = consequence.to_owned();
        rows.push(Finding {
            name: "temperature",
            found,
            expected: "below 70 °C",
            verdict,
            consequence,
        });
    }
    rows.extend(sample.throttled.map(throttling));
    if let Some(ratio) = sample.clock_ratio {
        rows.push(good(
            "clock",
            format!("{:.0} % of the highest", 100.0 * ratio),
            "100 % under load",
        ));
    }
    rows
}

/// The firmware's bits in words.
fn throttling(bits: u32) -> Finding {
    const WORDS: [(u32, &str); 4] = [
        (0, "under-voltage"),
        (1, "clock capped"),
        (2, "throttled"),
        (3, "soft temperature limit"),
    ];
    let named = |shift: u32| -> Vec<&str> {
        WORDS.iter().filter(|(bit, _)| bits & (1 << (bit + shift)) != 0).map(|(_, w)| *w).collect()
    };
    let (now, since) = (named(0), named(16));
    let (verdict, found) = match (now.is_empty(), since.is_empty()) {
        (false, _) => (Verdict::Bad, format!("now: {}", now.join(", "))),
        (true, false) => (Verdict::Note, format!("since start: {}", since.join(", "))),
        (true, true) => (Verdict::Good, "never".to_owned()),
    };
    let consequence = match verdict {
        Verdict::Good => String::new(),
        _ if bits & 0x1_0001 != 0 => "use the 27 W supply and a short cable".to_owned(),
        _ => "use the active cooler".to_owned(),
    };
    Finding { name: "throttling", found, expected: "never", verdict, consequence }
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

fn good(name: &'static str, found: String, expected: &'static str) -> Finding {
    Finding { name, found, expected, verdict: Verdict::Good, consequence: String::new() }
}

fn note(name: &'static str, found: String, expected: &'static str, consequence: String) -> Finding {
    Finding { name, found, expected, verdict: Verdict::Note, consequence }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new() -> Tree {
            let tree = Tree(tempfile::tempdir().expect("a temporary folder can be made"));
            tree.file("proc/meminfo", "MemTotal: 8000 kB\nMemAvailable: 6000 kB\n")
                .file("proc/self/status", "Name: x\n");
            tree
        }

        fn file(&self, path: &str, text: &str) -> &Tree {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().expect("it has a folder")).expect("it can be made");
            fs::write(path, text).expect("it can be written");
            self
        }

        fn row(&self, name: &str) -> Finding {
            let rows = survey(self.0.path(), self.0.path());
            rows.into_iter().find(|row| row.name == name).expect("the row is there")
        }
    }

    #[test]
    fn a_fresh_raspberry_pi_os_is_told_what_to_add() {
        let tree = Tree::new();
        tree.file("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io pids\n")
            .file("proc/self/cgroup", "0::/\n")
            .file("sys/firmware/devicetree/base/model", "Raspberry Pi 5 Model B Rev 1.1\0");
        let lines = missing(tree.0.path());
        assert_eq!(lines.len(), 2);
        assert!(
            lines[0].contains("cgroup_enable=memory") && lines[1].contains("psi=1"),
            "{lines:?}"
        );
        assert_eq!(tree.row("memory nodes").verdict, Verdict::Note);
        assert_eq!(tree.row("memory").verdict, Verdict::Good);
        assert!(tree.row("pressure trigger").found.contains("polled"));
    }

    #[test]
    fn where_all_is_on_nothing_is_missing() {
        let tree = Tree::new();
        tree.file("sys/fs/cgroup/cgroup.controllers", "cpu memory\n").file(
            "proc/pressure/memory",
            "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
        );
        assert!(missing(tree.0.path()).is_empty());
        let old = Tree::new();
        old.file("proc/self/cgroup", "4:memory:/x\n");
        assert_eq!(old.row("memory cgroup").found, "version 1");
    }

    #[test]
    fn a_slow_link_has_its_price() {
        let tree = Tree::new();
        tree.file("sys/class/nvme/nvme0/device/current_link_speed", "5.0 GT/s PCIe\n");
        let row = tree.row("NVMe link");
        assert_eq!(row.verdict, Verdict::Note);
        assert!(row.consequence.contains("0.15 tokens/s"));
        tree.file("sys/class/nvme/nvme0/device/current_link_speed", "8.0 GT/s PCIe\n");
        assert_eq!(tree.row("NVMe link").verdict, Verdict::Good);
    }

    #[test]
    fn heat_and_throttling_are_told_apart() {
        let tree = Tree::new();
        tree.file("sys/class/thermal/thermal_zone0/temp", "81000\n");
        assert_eq!(tree.row("temperature").verdict, Verdict::Bad);
        let cases = [
            (0, Verdict::Good, "never"),
            (0x5_0000, Verdict::Note, "since start: under-voltage, throttled"),
            (0x5_0005, Verdict::Bad, "now: under-voltage, throttled"),
            (0x8_0008, Verdict::Bad, "now: soft temperature limit"),
        ];
        for (bits, verdict, found) in cases {
            let row = throttling(bits);
            assert_eq!((row.verdict, row.found.as_str()), (verdict, found));
            assert_eq!(row.consequence.is_empty(), verdict == Verdict::Good);
        }
        assert!(throttling(1).consequence.contains("27 W"));
        assert!(throttling(8).consequence.contains("cooler"));
    }

    #[test]
    fn swap_in_memory_is_named() {
        let tree = Tree::new();
        tree.file(
            "proc/swaps",
            "Filename Type Size Used Priority\n/dev/zram0 partition 2097152 0 100\n",
        );
        assert_eq!(tree.row("swap").found, "/dev/zram0 2.0 GiB, which lies in memory");
    }
}
