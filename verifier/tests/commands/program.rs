//! The program itself, run as an operator runs it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

/// What a run of the program left.
pub struct Ran {
    /// Exit code.
    pub code: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Ran {
    /// From the output of a finished process.
    pub fn new(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self {
            code: output.status.code(),
            out: text(output.stdout),
            err: text(output.stderr),
        }
    }

    /// The standard output of a run that worked.
    pub fn good(self) -> String {
        assert_eq!((self.code, self.err.as_str()), (Some(0), ""), "{}", self.out);
        self.out
    }

    /// The error text of a run that failed (code 1), which must be one line and name all of `named`.
    pub fn refused(self, named: &[&str]) -> String {
        assert_eq!(self.code, Some(1), "{}{}", self.out, self.err);
        assert!(self.err.starts_with("assay-verifier: "), "{}", self.err);
        assert_eq!(self.err.lines().count(), 1, "{}", self.err);
        for name in named {
            assert!(self.err.contains(name), "{name:?} is not named in: {}", self.err);
        }
        self.err
    }
}

/// Runs the program.
pub fn verifier<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Ran {
    Ran::new(
        Command::new(env!("CARGO_BIN_EXE_assay-verifier"))
            .args(args)
            .output()
            .unwrap(),
    )
}

/// A directory for files, with a verifier's state directory inside.
pub struct Site {
    dir: TempDir,
}

impl Site {
    /// A new verifier.
    pub fn init() -> Self {
        let site = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        site.run(&["init", "--url", "https://192.0.2.1:8440"]).good();
        site
    }

    /// A file beside the state directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The state directory.
    pub fn state(&self) -> PathBuf {
        self.path("state")
    }

    /// Runs the program with this state directory.
    pub fn run<S: AsRef<OsStr>>(&self, args: &[S]) -> Ran {
        let state = self.state();
        verifier(
            [OsStr::new("--state"), state.as_os_str()]
                .into_iter()
                .chain(args.iter().map(AsRef::as_ref)),
        )
    }

    /// `image seal`.
    pub fn seal(&self, input: &Path, output: &Path) -> Ran {
        self.run(&[
            OsStr::new("image"),
            OsStr::new("seal"),
            input.as_os_str(),
            output.as_os_str(),
        ])
    }
}
