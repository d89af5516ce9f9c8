use super::*;
use crate::cel::{Record, Register};
use crate::digest::Algorithm;
use crate::event::{LoadKind, Violation};
use crate::testing::{BINDING, BOOT, Host, OTHER_BOOT, agent_start, load, measurement};

fn replay(host: &Host) -> Result<ReplayedLog, ReplayError> {
    replay_in(host, RuntimePcr::DEFAULT)
}

fn replay_in(host: &Host, pinned: RuntimePcr) -> Result<ReplayedLog, ReplayError> {
    host.bundle(&BINDING, 0)
        .verify(&host.key.ak(), &BINDING, &HeldLog::none())
        .expect("the quote is good")
        .replay(pinned)
}

fn started() -> Host {
    let mut host = Host::booted(BOOT, 1);
    host.record(&[Event::from(agent_start(BOOT)), Event::Ready]);
    host
}

#[test]
fn empty_log_is_refused() {
    assert_eq!(replay(&Host::booted(BOOT, 1)).unwrap_err(), ReplayError::Empty);
}

#[test]
fn a_log_of_empty_events_by_the_million_is_refused() {
    let mut host = started();
    let batch = vec![Event::Ready; crate::cel::MAX_EVENTS];
    for _ in 0..MAX_LOG_EVENTS / batch.len() {
        host.record(&batch);
    }
    let record = u64::try_from(MAX_LOG_EVENTS / batch.len()).unwrap();
    assert_eq!(replay(&host).unwrap_err(), ReplayError::TooManyEvents { record });
}

#[test]
fn log_must_begin_with_the_agent() {
    let mut host = Host::booted(BOOT, 1);
    host.record(&[Event::Ready]);
    assert_eq!(replay(&host).unwrap_err(), ReplayError::NoAgentStart { found: "ready" });
}

#[test]
fn pcr_extended_past_the_log_is_refused() {
    let mut host = started();
    host.extend(&[7; 32]);
    assert!(matches!(replay(&host).unwrap_err(), ReplayError::PcrMismatch { .. }));
}

#[test]
fn pcr_that_started_elsewhere_is_replayed_from_there() {
    let mut host = Host::booted(BOOT, 1);
    host.extend(&[7; 32]);
    let mut start = agent_start(BOOT);
    start.pcr_start = vec![(Algorithm::Sha256, host.pcrs[&13].0.clone())];
    host.record(&[Event::from(start)]);
    let replayed = replay(&host).unwrap();
    assert_ne!(replayed.pcr_start(), [0; 32]);
}

#[test]
fn start_without_pcr_value_is_refused() {
    let mut host = Host::booted(BOOT, 1);
    let mut start = agent_start(BOOT);
    start.pcr_start.retain(|(bank, _)| *bank == Algorithm::Sha1);
    host.record(&[Event::from(start)]);
    assert_eq!(replay(&host).unwrap_err(), ReplayError::NoPcrStart);
}

#[test]
fn restart_names_its_predecessor() {
    let mut host = started();
    host.record(&[load("/bin/true", 17)]);
    let mut start = agent_start(BOOT);
    start.predecessor = Some(17);
    host.record(&[
        Event::from(start),
        Event::Violation(Violation::Lost { count: 1 }),
        Event::Ready,
    ]);
    assert!(replay(&host).is_ok());
    host.record(&[Event::from(agent_start(BOOT))]);
    assert_eq!(replay(&host).unwrap_err(), ReplayError::NoPredecessor { record: 3 });
}

#[test]
fn restart_before_any_measurement_has_no_predecessor() {
    let mut host = started();
    host.record(&[Event::from(agent_start(BOOT)), Event::Ready]);
    assert!(replay(&host).is_ok());
}

#[test]
fn each_start_is_of_this_boot() {
    let mut host = started();
    host.record(&[Event::from(agent_start(OTHER_BOOT))]);
    assert!(matches!(
        replay(&host).unwrap_err(),
        ReplayError::LogFromAnotherBoot { record: 1, .. }
    ));
}

#[test]
fn records_of_other_pcrs_banks_and_projects_are_refused() {
    let event = [Event::Load(measurement(LoadKind::Program, "/bin/true", Some(1)))];
    let banks = [Algorithm::Sha1, Algorithm::Sha256];

    let mut host = started();
    host.append(Record::build(1, 12, &event, &banks).unwrap());
    assert_eq!(
        replay(&host).unwrap_err(),
        ReplayError::PcrIndex {
            record: 1,
            register: Register::Pcr,
            found: 12,
            wanted: RuntimePcr::DEFAULT
        }
    );

    let mut host = started();
    host.append(Record::build(1, 13, &event, &[Algorithm::Sha256]).unwrap());
    assert_eq!(replay(&host).unwrap_err(), ReplayError::Banks { record: 1 });

    let mut host = started();
    let content = vec![80, 0, 0, 0, 1, 0];
    let digests = banks.iter().map(|bank| (*bank, bank.hash(&content))).collect();
    host.append(Record {
        number: 1,
        register: Register::Pcr,
        pcr: 13,
        digests,
        content_type: 80,
        content,
    });
    let refused = replay(&host).unwrap_err();
    assert_eq!(
        refused,
        ReplayError::Record(CelError::ContentType { record: 1, found: 80 })
    );
}

#[test]
fn record_of_a_register_that_is_no_pcr_is_refused() {
    let mut host = started();
    let mut record = Record::build(1, 13, &[Event::Ready], &[Algorithm::Sha1, Algorithm::Sha256]).unwrap();
    record.register = Register::Ccmr;
    host.append(record);
    let refused = ReplayError::PcrIndex {
        record: 1,
        register: Register::Ccmr,
        found: 13,
        wanted: RuntimePcr::DEFAULT,
    };
    assert_eq!(replay(&host).unwrap_err(), refused);
}

#[test]
fn a_log_in_another_pcr_is_good_only_where_it_is_pinned() {
    let host = Host::measuring_in(12);
    let pinned = RuntimePcr::new(12).unwrap();
    assert_eq!(replay_in(&host, pinned).unwrap().runtime_pcr(), pinned);
    let refused = |wanted| ReplayError::PcrIndex {
        record: 0,
        register: Register::Pcr,
        found: 12,
        wanted,
    };
    for wanted in [RuntimePcr::DEFAULT, RuntimePcr::new(14).unwrap()] {
        assert_eq!(replay_in(&host, wanted).unwrap_err(), refused(wanted));
    }
    let text = refused(RuntimePcr::DEFAULT).to_string();
    assert!(
        text.contains("PCR 12") && text.contains("pinned to PCR 13") && text.contains("--pcr"),
        "{text}"
    );
}

/// Something bad is in the pinned PCR's log; its root begins a clean one in a PCR that is still zero.
#[test]
fn a_clean_log_in_an_unused_pcr_does_not_hide_the_pinned_one() {
    let mut host = started();
    host.record(&[load("/root/rogue", 3)]);
    host.records.clear();
    host.pcr = 14;
    host.record(&[Event::from(agent_start(BOOT)), Event::Ready]);
    let refused = replay(&host).unwrap_err();
    assert!(
        matches!(
            refused,
            ReplayError::PcrIndex {
                record: 0,
                found: 14,
                ..
            }
        ),
        "{refused}"
    );
}
