//! `cargo xtask bench unlock [ROUNDS [DISKS]]`: a disk from the hook's call to its device, beside `cryptsetup open` with a key file of
//! the same image, in turns, in one machine with a software TPM; the verifier is on the same computer. Then so many disks at once, on that
//! TPM and on one that is as slow as a discrete one ([`storm`]); none of that with 0 disks.
//!
//! The machine is emulated where hardware virtualisation is missing, and then all that it computes takes many times as long: how many is
//! seen by trying the same key slot with `cryptsetup` here and there, and what an unlock costs beside cryptsetup and TPM is given for a
//! processor at that pace as well. The TPM and the verifier are not emulated.
#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

mod storm;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use assay_tests::agent::{self, Agent};
use assay_tests::child;
use assay_tests::guest::Guest;
use assay_tests::stats::quantile;
use assay_tests::verifier::{Verifier, benched};
use assay_tests::vm::{Accelerator, Image, RestoreOptions, Vm};

type Outcome<T> = Result<T, Box<dyn Error>>;

const HOST: &str = "host";
const PATIENCE: Duration = Duration::from_secs(120);
/// The middle one counts.
const ROUNDS: usize = 11;
/// Opened at once.
const DISKS: usize = 100;
/// What an unlock may take beside cryptsetup's time and the TPM's.
const LIMIT_MS: f64 = 10.0;

/// Prints how many microseconds a command took; nothing else that it says.
const TIMED: &str =
    r#"start=$EPOCHREALTIME; "$@" > /dev/null || exit; end=$EPOCHREALTIME; echo $(( ${end/./} - ${start/./} ))"#;
/// The key slot of the recovery key, which is what cryptsetup gets: it costs what the other one costs.
const SLOT: [&str; 2] = ["--key-slot", "1"];

fn main() -> Outcome<()> {
    // `--bench` is what cargo adds.
    let mut words = std::env::args().skip(1).filter(|word| word != "--bench");
    let mut number = |usual| words.next().map_or(Ok(usual), |word| word.parse());
    let (rounds, disks) = (number(ROUNDS)?, number(DISKS)?);
    let options = RestoreOptions {
        extend_delay: Some(Duration::ZERO),
    };
    let vm = Vm::restore_with(&Image::load()?, &options)?;
    let program = benched("assay-verifier").ok_or("run it with `cargo xtask bench unlock`")?;
    let verifier = Verifier::start(&program)?;
    let mut stage = Stage::ready(vm, verifier, disks)?;

    let (mut theirs, mut ours, mut tpm) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        theirs.push(stage.cryptsetup()?);
        let (took, worked) = stage.unlock()?;
        ours.push(took);
        tpm.push(worked);
    }
    let pace = stage.pace(rounds)?;
    let [theirs, ours, tpm] = [theirs, ours, tpm].map(median);
    let rest = ours - theirs - tpm;
    println!(
        "machine: {}; medians of {rounds} rounds in turns, in ms",
        Accelerator::detect()
    );
    println!("cryptsetup open --key-file       {theirs:9.1}");
    println!("assay-agent unlock               {ours:9.1}");
    println!("of that, the TPM                 {tpm:9.1}   as the agent waits for it, its driver included");
    println!("of that, neither                 {rest:9.1}   limit {LIMIT_MS} on a processor that is not emulated");
    println!(
        "the machine is {pace:.1} times slower than this computer: there {:9.1}",
        rest / pace
    );
    if disks > 0 {
        storm::run(&mut stage, disks, pace)?;
    }
    Ok(())
}

/// A trusted host with a sealed disk.
struct Stage {
    verifier: Verifier,
    agent: Agent,
    vm: Vm,
}

impl Stage {
    fn ready(vm: Vm, verifier: Verifier, disks: usize) -> Outcome<Self> {
        let guest = vm.guest();
        agent::join(guest, &verifier)?;
        let agent = Agent::start(guest)?;
        agent.enrol(&vm, &verifier, HOST)?;
        let stage = Self { verifier, agent, vm };
        let guest = stage.vm.guest();
        let [plain, image, key] = ["plain", "disk.luks", "key"].map(|name| stage.file(name));
        agent::plain_image(&plain, "hello", b"hello")?;
        let [plain, image, key] = [&plain, &image, &key].map(|path| path.to_string_lossy());
        stage
            .verifier
            .run_ok(&["image", "seal", "--recovery-file", &key, &plain, &image])?;
        for name in ["disk.luks", "key"] {
            guest.put_file(&in_guest(name), 0o600, &stage.file(name))?;
        }
        agent::rehearse(guest)?;
        assay_tests::storm::prepare(guest, &stage.verifier, disks)?;
        stage.cryptsetup()?;
        stage.verifier.run_ok(&["policy", "capture", HOST])?;
        stage
            .verifier
            .wait_host(HOST, "trusted", PATIENCE, |host| host.state == "trusted")?;
        stage.unlock()?;
        Ok(stage)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.verifier.scratch().join(name)
    }

    /// How long `cryptsetup open` takes in the machine, in ms.
    fn cryptsetup(&self) -> Outcome<f64> {
        let guest = self.vm.guest();
        let (key, image) = (in_guest("key"), in_guest("disk.luks"));
        let open = ["cryptsetup", "open", "--key-file", &key, &image, "bench"];
        let took = timed(guest, &[&open[..], &SLOT].concat())?;
        guest.run_ok(&["cryptsetup", "close", "bench"])?;
        Ok(took)
    }

    /// How long an unlock takes, and for how much of that the TPM worked, in ms.
    fn unlock(&self) -> Outcome<(f64, f64)> {
        let guest = self.vm.guest();
        let worked = self.agent.tpm_worked()?;
        let took = timed(
            guest,
            &["assay-agent", "unlock", &in_guest("disk.luks"), "--name", "bench"],
        )?;
        let worked = self.agent.tpm_worked()?.saturating_sub(worked);
        guest.run_ok(&["assay-agent", "lock", "bench"])?;
        Ok((took, worked.as_secs_f64() * 1000.0))
    }

    /// How many times slower the machine computes than this computer, by the quickest of each: the others were disturbed, here by what
    /// else the computer does, and not in the same measure there.
    fn pace(&self, rounds: usize) -> Outcome<f64> {
        let (guest, key, image) = (self.vm.guest(), in_guest("key"), in_guest("disk.luks"));
        let (mut here, mut there) = (Vec::new(), Vec::new());
        let call = |key: &str, image: &str| {
            let words = ["cryptsetup", "open", "--test-passphrase", "--key-file", key, image];
            [&words[..], &SLOT]
                .concat()
                .into_iter()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        for _ in 0..rounds.max(ROUNDS) {
            let words = call(&key, &image);
            there.push(timed(guest, &words.iter().map(String::as_str).collect::<Vec<_>>())?);
            let [key, image] = ["key", "disk.luks"].map(|name| self.file(name));
            here.push(timed_here(&call(&key.to_string_lossy(), &image.to_string_lossy()))?);
        }
        Ok(quantile(there, 0.0) / quantile(here, 0.0))
    }
}

fn in_guest(name: &str) -> String {
    Path::new("/root").join(name).to_string_lossy().into_owned()
}

/// Runs a command in the machine; how long it took there, in ms.
fn timed(guest: &Guest, words: &[&str]) -> Outcome<f64> {
    let said = guest.run_ok(&[&["bash", "-c", TIMED, "timed"], words].concat())?;
    Ok(said
        .trim()
        .parse::<f64>()
        .map_err(|_| format!("{}: it failed", words.join(" ")))?
        / 1000.0)
}

fn timed_here(words: &[String]) -> Outcome<f64> {
    let (program, rest) = words.split_first().ok_or("no command")?;
    let mut command = Command::new(program);
    command.args(rest).stdin(Stdio::null());
    let start = Instant::now();
    child::run(&mut command)?;
    Ok(start.elapsed().as_secs_f64() * 1000.0)
}

fn median(values: Vec<f64>) -> f64 {
    quantile(values, 0.5)
}
