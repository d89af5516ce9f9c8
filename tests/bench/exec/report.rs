//! The figures as a table: measured, beside IMA, limit, met or not; and everything behind them as JSON.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use crate::Outcome;
use crate::alone::{Flood, Rest};
use crate::figures::{Storm, Timed};
use crate::machine::State;
use crate::stats::{Series, median, quantile, real};

/// Everything that was measured; what was left out is `None` or empty.
#[derive(Debug, Default, Serialize)]
pub struct Results {
    /// Under which conditions.
    pub conditions: BTreeMap<&'static str, String>,
    /// How long a start takes on this machine itself, in nanoseconds.
    pub native_ns: f64,
    /// Timed by a clock that runs as ours does.
    pub timed: Timed,
    /// Timed by a clock that counts instructions.
    pub counted: Timed,
    /// Floods, by the agent's mode.
    pub floods: BTreeMap<State, Vec<Flood>>,
    /// Agents with nothing to do, by mode.
    pub rests: BTreeMap<State, Rest>,
    /// What could not be measured, and why.
    pub left_out: Vec<String>,
}

/// One line of the table.
#[derive(Debug, Serialize)]
pub struct Row {
    figure: String,
    state: State,
    measured: String,
    ima: String,
    limit: String,
    met: Option<bool>,
}

impl Results {
    /// The value, or a note that this state is left out here: the other figures are worth having all the same.
    pub fn or_left_out<T>(&mut self, state: State, outcome: Outcome<T>) -> Option<T> {
        let note = |error| {
            let line = format!("{}: {error}", state.name());
            eprintln!("{line}");
            self.left_out.push(line);
        };
        outcome.map_err(note).ok()
    }

    /// The table.
    pub fn rows(&self) -> Vec<Row> {
        let mut rows = timed(&self.timed, "");
        rows.extend(timed(&self.counted, ", by instructions"));
        rows.extend(self.at_own_pace());
        rows.extend(
            self.floods
                .iter()
                .flat_map(|(&state, floods)| floods.iter().map(move |one| flood(state, one))),
        );
        rows.extend(
            self.rests
                .iter()
                .flat_map(|(&state, one)| rest(state, one, self.native_ns)),
        );
        rows
    }

    /// What the instructions that are added to a start take at the pace at which this machine itself does a whole start:
    /// an estimate of the real thing.
    fn at_own_pace(&self) -> Vec<Row> {
        let Some(series) = &self.counted.known else {
            return Vec::new();
        };
        let whole = series.quantile(State::None, 0.5);
        let scaled = |values: Vec<f64>| median(&values) * self.native_ns / whole / 1e3;
        let ima = scaled(series.added(State::Ima, State::None));
        let row = |state| {
            let added = scaled(series.added(state, State::None));
            Row {
                figure: "the same, where a whole start takes as long as on this machine itself".to_owned(),
                state,
                measured: format!("{added:+.2} µs of {:.1} µs", self.native_ns / 1e3),
                ima: format!("{ima:+.2} µs"),
                limit: "1 µs, and IMA's + 0.5 µs".to_owned(),
                met: (added.is_finite() && ima.is_finite()).then_some(added <= 1.0 && added <= ima + 0.5),
            }
        };
        assay(series).map(row).collect()
    }

    /// Median and 99th percentile of everything that was timed.
    pub fn summary(&self) -> Vec<String> {
        let mut lines = summary(&self.timed, "");
        lines.extend(summary(&self.counted, ", by instructions"));
        lines
    }
}

fn summary(timed: &Timed, clock: &str) -> Vec<String> {
    let storm = |storm: &'static str| (storm, 1e6, "ms");
    let start = |start: &'static str| (start, 1e3, "µs");
    let named = [
        (start("start of a known program"), timed.known.as_ref()),
        (start("first start of a program of 1 MiB"), timed.first.as_ref()),
        (
            storm("1,000 one after another"),
            timed.storm.as_ref().map(|storm| &storm.wall),
        ),
        (
            storm("1,000 on a slow TPM, 64 at a time"),
            timed.slow.as_ref().map(|storm| &storm.wall),
        ),
        (
            storm("1,000 on a slower TPM, 64 at a time"),
            timed.scaled.as_ref().map(|storm| &storm.wall),
        ),
        (
            storm("200 on a slower TPM, one after another"),
            timed.scaled_serial.as_ref().map(|storm| &storm.wall),
        ),
    ];
    let mut lines = Vec::new();
    for ((name, unit, word), series) in named {
        let Some(series) = series else { continue };
        for state in series.states() {
            lines.push(format!(
                "{:<52} {:<8} p50 {:>10.1} {word}   p99 {:>10.1} {word}",
                format!("{name}{clock}"),
                state.name(),
                series.quantile(state, 0.5) / unit,
                series.quantile(state, 0.99) / unit
            ));
        }
    }
    lines
}

fn timed(timed: &Timed, clock: &str) -> Vec<Row> {
    let mut rows = Vec::new();
    rows.extend(timed.known.iter().flat_map(known));
    rows.extend(timed.first.iter().flat_map(first));
    if let Some(storm) = &timed.storm {
        rows.extend(walls("1,000 new programs, one after another", storm, 1.15));
    }
    if let Some(storm) = &timed.slow {
        let figure = "1,000 new programs, 64 at a time, extends of 10 ms more";
        rows.extend(walls(figure, storm, 0.05));
        rows.extend(extends(storm));
    }
    if let Some(storm) = &timed.scaled {
        let figure = "1,000 new programs, 64 at a time, extends of 10 ms more as these machines feel them";
        rows.extend(walls(figure, storm, 0.05));
        rows.extend(extends(storm));
    }
    if let Some(storm) = &timed.scaled_serial {
        let figure = "200 new programs, one after another, extends of 10 ms more as these machines feel them";
        rows.extend(walls(figure, storm, 1.15));
    }
    for row in &mut rows {
        row.figure.push_str(clock);
    }
    rows
}

fn assay(series: &Series) -> impl Iterator<Item = State> {
    series.states().filter(|state| state.is_assay())
}

/// A difference with the range in which the middle half of the rounds lies.
fn spread(values: &[f64], unit: f64, word: &str) -> String {
    let at = |share| quantile(values.to_vec(), share) / unit;
    format!("{:+.2} {word} ({:+.2} to {:+.2})", at(0.5), at(0.25), at(0.75))
}

fn known(series: &Series) -> Vec<Row> {
    let ima = series.added(State::Ima, State::None);
    let row = |state| {
        let (added, beside) = (series.added(state, State::None), series.added(state, State::Ima));
        Row {
            figure: "added to the start of a known program".to_owned(),
            state,
            measured: spread(&added, 1e3, "µs"),
            ima: spread(&ima, 1e3, "µs"),
            limit: "1 µs, and IMA's + 0.5 µs".to_owned(),
            met: met(median(&added) <= 1000.0 && median(&beside) <= 500.0, &[&added, &beside]),
        }
    };
    assay(series).map(row).collect()
}

fn first(series: &Series) -> Vec<Row> {
    let ima = series.added(State::Ima, State::None);
    let row = |state| {
        let beside = series.added(state, State::Ima);
        let limited = state == State::Hold;
        Row {
            figure: "added to the first start of a program of 1 MiB".to_owned(),
            state,
            measured: format!(
                "{}; {:.2} x IMA's start",
                spread(&series.added(state, State::None), 1e3, "µs"),
                median(&series.ratio(state, State::Ima))
            ),
            ima: spread(&ima, 1e3, "µs"),
            limit: if limited { "IMA's + 60 µs" } else { "" }.to_owned(),
            met: met(median(&beside) <= 60_000.0, &[&beside]).filter(|_| limited),
        }
    };
    assay(series).map(row).collect()
}

fn walls(figure: &str, storm: &Storm, limit: f64) -> Vec<Row> {
    let row = |state| {
        let ratio = storm.wall.ratio(state, State::Ima);
        Row {
            figure: figure.to_owned(),
            state,
            measured: format!(
                "{:.0} ms; {:.3} x IMA; the agent's own time {:.0} ms",
                storm.wall.quantile(state, 0.5) / 1e6,
                median(&ratio),
                storm.agent.quantile(state, 0.5) / 1e6
            ),
            ima: format!("{:.0} ms", storm.wall.quantile(State::Ima, 0.5) / 1e6),
            limit: if state == State::Hold {
                format!("{limit} x IMA")
            } else {
                String::new()
            },
            met: met(median(&ratio) <= limit, &[&ratio]).filter(|_| state == State::Hold),
        }
    };
    assay(&storm.wall).map(row).collect()
}

fn extends(storm: &Storm) -> Vec<Row> {
    let middle = |state| storm.extends.quantile(state, 0.5);
    let row = |state| Row {
        figure: "extends for them".to_owned(),
        state,
        measured: format!("{:.0}", middle(state)),
        ima: format!("{:.0}", middle(State::Ima)),
        limit: "40".to_owned(),
        met: Some(middle(state) <= 40.0),
    };
    assay(&storm.extends).map(row).collect()
}

fn flood(state: State, flood: &Flood) -> Row {
    let made = &flood.made;
    let (limit, good) = if state == State::Observe {
        ("every loss recorded", flood.unexplained() == 0)
    } else {
        ("0 unmeasured", flood.unmeasured == 0 && flood.unexplained() == 0)
    };
    Row {
        figure: format!("flood of {}", flood.of),
        state,
        measured: format!(
            "{}/s for {:.0} s: {} ran ({} new), {} refused, {} logged, {} counted as lost, {} of the new unmeasured, {} missing without a word",
            flood.rate(),
            real(made.wall_ns) / 1e9,
            made.done,
            made.new.len(),
            made.refused,
            flood.logged,
            flood.lost,
            flood.unmeasured,
            flood.unexplained()
        ),
        ima: String::new(),
        limit: limit.to_owned(),
        met: Some(good),
    }
}

fn rest(state: State, rest: &Rest, native_ns: f64) -> [Row; 3] {
    let grown = real(rest.full_kib) - real(rest.start_kib);
    let busy = real(rest.busy_ns) / real(rest.idle_ns.max(1)) * 100.0;
    let scaled = busy * native_ns / rest.known_ns;
    let row = |figure: String, measured, limit: &str, good| Row {
        figure,
        state,
        measured,
        ima: String::new(),
        limit: limit.to_owned(),
        met: Some(good),
    };
    [
        row(
            format!("agent's memory at {} records", rest.events),
            format!("{} KiB at its start, {grown:+.0} KiB", rest.start_kib),
            "+16 MiB",
            grown <= 16.0 * 1024.0,
        ),
        row(
            "agent's processor time when idle".to_owned(),
            format!("{busy:.3} %"),
            "0.05 %",
            busy <= 0.05,
        ),
        row(
            "the same, where a start takes as long as on this machine itself".to_owned(),
            format!("{scaled:.3} %"),
            "0.05 %",
            scaled <= 0.05,
        ),
    ]
}

/// No verdict without values on both sides.
fn met(good: bool, values: &[&[f64]]) -> Option<bool> {
    values.iter().all(|values| !values.is_empty()).then_some(good)
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = match self.met {
            Some(true) => "met",
            Some(false) => "NOT met",
            None => "",
        };
        write!(f, "{} [{}]: {}", self.figure, self.state.name(), self.measured)?;
        if !self.ima.is_empty() {
            write!(f, "; IMA {}", self.ima)?;
        }
        if !self.limit.is_empty() {
            write!(f, "; at most {}", self.limit)?;
        }
        if !verdict.is_empty() {
            write!(f, ": {verdict}")?;
        }
        Ok(())
    }
}
