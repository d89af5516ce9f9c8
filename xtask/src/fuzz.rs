//! `cargo xtask fuzz`: each fuzz target of the evidence, for a while. Two at a time, as machines are built for.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crate::run::{Error, cargo, io, loud, step};
use crate::setup::Fuzzer;
use crate::ui::{Step, note};
use crate::workspace::{make_dir, root, target};

/// How long each target runs in a test run, in seconds.
pub const SHORT: u64 = 30;
/// The longest, in seconds: a week.
pub const LONGEST: u64 = 7 * 24 * 3600;

/// Targets, by the names of their files below `fuzz_targets`.
pub const TARGETS: [&str; 12] = [
    "approved",
    "boot_log",
    "bundle",
    "cel",
    "certificate",
    "chain",
    "disk",
    "event",
    "ima_log",
    "policy",
    "tpm",
    "wire",
];

/// Where the targets are, from the top of the tree.
const FOLDER: &str = "agent/evidence/fuzz";
/// The targets are built for this, named: then build scripts are not instrumented.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";
/// What a target may take, in MiB: limits are there to be kept.
const MEMORY: &str = "-rss_limit_mb=1024";
/// Longest input, in bytes.
const LENGTH: &str = "-max_len=65536";
/// Lines of a failed target's words that are shown.
const SHOWN: usize = 60;

/// What came of it.
#[derive(Debug, Default)]
pub struct Found {
    /// Targets that took everything.
    pub passed: u64,
    /// Those that did not.
    pub failed: Vec<String>,
}

/// Runs these targets for so many seconds each.
pub fn run(fuzzer: &Fuzzer, targets: &[&str], seconds: u64) -> Result<Found, Error> {
    if targets.is_empty() {
        return Ok(Found::default());
    }
    let programs = build(fuzzer)?;
    let corpora = corpora()?;
    let found = Mutex::new(Found::default());
    let next = AtomicUsize::new(0);
    let at_once = std::thread::available_parallelism().map_or(1, usize::from).min(2);
    let what = format!("fuzzing {} targets, {seconds} s each", targets.len());
    let shown = Step::start(&what);
    let work = || -> Result<(), Error> {
        while let Some(name) = targets.get(next.fetch_add(1, Ordering::Relaxed)) {
            shown.say(name);
            let good = one(&programs, &corpora, name, seconds)?;
            let mut found = found.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            match good {
                true => found.passed += 1,
                false => found.failed.push((*name).to_owned()),
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..at_once).map(|_| scope.spawn(work)).collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })?;
    let found = found.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    if found.failed.is_empty() {
        shown.done()
    } else {
        shown.failed()
    }
    Ok(found)
}

/// Builds all targets; gives the folder with their programs.
fn build(fuzzer: &Fuzzer) -> Result<PathBuf, Error> {
    let mut command = cargo();
    fuzzer.configure(&mut command);
    command
        // No sanitizer: this code has no `unsafe`, and a stable compiler has none. Overflow and debug assertions are on.
        .args([
            "fuzz",
            "build",
            "--fuzz-dir",
            FOLDER,
            "--sanitizer",
            "none",
            "--target",
            TRIPLE,
        ])
        // Linking takes minutes with it, and it hides where coverage comes from.
        .env("CARGO_PROFILE_RELEASE_LTO", "off");
    step("building the fuzz targets (2 minutes on 2 cores)", &mut command)?;
    Ok(target().join(TRIPLE).join("release"))
}

/// The folder with each target's inputs: what earlier runs found, samples, and other people's logs where they are at hand.
fn corpora() -> Result<PathBuf, Error> {
    let folder = make_dir(target().join("fuzz"))?;
    let mut command = cargo();
    command
        .args(["run", "-q", "-p", "assay-fuzz", "--example", "seeds", "--"])
        .arg(folder.join("corpus"));
    loud(&mut command)?;
    Ok(folder)
}

/// Runs one target; whether it took everything.
fn one(programs: &Path, folder: &Path, name: &str, seconds: u64) -> Result<bool, Error> {
    let start = Instant::now();
    let path = folder.join(name).with_extension("log");
    let log = File::create(&path).map_err(io(format!("write {}", path.display())))?;
    let mut command = Command::new(programs.join(name));
    command
        .arg(folder.join("corpus").join(name))
        .args([MEMORY, LENGTH, "-timeout=20", "-print_final_stats=1"])
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-artifact_prefix={}/{name}-", folder.display()));
    let vectors = root().join("../shared/vectors/boot-logs");
    if name == "boot_log" && vectors.is_dir() {
        command.arg(vectors);
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    let status = command.status().map_err(io(format!("start the fuzz target {name}")))?;
    let words = std::fs::read_to_string(&path).unwrap_or_default();
    if status.success() {
        let tried = words
            .lines()
            .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
        let tried = tried.unwrap_or("no").trim();
        note(&format!("{name}: {tried} inputs in {} s", start.elapsed().as_secs()));
        return Ok(true);
    }
    let lines: Vec<&str> = words.lines().collect();
    let shown = lines.get(lines.len().saturating_sub(SHOWN)..).unwrap_or_default();
    note(&format!(
        "{name} FAILED ({status}); all its words are in {}",
        path.display()
    ));
    shown.iter().for_each(|line| eprintln!("    {line}"));
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_target_has_its_turn() {
        let files = std::fs::read_dir(root().join(FOLDER).join("fuzz_targets")).unwrap();
        let names: BTreeSet<String> = files
            .map(|file| file.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
            .collect();
        assert_eq!(names, TARGETS.map(str::to_owned).into());
    }
}
