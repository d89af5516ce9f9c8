use super::*;
use crate::event::{MAX_PATH, Mode};
use crate::testing::NOW;

fn digest(text: &str) -> Sha256Digest {
    Sha256Digest::of(text.as_bytes())
}

fn code(path: &str, text: &str) -> Approved {
    Approved {
        path: path.into(),
        kind: Some(LoadKind::Program),
        sha256: digest(text),
    }
}

fn boot(name: &str, values: &[(u8, &str)]) -> BootConfiguration {
    BootConfiguration {
        name: name.into(),
        pcrs: values
            .iter()
            .map(|(pcr, text)| (*pcr, BTreeSet::from([digest(text)])))
            .collect(),
        ..BootConfiguration::default()
    }
}

fn at(text: &str) -> Option<Expiry> {
    Some(text.parse().unwrap())
}

/// One of everything.
fn full() -> Policy {
    let mut policy = Policy::new("pool-1").unwrap();
    policy.tags.insert("pci".into());
    policy.expires = at("2031-01-01");
    let mut old = boot("old", &[(4, "loader"), (9, "kernel")]);
    old.steps = [(
        9,
        vec![BootStep {
            sha256: digest("step"),
            what: "kernel \"/vmlinuz\"".into(),
        }],
    )]
    .into();
    old.expires = at("2027-01-31");
    policy.boots = vec![old, boot("new", &[(4, "loader"), (9, "kernel 2")])];
    policy
        .allow_all("base", vec![code("/bin/b", "b"), code("/bin/a", "a")])
        .unwrap();
    policy.sets[0].agents.insert(digest("agent"));
    policy.sets[0].kernel_programs.insert(digest("bpf"));
    policy.sets[0].starts.insert(digest("start"));
    policy.allow(digest("single"), None, None).unwrap();
    policy
        .allow(digest("jit"), Some(LoadKind::Anonymous), Some("/bin/jit"))
        .unwrap();
    let rules = policy.rules_mut();
    rules.tiers.insert(1);
    rules.modes.insert(Mode::Hold);
    rules.protected = true;
    rules.boot_log = true;
    rules.lockdown.insert("integrity".into());
    rules.kernels.insert("6.12.0".into());
    rules.kinds.insert(LoadKind::Firmware, Answer::Any);
    rules.flags.insert("memfd".into(), Answer::Refuse);
    rules.violations.insert("lost".into(), Answer::Any);
    rules.ima_log = Answer::Approved;
    policy.check().unwrap();
    policy
}

#[test]
fn file_round_trip_is_sorted_and_stable() {
    let policy = full();
    let text = policy.to_json();
    let back = Policy::from_json(text.as_bytes()).unwrap();
    assert_eq!(back, policy);
    assert_eq!(back.to_json(), text);
    assert!(back.allows(&digest("a"), NOW) && back.allows(&digest("single"), NOW));
    assert!(!back.allows(&digest("c"), NOW) && !back.allows(&digest("jit"), NOW));
    assert_eq!((back.digests(), back.deeds(), back.sets().len()), (3, 1, 2));
    let base = &back.sets()[0];
    assert_eq!(
        base.code().map(|entry| &*entry.path).collect::<Vec<_>>(),
        ["/bin/a", "/bin/b"]
    );
    assert_eq!(base.approved_at("/bin/b").count(), 1);
    assert_eq!(base.approved_at("/bin").count(), 0);
    // A rule that says nothing is not written.
    let plain = Policy::new("p").unwrap().to_json();
    assert!(!plain.contains("lockdown") && !plain.contains("expires"), "{plain}");
}

#[test]
fn the_first_version_is_one_configuration_and_one_set() {
    let first = serde_json::json!({
        "version": 1, "name": "default", "tiers": [1], "modes": ["observe"],
        "agents": [digest("agent")], "kernel_programs": [digest("bpf")],
        "pcrs": {"7": [digest("one"), digest("two")], "4": []},
        "runtime_pcr_start": [digest("start")],
        "runtime": [{"path": "/bin/a", "kind": "program", "sha256": digest("a")}],
    });
    let policy = Policy::from_json(first.to_string().as_bytes()).unwrap();
    assert_eq!((policy.boots().len(), policy.sets().len()), (1, 1));
    assert_eq!(policy.boots()[0].pcrs()[&7].len(), 2);
    assert!(policy.allows(&digest("a"), NOW) && policy.rules().tiers.contains(&1));
    let set = &policy.sets()[0];
    assert!(set.agents().contains(&digest("agent")) && set.runtime_start().contains(&digest("start")));
    let second = policy.to_json();
    assert!(second.contains("\"version\": 2"));
    assert_eq!(Policy::from_json(second.as_bytes()).unwrap(), policy);
}

#[test]
fn malformed_files_have_their_own_errors() {
    let good = full().to_json();
    let with = |from: &str, to: &str| {
        assert!(good.contains(from), "{from}");
        Policy::from_json(good.replacen(from, to, 1).as_bytes()).unwrap_err()
    };
    let version = "\"version\": 2";
    assert!(matches!(with(version, "\"version\": 3"), PolicyError::Version(3)));
    assert!(matches!(
        with(version, "\"version\": 2, \"more\": 1"),
        PolicyError::Json(_)
    ));
    assert!(matches!(
        with("\"pool-1\"", "\"a/b\""),
        PolicyError::Name(_, "a policy")
    ));
    assert!(matches!(with("\"pci\"", "\"a b\""), PolicyError::Name(_, "a tag")));
    assert!(matches!(
        with("\"name\": \"new\"", "\"name\": \"old\""),
        PolicyError::Twice(..)
    ));
    assert!(matches!(
        with("\"name\": \"base\"", "\"name\": \"allowed\""),
        PolicyError::Twice(..)
    ));
    assert!(matches!(with("\"9\":", "\"16\":"), PolicyError::Pcr(16)));
    assert!(matches!(with("\"hold\"", "\"sleep\""), PolicyError::Json(_)));
    assert!(matches!(with("2027-01-31T", "2027-02-31T"), PolicyError::Json(_)));
    assert!(matches!(Policy::from_json(b"{}"), Err(PolicyError::Json(_))));
    // The kind of a deed turns code into what it is not.
    assert!(matches!(
        with("\"program\"", "\"kexec-load\""),
        PolicyError::NeverAllowed(_)
    ));
    let long = "x".repeat(MAX_PATH + 1);
    assert!(matches!(
        Policy::new("p").unwrap().allow(digest("a"), None, Some(&long)),
        Err(PolicyError::Path(_))
    ));
    for name in ["", "a b", "ü", &"n".repeat(MAX_NAME + 1)] {
        assert!(matches!(Policy::new(name), Err(PolicyError::Name(..))), "{name}");
    }
}

#[test]
fn rules_that_make_no_sense_are_refused() {
    let edits: [fn(&mut Rules); 9] = [
        |rules| {
            let _known = rules.tiers.insert(4);
        },
        |rules| {
            let _known = rules.lockdown.insert(String::new());
        },
        |rules| rules.kernels.extend((0..=MAX_VALUES).map(|n| n.to_string())),
        |rules| {
            let _known = rules.kinds.insert(LoadKind::KexecLoad, Answer::Any);
        },
        |rules| {
            let _known = rules.flags.insert("memfds".into(), Answer::Refuse);
        },
        |rules| {
            let _known = rules.flags.insert("memfd".into(), Answer::Any);
        },
        |rules| {
            let _known = rules.violations.insert("lots".into(), Answer::Any);
        },
        |rules| {
            let _known = rules.violations.insert("lost".into(), Answer::Approved);
        },
        |rules| rules.ima_log = Answer::Refuse,
    ];
    for (number, edit) in edits.into_iter().enumerate() {
        let mut policy = Policy::new("p").unwrap();
        edit(policy.rules_mut());
        assert!(policy.check().is_err(), "{number}");
    }
    let mut policy = Policy::new("p").unwrap();
    policy.rules_mut().flags.insert("open for writing".into(), Answer::Any);
    policy.rules_mut().violations.insert("ima".into(), Answer::Any);
    policy.check().unwrap();
}

#[test]
fn merge_is_the_union_or_nothing() {
    let mut one = full();
    let mut two = Policy::new("two").unwrap();
    two.allow_all("base", vec![code("/bin/c", "c")]).unwrap();
    two.allow_all("update", vec![code("/bin/d", "d")]).unwrap();
    two.boots = vec![boot("new", &[(9, "kernel 3")]), boot("newest", &[(9, "kernel 4")])];
    two.rules.tiers.insert(2);
    one.merge(&two).unwrap();
    assert!(["a", "b", "c", "d"].iter().all(|text| one.allows(&digest(text), NOW)));
    let names: Vec<_> = one.boots().iter().map(BootConfiguration::name).collect();
    assert_eq!((one.name(), names), ("pool-1", vec!["old", "new", "newest"]));
    assert_eq!(one.boots()[1].pcrs()[&9].len(), 2);
    assert_eq!(one.sets().len(), 3);
    // What one of them demands alone is not demanded any more; what one allows is allowed.
    let rules = one.rules();
    assert!(!rules.protected && !rules.boot_log && rules.lockdown.is_empty() && rules.kernels.is_empty());
    assert_eq!(rules.tiers, BTreeSet::from([1, 2]));
    assert_eq!((rules.kind(LoadKind::Firmware), rules.flags.len()), (Answer::Any, 0));
    assert_eq!(rules.violations["lost"], Answer::Any);
    assert_eq!((rules.ima_log, one.expires()), (Answer::Any, None));

    two.sets[0]
        .agents
        .extend((0..=MAX_VALUES).map(|number| digest(&number.to_string())));
    let before = one.clone();
    assert!(matches!(
        one.merge(&two),
        Err(PolicyError::TooMany { list: "agents", .. })
    ));
    assert_eq!(one, before);
}

#[test]
fn learning_takes_what_is_new_and_nothing_else() {
    let mut policy = full();
    let mut host = Policy::new("x").unwrap();
    host.boots = vec![boot("today", &[(4, "loader"), (9, "kernel 2")])];
    host.allow_all("today", vec![code("/bin/a", "a")]).unwrap();
    policy.learn(&host).unwrap();
    assert_eq!((policy.boots().len(), policy.sets().len()), (2, 2), "known already");
    host.boots = vec![boot("today", &[(4, "loader"), (9, "kernel 3")])];
    host.allow_all("today", vec![code("/bin/e", "e")]).unwrap();
    host.allow_all(
        "today",
        vec![Approved {
            kind: Some(LoadKind::Device),
            ..code("/bin/e", "e")
        }],
    )
    .unwrap();
    host.rules.modes.insert(Mode::Enforce);
    policy.learn(&host).unwrap();
    assert_eq!((policy.boots().len(), policy.sets().len()), (3, 3));
    let learnt = &policy.sets()[2];
    assert_eq!((learnt.name(), learnt.code().len()), ("today", 2));
    assert!(policy.rules().modes.contains(&Mode::Enforce) && policy.rules().protected);
    let before = policy.clone();
    host.boots = vec![boot("today", &[(9, "kernel 5")])];
    assert!(matches!(policy.learn(&host), Err(PolicyError::Twice(..))));
    assert_eq!(policy, before);
}

#[test]
fn parts_expire_and_go() {
    let mut policy = full();
    let day: Expiry = "2027-02-01".parse().unwrap();
    policy.expire(Some("base"), Some(day)).unwrap();
    assert!(policy.allows(&digest("a"), day.unix() - 1) && !policy.allows(&digest("a"), day.unix()));
    assert!(policy.allows(&digest("single"), day.unix()));
    assert!(!policy.enforced(day.unix()).contains(&digest("a")));
    // The boot that expires first, then this set, then all.
    let mut now = NOW;
    let mut order = Vec::new();
    while let Some(next) = policy.next_expiry(now) {
        order.push(Expiry::new(next).unwrap().to_string()[..10].to_owned());
        now = next;
    }
    assert_eq!(order, ["2027-01-31", "2027-02-01", "2031-01-01"]);
    policy.expire(Some("base"), None).unwrap();
    policy.expire(None, None).unwrap();
    assert!(policy.allows(&digest("a"), day.unix()) && policy.expires().is_none());
    policy.drop_part("base").unwrap();
    policy.drop_part("old").unwrap();
    assert!(!policy.allows(&digest("a"), NOW));
    assert_eq!((policy.boots().len(), policy.sets().len()), (1, 1));
    for missing in [policy.drop_part("base"), policy.expire(Some("base"), None)] {
        assert!(matches!(missing, Err(PolicyError::NoSuchPart { part, .. }) if part == "base"));
    }
}

#[test]
fn a_difference_is_one_line_each() {
    let old = full();
    assert!(old.differences(&old).is_empty());
    let mut new = old.clone();
    new.allow_all("base", vec![code("/bin/c\n", "c")]).unwrap();
    new.boots[1].pcrs.insert(9, BTreeSet::from([digest("kernel 3")]));
    new.rules.protected = false;
    let lines: Vec<_> = old.differences(&new).iter().map(Difference::to_string).collect();
    assert_eq!(
        lines,
        [
            format!("- boot new PCR 9: sha256:{}", digest("kernel 2")),
            format!("+ boot new PCR 9: sha256:{}", digest("kernel 3")),
            "- rules: protected true".to_owned(),
            format!("+ set base code: /bin/c\\n program sha256:{}", digest("c")),
        ]
    );
}

#[test]
fn a_signed_policy_is_that_of_its_key() {
    let signer = || {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        crate::jws::Signer::from_pkcs8(&key.serialize_der()).unwrap()
    };
    let (signer, other) = (signer(), signer());
    let text = full().sign(&signer).unwrap();
    let read = |text: &str| Policy::from_signed(text.as_bytes(), signer.public());
    assert_eq!(read(&text).unwrap(), full());
    assert_eq!(read(&format!("{text}\n")).unwrap(), full());
    assert!(matches!(
        Policy::from_signed(text.as_bytes(), other.public()),
        Err(SignedPolicyError::Signature)
    ));
    let (head, signature) = text.rsplit_once('.').unwrap();
    let mut payload = head.to_owned();
    payload.pop();
    payload.push('A');
    assert!(matches!(
        read(&format!("{payload}.{signature}")),
        Err(SignedPolicyError::Signature)
    ));
    assert!(matches!(read(head), Err(SignedPolicyError::Form)));
    assert!(matches!(
        read(&full().to_json()),
        Err(SignedPolicyError::Form | SignedPolicyError::Header)
    ));
    // What was signed for another purpose is no policy, nor is what is none.
    let list = crate::jws::sign(
        r#"{"alg":"ES256","typ":"assay-approved+jwt"}"#,
        full().to_json().as_bytes(),
        &signer,
    );
    assert!(matches!(read(&list.unwrap()), Err(SignedPolicyError::Header)));
    let none = crate::jws::sign(r#"{"alg":"ES256","typ":"assay-policy+jwt"}"#, b"{}", &signer);
    assert!(matches!(read(&none.unwrap()), Err(SignedPolicyError::Policy(_))));
    let long = vec![b'a'; MAX_SIGNED + 1];
    assert!(matches!(
        Policy::from_signed(&long, signer.public()),
        Err(SignedPolicyError::TooLong(_))
    ));
}

#[test]
fn deeds_are_kept_apart_from_code() {
    let mut policy = Policy::new("p").unwrap();
    let (kind, jit) = (LoadKind::Anonymous, digest("jit"));
    assert!(policy.allow(jit, Some(kind), Some("/usr/bin/jit")).unwrap());
    assert!(
        !policy.allow(jit, Some(kind), Some("/opt/jit")).unwrap(),
        "permitted already"
    );
    let set = &policy.sets()[0];
    assert!(set.allows_deed(kind, &jit) && !set.allows_deed(LoadKind::Device, &jit));
    assert_eq!(
        set.approved_at("/usr/bin/jit").count(),
        0,
        "no known-good value of the file"
    );
    assert!(!policy.allows(&jit, NOW));
    assert_eq!((policy.digests(), policy.deeds()), (0, 1));
    assert!(policy.allow(jit, None, Some("/usr/bin/jit")).unwrap());
    assert!(policy.allows(&jit, NOW));

    let back = Policy::from_json(policy.to_json().as_bytes()).unwrap();
    assert_eq!(back, policy);
    let mut merged = Policy::new("m").unwrap();
    merged.merge(&back).unwrap();
    assert!(merged.sets()[0].allows_deed(kind, &jit) && merged.allows(&jit, NOW));
}

#[test]
fn many_at_once_are_allowed_all_or_none() {
    let mut policy = full();
    let new = policy.allow_all(
        "update",
        vec![code("/bin/a", "a"), code("/bin/x", "x"), code("/bin/y", "x")],
    );
    assert_eq!(new.unwrap(), 1, "one is known, and one there twice");
    let before = policy.clone();
    let bad = Approved {
        kind: Some(LoadKind::KexecLoad),
        ..code("", "z")
    };
    assert!(policy.allow_all("update", vec![code("/bin/z", "z"), bad]).is_err());
    let many = (0..=MAX_ENTRIES).map(|number| code("", &number.to_string())).collect();
    assert!(matches!(
        policy.allow_all("update", many),
        Err(PolicyError::TooMany { list: "code", .. })
    ));
    assert_eq!(policy, before);
}

#[test]
fn an_agents_update_is_allowed_before_it_measures() {
    let mut policy = full();
    let (agent, bpf) = (digest("agent 2"), digest("bpf 2"));
    assert!(policy.allow_agent("update", Some(agent), Some(bpf)).unwrap());
    assert!(!policy.allow_agent("update", Some(agent), None).unwrap(), "known");
    let set = &policy.sets()[2];
    assert!(set.agents().contains(&agent) && set.kernel_programs().contains(&bpf));
    assert!(policy.allows(&agent, NOW) && !policy.allows(&bpf, NOW));
    assert!(policy.enforced(NOW).contains(&bpf));
    policy.drop_part("update").unwrap();
    assert_eq!(policy, full());
}

#[test]
fn enforced_is_all_code_and_the_agent_itself() {
    let policy = full();
    let mut wanted = ["a", "b", "single", "agent", "bpf"].map(digest);
    wanted.sort_unstable();
    assert_eq!(policy.enforced(NOW), wanted);
}
