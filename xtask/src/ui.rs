//! What the user sees. On a terminal: one moving line for the step under way. Elsewhere: plain lines, with a sign of
//! life during long steps.

use std::error::Error;
use std::io::IsTerminal;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Silence that makes a reader of a log wonder.
const HEARTBEAT: Duration = Duration::from_secs(20);
/// Steps quicker than this leave no line behind on success.
const WORTH_A_LINE: Duration = Duration::from_secs(1);

/// One visible step.
pub struct Step {
    what: String,
    start: Instant,
    shown: Shown,
}

enum Shown {
    /// On a terminal.
    Line(ProgressBar),
    /// Elsewhere. Dropping it ends the thread that says at times that the step is still under way.
    Plain { _alive: Sender<()> },
}

impl Step {
    /// Announces it.
    pub fn start(what: &str) -> Self {
        let start = Instant::now();
        let shown = if std::io::stderr().is_terminal() {
            moving_line(what)
        } else {
            plain_lines(what, start)
        };
        Self {
            what: what.to_owned(),
            start,
            shown,
        }
    }

    /// Shows what it is at, where there is a moving line.
    pub fn say(&self, message: &str) {
        if let Shown::Line(bar) = &self.shown {
            bar.set_message(message.chars().filter(|c| !c.is_control()).collect::<String>());
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
        if let Shown::Line(bar) = &self.shown {
            bar.finish_and_clear();
        }
        if self.start.elapsed() >= WORTH_A_LINE || how != "done" {
            eprintln!("  {}: {how} ({:.1} s)", self.what, self.start.elapsed().as_secs_f64());
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        // An early return must not leave a spinner behind.
        if let Shown::Line(bar) = &self.shown {
            bar.finish_and_clear();
        }
    }
}

fn moving_line(what: &str) -> Shown {
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix} ({elapsed}) {wide_msg:.dim}") {
        bar.set_style(style);
    }
    bar.set_prefix(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(120));
    Shown::Line(bar)
}

fn plain_lines(what: &str, start: Instant) -> Shown {
    let (alive, end) = channel();
    let what = what.to_owned();
    eprintln!("  {what} ...");
    std::thread::spawn(move || {
        while end.recv_timeout(HEARTBEAT) == Err(RecvTimeoutError::Timeout) {
            eprintln!("  {what} ... {} s so far", start.elapsed().as_secs());
        }
    });
    Shown::Plain { _alive: alive }
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
