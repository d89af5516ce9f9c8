//! `cargo xtask bench verify`: what judging a host costs a verifier, on one core. The host's "TPM" is a software key, whose
//! signatures are those of a TPM's ECDSA key.
#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::error::Error;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use assay_evidence::bundle::Bundle;
use assay_evidence::cel::Record;
use assay_evidence::digest::Sha256Digest;
use assay_evidence::event::{Event, LoadKind};
use assay_evidence::pcr::RuntimePcr;
use assay_evidence::policy::{Approved, Policy};
use assay_evidence::quote::HeldLog;
use assay_evidence::replay::ReplayedLog;
use assay_evidence::testing::{BINDING, Host, NOW, measurement};
use assay_evidence::wire::{B64, LogPage};
use assay_tests::stats::quantile;
use serde_json::json;

/// Events in the log of a busy host, and digests in a large policy.
const MANY: u64 = 100_000;
/// Events that an agent puts into one record when it is busy.
const BATCH: u64 = 50;
/// Every so many rounds of a figure there is one median.
const ROUNDS: usize = 15;
/// The word that makes this program its own child.
const LOAD: &str = "--load";
/// Records in a page.
const PAGE: usize = 100;
/// Polls in a round.
const POLLS: u32 = 500;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// One line of the table, with all that it was taken from.
struct Figure {
    name: &'static str,
    /// One value a round.
    values: Vec<f64>,
    unit: &'static str,
    limit: f64,
    /// Whether more is better.
    rate: bool,
}

fn main() -> Outcome<()> {
    let mut words = std::env::args().skip(1);
    if words.next().as_deref() == Some(LOAD) {
        return load(&words.next().ok_or("which policy?")?);
    }
    let policy = policy()?;
    let (small, mut busy_host) = (Host::measuring(), busy(Host::measuring()));
    let pages = pages(&busy_host)?;
    println!(
        "{MANY} events in {} records, {BATCH} each; {:.1} MiB as JSON in {} pages and a bundle; medians of {ROUNDS} rounds",
        busy_host.records.len(),
        mib(pages.iter().map(Vec::len).sum()),
        pages.len(),
    );
    let figures = [
        poll("poll with nothing new, log of 3 records", &small, &policy)?,
        poll("poll with nothing new, log of 100,000 events", &busy_host, &policy)?,
        news(&mut busy_host, &policy)?,
        replaying("replay of 100,000 events", &busy(Host::without_sha1()))?,
        // Beside it, what a second bank costs.
        replaying("replay of 100,000 events, with a SHA-1 bank", &busy_host)?,
        judging(&busy_host, &pages, &policy)?,
        first_check(&busy_host, &pages, &policy)?,
        loading(&policy)?,
        loaded(&policy)?,
    ];
    for figure in &figures {
        let (middle, worst) = (figure.at(0.5), figure.at(if figure.rate { 0.0 } else { 1.0 }));
        let met = if figure.rate {
            middle >= figure.limit
        } else {
            middle <= figure.limit
        };
        println!(
            "{:<52} {middle:>12.1} {} (worst round {worst:.1}); {} {:.1}: {}",
            figure.name,
            figure.unit,
            if figure.rate { "at least" } else { "at most" },
            figure.limit,
            if met { "met" } else { "NOT met" }
        );
    }
    println!("raw data: {}", save(&figures)?.display());
    Ok(())
}

/// The check of evidence that brings nothing new, from the bytes that came, against what is remembered of the last.
fn poll(name: &'static str, host: &Host, policy: &Policy) -> Outcome<Figure> {
    let log = check(host, &last(host), &fetched(host, &pages(host)?)?)?;
    black_box(log.appraise(policy, NOW));
    let (judged, ak, json) = (log.judged(), host.key.ak(), last(host).to_json()?);
    let values = rounds(|| {
        for _ in 0..POLLS {
            let bundle = Bundle::from_json(&json)?;
            let unchanged = bundle.verify_unchanged(&ak, &BINDING, &judged);
            black_box(unchanged.ok_or("something is new")?);
        }
        Ok(())
    })?;
    let per_second = |time: Duration| f64::from(POLLS) / time.as_secs_f64();
    Ok(Figure {
        name,
        values: values.into_iter().map(per_second).collect(),
        unit: "/s",
        limit: 10_000.0,
        rate: true,
    })
}

/// The check of evidence that brings ten starts of approved programs, a record each, after many.
fn news(host: &mut Host, policy: &Policy) -> Outcome<Figure> {
    let log = check(host, &last(host), &fetched(host, &pages(host)?)?)?;
    let (judged, held, kept) = (log.judged(), host.records.len(), host.pcrs.clone());
    for number in 0..10 {
        let load = measurement(LoadKind::Program, &path(number), Some(2 + MANY + number));
        host.record(&[Event::Load(load)]);
    }
    let (json, ak) = (host.bundle(&BINDING, held).to_json()?, host.key.ak());
    host.records.truncate(held);
    host.pcrs = kept;
    let values = rounds(|| {
        for _ in 0..POLLS {
            let bundle = Bundle::from_json(&json)?;
            let judged = bundle.verify_progress(&ak, &BINDING, &judged, &policy.passes(NOW));
            black_box(judged.ok_or("not all of it passes")?);
        }
        Ok(())
    })?;
    Ok(Figure {
        name: "poll with ten new records after 100,000 events",
        values: values
            .into_iter()
            .map(|time| f64::from(POLLS) / time.as_secs_f64())
            .collect(),
        unit: "/s",
        limit: 5_000.0,
        rate: true,
    })
}

/// Replay of records that are in memory.
fn replaying(name: &'static str, host: &Host) -> Outcome<Figure> {
    let (held, bundle) = (fetched(host, &pages(host)?)?, last(host));
    let mut values = Vec::new();
    for _ in 0..ROUNDS {
        let quote = bundle.verify(&host.key.ak(), &BINDING, &held)?;
        let begin = Instant::now();
        let log = black_box(quote.replay(RuntimePcr::DEFAULT)?);
        values.push(events_per_second(begin.elapsed()));
        drop(log);
    }
    Ok(Figure {
        name,
        values,
        unit: "events/s",
        limit: 3_000_000.0,
        rate: true,
    })
}

/// The policy's judgement on a replayed log.
fn judging(host: &Host, pages: &[Vec<u8>], policy: &Policy) -> Outcome<Figure> {
    let log = check(host, &last(host), &fetched(host, pages)?)?;
    let values = rounds(|| {
        let verdict = black_box(log.appraise(policy, NOW));
        verdict
            .is_trusted()
            .then_some(())
            .ok_or_else(|| verdict.reasons().join("; ").into())
    })?;
    Ok(Figure {
        name: "look-up of 100,000 events among 100,000 digests",
        values: values.into_iter().map(events_per_second).collect(),
        unit: "events/s",
        limit: 1_000_000.0,
        rate: true,
    })
}

/// From the bytes that a host sent to the verdict.
fn first_check(host: &Host, pages: &[Vec<u8>], policy: &Policy) -> Outcome<Figure> {
    let json = last(host).to_json()?;
    let values = rounds(|| {
        let held = fetched(host, pages)?;
        black_box(check(host, &Bundle::from_json(&json)?, &held)?.appraise(policy, NOW));
        Ok(())
    })?;
    Ok(Figure {
        name: "first check of a host with 100,000 events",
        values: values.iter().map(millis).collect(),
        unit: "ms",
        limit: 200.0,
        rate: false,
    })
}

/// A policy with 100,000 digests, from its file's bytes.
fn loading(policy: &Policy) -> Outcome<Figure> {
    let json = policy.to_json();
    let values = rounds(|| {
        black_box(Policy::from_json(json.as_bytes())?);
        Ok(())
    })?;
    Ok(Figure {
        name: "loading of a policy with 100,000 digests",
        values: values.iter().map(millis).collect(),
        unit: "ms",
        limit: 100.0,
        rate: false,
    })
}

/// The whole log as an agent hands it out, in pages.
fn pages(host: &Host) -> Outcome<Vec<Vec<u8>>> {
    let page = |(number, records): (usize, &[Record])| {
        let page = LogPage {
            from: u64::try_from(number * PAGE)?,
            count: u64::try_from(records.len())?,
            data: B64(records.iter().flat_map(Record::encode).collect()),
        };
        Ok(serde_json::to_vec(&page)?)
    };
    host.records.chunks(PAGE).enumerate().map(page).collect()
}

/// What a verifier holds after it has taken these pages, unjudged.
fn fetched(host: &Host, pages: &[Vec<u8>]) -> Outcome<HeldLog> {
    let mut held = HeldLog {
        boot_id: host.boot_id.clone(),
        ..HeldLog::none()
    };
    held.reset_count = host.clock.reset_count;
    for page in pages {
        let page: LogPage = serde_json::from_slice(page)?;
        held.records += page.count;
        held.bytes.extend(page.data.0);
    }
    Ok(held)
}

/// The evidence of a host to whoever holds its log.
fn last(host: &Host) -> Bundle {
    host.bundle(&BINDING, host.records.len())
}

/// What such a policy takes in memory, in a process of its own: what others have given back would hide it.
fn loaded(policy: &Policy) -> Outcome<Figure> {
    let file = folder()?.join("policy.json");
    std::fs::write(&file, policy.to_json())?;
    let child = Command::new(std::env::current_exe()?).arg(LOAD).arg(&file).output()?;
    let taken: usize = String::from_utf8(child.stdout)?.trim().parse()?;
    Ok(Figure {
        name: "memory of a policy with 100,000 digests",
        values: vec![mib(taken)],
        unit: "MiB",
        limit: 20.0,
        rate: false,
    })
}

/// Loads a policy, and prints by how much this process has grown.
fn load(file: &str) -> Outcome<()> {
    let json = std::fs::read(file)?;
    let before = resident()?;
    let policy = black_box(Policy::from_json(&json)?);
    println!("{}", resident()?.saturating_sub(before));
    drop(policy);
    Ok(())
}

/// Memory of this process, in bytes.
fn resident() -> Outcome<usize> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib: usize = line.ok_or("no VmRSS")?.trim().trim_end_matches(" kB").parse()?;
    Ok(kib * 1024)
}

fn check(host: &Host, bundle: &Bundle, held: &HeldLog) -> Outcome<ReplayedLog> {
    let quote = bundle.verify(&host.key.ak(), &BINDING, held)?;
    Ok(quote.replay(RuntimePcr::DEFAULT)?)
}

fn rounds(mut work: impl FnMut() -> Outcome<()>) -> Outcome<Vec<Duration>> {
    // Once for the caches.
    work()?;
    (0..ROUNDS)
        .map(|_| {
            let begin = Instant::now();
            work()?;
            Ok(begin.elapsed())
        })
        .collect()
}

fn path(number: u64) -> String {
    format!("/usr/lib/x86_64-linux-gnu/some/where/file-{number:06}")
}

/// The host after many starts of programs.
fn busy(mut host: Host) -> Host {
    let event = |number| Event::Load(measurement(LoadKind::Program, &path(number), Some(2 + number)));
    for first in (0..MANY).step_by(usize::try_from(BATCH).unwrap_or(1)) {
        host.record(&(first..first + BATCH).map(event).collect::<Vec<_>>());
    }
    host
}

/// One that approves of all of it, and of the three files that every test host has.
fn policy() -> Outcome<Policy> {
    let host = Host::measuring();
    let log = check(&host, &host.bundle(&BINDING, 0), &HeldLog::none())?;
    let mut policy = Policy::capture("bench", "first", &log)?;
    let entry = |number| {
        let path = path(number);
        Approved {
            sha256: Sha256Digest::of(path.as_bytes()),
            kind: Some(LoadKind::Program),
            path: path.into(),
        }
    };
    policy.allow_all("bench", (0..MANY).map(entry).collect())?;
    Ok(policy)
}

fn events_per_second(time: Duration) -> f64 {
    f64::from(u32::try_from(MANY).unwrap_or(u32::MAX)) / time.as_secs_f64()
}

fn millis(time: &Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn mib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

impl Figure {
    /// The value that this share of the rounds does not exceed.
    fn at(&self, share: f64) -> f64 {
        quantile(self.values.clone(), share)
    }
}

fn folder() -> Outcome<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/bench");
    std::fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// Raw data and table, as JSON.
fn save(figures: &[Figure]) -> Outcome<PathBuf> {
    let folder = folder()?;
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let file = folder.join(format!("verify-{seconds}.json"));
    let figure = |figure: &Figure| {
        json!({
            "figure": figure.name, "unit": figure.unit, "limit": figure.limit, "values": figure.values,
        })
    };
    let all: Vec<_> = figures.iter().map(figure).collect();
    std::fs::write(&file, serde_json::to_vec(&all)?)?;
    Ok(file)
}
