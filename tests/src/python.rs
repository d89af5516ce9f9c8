//! The Python interpreters of this machine, for files that must run in old ones.

use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Those that dom0s have: XCP-ng 8.2, 8.3 and 9; and what this machine calls `python3`.
const WANTED: [&str; 4] = ["python3", "python2.7", "python3.6", "python3.12"];

/// Each interpreter that runs: by its name in `PATH`, or one that pyenv has. `python3` is always among them; a test that has fewer than
/// it would like says which it had.
///
/// # Panics
/// Without `python3`.
#[must_use]
pub fn pythons() -> Vec<PathBuf> {
    let found: Vec<PathBuf> = WANTED.into_iter().filter_map(find).collect();
    assert!(
        found.first().is_some_and(|first| first.ends_with("python3")),
        "`cargo xtask setup` installs python3"
    );
    println!("with {found:?}");
    found
}

fn find(name: &str) -> Option<PathBuf> {
    let versions = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".pyenv/versions"));
    let folders = versions.and_then(|versions| std::fs::read_dir(versions).ok());
    let pyenv = folders.into_iter().flatten().flatten();
    let candidates = pyenv.map(|entry| entry.path().join("bin").join(name));
    std::iter::once(PathBuf::from(name)).chain(candidates).find(runs)
}

fn runs(python: &PathBuf) -> bool {
    let status = Command::new(python)
        .args(["-c", "pass"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    status.is_ok_and(|status| status.success())
}
