//! What the service manager is told. Without one, nothing happens.

use std::time::Duration;

use sd_notify::NotifyState;

/// Tells that everything answers.
pub(super) fn ready(status: &str) {
    send(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// Tells that shutting down has begun.
pub(super) fn stopping() {
    send(&[NotifyState::Stopping, NotifyState::Status("draining")]);
}

/// Tells that we are alive.
pub(super) fn watchdog() {
    send(&[NotifyState::Watchdog]);
}

/// How often to say so: a third of what the service manager allows, or `None` if it does not ask.
pub(super) fn watchdog_period() -> Option<Duration> {
    sd_notify::watchdog_enabled().map(|limit| limit / 3)
}

fn send(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        log::warn!(target: "daemon", error:% = error; "service manager not reached");
    }
}
