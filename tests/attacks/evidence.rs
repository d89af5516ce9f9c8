//! Rows about the evidence: the log, the quote, the keys in the TPM, and who answers for whom.

use std::io::Write as _;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use assay_evidence::binding::Binding;
use assay_evidence::event::{LoadKind, Mode};
use assay_evidence::quote::QuoteError;
use assay_evidence::replay::HeldLog;
use assay_evidence::tpm::AttestationKey;
use assay_evidence::wire::QuoteRequest;
use assay_tests::HarnessError;
use assay_tests::agent::{self, Agent};
use assay_tests::guest::Guest;
use assay_tests::vm::{Image, RestoreOptions, Vm};
use assay_verifier::client::{Asker, Pin};
use assay_verifier::config::StateDir;
use assay_verifier::judge::fresh_nonce;

use crate::common::{HOST, PATIENCE};
use crate::loads::TOOLS;
use crate::log::LOG;
use crate::payload::{EXIT, Payload, digest};
use crate::row::{Column, MODES, Outcome, Row};
use crate::scene::{Hook, Scene, about, count, image};

/// Runs a new program; gives its digest.
fn run_new(scene: &Scene, path: &str) -> Result<String, HarnessError> {
    let program = Payload::Tiny.make(scene.guest())?;
    scene.guest().put(path, 0o755, &program)?;
    Hook::run(scene.guest(), &[path], EXIT)?;
    Ok(digest(&program))
}

fn kill(scene: &Scene) -> Result<(), HarnessError> {
    let pid = scene.stage.agent.pid();
    scene.guest().signal(pid, 9)?;
    scene.guest().wait(pid, PATIENCE).map(drop)
}

#[test]
fn attack_20_the_log_cut_reordered_and_begun_anew() -> Result<(), HarnessError> {
    let mut row = Row::new(20, "log truncation, rollback, reordering");
    let mut scene = Scene::set("", TOOLS)?;
    let rogue = run_new(&scene, "/root/rogue")?;
    scene.wait_log("the rogue program", |log| !about(log, &rogue).is_empty())?;
    scene.settled()?;
    // The record of the rogue program is taken out.
    kill(&scene)?;
    let whole = scene.guest().get(LOG)?;
    let (mut end, mut rest) = (0, whole.as_slice());
    while let Ok((_, used)) = assay_evidence::cel::read(rest) {
        rest = rest.get(used..).unwrap_or_default();
        if rest.is_empty() {
            break;
        }
        end += used;
    }
    scene.guest().put(LOG, 0o600, whole.get(..end).expect("shorter"))?;
    scene.guest().run_ok(&["rm", "/run/assay/journal"])?;
    scene.stage.agent = Agent::start(scene.guest())?;
    scene.distrusted_for("the log")?;
    row.set_modes("a record removed", Outcome::Detected);
    // A new log, in the same boot.
    kill(&scene)?;
    scene.guest().run_ok(&["rm", LOG, "/run/assay/journal"])?;
    scene.stage.agent = Agent::start(scene.guest())?;
    scene.distrusted_for("the log")?;
    row.set_modes("a new log", Outcome::Detected);
    row.set(Column::Ima, "", Outcome::OutOfScope);
    row.note("what became of the log is found by its replay to the quoted register, and by the verifier, which never accepts less than it has. IMA's log is in the kernel, where root cannot change it; somebody must replay it");
    row.done();
    Ok(())
}

#[test]
fn attack_21_injected_records() -> Result<(), HarnessError> {
    let mut row = Row::new(21, "injected events, malformed or oversized log");
    let mut scene = Scene::set("", &format!("{TOOLS}; tpm2 pcrread sha256:13"))?;
    let extend = format!("13:sha256={}", "11".repeat(32));
    for &mode in MODES {
        scene.enter(mode)?;
        let before = count(&scene.log()?, LoadKind::AttemptTpm);
        let ended = scene.guest().run(&["tpm2", "pcrextend", &extend])?;
        if mode == Mode::Observe {
            assert!(ended.ok(), "{ended}");
            // Trust can be destroyed so, not gained.
            scene.distrusted_for("PCR 13")?;
            row.set(Column::Assay(mode), "", Outcome::Detected);
        } else {
            assert!(!ended.ok(), "{ended}");
            scene.wait_log("the attempt", |log| count(log, LoadKind::AttemptTpm) > before)?;
            scene.distrusted_for("open the TPM")?;
            row.set(Column::Assay(mode), "", Outcome::Refused);
        }
    }
    row.set(Column::Ima, "", Outcome::OutOfScope);
    row.note("root can extend the register where the TPM's device is not kept from others: the log then no longer leads to it. Malformed and oversized evidence is the matter of the parsers' own tests and fuzzers. Against PCR 10 the same is possible, and IMA leaves it to whoever replays its log");
    row.done();
    Ok(())
}

/// Passes connections on to a port that may change: a host's address that stays while machines come and go.
struct Relay {
    port: u16,
    target: Arc<AtomicU16>,
}

impl Relay {
    fn start() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let port = listener.local_addr().expect("its address").port();
        let target = Arc::new(AtomicU16::new(0));
        let to = Arc::clone(&target);
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, to.load(Ordering::SeqCst))) else {
                    continue;
                };
                for (mut from, mut to) in [
                    (
                        client.try_clone().expect("a socket"),
                        server.try_clone().expect("a socket"),
                    ),
                    (server, client),
                ] {
                    std::thread::spawn(move || {
                        // Either end closing is the normal end of this copy.
                        let _ = std::io::copy(&mut from, &mut to);
                        let _ = to.flush();
                        let _ = to.shutdown(std::net::Shutdown::Both);
                    });
                }
            }
        });
        Self { port, target }
    }

    fn to(&self, vm: &Vm) {
        let address = vm.agent_address();
        let port = address.rsplit(':').next().and_then(|port| port.parse().ok());
        self.target.store(port.expect("a port"), Ordering::SeqCst);
    }

    fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }
}

/// A machine with the agent's state and settings of another.
fn impersonate(vm: &Vm, state: &[u8]) -> Result<Agent, HarnessError> {
    vm.guest().put("/root/state.tar", 0o600, state)?;
    vm.guest().script("tar -xf /root/state.tar -C /")?;
    Agent::start(vm.guest())
}

#[test]
fn attack_22_another_attestation_key() -> Result<(), HarnessError> {
    let mut row = Row::new(22, "AK replacement, AK and EK of different TPMs, taking over a name");
    let relay = Relay::start();
    let scene = Scene::set_at(&relay.address(), |vm| relay.to(vm))?;
    // The name is taken, and nothing enrols itself again.
    let again = scene
        .stage
        .verifier
        .run(&["host", "add", HOST, &relay.address(), "--ek-sha256", &"00".repeat(32)])?;
    assert!(!again.status.success());
    // A foreign key in the handle: the agent does not use it.
    kill(&scene)?;
    let foreign = "tpm2 evictcontrol -C o -c 0x81010a55; tpm2 createprimary -C o -G ecc -c /root/key.ctx; tpm2 evictcontrol -C o -c /root/key.ctx 0x81010a55";
    scene.guest().script(foreign)?;
    let ended = scene.guest().run(&["assay-agent", "run"])?;
    assert_eq!(ended.code, Some(1), "{ended}");
    assert!(ended.stderr.contains("0x81010a55"), "{ended}");
    // All that is secret on the host, on a machine with another TPM.
    let state = {
        scene
            .guest()
            .run_ok(&["tar", "-cf", "/root/state.tar", "-C", "/", "var/lib/assay", "etc/assay"])?;
        scene.guest().get("/root/state.tar")?
    };
    let Scene { stage, .. } = scene;
    drop(stage.vm);
    let other = Vm::restore(&Image::load_kernel("6.1")?)?;
    impersonate(&other, &state)?;
    relay.to(&other);
    let host = stage.verifier.wait_host(HOST, "refused", PATIENCE, |host| {
        host.state == "untrusted" && host.reasons.iter().any(|reason| reason.contains("another TPM answers"))
    })?;
    assert_eq!(host.state, "untrusted");
    row.set_modes("", Outcome::Detected);
    row.set(Column::Ima, "", Outcome::OutOfScope);
    row.note("the verifier pins EK, AK and TLS key together; IMA has no verifier");
    row.done();
    Ok(())
}

#[test]
fn attack_23_a_clone_and_a_relay() -> Result<(), HarnessError> {
    let mut row = Row::new(23, "relay (cuckoo), cloned virtual TPM");
    let relay = Relay::start();
    let scene = Scene::set_at(&relay.address(), |vm| relay.to(vm))?;
    let Scene { stage, .. } = scene;
    drop(stage.vm);
    // The same TPM once more: restored from the same saved machine.
    let clone = Vm::restore(&image()?)?;
    agent::join(clone.guest(), &stage.verifier)?;
    let agent = Agent::start(clone.guest())?;
    let refused = agent.enrol(&clone, &stage.verifier, "clone");
    assert!(refused.is_err_and(|error| error.to_string().contains("endorsement key")));
    row.set_modes("cloned TPM", Outcome::Detected);
    // It answers in the host's place. Restored from the same state, it may have drawn the same random numbers when it made
    // its TLS key: then it is found out by its log.
    relay.to(&clone);
    stage.verifier.wait_host(HOST, "refused", PATIENCE, |host| {
        let why = |reason: &String| reason.contains("another TLS key") || reason.contains("the log shrank");
        host.state != "trusted" && host.reasons.iter().any(why)
    })?;
    row.set_modes("relay", Outcome::Detected);
    row.set(Column::Ima, "", Outcome::OutOfScope);
    row.note("a relay with the TLS key of a good host judges that host. Whether a TPM sits in the machine that it is said to sit in is for platform certificates, which this version does not check");
    row.done();
    Ok(())
}

#[test]
fn attack_24_stale_quotes_and_machines_put_back() -> Result<(), HarnessError> {
    let mut row = Row::new(24, "stale quote, replay, machine put back to an earlier state");
    let relay = Relay::start();
    let scene = Scene::set_at(&relay.address(), |vm| relay.to(vm))?;
    replayed(&scene);
    row.set_modes("replay", Outcome::Detected);
    // The machine as it was before it turned bad, its TPM and log included.
    scene.settled()?;
    let folder = tempfile::tempdir().expect("a scratch folder");
    let Scene { stage, settings } = scene;
    let (verifier, agent) = (stage.verifier, stage.agent);
    let mut image = image()?;
    image.saved = folder.path().to_owned();
    stage.vm.save(&image.snapshot())?;
    let vm = Vm::restore(&image)?;
    relay.to(&vm);
    let agent = agent.at(vm.guest());
    let scene = Scene::of(crate::common::Stage { verifier, agent, vm }, settings);
    let rogue = run_new(&scene, "/root/rogue")?;
    scene.distrusted_for(&rogue)?;
    let Scene { stage, settings } = scene;
    let (verifier, agent) = (stage.verifier, stage.agent);
    drop(stage.vm);
    let vm = Vm::restore(&image)?;
    relay.to(&vm);
    let agent = agent.at(vm.guest());
    let scene = Scene::of(crate::common::Stage { verifier, agent, vm }, settings);
    let host = scene.stage.wait("refused for going back", |host| {
        host.reasons
            .iter()
            .any(|reason| reason.contains("shrank") || reason.contains("stale"))
    })?;
    assert_eq!(host.state, "untrusted");
    row.set_modes("machine put back", Outcome::Detected);
    row.set(Column::Ima, "", Outcome::OutOfScope);
    row.note("IMA has no verifier, and no quote");
    row.done();
    Ok(())
}

/// An honest answer, given to another question.
fn replayed(scene: &Scene) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let asker = Asker::load(&StateDir::new(scene.stage.verifier.state_dir())).expect("the verifier's certificate");
        let address = scene.stage.vm.agent_address();
        let timeout = Duration::from_secs(60);
        let connect = || asker.connect(&address, Pin::FirstContact, timeout);
        let mut agent = connect().await.expect("a connection");
        let identity = agent.identity().await.expect("an identity");
        let ak = AttestationKey::new(identity.ak_public.as_ref()).expect("an attestation key");
        let nonce = fresh_nonce().expect("a nonce");
        let request = QuoteRequest {
            nonce,
            log_from: 0,
            boot_log: true,
        };
        let bundle = agent.quote(&request).await.expect("a quote");
        let mut later = connect().await.expect("a connection");
        later.identity().await.expect("an identity");
        let (other, held) = (fresh_nonce().expect("a nonce"), HeldLog::none());
        let check = |nonce, exporter| bundle.verify(&ak, &Binding::Quote { nonce, exporter }, &held).map(drop);
        check(&nonce, agent.exporter()).expect("the question that was asked, on its connection");
        for (nonce, exporter) in [(&other, agent.exporter()), (&nonce, later.exporter())] {
            let refused = check(nonce, exporter).expect_err("another question, or connection");
            assert!(matches!(refused, QuoteError::Binding), "{refused}");
        }
    });
}

#[test]
fn attack_25_the_tpm_is_reset_under_the_system() -> Result<(), HarnessError> {
    let mut row = Row::new(25, "TPM reset without host reset (reset line, bus), S3 resume");
    let options = RestoreOptions {
        extend_delay: Some(Duration::ZERO),
    };
    let vm = Vm::restore_with(&image()?, &options)?;
    let mut scene = Scene::set_in(
        vm,
        "",
        &format!("{TOOLS}; tpm2 pcrread sha256:13; tpm2 startup -c || true"),
    )?;
    let before = scene.guest().sysfs_pcr(0)?;
    scene.stage.vm.slow_tpm().expect("a proxy").reset_tpm()?;
    let ended = scene.guest().run(&["tpm2", "startup", "-c"])?;
    assert!(ended.ok(), "{ended}");
    assert_ne!(scene.guest().sysfs_pcr(0)?, before, "its registers are at zero");
    // It may notice, and end: when it next needs the TPM. Then it is started again, as systemd does.
    Guest::wait_for("untrusted for the reset", PATIENCE, || {
        let ended = scene.guest().wait(scene.stage.agent.pid(), Duration::ZERO)?;
        if !ended.timed_out {
            scene.stage.agent = Agent::start(scene.guest())?;
        }
        Ok(scene.verdict()?["reasons"]
            .to_string()
            .contains("TPM was reset")
            .then_some(()))
    })?;
    scene.distrusted_for("TPM was reset")?;
    row.set_modes("", Outcome::Detected);
    row.set(Column::Ima, "", Outcome::OutOfScope);
    row.note("the quote has the TPM's count of resets, and the log's boot is still the same. Who resets the TPM together with the machine's power has rebooted it");
    row.done();
    Ok(())
}

#[test]
fn attack_28_registers_that_software_can_reset() -> Result<(), HarnessError> {
    let mut row = Row::new(28, "PCR reset by software");
    let mut scene = Scene::set("", TOOLS)?;
    kill(&scene)?;
    let guest = scene.guest();
    for pcr in [16, 23] {
        guest.run_ok(&["tpm2", "pcrreset", &pcr.to_string()])?;
        guest.put("/root/other.toml", 0o600, format!("[tpm]\npcr = {pcr}\n").as_bytes())?;
        let ended = guest.run(&["assay-agent", "--config", "/root/other.toml", "run"])?;
        assert!(
            ended.code == Some(1) && ended.stderr.contains(&format!("tpm.pcr = {pcr} is refused")),
            "{ended}"
        );
    }
    assert!(
        !guest.run(&["tpm2", "pcrreset", "13"])?.ok(),
        "this one lasts until the TPM is reset"
    );
    row.set_modes("a register that can be reset", Outcome::Fails);
    // A register that somebody has used before the agent.
    guest.run_ok(&["sync"])?;
    scene.stage.vm.reset()?;
    let guest = scene.guest();
    guest.run_ok(&["tpm2", "pcrextend", &format!("13:sha256={}", "11".repeat(32))])?;
    scene.stage.agent = Agent::start(guest)?;
    scene.distrusted_for("before the log began")?;
    row.set_modes("extended before the agent", Outcome::Detected);
    row.set(Column::Ima, "", Outcome::Fails);
    row.done();
    Ok(())
}

#[test]
fn attack_34_a_key_after_a_bad_load() -> Result<(), HarnessError> {
    let mut row = Row::new(34, "secret-release races: good at quote time, bad after");
    let mut scene = Scene::set_with_disks(Vm::restore(&image()?)?, TOOLS)?;
    scene.stage.sealed_disk("/root/disk.img", b"x")?;
    let open = |scene: &Scene| agent::unlock(scene.guest(), "/root/disk.img", 60);
    for &mode in MODES {
        scene.enter(mode)?;
        if mode == MODES.first().copied().unwrap_or(Mode::Observe) {
            let ended = open(&scene)?;
            assert!(ended.ok(), "{mode}: {ended}");
            let device = ended.stdout.trim().trim_start_matches("/dev/mapper/").to_owned();
            scene.guest().run_ok(&["assay-agent", "lock", &device])?;
        }
        let rogue = run_new(&scene, &format!("/root/rogue-{mode}"))?;
        if mode == Mode::Enforce {
            // It did not run: the host is as good as before.
            scene.wait_log("the refusal", |log| !about(log, &rogue).is_empty())?;
            scene.still_trusted()?;
            row.set(Column::Assay(mode), "", Outcome::Refused);
            continue;
        }
        if mode == Mode::Observe {
            // Here it runs before it is in the register; from then on it counts.
            scene.wait_log("the rogue program", |log| !about(log, &rogue).is_empty())?;
            scene.settled()?;
        }
        // At once: the request brings evidence of its own, whatever the last look at the host said.
        let ended = open(&scene)?;
        assert_eq!(ended.code, Some(3), "{mode}: {ended}");
        assert!(
            ended.stderr.contains(&rogue) || ended.stderr.contains("rogue"),
            "{mode}: {ended}"
        );
        row.set(Column::Assay(mode), "", Outcome::Detected);
    }
    row.set(Column::Ima, "", Outcome::OutOfScope);
    row.note("in enforce the bad program does not run, and the host stays good. In observe it runs before it is in the register, and counts from then on. A key that a host has before it turns bad stays with it until its disks are closed");
    row.done();
    Ok(())
}
