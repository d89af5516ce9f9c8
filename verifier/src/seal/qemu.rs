//! qemu's programs, for the formats that are qemu's. File names and secrets never go through a shell, a guess at the format, or
//! an argument that others can read.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, BufReader, Read, Write},
    os::fd::AsRawFd,
    path::Path,
    process::{Command, Stdio},
    thread,
};

use nix::sys::memfd::{MFdFlags, memfd_create};
use serde_json::{Value, json};

use super::{InputFormat, SealError};

/// What the secret of an encrypted image is called.
pub(super) const SECRET_ID: &str = "assay";
/// What is kept of a program's complaint, in bytes.
pub(super) const MAX_WORDS: u64 = 4096;
/// Longest line of progress.
const MAX_LINE: usize = 64;

/// One of qemu's programs, speaking English.
pub(super) fn command(program: &'static str) -> Command {
    let mut command = Command::new(program);
    command.env("LC_ALL", "C");
    command
}

/// The file as qemu's programs take it with its format: no name is mistaken for a protocol, no content for another format, and a qcow2 image
/// stands alone, whatever it names as its backing file.
pub(super) fn file_name(path: &Path, format: InputFormat) -> Result<OsString, SealError> {
    Ok(format!("json:{}", options(path, format)?).into())
}

/// The same for a qcow2 image with LUKS inside, whose secret is called [`SECRET_ID`].
pub(super) fn encrypted_name(path: &Path) -> Result<OsString, SealError> {
    let mut options = options(path, InputFormat::Qcow2)?;
    if let Some(members) = options.as_object_mut() {
        members.insert("encrypt".to_owned(), json!({"format": "luks", "key-secret": SECRET_ID}));
    }
    Ok(format!("json:{options}").into())
}

fn options(path: &Path, format: InputFormat) -> Result<Value, SealError> {
    let name = path.to_str().ok_or_else(|| SealError::InputName(path.to_owned()))?;
    let kind = if path.metadata().is_ok_and(|metadata| metadata.is_file()) {
        "file"
    } else {
        "host_device"
    };
    let mut options = json!({"driver": format.driver(), "file": {"driver": kind, "filename": name}});
    if let (InputFormat::Qcow2, Some(members)) = (format, options.as_object_mut()) {
        members.insert("backing".to_owned(), Value::Null);
    }
    Ok(options)
}

/// What `qemu-img info` says of an image.
pub(super) fn info(path: &Path, format: InputFormat) -> Result<Value, SealError> {
    let out = run(
        command("qemu-img")
            .args(["info", "--output=json"])
            .arg(file_name(path, format)?),
        path,
    )?;
    serde_json::from_slice(&out).map_err(|source| SealError::QemuAnswer {
        path: path.to_owned(),
        source,
    })
}

/// Refuses an image that needs another file, and tells whether it is encrypted.
pub(super) fn check_alone(path: &Path, format: InputFormat) -> Result<bool, SealError> {
    let info = info(path, format)?;
    let text = |pointer: &str| info.pointer(pointer).and_then(Value::as_str).map(str::to_owned);
    let other = text("/backing-filename").or_else(|| text("/format-specific/data/data-file"));
    if let Some(other) = other {
        return Err(SealError::InputParts {
            path: path.to_owned(),
            other: other.chars().take(200).collect(),
        });
    }
    Ok(info.get("encrypted").and_then(Value::as_bool) == Some(true))
}

/// A secret that a child process reads as `/proc/self/fd/N`: in memory, and in no argument.
pub(super) struct SecretFile(File);

impl SecretFile {
    pub(super) fn new(secret: &[u8]) -> Result<Self, SealError> {
        let make = || -> io::Result<File> {
            // Inherited by the child on purpose: not closed on exec.
            let mut file = File::from(memfd_create(c"secret", MFdFlags::empty())?);
            file.write_all(secret)?;
            Ok(file)
        };
        make().map(Self).map_err(SealError::Memory)
    }

    /// The argument of `--object` for it.
    pub(super) fn object(&self, id: &str) -> String {
        format!("secret,id={id},file=/proc/self/fd/{}", self.0.as_raw_fd())
    }
}

/// Runs a program to its end and gives its output; `path` names the image in errors.
pub(super) fn run(command: &mut Command, path: &Path) -> Result<Vec<u8>, SealError> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|source| SealError::Program {
            program: "qemu-img",
            source,
        })?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(SealError::Qemu {
        program: "qemu-img",
        path: path.to_owned(),
        said: words(&output.stderr),
    })
}

/// How much of its work qemu-img says that it has done, in hundredths of a percent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Share(u64);

impl Share {
    /// From a line such as `    (12.34/100%)`, which `-p` makes it print.
    fn parse(line: &[u8]) -> Option<Self> {
        let line = str::from_utf8(line).ok()?.trim();
        let (whole, part) = line.strip_prefix('(')?.strip_suffix("/100%)")?.split_once('.')?;
        let (whole, part): (u64, u64) = (whole.parse().ok()?, part.parse().ok()?);
        (whole <= 100 && part < 100).then(|| Self(whole.saturating_mul(100).saturating_add(part).min(Self::ALL)))
    }

    const ALL: u64 = 100 * 100;

    /// So much of a number of bytes.
    pub(super) fn of(self, total: u64) -> u64 {
        let done = u128::from(total) * u128::from(self.0) / u128::from(Self::ALL);
        u64::try_from(done).unwrap_or(total)
    }
}

/// Runs a program to its end that was told to print its progress; `path` names the image in errors.
pub(super) fn run_heard(command: &mut Command, path: &Path, hear: &mut dyn FnMut(Share)) -> Result<(), SealError> {
    let unusable = |source| SealError::Program {
        program: "qemu-img",
        source,
    };
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(unusable)?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let said = thread::scope(|scope| {
        // Beside the other: a program whose complaints nobody reads stands still.
        let complaints = scope.spawn(move || read_some(stderr));
        listen(stdout, hear);
        complaints.join().unwrap_or_default()
    });
    if child.wait().map_err(unusable)?.success() {
        return Ok(());
    }
    Err(SealError::Qemu {
        program: "qemu-img",
        path: path.to_owned(),
        said: words(&said),
    })
}

/// Each line that tells progress; they end with a carriage return. Whatever else is printed is read and forgotten.
fn listen(stdout: Option<impl Read>, hear: &mut dyn FnMut(Share)) {
    let Some(stdout) = stdout else { return };
    let mut line = Vec::new();
    for byte in BufReader::new(stdout).bytes().map_while(Result::ok) {
        match byte {
            b'\r' | b'\n' => {
                if let Some(share) = Share::parse(&line) {
                    hear(share);
                }
                line.clear();
            }
            byte if line.len() < MAX_LINE => line.push(byte),
            _ => {}
        }
    }
}

/// The beginning of all that there is.
fn read_some(stderr: Option<impl Read>) -> Vec<u8> {
    let mut said = Vec::new();
    if let Some(mut stderr) = stderr {
        drop(stderr.by_ref().take(MAX_WORDS).read_to_end(&mut said));
        drop(io::copy(&mut stderr, &mut io::sink()));
    }
    said
}

/// A program's complaint on one line.
pub(super) fn words(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    match lines.as_slice() {
        [] => "it gave no reason".to_owned(),
        lines => lines.join("; ").chars().take(500).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_told_from_other_lines() {
        let printed = b"    (0.00/100%)\r    (12.34/100%)\rwarning: (50.00/100%)\n    (x/100%)\r(1.100/100%)\r    (100.00/100%)\r\n";
        let mut heard = Vec::new();
        listen(Some(printed.as_slice()), &mut |share| heard.push(share));
        assert_eq!(heard, [Share(0), Share(1234), Share(10_000)]);
        let bytes: Vec<u64> = heard.iter().map(|share| share.of(1_000_000)).collect();
        assert_eq!(bytes, [0, 123_400, 1_000_000]);
        assert_eq!(Share(10_000).of(u64::MAX), u64::MAX);
    }
}
