//! `cargo xtask bench exec`: what measuring adds to starting programs - without it, with the kernel's IMA, with the agent
//! in each of its modes.
//!
//! Each of them has a machine of its own, restored from one saved machine: same kernel, same disk, a TPM of the same kind.
//! One machine runs at a time, the others are paused; rounds go from machine to machine in changing order. What is
//! compared is the same work in the same round.
//!
//! Emulated, time is mostly that of the emulation. So all is done once more on machines whose clock counts instructions,
//! one a nanosecond, and stands still for nothing else: what the TPM takes, it takes in real time. A processor of today
//! executes more than one instruction a nanosecond; a microsecond by this clock is at most one of its own.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark prints its figures"
)]

mod alone;
mod approve;
mod figures;
mod log;
mod machine;
mod options;
mod report;
mod stats;

use std::collections::BTreeMap;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use assay_tests::vm::{Accelerator, Image};

use figures::Timed;
use machine::{Machine, State};
use options::{Clock, Options};
use report::Results;

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> Outcome<()> {
    let Some(options) = Options::read(std::env::args().skip(1))? else {
        println!("{}", options::HELP);
        return Ok(());
    };
    let image = Image::load()?;
    let mut results = Results {
        conditions: conditions(&image),
        ..Results::default()
    };
    for (name, value) in &results.conditions {
        println!("{name}: {value}");
    }
    results.native_ns = figures::native()?;
    let ended = measure(&image, &options, &mut results);
    // What was measured before something failed is worth keeping, too.
    let file = save(&results)?;
    for line in &results.left_out {
        println!("left out: {line}");
    }
    for line in results.summary() {
        println!("{line}");
    }
    println!();
    for row in results.rows() {
        println!("{row}");
    }
    println!("raw data: {}", file.display());
    ended
}

fn measure(image: &Image, options: &Options, results: &mut Results) -> Outcome<()> {
    if options.wants_turns() && options.clock != Clock::Instructions {
        let machines = machines(image, options, results, Machine::restore);
        results.timed = in_turns(&machines, options, options.rounds)?;
        if options.wants("scaled") && !Accelerator::detect().kvm {
            let slowdown = figures::slowdown(&machines, results.native_ns)?;
            let text = format!("a start takes {slowdown:.1} times as long as on this machine itself");
            results.conditions.insert("slowdown", text);
            step("storms, 64 at a time, on a TPM slowed down like the machines");
            let delay = figures::SLOW.mul_f64(slowdown.clamp(1.0, 50.0));
            let rounds = (options.rounds / 15).max(1);
            results.timed.scaled = Some(figures::storm(&machines, rounds, figures::SCALED, delay)?);
            step("storms, one after another, on such a TPM");
            results.timed.scaled_serial = Some(figures::storm(&machines, rounds, figures::SCALED_SERIAL, delay)?);
        }
    }
    if options.wants_turns() && options.clock != Clock::Time {
        // Nothing disturbs these: fewer rounds do.
        let rounds = options.rounds.div_ceil(3);
        let first = machines(image, options, results, Machine::boot_counting);
        results.counted = in_turns(&first, options, rounds)?;
        drop(first);
        if options.wants("known") {
            boot_again(image, options, results, rounds)?;
        }
    }
    for &state in options.states.iter().filter(|state| state.is_assay()) {
        if options.wants("flood") {
            step(&format!("floods, {}", state.name()));
            let floods = alone::flood(image, state, options.flood);
            if let Some(floods) = results.or_left_out(state, floods) {
                results.floods.insert(state, floods);
            }
        }
        if options.wants("rest") {
            step(&format!("memory and idle time, {}", state.name()));
            let rest = alone::rest(image, state, options.idle, options.records);
            if let Some(rest) = results.or_left_out(state, rest) {
                results.rests.insert(state, rest);
            }
        }
    }
    Ok(())
}

/// A start of a known program once more on machines that were booted anew: where things lie in memory differs from boot to boot, and
/// what a start costs differs with it by more than from round to round.
fn boot_again(image: &Image, options: &Options, results: &mut Results, rounds: u32) -> Outcome<()> {
    for boot in 1..options.boots {
        step(&format!("starts of a known program, boot {}", boot + 1));
        let machines = machines(image, options, results, Machine::boot_counting);
        // Machines of one boot are compared with each other.
        if machines.len() == options.states.len() {
            let again = figures::known(&machines, rounds)?;
            results.counted.known.get_or_insert_default().append(again);
        }
    }
    Ok(())
}

fn machines(
    image: &Image,
    options: &Options,
    results: &mut Results,
    start: fn(&Image, State) -> Outcome<Machine>,
) -> Vec<Machine> {
    step("starting the machines");
    let start = |&state| results.or_left_out(state, start(image, state));
    options.states.iter().filter_map(start).collect()
}

fn in_turns(machines: &[Machine], options: &Options, rounds: u32) -> Outcome<Timed> {
    let (mut timed, long) = (Timed::default(), (rounds / 6).clamp(1, figures::MOST_STORMS));
    if options.wants("known") {
        step("starts of a known program");
        timed.known = Some(figures::known(machines, rounds)?);
    }
    if options.wants("first") {
        step("first starts of programs of 1 MiB");
        timed.first = Some(figures::first(machines, rounds)?);
    }
    if options.wants("storm") {
        step("storms, one after another");
        timed.storm = Some(figures::storm(machines, long, figures::SERIAL, Duration::ZERO)?);
    }
    if options.wants("slow") {
        step("storms, 64 at a time, on a slow TPM");
        timed.slow = Some(figures::storm(machines, long, figures::WIDE, figures::SLOW)?);
    }
    Ok(timed)
}

fn conditions(image: &Image) -> BTreeMap<&'static str, String> {
    let accelerator = Accelerator::detect();
    let mut conditions = BTreeMap::from([
        ("kernel", image.kernel_release.clone()),
        ("machines", format!("2 processors, 1 GiB, {accelerator}")),
        ("qemu", version("qemu-system-x86_64")),
        ("swtpm", version("swtpm")),
        (
            "ima",
            "tcb without FILE_CHECK, loaded into the running kernel, SHA-256".to_owned(),
        ),
    ]);
    if !accelerator.kvm {
        conditions.insert(
            "mind",
            "emulated instructions take 10 to 20 times as long as real ones: differences in µs are that much too \
             large, ratios hold"
                .to_owned(),
        );
    }
    conditions
}

fn version(program: &str) -> String {
    let output = Command::new(program).arg("--version").output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    text.unwrap_or_default().lines().next().unwrap_or("unknown").to_owned()
}

/// Raw data and table, as JSON.
fn save(results: &Results) -> Outcome<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .with_file_name("target")
        .join("bench");
    std::fs::create_dir_all(&folder)?;
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let file = folder.join(format!("exec-{seconds}.json"));
    let all = serde_json::json!({ "results": results, "table": results.rows() });
    std::fs::write(&file, serde_json::to_vec(&all)?)?;
    Ok(file)
}

fn step(what: &str) {
    eprintln!("== {what}");
}
