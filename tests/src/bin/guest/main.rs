//! PID 1 of a test machine, and the helper through which the harness works in it.
//!
//! As PID 1 it mounts what a system has mounted, brings up the network, starts itself again as the helper, and from
//! then on only collects the dead, and sends signals where they must come from PID 1: whoever waits for any child would steal the helper's exit statuses.

mod from_init;
mod init;
mod serve;

use std::process::ExitCode;

fn main() -> ExitCode {
    let networked = std::env::args().nth(1).is_some_and(|word| word == "network");
    let result = if std::process::id() == 1 {
        init::run()
    } else if networked {
        // Another process 1 has started it, which leaves this to the helper.
        init::network().and_then(|()| serve::run())
    } else {
        serve::run()
    };
    if let Err(error) = result {
        eprintln!("assay-guest: {error}");
    }
    if std::process::id() == 1 {
        // The kernel panics when PID 1 ends; powering off ends the machine as quickly and says less.
        init::power_off();
    }
    ExitCode::FAILURE
}
