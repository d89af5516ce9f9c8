//! The verifier's side: a state directory, the program's commands, and the running service.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use assay_evidence::digest::Sha256Digest;
use assay_evidence::terms::Terms;
use assay_evidence::uuid::Uuid;
use assay_tests::child::Child;
use assay_verifier::config::{Config, StateDir};
use assay_verifier::keystore::{self, KeyInfo, KeyKind, KeySource, Passphrase};
use serde_json::Value;
use tempfile::TempDir;

use crate::host::Machine;

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_assay-verifier");

/// A verifier.
pub struct Site {
    dir: TempDir,
    pub port: u16,
    service: Option<Child>,
}

/// What a run of the program left.
pub struct Ran {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Ran {
    /// Standard output of a run that worked.
    #[track_caller]
    pub fn good(self) -> String {
        assert_eq!(self.code, Some(0), "{}{}", self.out, self.err);
        self.out
    }

    /// Standard error of a run that failed, which names all of these.
    #[track_caller]
    pub fn refused(self, named: &[&str]) {
        assert_eq!(self.code, Some(1), "{}{}", self.out, self.err);
        for name in named {
            assert!(self.err.contains(name), "{name:?} is not named in: {}", self.err);
        }
    }
}

impl Site {
    /// A new verifier that polls this often, not serving yet.
    pub fn init(poll_interval_s: f64) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let site = Self {
            dir: tempfile::tempdir().unwrap(),
            port,
            service: None,
        };
        let url = format!("https://127.0.0.1:{port}");
        site.run(&["init", "--url", &url, "--listen", &format!("127.0.0.1:{port}")])
            .good();
        site.configure(poll_interval_s);
        site
    }

    fn configure(&self, poll_interval_s: f64) {
        let path = self.state().config();
        let text = std::fs::read_to_string(&path).unwrap();
        let is_interval = |line: &str| line.starts_with("poll_interval_s = ");
        assert_eq!(text.lines().filter(|l| is_interval(l)).count(), 1);
        let line = format!("poll_interval_s = {poll_interval_s:?}");
        let lines: Vec<_> = text
            .lines()
            .map(|l| if is_interval(l) { line.as_str() } else { l })
            .collect();
        std::fs::write(path, lines.join("\n")).unwrap();
    }

    /// Starts the service anew, with more words in its journal.
    pub fn serve_talkative(&mut self) {
        self.service = None;
        let path = self.state().config();
        let text = std::fs::read_to_string(&path).unwrap();
        let quiet = "level = \"info\"";
        assert_eq!(text.matches(quiet).count(), 1);
        std::fs::write(path, text.replace(quiet, "level = \"debug\"")).unwrap();
        self.serve();
    }

    /// Starts the service anew with another interval, and waits for its first poll.
    pub fn poll_every(&mut self, seconds: f64) {
        self.service = None;
        self.configure(seconds);
        let before = last_quotes(&self.run(&["host", "list", "--json"]).good());
        std::thread::sleep(Duration::from_millis(1100));
        self.serve();
        let start = Instant::now();
        while last_quotes(&self.run(&["host", "list", "--json"]).good()) == before {
            assert!(start.elapsed() < Duration::from_secs(60), "{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A verifier that serves.
    pub fn serving(poll_interval_s: f64) -> Self {
        let mut site = Self::init(poll_interval_s);
        site.serve();
        site
    }

    pub fn serve(&mut self) {
        let state = self.state();
        let log = std::fs::File::create(self.dir.path().join("serve.log")).unwrap();
        let service = Child::spawn(PROGRAM, |command| {
            command
                .arg("--state")
                .arg(state.path())
                .arg("serve")
                .stderr(Stdio::from(log));
        });
        self.service = Some(service.unwrap());
        let start = Instant::now();
        while !self.log().contains("listening on") {
            assert!(start.elapsed() < Duration::from_secs(30), "{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Kills the service and starts it anew.
    pub fn serve_again(&mut self) {
        self.stop();
        self.serve();
    }

    pub fn stop(&mut self) {
        self.service = None;
    }

    /// What the service wrote to the journal.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("serve.log")).unwrap_or_default()
    }

    pub fn state(&self) -> StateDir {
        StateDir::new(self.dir.path().join("state"))
    }

    pub fn join_file(&self) -> PathBuf {
        self.state().join_file()
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        let output = Command::new(PROGRAM)
            .arg("--state")
            .arg(self.state().path())
            .args(args)
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Ran {
            code: output.status.code(),
            out: text(output.stdout),
            err: text(output.stderr),
        }
    }

    /// Enrols a machine by its EK.
    pub fn add(&self, name: &str, machine: &Machine) -> Ran {
        self.run(&[
            "host",
            "add",
            name,
            &machine.address(),
            "--ek-sha256",
            &machine.ek_sha256(),
        ])
    }

    /// A machine that is enrolled, captured and trusted.
    pub fn trusted_host(&self, name: &str) -> Machine {
        self.trusted(name, Machine::joined(&self.join_file()))
    }

    /// The machine, enrolled, captured and trusted.
    pub fn trusted(&self, name: &str, machine: Machine) -> Machine {
        self.add(name, &machine).good();
        self.run(&["policy", "capture", name, "--add"]).good();
        self.wait_for(name, "trusted");
        machine
    }

    pub fn show(&self, name: &str) -> Value {
        serde_json::from_str(&self.run(&["host", "show", name, "--json"]).good()).unwrap()
    }

    /// Waits until a host is in this state, and gives what is shown then.
    #[track_caller]
    pub fn wait_for(&self, name: &str, state: &str) -> Value {
        self.wait_until(name, |shown| shown["state"] == state)
    }

    #[track_caller]
    pub fn wait_until(&self, name: &str, enough: impl Fn(&Value) -> bool) -> Value {
        let start = Instant::now();
        loop {
            let shown = self.show(name);
            if enough(&shown) {
                return shown;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "{shown:#}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Keeps a new key under a policy.
    pub fn new_key(&self, policy: &str) -> (KeyInfo, Passphrase) {
        self.new_key_for(policy, &[])
    }

    /// The same for hosts with these tags alone.
    pub fn new_key_for(&self, policy: &str, tags: &[&str]) -> (KeyInfo, Passphrase) {
        self.put_key(policy, tags, None)
    }

    /// A key that is bound to a LUKS header.
    pub fn bound_key(&self, header: Sha256Digest) -> KeyInfo {
        self.put_key("default", &[], Some(header)).0
    }

    /// Adds sections to the configuration, which the service reads when it starts.
    pub fn configure_more(&self, sections: &str) {
        let path = self.state().config();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(path, text + sections).unwrap();
    }

    fn put_key(&self, policy: &str, tags: &[&str], header: Option<Sha256Digest>) -> (KeyInfo, Passphrase) {
        let source = Config::load(&self.state()).unwrap().key_source;
        let store = keystore::open(self.state().path(), source.as_ref()).unwrap();
        let mut bytes = [[0; 16]; 2];
        for id in &mut bytes {
            ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), id).unwrap();
        }
        let [key_id, disk_uuid] = bytes.map(Uuid::from_random);
        let info = KeyInfo {
            key_id,
            kind: KeyKind::Luks,
            disk_uuid,
            policy: policy.to_owned(),
            tags: tags.iter().map(ToString::to_string).collect(),
            image: "disk.img".to_owned(),
            size: 1 << 20,
            created: 1,
            header,
            replaces: None,
            terms: Terms::default(),
        };
        let passphrase = Passphrase::generate().unwrap();
        store.put(&info, &passphrase).unwrap();
        (info, passphrase)
    }
}

/// The reasons in what is shown of a host.
pub fn reasons(shown: &Value) -> Vec<&str> {
    shown["reasons"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| r.as_str().unwrap())
        .collect()
}

/// When each host was last seen.
fn last_quotes(hosts: &str) -> Vec<Value> {
    let hosts: Vec<Value> = serde_json::from_str(hosts).unwrap();
    hosts.into_iter().map(|mut host| host["last_quote"].take()).collect()
}
