use super::*;

fn at(text: &str) -> u64 {
    text.parse::<Expiry>().unwrap().unix()
}

#[test]
fn hours_of_a_week() {
    let office: Hours = "mon-fri 08:00-18:30".parse().unwrap();
    assert_eq!(office.to_string(), "mon-fri 08:00-18:30");
    // 2026-11-27 is a Friday.
    for (time, inside) in [
        ("2026-11-27T08:00:00Z", true),
        ("2026-11-27T07:59:59Z", false),
        ("2026-11-27T18:29:59Z", true),
        ("2026-11-27T18:30:00Z", false),
        ("2026-11-28T12:00:00Z", false),
        ("2026-11-30T12:00:00Z", true),
    ] {
        assert_eq!(office.include(at(time)), inside, "{time}");
    }
    let sunday: Hours = "sun 00:00-24:00".parse().unwrap();
    assert_eq!(sunday.to_string(), "sun 00:00-24:00");
    assert!(sunday.include(at("2026-11-29T23:59:59Z")) && !sunday.include(at("2026-11-30")));
    for bad in [
        "",
        "mon",
        "fri-mon 08:00-18:00",
        "mon 18:00-08:00",
        "mon 8:00-18:00",
        "mon 08:00-24:01",
        "mon 08:00-08:00",
        "Mon 08:00-18:00",
        "mon 08:60-18:00",
        "mon 08:00-+9:00",
        "mon  08:00-18:00",
    ] {
        assert!(bad.parse::<Hours>().is_err(), "{bad}");
    }
}

#[test]
fn each_term_has_its_refusal() {
    let none = Terms::default();
    assert_eq!(none.allow("default", 0), Ok(()));
    assert!(!none.are_watched() && none.to_string() == "none");
    let terms = Terms {
        groups: ["dom0".to_owned()].into(),
        not_before: Some("2026-11-01".parse().unwrap()),
        not_after: Some("2026-12-01".parse().unwrap()),
        hours: vec!["mon-fri 08:00-18:00".parse().unwrap()],
        hosts_at_once: Some(1),
        lease_s: Some(60),
        on_loss: OnLoss::Wipe,
    };
    terms.check().unwrap();
    let noon = at("2026-11-27T12:00:00Z");
    assert_eq!(terms.allow("dom0", noon), Ok(()));
    for (policy, time, code) in [
        ("other", noon, "other-group"),
        ("dom0", at("2026-10-31"), "not-yet"),
        ("dom0", at("2026-12-01"), "key-expired"),
        ("dom0", at("2026-11-27T20:00:00Z"), "outside-hours"),
    ] {
        assert_eq!(terms.allow(policy, time).unwrap_err().code(), code);
    }
    let words = "groups dom0; not before 2026-11-01T00:00:00Z; not after 2026-12-01T00:00:00Z; hours mon-fri 08:00-18:00; \
                 hosts at once 1; lease 60 s; on loss wipe";
    assert_eq!(terms.to_string(), words);
    let json = serde_json::to_string(&terms).unwrap();
    assert_eq!(serde_json::from_str::<Terms>(&json).unwrap(), terms);
    assert_eq!(serde_json::to_string(&none).unwrap(), "{}");
    assert!(serde_json::from_str::<Terms>(r#"{"lease":1}"#).is_err());
}

#[test]
fn terms_that_cannot_be_kept() {
    let with = |edit: fn(&mut Terms)| {
        let mut terms = Terms::default();
        edit(&mut terms);
        terms.check().unwrap_err()
    };
    assert_eq!(with(|t| t.groups = ["a b".to_owned()].into()), TermsError::Groups);
    assert_eq!(with(|t| t.lease_s = Some(0)), TermsError::Lease(0));
    assert_eq!(with(|t| t.hosts_at_once = Some(1)), TermsError::HostsWithoutLease);
    let many = |t: &mut Terms| (t.hosts_at_once, t.lease_s) = (Some(MAX_HOSTS + 1), Some(60));
    assert_eq!(with(many), TermsError::Hosts(MAX_HOSTS + 1));
    let hours = |t: &mut Terms| t.hours = vec!["mon 00:00-01:00".parse().unwrap(); MAX_HOURS + 1];
    assert_eq!(with(hours), TermsError::Hours(MAX_HOURS + 1));
    let never = |t: &mut Terms| {
        t.not_before = Some("2027-01-01".parse().unwrap());
        t.not_after = Some("2027-01-01".parse().unwrap());
    };
    assert!(matches!(with(never), TermsError::Never { .. }));
    for rule in OnLoss::ALL {
        assert_eq!(rule.to_string().parse(), Ok(rule));
    }
    assert!("wipes".parse::<OnLoss>().is_err());
}
