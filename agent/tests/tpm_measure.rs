//! Measuring against a real TPM: batches, restarts, crashes, and what a verifier makes of the result.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests say what they expect by panicking"
)]

mod common;

use std::time::Duration;

use assay_agent::measure::{MeasureError, Measurer, Settings};
use assay_ebpf::seq;
use assay_evidence::event::{Event, Notice, Violation};
use assay_evidence::replay::ReplayedLog;
use assay_tests::Swtpm;
use assay_tests::proxy::{CC_PCR_EXTEND, TpmProxy};
use common::{Queue, Running, attest, names, open, open_boot, seqs, settings, wait_for};

/// `TPM_RC_FAILURE` (TPM 2.0 Part 2, 6.6.3): commands are not accepted.
const TPM_RC_FAILURE: u32 = 0x101;

#[tokio::test]
async fn tpm_log_and_pcr_agree_through_start_events_and_stop() {
    let (swtpm, dir, queue) = (Swtpm::start().unwrap(), tempfile::tempdir().unwrap(), Queue::default());
    let tpm = open(swtpm.tcti());
    queue.push(0..3);
    let running = Running::start(settings(dir.path(), true), &queue, &tpm);
    queue.push(3..10);
    running.settle(&queue);

    let log = attest(&tpm).await.unwrap();
    assert_eq!(seqs(&log), (0..10).collect::<Vec<_>>());
    assert_eq!(names(&log).first(), Some(&"agent-start"));
    assert!(names(&log).contains(&"ready"));
    assert_eq!(log.pcr_start(), [0; 32]);
    let own = std::env::current_exe().unwrap();
    let own = own.to_string_lossy();
    assert!(
        log.events()
            .any(|(_, event)| matches!(event, Event::Inventory(found) if found.path.as_str() == own))
    );

    running.stop().unwrap();
    let log = attest(&tpm).await.unwrap();
    assert_eq!(names(&log).last(), Some(&"agent-stop"));
}

#[tokio::test]
async fn tpm_what_gathers_while_the_tpm_is_busy_shares_one_extend() {
    let swtpm = Swtpm::start().unwrap();
    let proxy = TpmProxy::start(&swtpm).unwrap();
    let (dir, queue) = (tempfile::tempdir().unwrap(), Queue::default());
    let tpm = open(proxy.tcti());
    let running = Running::start(settings(dir.path(), true), &queue, &tpm);
    let before = proxy.count(CC_PCR_EXTEND);
    proxy.only(Some(CC_PCR_EXTEND));
    proxy.delay(Duration::from_millis(300));
    for seq in 0..1000 {
        queue.push([seq]);
        if seq % 100 == 0 {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    running.settle(&queue);
    wait_for("all of it", || tpm.log().snapshot().records > 3);
    let extends = proxy.count(CC_PCR_EXTEND) - before;
    assert!(extends <= 4, "1000 events took {extends} extends");
    proxy.delay(Duration::ZERO);
    proxy.only(None);
    running.settle(&queue);
    assert_eq!(seqs(&attest(&tpm).await.unwrap()), (0..1000).collect::<Vec<_>>());
    running.stop().unwrap();
}

#[tokio::test]
async fn tpm_lost_records_are_a_violation_in_the_log() {
    let (swtpm, dir, queue) = (Swtpm::start().unwrap(), tempfile::tempdir().unwrap(), Queue::default());
    let tpm = open(swtpm.tcti());
    let running = Running::start(settings(dir.path(), true), &queue, &tpm);
    queue.lose(7);
    wait_for("the loss to be seen", || running.control.lost() == 7);
    running.settle(&queue);
    let log = attest(&tpm).await.unwrap();
    assert!(
        log.events()
            .any(|(_, event)| *event == Event::Violation(Violation::Lost { count: 7 }))
    );
    running.stop().unwrap();

    // A successor does not report the same loss again, and adds what came since.
    queue.lose(1);
    let running = Running::start(settings(dir.path(), false), &queue, &tpm);
    running.settle(&queue);
    let log = attest(&tpm).await.unwrap();
    let losses: Vec<u64> = log
        .events()
        .filter_map(|(_, event)| match event {
            Event::Violation(Violation::Lost { count }) => Some(*count),
            _ => None,
        })
        .collect();
    assert_eq!(losses, [7, 1]);
    running.stop().unwrap();
}

#[tokio::test]
async fn tpm_records_that_never_came_are_a_violation_in_the_log() {
    let (swtpm, dir, queue) = (Swtpm::start().unwrap(), tempfile::tempdir().unwrap(), Queue::default());
    let tpm = open(swtpm.tcti());
    let gaps = |events: &[Event]| -> Vec<(u64, u64)> {
        let gap = |event: &Event| match event {
            Event::Violation(Violation::SequenceGap { expected, found }) => Some((*expected, *found)),
            _ => None,
        };
        events.iter().filter_map(gap).collect()
    };
    let attested = |log: ReplayedLog| -> Vec<Event> { log.events().map(|(_, event)| event.clone()).collect() };
    let running = Running::start(settings(dir.path(), true), &queue, &tpm);
    // Two CPUs at once are no gap, and 5 is late; but 6 and 7 were taken by somebody else.
    queue.push([1, 0, 3, 2, 4, 8, 5].into_iter().chain(9..5000));
    running.settle(&queue);
    assert_eq!(gaps(&attested(attest(&tpm).await.unwrap())), [(6, 8)]);
    running.stop().unwrap();

    // A successor does not report the same gap again. What was taken while no agent ran is missed by it.
    queue.push(5010..5020);
    let running = Running::start(settings(dir.path(), false), &queue, &tpm);
    let written = || -> Option<Vec<Event>> {
        let records = assay_evidence::cel::read_all(&std::fs::read(dir.path().join("log.cel")).unwrap()).ok()?;
        Some(records.iter().flat_map(|record| record.events().unwrap()).collect())
    };
    wait_for("the second gap", || {
        written().is_some_and(|events| gaps(&events).len() > 1)
    });
    running.settle(&queue);
    assert_eq!(gaps(&attested(attest(&tpm).await.unwrap())), [(6, 8), (5000, 5010)]);

    // What was the last in the queue, on another CPU, is missed because the kernel counts; what had no room is no gap.
    queue.refuse_for_room(3);
    queue.push([seq::of(1, 0)]);
    queue.number(&[5020, 3]);
    wait_for("the third gap", || {
        written().is_some_and(|events| gaps(&events).len() > 2)
    });
    running.settle(&queue);
    let log = attested(attest(&tpm).await.unwrap());
    assert_eq!(gaps(&log)[2..], [(seq::of(1, 1), seq::of(1, 3))]);
    assert_eq!((running.control.no_room(), running.control.lost()), (3, 0));
    running.stop().unwrap();
}

#[tokio::test]
async fn tpm_a_restart_goes_on_with_the_same_log() {
    let (swtpm, dir, queue) = (Swtpm::start().unwrap(), tempfile::tempdir().unwrap(), Queue::default());
    let tpm = open(swtpm.tcti());
    let running = Running::start(settings(dir.path(), true), &queue, &tpm);
    queue.push(0..5);
    running.settle(&queue);
    running.stop().unwrap();
    queue.push(5..8);
    let running = Running::start(settings(dir.path(), false), &queue, &tpm);
    running.settle(&queue);
    let log = attest(&tpm).await.unwrap();
    assert_eq!(seqs(&log), (0..8).collect::<Vec<_>>());
    let starts: Vec<Option<u64>> = log
        .events()
        .filter_map(|(_, event)| match event {
            Event::AgentStart(start) => Some(start.predecessor),
            _ => None,
        })
        .collect();
    assert_eq!(starts, [None, Some(4)]);
    assert!(!names(&log).contains(&"violation"));
    running.stop().unwrap();

    // Hooks that had to be loaded anew were away in between: that is said.
    let running = Running::start(settings(dir.path(), true), &queue, &tpm);
    let log = attest(&tpm).await.unwrap();
    assert!(
        log.events()
            .any(|(_, event)| matches!(event, Event::Violation(Violation::HooksMissing { .. })))
    );
    running.stop().unwrap();
}

/// The agent dies while an extend hangs: its last record is in the log and not in the PCR, more events are in the journal only,
/// and the kernel still has one that was journaled but not freed.
#[tokio::test]
async fn tpm_nothing_is_missing_or_doubled_after_a_crash() {
    let (swtpm, dir, queue) = (Swtpm::start().unwrap(), tempfile::tempdir().unwrap(), Queue::default());
    let proxy = TpmProxy::start(&swtpm).unwrap();
    let tpm = open(proxy.tcti());
    let running = Running::start(settings(dir.path(), true), &queue, &tpm);
    queue.push(0..4);
    running.settle(&queue);
    let before = tpm.log().snapshot();

    proxy.hang();
    queue.push(4..6);
    let path = dir.path().join("log.cel");
    wait_for("a record that is not extended", || {
        std::fs::metadata(&path).unwrap().len() > before.bytes
    });
    queue.push(6..20);
    wait_for("the kernel's queue to be empty", || queue.is_empty());
    drop(proxy);
    assert!(matches!(running.end(), Err(MeasureError::Tpm(_))));
    assert_eq!(
        tpm.log().snapshot(),
        before,
        "the view never shows what is not extended"
    );
    drop(tpm);

    queue.push(19..22);
    let tpm = open(swtpm.tcti());
    let running = Running::start(settings(dir.path(), false), &queue, &tpm);
    running.settle(&queue);
    let log = attest(&tpm).await.unwrap();
    assert_eq!(seqs(&log), (0..22).collect::<Vec<_>>());
    let said = tpm_failures(&log);
    assert!(
        matches!(&said[..], [text] if text.contains("TPM2_PCR_Extend")),
        "{said:?}"
    );
    running.stop().unwrap();
}

#[tokio::test]
async fn tpm_a_shortened_log_is_a_violation_and_never_replays() {
    let (swtpm, dir, queue) = (Swtpm::start().unwrap(), tempfile::tempdir().unwrap(), Queue::default());
    let tpm = open(swtpm.tcti());
    let running = Running::start(settings(dir.path(), true), &queue, &tpm);
    queue.push(0..4);
    running.settle(&queue);
    running.stop().unwrap();
    let path = dir.path().join("log.cel");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();

    let running = Running::start(settings(dir.path(), false), &queue, &tpm);
    running.settle(&queue);
    let refused = attest(&tpm).await.unwrap_err();
    assert!(refused.contains("PCR"), "{refused}");
    running.stop().unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let records = assay_evidence::cel::read_all(&bytes).unwrap();
    let events: Vec<Event> = records.iter().flat_map(|record| record.events().unwrap()).collect();
    assert!(
        events
            .iter()
            .any(|event| matches!(event, Event::Violation(Violation::LogMismatch { .. })))
    );
}

#[tokio::test]
async fn tpm_a_full_log_says_so_and_quotes_go_on() {
    let (swtpm, dir, queue) = (Swtpm::start().unwrap(), tempfile::tempdir().unwrap(), Queue::default());
    let tpm = open(swtpm.tcti());
    let small = |fresh_hooks| Settings {
        log_max_bytes: 1 << 20,
        ..settings(dir.path(), fresh_hooks)
    };
    let full = Event::Violation(Violation::LogFull { max_bytes: 1 << 20 });
    let running = Running::start(small(true), &queue, &tpm);
    queue.push(0..20_000);
    wait_for("the log to be full", || running.control.log_full());
    running.settle_log();
    let log = attest(&tpm).await.unwrap();
    let logged = seqs(&log);
    assert!(logged.len() > 1000 && logged.iter().copied().eq(0..logged.len() as u64));
    assert_eq!(log.events().last().map(|(_, event)| event), Some(&full));
    // What comes now stays where it is, and what the kernel loses is shown.
    let before = tpm.log().snapshot();
    queue.push(20_000..40_000);
    queue.lose(5);
    wait_for("the loss to be seen", || running.control.lost() == 5);
    assert!(!queue.is_empty());
    attest(&tpm).await.unwrap();
    assert_eq!(tpm.log().snapshot(), before);
    running.stop().unwrap();

    // A successor states that it started, and nothing else; how many of them find room is limited.
    let running = Running::start(small(false), &queue, &tpm);
    assert!(running.control.log_full());
    running.settle_log();
    let log = attest(&tpm).await.unwrap();
    assert_eq!(seqs(&log), logged);
    assert_eq!(names(&log)[names(&log).len() - 2..], ["violation", "agent-start"]);
    running.stop().unwrap();
    let refused = loop {
        match Measurer::open(small(false), Box::new(queue.clone()), tpm.clone()) {
            Ok(measurer) => drop(measurer),
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, MeasureError::LogFull { .. }), "{refused}");
    let text = refused.to_string();
    assert!(text.contains("log.cel") && text.contains("log_max_mib"), "{text}");
    assert!(std::fs::metadata(dir.path().join("log.cel")).unwrap().len() <= 1 << 20);
    attest(&tpm).await.unwrap();

    // With more room all that waited comes, and what the log said stays said.
    let running = Running::start(settings(dir.path(), false), &queue, &tpm);
    running.settle(&queue);
    let log = attest(&tpm).await.unwrap();
    assert_eq!(seqs(&log), (0..40_000).collect::<Vec<_>>());
    let violations: Vec<&Event> = log
        .events()
        .map(|(_, event)| event)
        .filter(|event| matches!(event, Event::Violation(_)))
        .collect();
    assert_eq!(violations, [&full, &Event::Violation(Violation::Lost { count: 5 })]);
    running.stop().unwrap();
}

#[tokio::test]
async fn tpm_a_slow_extend_is_told_of_in_the_next_record() {
    let swtpm = Swtpm::start().unwrap();
    let proxy = TpmProxy::start(&swtpm).unwrap();
    let (dir, queue) = (tempfile::tempdir().unwrap(), Queue::default());
    let tpm = open(proxy.tcti());
    let running = Running::start(settings(dir.path(), true), &queue, &tpm);
    proxy.only(Some(CC_PCR_EXTEND));
    proxy.delay(Duration::from_millis(1200));
    let before = tpm.log().snapshot();
    queue.push([0]);
    running.settle(&queue);
    wait_for("the slow extend", || tpm.log().snapshot() != before);
    proxy.delay(Duration::ZERO);
    // Not a record for its own sake: that would be slow, too, and so on for ever.
    running.settle(&queue);
    assert!(slow(&attest(&tpm).await.unwrap()).is_empty());
    queue.push([1]);
    running.settle(&queue);
    let told = slow(&attest(&tpm).await.unwrap());
    assert!(matches!(told[..], [millis] if millis >= 1200), "{told:?}");
    running.stop().unwrap();
}

/// How slow the log says that the TPM was.
fn slow(log: &ReplayedLog) -> Vec<u64> {
    log.events()
        .filter_map(|(_, event)| match event {
            Event::Notice(Notice::TpmSlow { millis }) => Some(*millis),
            _ => None,
        })
        .collect()
}

/// The connection breaks below another command than an extend: it fails, and the next question after the TPM's health mends it.
#[tokio::test]
async fn tpm_a_lost_connection_is_made_anew() {
    let swtpm = Swtpm::start().unwrap();
    let proxy = TpmProxy::start(&swtpm).unwrap();
    let (dir, queue) = (tempfile::tempdir().unwrap(), Queue::default());
    let tpm = open(proxy.tcti());
    let running = Running::start(settings(dir.path(), true), &queue, &tpm);
    queue.push([0]);
    running.settle(&queue);
    proxy.hang_up_next(1, false);
    assert!(attest(&tpm).await.is_err());
    assert!(attest(&tpm).await.is_err(), "the connection is gone");
    tpm.ping().await.unwrap();
    attest(&tpm).await.unwrap();
    running.stop().unwrap();
}

/// A driver's time-out and a TPM's error, before and after the TPM has carried the extend out.
#[tokio::test]
async fn tpm_a_failed_extend_is_tried_again_if_it_did_not_happen() {
    let swtpm = Swtpm::start().unwrap();
    let proxy = TpmProxy::start(&swtpm).unwrap();
    let (dir, queue) = (tempfile::tempdir().unwrap(), Queue::default());
    let tpm = open(proxy.tcti());
    let running = Running::start(settings(dir.path(), true), &queue, &tpm);
    proxy.only(Some(CC_PCR_EXTEND));
    let faults: [&dyn Fn(); 4] = [
        &|| proxy.fail_next(2, TPM_RC_FAILURE),
        &|| proxy.hang_up_next(1, false),
        &|| proxy.hang_up_next(2, false),
        &|| proxy.hang_up_next(1, true),
    ];
    for (seq, fault) in (0..).zip(faults) {
        let (before, extends) = (tpm.log().snapshot(), proxy.count(CC_PCR_EXTEND));
        fault();
        queue.push([seq]);
        wait_for("the extend", || tpm.log().snapshot() != before);
        running.settle(&queue);
        let log = attest(&tpm).await.unwrap();
        assert_eq!(seqs(&log), (0..=seq).collect::<Vec<_>>());
        assert!(!names(&log).contains(&"violation"));
        let tries = if seq == 3 { 1 } else { 2 };
        assert!(proxy.count(CC_PCR_EXTEND) - extends >= tries);
    }

    // Three times in a row is no accident: the agent ends, and the next one says why.
    proxy.fail_next(3, TPM_RC_FAILURE);
    queue.push([4]);
    assert!(matches!(running.end(), Err(MeasureError::Tpm(_))));
    let running = Running::start(settings(dir.path(), false), &queue, &tpm);
    running.settle(&queue);
    let log = attest(&tpm).await.unwrap();
    assert_eq!(seqs(&log), (0..5).collect::<Vec<_>>());
    assert_eq!(tpm_failures(&log).len(), 1);
    running.stop().unwrap();
    let running = Running::start(settings(dir.path(), false), &queue, &tpm);
    assert_eq!(tpm_failures(&attest(&tpm).await.unwrap()).len(), 1, "told once");
    running.stop().unwrap();
}

/// What the log says of a TPM that failed; it has no other violation.
fn tpm_failures(log: &ReplayedLog) -> Vec<String> {
    log.events()
        .filter_map(|(_, event)| match event {
            Event::Violation(Violation::TpmFailed { detail }) => Some(detail.clone()),
            Event::Violation(other) => panic!("{other}"),
            _ => None,
        })
        .collect()
}

#[tokio::test]
async fn tpm_another_boots_log_is_set_aside() {
    let (mut swtpm, dir, queue) = (Swtpm::start().unwrap(), tempfile::tempdir().unwrap(), Queue::default());
    let tpm = open(swtpm.tcti());
    let running = Running::start(settings(dir.path(), true), &queue, &tpm);
    queue.push(0..2);
    running.settle(&queue);
    running.stop().unwrap();
    drop(tpm);
    swtpm.power_cycle().unwrap();

    let boot = "00000000-1111-4222-8333-444444444444";
    let tpm = open_boot(swtpm.tcti(), boot);
    let mut next = settings(dir.path(), true);
    next.boot_id = boot.into();
    let running = Running::start(next, &queue, &tpm);
    let log = attest(&tpm).await.unwrap();
    assert_eq!((seqs(&log), log.boot_id()), (vec![], boot));
    assert!(!names(&log).contains(&"violation"));
    running.stop().unwrap();
}

#[test]
fn tpm_only_one_agent_writes_the_log_and_a_bad_folder_is_named() {
    let (swtpm, dir, queue) = (Swtpm::start().unwrap(), tempfile::tempdir().unwrap(), Queue::default());
    let tpm = open(swtpm.tcti());
    let running = Running::start(settings(dir.path(), true), &queue, &tpm);
    let second = Measurer::open(settings(dir.path(), true), Box::new(queue.clone()), tpm.clone());
    assert!(matches!(second, Err(MeasureError::Locked { .. })));
    running.stop().unwrap();

    let file = dir.path().join("file");
    std::fs::write(&file, b"").unwrap();
    let Err(error) = Measurer::open(settings(&file.join("run"), true), Box::new(queue.clone()), tpm) else {
        panic!("a file is no folder")
    };
    assert!(
        error.to_string().contains(&*file.to_string_lossy()) && error.to_string().contains("run_dir"),
        "{error}"
    );
}
