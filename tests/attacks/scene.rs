//! A host that a verifier trusts, in whatever mode an attack wants it.

use assay_evidence::event::{Event, LoadKind, Measurement, Mode, Notice};
use assay_evidence::policy::Policy;
use assay_tests::HarnessError;
use assay_tests::agent::{self, Agent};
use assay_tests::guest::{Ended, Guest};
use assay_tests::verifier::Verifier;
use assay_tests::vm::{Image, Variant, Vm};
use assay_verifier::config::StateDir;
use assay_verifier::store::Store;
use serde_json::{Value, json};

use crate::common::{HOST, PATIENCE, Stage, verifier_binary};
use crate::log::{LOG, Log};
use crate::payload::{EXIT, Payload, digest};

/// See the module.
pub struct Scene {
    pub stage: Stage,
    /// What the configuration says beside the mode, below `[measure]`.
    pub settings: String,
}

impl Scene {
    /// In mode observe, with everything that `rehearsal` (a shell script) runs captured as known good.
    pub fn set(settings: &str, rehearsal: &str) -> Result<Self, HarnessError> {
        Self::set_after(settings, rehearsal, |_| Ok(()))
    }

    /// In a machine that `prepare` has worked on.
    pub fn set_after(
        settings: &str,
        rehearsal: &str,
        prepare: impl FnOnce(&Guest) -> Result<(), HarnessError>,
    ) -> Result<Self, HarnessError> {
        let vm = Vm::restore(&image()?)?;
        prepare(vm.guest())?;
        Self::set_in(vm, settings, rehearsal)
    }

    /// In this machine.
    pub fn set_in(vm: Vm, settings: &str, rehearsal: &str) -> Result<Self, HarnessError> {
        let address = vm.agent_address();
        Self::build(vm, &address, settings, |guest| guest.script(rehearsal).map(drop))
    }

    /// At an address that `lead` makes lead to the machine.
    pub fn set_at(address: &str, lead: impl FnOnce(&Vm)) -> Result<Self, HarnessError> {
        let vm = Vm::restore(&image()?)?;
        lead(&vm);
        Self::build(vm, address, "", |guest| guest.script(crate::loads::TOOLS).map(drop))
    }

    /// With what opening disks needs.
    pub fn set_with_disks(vm: Vm, rehearsal: &str) -> Result<Self, HarnessError> {
        let address = vm.agent_address();
        Self::build(vm, &address, "", |guest| {
            agent::rehearse(guest)?;
            guest.script(rehearsal).map(drop)
        })
    }

    /// Of parts that somebody else has put together.
    pub fn of(stage: Stage, settings: String) -> Self {
        Self { stage, settings }
    }

    fn build(
        vm: Vm,
        address: &str,
        settings: &str,
        rehearse: impl FnOnce(&Guest) -> Result<(), HarnessError>,
    ) -> Result<Self, HarnessError> {
        let verifier = Verifier::start(&verifier_binary())?;
        agent::join(vm.guest(), &verifier)?;
        configure(vm.guest(), Mode::Observe, settings)?;
        let agent = Agent::start(vm.guest())?;
        agent.enrol_at(address, &verifier, HOST)?;
        rehearse(vm.guest())?;
        let scene = Self {
            stage: Stage { verifier, agent, vm },
            settings: settings.to_owned(),
        };
        // Nobody has waited for the records of the rehearsal; what comes after the evidence that is captured is not approved.
        scene.all_so_far()?;
        scene.settled()?;
        scene.stage.verifier.run_ok(&["policy", "capture", HOST])?;
        allow_all_modes(&scene.stage.verifier);
        scene.stage.wait("trusted", |host| host.state == "trusted")?;
        Guest::wait_for("the host never got its approved list", PATIENCE, || {
            let held = scene.verdict()?.pointer("/approved_list/held").cloned();
            Ok((held == Some(Value::Bool(true))).then_some(()))
        })?;
        Ok(scene)
    }

    /// Waits until the agent, in mode enforce, goes by what the policy approves now.
    fn list_in_force(&self) -> Result<(), HarnessError> {
        let approved = policy(&self.stage.verifier).1.enforced(0).len() as u64;
        self.wait_log(&format!("a list of {approved}"), |log| {
            let start = log
                .events
                .iter()
                .rposition(|event| matches!(event, Event::AgentStart(_)));
            let since = log.events.get(start.unwrap_or_default()..).unwrap_or_default();
            let mut lists = since.iter().rev().filter_map(|event| match event {
                Event::Notice(Notice::ListInForce { entries, .. }) => Some(*entries),
                _ => None,
            });
            lists.next() == Some(approved)
        })
        .map(drop)
    }

    /// Restarts the agent in another mode, as systemd would.
    pub fn enter(&mut self, mode: Mode) -> Result<(), HarnessError> {
        let settings = self.settings.clone();
        self.enter_with(mode, &settings)
    }

    /// The same, with other settings.
    pub fn enter_with(&mut self, mode: Mode, settings: &str) -> Result<(), HarnessError> {
        self.stop()?;
        configure(self.guest(), mode, settings)?;
        self.stage.agent = Agent::start(self.guest())?;
        if mode == Mode::Enforce {
            self.list_in_force()?;
        }
        Ok(())
    }

    /// Stops the agent as systemd would.
    pub fn stop(&self) -> Result<(), HarnessError> {
        let (guest, pid) = (self.guest(), self.stage.agent.pid());
        guest.signal_from_init(pid, 15)?;
        let ended = guest.wait(pid, PATIENCE)?;
        assert_eq!(ended.code, Some(0), "{ended}\n{}", self.stage.agent.journal());
        Ok(())
    }

    pub fn guest(&self) -> &Guest {
        self.stage.vm.guest()
    }

    /// The log as it is.
    pub fn log(&self) -> Result<Log, HarnessError> {
        Log::read(self.guest(), LOG)
    }

    /// Waits until the log is as `is` wants it.
    pub fn wait_log(&self, what: &str, is: impl Fn(&Log) -> bool) -> Result<Log, HarnessError> {
        Log::wait(self.guest(), LOG, what, is)
    }

    /// The log with everything that happened before this is called, as far as it is recorded: a new program is run, or refused, and
    /// its record waited for. The kernel has one queue for all processors, and the log keeps its order.
    pub fn all_so_far(&self) -> Result<Log, HarnessError> {
        let program = Payload::Tiny.make(self.guest())?;
        let marker = digest(&program);
        let path = format!("/root/marker-{}", &marker[..16]);
        self.guest().put(&path, 0o755, &program)?;
        Hook::run(self.guest(), &[&path], EXIT)?;
        self.wait_log("the marker", |log| !about(log, &marker).is_empty())
    }

    /// Waits until the TPM's register has all of the log. What is still in the kernel's queue is in neither: where nobody waits for
    /// records, as in observe, [`Scene::wait_log`] or [`Scene::all_so_far`] comes first. Asks the kernel: the TPM's device may be the
    /// agent's alone.
    pub fn settled(&self) -> Result<Log, HarnessError> {
        Guest::wait_for("log and PCR 13 never agreed", PATIENCE, || {
            let log = self.log()?;
            Ok((self.guest().sysfs_pcr(13)? == log.pcr()).then_some(log))
        })
    }

    /// The verdict that a bad host gets: a reason with this in it.
    pub fn distrusted_for(&self, needle: &str) -> Result<String, HarnessError> {
        self.stage.distrusted_for(needle)
    }

    /// The verdict that a good host gets, with all that the log has by now; gives the verdict's notes.
    pub fn still_trusted(&self) -> Result<Vec<String>, HarnessError> {
        let host = self.judged()?;
        assert_eq!(host.get("state"), Some(&json!("trusted")), "{host}");
        assert_eq!(host.get("reasons"), Some(&json!([])), "{host}");
        Ok(texts(&host, "notes"))
    }

    /// The verdict with all that the log has by now, when it has no reason without this in it; gives the verdict's notes.
    pub fn distrusted_alone_for(&self, needle: &str) -> Result<Vec<String>, HarnessError> {
        let host = self.judged()?;
        let reasons = texts(&host, "reasons");
        assert!(!reasons.is_empty(), "{host}");
        assert!(reasons.iter().all(|reason| reason.contains(needle)), "{host}");
        Ok(texts(&host, "notes"))
    }

    /// The verdict, once the verifier has seen all that the log has by now.
    fn judged(&self) -> Result<Value, HarnessError> {
        let records = self.settled()?.records.len() as u64;
        Guest::wait_for("the verifier never saw the whole log", PATIENCE, || {
            let host = self.verdict()?;
            let seen = host.get("records").and_then(Value::as_u64).unwrap_or_default();
            Ok((seen >= records).then_some(host))
        })
    }

    /// All that the verifier says of the host.
    pub fn verdict(&self) -> Result<Value, HarnessError> {
        let text = self.stage.verifier.run_ok(&["host", "show", HOST, "--json"])?;
        Ok(serde_json::from_str(&text).expect("JSON"))
    }
}

/// A member of a verdict that is a list of texts.
fn texts(host: &Value, member: &str) -> Vec<String> {
    serde_json::from_value(host.get(member).cloned().unwrap_or_default()).expect("a list of texts")
}

/// The verifier's database, and the policy in it.
fn policy(verifier: &Verifier) -> (Store, Policy) {
    let store = Store::open(&StateDir::new(verifier.state_dir()).database()).expect("the verifier's database");
    let policy = store.policy("default").expect("readable").expect("captured");
    (store, policy)
}

/// The policy of the tests allows every mode: which one is wanted is not what they are about.
fn allow_all_modes(verifier: &Verifier) {
    let (store, mut policy) = policy(verifier);
    policy
        .rules_mut()
        .modes
        .extend([Mode::Observe, Mode::Hold, Mode::Enforce]);
    assert!(store.put_policy("default", &policy, true).expect("writable"));
}

fn configure(guest: &Guest, mode: Mode, settings: &str) -> Result<(), HarnessError> {
    let text = format!("[measure]\nmode = \"{mode}\"\n{settings}\n");
    guest.put("/etc/assay/agent.toml", 0o644, text.as_bytes())
}

/// The image of a machine in which an agent has measured before and was stopped in an orderly way. The kernel checks the
/// agent's programs only once, which under emulation takes longer than everything else; each scene starts with a successor
/// that takes them over. Booted and saved by the first who wants it.
pub fn image() -> Result<Image, HarnessError> {
    let fresh = Image::load()?;
    let mut image = fresh.clone();
    image.saved = fresh.saved.join("measured");
    if image.snapshot().exists() {
        return Ok(image);
    }
    let action = || format!("make {}", image.saved.display());
    std::fs::create_dir_all(&image.saved).map_err(HarnessError::io(action()))?;
    // Tests run side by side, and so do test runs.
    let lock = std::fs::File::create(image.saved.join("lock")).map_err(HarnessError::io(action()))?;
    lock.lock().map_err(HarnessError::io(action()))?;
    if image.snapshot().exists() {
        return Ok(image);
    }
    let vm = Vm::restore(&fresh)?;
    let pid = Agent::start(vm.guest())?.pid();
    vm.guest().signal_from_init(pid, 15)?;
    let ended = vm.guest().wait(pid, PATIENCE)?;
    assert_eq!(ended.code, Some(0), "{ended}");
    let part = image.saved.join("part");
    // What an interrupted run left.
    let _ = std::fs::remove_dir_all(&part);
    vm.save(&part)?;
    std::fs::rename(&part, image.snapshot()).map_err(HarnessError::io(action()))?;
    Ok(image)
}

/// A machine with IMA's `tcb` policy and no agent.
pub fn ima_machine() -> Result<Vm, HarnessError> {
    Vm::restore(&Image::load()?.booted(Variant::ImaTcb))
}

/// Whether IMA's log has this digest.
pub fn ima_has(guest: &Guest, digest: &str) -> Result<bool, HarnessError> {
    let log = guest.get_text("/sys/kernel/security/ima/ascii_runtime_measurements")?;
    Ok(log.contains(&format!("sha256:{digest} ")))
}

/// What a hook answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// It went through.
    Passed,
    /// It was refused with this errno.
    Refused(i32),
}

/// Whoever was refused does not tell.
pub const UNTOLD: i32 = 0;
pub const EPERM: i32 = 1;
pub const EAGAIN: i32 = 11;

impl Hook {
    /// Runs this program, which ends with `status` if it is let.
    pub fn run(guest: &Guest, argv: &[&str], status: u8) -> Result<Self, HarnessError> {
        match guest.run(argv) {
            Ok(ended) => Self::of(&ended, status),
            // The helper could not start it: the errno is in its words.
            Err(error) => errno(&error.to_string()).map(Self::Refused).ok_or(error),
        }
    }

    /// From how a program went that plays an attack: `status` if it went through, 100 and the errno if not, or the errno in
    /// words.
    ///
    /// # Errors
    /// When it is none of these.
    pub fn of(ended: &Ended, status: u8) -> Result<Self, HarnessError> {
        match (errno(&ended.stderr), ended.code) {
            (Some(errno), _) => Ok(Self::Refused(errno)),
            (None, Some(code)) if code == i32::from(status) => Ok(Self::Passed),
            (None, Some(code @ 101..=126)) => Ok(Self::Refused(code - 100)),
            _ => Err(HarnessError::Guest {
                request: "play the attack".to_owned(),
                message: ended.to_string(),
            }),
        }
    }
}

fn errno(text: &str) -> Option<i32> {
    [
        ("Resource temporarily unavailable", EAGAIN),
        ("Operation not permitted", EPERM),
        ("Text file busy", 26),
        // ld.so does not tell.
        ("failed to map segment", UNTOLD),
    ]
    .into_iter()
    .find(|(words, _)| text.contains(words))
    .map(|(_, errno)| errno)
}

/// Everything in the log that is about this digest.
pub fn about<'a>(log: &'a Log, digest: &str) -> Vec<&'a Measurement> {
    log.loads()
        .into_iter()
        .filter(|load| load.digest.is_some_and(|found| found.to_string() == digest))
        .collect()
}

/// How many records of this kind there are.
pub fn count(log: &Log, kind: LoadKind) -> usize {
    log.events
        .iter()
        .filter(|event| matches!(event, Event::Load(load) if load.kind == kind))
        .count()
}
