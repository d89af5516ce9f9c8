use super::*;

fn digest(text: &str) -> Sha256Digest {
    Sha256Digest::of(text.as_bytes())
}

#[test]
fn file_round_trip_is_sorted_and_stable() {
    let mut policy = Policy::new("default").unwrap();
    assert!(
        policy
            .allow(digest("b"), Some(LoadKind::Program), Some("/usr/bin/b"))
            .unwrap()
    );
    assert!(policy.allow(digest("a"), None, None).unwrap());
    assert!(
        !policy
            .allow(digest("b"), Some(LoadKind::Mapping), Some("/usr/bin/b"))
            .unwrap()
    );
    policy.tiers.insert(1);
    policy.modes.insert(Mode::Observe);
    policy.pcrs.entry(7).or_default().insert(digest("pcr"));
    let text = policy.to_json();
    let back = Policy::from_json(text.as_bytes()).unwrap();
    assert_eq!(back, policy);
    assert_eq!(back.to_json(), text);
    assert_eq!((back.digests(), back.runtime().len()), (2, 3));
    assert!(back.allows(&digest("a")) && !back.allows(&digest("c")));
    assert_eq!(back.approved_at("/usr/bin/b").count(), 2);
    assert_eq!(back.approved_at("/usr/bin").count(), 0);
}

#[test]
fn malformed_files_have_their_own_errors() {
    let good = Policy::new("p").unwrap().to_json();
    let with = |from: &str, to: &str| {
        assert!(good.contains(from), "{from}");
        Policy::from_json(good.replacen(from, to, 1).as_bytes()).unwrap_err()
    };
    assert!(matches!(
        with("\"version\": 1", "\"version\": 2"),
        PolicyError::Version(2)
    ));
    assert!(matches!(
        with("\"version\": 1", "\"version\": 1, \"surprise\": 1"),
        PolicyError::Json(_)
    ));
    assert!(matches!(
        with("\"name\": \"p\"", "\"name\": \"a/b\""),
        PolicyError::Name(_)
    ));
    assert!(matches!(with("\"tiers\": []", "\"tiers\": [4]"), PolicyError::Tier(4)));
    assert!(matches!(
        with("\"pcrs\": {}", "\"pcrs\": {\"16\": []}"),
        PolicyError::Pcr(16)
    ));
    assert!(matches!(
        with("\"pcrs\": {}", "\"pcrs\": {\"0\": [\"00\"]}"),
        PolicyError::PcrValue { pcr: 0, .. }
    ));
    assert!(matches!(
        with("\"modes\": []", "\"modes\": [\"sleep\"]"),
        PolicyError::Json(_)
    ));
    assert!(matches!(Policy::from_json(b"{}"), Err(PolicyError::Json(_))));
    let long = "x".repeat(MAX_PATH + 1);
    assert!(matches!(
        Policy::new("p").unwrap().allow(digest("a"), None, Some(&long)),
        Err(PolicyError::Path(_))
    ));
    for name in ["", "a b", "ü", &"n".repeat(MAX_NAME + 1)] {
        assert!(matches!(Policy::new(name), Err(PolicyError::Name(_))), "{name}");
    }
}

#[test]
fn merge_is_the_union_or_nothing() {
    let mut one = Policy::new("one").unwrap();
    one.allow(digest("a"), None, None).unwrap();
    one.pcrs.entry(0).or_default().insert(digest("old"));
    let mut two = Policy::new("two").unwrap();
    two.allow(digest("b"), None, None).unwrap();
    two.pcrs.entry(0).or_default().insert(digest("new"));
    one.merge(&two).unwrap();
    assert!(one.allows(&digest("a")) && one.allows(&digest("b")));
    assert_eq!((one.name(), one.pcrs()[&0].len()), ("one", 2));

    two.agents
        .extend((0..=MAX_VALUES).map(|number| digest(&number.to_string())));
    let before = one.clone();
    assert!(matches!(
        one.merge(&two),
        Err(PolicyError::TooMany { list: "agents", .. })
    ));
    assert_eq!(one, before);
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
    assert!(policy.allows_deed(kind, &jit) && !policy.allows_deed(LoadKind::Device, &jit));
    assert!(!policy.allows(&jit));
    assert_eq!((policy.digests(), policy.deeds()), (0, 1));
    assert_eq!(
        policy.approved_at("/usr/bin/jit").count(),
        0,
        "no known-good value of the file"
    );
    assert!(policy.allow(jit, None, Some("/usr/bin/jit")).unwrap());
    assert!(policy.allows(&jit));

    let back = Policy::from_json(policy.to_json().as_bytes()).unwrap();
    assert_eq!(back, policy);
    let mut merged = Policy::new("m").unwrap();
    merged.merge(&back).unwrap();
    assert!(merged.allows_deed(kind, &jit) && merged.allows(&jit));
}

#[test]
fn what_has_no_digest_cannot_be_approved() {
    let mut policy = Policy::new("p").unwrap();
    let kexec = LoadKind::KexecLoad;
    assert!(matches!(
        policy.allow(digest("a"), Some(kexec), None),
        Err(PolicyError::NeverAllowed(LoadKind::KexecLoad))
    ));
    policy.allow(digest("a"), Some(LoadKind::KexecImage), None).unwrap();
    let file = policy.to_json().replace("kexec-image", "kexec-load");
    assert!(matches!(
        Policy::from_json(file.as_bytes()),
        Err(PolicyError::NeverAllowed(LoadKind::KexecLoad))
    ));
}

#[test]
fn enforced_is_all_code_and_the_agent_itself() {
    let mut policy = Policy::new("p").unwrap();
    policy.allow(digest("a"), Some(LoadKind::Program), None).unwrap();
    policy.allow(digest("b"), Some(LoadKind::Mapping), None).unwrap();
    policy.allow(digest("deed"), Some(LoadKind::Device), None).unwrap();
    policy.agents.extend([digest("agent"), digest("a")]);
    policy.kernel_programs.insert(digest("bpf"));
    let mut wanted = ["a", "b", "agent", "bpf"].map(digest);
    wanted.sort_unstable();
    assert_eq!(policy.enforced(), wanted);
}
