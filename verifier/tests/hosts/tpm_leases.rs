//! Leases: a good verdict renews them, a bad one withdraws the key, and the host is told with the poll that finds it.

use std::time::{Duration, Instant};

use assay_agent::leases::{Deed, DiskState, OpenDisk, boot_seconds};
use assay_evidence::terms::OnLoss;
use assay_evidence::wire::Lease;
use assay_verifier::keystore::KeyInfo;
use assay_verifier::store::{Store, Taking};

use crate::host::Machine;
use crate::site::Site;
use crate::tpm_terms::{ask, terms};

/// As after an unlock, with this lease and rule.
pub fn opened(machine: &Machine, name: &str, key: &KeyInfo, seconds: u64, on_loss: OnLoss) {
    let disk = OpenDisk {
        name: name.to_owned(),
        image: "/root/disk.luks".into(),
        disk: key.disk_uuid,
        key_id: key.key_id.to_string(),
        state: DiskState::Opening,
        until: None,
        on_loss: OnLoss::Nothing,
        lost: Vec::new(),
        told: false,
    };
    let lease = Lease {
        seconds: Some(seconds),
        on_loss,
    };
    machine.leases().opening(disk, Some(&lease), boot_seconds());
    machine.leases().is_now(name, DiskState::Open);
}

/// Waits until the host knows this of an open disk.
#[track_caller]
pub fn wait_for(site: &Site, machine: &Machine, name: &str, is: impl Fn(&OpenDisk) -> bool) -> OpenDisk {
    let start = Instant::now();
    loop {
        let found = machine
            .leases()
            .list()
            .into_iter()
            .find(|disk| disk.name == name)
            .unwrap();
        if is(&found) {
            return found;
        }
        assert!(start.elapsed() < Duration::from_secs(60), "{found:?}\n{}", site.log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_good_verdict_renews_and_a_bad_one_withdraws() {
    let site = Site::serving(0.2);
    let machine = site.trusted_host("alpha");
    // Two keys: by the host's own policy, and by another one with the same content.
    let file = site.state().path().join("policy.json");
    let file = file.to_str().unwrap();
    site.run(&["policy", "export", "default", "--out", file]).good();
    site.run(&["policy", "import", file, "--name", "other"]).good();
    let [own, other] = ["default", "other"].map(|policy| site.new_key(policy).0);
    terms(&site, &own, &["--lease", "600", "--on-loss", "wipe"]);
    for key in [&own, &other] {
        if key.policy == "other" {
            terms(&site, key, &["--on-loss", "suspend"]);
        }
        assert_eq!(ask(&site, &machine, key).0, 200);
        opened(&machine, &key.policy, key, 30, OnLoss::Nothing);
    }
    let renewed = wait_for(&site, &machine, "default", |disk| {
        disk.until.is_some_and(|until| until > boot_seconds() + 500)
    });
    assert_eq!(renewed.on_loss, OnLoss::Wipe, "the verifier's present terms count");
    wait_for(&site, &machine, "other", |disk| {
        disk.until.is_none() && disk.on_loss == OnLoss::Suspend
    });

    // Approved by the other policy alone: the one key is lost, the other is not.
    let program = machine.run_program("/root/rogue");
    let allow = |policy| {
        drop(
            site.run(&["policy", "allow", &program.to_string(), "--name", policy])
                .good(),
        )
    };
    let lost = wait_for(&site, &machine, "default", |disk| !disk.lost.is_empty());
    assert!(lost.why().contains("/root/rogue"), "{lost:?}");
    assert_eq!(lost.due(boot_seconds()), Some(Deed::Wipe));
    let lost = wait_for(&site, &machine, "other", |disk| !disk.lost.is_empty());
    assert_eq!(lost.due(boot_seconds()), Some(Deed::Suspend));
    allow("other");
    wait_for(&site, &machine, "other", |disk| disk.lost.is_empty());
    assert_eq!(site.show("alpha")["state"], "untrusted");
    allow("default");
    wait_for(&site, &machine, "default", |disk| disk.lost.is_empty());

    // The terms count at a renewal, too.
    terms(&site, &own, &["--not-after", "2020-01-31"]);
    let lost = wait_for(&site, &machine, "default", |disk| !disk.lost.is_empty());
    assert!(lost.why().contains("2020-01-31"), "{lost:?}");
    let log = site.run(&["audit", "show", "--key", &own.key_id.to_string()]).good();
    assert_eq!(log.matches("withdrawn host alpha").count(), 2, "{log}");
    assert!(log.contains("wipe: ") && log.contains("/root/rogue"), "{log}");
    site.run(&["audit", "verify"]).good();
}

#[test]
fn a_host_that_closed_a_disk_gives_its_key_back() {
    let site = Site::serving(0.2);
    let _machine = site.trusted_host("alpha");
    let (key, _) = site.new_key("default");
    terms(&site, &key, &["--lease", "3600", "--hosts-at-once", "1"]);
    let store = Store::open(&site.state().database()).unwrap();
    let host = store.host("alpha").unwrap();
    let taking = |ago| Taking {
        key_id: key.key_id,
        disk: key.disk_uuid,
        now: assay_verifier::time::now() - ago,
        lease_s: Some(3600),
        hosts_at_once: Some(1),
    };
    // Just released: the disk may be about to open.
    store.take_key(host.id, &taking(0)).unwrap().unwrap();
    let before = site.show("alpha")["last_quote"].clone();
    site.wait_until("alpha", |shown| shown["last_quote"] != before);
    assert_eq!(store.holdings(host.id).unwrap().len(), 1);
    store.take_key(host.id, &taking(120)).unwrap().unwrap();
    let start = Instant::now();
    while !store.holdings(host.id).unwrap().is_empty() {
        assert!(start.elapsed() < Duration::from_secs(60), "{}", site.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    let log = site.run(&["audit", "show", "--key", &key.key_id.to_string()]).good();
    assert!(log.contains("returned  host alpha"), "{log}");
}

#[test]
fn tags_count_at_a_renewal_and_a_key_that_is_gone_is_withdrawn() {
    let site = Site::serving(0.2);
    let machine = site.trusted_host("alpha");
    site.run(&["host", "tag", "alpha", "--add", "pci"]).good();
    let tagged = site.new_key_for("default", &["pci"]).0;
    let gone = site.new_key("default").0;
    for (name, key, rule) in [("tagged", &tagged, "suspend"), ("gone", &gone, "wipe")] {
        terms(&site, key, &["--lease", "600", "--on-loss", rule]);
        assert_eq!(ask(&site, &machine, key).0, 200);
        opened(&machine, name, key, 30, OnLoss::Nothing);
        wait_for(&site, &machine, name, |disk| {
            disk.until.is_some_and(|until| until > boot_seconds() + 500) && disk.on_loss != OnLoss::Nothing
        });
    }
    site.run(&["host", "tag", "alpha", "--remove", "pci"]).good();
    let lost = wait_for(&site, &machine, "tagged", |disk| !disk.lost.is_empty());
    assert!(lost.why().contains("tagged pci"), "{lost:?}");
    site.run(&["host", "tag", "alpha", "--add", "pci"]).good();
    wait_for(&site, &machine, "tagged", |disk| disk.lost.is_empty());

    let id = gone.key_id.to_string();
    site.run(&["key", "remove", &id, "--forever"]).good();
    let lost = wait_for(&site, &machine, "gone", |disk| !disk.lost.is_empty());
    assert!(
        lost.why().contains(&id) && lost.why().contains("no longer in the key store"),
        "{lost:?}"
    );
    assert_eq!(lost.due(boot_seconds()), Some(Deed::Wipe), "the rule that it had");
    assert_eq!(site.show("alpha")["state"], "trusted");
    let log = site.run(&["audit", "show", "--key", &id]).good();
    assert_eq!(log.matches("withdrawn host alpha").count(), 1, "{log}");
}
