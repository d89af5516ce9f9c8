//! Other people's programs, by which a qcow2 image is opened.

use std::io::{self, Read as _, Write as _};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::super::DiskError;

/// What is kept of a program's complaint, in bytes.
const MAX_WORDS: u64 = 4096;
/// Between two looks at it.
const PAUSE: Duration = Duration::from_millis(2);

/// A program, speaking English.
pub(super) fn command(program: &'static str) -> Command {
    let mut command = Command::new(program);
    command.env("LC_ALL", "C").stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

/// How a program ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// Well.
    Well,
    /// With this complaint.
    Said(String),
    /// It was killed: it took too long.
    Late,
}

/// Runs a program to its end, and hands it a secret at its standard input. `name` names it in errors.
///
/// # Errors
/// [`DiskError::Program`].
pub(super) fn run(
    command: &mut Command,
    name: &'static str,
    secret: &[u8],
    within: Duration,
) -> Result<Ended, DiskError> {
    let failed = |source| DiskError::Program { program: name, source };
    let mut child = command.stdin(Stdio::piped()).spawn().map_err(failed)?;
    // One that does not want it, or is gone, says why by how it ends. A key is far smaller than what a pipe takes at once.
    if let Some(mut stdin) = child.stdin.take() {
        drop(stdin.write_all(secret));
    }
    wait(&mut child, within).map_err(failed)
}

fn wait(child: &mut Child, within: Duration) -> io::Result<Ended> {
    let start = Instant::now();
    let status = loop {
        match child.try_wait()? {
            Some(status) => break status,
            None if start.elapsed() > within => {
                child.kill()?;
                child.wait()?;
                return Ok(Ended::Late);
            }
            None => thread::sleep(PAUSE),
        }
    };
    if status.success() {
        return Ok(Ended::Well);
    }
    let mut said = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        stderr.take(MAX_WORDS).read_to_end(&mut said)?;
    }
    let said = String::from_utf8_lossy(&said);
    let words: Vec<&str> = said.split_whitespace().collect();
    Ok(Ended::Said(match words.join(" ") {
        empty if empty.is_empty() => status.to_string(),
        words => words,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_secret_is_handed_over_and_a_complaint_is_heard() {
        let mut cat = command("sh");
        cat.args(["-c", "read -r line; echo \"no use  for $line\" >&2; exit 3"]);
        let ended = run(&mut cat, "sh", b"a key\n", LONG).unwrap();
        assert!(
            matches!(&ended, Ended::Said(words) if words == "no use for a key"),
            "{ended:?}"
        );
        let ended = run(command("sh").args(["-c", "exit 4"]), "sh", b"", LONG).unwrap();
        assert!(
            matches!(&ended, Ended::Said(words) if words.contains("exit status: 4")),
            "{ended:?}"
        );
    }

    #[test]
    fn one_that_never_ends_is_ended_and_one_that_is_missing_is_named() {
        let ended = run(command("sleep").arg("1000"), "sleep", b"", Duration::ZERO).unwrap();
        assert!(matches!(ended, Ended::Late), "{ended:?}");
        let error = run(&mut command("/nowhere/program"), "program", b"", LONG).unwrap_err();
        assert!(
            matches!(error, DiskError::Program { program: "program", .. }),
            "{error}"
        );
    }
}
