//! What systemd is told of the agent, and what it wants to hear (sd_notify(3), sd_watchdog_enabled(3)).
//!
//! Through libsystemd, but for hosts whose libsystemd is older than the one that its crate is built against (XCP-ng 8.3 has 219): the
//! feature `sd-notify`, without the default ones, sends the same messages without a library.

use std::time::Duration;

/// The log has every load from here on.
pub const READY: (&str, &str) = ("READY", "1");
/// The agent ends in an orderly way.
pub const STOPPING: (&str, &str) = ("STOPPING", "1");
/// It lives.
pub const WATCHDOG: (&str, &str) = ("WATCHDOG", "1");

/// Tells systemd. Without systemd there is nobody to tell.
pub fn notify(state: &[(&str, &str)]) {
    if let Err(error) = by::notify(state) {
        tracing::warn!(%error, "systemd cannot be notified");
    }
}

/// How often systemd wants to hear [`WATCHDOG`], if it does.
#[must_use]
pub fn watchdog() -> Option<Duration> {
    by::watchdog().filter(|period| !period.is_zero())
}

#[cfg(feature = "libsystemd")]
mod by {
    use std::time::Duration;

    pub(super) fn notify(state: &[(&str, &str)]) -> Result<bool, impl std::error::Error> {
        systemd::daemon::notify(state.iter())
    }

    pub(super) fn watchdog() -> Option<Duration> {
        systemd::daemon::watchdog_enabled().ok().map(Duration::from_micros)
    }
}

#[cfg(not(feature = "libsystemd"))]
mod by {
    use std::time::Duration;

    use sd_notify::NotifyState;

    pub(super) fn notify(state: &[(&str, &str)]) -> Result<(), impl std::error::Error> {
        let lines: Vec<String> = state.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let lines: Vec<NotifyState<'_>> = lines.iter().map(|line| NotifyState::Custom(line)).collect();
        sd_notify::notify(&lines)
    }

    pub(super) fn watchdog() -> Option<Duration> {
        sd_notify::watchdog_enabled()
    }
}
