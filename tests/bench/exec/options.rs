//! The words on the command line.

use std::time::Duration;

use crate::machine::State;
use crate::{Outcome, alone, figures};

/// What `--help` prints.
pub const HELP: &str = "\
cargo xtask bench exec [-- WORDS]: what measuring adds to starting programs, in test machines

  --rounds N        rounds of the short figures (30); the storms get a sixth of it
  --boots N         boots over which the start of a known program is taken by instructions (5)
  --quick           a look: 4 rounds, 1 boot, 10 s of flood, 10 s of idling, 10,000 records
  --states A,B      of none, ima, observe, hold, enforce (all)
  --figures A,B     of known, first, storm, slow, scaled, flood, rest (all)
  --clock A         time, instructions or both (both)";

/// What can be measured.
const FIGURES: [&str; 7] = ["known", "first", "storm", "slow", "scaled", "flood", "rest"];

/// By what clock machines are timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// One that runs as ours does.
    Time,
    /// One that counts instructions.
    Instructions,
    /// Once by each.
    Both,
}

/// What shall be measured, and how long.
#[derive(Debug)]
pub struct Options {
    /// Rounds of the short figures.
    pub rounds: u32,
    /// Boots of the machines that count instructions.
    pub boots: u32,
    /// Seconds of each flood.
    pub flood: u64,
    /// How long an idle agent is watched.
    pub idle: Duration,
    /// Records that the log shall hold when the agent's memory is looked at.
    pub records: u64,
    /// The machines.
    pub states: Vec<State>,
    /// Their clock.
    pub clock: Clock,
    figures: Vec<String>,
}

impl Options {
    /// Reads them; `None`: only help is wanted.
    pub fn read(words: impl Iterator<Item = String>) -> Outcome<Option<Self>> {
        let mut options = Self {
            rounds: 30,
            boots: 5,
            flood: alone::LONGEST,
            idle: Duration::from_secs(60),
            records: 100_000,
            states: State::ALL.to_vec(),
            clock: Clock::Both,
            figures: FIGURES.map(str::to_owned).to_vec(),
        };
        let mut words = words;
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or_else(|| format!("{word} wants a value\n{HELP}"));
            match word.as_str() {
                // What cargo adds.
                "--bench" => {}
                "--help" => return Ok(None),
                "--quick" => {
                    options.rounds = 4;
                    options.boots = 1;
                    options.flood = 10;
                    options.idle = Duration::from_secs(10);
                    options.records = 10_000;
                }
                "--rounds" => options.rounds = value()?.parse::<u32>()?.clamp(1, figures::MOST_ROUNDS),
                "--boots" => options.boots = value()?.parse::<u32>()?.clamp(1, figures::MOST_BOOTS),
                "--states" => options.states = value()?.split(',').map(state).collect::<Outcome<_>>()?,
                "--figures" => options.figures = value()?.split(',').map(figure).collect::<Outcome<_>>()?,
                "--clock" => options.clock = clock(&value()?)?,
                _ => return Err(format!("{word} means nothing here\n{HELP}").into()),
            }
        }
        Ok(Some(options))
    }

    /// Shall this be measured?
    pub fn wants(&self, figure: &str) -> bool {
        self.figures.iter().any(|one| one == figure)
    }

    /// Is anything of it measured in turns?
    pub fn wants_turns(&self) -> bool {
        ["known", "first", "storm", "slow", "scaled"]
            .iter()
            .any(|figure| self.wants(figure))
    }
}

fn clock(word: &str) -> Outcome<Clock> {
    match word {
        "time" => Ok(Clock::Time),
        "instructions" => Ok(Clock::Instructions),
        "both" => Ok(Clock::Both),
        _ => Err(format!("{word} is no clock\n{HELP}").into()),
    }
}

fn state(word: &str) -> Outcome<State> {
    let found = State::ALL.into_iter().find(|state| state.name() == word);
    found.ok_or_else(|| format!("{word} is no state of a machine\n{HELP}").into())
}

fn figure(word: &str) -> Outcome<String> {
    if FIGURES.contains(&word) {
        return Ok(word.to_owned());
    }
    Err(format!("{word} is no figure\n{HELP}").into())
}
