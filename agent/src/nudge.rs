//! Asks the verifiers for a look at once when something happens that a key of an open disk may be lost for.
//!
//! Which code is approved only the verifier knows. So each new record is a reason to ask while a disk is open that is to be suspended or
//! wiped on loss; a violation, or something that was refused, always is.

use std::convert::Infallible;
use std::path::PathBuf;
use std::time::Duration;

use tokio::task::JoinSet;

use crate::http::chain;
use crate::join::Joined;
use crate::leases::Leases;
use crate::measure::Control;
use crate::unlock::look;

/// At most one question in this time. What happens meanwhile is seen by the look that follows it.
const PAUSE: Duration = Duration::from_millis(500);
/// Questions under way, when verifiers are slow to answer.
const AT_ONCE: usize = 8;

/// Asks whenever there is a reason to, for as long as the daemon runs.
pub async fn nudge(control: Control, leases: Leases, state_dir: PathBuf) -> Infallible {
    let mut asking = JoinSet::new();
    loop {
        let alarm = control.news().await;
        if !alarm && !leases.any_to_stop() {
            continue;
        }
        while asking.try_join_next().is_some() {}
        match Joined::load(&state_dir) {
            Ok(Some(joined)) if asking.len() < AT_ONCE => {
                asking.spawn(async move { look::ask(&joined).await });
            }
            Ok(_) => {}
            Err(error) => tracing::warn!("no verifier can be asked for a look: {}", chain(&error)),
        }
        tokio::time::sleep(PAUSE).await;
    }
}
