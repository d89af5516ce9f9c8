//! The whole daemon but for the kernel programs: a TPM, a source of measurements, the local socket, signals.
//!
//! Signals are the process's, so the cases run one after the other in one test.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests say what they expect by panicking"
)]

mod common;

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use assay_agent::config::Config;
use assay_agent::daemon::{DaemonError, Parts, run_with};
use assay_agent::tpm::Handle;
use assay_evidence::event::Event;
use assay_tests::Swtpm;
use assay_tests::proxy::TpmProxy;
use common::{Queue, open_for, settings, wait_for};
use nix::sys::signal::{Signal, raise};

fn config(dir: &Path) -> Config {
    let text = format!(
        "listen = \"127.0.0.1:0\"\nstate_dir = {:?}\nrun_dir = {:?}\n",
        dir.join("state").display().to_string(),
        dir.display().to_string(),
    );
    Config::parse(&text, Path::new("agent.toml")).unwrap()
}

/// Runs the daemon in a thread of its own, as `assay-agent run` does.
fn start(dir: &Path, tpm: &Handle, queue: &Queue) -> std::thread::JoinHandle<Result<(), DaemonError>> {
    let config = config(dir);
    let parts = Parts {
        tpm: tpm.clone(),
        source: Box::new(queue.clone()),
        settings: settings(dir, true),
    };
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(run_with(&config, parts))
    })
}

fn status(dir: &Path) -> Option<serde_json::Value> {
    let mut stream = UnixStream::connect(config(dir).socket()).ok()?;
    stream
        .write_all(b"GET /v1/status HTTP/1.1\r\nHost: agent.sock\r\nConnection: close\r\n\r\n")
        .ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()
}

fn events(dir: &Path) -> Vec<Event> {
    let bytes = std::fs::read(dir.join("log.cel")).unwrap();
    assay_evidence::cel::read_all(&bytes)
        .unwrap()
        .iter()
        .flat_map(|record| record.events().unwrap())
        .collect()
}

#[test]
fn tpm_daemon_stops_in_order_on_sigterm_and_ends_when_a_part_does() {
    // SIGTERM: AGENT_STOP is the last word, and the end is a good one.
    let (swtpm, dir, queue) = (Swtpm::start().unwrap(), tempfile::tempdir().unwrap(), Queue::default());
    let tpm = open_for(swtpm.tcti(), Duration::from_secs(20)).unwrap();
    let daemon = start(dir.path(), &tpm, &queue);
    wait_for("the local socket", || status(dir.path()).is_some());
    queue.push(0..3);
    let records = tpm.log().snapshot().records;
    wait_for("the events", || tpm.log().snapshot().records > records);
    let now = status(dir.path()).unwrap();
    assert_eq!(now["records"], tpm.log().snapshot().records);
    assert_eq!(
        (now["pcr"].as_u64(), now["lost"].as_u64(), now.get("joined")),
        (Some(13), Some(0), None)
    );
    raise(Signal::SIGTERM).unwrap();
    daemon.join().unwrap().unwrap();
    assert_eq!(events(dir.path()).last(), Some(&Event::AgentStop));
    assert!(!config(dir.path()).socket().exists());
    drop(tpm);

    // A TPM that stops answering ends the daemon with an error, though nothing happens that would need it.
    let proxy = TpmProxy::start(&swtpm).unwrap();
    let tpm = open_for(proxy.tcti(), Duration::from_secs(1)).unwrap();
    let daemon = start(dir.path(), &tpm, &queue);
    wait_for("the local socket", || status(dir.path()).is_some());
    proxy.hang();
    let error = daemon.join().unwrap().unwrap_err();
    assert!(matches!(error, DaemonError::Tpm(_)), "{error}");
    drop((proxy, tpm));
    let note = std::fs::read_to_string(dir.path().join("tpm-failed")).unwrap();
    assert!(note.contains("did not answer"), "for the next agent: {note}");

    // A log that is full ends nothing; a kernel side that breaks does. With a queue of its own: the loop of a daemon that gave
    // up on its TPM may still be taking from the other.
    let queue = Queue::default();
    let tpm = open_for(swtpm.tcti(), Duration::from_secs(20)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut parts = Parts {
        tpm,
        source: Box::new(queue.clone()),
        settings: settings(dir.path(), true),
    };
    parts.settings.log_max_bytes = 1 << 20;
    let (config, filler) = (config(dir.path()), queue.clone());
    let daemon = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(run_with(&config, parts))
    });
    wait_for("the local socket", || status(dir.path()).is_some());
    filler.push(10..20_000);
    wait_for("the log to be full", || {
        status(dir.path()).is_some_and(|status| status["log_full"] == true)
    });
    filler.lose(1);
    wait_for("the loss", || {
        status(dir.path()).is_some_and(|status| status["lost"] == 1)
    });
    filler.fail();
    let error = daemon.join().unwrap().unwrap_err();
    assert!(matches!(error, DaemonError::Measure(_)), "{error}");
}
