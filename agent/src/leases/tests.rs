use super::*;

fn disk(number: u8) -> OpenDisk {
    OpenDisk {
        name: format!("disk-{number}"),
        image: "/root/disk.img".into(),
        disk: Uuid::new([number; 16]),
        key_id: format!("key-{number}"),
        state: DiskState::Open,
        until: None,
        on_loss: OnLoss::Nothing,
        lost: Vec::new(),
        told: false,
    }
}

fn news(number: u8, lease: Option<u64>, on_loss: OnLoss, reasons: &[&str]) -> LeaseNews {
    let lease = reasons.is_empty().then_some(Lease {
        seconds: lease,
        on_loss,
    });
    LeaseNews {
        keys: vec![KeyNews {
            key_id: format!("key-{number}"),
            disk_uuid: Uuid::new([number; 16]),
            lease,
            on_loss: Some(on_loss),
            reasons: reasons.iter().map(ToString::to_string).collect(),
        }],
    }
}

/// Opens a disk and gives its lease.
fn opened(leases: &Leases, number: u8, seconds: Option<u64>, on_loss: OnLoss) {
    leases.opening(disk(number), Some(&Lease { seconds, on_loss }), 100);
    leases.is_now(&disk(number).name, DiskState::Open);
}

fn deeds(leases: &Leases, now: u64) -> Vec<Deed> {
    leases.due(now).0.into_iter().map(|(_, deed)| deed).collect()
}

#[test]
fn a_lease_that_runs_out_brings_what_its_rule_says() {
    let dir = tempfile::tempdir().unwrap();
    for (rule, due) in [
        (OnLoss::Nothing, None),
        (OnLoss::Tell, Some(Deed::Tell)),
        (OnLoss::Suspend, Some(Deed::Suspend)),
        (OnLoss::Wipe, Some(Deed::Wipe)),
    ] {
        let leases = Leases::open(dir.path());
        opened(&leases, 1, Some(60), rule);
        assert_eq!(deeds(&leases, 159), [], "{rule}");
        assert_eq!(deeds(&leases, 160), due.as_slice(), "{rule}");
        // Renewed from 150 on.
        let answer = leases.tell(&news(1, Some(60), rule, &[]), 150);
        assert_eq!(answer.held.len(), 1);
        assert_eq!(deeds(&leases, 209), [], "{rule}");
        assert_eq!(deeds(&leases, 210), due.as_slice(), "{rule}");
    }
}

#[test]
fn the_verifiers_word_counts_at_once_and_a_good_one_ends_it() {
    let dir = tempfile::tempdir().unwrap();
    let leases = Leases::open(dir.path());
    opened(&leases, 1, None, OnLoss::Suspend);
    opened(&leases, 2, None, OnLoss::Nothing);
    let lost = |rule| drop(leases.tell(&news(1, None, rule, &["/root/rogue"]), 200));
    lost(OnLoss::Suspend);
    let (due, later) = leases.due(200);
    assert_eq!((due.len(), due[0].1, later), (1, Deed::Suspend, false));
    assert_eq!(due[0].0.why(), "/root/rogue");
    leases.is_now("disk-1", DiskState::Suspended);
    assert_eq!(deeds(&leases, 201), []);
    let good = |rule| drop(leases.tell(&news(1, Some(60), rule, &[]), 201));
    good(OnLoss::Suspend);
    assert_eq!(deeds(&leases, 202), [Deed::Resume]);
    // A stricter rule takes the key of a disk that waits already, and a good verdict alone does not bring it back.
    lost(OnLoss::Wipe);
    assert_eq!(deeds(&leases, 203), [Deed::Wipe]);
    leases.is_now("disk-1", DiskState::Wiped);
    good(OnLoss::Wipe);
    assert_eq!(deeds(&leases, 204), []);
    assert_eq!(leases.wiped(&Uuid::new([1; 16])).as_deref(), Some("disk-1"));
    assert_eq!(leases.wiped(&Uuid::new([2; 16])), None);
    // The verifier lost the key itself, and with it the rule: the last one that it said holds.
    let mut gone = news(2, None, OnLoss::Nothing, &["gone"]);
    drop(leases.tell(&news(2, Some(60), OnLoss::Suspend, &[]), 204));
    gone.keys[0].on_loss = None;
    drop(leases.tell(&gone, 205));
    assert_eq!(deeds(&leases, 205), [Deed::Suspend]);
    drop(leases.tell(&news(2, Some(60), OnLoss::Nothing, &[]), 205));
    // Of a key that is not here, or for another disk, nothing follows.
    let mut other = news(2, None, OnLoss::Wipe, &["x"]);
    other.keys[0].disk_uuid = Uuid::new([9; 16]);
    drop(leases.tell(&other, 205));
    assert_eq!(deeds(&leases, 206), []);
}

#[test]
fn an_agent_that_starts_again_knows_what_is_open() {
    let dir = tempfile::tempdir().unwrap();
    let leases = Leases::open(dir.path());
    opened(&leases, 1, Some(60), OnLoss::Wipe);
    opened(&leases, 2, None, OnLoss::Nothing);
    leases.opening(disk(3), None, 100);
    opened(&leases, 4, None, OnLoss::Nothing);
    leases.closed("disk-4");
    let before = leases.list();
    drop(leases);
    let leases = Leases::open(dir.path());
    assert_eq!(leases.list(), before);
    leases.opening_is_over();
    leases.retain(|disk| disk.name != "disk-3");
    let names: Vec<_> = leases.list().into_iter().map(|disk| disk.name).collect();
    assert_eq!(names, ["disk-1", "disk-2"]);
    assert_eq!(deeds(&leases, 160), [Deed::Wipe], "its lease went on");
    let text = std::fs::read_to_string(dir.path().join(FILE)).unwrap();
    assert!(text.contains("key-1"), "{text}");
    std::fs::write(dir.path().join(FILE), "[{").unwrap();
    assert_eq!(Leases::open(dir.path()).list(), []);
}

/// What the next test runs under another clock.
#[test]
fn says_the_time() {
    let now = boot_seconds();
    println!("boot seconds: {now}");
    assert!(now < u64::MAX, "the system tells no time");
}

#[test]
fn a_lease_does_not_outlive_the_sleep_of_its_host() {
    // A host that slept has a boot time that its monotonic clock knows nothing of: time namespaces, time_namespaces(7).
    const SLEPT: u64 = 1_000_000;
    let now_with = |clock: &str| -> u64 {
        let mine: &[&str] = if nix::unistd::geteuid().is_root() {
            &[]
        } else {
            &["--user", "--map-root-user"]
        };
        let output = std::process::Command::new("unshare")
            .args(mine)
            .args(["--time", clock, &SLEPT.to_string()])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture", "leases::tests::says_the_time"])
            .output()
            .unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        let line = said.lines().find_map(|line| line.strip_prefix("boot seconds: "));
        let line = line.unwrap_or_else(|| panic!("{said}{}", String::from_utf8_lossy(&output.stderr)));
        line.parse().unwrap()
    };
    let before = boot_seconds();
    let (slept, awake) = (now_with("--boottime"), now_with("--monotonic"));
    assert!(slept >= before + SLEPT, "{slept}");
    assert!((before..before + SLEPT).contains(&awake), "{awake}");
    let dir = tempfile::tempdir().unwrap();
    let leases = Leases::open(dir.path());
    let lease = Lease {
        seconds: Some(SLEPT / 2),
        on_loss: OnLoss::Wipe,
    };
    leases.opening(disk(1), Some(&lease), before);
    leases.is_now("disk-1", DiskState::Open);
    assert_eq!(deeds(&leases, awake), []);
    assert_eq!(deeds(&leases, slept), [Deed::Wipe]);
}
