//! The figures that are taken on all machines in turns, one machine at a time.

use std::process::Command;
use std::time::Duration;

use assay_tests::load::{self, Started};
use assay_tests::verifier::benched;
use serde::Serialize;

use crate::Outcome;
use crate::machine::{FOLDER, Machine, State};
use crate::stats::{Series, quantile, real};

/// Starts of a known program, a round.
const KNOWN: &str = "300";
/// The known program: number 1.
const PROGRAM: &str = "/root/load/p00000001";
/// First starts of a new program, a round.
const NEW: u64 = 5;
/// Bytes of such a program.
const NEW_SIZE: usize = 1 << 20;
/// Programs in a storm.
const STORM: u64 = 1000;
/// Programs in a storm that takes its time.
const FEWER: u64 = 200;
/// Bytes of each: the storm is about starting, not about hashing.
const STORM_SIZE: usize = 4096;
/// What a hardware TPM takes for an extend, more or less.
pub const SLOW: Duration = Duration::from_millis(10);

/// Where the numbers of the programs of [`first`] begin.
const FIRST: u64 = 1_000_000;
/// A figure has no more rounds.
pub const MOST_ROUNDS: u32 = 60;
/// Nor more boots.
pub const MOST_BOOTS: u32 = 20;
/// Nor a storm more rounds.
pub const MOST_STORMS: u32 = 10;

/// All that is taken in turns; what was left out is `None`.
#[derive(Debug, Default, Serialize)]
pub struct Timed {
    /// Starts of a program that was measured long ago.
    pub known: Option<Series>,
    /// First starts of programs of 1 MiB.
    pub first: Option<Series>,
    /// A thousand new programs, one after another.
    pub storm: Option<Storm>,
    /// A thousand new programs, 64 at a time, on a slow TPM.
    pub slow: Option<Storm>,
    /// The same on a TPM that is slower by as much as the machines are.
    pub scaled: Option<Storm>,
    /// On such a TPM one after another, and fewer of them.
    pub scaled_serial: Option<Storm>,
}

/// New programs, and how they are started.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Where the numbers of its programs begin.
    from: u64,
    /// How many a round.
    count: u64,
    /// How many at a time.
    jobs: u64,
}

/// A thousand, one after another.
pub const SERIAL: Plan = Plan::new(2_000_000, STORM, 1);
/// A thousand, 64 at a time.
pub const WIDE: Plan = Plan::new(3_000_000, STORM, 64);
/// The same where extends take even longer.
pub const SCALED: Plan = Plan::new(4_000_000, STORM, 64);
/// One after another where extends take even longer.
pub const SCALED_SERIAL: Plan = Plan::new(5_000_000, FEWER, 1);

impl Plan {
    const ALL: [Self; 4] = [SERIAL, WIDE, SCALED, SCALED_SERIAL];

    const fn new(from: u64, count: u64, jobs: u64) -> Self {
        Self { from, count, jobs }
    }

    /// The number of the first program of a round.
    fn begin(&self, round: u32) -> u64 {
        self.from + u64::from(round) * self.count
    }
}

/// The time that a storm took, and what it cost the TPM.
#[derive(Debug, Default, Serialize)]
pub struct Storm {
    /// Wall time, one value a round.
    pub wall: Series,
    /// Extends, one value a round.
    pub extends: Series,
    /// Processor time of the agent, in nanoseconds, one value a round.
    pub agent: Series,
}

/// Starts of one program that was measured long ago.
pub fn known(machines: &[Machine], rounds: u32) -> Outcome<Series> {
    for machine in machines {
        machine.awake(prepare_known)?;
    }
    let mut series = Series::default();
    in_turns(machines, rounds, |machine, _| {
        let started: Started = machine.load(&["again", PROGRAM, KNOWN])?;
        all_ran(machine, &started)?;
        series.push(machine.state, started.ns);
        Ok(())
    })?;
    Ok(series)
}

fn prepare_known(machine: &Machine) -> Outcome<()> {
    machine.clear()?;
    machine.make(1, 1, STORM_SIZE)?;
    let started: Started = machine.load(&["again", PROGRAM, "10"])?;
    all_ran(machine, &started)
}

/// First starts of programs of 1 MiB that no machine has seen.
pub fn first(machines: &[Machine], rounds: u32) -> Outcome<Series> {
    let mut series = Series::default();
    in_turns(machines, rounds, |machine, round| {
        let from = FIRST + u64::from(round) * NEW;
        machine.clear()?;
        machine.make(from, NEW, NEW_SIZE)?;
        let (started, _) = each(machine, from, NEW, 1)?;
        series.push(machine.state, started.ns);
        Ok(())
    })?;
    Ok(series)
}

/// New programs as planned, where every extend takes `delay` longer.
pub fn storm(machines: &[Machine], rounds: u32, plan: Plan, delay: Duration) -> Outcome<Storm> {
    let mut storm = Storm::default();
    in_turns(machines, rounds, |machine, round| {
        let from = plan.begin(round);
        machine.clear()?;
        machine.make(from, plan.count, STORM_SIZE)?;
        machine.settle()?;
        machine.slow_down(delay);
        let before = machine.agent_time()?;
        let (started, extends) = each(machine, from, plan.count, plan.jobs)?;
        machine.slow_down(Duration::ZERO);
        storm.wall.push(machine.state, vec![started.wall_ns]);
        storm.extends.push(machine.state, vec![extends]);
        let agent = machine.agent_time()?.saturating_sub(before);
        storm.agent.push(machine.state, vec![agent]);
        Ok(())
    })?;
    Ok(storm)
}

/// Everything that the figures start: number and size of each program.
pub fn programs() -> impl Iterator<Item = (u64, usize)> {
    let new = (FIRST..FIRST + u64::from(MOST_ROUNDS) * NEW).map(|number| (number, NEW_SIZE));
    let storms = Plan::ALL
        .into_iter()
        .flat_map(|plan| plan.from..plan.begin(MOST_STORMS));
    let small = storms.chain([1]).map(|number| (number, STORM_SIZE));
    new.chain(small)
}

/// How long a start takes on this machine itself, in nanoseconds, when the program that the machines have starts it: a tenth of them are
/// quicker, the rest are disturbed by what else it does.
pub fn native() -> Outcome<f64> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path().to_string_lossy();
    // The one that cargo built beside this benchmark is not optimised.
    let workload = benched("assay-load").ok_or("run it with `cargo xtask bench exec`")?;
    let run = |words: &[&str]| Command::new(&workload).args(words).output();
    let made = run(&["make", &folder, "1", "1", "4096"])?;
    let program = format!("{folder}/{}", load::name(1));
    let started = run(&["again", &program, KNOWN])?;
    if !made.status.success() || !started.status.success() {
        let complaints = [made.stderr, started.stderr].concat();
        return Err(String::from_utf8_lossy(&complaints).into());
    }
    let started: Started = serde_json::from_slice(&started.stdout)?;
    Ok(quantile(started.ns.into_iter().map(real).collect(), 0.1))
}

/// How much longer a start takes on a machine that does not measure than on this one itself.
pub fn slowdown(machines: &[Machine], native: f64) -> Outcome<f64> {
    let Some(machine) = machines.iter().find(|machine| machine.state == State::None) else {
        return Err("how slow the machines are is seen on the one that does not measure: state none is missing".into());
    };
    Ok(machine.awake(start)? / native)
}

/// How long a start of a known program takes in this machine when little disturbs it, in nanoseconds.
pub fn start(machine: &Machine) -> Outcome<f64> {
    prepare_known(machine)?;
    let started: Started = machine.load(&["again", PROGRAM, KNOWN])?;
    Ok(quantile(started.ns.into_iter().map(real).collect(), 0.1))
}

/// Starts each program once, and counts the extends until the last of them is in the PCR.
fn each(machine: &Machine, from: u64, count: u64, jobs: u64) -> Outcome<(Started, u64)> {
    machine.settle()?;
    let before = machine.extends();
    let started: Started = machine.load(&["each", FOLDER, &from.to_string(), &count.to_string(), &jobs.to_string()])?;
    all_ran(machine, &started)?;
    machine.settle()?;
    let extends = machine.extends().saturating_sub(before);
    // A machine that does not measure would make a fine figure.
    let enough = match machine.state {
        State::None => extends == 0,
        State::Ima => extends >= count,
        State::Observe | State::Hold | State::Enforce => extends >= 1,
    };
    if !enough {
        let name = machine.state.name();
        return Err(
            format!("{name}: {extends} extends for {count} new programs: it does not measure as it should").into(),
        );
    }
    Ok((started, extends))
}

fn all_ran(machine: &Machine, started: &Started) -> Outcome<()> {
    match started.refused.first() {
        None => Ok(()),
        Some((number, errno)) => {
            let (name, program) = (machine.state.name(), load::name(*number));
            let error = std::io::Error::from_raw_os_error(*errno);
            Err(format!(
                "{name}: {program} and {} more were refused: {error}",
                started.refused.len() - 1
            )
            .into())
        }
    }
}

/// Wakes one machine after another, in changing order: whatever changes with time changes for all.
fn in_turns(machines: &[Machine], rounds: u32, mut work: impl FnMut(&Machine, u32) -> Outcome<()>) -> Outcome<()> {
    for round in 0..rounds {
        let mut order: Vec<&Machine> = machines.iter().collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for machine in order {
            machine.awake(|machine| work(machine, round))?;
        }
        eprint!(".");
    }
    eprintln!();
    Ok(())
}
