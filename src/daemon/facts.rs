//! What this machine is, for start-up lines and telemetry.

use std::fs;

/// The host's name without its domain.
pub(super) fn host() -> String {
    let name = rustix::system::uname();
    let name = name.nodename().to_string_lossy();
    name.split('.').next().unwrap_or("scoutd").to_owned()
}

/// The board, as firmware describes it: `Raspberry Pi 5 Model B Rev 1.0`; `None` on a PC.
pub(super) fn board() -> Option<String> {
    let model = fs::read_to_string("/sys/firmware/devicetree/base/model").ok()?;
    Some(model.trim_end_matches('\0').trim().to_owned())
}

/// The operating system and its version.
pub(super) fn operating_system() -> String {
    sysinfo::System::long_os_version().unwrap_or_else(|_| "unknown".to_owned())
}
