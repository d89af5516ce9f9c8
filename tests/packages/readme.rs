//! The README's quick start, as a list of commands that a test runs as they stand there.

use std::collections::VecDeque;
use std::time::Instant;

use assay_tests::HarnessError;
use assay_tests::guest::Guest;

use crate::machine::PATIENCE;

/// The steps, in order: each is a block of commands for one machine.
pub struct QuickStart {
    steps: VecDeque<(String, String)>,
    /// The `alias` lines so far: every command has a shell of its own.
    aliases: String,
}

impl QuickStart {
    /// Takes the blocks that are marked `sh host` or `sh verifier`.
    pub fn read() -> Self {
        let mut steps = VecDeque::new();
        let mut open = None;
        for line in include_str!("../../README.md").lines() {
            match (&mut open, line.strip_prefix("```")) {
                (None, Some(start)) => {
                    let words = start.strip_prefix("sh ").unwrap_or_default();
                    open = Some((words.to_owned(), String::new()));
                }
                (Some(_), Some(_)) => {
                    steps.extend(open.take().filter(|(side, _)| !side.is_empty()));
                }
                (Some((_, text)), None) => text.push_str(&format!("{line}\n")),
                (None, None) => {}
            }
        }
        Self {
            steps,
            aliases: String::from("shopt -s expand_aliases\n"),
        }
    }

    /// Runs the next block, which must be for that side, with these words in the place of its placeholders; `assay-…` is the
    /// disk that was opened last. Every command must end well; gives what they printed.
    pub fn step(&mut self, guest: &Guest, side: &str, words: &[(&str, &str)]) -> Result<String, HarnessError> {
        let (of, text) = self.steps.pop_front().expect("one more step in the README");
        assert_eq!(of, side, "{text}");
        let mut printed = String::new();
        for line in text.lines().filter(|line| !line.trim().is_empty()) {
            if line.starts_with("alias ") {
                self.aliases.push_str(&format!("{line}\n"));
                continue;
            }
            let mut line = line.to_owned();
            for (placeholder, word) in words {
                line = line.replacen(placeholder, word, 1);
            }
            if let Some(disk) = printed
                .trim()
                .rsplit("/dev/mapper/")
                .next()
                .filter(|_| line.starts_with("assay-agent lock"))
            {
                line = line.replacen("assay-…", disk, 1);
            }
            let (script, start) = (format!("{}{line}\n", self.aliases), Instant::now());
            let ended = guest.run_with(&["bash", "-c", &script], b"", PATIENCE)?;
            println!("{:>6.1} s  {side}: {line}", start.elapsed().as_secs_f64());
            assert!(ended.ok(), "{line}: {ended}");
            printed.push_str(&ended.stdout);
        }
        Ok(printed)
    }

    /// Whether all of it was done.
    pub fn is_done(&self) -> bool {
        self.steps.is_empty()
    }
}
