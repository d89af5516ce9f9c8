//! The machines: one for each way to measure, all from one image, of which only one runs at a time.

use std::error::Error;
use std::time::{Duration, Instant};

use assay_tests::agent::Agent;
use assay_tests::guest::Guest;
use assay_tests::vm::{BootOptions, Image, RestoreOptions, Variant, Vm};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::{Outcome, approve};

/// Where the workload's programs are: on the root filesystem, which IMA's policy measures.
pub const FOLDER: &str = "/root/load";
/// Room for a flood: 60 s of it make more than the default of 64 MiB.
const LOG_MIB: u32 = 384;
/// A storm of a thousand programs, each with an extend of 10 ms, under emulation and load.
const LOAD_TIMEOUT: Duration = Duration::from_secs(900);
/// Nothing is extended for so long: what was waiting has been done.
const QUIET: Duration = Duration::from_millis(400);

/// How a machine is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Not at all.
    None,
    /// By the kernel's IMA.
    Ima,
    /// By the agent, mode `observe`.
    Observe,
    /// By the agent, mode `hold`.
    Hold,
    /// By the agent, mode `enforce`.
    Enforce,
}

impl State {
    /// All of them, the two that others are compared with first.
    pub const ALL: [Self; 5] = [Self::None, Self::Ima, Self::Observe, Self::Hold, Self::Enforce];

    /// As it is called on the command line and in the tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Ima => "ima",
            Self::Observe => "observe",
            Self::Hold => "hold",
            Self::Enforce => "enforce",
        }
    }

    /// The machine for it. IMA's policy leaves out what is read and not run: that is no part of starting programs.
    fn image(self, image: &Image) -> Image {
        image.clone().booted(if self == Self::Ima {
            Variant::ImaExec
        } else {
            Variant::Default
        })
    }

    /// Is it one of the agent's modes?
    pub fn is_assay(self) -> bool {
        matches!(self, Self::Observe | Self::Hold | Self::Enforce)
    }
}

/// A machine in its state.
pub struct Machine {
    /// How it is measured.
    pub state: State,
    vm: Vm,
    agent: Option<Agent>,
}

impl Machine {
    /// Restores the image's saved machine, brings it into its state, and pauses it.
    pub fn restore(image: &Image, state: State) -> Outcome<Self> {
        let options = RestoreOptions {
            extend_delay: Some(Duration::ZERO),
        };
        Self::enter(Vm::restore_with(&state.image(image), &options)?, state)
    }

    /// Boots a machine whose clock counts instructions, brings it into its state, and pauses it.
    pub fn boot_counting(image: &Image, state: State) -> Outcome<Self> {
        let options = BootOptions {
            extend_delay: Some(Duration::ZERO),
            count_instructions: true,
            ..BootOptions::default()
        };
        Self::enter(Vm::boot(&state.image(image), &options)?, state)
    }

    fn enter(vm: Vm, state: State) -> Outcome<Self> {
        let guest = vm.guest();
        let mut agent = None;
        if state.is_assay() {
            let config = format!("[measure]\nmode = \"{}\"\nlog_max_mib = {LOG_MIB}\n", state.name());
            guest.put("/etc/assay/agent.toml", 0o600, config.as_bytes())?;
            if state == State::Enforce {
                approve::workload(guest)?;
            }
            agent = Some(Agent::start(guest)?);
        }
        let machine = Self { state, vm, agent };
        // The workload and what else the rounds use is known from here on.
        machine.clear()?;
        machine.make(0, 1, 4096)?;
        machine.clear()?;
        machine.settle()?;
        machine.pause(true)?;
        Ok(machine)
    }

    /// Lets the machine run for a piece of work, which ends when nothing is waiting to be extended any more.
    pub fn awake<T>(&self, work: impl FnOnce(&Self) -> Outcome<T>) -> Outcome<T> {
        self.pause(false)?;
        let result = work(self).and_then(|value| self.settle().map(|()| value));
        let result = result.map_err(|error| self.with_last_words(error));
        self.pause(true)?;
        result
    }

    /// The error, and what the agent said last: most often the one comes of the other.
    fn with_last_words(&self, error: Box<dyn Error + Send + Sync>) -> Box<dyn Error + Send + Sync> {
        let Some(agent) = &self.agent else { return error };
        let journal = agent.journal();
        let words: Vec<&str> = journal.lines().rev().take(5).collect();
        let words = words.join("\n");
        // The kernel's, too: it gives up on a TPM that takes too long.
        let kernel = self
            .guest()
            .script("dmesg | grep -v audit | tail -n 5")
            .unwrap_or_default();
        format!("{error}\nthe agent's last words, latest first: {words}\nthe kernel's: {kernel}").into()
    }

    /// Runs `assay-load`, for its answer.
    pub fn load<T: DeserializeOwned>(&self, words: &[&str]) -> Outcome<T> {
        let mut argv = vec!["assay-load"];
        argv.extend_from_slice(words);
        let ended = self.guest().run_with(&argv, b"", LOAD_TIMEOUT)?;
        if !ended.ok() {
            return Err(format!("{}: {}: {ended}", self.state.name(), argv.join(" ")).into());
        }
        Ok(serde_json::from_str(&ended.stdout)?)
    }

    /// Makes programs numbered `from` and after, in the folder of the workload.
    pub fn make(&self, from: u64, count: u64, size: usize) -> Outcome<()> {
        let (from, count, size) = (from.to_string(), count.to_string(), size.to_string());
        let argv = ["assay-load", "make", FOLDER, &from, &count, &size];
        let ended = self.guest().run_with(&argv, b"", LOAD_TIMEOUT)?;
        if ended.ok() {
            return Ok(());
        }
        Err(format!("{}: {}: {ended}", self.state.name(), argv.join(" ")).into())
    }

    /// Removes them all.
    pub fn clear(&self) -> Outcome<()> {
        self.guest().script("rm -rf /root/load; mkdir /root/load; sync")?;
        Ok(())
    }

    /// The helper inside.
    pub fn guest(&self) -> &Guest {
        self.vm.guest()
    }

    /// The agent inside.
    pub fn agent(&self) -> Outcome<&Agent> {
        self.agent
            .as_ref()
            .ok_or_else(|| "there is no agent in this machine".into())
    }

    /// Time that all threads of the agent have been on a processor, in nanoseconds, from the scheduler: finer than the
    /// clock ticks of /proc/PID/stat. 0 without an agent.
    pub fn agent_time(&self) -> Outcome<u64> {
        let Some(agent) = &self.agent else { return Ok(0) };
        let text = self
            .guest()
            .script(&format!("cat /proc/{}/task/*/schedstat", agent.pid()))?;
        let mut sum = 0_u64;
        for line in text.lines() {
            let word = line.split_whitespace().next().unwrap_or_default();
            sum = sum.saturating_add(word.parse()?);
        }
        Ok(sum)
    }

    /// Extends that its TPM has done so far.
    pub fn extends(&self) -> u64 {
        self.vm.extends().unwrap_or_default()
    }

    /// Every extend takes so much longer from here on.
    pub fn slow_down(&self, delay: Duration) {
        if let Some(tpm) = self.vm.slow_tpm() {
            tpm.set_delay(delay);
        }
    }

    /// Waits until the TPM has had nothing to extend for a while.
    pub fn settle(&self) -> Outcome<()> {
        let (mut last, mut since, begin) = (self.extends(), Instant::now(), Instant::now());
        while since.elapsed() < QUIET {
            if begin.elapsed() > LOAD_TIMEOUT {
                return Err(format!("{}: the TPM never came to rest", self.state.name()).into());
            }
            std::thread::sleep(Duration::from_millis(20));
            let now = self.extends();
            if now != last {
                (last, since) = (now, Instant::now());
            }
        }
        Ok(())
    }

    fn pause(&self, stop: bool) -> Outcome<()> {
        self.vm.qmp()?.execute(if stop { "stop" } else { "cont" }, &json!({}))?;
        Ok(())
    }
}
