//! How the demonstration speaks: lines for people as it goes, lines for machines at the end.

use std::io::Read;
use std::time::Instant;

use crate::run::{Error, io};

/// Tells it with the time since the beginning.
pub struct Story {
    begin: Instant,
}

impl Story {
    /// From now on.
    pub fn begin() -> Self {
        Self { begin: Instant::now() }
    }

    /// One thing that has happened.
    pub fn line(&self, text: &str) {
        println!("[{:5.1} s] {text}", self.begin.elapsed().as_secs_f64());
    }

    /// Another program's own words, below the line that introduced them.
    pub fn quote(&self, text: &str) {
        for line in text.lines().filter(|line| !line.trim().is_empty()) {
            println!("            | {line}");
        }
    }
}

/// What has been seen so far.
#[derive(Debug, Default)]
pub struct Seen {
    /// The host became trusted.
    pub trusted: bool,
    /// The verifier released the disk's key.
    pub released: bool,
    /// The disk was opened and its file read.
    pub opened: bool,
    /// The module made the host untrusted, and the next request for a key was refused.
    pub rogue_module: bool,
    /// The same for the program.
    pub rogue_program: bool,
    /// The verifier's words on both.
    pub reason: String,
}

impl Seen {
    /// Everything that must be seen?
    pub fn all(&self) -> bool {
        self.trusted && self.released && self.opened && self.rogue_module && self.rogue_program
    }

    /// The lines for machines.
    pub fn print(&self) {
        let yes = |seen| if seen { "yes" } else { "no" };
        let refused = |seen| if seen { "refused" } else { "not-refused" };
        println!(
            "demo: trusted={} released={} opened={}",
            yes(self.trusted),
            yes(self.released),
            yes(self.opened)
        );
        println!(
            "demo: rogue-module={} rogue-program={} reason={:?}",
            refused(self.rogue_module),
            refused(self.rogue_program),
            self.reason
        );
        println!("demo: {}", if self.all() { "ok" } else { "failed" });
    }
}

/// 32 hexadecimal digits from the kernel.
pub fn random_hex() -> Result<String, Error> {
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(io("read /dev/urandom"))?;
    Ok(hex::encode(bytes))
}
