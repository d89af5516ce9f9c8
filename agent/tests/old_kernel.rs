//! The agent on a kernel that is too old: it says which one works.
//!
//! The kernel itself plays it: to a process with the personality UNAME26 it gives a release that begins with 2.6 (personality(2)).

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test says what it expects by panicking"
)]

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

/// A configuration that no kernel can be measured with: tier 3 does not find its type information.
fn config(folder: &Path) -> std::path::PathBuf {
    let (path, shown) = (folder.join("agent.toml"), folder.display());
    let text =
        format!("state_dir = \"{shown}\"\nrun_dir = \"{shown}\"\n[measure]\ntier = 3\nbtf = \"{shown}/nowhere\"\n");
    std::fs::write(&path, text).unwrap();
    path
}

fn agent(old: bool, words: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let mut command = if old {
        let mut setarch = Command::new("setarch");
        setarch.args(["--uname-2.6", env!("CARGO_BIN_EXE_assay-agent")]);
        setarch
    } else {
        Command::new(env!("CARGO_BIN_EXE_assay-agent"))
    };
    command
        .arg("--config")
        .arg(config(folder.path()))
        .args(words)
        .output()
        .unwrap()
}

/// What doctor finds of the kernel.
fn kernel(old: bool) -> Value {
    let output = agent(old, &["doctor", "--json"]);
    let findings: Value = serde_json::from_slice(&output.stdout).unwrap();
    let findings = findings.as_array().unwrap();
    findings
        .iter()
        .find(|finding| finding["check"] == "kernel")
        .unwrap()
        .clone()
}

#[test]
fn doctor_names_an_old_kernel_and_those_that_work() {
    let old = kernel(true);
    assert_eq!(old["state"], "bad", "{old}");
    assert!(old["found"].as_str().unwrap().starts_with("Linux 2.6."), "{old}");
    let remedy = old["remedy"].as_str().unwrap();
    assert!(
        remedy.contains("Linux 6.1 or newer") && remedy.contains("4.19 is the oldest"),
        "{remedy}"
    );
    let new = kernel(false);
    assert_eq!((&new["state"], &new["remedy"]), (&"good".into(), &Value::Null), "{new}");
}

#[test]
fn run_ends_on_an_old_kernel_and_says_why() {
    let said = |old| {
        let output = agent(old, &["run"]);
        assert!(!output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let old = said(true);
    assert!(
        old.contains("Linux 2.6.") && old.contains("is too old to be measured: install Linux 6.1 or newer"),
        "{old}"
    );
    // And what is missing first.
    assert!(old.contains("tier 3 "), "{old}");
    let new = said(false);
    assert!(new.contains("tier 3 ") && !new.contains("too old"), "{new}");
}
