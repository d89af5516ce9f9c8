//! `assay-agent disks`: the disks that a host opens at boot, by a table like crypttab(5).
//!
//! A line is `NAME IMAGE [timeout=SECONDS]`; `#` begins a comment. The key is asked for as by `unlock`: while the host is trusted.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use super::{CliError, MAX_TIMEOUT_S, client, complain, say};
use crate::config::Config;
use crate::unlock::api;

/// Where the table is.
pub(super) const DEFAULT_TABLE: &str = "/etc/assay/disks";
const MAX_TABLE: u64 = 1024 * 1024;
const MAX_DISKS: usize = 1024;

/// `disks …`.
#[derive(Debug, clap::Subcommand)]
pub(super) enum DisksCommand {
    /// Open the disks with these names, or all of the table, one after the other
    Open(Chosen),
    /// Close them, in the opposite order
    Close(Chosen),
}

/// Which disks.
#[derive(Debug, clap::Args)]
pub(super) struct Chosen {
    /// Names in the table [default: all]
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// The table
    #[arg(long, value_name = "FILE", default_value = DEFAULT_TABLE)]
    table: PathBuf,
}

/// Why a table is refused.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// It is missing or unreadable.
    #[error("cannot read the table of disks {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Far larger than any table.
    #[error("{path} is larger than a table of {MAX_DISKS} disks can be")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// A line that says nothing sensible.
    #[error("{path}:{line}: {what}; a line is NAME IMAGE [timeout=SECONDS]")]
    Line {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A name on the command line that the table has not.
    #[error("{path} has no disk {name:?}")]
    NoSuchDisk {
        /// The file.
        path: PathBuf,
        /// The name.
        name: String,
    },
}

#[derive(Debug, PartialEq, Eq)]
struct Disk {
    name: String,
    image: PathBuf,
    timeout_s: Option<u64>,
}

pub(super) fn run(config: &Config, command: DisksCommand) -> Result<(), CliError> {
    match command {
        DisksCommand::Open(chosen) => each(chosen.disks()?, |disk| open(config, disk)),
        DisksCommand::Close(chosen) => {
            let mut disks = chosen.disks()?;
            disks.reverse();
            each(disks, |disk| close(config, disk))
        }
    }
}

impl Chosen {
    fn disks(&self) -> Result<Vec<Disk>, TableError> {
        let mut all = read(&self.table)?;
        for name in &self.names {
            if !all.iter().any(|disk| disk.name == *name) {
                return Err(TableError::NoSuchDisk {
                    path: self.table.clone(),
                    name: name.clone(),
                });
            }
        }
        if !self.names.is_empty() {
            all.retain(|disk| self.names.contains(&disk.name));
        }
        Ok(all)
    }
}

/// One that fails keeps none of the others shut.
fn each(disks: Vec<Disk>, mut work: impl FnMut(&Disk) -> Result<(), CliError>) -> Result<(), CliError> {
    let all = disks.len();
    let mut failed: usize = 0;
    let mut last = None;
    for disk in disks {
        if let Err(error) = work(&disk) {
            failed = failed.saturating_add(1);
            if let Some(before) = last.replace(error) {
                complain(&before);
            }
        }
    }
    match last {
        // The only one asked for: its own words and exit code.
        Some(error) if all == 1 => Err(error),
        Some(error) => {
            complain(&error);
            Err(CliError::SomeDisks { failed, all })
        }
        None => Ok(()),
    }
}

fn open(config: &Config, disk: &Disk) -> Result<(), CliError> {
    let request = api::UnlockRequest {
        image: disk.image.clone(),
        name: Some(disk.name.clone()),
        timeout_s: disk.timeout_s,
        vm: None,
    };
    let response: api::UnlockResponse = client::post(&config.socket(), "/v1/unlock", &request)?;
    say(&response.device.display().to_string())?;
    // Whoever waits for the units after this one reads it as it happens.
    std::io::stdout().flush().map_err(CliError::Output)
}

fn close(config: &Config, disk: &Disk) -> Result<(), CliError> {
    let name = disk.name.clone();
    let _: api::LockResponse = client::post(&config.socket(), "/v1/lock", &api::LockRequest { name })?;
    Ok(())
}

fn read(path: &Path) -> Result<Vec<Disk>, TableError> {
    let failed = |source| TableError::Read {
        path: path.to_owned(),
        source,
    };
    if std::fs::metadata(path).map_err(failed)?.len() > MAX_TABLE {
        return Err(TableError::TooLarge { path: path.to_owned() });
    }
    parse(&std::fs::read_to_string(path).map_err(failed)?, path)
}

fn parse(text: &str, path: &Path) -> Result<Vec<Disk>, TableError> {
    let mut disks = Vec::new();
    let mut names = BTreeSet::new();
    for (number, line) in (1..).zip(text.lines()) {
        let refuse = |what| TableError::Line {
            path: path.to_owned(),
            line: number,
            what,
        };
        let Some(disk) = parse_line(line).map_err(refuse)? else {
            continue;
        };
        if !names.insert(disk.name.clone()) {
            return Err(refuse("this name is there twice"));
        }
        disks.push(disk);
        if disks.len() > MAX_DISKS {
            return Err(TableError::TooLarge { path: path.to_owned() });
        }
    }
    Ok(disks)
}

fn parse_line(line: &str) -> Result<Option<Disk>, &'static str> {
    let mut words = line.split_whitespace().take_while(|word| !word.starts_with('#'));
    let Some(name) = words.next() else {
        return Ok(None);
    };
    let image = words.next().map(PathBuf::from).ok_or("the image is missing")?;
    if !image.is_absolute() {
        return Err("the image is not an absolute path");
    }
    let timeout_s = match words.next().map(|option| option.strip_prefix("timeout=")) {
        None => None,
        Some(value) => {
            let seconds = value.and_then(|value| value.parse().ok());
            let seconds = seconds.filter(|seconds| (1..=MAX_TIMEOUT_S).contains(seconds));
            Some(seconds.ok_or("the only option is timeout=, 1 to 3600 seconds")?)
        }
    };
    match words.next() {
        Some(_) => Err("it has too many words"),
        None => Ok(Some(Disk {
            name: name.to_owned(),
            image,
            timeout_s,
        })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Vec<Disk>, String> {
        parse(text, Path::new("/t")).map_err(|error| error.to_string())
    }

    #[test]
    fn lines_are_disks() {
        let text = "# NAME IMAGE\n\nassay-data /dev/vg/data\n\tassay-b\t/srv/b.luks timeout=300 # slow\n";
        let disk = |name: &str, image: &str, timeout_s| Disk {
            name: name.into(),
            image: image.into(),
            timeout_s,
        };
        assert_eq!(
            parsed(text).unwrap(),
            [
                disk("assay-data", "/dev/vg/data", None),
                disk("assay-b", "/srv/b.luks", Some(300))
            ]
        );
        assert!(parsed("").unwrap().is_empty());
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for (text, named) in [
            ("a /i\nb", "/t:2: the image is missing"),
            ("a i", "not an absolute path"),
            ("a /i\na /j", "/t:2: this name is there twice"),
            ("a /i none", "the only option is timeout="),
            ("a /i timeout=0", "1 to 3600"),
            ("a /i timeout=9999999", "1 to 3600"),
            ("a /i timeout=5 luks", "too many words"),
        ] {
            let said = parsed(text).unwrap_err();
            assert!(said.contains(named), "{text}: {said}");
        }
        let many: String = (0..2000).map(|n| format!("n{n} /i\n")).collect();
        assert!(parsed(&many).unwrap_err().contains("larger than"));
    }
}
