//! What a policy says beyond digests: several boots, several sets, times, rules, the IMA log.

use super::*;
use crate::policy::{Answer, Expiry, Rules};

fn digest(text: &str) -> Sha256Digest {
    Sha256Digest::of(text.as_bytes())
}

fn rules(appraisal: &Appraisal) -> Vec<Rule> {
    appraisal.failures().iter().map(Failure::rule).collect()
}

fn with(policy: &Policy, edit: impl FnOnce(&mut Rules)) -> Policy {
    let mut policy = policy.clone();
    edit(policy.rules_mut());
    policy.check().unwrap();
    policy
}

/// A host that booted otherwise: other values of these PCRs.
fn booted_with(values: &[(u8, u8)]) -> Host {
    let mut host = Host::measuring();
    for (pcr, byte) in values {
        host.pcrs.get_mut(pcr).unwrap().0 = vec![*byte; 32];
    }
    host
}

#[test]
fn a_boot_must_be_one_of_the_configurations_as_a_whole() {
    let (old, new) = (
        booted_with(&[(4, 0xA4), (9, 0xA9)]),
        booted_with(&[(4, 0xB4), (9, 0xB9)]),
    );
    let mut policy = captured(&old);
    policy
        .learn(&Policy::capture("x", "second", &replayed(&new)).unwrap())
        .unwrap();
    assert_eq!((policy.boots().len(), policy.sets().len()), (2, 1));
    for host in [&old, &new] {
        assert!(replayed(host).appraise(&policy, NOW).is_trusted());
    }
    // Each value is approved, and the boot is not.
    let mixed = booted_with(&[(4, 0xA4), (9, 0xB9)]);
    let (rule, text) = only(&replayed(&mixed).appraise(&policy, NOW));
    assert_eq!(rule, Rule::PcrValue);
    assert!(text.contains("boot configuration second has sha256:b4b4"), "{text}");
    // The nearest one is told, all its differences.
    let other = booted_with(&[(1, 0xC1), (4, 0xA4), (9, 0xC9)]);
    let appraisal = replayed(&other).appraise(&policy, NOW);
    assert_eq!(
        appraisal.failures().iter().map(Failure::pcr).collect::<Vec<_>>(),
        [Some(1), Some(9)]
    );
    assert!(
        appraisal
            .reasons()
            .iter()
            .all(|text| text.contains("configuration first"))
    );
    // Without any the boot is not judged, and the verdict says so.
    let none = edited(&policy, |file| file["boots"] = serde_json::json!([]));
    let appraisal = replayed(&other).appraise(&none, NOW);
    assert!(appraisal.is_trusted());
    assert!(
        appraisal.notes()[0].contains("no boot configuration"),
        "{:?}",
        appraisal.notes()
    );
}

#[test]
fn a_dynamic_launch_is_judged() {
    let host = booted_with(&[(17, 0x17), (18, 0x18)]);
    let policy = captured(&host);
    assert!(replayed(&host).appraise(&policy, NOW).is_trusted());
    let (rule, text) = only(&replayed(&booted_with(&[(17, 0x17), (18, 0x19)])).appraise(&policy, NOW));
    assert_eq!(rule, Rule::PcrValue);
    assert!(text.starts_with("PCR 18 is sha256:1919"), "{text}");
}

#[test]
fn what_has_expired_is_not_approved() {
    let host = Host::measuring();
    let day: Expiry = "2027-01-31".parse().unwrap();
    let (before, after) = (day.unix() - 1, day.unix());
    let policy = captured(&host);
    let expiring = |part: Option<&str>| {
        let mut policy = policy.clone();
        policy.expire(part, Some(day)).unwrap();
        policy
    };
    let (rule, text) = only(&replayed(&host).appraise(&expiring(None), after));
    assert_eq!(
        (rule, text.as_str()),
        (
            Rule::Expired,
            "policy default, approved until 2027-01-31T00:00:00Z, has expired"
        )
    );
    assert!(replayed(&host).appraise(&expiring(None), before).is_trusted());

    // A set and a boot configuration of the same name go together.
    let appraisal = replayed(&host).appraise(&expiring(Some("first")), after);
    assert_eq!(
        rules(&appraisal)[..3],
        [Rule::Expired, Rule::Agent, Rule::KernelPrograms]
    );
    assert_eq!(
        appraisal.reasons()[0],
        "boot configuration first, approved until 2027-01-31T00:00:00Z, has expired"
    );
    assert!(
        appraisal.reasons()[3].ends_with("is not approved; it was approved until 2027-01-31T00:00:00Z by set first"),
        "{:?}",
        appraisal.reasons()
    );
    assert!(replayed(&host).appraise(&expiring(Some("first")), before).is_trusted());
}

#[test]
fn rules_on_how_a_host_measures() {
    let host = Host::measuring();
    let policy = captured(&host);
    type Case = (fn(&mut Rules), Rule, &'static str);
    let cases: [Case; 6] = [
        (
            |rules| rules.protected = true,
            Rule::NotProtected,
            "does not keep root away",
        ),
        (
            |rules| {
                let _known = rules.lockdown.insert("integrity".into());
            },
            Rule::Lockdown,
            "kernel lockdown none (record 0) is not allowed",
        ),
        (
            |rules| {
                let _known = rules.agent_versions.insert("9.9".into());
            },
            Rule::AgentVersion,
            "agent version 0.1.0 (record 0) is not allowed",
        ),
        (
            |rules| {
                let _known = rules.kernels.insert("6.1.0".into());
            },
            Rule::Kernel,
            "kernel 6.12.0 (record 0) is not allowed",
        ),
        (
            |rules| rules.boot_log = true,
            Rule::BootLog,
            "the policy demands that one explains the boot",
        ),
        (
            |rules| {
                let _known = rules.tiers.pop_first();
            },
            Rule::Tier,
            "measuring tier 1",
        ),
    ];
    for (edit, wanted, words) in cases {
        let (rule, text) = only(&replayed(&host).appraise(&with(&policy, edit), NOW));
        assert_eq!(rule, wanted, "{text}");
        assert!(text.contains(words), "{text}");
    }
    let met = with(&policy, |rules| {
        rules.lockdown.extend(["none".into(), "integrity".into()]);
        rules.agent_versions.insert("0.1.0".into());
        rules.kernels.insert("6.12.0".into());
    });
    assert!(replayed(&host).appraise(&met, NOW).is_trusted());
}

#[test]
fn rules_by_kind() {
    let mut host = Host::measuring();
    let policy = captured(&host);
    host.record(&[Event::Load(measurement(LoadKind::Firmware, "/lib/firmware/x", Some(2)))]);
    let judge = |answer| {
        let policy = with(&policy, |rules| {
            if let Some(answer) = answer {
                rules.kinds.insert(LoadKind::Firmware, answer);
            }
        });
        replayed(&host).appraise(&policy, NOW)
    };
    assert_eq!(only(&judge(None)).0, Rule::NotApproved);
    assert_eq!(only(&judge(Some(Answer::Approved))).0, Rule::NotApproved);
    assert!(judge(Some(Answer::Any)).is_trusted());
    let (rule, text) = only(&judge(Some(Answer::Refuse)));
    assert_eq!(rule, Rule::KindRefused);
    assert!(text.contains("of a kind that the policy refuses"), "{text}");

    // A deed: approved with its program, for all, for none.
    let mut host = Host::measuring();
    let policy = captured(&host);
    let mut jit = measurement(LoadKind::Anonymous, "/bin/true", Some(2));
    jit.path = "".into();
    host.record(&[Event::Load(jit)]);
    let (rule, text) = only(&replayed(&host).appraise(&policy, NOW));
    assert_eq!(rule, Rule::Anonymous);
    assert!(
        text.ends_with("the policy allows this program to run, at /bin/true, and not to do this"),
        "{text}"
    );
    let allowing = captured(&host);
    assert!(replayed(&host).appraise(&allowing, NOW).is_trusted());
    let any = with(&policy, |rules| {
        let _known = rules.kinds.insert(LoadKind::Anonymous, Answer::Any);
    });
    assert!(replayed(&host).appraise(&any, NOW).is_trusted());
    let none = with(&allowing, |rules| {
        let _known = rules.kinds.insert(LoadKind::Anonymous, Answer::Refuse);
    });
    assert_eq!(only(&replayed(&host).appraise(&none, NOW)).0, Rule::Anonymous);
}

#[test]
fn rules_by_flag_and_violation() {
    let mut host = Host::measuring();
    let policy = captured(&host);
    let mut memfd = measurement(LoadKind::Program, "/bin/true", Some(2));
    memfd.flags = flags::MEMFD | flags::UNSTABLE;
    host.record(&[Event::Load(memfd), Event::Violation(Violation::Lost { count: 7 })]);
    let judge = |edit: fn(&mut Rules)| replayed(&host).appraise(&with(&policy, edit), NOW);
    assert_eq!(rules(&judge(|_| {})), [Rule::Unstable, Rule::Violation]);
    let tolerant = judge(|rules| {
        rules.flags.insert("open for writing".into(), Answer::Any);
        rules.violations.insert("lost".into(), Answer::Any);
    });
    assert!(tolerant.is_trusted(), "{:?}", tolerant.reasons());
    let note = "tolerated: violation lost, 1 times, the first in record 3";
    assert!(
        tolerant.notes().iter().any(|known| known == note),
        "{:?}",
        tolerant.notes()
    );
    let strict = judge(|rules| {
        rules.flags.insert("memfd".into(), Answer::Refuse);
        rules.violations.insert("lost".into(), Answer::Any);
    });
    let (rule, text) = only(&strict);
    assert_eq!(rule, Rule::FlagRefused);
    assert!(
        text.contains("(record 3; memfd) was loaded in a way that the policy refuses"),
        "{text}"
    );
}

/// A host whose kernel has an IMA log with these files.
fn with_ima(files: &[&str]) -> Host {
    let mut host = Host::measuring();
    host.ima("boot_aggregate", Some(("sha256", &[9; 32])));
    for path in files {
        host.ima(path, Some(("sha256", digest(path).as_ref())));
    }
    host
}

#[test]
fn the_ima_log_is_judged_by_the_same_values() {
    let mut host = with_ima(&["/bin/true", "/usr/sbin/xapi"]);
    let policy = captured(&host);
    assert_eq!(policy.rules().ima_log, Answer::Approved);
    assert!(policy.allows(&digest("/usr/sbin/xapi"), NOW));
    let appraisal = replayed(&host).appraise(&policy, NOW);
    assert!(appraisal.is_trusted(), "{:?}", appraisal.reasons());
    assert!(
        appraisal
            .notes()
            .contains(&"judged by the IMA log, too: 3 entries".to_owned())
    );
    // Another boot has another aggregate, which the boot PCRs answer for.
    let mut again = Host::measuring();
    again.ima("boot_aggregate", Some(("sha256", &[8; 32])));
    again.ima("/bin/true", Some(("sha256", digest("/bin/true").as_ref())));
    assert!(replayed(&again).appraise(&policy, NOW).is_trusted());

    host.ima("/usr/sbin/xapi", Some(("sha256", &[6; 32])));
    host.ima("/lib/old.so", Some(("sha1", &[5; 20])));
    host.ima("/var/log/x", None);
    let appraisal = replayed(&host).appraise(&policy, NOW);
    assert_eq!(
        rules(&appraisal),
        [Rule::ImaNotApproved, Rule::ImaNotApproved, Rule::ImaViolation]
    );
    let reasons = appraisal.reasons();
    assert_eq!(
        reasons[0],
        format!(
            "file /usr/sbin/xapi sha256:{} (IMA entry 3) is not approved; approved at this path is sha256:{}",
            "06".repeat(32),
            digest("/usr/sbin/xapi")
        )
    );
    assert!(reasons[1].contains("(IMA entry 4: a sha1 digest)"), "{}", reasons[1]);
    assert_eq!(
        reasons[2],
        "IMA could not tell what was read from /var/log/x (IMA entry 5)"
    );
    let tolerant = with(&policy, |rules| {
        let _known = rules.violations.insert("ima".into(), Answer::Any);
    });
    assert_eq!(replayed(&host).appraise(&tolerant, NOW).failures().len(), 2);
    // Known-good values have no such digests: what can't be judged is not, and who captures is told.
    let policy = captured(&host);
    assert_eq!(policy.rules().ima_log, Answer::Any);
    assert!(replayed(&host).appraise(&policy, NOW).is_trusted());
    assert!(
        replayed(&host)
            .ima_problem()
            .is_some_and(|why| why.contains("ima_hash=sha256"))
    );
}

#[test]
fn an_ima_log_that_proves_nothing_is_refused_where_it_is_judged() {
    let host = with_ima(&["/bin/true"]);
    let policy = captured(&host);
    let any = with(&policy, |rules| rules.ima_log = Answer::Any);

    // Entries that IMA made after the quote are for the next one.
    let mut later = with_ima(&["/bin/true"]);
    let pcr = later.pcrs[&10].clone();
    later.ima("/root/rogue", Some(("sha256", &[1; 32])));
    later.pcrs.insert(10, pcr);
    assert!(replayed(&later).appraise(&policy, NOW).is_trusted());

    let mut cut = with_ima(&["/bin/true"]);
    cut.ima_log.as_mut().unwrap().drain(..100);
    let mut gone = with_ima(&["/bin/true"]);
    gone.ima_log = None;
    let mut hidden = with_ima(&["/bin/true", "/root/rogue"]);
    hidden.ima_log = host.ima_log.clone();
    for (name, bad) in [("cut", cut), ("gone", gone), ("hidden", hidden)] {
        assert_eq!(only(&replayed(&bad).appraise(&policy, NOW)).0, Rule::ImaLog, "{name}");
        let appraisal = replayed(&bad).appraise(&any, NOW);
        assert!(appraisal.is_trusted(), "{name}: {:?}", appraisal.reasons());
    }
}

#[test]
fn the_event_that_changed_a_boot_is_named() {
    let mut host = Host::measuring();
    boot_log(&mut host, &[0, 1, 2, 3, 4, 5, 6, 7]);
    let policy = captured(&host);
    assert_eq!(policy.boots()[0].steps(4).len(), 1);
    // The same PCRs, one event more in one of them.
    boot_log(&mut host, &[0, 1, 2, 3, 4, 5, 6, 7, 4]);
    let first = Algorithm::Sha256.extend(&[0; 32], &[4; 32]);
    host.pcrs.get_mut(&4).unwrap().0 = Algorithm::Sha256.extend(&first, &[4; 32]);
    let (rule, text) = only(&replayed(&host).appraise(&policy, NOW));
    assert_eq!(rule, Rule::PcrValue);
    let four = "04".repeat(32);
    assert!(text.contains("; its event 1 is "), "{text}");
    assert!(
        text.contains(&format!(
            "(sha256:{four}), approved is nothing, of 2 events instead of 1; boot configuration first has"
        )),
        "{text}"
    );
}
