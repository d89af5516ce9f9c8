//! Durations, their quantiles, and the raw data behind them.

use std::fmt;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use assay_tests::stats::quantile;

/// What one figure was taken from, in milliseconds, in the order of measuring.
pub struct Samples {
    name: &'static str,
    values: Vec<f64>,
}

impl Samples {
    /// None yet.
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            values: Vec::new(),
        }
    }

    /// One more.
    pub fn push(&mut self, duration: Duration) {
        self.values.push(duration.as_secs_f64() * 1000.0);
    }

    /// The value that this share of the samples does not exceed.
    pub fn quantile(&self, share: f64) -> f64 {
        quantile(self.values.clone(), share)
    }

    /// Writes one value a line to `folder`.
    pub fn save(&self, folder: &Path) -> std::io::Result<()> {
        std::fs::create_dir_all(folder)?;
        let name = self.name.replace(|c: char| !c.is_ascii_alphanumeric(), "-");
        let mut file = std::io::BufWriter::new(std::fs::File::create(folder.join(format!("{name}.ms")))?);
        for value in &self.values {
            writeln!(file, "{value:.4}")?;
        }
        file.flush()
    }
}

impl fmt::Display for Samples {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:<28} p50 {:>7.3} ms   p99 {:>7.3} ms   max {:>7.3} ms   n {}",
            self.name,
            self.quantile(0.5),
            self.quantile(0.99),
            self.quantile(1.0),
            self.values.len()
        )
    }
}
