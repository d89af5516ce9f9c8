//! A disk key, from the sealed image to the point where device-mapper takes over (which is tested in a virtual machine): a real
//! TPM, a real LUKS2 image, TLS, and a key broker that judges with `assay-evidence`.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test says what it expects by panicking"
)]

mod broker;
mod verifier;

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

use assay_agent::approved::ApprovedStore;
use assay_agent::bundle::Source;
use assay_agent::leases::Leases;
use assay_agent::log_view::LogView;
use assay_agent::tpm::{AkKind, Handle};
use assay_agent::unlock::api::{Status, UnlockRequest, VhdKeyRequest};
use assay_agent::unlock::machine::Refusal;
use assay_agent::unlock::socket::{SocketError, SocketServer};
use assay_agent::unlock::{UnlockError, Unlocker};
use assay_evidence::digest::Sha256Digest;
use assay_evidence::uuid::Uuid;
use assay_evidence::vhd::KeyHash;
use assay_tests::Swtpm;
use broker::{Broker, DISK, KEY_ID, Mood};
use verifier::{BOOT_ID, Ca, join_to, measure, tpm_config_with};

/// A joined host with an agent's socket, and a sealed image.
struct Host {
    dir: tempfile::TempDir,
    unlocker: Unlocker,
    runtime: tokio::runtime::Runtime,
    _swtpm: Swtpm,
}

impl Host {
    /// Joined to `ca`, which may be another than the one that signed the broker's certificate.
    fn start(broker: &Broker, ca: &Ca) -> Self {
        Self::start_with(&[broker], ca, AkKind::EcdsaP256)
    }

    fn start_with(brokers: &[&Broker], ca: &Ca, ak: AkKind) -> Self {
        let swtpm = Swtpm::start().unwrap();
        let log = LogView::new(BOOT_ID.to_owned());
        let tpm = Handle::open(tpm_config_with(&swtpm.tcti(), ak), log.clone()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        measure(&tpm, dir.path());
        let state = dir.path().join("state");
        std::fs::create_dir(&state).unwrap();
        let urls: Vec<String> = brokers.iter().map(|broker| broker.url()).collect();
        let urls: Vec<&str> = urls.iter().map(String::as_str).collect();
        let joined = join_to(ca, &urls, &state);
        for broker in brokers {
            broker.enrol(&tpm.identity().ak_public);
        }
        seal(&dir.path().join("disk"), &urls, joined.membership.ca_spki());
        let config = format!(
            "state_dir = {state:?}\nrun_dir = {:?}\n[unlock]\ntimeout_s = 2\n",
            dir.path()
        );
        std::fs::write(dir.path().join("agent.toml"), config).unwrap();

        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let source = Source::new(log.clone(), &swtpm.tcti());
        let approved = ApprovedStore::open(&state);
        let unlocker = Unlocker::new(
            state,
            Duration::from_secs(2),
            tpm.clone(),
            source,
            Leases::open(dir.path()),
        )
        .unwrap();
        let status = Arc::new(move || status(&tpm, &log));
        let socket = dir.path().join("agent.sock");
        let server = runtime
            .block_on(SocketServer::bind(&socket, unlocker.clone(), approved, status))
            .unwrap();
        runtime.spawn(async move { server.run().await.map(|_| ()) });
        Self {
            dir,
            unlocker,
            runtime,
            _swtpm: swtpm,
        }
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    /// The program itself, as an operator calls it.
    fn agent(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_assay-agent"))
            .arg("--config")
            .arg(self.dir.path().join("agent.toml"))
            .args(arguments)
            .output()
            .unwrap()
    }

    fn unlock(&self) -> (i32, String) {
        self.unlock_with(&[])
    }

    fn unlock_with(&self, options: &[&str]) -> (i32, String) {
        let output = self.agent(&[&["unlock", self.image().to_str().unwrap()], options].concat());
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    }
}

fn status(tpm: &Handle, log: &LogView) -> Status {
    let snapshot = log.snapshot();
    Status {
        version: "test".into(),
        pid: std::process::id(),
        boot_id: log.boot_id().to_owned(),
        tier: 1,
        blind: String::new(),
        mode: "observe".into(),
        pcr: 13,
        records: snapshot.records,
        log_bytes: snapshot.bytes,
        log_head: snapshot.head,
        lost: 0,
        no_room: 0,
        log_full: false,
        ek_sha256: Sha256Digest::of(&tpm.identity().ek_public),
        ek: tpm.identity().ek_kind.name().to_owned(),
        ak: tpm.identity().ak_kind.name().to_owned(),
        tpm_manufacturer: tpm.identity().manufacturer.clone(),
        tpm_firmware: tpm.identity().firmware.clone(),
        tpm_worked_us: 0,
        joined: None,
        disks: Vec::new(),
    }
}

fn seal(image: &std::path::Path, urls: &[&str], ca_spki: Sha256Digest) {
    let path = |name: &str| image.with_file_name(name).display().to_string();
    std::fs::File::create(image).unwrap().set_len(16 * 1024 * 1024).unwrap();
    std::fs::write(path("key"), broker::PASSPHRASE).unwrap();
    let token = serde_json::json!({"type": "assay", "keyslots": ["0"], "version": 1, "verifiers": urls,
        "verifier_spki_sha256": ca_spki.to_string(), "key_id": KEY_ID, "policy": "default"});
    std::fs::write(path("token"), token.to_string()).unwrap();
    let image = image.display().to_string();
    let format = [
        "luksFormat",
        "--batch-mode",
        "--type",
        "luks2",
        "--uuid",
        DISK,
        "--sector-size",
        "512",
    ];
    let cheap = [
        "--pbkdf",
        "pbkdf2",
        "--pbkdf-force-iterations",
        "1000",
        "--luks2-keyslots-size",
        "256k",
    ];
    for arguments in [
        [format.as_slice(), &cheap, &[&image, &path("key")]].concat(),
        vec!["token", "import", "--json-file", &path("token"), &image],
    ] {
        let output = Command::new("cryptsetup")
            .args(&arguments)
            .output()
            .expect("`cargo xtask setup` installs cryptsetup");
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

/// Every step up to the kernel's: where there is no device-mapper, that it is the first thing missed says that the key came out of
/// the TPM, authenticated.
#[test]
fn a_trusted_host_gets_its_key() {
    for ak in [AkKind::EcdsaP256, AkKind::Rsa2048] {
        gets_its_key(ak);
    }
}

fn gets_its_key(ak: AkKind) {
    let broker = Broker::start(Mood::Judge);
    let host = Host::start_with(&[&broker], &broker.ca(), ak);
    let name = format!("assay-test-{}", std::process::id());
    let request = UnlockRequest {
        image: host.image(),
        name: Some(name.clone()),
        timeout_s: None,
        vm: None,
    };
    match host.runtime.block_on(host.unlocker.unlock(request)) {
        Ok(device) => {
            assert!(device.exists());
            host.runtime.block_on(host.unlocker.lock(name)).unwrap();
        }
        Err(assay_agent::unlock::UnlockError::Disk(assay_agent::unlock::luks::DiskError::Activate { .. })) => {}
        Err(error) => panic!("{error:?}"),
    }
    assert_eq!(broker.released(), 1);
    // And measuring goes on: the release key's hold on the PCR is over.
    let (code, _) = host.unlock();
    assert!(code == 0 || code == 1);
    assert_eq!(broker.released(), 2);
}

#[test]
fn a_refusal_ends_with_3_and_the_verifiers_reasons() {
    let broker = Broker::start(Mood::Refuse);
    let host = Host::start(&broker, &broker.ca());
    let (code, text) = host.unlock();
    assert_eq!(code, 3, "{text}");
    assert!(text.contains("does not meet policy"), "{text}");
    assert!(text.contains("\n  program /root/rogue is not approved"), "{text}");
}

#[test]
fn an_unknown_key_is_an_error_of_its_own() {
    let broker = Broker::start(Mood::NoSuchKey);
    let host = Host::start(&broker, &broker.ca());
    let (code, text) = host.unlock();
    assert_eq!(code, 1, "{text}");
    assert!(
        text.contains("no verifier has this key") && text.contains(KEY_ID),
        "{text}"
    );
}

#[test]
fn another_keys_answer_is_not_taken() {
    let broker = Broker::start(Mood::OtherKey);
    let host = Host::start(&broker, &broker.ca());
    let (code, text) = host.unlock();
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("holds another key"), "{text}");
}

/// The verifier's store has something else under the key's id: told apart from a host that is refused, and nothing is left of it.
#[test]
fn a_key_that_does_not_open_the_disk_is_named_and_leaves_nothing() {
    let broker = Broker::start(Mood::WrongSecret);
    let host = Host::start(&broker, &broker.ca());
    let (code, text) = host.unlock_with(&["--name", "assay-wrong-key"]);
    assert_eq!((code, broker.released()), (1, 1), "{text}");
    for named in [KEY_ID, host.image().to_str().unwrap(), "recovery key"] {
        assert!(text.contains(named), "{named} in {text}");
    }
    assert!(!text.contains("ffff"), "{text}");
    // It had a lease, which nothing is left to be done for.
    let known = std::fs::read(host.dir.path().join("disks.json")).unwrap();
    assert_eq!(known, b"[]");
    assert!(!std::path::Path::new("/dev/mapper/assay-wrong-key").exists());
    let loops = std::fs::read_dir("/sys/class/block").unwrap().flatten();
    let mut backing = loops.filter_map(|entry| std::fs::read_to_string(entry.path().join("loop/backing_file")).ok());
    assert!(!backing.any(|file| file.trim_end() == host.image().to_str().unwrap()));
}

/// Half of the time is the first one's, the other half is left for the second.
#[test]
fn a_slow_verifier_is_left_for_the_next() {
    let slow = Broker::start(Mood::SlowToRelease);
    let quick = Broker::start_under(Mood::Judge, slow.ca());
    let host = Host::start_with(&[&slow, &quick], &slow.ca(), AkKind::EcdsaP256);
    let (code, text) = host.unlock_with(&["--timeout", "8", "--name", "assay-slow"]);
    let opened = code == 0 && host.agent(&["lock", "assay-slow"]).status.success();
    assert!(opened || text.contains("could not be opened as /dev/mapper"), "{text}");
    assert_eq!((slow.asked(), slow.released(), quick.released()), (2, 0, 1));
}

#[test]
fn a_slow_verifier_is_an_error_of_its_own() {
    let broker = Broker::start(Mood::SlowToChallenge);
    let host = Host::start(&broker, &broker.ca());
    let (code, text) = host.unlock_with(&["--timeout", "1"]);
    assert_eq!(code, 4, "{text}");
    assert!(
        text.contains(&format!("{}: no answer within 3 s", broker.url())),
        "{text}"
    );
    // What hooks ask first.
    let output = host.agent(&["verdict", "--timeout", "1"]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(4), "{text}");
    assert!(
        text.contains(&format!("{}: no answer within 1 s", broker.url())),
        "{text}"
    );
}

#[test]
fn an_unreachable_verifier_is_tried_until_the_deadline() {
    let mut stopping = Broker::start(Mood::Judge);
    let host = Host::start(&stopping, &stopping.ca());
    stopping.stop();
    let start = Instant::now();
    let (code, text) = host.unlock();
    assert_eq!(code, 4, "{text}");
    assert!(
        start.elapsed() >= Duration::from_secs(2),
        "it tried for as long as it was told to"
    );
    assert!(start.elapsed() < Duration::from_secs(20), "and gave up then");
    assert!(text.contains("within 2 s") && text.contains("127.0.0.1"), "{text}");
    let output = host.agent(&["verdict", "--timeout", "1"]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        (output.status.code(), output.stdout.as_slice()),
        (Some(4), &[][..]),
        "{text}"
    );
    assert!(text.contains("within 1 s") && text.contains("127.0.0.1"), "{text}");
}

/// Requests that pause between their tries do not keep others from theirs: each learns that nobody answers, none that it had no turn.
#[test]
fn whoever_waits_for_an_unreachable_verifier_keeps_nobody_waiting() {
    let mut stopping = Broker::start(Mood::Judge);
    let host = Host::start(&stopping, &stopping.ca());
    stopping.stop();
    let key_hash = KeyHash::of(&[7; 32]).unwrap();
    let ask = |number: u128, timeout_s| {
        let unlocker = host.unlocker.clone();
        let request = VhdKeyRequest {
            key_hash,
            vdi_uuid: Uuid::new(number.to_be_bytes()),
            timeout_s: Some(timeout_s),
        };
        async move { unlocker.vhd_key(request).await }
    };
    for number in 0..8 {
        host.runtime.spawn(ask(number, 600));
    }
    // They have tried by then, and pause.
    std::thread::sleep(Duration::from_millis(500));
    let answered = host.runtime.block_on(ask(8, 5)).map(drop);
    assert!(
        matches!(answered, Err(UnlockError::Refused(Refusal::Unreachable { .. }))),
        "{answered:?}"
    );
}

#[test]
fn a_verifier_of_another_ca_is_not_told_anything() {
    let broker = Broker::start(Mood::Judge);
    let host = Host::start(&broker, &Ca::new("verifier"));
    let (code, text) = host.unlock();
    assert_eq!(code, 4, "{text}");
    assert!(text.contains("certificate"), "{text}");
    assert_eq!(broker.asked(), 0);
}

#[test]
fn images_that_are_not_ours_are_refused_before_anyone_is_asked() {
    let broker = Broker::start(Mood::Judge);
    let host = Host::start(&broker, &broker.ca());
    let elsewhere = host.dir.path().join("elsewhere");
    let other = host.dir.path().join("b");
    std::fs::create_dir(&other).unwrap();
    seal(&other.join("disk"), &["https://evil.example:1"], Sha256Digest::of(b""));
    std::fs::write(&elsewhere, vec![0; 1 << 20]).unwrap();
    for (image, names) in [
        (elsewhere, "is not a LUKS2 image"),
        (other.join("disk"), "https://evil.example:1"),
        (host.dir.path().to_owned(), "cannot open the image"),
        (PathBuf::from("/nonexistent"), "cannot find the image"),
    ] {
        let output = host.agent(&["unlock", image.to_str().unwrap()]);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains(names), "{text}");
    }
    let output = host.agent(&["unlock", host.image().to_str().unwrap(), "--name", "../sda"]);
    assert!(String::from_utf8(output.stderr).unwrap().contains("is not a name"));
    let output = host.agent(&["lock", "never-opened"]);
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("no open disk is called")
    );
    assert_eq!(broker.asked(), 0);
}

#[test]
fn the_local_socket_is_its_users_alone_and_takes_nobodys_place() {
    let broker = Broker::start(Mood::Judge);
    let host = Host::start(&broker, &broker.ca());
    let socket = host.dir.path().join("agent.sock");
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&socket), 0o600);
    let bind = |path: &std::path::Path| {
        let approved = ApprovedStore::open(&host.dir.path().join("state"));
        let status = Arc::new(|| panic!("nobody asks"));
        let bound = SocketServer::bind(path, host.unlocker.clone(), approved, status);
        host.runtime.block_on(bound).err().expect("it cannot be bound")
    };
    // While a daemon answers there; and where somebody else put something that is no socket.
    assert!(matches!(bind(&socket), SocketError::InUse(_)));
    let blocked = host.dir.path().join("blocked.sock");
    std::fs::create_dir(&blocked).unwrap();
    assert!(matches!(bind(&blocked), SocketError::Bind { .. }));
    assert!(blocked.is_dir());
}

#[test]
fn status_and_log_can_be_read() {
    let broker = Broker::start(Mood::Judge);
    let host = Host::start(&broker, &broker.ca());
    let text = String::from_utf8(host.agent(&["status"]).stdout).unwrap();
    assert!(text.contains(BOOT_ID) && text.contains("mode observe"), "{text}");
    let json: Status = serde_json::from_slice(&host.agent(&["status", "--json"]).stdout).unwrap();
    assert!(json.records >= 2);
    // `run_dir` of the test's measuring is a folder below; the command reads the configured one.
    std::fs::copy(host.dir.path().join("run/log.cel"), host.dir.path().join("log.cel")).unwrap();
    let text = String::from_utf8(host.agent(&["log"]).stdout).unwrap();
    assert!(text.lines().next().unwrap().contains("agent-start"), "{text}");
    assert!(text.contains("inventory") && text.contains("ready"), "{text}");
    let json = host.agent(&["log", "--json"]).stdout;
    let lines: Vec<serde_json::Value> = String::from_utf8(json)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines[0]["recnum"], 0);
    assert_eq!(lines[0]["pcr"], 13);

    // Cut inside a record: as if the agent were writing it. Changed in the middle: damaged.
    let mut bytes = std::fs::read(host.dir.path().join("log.cel")).unwrap();
    bytes.pop();
    std::fs::write(host.dir.path().join("log.cel"), &bytes).unwrap();
    assert_eq!(host.agent(&["log"]).status.code(), Some(0));
    bytes[0] = 0xff;
    std::fs::write(host.dir.path().join("log.cel"), &bytes).unwrap();
    let output = host.agent(&["log"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().contains("damaged at byte 0"));
}

#[test]
fn without_an_agent_the_commands_say_how_to_start_it() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("agent.toml");
    std::fs::write(&config, format!("run_dir = {:?}\n", dir.path())).unwrap();
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_assay-agent"))
            .arg("--config")
            .arg(&config)
            .args(arguments)
            .output();
        let output = output.unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, text) = run(&["status"]);
    assert_eq!(code, Some(1));
    assert!(text.contains("systemctl start assay-agent"), "{text}");
    assert_eq!(run(&["nonsense"]).0, Some(2));
    std::fs::write(&config, "runn_dir = \"/run\"\n").unwrap();
    let (code, text) = run(&["status"]);
    assert_eq!(code, Some(1));
    assert!(text.contains("agent.toml:1") && text.contains("runn_dir"), "{text}");
}
