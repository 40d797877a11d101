//! The `scoutd` binary: everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    scoutd::cli::main()
}
