use super::*;
use crate::digest::Algorithm;
use crate::event::{Event, LoadKind, Mode, Violation, flags};
use crate::policy::PolicyError;
use crate::testing::{BOOT, Host, NOW, agent_start, load, measurement, replayed};

mod kinds;
mod policies;

fn captured(host: &Host) -> Policy {
    Policy::capture("default", "first", &replayed(host)).unwrap()
}

/// The one rule that refused, and its text.
fn only(appraisal: &Appraisal) -> (Rule, String) {
    assert_eq!(appraisal.failures().len(), 1, "{:?}", appraisal.reasons());
    assert_eq!(appraisal.status(), Status::Untrusted);
    (appraisal.failures()[0].rule(), appraisal.reasons()[0].clone())
}

/// A policy with one part of its file changed.
fn edited(policy: &Policy, edit: impl FnOnce(&mut serde_json::Value)) -> Policy {
    let mut file = serde_json::from_str(&policy.to_json()).unwrap();
    edit(&mut file);
    Policy::from_json(file.to_string().as_bytes()).unwrap()
}

#[test]
fn a_host_fits_the_policy_captured_from_it() {
    let host = Host::measuring();
    let policy = captured(&host);
    let appraisal = replayed(&host).appraise(&policy, NOW);
    assert!(appraisal.is_trusted(), "{:?}", appraisal.reasons());
    assert_eq!(
        (appraisal.records(), appraisal.policy(), appraisal.boot_id()),
        (3, "default", BOOT)
    );
    assert!(
        appraisal.notes().iter().any(|note| note.contains("no boot log")),
        "{:?}",
        appraisal.notes()
    );
    // Code that is known may run again, from wherever it is.
    let mut again = host;
    let mut moved = measurement(LoadKind::Program, "/bin/ls", Some(2));
    moved.path = "/tmp/renamed".into();
    moved.flags = 2;
    again.record(&[Event::Load(moved)]);
    assert!(replayed(&again).appraise(&policy, NOW).is_trusted());
}

#[test]
fn every_unapproved_load_is_listed_with_all_that_is_known() {
    let mut host = Host::measuring();
    let policy = captured(&host);
    host.record(&[Event::Load(measurement(LoadKind::ModuleFile, "/tmp/dummy.ko", Some(2)))]);
    host.record(&[load("/root/rogue", 3), load("/bin/true", 4)]);
    let mut updated = measurement(LoadKind::Mapping, "/lib/libc.so.6", Some(5));
    updated.digest = Some(Sha256Digest::of(b"another libc"));
    host.record(&[Event::Load(updated)]);
    let appraisal = replayed(&host).appraise(&policy, NOW);
    let digest = |text: &str| Sha256Digest::of(text.as_bytes());
    assert_eq!(
        appraisal.reasons(),
        [
            format!(
                "kernel module /tmp/dummy.ko sha256:{} (record 3) is not approved",
                digest("/tmp/dummy.ko")
            ),
            format!(
                "program /root/rogue sha256:{} (record 4) is not approved",
                digest("/root/rogue")
            ),
            format!(
                "mapped file /lib/libc.so.6 sha256:{} (record 5) is not approved; approved at this path is sha256:{}",
                digest("another libc"),
                digest("/lib/libc.so.6")
            ),
        ]
    );
    let failure = &appraisal.failures()[0];
    assert_eq!(failure.rule(), Rule::NotApproved);
    assert_eq!((failure.pcr(), failure.record()), (Some(13), Some(3)));
    assert_eq!(failure.path(), Some("/tmp/dummy.ko"));
    assert_eq!(
        (failure.kind(), failure.digest()),
        (Some(LoadKind::ModuleFile), Some(digest("/tmp/dummy.ko")))
    );

    // One more digest allowed is one failure less.
    let mut wider = policy;
    assert!(
        wider
            .allow(digest("/root/rogue"), Some(LoadKind::Program), Some("/root/rogue"))
            .unwrap()
    );
    assert_eq!(replayed(&host).appraise(&wider, NOW).failures().len(), 2);
}

#[test]
fn equal_failures_are_counted_and_text_is_one_line() {
    let mut host = Host::measuring();
    let policy = captured(&host);
    host.record(&(0..5).map(|seq| load("/tmp/a\nb\u{1b}[2J", seq)).collect::<Vec<_>>());
    let (rule, text) = only(&replayed(&host).appraise(&policy, NOW));
    assert_eq!(rule, Rule::NotApproved);
    assert!(text.starts_with("program /tmp/a\\nb\\u{1b}[2J sha256:"), "{text}");
    assert!(text.ends_with("(record 3) is not approved; 5 times"), "{text}");
}

#[test]
fn what_could_not_be_hashed_is_never_allowed() {
    let mut host = Host::measuring();
    let policy = captured(&host);
    let mut unknown = measurement(LoadKind::Program, "/mnt/x", Some(2));
    unknown.digest = None;
    host.record(&[Event::Load(unknown)]);
    let (rule, text) = only(&replayed(&host).appraise(&policy, NOW));
    assert_eq!(
        (rule, text.as_str()),
        (Rule::NotHashed, "program /mnt/x (record 3) could not be hashed")
    );
    assert!(
        matches!(Policy::capture("p", "first", &replayed(&host)), Err(PolicyError::NotHashed(path)) if path == "/mnt/x")
    );
}

#[test]
fn code_that_could_change_while_hashed_is_not_trusted() {
    let mut host = Host::measuring();
    let policy = captured(&host);
    let mut library = measurement(LoadKind::Mapping, "/lib/libc.so.6", Some(2));
    library.flags = flags::UNSTABLE;
    host.record(&[Event::Load(library)]);
    let (rule, text) = only(&replayed(&host).appraise(&policy, NOW));
    assert_eq!(rule, Rule::Unstable);
    assert!(
        text.ends_with("(record 3) was open for writing while it was measured"),
        "{text}"
    );
    assert!(matches!(
        Policy::capture("p", "first", &replayed(&host)),
        Err(PolicyError::Unstable(_))
    ));
}

#[test]
fn violations_are_never_allowed() {
    let mut host = Host::measuring();
    let policy = captured(&host);
    host.record(&[Event::Violation(Violation::Lost { count: 7 })]);
    let (rule, text) = only(&replayed(&host).appraise(&policy, NOW));
    assert_eq!(
        (rule, text.as_str()),
        (Rule::Violation, "7 measurements were lost in the kernel (record 3)")
    );
    assert!(matches!(
        Policy::capture("p", "first", &replayed(&host)),
        Err(PolicyError::Violation(_))
    ));
}

#[test]
fn a_log_must_be_ready_and_still_measured() {
    let policy = captured(&Host::measuring());
    let mut host = Host::booted(BOOT, 5);
    host.record(&[Event::from(agent_start(BOOT))]);
    assert_eq!(only(&replayed(&host).appraise(&policy, NOW)).0, Rule::NotReady);
    assert!(matches!(
        Policy::capture("p", "first", &replayed(&host)),
        Err(PolicyError::NotReady)
    ));

    let mut stopped = Host::measuring();
    stopped.record(&[Event::AgentStop]);
    assert_eq!(only(&replayed(&stopped).appraise(&policy, NOW)).0, Rule::AgentStopped);
    let mut start = agent_start(BOOT);
    start.predecessor = Some(1);
    stopped.record(&[Event::from(start)]);
    assert!(replayed(&stopped).appraise(&policy, NOW).is_trusted());
}

#[test]
fn each_start_of_the_agent_is_judged() {
    let mut host = Host::measuring();
    let policy = captured(&host);
    let mut start = agent_start(BOOT);
    start.predecessor = Some(1);
    start.agent_digest = Sha256Digest::of(b"another agent");
    start.bpf_digest = Sha256Digest::of(b"other programs");
    start.tier = 3;
    start.mode = Mode::Hold;
    host.record(&[Event::from(start)]);
    let appraisal = replayed(&host).appraise(&policy, NOW);
    let rules: Vec<Rule> = appraisal.failures().iter().map(Failure::rule).collect();
    assert_eq!(rules, [Rule::Agent, Rule::KernelPrograms, Rule::Tier, Rule::Mode]);
    assert!(appraisal.failures().iter().all(|failure| failure.record() == Some(3)));
    let reasons = appraisal.reasons();
    assert!(
        reasons[0].contains(&Sha256Digest::of(b"another agent").to_string()),
        "{}",
        reasons[0]
    );
    assert_eq!(reasons[2], "measuring tier 3 (record 3) is not allowed");
    assert_eq!(reasons[3], "mode hold (record 3) is not allowed");
}

#[test]
fn golden_pcrs_are_compared_each_on_its_own() {
    let mut host = Host::measuring();
    let policy = captured(&host);
    host.pcrs.get_mut(&4).unwrap().0 = vec![0xEE; 32];
    host.pcrs.get_mut(&7).unwrap().0 = vec![0xDD; 32];
    // IMA's PCR moves with the host's work.
    host.pcrs.get_mut(&10).unwrap().0 = vec![0xCC; 32];
    let appraisal = replayed(&host).appraise(&policy, NOW);
    assert_eq!(
        appraisal.failures().iter().map(Failure::pcr).collect::<Vec<_>>(),
        [Some(4), Some(7)]
    );
    assert_eq!(
        appraisal.reasons()[0],
        format!(
            "PCR 4 is sha256:{}, which is not approved; boot configuration first has sha256:{}",
            "ee".repeat(32),
            "05".repeat(32)
        )
    );
    // A PCR without values isn't judged, and the verdict says so.
    let without = edited(&policy, |file| {
        file["boots"][0]["pcrs"]["4"] = serde_json::json!([]);
        file["boots"][0]["pcrs"].as_object_mut().unwrap().remove("7");
    });
    let appraisal = replayed(&host).appraise(&without, NOW);
    assert!(appraisal.is_trusted());
    assert!(
        appraisal
            .notes()
            .contains(&"boot configuration first has no values for PCR 4, 7".to_owned()),
        "{:?}",
        appraisal.notes()
    );
}

#[test]
fn a_log_that_begins_late_is_refused() {
    let mut host = Host::booted(BOOT, 5);
    host.extend(&[9; 32]);
    let moved = host.pcrs[&13].0.clone();
    let mut start = agent_start(BOOT);
    start.pcr_start = vec![(Algorithm::Sha1, vec![0; 20]), (Algorithm::Sha256, moved)];
    host.record(&[Event::from(start), Event::Ready]);
    let policy = edited(&captured(&host), |file| {
        file["sets"][0]["runtime_pcr_start"] = serde_json::json!([])
    });
    let (rule, text) = only(&replayed(&host).appraise(&policy, NOW));
    assert_eq!(rule, Rule::RuntimeStart);
    assert!(text.contains("PCR 13 was sha256:"), "{text}");
    // A host where the stub measures system extensions into this PCR is captured with that value.
    assert!(replayed(&host).appraise(&captured(&host), NOW).is_trusted());
}

/// A crypto-agile log with one event for each of these PCRs, and the PCR values that it leads to.
fn boot_log(host: &mut Host, pcrs: &[u8]) {
    let mut log = vec![0, 0, 0, 0, 3, 0, 0, 0];
    log.extend([0; 20]);
    log.extend(33u32.to_le_bytes());
    log.extend(b"Spec ID Event03\0");
    log.extend([0, 0, 0, 0, 0, 2, 0, 2, 1, 0, 0, 0, 0x0B, 0, 32, 0, 0]);
    for pcr in pcrs {
        log.extend(u32::from(*pcr).to_le_bytes());
        log.extend(4u32.to_le_bytes());
        log.extend(1u32.to_le_bytes());
        log.extend(0x0Bu16.to_le_bytes());
        log.extend([*pcr; 32]);
        log.extend(0u32.to_le_bytes());
    }
    for (index, value) in host.pcrs.iter_mut().filter(|(index, _)| **index < 8) {
        let zero = vec![0; 32];
        value.0 = if pcrs.contains(index) {
            Algorithm::Sha256.extend(&zero, &[*index; 32])
        } else {
            zero
        };
    }
    host.boot_log = Some(log);
}

#[test]
fn a_boot_log_must_lead_to_the_firmware_pcrs() {
    let mut host = Host::measuring();
    boot_log(&mut host, &[0, 1, 2, 3, 4, 5, 6, 7]);
    let policy = captured(&host);
    let appraisal = replayed(&host).appraise(&policy, NOW);
    assert!(appraisal.is_trusted(), "{:?}", appraisal.reasons());
    assert_eq!(
        appraisal.notes(),
        ["measured by tier 1 in mode observe, the agent not protected from root"]
    );

    // The golden values are right, yet the log tells another story: one event is missing from it.
    let good = host.pcrs.clone();
    boot_log(&mut host, &[0, 1, 2, 3, 5, 6, 7]);
    host.pcrs = good;
    let appraisal = replayed(&host).appraise(&policy, NOW);
    let (rule, text) = only(&appraisal);
    assert_eq!((rule, appraisal.failures()[0].pcr()), (Rule::BootLogPcr, Some(4)));
    assert!(
        text.starts_with("the boot log does not lead to PCR 4, which is sha256:"),
        "{text}"
    );

    // An empty log for PCRs that were extended is no explanation either.
    host.boot_log.as_mut().unwrap().truncate(65);
    assert_eq!(replayed(&host).appraise(&policy, NOW).failures().len(), 8);

    host.boot_log = Some(b"bogus".to_vec());
    assert_eq!(only(&replayed(&host).appraise(&policy, NOW)).0, Rule::BootLog);
}

#[test]
fn a_boot_log_of_another_bank_is_noted() {
    let mut host = Host::measuring();
    let policy = captured(&host);
    // The TPM 1.2 form has SHA-1 digests alone.
    host.boot_log = Some([[4u8, 0, 0, 0, 4, 0, 0, 0].as_slice(), &[7; 20], &[0; 4]].concat());
    let appraisal = replayed(&host).appraise(&policy, NOW);
    assert!(appraisal.is_trusted(), "{:?}", appraisal.reasons());
    assert!(
        appraisal.notes()[0].contains("no sha256 digests"),
        "{:?}",
        appraisal.notes()
    );
}

#[test]
fn all_kinds_of_failure_are_listed_together() {
    let mut host = Host::measuring();
    let policy = captured(&host);
    host.pcrs.get_mut(&0).unwrap().0 = vec![0xEE; 32];
    host.boot_log = Some(b"bogus".to_vec());
    host.record(&[load("/root/rogue", 2)]);
    host.record(&[Event::Violation(Violation::Lost { count: 1 })]);
    let appraisal = replayed(&host).appraise(&policy, NOW);
    let rules: Vec<Rule> = appraisal.failures().iter().map(Failure::rule).collect();
    assert_eq!(
        rules,
        [Rule::PcrValue, Rule::BootLog, Rule::NotApproved, Rule::Violation]
    );
    let json = serde_json::to_value(&appraisal).unwrap();
    assert_eq!(json["status"], "untrusted");
    assert_eq!(json["failures"][2]["rule"], "not-approved");
    assert_eq!(json["failures"][2]["path"], "/root/rogue");
    assert!(json.get("extra_data").is_none());
}

#[test]
fn the_pcr_of_the_log_has_no_golden_value() {
    let host = Host::measuring_in(12);
    let policy = captured(&host);
    let golden = |policy: &Policy, pcr| policy.boots()[0].pcrs().contains_key(&pcr);
    assert!(golden(&policy, 13) && !golden(&policy, 12));
    assert!(replayed(&host).appraise(&policy, NOW).is_trusted());

    // One policy for hosts with either: what was captured where it is not in use does not judge where it is.
    let usual = Host::measuring();
    let usual_policy = captured(&usual);
    assert!(golden(&usual_policy, 12) && !golden(&usual_policy, 13));
    let mut both = policy;
    both.merge(&usual_policy).unwrap();
    for (host, pcr) in [(&host, 12), (&usual, 13)] {
        let appraisal = replayed(host).appraise(&both, NOW);
        assert!(appraisal.is_trusted(), "{:?}", appraisal.reasons());
        let note = format!("the policy's values for PCR {pcr} are not for this host: its runtime log is there");
        assert!(appraisal.notes().contains(&note), "{:?}", appraisal.notes());
    }
}

#[test]
fn a_boot_log_leads_to_the_start_of_a_log_in_its_pcr() {
    let mut host = Host::booted(BOOT, 5);
    host.pcr = 14;
    host.extend(&[14; 32]);
    let shim = host.pcrs[&14].0.clone();
    let mut start = agent_start(BOOT);
    start.pcr_start = vec![(Algorithm::Sha1, vec![0; 20]), (Algorithm::Sha256, shim)];
    host.record(&[Event::from(start), Event::Ready]);
    boot_log(&mut host, &[0, 1, 2, 3, 4, 5, 6, 7, 14]);
    let appraisal = replayed(&host).appraise(&captured(&host), NOW);
    assert!(appraisal.is_trusted(), "{:?}", appraisal.reasons());
}

#[test]
fn a_log_that_nothing_approves_of_is_told_up_to_a_limit() {
    let mut host = Host::measuring();
    let policy = captured(&host);
    for repeated in 0..2_u64 {
        for part in 0..3 {
            let seq = |n: u64| 2 + n + 4000 * (part + 3 * repeated);
            let events = (0..4000).map(|n| load(&format!("/opt/{part}/{n}"), seq(n)));
            host.record(&events.collect::<Vec<_>>());
        }
    }
    let appraisal = replayed(&host).appraise(&policy, NOW);
    assert_eq!(
        (appraisal.is_trusted(), appraisal.failures().len()),
        (false, MAX_FAILURES)
    );
    // 12,000 files, each loaded twice: those that are listed say so, the others are counted at each load.
    assert!(appraisal.reasons()[0].contains("2 times"), "{}", appraisal.reasons()[0]);
    let note = appraisal.notes().last().unwrap();
    assert_eq!(note, "failures beyond the first 10000: 4000");
}
