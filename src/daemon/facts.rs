//! What this machine is, for start-up lines and telemetry.

use std::fs;
use std::path::PathBuf;

use crate::store::MachineRecord;
use crate::units::Bytes;

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

/// The board, or the host's name.
pub fn machine_name() -> String {
    board().unwrap_or_else(host)
}

/// Folders that may hold what is kept about this machine, the likeliest first: the service manager's, the usual
/// one of the service, the user's.
fn state_folders() -> Vec<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    // systemd separates several folders by colons; ours is the only one.
    let service = variable("STATE_DIRECTORY").map(PathBuf::from);
    let home = variable("HOME").map(|home| PathBuf::from(home).join(".local/state"));
    let user = variable("XDG_STATE_HOME").map(PathBuf::from).or(home);
    let usual = Some(PathBuf::from("/var/lib/scoutd"));
    [service, usual, user.map(|folder| folder.join("scoutd"))].into_iter().flatten().collect()
}

/// The folder to keep something in: the first that is there and can be written, else the user's, which is made
/// when it is needed.
pub fn state_folder() -> Option<PathBuf> {
    let folders = state_folders();
    let writable = |folder: &&PathBuf| {
        rustix::fs::access(folder.as_path(), rustix::fs::Access::WRITE_OK).is_ok()
    };
    folders.iter().find(writable).or(folders.last()).cloned()
}

/// What was measured of this machine, which has `memory` in all; `None` if that was never done, or on another
/// machine with the same disk. A record that cannot be read is as good as none, and said.
pub fn machine_record(memory: Bytes) -> Option<MachineRecord> {
    for folder in state_folders() {
        match MachineRecord::load(&folder) {
            Ok(Some(record)) if record.is_of(memory) => return Some(record),
            Ok(_) => {}
            Err(error) => {
                log::warn!(target: "daemon", folder:% = folder.display(), error:%; "measurements of this machine not read");
            }
        }
    }
    None
}
