//! `assay-agent doctor`: what is measured on this host, what is not, and what to do about it.

use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Args;

use super::{CliError, client, printable, say};
use crate::config::{Config, ConfigError};
use crate::doctor::grub::{self, Fix};
use crate::doctor::{self, Finding, Host, Running, State};
use crate::http::chain;

/// `assay-agent doctor`.
#[derive(Debug, Args)]
pub(super) struct DoctorArguments {
    /// Print JSON
    #[arg(long, conflicts_with = "fix")]
    json: bool,
    /// Have GRUB measure kernel, initrd and command line, and have that put back whenever an update drops it; asks first
    #[arg(long)]
    fix: bool,
    /// With --fix: do not ask
    #[arg(long, requires = "fix")]
    yes: bool,
    /// With --fix: GRUB's configuration, where it is not in one of XenServer's places
    #[arg(long, value_name = "FILE", requires = "fix")]
    grub_config: Option<PathBuf>,
    /// Put back what an update dropped, if `--fix` was agreed to on this host (what assay-grub.service runs)
    #[arg(long, conflicts_with_all = ["json", "fix"])]
    reassert: bool,
}

/// Looks, tells, and fixes what it may; something bad is a failure.
pub(super) fn run(config: Result<Config, ConfigError>, arguments: &DoctorArguments) -> Result<(), CliError> {
    let host = Host::default();
    if arguments.reassert {
        if grub::reassert(&host)? {
            say("GRUB's configuration had been written anew: it measures again, from the next restart on")?;
        }
        return Ok(());
    }
    if arguments.fix {
        return fix(&host, arguments);
    }
    let running = running(&config);
    let findings = doctor::examine(&host, &config, &running);
    if arguments.json {
        say(&serde_json::to_string_pretty(&findings).map_err(CliError::Json)?)?;
    } else {
        findings.iter().try_for_each(show)?;
    }
    match findings.iter().filter(|finding| finding.state == State::Bad).count() {
        0 => Ok(()),
        bad => Err(CliError::Unwell { bad }),
    }
}

fn running(config: &Result<Config, ConfigError>) -> Running {
    let Ok(config) = config else {
        return Running::Silent(
            "it was not asked: the configuration, which says where its socket is, cannot be used".to_owned(),
        );
    };
    match client::get(&config.socket(), "/v1/status") {
        Ok(status) => Running::Yes(Box::new(status)),
        Err(CliError::Client(error)) if error.is_absent() => Running::No,
        Err(error) => Running::Silent(chain(&error)),
    }
}

fn show(finding: &Finding) -> Result<(), CliError> {
    let word = match finding.state {
        State::Good => "ok",
        State::Weak => "weak",
        State::Bad => "BAD",
    };
    say(&printable(&format!("{word:<5}{:<14}{}", finding.check, finding.found)))?;
    match &finding.remedy {
        Some(remedy) => say(&printable(&format!("{:<19}-> {remedy}", ""))),
        None => Ok(()),
    }
}

fn fix(host: &Host, arguments: &DoctorArguments) -> Result<(), CliError> {
    let Some(fix) = Fix::plan(host, arguments.grub_config.as_deref())? else {
        return say("GRUB's configuration has the lines already: nothing to do");
    };
    say(&format!(
        "These lines go before all others of {}:\n",
        fix.path.display()
    ))?;
    say(&fix.lines)?;
    if !arguments.yes && !agreed()? {
        return Err(CliError::NotAgreed);
    }
    fix.apply()?;
    watch();
    say(
        "Done. From the next restart on PCR 8 and 9 tell kernel, initrd and command line; approve them on the verifier then.",
    )
}

/// The units that put it back after an update. A host without them, or without systemd, is as well off until one.
fn watch() {
    if Path::new("/run/systemd/system").is_dir() {
        let enable = ["--quiet", "enable", "--now", "assay-grub.path", "assay-grub.service"];
        if !Command::new("systemctl")
            .args(enable)
            .status()
            .is_ok_and(|status| status.success())
        {
            eprintln!(
                "assay-agent: assay-grub.path could not be enabled; after an update of GRUB's configuration run doctor --fix again"
            );
        }
    }
}

/// Asks on the terminal; without one nobody can agree.
fn agreed() -> Result<bool, CliError> {
    if !std::io::stdin().is_terminal() {
        return Ok(false);
    }
    let mut output = std::io::stdout().lock();
    write!(output, "Change it? [y/N] ")
        .and_then(|()| output.flush())
        .map_err(CliError::Output)?;
    let mut answer = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut answer)
        .map_err(CliError::Input)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
