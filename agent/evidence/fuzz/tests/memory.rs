//! What judging the longest log takes. Alone in its process, whose memory it looks at.
#![allow(clippy::unwrap_used, reason = "tests say what they expect by panicking")]

use std::fs;

use assay_evidence::event::{Event, LoadKind};
use assay_evidence::pcr::RuntimePcr;
use assay_evidence::policy::Policy;
use assay_evidence::quote::{HeldLog, MAX_WHOLE_LOG};
use assay_evidence::testing::{BINDING, Host, NOW, measurement};

/// Events in a record.
const BATCH: u64 = 2000;

/// A line of `/proc/self/status`, in bytes.
fn memory(line: &str) -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let value = status.lines().find_map(|found| found.strip_prefix(line)).unwrap();
    let kib: usize = value
        .trim_start_matches(':')
        .trim_end_matches("kB")
        .trim()
        .parse()
        .unwrap();
    kib * 1024
}

/// A host whose log is nearly as long as any that is judged.
fn longest() -> Host {
    let mut host = Host::measuring();
    let (mut number, mut bytes) = (2, 0);
    loop {
        let events: Vec<Event> = (number..number + BATCH)
            .map(|number| {
                Event::Load(measurement(
                    LoadKind::Program,
                    &format!("/usr/bin/{number}"),
                    Some(number),
                ))
            })
            .collect();
        host.record(&events);
        number += BATCH;
        bytes += host.records.last().unwrap().encode().len();
        if bytes + 2 * host.records.last().unwrap().encode().len() > MAX_WHOLE_LOG {
            return host;
        }
    }
}

#[test]
fn the_longest_log_is_judged_in_four_times_its_size() {
    let host = longest();
    let (ak, bundle) = (host.key.ak(), host.bundle(&BINDING, host.records.len()));
    let policy = Policy::new("none").unwrap();
    let before = memory("VmRSS");
    // From now on the peak counts (proc(5), clear_refs).
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let held = HeldLog {
        boot_id: host.boot_id.clone(),
        reset_count: host.clock.reset_count,
        records: u64::try_from(host.records.len()).unwrap(),
        bytes: host.log_bytes(0),
        ..HeldLog::none()
    };
    let size = held.bytes.len();
    assert!(size > MAX_WHOLE_LOG / 10 * 9);
    let verdict = bundle
        .verify_taking(&ak, &BINDING, held)
        .unwrap()
        .replay(RuntimePcr::DEFAULT)
        .unwrap()
        .appraise(&policy, NOW);
    assert!(!verdict.is_trusted());
    drop(verdict);
    let taken = memory("VmHWM") - before;
    println!("{} MiB for a log of {} MiB", taken >> 20, size >> 20);
    assert!(taken < 4 * size, "{taken} bytes for a log of {size}");
}
