//! Quantiles, and differences between machines that were measured in turns.

use std::collections::BTreeMap;

pub use assay_tests::stats::quantile;
use serde::Serialize;

use crate::machine::State;

/// One figure's raw data: for each state, one list of values a round, in nanoseconds.
#[derive(Debug, Default, Clone, Serialize)]
pub struct Series(BTreeMap<State, Vec<Vec<u64>>>);

impl Series {
    /// One more round of a state.
    pub fn push(&mut self, state: State, round: Vec<u64>) {
        self.0.entry(state).or_default().push(round);
    }

    /// The rounds of `other` after these.
    pub fn append(&mut self, other: Self) {
        for (state, mut rounds) in other.0 {
            self.0.entry(state).or_default().append(&mut rounds);
        }
    }

    /// The states that were measured.
    pub fn states(&self) -> impl Iterator<Item = State> {
        self.0.keys().copied()
    }

    /// The value that this share of all values of all rounds does not exceed; NaN where nothing was measured.
    pub fn quantile(&self, state: State, share: f64) -> f64 {
        let all = self.0.get(&state).into_iter().flatten().flatten();
        quantile(all.map(|&ns| real(ns)).collect(), share)
    }

    /// Round by round, the median in `state` less that in `base`: what else this machine does meets both.
    pub fn added(&self, state: State, base: State) -> Vec<f64> {
        self.rounds(state, base).map(|(one, other)| one - other).collect()
    }

    /// Round by round, the median in `state` as a share of that in `base`.
    pub fn ratio(&self, state: State, base: State) -> Vec<f64> {
        self.rounds(state, base).map(|(one, other)| one / other).collect()
    }

    fn rounds(&self, state: State, base: State) -> impl Iterator<Item = (f64, f64)> {
        let medians = |state| {
            let rounds = self.0.get(&state).into_iter().flatten();
            rounds.map(|round| quantile(round.iter().map(|&ns| real(ns)).collect(), 0.5))
        };
        medians(state).zip(medians(base))
    }
}

/// The middle one.
pub fn median(values: &[f64]) -> f64 {
    quantile(values.to_vec(), 0.5)
}

/// A count or a time as a number to calculate with.
#[expect(clippy::cast_precision_loss, reason = "nanoseconds of minutes, far below 2^53")]
pub fn real(value: u64) -> f64 {
    value as f64
}
