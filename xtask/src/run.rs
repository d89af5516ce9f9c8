//! Running other programs: visibly, and with their words kept for the case that they fail.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use crate::ui::Step;

/// Lines of a failed program's output that go into the error.
const KEPT_LINES: usize = 40;

/// Why a task failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file operation failed.
    #[error("cannot {action}")]
    Io {
        /// What was being done.
        action: String,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// A program could not be started.
    #[error("cannot start {program}: is it installed? (`cargo xtask setup`)")]
    Start {
        /// Its name.
        program: String,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// A program failed.
    #[error("{command} failed ({status}){output}")]
    Failed {
        /// What was run.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// The end of what it printed, after a line break; empty when that went to the terminal.
        output: String,
    },
    /// There is no folder to keep tools and images in.
    #[error("neither ASSAY_CACHE, XDG_CACHE_HOME nor HOME is set: set ASSAY_CACHE to a folder for tools and images")]
    NoCache,
    /// Something that only the user can supply is missing.
    #[error("{0}")]
    Missing(String),
    /// The machine or TPM of a test, or of the demonstration.
    #[error(transparent)]
    Harness(#[from] assay_tests::HarnessError),
    /// Tests failed, or a layer was skipped where none may be.
    #[error("{0}")]
    Tests(String),
    /// The demonstration did not go as it must.
    #[error("demo: {0}")]
    Demo(String),
}

/// Adds to an I/O error what was being done.
pub fn io(action: impl Into<String>) -> impl FnOnce(std::io::Error) -> Error {
    let action = action.into();
    move |source| Error::Io { action, source }
}

/// Is there such a program in PATH?
pub fn in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Root's folders: a user's PATH need not have them, and mke2fs and depmod live there.
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|dir| dir.join(program).is_file())
}

/// A command whose PATH reaches the administrator's programs too.
pub fn command<S: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(program);
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin");
    command.args(arguments).env("PATH", path).stdin(Stdio::null());
    command
}

/// Lets a command find the programs in this folder before all others.
pub fn first_in_path(command: &mut Command, folder: &Path) {
    let mut path = folder.as_os_str().to_owned();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    command.env("PATH", path);
}

/// Cargo, as if started from the shell. `cargo xtask` is `cargo run`, which describes the package xtask in variables;
/// build scripts that watch those (ring's does) would run again, and half the tree be compiled again, each time that
/// `cargo build` and `cargo xtask` take turns.
pub fn cargo() -> Command {
    let mut command = Command::new("cargo");
    command.current_dir(crate::workspace::root()).env_remove("CARGO");
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_"]
            .iter()
            .any(|start| text.starts_with(start))
        {
            command.env_remove(&name);
        }
    }
    command
}

/// Runs it to the end and gives its standard output.
pub fn output(command: &mut Command) -> Result<String, Error> {
    let result = command.output().map_err(|source| Error::Start {
        program: name(command),
        source,
    })?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if result.status.success() {
        return Ok(text(&result.stdout));
    }
    let output = format!("\n{}", text(&result.stderr).trim_end());
    Err(Error::Failed {
        command: line(command),
        status: result.status,
        output,
    })
}

/// Runs it with its output on this terminal.
pub fn loud(command: &mut Command) -> Result<(), Error> {
    let status = command.status().map_err(|source| Error::Start {
        program: name(command),
        source,
    })?;
    if status.success() {
        return Ok(());
    }
    Err(Error::Failed {
        command: line(command),
        status,
        output: String::new(),
    })
}

/// Runs it as one visible step: a moving line with its latest words on a terminal, a sign of life elsewhere.
pub fn step(what: &str, command: &mut Command) -> Result<(), Error> {
    let step = Step::start(what);
    let mut kept: Vec<String> = Vec::new();
    let status = lines(command, |line| {
        step.say(line);
        if kept.len() >= KEPT_LINES {
            kept.remove(0);
        }
        kept.push(line.to_owned());
    })?;
    if status.success() {
        step.done();
        return Ok(());
    }
    step.failed();
    Err(Error::Failed {
        command: line(command),
        status,
        output: format!("\n{}", kept.join("\n")),
    })
}

/// Runs it, giving each line of both its streams to `each` as it comes.
pub fn lines(command: &mut Command, mut each: impl FnMut(&str)) -> Result<ExitStatus, Error> {
    let (reader, writer) = std::io::pipe().map_err(io("make a pipe"))?;
    let second = writer.try_clone().map_err(io("make a pipe"))?;
    command.stdout(writer).stderr(second);
    let mut child = command.spawn().map_err(|source| Error::Start {
        program: name(command),
        source,
    })?;
    // The command holds the writing ends; only when they are gone does the reader see the end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
        each(String::from_utf8_lossy(&line).trim_end());
    }
    child.wait().map_err(io(format!("wait for {}", name(command))))
}

fn name(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

/// Is this process root?
pub fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(Path::new("/proc/self")).is_ok_and(|metadata| metadata.uid() == 0)
}
