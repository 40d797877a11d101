//! The board under us: temperature, throttling, clock, compressed swap. Whatever is not there is left out.

use std::fs::{self, File};
use std::path::Path;

use super::MemorySample;
use super::probe::{open, read};

/// Open files of the board.
#[derive(Debug)]
pub(super) struct Board {
    temperature: Option<File>,
    throttled: Option<File>,
    clock: Option<File>,
    /// Kilohertz of the highest clock.
    clock_max: Option<f32>,
}

impl Board {
    pub(super) fn find(root: &Path) -> Board {
        let policy = "sys/devices/system/cpu/cpufreq/policy0";
        let clock_max = fs::read_to_string(root.join(policy).join("cpuinfo_max_freq")).ok();
        Board {
            temperature: open(root, "sys/class/thermal/thermal_zone0/temp").ok(),
            throttled: throttled(root),
            clock: open(root, &format!("{policy}/scaling_cur_freq")).ok(),
            clock_max: clock_max.and_then(|text| text.trim().parse().ok()),
        }
    }

    pub(super) fn sample(&self, sample: &mut MemorySample, buffer: &mut [u8]) {
        let mut text = |file: &Option<File>, parse: fn(&str) -> Option<f32>| {
            let text = read(file.as_ref()?, buffer).ok()?;
            parse(text.trim())
        };
        let number = |text: &str| text.parse().ok();
        sample.temperature_celsius = text(&self.temperature, number).map(|milli| milli / 1000.0);
        sample.clock_ratio =
            text(&self.clock, number).zip(self.clock_max).map(|(now, max)| now / max);
        sample.throttled = self.throttled.as_ref().and_then(|file| {
            let text = read(file, buffer).ok()?;
            u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()
        });
    }
}

/// The firmware's state; the address in its path differs from board to board.
fn throttled(root: &Path) -> Option<File> {
    let platform = root.join("sys/devices/platform");
    let socs = fs::read_dir(platform).ok()?.flatten();
    socs.map(|soc| soc.path())
        .filter(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("soc"))
        })
        .find_map(|path| {
            let name = format!("{}:firmware", path.file_name()?.to_string_lossy());
            File::open(path.join(name).join("get_throttled")).ok()
        })
}

/// The statistics of each compressed swap device.
pub(super) fn zram(root: &Path) -> Vec<File> {
    const DEVICES_MAX: usize = 8;
    let path = |number: usize| format!("sys/block/zram{number}/mm_stat");
    (0..DEVICES_MAX).filter_map(|number| open(root, &path(number)).ok()).collect()
}
