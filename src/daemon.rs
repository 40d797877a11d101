//! Wiring: from a configuration to a running process, and down again.
