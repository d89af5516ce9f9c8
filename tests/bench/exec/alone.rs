//! What is taken of the agent alone: a flood, memory and idle time. No other machine runs meanwhile.

use std::time::Duration;

use assay_evidence::digest::Sha256Digest;
use assay_tests::load::Flooded;
use assay_tests::tiny;
use assay_tests::vm::Image;
use serde::Serialize;

use crate::log::Log;
use crate::machine::{FOLDER, Machine, State};
use crate::{Outcome, figures};

/// Loads a second that a flood aims at.
const RATE: u64 = 10_000;
/// It lasts so many seconds at most.
pub const LONGEST: u64 = 60;
/// Programs at a time.
const JOBS: u64 = 8;
/// Every so many-th of them is new.
const NEW: u64 = 20;
/// Numbers of a flood's programs: no other figure's.
const FROM: u64 = 10_000_000;
/// Bytes of a program that a flood makes.
const SIZE: usize = 4096;
/// Content of the file that is mapped again and again.
pub const MAPPED: [u8; 4096] = [0; 4096];
/// Loads a second while they are made: few enough that none is lost.
const CALM: &str = "2500";

/// What became of a flood.
#[derive(Debug, Serialize)]
pub struct Flood {
    /// What was flooded with: `programs` or `mappings`.
    pub of: &'static str,
    /// What the workload says.
    pub made: Flooded,
    /// Loads in the log afterwards, those before the flood not counted.
    pub logged: u64,
    /// Loads that the log says are missing from it.
    pub lost: u64,
    /// Other violations in it.
    pub violations: Vec<String>,
    /// New programs that ran and whose digest is not in the log.
    pub unmeasured: u64,
}

impl Flood {
    /// Loads that ran and of which the log says nothing at all, not even that they are missing.
    pub fn unexplained(&self) -> u64 {
        let missing = match self.of {
            // Each of them is new.
            "mappings" => self.made.done.saturating_sub(self.logged),
            _ => self.unmeasured,
        };
        missing.saturating_sub(self.lost)
    }

    /// Loads a second.
    pub fn rate(&self) -> u64 {
        self.made.done.saturating_mul(1_000_000_000) / self.made.wall_ns.max(1)
    }
}

/// Programs for so many seconds, most of them known, then mappings of a file that is measured each time.
pub fn flood(image: &Image, state: State, seconds: u64) -> Outcome<Vec<Flood>> {
    let machine = Machine::restore(image, state)?;
    let [from, rate, seconds, jobs, new] = [FROM, RATE, seconds, JOBS, NEW].map(|number| number.to_string());
    machine.awake(|machine| {
        machine.clear()?;
        let mut floods = Vec::new();
        for of in ["programs", "mappings"] {
            let before = Log::read(machine)?;
            let made: Flooded = if of == "programs" {
                machine.load(&["flood", FOLDER, &from, &rate, &seconds, &jobs, &new])?
            } else {
                machine.load(&["map", "/root/load/mapped", &rate, &seconds])?
            };
            machine.settle()?;
            let log = Log::read(machine)?;
            let digest = |number: &u64| Sha256Digest::of(&tiny::program(SIZE, *number));
            let unmeasured = made
                .new
                .iter()
                .map(digest)
                .filter(|digest| !log.digests.contains(digest))
                .count();
            floods.push(Flood {
                of,
                logged: log.loads.saturating_sub(before.loads),
                lost: log.lost.saturating_sub(before.lost),
                violations: log.violations,
                unmeasured: u64::try_from(unmeasured)?,
                made,
            });
        }
        Ok(floods)
    })
}

/// What a flood starts at most: number and size of each program.
pub fn programs() -> impl Iterator<Item = (u64, usize)> {
    (0..=RATE * LONGEST / NEW).map(|turn| (FROM + turn * NEW, SIZE))
}

/// What an agent takes that has nothing to do.
#[derive(Debug, Serialize)]
pub struct Rest {
    /// Resident memory after its start, in KiB.
    pub start_kib: u64,
    /// The same with as many events in the log as were wanted, or more.
    pub full_kib: u64,
    /// How many those were.
    pub events: u64,
    /// Processor time of all its threads in a quiet while, in nanoseconds.
    pub busy_ns: u64,
    /// How long that was, in nanoseconds.
    pub idle_ns: u64,
    /// How long a start of a known program takes in this machine, in nanoseconds.
    pub known_ns: f64,
}

/// Memory before and after so many records, and processor time while nothing happens.
pub fn rest(image: &Image, state: State, idle: Duration, records: u64) -> Outcome<Rest> {
    let machine = Machine::restore(image, state)?;
    machine.awake(|machine| {
        let start_kib = resident(machine)?;
        let (busy, begin) = (machine.agent_time()?, uptime(machine)?);
        std::thread::sleep(idle);
        let (busy_ns, idle_ns) = (machine.agent_time()? - busy, uptime(machine)? - begin);
        let known_ns = figures::start(machine)?;
        let mut events = Log::read(machine)?.events;
        for _ in 0..20 {
            if events >= records {
                break;
            }
            let _: Flooded = machine.load(&["map", "/root/mapped", CALM, "10"])?;
            machine.settle()?;
            events = Log::read(machine)?.events;
        }
        Ok(Rest {
            start_kib,
            full_kib: resident(machine)?,
            events,
            busy_ns,
            idle_ns,
            known_ns,
        })
    })
}

fn resident(machine: &Machine) -> Outcome<u64> {
    let status = machine
        .guest()
        .get_text(&format!("/proc/{}/status", machine.agent()?.pid()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    Ok(number.ok_or("no VmRSS in /proc")?.parse()?)
}

/// The machine's own time, in nanoseconds.
fn uptime(machine: &Machine) -> Outcome<u64> {
    let text = machine.guest().get_text("/proc/uptime")?;
    let seconds: f64 = text.split_whitespace().next().unwrap_or_default().parse()?;
    Ok(u64::try_from(Duration::try_from_secs_f64(seconds)?.as_nanos())?)
}
