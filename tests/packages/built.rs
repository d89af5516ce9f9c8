//! Where the packages are, and other programs' view of them.

use std::path::{Path, PathBuf};
use std::process::Command;

use assay_tests::packages::{AGAIN_VARIABLE, FOLDER_VARIABLE};

/// The folder with the packages.
pub fn folder() -> PathBuf {
    named(FOLDER_VARIABLE)
}

/// The folder with those that were made a second time.
pub fn again() -> PathBuf {
    named(AGAIN_VARIABLE)
}

/// The path in this variable.
pub fn named(variable: &str) -> PathBuf {
    let value = std::env::var_os(variable);
    value
        .map(PathBuf::from)
        .expect("a path; `cargo xtask test packages` sets it")
}

/// The one package of this program that ends so.
pub fn package(program: &str, suffix: &str) -> PathBuf {
    let found: Vec<PathBuf> = files(&folder())
        .into_iter()
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with(program) && name.ends_with(suffix)
        })
        .collect();
    assert_eq!(found.len(), 1, "one {program}…{suffix} was expected: {found:?}");
    found.into_iter().next().expect("one package")
}

/// All files of a folder, in order.
pub fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("a folder");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    files.sort();
    files
}

/// What a program prints, which must succeed.
pub fn told(command: &mut Command) -> String {
    let ended = command.output().expect("a program that is installed");
    let error = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success(), "{command:?}: {error}");
    String::from_utf8(ended.stdout).expect("text")
}

/// Does it end well?
pub fn succeeds(command: &mut Command) -> bool {
    command.output().expect("a program that is installed").status.success()
}
