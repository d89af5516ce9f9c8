//! `cargo xtask demo`: the main job, from a bare machine to a refused disk key, told as it happens.
//!
//! Nothing is simulated: a Debian kernel in QEMU with swtpm as its TPM, the agent inside, the verifier outside, TLS
//! between them, a LUKS2 disk. What is "seen" at the end was seen by asking the programs.

mod rogue;
mod story;

use std::time::Duration;

use assay_tests::agent::{self, Agent};
use assay_tests::verifier::Verifier;
use assay_tests::vm::{Accelerator, BootOptions, Image, Vm};

use crate::build::{self, Built, Profile};
use crate::image;
use crate::run::Error;
use crate::setup;
use crate::ui::Step;
use rogue::Rogue;
use story::{Seen, Story};

/// The host's name at the verifier.
const HOST: &str = "demo";
/// A state that is due within seconds, on a slow machine.
const PATIENCE: Duration = Duration::from_secs(90);
/// Exit status of `assay-agent unlock` when the verifier refuses the key.
const KEY_REFUSED: i32 = 3;

/// Runs it. Fails unless all of it was seen.
pub fn run() -> Result<(), Error> {
    let tools = setup::install()?;
    let built = build::all(&tools, Profile::Release)?;
    let image = image::prepare(&built)?;
    let mut seen = Seen::default();
    let story = Story::begin();
    let result = tell(&story, &built, &image, &mut seen);
    if let Err(error) = &result {
        crate::ui::report(error);
    }
    seen.print();
    match (result, seen.all()) {
        (Ok(()), true) => Ok(()),
        (Ok(()), false) => Err(Error::Demo("not everything was seen".to_owned())),
        (Err(_), _) => Err(Error::Demo("it broke off, see above".to_owned())),
    }
}

fn tell(story: &Story, built: &Built, image: &Image, seen: &mut Seen) -> Result<(), Error> {
    story.line(&format!(
        "switching on a host: Linux {} with a TPM 2.0 (swtpm), QEMU on {}",
        image.kernel_release,
        Accelerator::detect()
    ));
    let vm = step("booting the host", || Ok(Vm::boot(image, &BootOptions::default())?))?;
    vm.guest().set_clock()?;
    let result = on_host(story, built, image, &vm, seen);
    if result.is_err() {
        let journal = vm.guest().get_text(agent::LOG).unwrap_or_default();
        let lines: Vec<&str> = journal.lines().collect();
        eprintln!("the agent's journal ends:");
        for line in lines.iter().skip(lines.len().saturating_sub(15)) {
            eprintln!("  {line}");
        }
    }
    result
}

fn on_host(story: &Story, built: &Built, image: &Image, vm: &Vm, seen: &mut Seen) -> Result<(), Error> {
    let verifier = Verifier::start(&built.bin.join("assay-verifier"))?;
    story.line("the verifier is up, outside the host: it made its CA, its keys and a join file");
    let agent = enrol(story, vm, &verifier)?;
    capture(story, vm, &agent, &verifier, seen)?;
    let disk = seal(story, vm, &verifier)?;
    open(story, vm, &disk, seen)?;
    let rogue = Rogue::new(image, vm)?;
    refuse(story, vm, &verifier, &rogue, &disk, seen)
}

/// The host proves which TPM it has, and that its keys live there.
fn enrol(story: &Story, vm: &Vm, verifier: &Verifier) -> Result<Agent, Error> {
    agent::join(vm.guest(), verifier)?;
    story.line("the host joined: the join file was copied in, and `assay-agent join` made its TLS key");
    let agent = step("the agent loads its kernel programs and inventories what runs", || {
        Ok(Agent::start(vm.guest())?)
    })?;
    let status = agent.status()?;
    let field = |name| status.get(name).map(ToString::to_string).unwrap_or_default();
    story.line(&format!(
        "the agent measures: tier {}, PCR {}, {} records in its log so far",
        field("tier"),
        field("pcr"),
        field("records")
    ));
    let answer = agent.enrol(vm, verifier, HOST)?;
    story.line("enrolled, by the hash of the TPM's endorsement key and a credential only that TPM could open:");
    story.quote(&answer);
    Ok(agent)
}

/// What runs on the good host becomes the policy.
fn capture(story: &Story, vm: &Vm, agent: &Agent, verifier: &Verifier, seen: &mut Seen) -> Result<(), Error> {
    step("the host does its usual work, so that its programs are known", || {
        Ok(agent::rehearse(vm.guest())?)
    })?;
    let loads = agent.log()?.lines().count();
    let answer = verifier.run_ok(&["policy", "capture", HOST])?;
    story.line(&format!(
        "known-good values captured from {loads} events of the host's log:"
    ));
    story.quote(&answer);
    step("waiting for the verifier's next look", || {
        Ok(verifier.wait_host(HOST, "trusted", PATIENCE, |host| host.state == "trusted")?)
    })?;
    story.line("the host is TRUSTED: its quote, its boot log and every event of its log check out");
    seen.trusted = true;
    Ok(())
}

/// A sealed disk and what must be found on it.
struct Disk {
    image: &'static str,
    secret: String,
}

/// The verifier's side encrypts a disk and keeps its key.
fn seal(story: &Story, vm: &Vm, verifier: &Verifier) -> Result<Disk, Error> {
    let (plain, sealed) = (
        verifier.scratch().join("plain.img"),
        verifier.scratch().join("sealed.img"),
    );
    // Different each time: it can only come from the disk.
    let secret = format!("the disk's secret {}", story::random_hex()?);
    agent::plain_image(&plain, "secret.txt", secret.as_bytes())?;
    let (from, to) = (plain.display().to_string(), sealed.display().to_string());
    let answer = step("sealing a disk image", || {
        Ok(verifier.run_ok(&["image", "seal", &from, &to])?)
    })?;
    story.line("sealed a disk image: LUKS2, its key known to the verifier alone");
    story.quote(&answer);
    let image = "/root/disk.img";
    vm.guest().put_file(image, 0o600, &sealed)?;
    Ok(Disk { image, secret })
}

/// The host asks for the key, gets it, and reads the disk.
fn open(story: &Story, vm: &Vm, disk: &Disk, seen: &mut Seen) -> Result<(), Error> {
    let guest = vm.guest();
    let ended = step("the host asks for the disk's key", || {
        Ok(agent::unlock(guest, disk.image, 60)?)
    })?;
    if !ended.ok() {
        return Err(Error::Demo(format!("the key was not released: {ended}")));
    }
    seen.released = true;
    let device = ended.stdout.trim().to_owned();
    story.line(&format!(
        "key released, to this TPM in this state over this connection alone; the disk is {device}"
    ));
    guest.run_ok(&["mount", "-o", "ro", &device, "/mnt/disk"])?;
    let content = guest.run_ok(&["cat", "/mnt/disk/secret.txt"])?;
    if content != disk.secret {
        return Err(Error::Demo(format!(
            "the file on the disk reads {content:?}, not {:?}",
            disk.secret
        )));
    }
    seen.opened = true;
    story.line(&format!("disk opened, and a file on it read: \"{content}\""));
    guest.run_ok(&["umount", "/mnt/disk"])?;
    let name = device.trim_start_matches("/dev/mapper/").to_owned();
    guest.run_ok(&["assay-agent", "lock", &name])?;
    story.line("disk closed again");
    Ok(())
}

/// Somebody loads what nobody approved, and the host gets no more keys.
fn refuse(
    story: &Story,
    vm: &Vm,
    verifier: &Verifier,
    rogue: &Rogue,
    disk: &Disk,
    seen: &mut Seen,
) -> Result<(), Error> {
    let guest = vm.guest();
    guest.run_ok(&["insmod", rogue::MODULE])?;
    story.line(&format!(
        "ROGUE: a kernel module that nobody approved was loaded: {}",
        rogue::MODULE
    ));
    guest.run_ok(&[rogue::PROGRAM])?;
    story.line(&format!(
        "ROGUE: a program that nobody approved was run: {}",
        rogue::PROGRAM
    ));
    let host = step("waiting for the verifier's next look", || {
        Ok(verifier.wait_host(HOST, "untrusted for both", PATIENCE, |host| {
            host.state == "untrusted" && rogue.module_reason(host).is_some() && rogue.program_reason(host).is_some()
        })?)
    })?;
    story.line("the host is UNTRUSTED:");
    story.quote(&host.reasons.join("\n"));
    let reasons = [rogue.module_reason(&host), rogue.program_reason(&host)];
    seen.reason = reasons
        .into_iter()
        .flatten()
        .map(str::to_owned)
        .collect::<Vec<_>>()
        .join("; ");
    let ended = step("the host asks for the disk's key again", || {
        Ok(agent::unlock(guest, disk.image, 60)?)
    })?;
    if ended.code != Some(KEY_REFUSED) {
        return Err(Error::Demo(format!(
            "the second request for the key was not refused: {ended}"
        )));
    }
    seen.rogue_module = rogue.module_reason(&host).is_some();
    seen.rogue_program = rogue.program_reason(&host).is_some();
    story.line("the key was REFUSED:");
    story.quote(&ended.stderr);
    Ok(())
}

/// A step whose work is a closure: a moving line while it runs.
fn step<T>(what: &str, work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    let step = Step::start(what);
    let result = work();
    match &result {
        Ok(_) => step.done(),
        Err(_) => step.failed(),
    }
    result
}
