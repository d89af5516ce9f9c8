//! Every kind of load and deed, every flag, and what stands in the notes.

use super::*;
use crate::event::{Measurement, Notice};

fn digest(text: &str) -> Sha256Digest {
    Sha256Digest::of(text.as_bytes())
}

/// A load of this kind, of something that no policy knows yet.
fn new(kind: LoadKind, path: &str, flags: u32) -> Measurement {
    Measurement {
        flags,
        ..measurement(kind, path, Some(2))
    }
}

/// The verdict on [`Host::measuring`] after one more event, under the policy of before.
fn after(event: Event) -> Appraisal {
    let mut host = Host::measuring();
    let policy = captured(&host);
    host.record(&[event]);
    replayed(&host).appraise(&policy, NOW)
}

fn deeds() -> impl Iterator<Item = LoadKind> {
    LoadKind::ALL.into_iter().filter(|kind| kind.is_deed())
}

/// A host in this mode from its start on.
fn host_in(mode: Mode) -> Host {
    let mut host = Host::booted(BOOT, 5);
    let mut start = agent_start(BOOT);
    start.mode = mode;
    host.record(&[Event::from(start), Event::Ready]);
    host
}

#[test]
fn every_load_is_approved_by_its_digest() {
    let loads = LoadKind::ALL
        .into_iter()
        .filter(|kind| !kind.is_deed() && *kind != LoadKind::KexecLoad);
    for kind in loads {
        let (rule, text) = only(&after(Event::Load(new(kind, "/x/new", 0))));
        assert_eq!(rule, Rule::NotApproved, "{kind}");
        assert!(text.ends_with("is not approved"), "{text}");
        // Whatever kind it was approved as.
        let mut host = Host::measuring();
        let mut policy = captured(&host);
        policy.allow(digest("/x/new"), Some(LoadKind::Mapping), None).unwrap();
        host.record(&[Event::Load(new(kind, "/x/new", 0))]);
        assert!(replayed(&host).appraise(&policy, NOW).is_trusted(), "{kind}");
    }
}

#[test]
fn a_deed_needs_kind_and_digest_together() {
    for kind in deeds() {
        // The program may run; that is not enough.
        let done = new(kind, "/bin/true", 0);
        let (rule, text) = only(&after(Event::Load(done.clone())));
        let wanted = match kind {
            LoadKind::Anonymous => Rule::Anonymous,
            LoadKind::Device => Rule::Device,
            LoadKind::BlockWrite => Rule::BlockWrite,
            LoadKind::CodeWrite => Rule::CodeWrite,
            _ => Rule::Attempt,
        };
        assert_eq!(rule, wanted, "{kind}");
        assert!(text.contains(&digest("/bin/true").to_string()), "{text}");

        let mut host = Host::measuring();
        let policy = captured(&host);
        host.record(&[Event::Load(done)]);
        for other in deeds().filter(|other| *other != kind) {
            let mut policy = policy.clone();
            policy.allow(digest("/bin/true"), Some(other), None).unwrap();
            assert_eq!(
                only(&replayed(&host).appraise(&policy, NOW)).0,
                wanted,
                "{other} is not {kind}"
            );
        }
        let mut policy = policy;
        policy.allow(digest("/bin/ls"), Some(kind), None).unwrap();
        assert_eq!(
            only(&replayed(&host).appraise(&policy, NOW)).0,
            wanted,
            "another program"
        );
        policy.allow(digest("/bin/true"), Some(kind), None).unwrap();
        assert!(replayed(&host).appraise(&policy, NOW).is_trusted(), "{kind}");
    }
}

#[test]
fn a_permitted_deed_does_not_approve_the_program() {
    for kind in deeds() {
        let mut host = Host::measuring();
        let mut policy = captured(&host);
        policy.allow(digest("/x/new"), Some(kind), Some("/x/new")).unwrap();
        host.record(&[Event::Load(new(LoadKind::Program, "/x/new", 0))]);
        let (rule, text) = only(&replayed(&host).appraise(&policy, NOW));
        assert_eq!(rule, Rule::NotApproved, "{kind}");
        assert!(text.ends_with("is not approved"), "no such known-good value: {text}");
    }
}

#[test]
fn a_deed_of_an_unknown_program_is_never_permitted() {
    for kind in deeds() {
        let mut done = new(kind, "/x", flags::NOT_HASHED);
        done.digest = None;
        let (rule, text) = only(&after(Event::Load(done)));
        assert!(rule != Rule::NotHashed && text.contains("sha256:unknown"), "{text}");
    }
}

#[test]
fn reasons_read_well() {
    let sum = |path: &str| format!("sha256:{}", digest(path));
    for (kind, path, wanted) in [
        (
            LoadKind::Device,
            "/dev/xen/privcmd",
            "program SUM (record 3, task sh) opened the device /dev/xen/privcmd",
        ),
        (
            LoadKind::BlockWrite,
            "/dev/sda",
            "program SUM (record 3, task sh) opened the block device /dev/sda for writing",
        ),
        (
            LoadKind::CodeWrite,
            "/lib/libc.so.6",
            "measured file /lib/libc.so.6 SUM (record 3, task sh) was opened for writing while in use",
        ),
        (
            LoadKind::AttemptSignal,
            "",
            "program SUM (record 3, task sh) tried to end or stop the agent by a signal, and was refused",
        ),
        (
            LoadKind::BpfProgram,
            "lsm_file_open",
            "BPF program lsm_file_open SUM (record 3) is not approved",
        ),
        (
            LoadKind::Argument,
            "/x.py",
            "file given to an interpreter /x.py SUM (record 3) is not approved",
        ),
        (
            LoadKind::Firmware,
            "",
            "firmware without a path SUM (record 3) is not approved",
        ),
    ] {
        let text = only(&after(Event::Load(new(kind, path, 0)))).1;
        assert_eq!(text, wanted.replace("SUM", &sum(path)));
    }
    // Who did it is told from where the program was started, if that is in the log.
    let mut host = Host::measuring();
    let policy = captured(&host);
    let mut jit = new(LoadKind::Anonymous, "", 0);
    jit.digest = Some(digest("/bin/true"));
    jit.comm = "j\nit".into();
    host.record(&[Event::Load(jit)]);
    let appraisal = replayed(&host).appraise(&policy, NOW);
    assert_eq!(
        only(&appraisal).1,
        format!(
            "program /bin/true {} (record 3, task j\\nit) made memory executable that has no file; the policy allows this program to run, at /bin/true, and not to do this",
            sum("/bin/true")
        )
    );
    let failure = &appraisal.failures()[0];
    assert_eq!((failure.program(), failure.comm()), (Some("/bin/true"), Some("j\nit")));
    // And a policy that is made from it names the program for people.
    let policy = captured(&host);
    let deed = policy.sets()[0]
        .code()
        .find(|entry| entry.kind == Some(LoadKind::Anonymous));
    assert_eq!(&*deed.unwrap().path, "/bin/true");
}

#[test]
fn a_kexec_that_nobody_can_measure_is_never_allowed() {
    let mut loaded = new(LoadKind::KexecLoad, "", flags::NOT_HASHED);
    loaded.digest = None;
    let appraisal = after(Event::Load(loaded.clone()));
    assert_eq!(
        only(&appraisal),
        (
            Rule::KexecLoad,
            "kexec kernel without a path (record 3) cannot be measured, and is never allowed".to_owned()
        )
    );
    assert_eq!(
        serde_json::to_value(&appraisal).unwrap()["failures"][0]["rule"],
        "kexec-load"
    );
    // Nor by a digest, if one stood there.
    loaded.digest = Some(digest("/bin/true"));
    assert_eq!(only(&after(Event::Load(loaded.clone()))).0, Rule::KexecLoad);

    let mut host = Host::measuring();
    host.record(&[Event::Load(loaded)]);
    assert!(matches!(
        Policy::capture("p", "first", &replayed(&host)),
        Err(PolicyError::NeverAllowed(LoadKind::KexecLoad))
    ));
}

#[test]
fn a_digest_beside_the_flag_that_there_is_none_counts_for_nothing() {
    let odd = new(LoadKind::Program, "/bin/true", flags::NOT_HASHED);
    assert_eq!(only(&after(Event::Load(odd.clone()))).0, Rule::NotHashed);
    let mut host = Host::measuring();
    host.record(&[Event::Load(odd)]);
    assert!(matches!(
        Policy::capture("p", "first", &replayed(&host)),
        Err(PolicyError::NotHashed(_))
    ));
}

#[test]
fn pages_changed_in_memory_are_not_what_was_approved() {
    let changed = new(LoadKind::Protect, "/bin/true", flags::MODIFIED);
    let (rule, text) = only(&after(Event::Load(changed.clone())));
    assert_eq!(rule, Rule::Modified);
    assert!(text.ends_with("(record 3) was changed in memory"), "{text}");
    let mut host = Host::measuring();
    host.record(&[Event::Load(changed)]);
    assert!(matches!(
        Policy::capture("p", "first", &replayed(&host)),
        Err(PolicyError::Modified(path)) if path == "/bin/true"
    ));
}

#[test]
fn reasons_say_where_code_came_from() {
    for (bits, words) in [
        (flags::MEMFD | flags::UNLINKED | flags::TMPFS, "deleted, memfd, tmpfs"),
        (flags::UNLINKED, "deleted"),
        (flags::TMPFS | flags::SCRIPT, "tmpfs, script"),
        (flags::OVERLAY, "overlayfs"),
        (flags::NO_COUNTER | flags::SCRIPT, "script"),
    ] {
        let appraisal = after(Event::Load(new(LoadKind::Program, "/x", bits)));
        let (rule, text) = only(&appraisal);
        assert_eq!(rule, Rule::NotApproved);
        assert!(text.contains(&format!("(record 3; {words}) is not approved")), "{text}");
        assert_eq!(appraisal.failures()[0].flags().join(", "), words);
        let json = serde_json::to_value(&appraisal).unwrap();
        assert_eq!(json["failures"][0]["flags"][0], words.split(", ").next().unwrap());
        // Where it came from is no reason by itself.
        assert!(after(Event::Load(new(LoadKind::Program, "/bin/true", bits))).is_trusted());
    }
}

#[test]
fn what_enforce_refused_is_a_note_and_never_learned() {
    let mut host = host_in(Mode::Enforce);
    let policy = captured(&host);
    let refused = new(LoadKind::Program, "/tmp/rogue\n", flags::REFUSED);
    let mut unhashed = new(LoadKind::KexecLoad, "", flags::REFUSED | flags::NOT_HASHED);
    unhashed.digest = None;
    host.record(&[Event::Load(refused.clone()), Event::Load(unhashed)]);
    host.record(&[Event::Load(refused)]);
    let appraisal = replayed(&host).appraise(&policy, NOW);
    assert!(appraisal.is_trusted(), "{:?}", appraisal.reasons());
    let note = format!(
        "refused: program /tmp/rogue\\n sha256:{} (record 1); 2 times",
        digest("/tmp/rogue\n")
    );
    assert!(appraisal.notes().contains(&note), "{:?}", appraisal.notes());
    let note = "refused: kexec-load by task sh without a digest (record 1)".to_owned();
    assert!(appraisal.notes().contains(&note), "{:?}", appraisal.notes());
    assert!(!captured(&host).allows(&digest("/tmp/rogue\n"), NOW));
}

#[test]
fn what_hold_refused_is_judged_when_it_runs() {
    let mut host = host_in(Mode::Hold);
    let policy = captured(&host);
    host.record(&[Event::Load(new(LoadKind::Program, "/tmp/rogue", flags::REFUSED))]);
    assert!(replayed(&host).appraise(&policy, NOW).is_trusted());
    host.record(&[Event::Load(new(LoadKind::Program, "/tmp/rogue", 0))]);
    assert_eq!(only(&replayed(&host).appraise(&policy, NOW)).0, Rule::NotApproved);
}

#[test]
fn what_was_measured_ahead_is_counted_and_judged_when_it_is_loaded() {
    let mut host = host_in(Mode::Hold);
    let policy = captured(&host);
    host.record(&[Event::Load(new(LoadKind::Mapping, "/lib/new.so", flags::AHEAD))]);
    let appraisal = replayed(&host).appraise(&policy, NOW);
    assert!(appraisal.is_trusted(), "{:?}", appraisal.reasons());
    let note = "measured ahead of a load and not approved: 1 files".to_owned();
    assert!(appraisal.notes().contains(&note), "{:?}", appraisal.notes());
    host.record(&[Event::Load(new(LoadKind::Mapping, "/lib/new.so", 0))]);
    assert_eq!(only(&replayed(&host).appraise(&policy, NOW)).0, Rule::NotApproved);
}

#[test]
fn attempts_count_though_they_fail() {
    let tried = new(LoadKind::AttemptTrace, "", flags::REFUSED);
    let mut host = host_in(Mode::Enforce);
    let policy = captured(&host);
    host.record(&[Event::Load(tried)]);
    let (rule, text) = only(&replayed(&host).appraise(&policy, NOW));
    assert_eq!(rule, Rule::Attempt);
    assert!(
        text.ends_with("(record 1, task sh) tried to debug the agent or read its memory, and was refused"),
        "{text}"
    );
    assert!(matches!(
        Policy::capture("p", "first", &replayed(&host)),
        Err(PolicyError::Attempt { kind: LoadKind::AttemptTrace, task }) if task == "sh"
    ));
}

#[test]
fn deeds_are_captured_as_deeds() {
    let mut host = Host::measuring();
    host.record(&[Event::Load(new(LoadKind::Anonymous, "/x/jit", 0))]);
    let policy = captured(&host);
    assert!(policy.sets()[0].allows_deed(LoadKind::Anonymous, &digest("/x/jit")));
    assert!(!policy.allows(&digest("/x/jit"), NOW));
    assert_eq!(policy.deeds(), 1);
    assert!(replayed(&host).appraise(&policy, NOW).is_trusted());
}

#[test]
fn a_full_log_and_a_failed_tpm_are_violations() {
    for violation in [
        Violation::LogFull { max_bytes: 1 << 20 },
        Violation::TpmFailed { detail: "hung".into() },
    ] {
        assert_eq!(only(&after(Event::Violation(violation))).0, Rule::Violation);
    }
}

#[test]
fn notes_tell_how_it_was_measured() {
    let mut host = Host::measuring();
    let mut start = agent_start(BOOT);
    start.predecessor = Some(1);
    start.tier = 3;
    start.mode = Mode::Hold;
    start.protected = true;
    start.blind = "modules\nfrom memory".into();
    host.record(&[Event::from(start.clone())]);
    // The same again says nothing new.
    host.record(&[Event::from(start)]);
    let list = |serial| Notice::ListInForce {
        serial,
        digest: digest("list"),
        entries: 7,
    };
    host.record(&[
        Event::Notice(Notice::TpmSlow { millis: 4000 }),
        Event::Notice(list(1)),
        Event::Notice(Notice::TpmSlow { millis: 1200 }),
        Event::Notice(list(2)),
    ]);
    let appraisal = replayed(&host).appraise(&captured(&host), NOW);
    assert!(appraisal.is_trusted(), "{:?}", appraisal.reasons());
    let notes = appraisal.notes();
    assert_eq!(
        notes.get(1..).unwrap(),
        [
            "measured by tier 1 in mode observe, the agent not protected from root".to_owned(),
            "measured by tier 3 in mode hold, the agent kept away from the rest of the host; it cannot see: \
             modules\\nfrom memory"
                .to_owned(),
            format!("approved list 2 with 7 digests is in force (sha256:{})", digest("list")),
            "slow extends of the TPM: 2, the slowest took 4000 ms".to_owned(),
        ],
        "{notes:?}"
    );
    assert_eq!(
        (appraisal.tier(), appraisal.mode(), appraisal.protected()),
        (3, Mode::Hold, true)
    );
    let json = serde_json::to_value(&appraisal).unwrap();
    assert_eq!(
        (&json["tier"], &json["mode"], &json["protected"]),
        (&3.into(), &"hold".into(), &true.into())
    );
}

#[test]
fn notes_have_a_limit() {
    let mut host = host_in(Mode::Enforce);
    let policy = captured(&host);
    let refused = |number| Event::Load(new(LoadKind::Program, &format!("/tmp/{number:04}"), flags::REFUSED));
    host.record(&(0..250).map(refused).collect::<Vec<_>>());
    let appraisal = replayed(&host).appraise(&policy, NOW);
    assert!(appraisal.is_trusted());
    assert_eq!(
        appraisal.notes().last().map(String::as_str),
        Some("refused: 150 more; the log has them all")
    );
    assert!(appraisal.notes().len() < 110, "{}", appraisal.notes().len());
}
