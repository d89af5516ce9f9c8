//! `cargo xtask test`: all layers, one summary. A layer that cannot run says why, and counts as skipped.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Instant;

use clap::ValueEnum;

use crate::build::{self, Built, Profile};
use crate::fuzz::{self, Found};
use crate::image;
use crate::matrix;
use crate::package;
use crate::run::{Error, cargo, in_path, lines};
use crate::setup;
use crate::ui::{heading, note, report};
use crate::workspace::root;

/// Machines at a time: each has two virtual processors.
const MACHINES: &str = "2";

/// Tests of a layer that are tried once more. More at a time fail of something that is wrong.
const MOST_SECOND_TRIES: usize = 3;

/// A layer of tests, by what it needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Layer {
    /// Needs nothing
    Unit,
    /// Reads the test vectors beside the repository, and asks tpm2-tools about them
    Vectors,
    /// Gives whatever reads evidence bad input, for half a minute each
    Fuzz,
    /// Needs swtpm: a TPM for each test
    Tpm,
    /// Asks other people's servers: OpenBao, OpenStack Glance. Needs swtpm as well
    Peers,
    /// Needs QEMU: a machine for each test
    Vm,
    /// Needs QEMU: every attack of the attack table
    Attacks,
    /// Needs QEMU: Xen with xl, and libvirt, whose disks the hooks open; some of these come out of image stores, Glance too
    Xen,
    /// Makes the packages, reads and installs them; needs dpkg, rpm, createrepo_c, xorriso and QEMU
    Packages,
}

/// What tests in machines need.
const MACHINE_TOOLS: [&str; 9] = [
    "swtpm",
    "swtpm_setup",
    "qemu-system-x86_64",
    "qemu-img",
    "mmdebstrap",
    "objcopy",
    "tpm2_eventlog",
    "dpkg-deb",
    "rpmbuild",
];
/// And what making and reading packages needs beside that.
const PACKAGE_TOOLS: [&str; 7] = [
    "rpmsign",
    "gpg",
    "createrepo_c",
    "xorriso",
    "bsdtar",
    "qemu-x86_64",
    "apt-get",
];

impl Layer {
    /// What runs when no layer is named.
    const ALL: [Self; 9] = [
        Self::Unit,
        Self::Vectors,
        Self::Fuzz,
        Self::Tpm,
        Self::Peers,
        Self::Vm,
        Self::Attacks,
        Self::Xen,
        Self::Packages,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Vectors => "vectors",
            Self::Fuzz => "fuzz",
            Self::Tpm => "tpm",
            Self::Peers => "peers",
            Self::Vm => "vm",
            Self::Attacks => "attacks",
            Self::Xen => "xen",
            Self::Packages => "packages",
        }
    }

    /// Whether its tests restore machines.
    const fn has_machines(self) -> bool {
        matches!(self, Self::Vm | Self::Attacks | Self::Xen | Self::Packages)
    }

    /// Whether a test of it that failed is tried once more, alone: those whose TPMs and machines are emulated beside others,
    /// on a host that may be busy with more. An attack that works one time in ten works: it gets no second try.
    const fn is_tried_again(self) -> bool {
        matches!(self, Self::Tpm | Self::Vm | Self::Xen | Self::Packages)
    }

    /// Why it cannot run here, if so.
    fn obstacle(self) -> Option<String> {
        let lacks = |programs: &[&str]| {
            let missing: Vec<&str> = programs.iter().copied().filter(|program| !in_path(program)).collect();
            (!missing.is_empty()).then(|| format!("{} not installed", missing.join(", ")))
        };
        match self {
            Self::Unit => None,
            Self::Fuzz => lacks(&["c++"]),
            Self::Vectors => {
                let folder = root().join("../shared/vectors");
                let missing = (!folder.is_dir()).then(|| "../shared/vectors is not there".to_owned());
                missing.or_else(|| lacks(&["tpm2_eventlog"]))
            }
            Self::Tpm | Self::Peers => lacks(&["swtpm", "swtpm_setup", "tpm2"]),
            Self::Vm | Self::Attacks | Self::Xen => lacks(&MACHINE_TOOLS),
            Self::Packages => lacks(&[&MACHINE_TOOLS[..], &PACKAGE_TOOLS].concat()),
        }
    }

    /// Which tests belong to it: vectors and machines have targets of their own; `tpm_` starts the names of the tests
    /// that need a TPM, and `peer_` of those that ask somebody else's server, wherever they are; the rest is unit.
    fn cargo(self, filter: Option<&str>) -> Command {
        let mut command = self.targets();
        command.arg("--");
        match (self, filter) {
            (Self::Unit, filter) => command.args(["--skip", "tpm_", "--skip", "peer_"]).args(filter),
            (Self::Vectors | Self::Fuzz, filter) => command.args(filter),
            // libtest takes several filters as alternatives: a filter given stands alone.
            (Self::Tpm | Self::Peers, Some(filter)) => command.arg(filter),
            (Self::Tpm, None) => command.arg("tpm_"),
            (Self::Peers, None) => command.arg("peer_"),
            (Self::Vm | Self::Attacks | Self::Xen | Self::Packages, filter) => {
                command.args(["--test-threads", MACHINES]).args(filter)
            }
        };
        command
    }

    /// These tests of it alone, one after the other.
    fn cargo_again(self, names: &BTreeSet<String>) -> Command {
        let mut command = self.targets();
        command.args(["--", "--test-threads", "1", "--exact"]).args(names);
        command
    }

    /// The programs that hold its tests.
    fn targets(self) -> Command {
        let mut command = cargo();
        command.arg("test");
        match self {
            Self::Vm => command.args(["-p", "assay-tests", "--test", "vm"]),
            Self::Attacks => command.args(["-p", "assay-tests", "--test", "attacks"]),
            Self::Xen => command.args(["-p", "assay-tests", "--test", "xen"]),
            Self::Packages => command.args(["-p", "assay-tests", "--test", "packages"]),
            Self::Vectors => command.args(["-p", "assay-tests", "--test", "vectors"]),
            // The samples; the targets themselves are not cargo's to run.
            Self::Fuzz => command.args(["-p", "assay-fuzz"]),
            // The fuzz targets want another form of what they test.
            Self::Unit => command.args(["--workspace", "--exclude", "assay-fuzz", "--no-fail-fast"]),
            // Without the examples in documentation: those are unit tests. Of the whole workspace, though few packages have any: other
            // packages together would be other features, and another build.
            Self::Tpm | Self::Peers => {
                command.args(["--workspace", "--exclude", "assay-fuzz", "--no-fail-fast", "--tests"])
            }
        };
        command
    }
}

/// How a layer went.
#[derive(Debug, Default)]
struct Outcome {
    passed: u64,
    failed: u64,
    ignored: u64,
    seconds: u64,
    /// Why it did not run.
    skipped: Option<String>,
    /// It failed to build, or a test process died.
    broken: bool,
    /// A test process has begun, and not ended.
    open: bool,
    failures: BTreeSet<String>,
    /// Failed first, and passed when they were tried again.
    second: BTreeSet<String>,
}

/// Runs the layers named, or all.
pub fn run(layers: &[Layer], filter: Option<&str>) -> Result<(), Error> {
    let layers = chosen(layers);
    if layers.contains(&Layer::Attacks) && filter.is_none() {
        matrix::clear()?;
    }
    let built = prepare();
    if let Err(error) = &built {
        report(error);
    }
    let mut outcomes = Vec::new();
    for layer in layers {
        heading(&format!("layer {}", layer.name()));
        let outcome = match (layer.obstacle(), &built) {
            (Some(why), _) => Outcome {
                skipped: Some(why),
                ..Outcome::default()
            },
            (None, Err(_)) if layer.has_machines() => Outcome {
                skipped: Some("set-up or build failed, see above".to_owned()),
                ..Outcome::default()
            },
            (None, built) => run_layer(layer, built.as_ref().ok(), filter)?,
        };
        if let Some(why) = &outcome.skipped {
            note(&format!("skipped: {why}"));
        }
        outcomes.push((layer, outcome));
    }
    summary(&outcomes)
}

/// What the attacks found, after [`run`]: printed, and compared with the document, or written to it.
pub fn show_matrix(layers: &[Layer], filter: Option<&str>, update: bool) -> Result<(), Error> {
    if chosen(layers).contains(&Layer::Attacks) {
        matrix::show(filter.is_none(), update)
    } else {
        Err(Error::Missing(
            "the attack table comes from the layer attacks".to_owned(),
        ))
    }
}

fn chosen(layers: &[Layer]) -> BTreeSet<Layer> {
    if layers.is_empty() {
        Layer::ALL.into()
    } else {
        layers.iter().copied().collect()
    }
}

fn prepare() -> Result<Built, Error> {
    let tools = setup::install()?;
    build::all(&tools, Profile::Debug)
}

fn run_layer(layer: Layer, built: Option<&Built>, filter: Option<&str>) -> Result<Outcome, Error> {
    let start = Instant::now();
    if let Some(built) = built.filter(|_| layer.has_machines()) {
        match layer {
            Layer::Xen => image::prepare_toolstacks(built)?,
            _ => image::prepare_saved(built)?,
        }
    }
    let mut tests = layer.cargo(filter);
    configure(layer, &mut tests)?;
    let mut outcome = tested(&mut tests)?;
    if layer.is_tried_again() && (1..=MOST_SECOND_TRIES).contains(&outcome.failures.len()) {
        note("what failed is tried once more, alone");
        let mut tests = layer.cargo_again(&outcome.failures);
        configure(layer, &mut tests)?;
        let second = tested(&mut tests)?;
        outcome.tried_again(second);
    }
    if layer == Layer::Fuzz && outcome.good() {
        outcome.add(fuzz(filter)?);
    }
    outcome.seconds = start.elapsed().as_secs();
    Ok(outcome)
}

/// Tells the tests where the things are that their layer needs, made here if need be.
fn configure(layer: Layer, tests: &mut Command) -> Result<(), Error> {
    match layer {
        Layer::Packages => package::for_tests(tests),
        // Xen's tests have images out of Glance.
        Layer::Peers | Layer::Xen => {
            setup::install_servers()?;
            setup::SERVERS.iter().try_for_each(|server| server.configure(tests))
        }
        _ => Ok(()),
    }
}

/// Runs these tests, printing what they print.
fn tested(tests: &mut Command) -> Result<Outcome, Error> {
    let mut outcome = Outcome::default();
    let status = lines(tests, |line| {
        outcome.read(line);
        println!("{line}");
    })?;
    outcome.broken |= outcome.open || !status.success() && outcome.failed == 0;
    Ok(outcome)
}

/// Runs the fuzz targets whose names contain this.
fn fuzz(filter: Option<&str>) -> Result<Found, Error> {
    let tools = setup::install()?;
    let wanted = |name: &&str| filter.is_none_or(|part| name.contains(part));
    let targets: Vec<&str> = fuzz::TARGETS.into_iter().filter(wanted).collect();
    fuzz::run(&tools.fuzzer, &targets, fuzz::SHORT)
}

impl Outcome {
    /// Takes what matters from a line that cargo or libtest printed.
    fn read(&mut self, line: &str) {
        if line.starts_with("running ") && line.trim_end_matches('s').ends_with(" test") {
            // One that died before had no result.
            self.broken |= self.open;
            self.open = true;
        } else if let Some(rest) = line.strip_prefix("test result: ") {
            self.open = false;
            for part in rest.split([';', '.']) {
                let mut words = part.split_whitespace();
                let (Some(Ok(count)), Some(what)) = (words.next().map(str::parse::<u64>), words.next()) else {
                    continue;
                };
                match what {
                    "passed" => self.passed = self.passed.saturating_add(count),
                    "failed" => self.failed = self.failed.saturating_add(count),
                    "ignored" => self.ignored = self.ignored.saturating_add(count),
                    _ => {}
                }
            }
        } else if let Some(name) = line
            .strip_prefix("test ")
            .and_then(|rest| rest.strip_suffix(" ... FAILED"))
        {
            self.failures.insert(name.to_owned());
        }
    }

    /// Takes how the failures went when they were tried again. What did not run then has failed for good.
    fn tried_again(&mut self, second: Self) {
        let again = u64::try_from(self.failures.len()).unwrap_or(u64::MAX);
        if !self.broken && self.failed == again && second.good() && second.passed == again {
            self.passed += again;
            self.failed = 0;
            self.second = std::mem::take(&mut self.failures);
        }
    }

    fn add(&mut self, found: Found) {
        self.passed += found.passed;
        self.failed += u64::try_from(found.failed.len()).unwrap_or(u64::MAX);
        self.failures.extend(found.failed);
    }

    fn good(&self) -> bool {
        self.failed == 0 && !self.broken
    }
}

fn summary(outcomes: &[(Layer, Outcome)]) -> Result<(), Error> {
    heading("summary");
    println!("layer     passed  failed  ignored  seconds");
    for (layer, outcome) in outcomes {
        match &outcome.skipped {
            Some(why) => println!("{:<8}  skipped: {why}", layer.name()),
            None => println!(
                "{:<8}  {:>6}  {:>6}  {:>7}  {:>7}{}",
                layer.name(),
                outcome.passed,
                outcome.failed,
                outcome.ignored,
                outcome.seconds,
                if outcome.broken { "  BROKEN: see above" } else { "" }
            ),
        }
        for name in &outcome.failures {
            println!("          failed: {name}");
        }
        for name in &outcome.second {
            println!("          failed first, and passed alone: {name}");
        }
    }
    let names = |list: Vec<&str>| list.join(", ");
    let bad: Vec<&str> = outcomes
        .iter()
        .filter(|(_, outcome)| !outcome.good())
        .map(|(layer, _)| layer.name())
        .collect();
    if !bad.is_empty() {
        return Err(Error::Tests(format!("tests failed in: {}", names(bad))));
    }
    // The vectors lie outside this repository; a checkout elsewhere does not have them.
    let must_run = std::env::var_os("CI").is_some_and(|value| value == "true");
    let absent: Vec<&str> = outcomes
        .iter()
        .filter(|(layer, outcome)| outcome.skipped.is_some() && *layer != Layer::Vectors)
        .map(|(layer, _)| layer.name())
        .collect();
    if must_run && !absent.is_empty() {
        return Err(Error::Tests(format!(
            "CI=true, and these were skipped: {}",
            names(absent)
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_what_libtest_reports() {
        let mut outcome = Outcome::default();
        outcome.read("test a::b ... ok");
        outcome.read("test a::c ... FAILED");
        outcome
            .read("test result: FAILED. 12 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 3.00s");
        outcome.read("test result: ok. 5 passed; 0 failed; 0 ignored; 0 measured; 1 filtered out; finished in 0.01s");
        assert_eq!((outcome.passed, outcome.failed, outcome.ignored), (17, 1, 2));
        assert_eq!(outcome.failures.into_iter().collect::<Vec<_>>(), ["a::c"]);
    }

    fn read(lines: &[&str]) -> Outcome {
        let mut outcome = Outcome::default();
        lines.iter().for_each(|line| outcome.read(line));
        outcome.broken |= outcome.open;
        outcome
    }

    const FIRST: [&str; 3] = [
        "running 9 tests",
        "test a::c ... FAILED",
        "test result: FAILED. 8 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 3.00s",
    ];

    #[test]
    fn a_second_try_that_passes_is_counted_and_told() {
        let mut outcome = read(&FIRST);
        outcome.tried_again(read(&[
            "running 1 test",
            "test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 8 filtered out; finished in 1.00s",
        ]));
        assert!(outcome.good(), "{outcome:?}");
        assert_eq!((outcome.passed, outcome.failed), (9, 0));
        assert!(outcome.second.contains("a::c"), "{outcome:?}");
    }

    #[test]
    fn a_second_try_that_fails_or_does_not_run_changes_nothing() {
        let result = |counts: &str| format!("test result: ok. {counts}; 0 ignored");
        for second in ["0 passed; 1 failed", "0 passed; 0 failed"] {
            let mut outcome = read(&FIRST);
            outcome.tried_again(read(&["running 1 test", &result(second)]));
            assert!(!outcome.good(), "{second}: {outcome:?}");
            assert!(outcome.failures.contains("a::c"), "{second}: {outcome:?}");
        }
    }

    #[test]
    fn a_test_process_that_died_is_no_failed_test_that_can_be_tried_again() {
        for lines in [
            [&["running 4 tests"][..], &FIRST].concat(),
            [&FIRST[..], &["running 4 tests"]].concat(),
        ] {
            let mut outcome = read(&lines);
            assert!(outcome.broken, "{lines:?}");
            outcome.tried_again(read(&["running 1 test", "test result: ok. 1 passed; 0 failed"]));
            assert!(!outcome.good(), "{lines:?}");
        }
    }
}
