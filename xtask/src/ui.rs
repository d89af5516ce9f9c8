//! What the user sees. On a terminal: one moving line for the step under way. Elsewhere: plain lines, with a sign of
//! life during long steps.

use std::cell::Cell;
use std::error::Error;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Silence that makes a reader of a log wonder.
const HEARTBEAT: Duration = Duration::from_secs(20);
/// Steps quicker than this leave no line behind on success.
const WORTH_A_LINE: Duration = Duration::from_secs(1);

/// One visible step.
pub struct Step {
    what: String,
    bar: Option<ProgressBar>,
    start: Instant,
    spoken: Cell<Instant>,
}

impl Step {
    /// Announces it.
    pub fn start(what: &str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) =
                ProgressStyle::with_template("{spinner} {prefix} ({elapsed}) {wide_msg:.dim}")
            {
                bar.set_style(style);
            }
            bar.set_prefix(what.to_owned());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        if bar.is_none() {
            eprintln!("  {what} ...");
        }
        Self {
            what: what.to_owned(),
            bar,
            start: Instant::now(),
            spoken: Cell::new(Instant::now()),
        }
    }

    /// Shows what it is at, where there is a moving line.
    pub fn say(&self, message: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(
                message
                    .chars()
                    .filter(|c| !c.is_control())
                    .collect::<String>(),
            ),
            None => self.alive(),
        }
    }

    /// To be called now and then: prints a line when nothing has been printed for long.
    pub fn alive(&self) {
        if self.bar.is_none() && self.spoken.get().elapsed() >= HEARTBEAT {
            self.spoken.set(Instant::now());
            eprintln!(
                "  {} ... {} s so far",
                self.what,
                self.start.elapsed().as_secs()
            );
        }
    }

    /// It went well.
    pub fn done(self) {
        self.end("done");
    }

    /// It did not.
    pub fn failed(self) {
        self.end("FAILED");
    }

    fn end(&self, how: &str) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        if self.start.elapsed() >= WORTH_A_LINE || how != "done" {
            eprintln!(
                "  {}: {how} ({:.1} s)",
                self.what,
                self.start.elapsed().as_secs_f64()
            );
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        // An early return must not leave a spinner behind.
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A line that stays.
pub fn note(text: &str) {
    eprintln!("  {text}");
}

/// A heading.
pub fn heading(text: &str) {
    eprintln!("== {text}");
}

/// An error with its causes.
pub fn report(error: &(dyn Error + 'static)) {
    eprintln!("error: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        eprintln!("  because: {error}");
        cause = error.source();
    }
}
