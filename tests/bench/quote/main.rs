//! `cargo xtask bench quote`: what a quote costs over mutual TLS, on an emulated TPM.
//!
//! The agent runs as a process of its own, with everything that `assay-agent run` has but the kernel programs: those need
//! a kernel with BPF LSM, so a [`source::Paced`] hands over records of the kernel's layout. The asker is the verifier's
//! own client. The floor, TPM2_Quote without TLS, HTTP and JSON, is measured in the same run.
#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

mod attester;
mod source;
mod stats;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use assay_agent::log_view::LogView;
use assay_agent::tpm;
use assay_evidence::binding::Nonce;
use assay_evidence::wire::QuoteRequest;
use assay_tests::Swtpm;
use assay_verifier::cli::init;
use assay_verifier::client::{Agent, Asker, Pin};
use assay_verifier::config::StateDir;

use stats::Samples;

/// Records that the agent's log holds while it is measured.
const RECORDS: u64 = 10_000;
const KEPT_ALIVE: usize = 2_000;
const FRESH: usize = 200;
const IDENTITIES: usize = 500;
const CLIENTS: usize = 8;
const TIMEOUT: Duration = Duration::from_secs(30);
const START: Duration = Duration::from_secs(300);

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> Outcome<()> {
    let mut words = std::env::args().skip(1);
    match words.next().as_deref() {
        Some("--attester") => attester::run(Path::new(&words.next().ok_or("--attester wants a folder")?)),
        // `--bench` is what cargo adds.
        _ => tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?
            .block_on(measure()),
    }
}

async fn measure() -> Outcome<()> {
    let folder = tempfile::tempdir()?;
    let state = StateDir::new(folder.path().join("verifier"));
    init::create(&state, &"https://127.0.0.1:1".parse()?, None)?;
    let swtpm = Swtpm::start()?;
    let mut attester = Attester::start(folder.path(), &state, &swtpm)?;
    let asker = Asker::load(&state)?;
    attester.wait(&asker).await?;

    let mut report = Vec::new();
    report.push(floor().await?);
    report.push(kept_alive(&asker, &attester.address).await?);
    report.push(fresh(&asker, &attester.address).await?);
    report.extend(identity_under_load(&asker, &attester.address).await?);
    for samples in &report {
        samples.save(&raw_folder())?;
        println!("{samples}");
    }
    if let [floor, kept, ..] = report.as_slice() {
        println!(
            "quote kept-alive / TPM alone at p50: {:.2}",
            kept.quantile(0.5) / floor.quantile(0.5)
        );
    }
    println!("agent memory with {RECORDS} log records: {}", attester.memory()?);
    println!("raw data: {}", raw_folder().display());
    Ok(())
}

/// TPM2_Quote and the PCR reads that belong to it, by the agent's own TPM thread and nothing else.
async fn floor() -> Outcome<Samples> {
    let swtpm = Swtpm::start()?;
    let config = tpm::TpmConfig {
        tcti: swtpm.tcti(),
        pcr: 13,
        ak_handle: 0x8101_0A55,
        ak: tpm::AkKind::EcdsaP256,
        ek: None,
        timeout: TIMEOUT,
    };
    let handle = tpm::Handle::open(config, LogView::new("bench".into()))?;
    let mut samples = Samples::new("TPM alone");
    for turn in 0..KEPT_ALIVE {
        let start = Instant::now();
        handle
            .quote(move |_| [u8::try_from(turn % 256).unwrap_or_default(); 32])
            .await?;
        samples.push(start.elapsed());
    }
    Ok(samples)
}

async fn kept_alive(asker: &Asker, address: &str) -> Outcome<Samples> {
    let mut agent = asker.connect(address, Pin::FirstContact, TIMEOUT).await?;
    let mut samples = Samples::new("quote, kept-alive");
    for turn in 0..KEPT_ALIVE {
        let start = Instant::now();
        quote(&mut agent, turn).await?;
        samples.push(start.elapsed());
    }
    Ok(samples)
}

async fn fresh(asker: &Asker, address: &str) -> Outcome<Samples> {
    let mut samples = Samples::new("quote, fresh connection");
    for turn in 0..FRESH {
        let start = Instant::now();
        let mut agent = asker.connect(address, Pin::FirstContact, TIMEOUT).await?;
        quote(&mut agent, turn).await?;
        samples.push(start.elapsed());
    }
    Ok(samples)
}

/// GET /v1/identity, alone and then while eight clients keep asking for quotes.
async fn identity_under_load(asker: &Asker, address: &str) -> Outcome<[Samples; 2]> {
    let mut agent = asker.connect(address, Pin::FirstContact, TIMEOUT).await?;
    let quiet = identities(&mut agent, "identity, quiet").await?;
    // Threads of their own: on one runtime the asker would measure how long its own answers take to parse.
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        let (asker, address, stop) = (asker.clone(), address.to_owned(), stop.clone());
        clients.push(std::thread::spawn(move || -> Outcome<usize> {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?
                .block_on(async {
                    let mut agent = asker.connect(&address, Pin::FirstContact, TIMEOUT).await?;
                    let mut asked = 0;
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                        quote(&mut agent, asked).await?;
                        asked += 1;
                    }
                    Ok(asked)
                })
        }));
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let busy = identities(&mut agent, "identity, 8 clients quoting").await;
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let mut quotes = 0;
    for client in clients {
        quotes += client.join().map_err(|_| "a client thread died")??;
    }
    println!("quotes answered meanwhile: {quotes}");
    Ok([quiet, busy?])
}

async fn identities(agent: &mut Agent, name: &'static str) -> Outcome<Samples> {
    let mut samples = Samples::new(name);
    for _ in 0..IDENTITIES {
        let start = Instant::now();
        agent.identity().await?;
        samples.push(start.elapsed());
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(samples)
}

/// A poll that finds nothing new: the asker holds the whole log, as it does nearly always.
async fn quote(agent: &mut Agent, turn: usize) -> Outcome<u64> {
    let mut nonce = [0; 32];
    nonce
        .iter_mut()
        .zip(turn.to_be_bytes())
        .for_each(|(to, from)| *to = from);
    let request = QuoteRequest {
        nonce: Nonce::new(nonce),
        log_from: RECORDS,
        boot_log: false,
    };
    Ok(agent.quote(&request).await?.log.records)
}

/// Where the raw figures go.
fn raw_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .with_file_name("target")
        .join("bench")
}

/// The agent, as a process of its own.
struct Attester {
    child: Child,
    address: String,
}

impl Attester {
    fn start(folder: &Path, verifier: &StateDir, swtpm: &Swtpm) -> Outcome<Self> {
        let address = free_address()?;
        attester::prepare(folder, verifier, &address, &swtpm.tcti())?;
        let child = Command::new(std::env::current_exe()?)
            .arg("--attester")
            .arg(folder)
            .spawn()?;
        Ok(Self { child, address })
    }

    /// Waits until the log is as long as it shall be.
    async fn wait(&mut self, asker: &Asker) -> Outcome<()> {
        let start = Instant::now();
        while start.elapsed() < START {
            if let Some(status) = self.child.try_wait()? {
                return Err(format!("the agent ended with {status}").into());
            }
            if let Ok(mut agent) = asker.connect(&self.address, Pin::FirstContact, TIMEOUT).await
                && quote(&mut agent, 0).await? >= RECORDS
            {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        Err(format!("the agent's log did not reach {RECORDS} records within {START:?}").into())
    }

    /// What the kernel says of the process: resident in all, and the share that is its own (not files mapped).
    fn memory(&self) -> Outcome<String> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let (Some(all), Some(own), Some(peak)) = (field("VmRSS:"), field("RssAnon:"), field("VmHWM:")) else {
            return Err("no VmRSS in /proc".into());
        };
        Ok(format!("{all} resident ({own} anonymous), {peak} at most"))
    }
}

impl Drop for Attester {
    fn drop(&mut self) {
        // Already gone is as good.
        let _gone = self.child.kill();
        let _status = self.child.wait();
    }
}

fn free_address() -> std::io::Result<String> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string())
}
