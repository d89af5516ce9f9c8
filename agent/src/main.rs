//! The agent's one program: the daemon, and the commands that hooks and operators call.

use std::process::ExitCode;

fn main() -> ExitCode {
    assay_agent::cli::main()
}
