//! A host that a verifier trusts, ready for a test to spoil.

use std::path::{Path, PathBuf};
use std::time::Duration;

use assay_evidence::token::sidecar_path;
use assay_tests::HarnessError;
use assay_tests::agent::{self, Agent};
use assay_tests::guest::Guest;
use assay_tests::verifier::{HostState, Verifier};
use assay_tests::vm::{Image, Vm};

/// The host's name at the verifier.
pub const HOST: &str = "host";
/// A state that is due within seconds, on a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// The program that nobody approved, where a host is spoiled.
pub const ROGUE: &str = "/root/rogue";

/// A machine, the agent in it, and the verifier that trusts it.
pub struct Stage {
    // The verifier goes first, so that its last polls do not find the machine gone.
    pub verifier: Verifier,
    pub agent: Agent,
    pub vm: Vm,
}

/// The saved machine, restored.
pub fn machine() -> Result<Vm, HarnessError> {
    Vm::restore(&Image::load()?)
}

/// The verifier's program, built beside this test.
pub fn verifier_binary() -> PathBuf {
    let mut path = std::env::current_exe().expect("this test's own path");
    path.pop();
    path.set_file_name("assay-verifier");
    path
}

/// Joined, enrolled and measured, but not judged yet.
pub fn enrolled() -> Result<Stage, HarnessError> {
    enrolled_with("")
}

/// The same, with this configuration.
pub fn enrolled_with(settings: &str) -> Result<Stage, HarnessError> {
    enrolled_on(machine()?, settings)
}

/// The same, on this machine.
pub fn enrolled_on(vm: Vm, settings: &str) -> Result<Stage, HarnessError> {
    configure(vm.guest(), settings)?;
    let verifier = Verifier::start(&verifier_binary())?;
    agent::join(vm.guest(), &verifier)?;
    let agent = Agent::start(vm.guest())?;
    agent.enrol(&vm, &verifier, HOST)?;
    Ok(Stage { verifier, agent, vm })
}

/// With its usual programs captured as known good, and trusted.
pub fn trusted() -> Result<Stage, HarnessError> {
    let stage = enrolled()?;
    agent::rehearse(stage.vm.guest())?;
    stage.capture()?;
    Ok(stage)
}

impl Stage {
    /// Waits until the verifier sees the host as `is` wants it.
    pub fn wait(&self, what: &str, is: impl Fn(&HostState) -> bool) -> Result<HostState, HarnessError> {
        self.verifier.wait_host(HOST, what, PATIENCE, is)
    }

    /// Captures what ran so far as known good, and waits until the host is trusted for it.
    pub fn capture(&self) -> Result<(), HarnessError> {
        self.verifier.run_ok(&["policy", "capture", HOST])?;
        self.wait("trusted", |host| host.state == "trusted").map(drop)
    }

    /// Waits until the host is untrusted for a reason with this in it, and gives that reason.
    pub fn distrusted_for(&self, needle: &str) -> Result<String, HarnessError> {
        let found = |host: &HostState| host.reasons.iter().find(|reason| reason.contains(needle)).cloned();
        let host = self.wait(&format!("untrusted for {needle}"), |host| {
            host.state == "untrusted" && found(host).is_some()
        })?;
        Ok(found(&host).expect("just seen"))
    }

    /// Runs [`ROGUE`], and waits until the host is untrusted for it; gives the program's digest.
    pub fn spoil(&self) -> Result<String, HarnessError> {
        put_new_program(&self.vm, ROGUE)?;
        self.vm.guest().run_ok(&[ROGUE])?;
        // Where sha256sum has not run before, it is rogue as well.
        let digest = sha256sum(&self.vm, ROGUE)?;
        let reason = self.distrusted_for(ROGUE)?;
        assert!(reason.contains(&digest), "{reason}");
        Ok(digest)
    }

    /// Seals an image with one file, `hello` holding `content`, and puts it into the machine.
    pub fn sealed_disk(&self, path: &str, content: &[u8]) -> Result<(), HarnessError> {
        self.sealed(path, |plain| agent::plain_image(plain, "hello", content))
    }

    /// The same in another format, with its sidecar.
    pub fn disk_as(&self, format: &str, path: &str, content: &[u8]) -> Result<(), HarnessError> {
        self.sealed_as(format, path, |plain| agent::plain_image(plain, "hello", content))
    }

    /// Opens an image as `/dev/mapper/NAME`.
    pub fn open_as(&self, image: &str, name: &str) -> Result<(), HarnessError> {
        let guest = self.vm.guest();
        let ended = guest.run(&["assay-agent", "unlock", image, "--name", name, "--timeout", "60"])?;
        assert!(ended.ok(), "{ended}\n{}", self.agent.journal());
        Ok(())
    }

    /// Seals an image that `make` writes, and puts it into the machine.
    pub fn sealed(&self, path: &str, make: impl Fn(&Path) -> Result<(), HarnessError>) -> Result<(), HarnessError> {
        self.sealed_as("luks2", path, make)
    }

    fn sealed_as(
        &self,
        format: &str,
        path: &str,
        make: impl Fn(&Path) -> Result<(), HarnessError>,
    ) -> Result<(), HarnessError> {
        let guest = self.vm.guest();
        let folder = tempfile::tempdir_in(self.verifier.scratch()).expect("a scratch folder");
        let (plain, sealed) = (folder.path().join("plain"), folder.path().join("sealed"));
        make(&plain)?;
        let (from, to) = (plain.to_string_lossy(), sealed.to_string_lossy());
        self.verifier
            .run_ok(&["image", "seal", "--format", format, &from, &to])?;
        let sidecar = sidecar_path(&sealed);
        if sidecar.exists() {
            guest.put_file(&sidecar_path(Path::new(path)).to_string_lossy(), 0o600, &sidecar)?;
        }
        guest.put_file(path, 0o600, &sealed)
    }
}

/// Writes the agent's configuration.
pub fn configure(guest: &Guest, settings: &str) -> Result<(), HarnessError> {
    guest.put("/etc/assay/agent.toml", 0o644, settings.as_bytes())
}

/// Ends the agent as a service manager does.
pub fn stop(guest: &Guest, agent: &Agent) -> Result<(), HarnessError> {
    guest.signal_from_init(agent.pid(), 15)?;
    let ended = guest.wait(agent.pid(), PATIENCE)?;
    assert_eq!(ended.code, Some(0), "{ended}\n{}", agent.journal());
    Ok(())
}

/// Tries to run a program: 0 when it ran and was content, or else the error number of `execve`.
pub fn try_run(guest: &Guest, path: &str) -> Result<i32, HarnessError> {
    perl_on(guest, RUN, path)
}

/// Perl that runs a program, and prints the error number if it could not.
pub const RUN: &str = "exec {'PATH'} 'PATH'; print $! + 0;";

/// Runs a piece of Perl as [`perl`] does, with this path in the place of `PATH`. Perl is an interpreter whose arguments
/// are measured: a path of its own on the command line would be its script.
pub fn perl_on(guest: &Guest, code: &str, path: &str) -> Result<i32, HarnessError> {
    perl(guest, &code.replace("PATH", path), &[])
}

/// Runs a piece of Perl that ends well and prints a number, or nothing for 0.
pub fn perl(guest: &Guest, code: &str, arguments: &[&str]) -> Result<i32, HarnessError> {
    let said = guest.run_ok(&[&["perl", "-e", code], arguments].concat())?;
    Ok(said.trim().parse().unwrap_or_else(|_| {
        assert!(said.trim().is_empty(), "{said}");
        0
    }))
}

/// PCR 13 (SHA-256) as tpm2-tools reads it, in lower-case hex.
pub fn pcr13(vm: &Vm) -> Result<String, HarnessError> {
    let text = vm.guest().run_ok(&["tpm2", "pcrread", "sha256:13"])?;
    Ok(text.split("0x").nth(1).unwrap_or_default().trim().to_lowercase())
}

/// Waits until the log's head and the PCR agree, as they must once every batch has been extended: a PCR that started
/// at zero follows the very chain of the log's head.
pub fn wait_log_matches_pcr(vm: &Vm, agent: &Agent) -> Result<(), HarnessError> {
    // tpm2 is itself measured when it runs for the first time; only then can both stand still.
    pcr13(vm)?;
    Guest::wait_for("the log's head and PCR 13 did not agree", PATIENCE, || {
        let status = agent.status()?;
        let head = status
            .get("log_head")
            .and_then(|head| head.as_str())
            .unwrap_or_default()
            .to_owned();
        Ok((pcr13(vm)? == head).then_some(()))
    })
}

/// A program that the machine has never seen: a real one, one byte longer.
pub fn put_new_program(vm: &Vm, path: &str) -> Result<(), HarnessError> {
    let mut program = vm.guest().get("/usr/bin/true")?;
    program.push(0);
    vm.guest().put(path, 0o755, &program)
}

/// The SHA-256 of a file in the machine, by an independent program.
pub fn sha256sum(vm: &Vm, path: &str) -> Result<String, HarnessError> {
    let text = vm.guest().run_ok(&["sha256sum", path])?;
    Ok(text.split_whitespace().next().unwrap_or_default().to_owned())
}
