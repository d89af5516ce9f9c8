//! What may never go back: the TPM's counters and clock, and the log. Each refusal has its name, at a poll and at a key request.

use std::time::Duration;

use crate::host::{Machine, NEXT_BOOT};
use crate::http::run;
use crate::site::{Site, reasons};
use crate::tpm_release::{challenge, connect, prove, refused};

const THIRD_BOOT: &str = "c0e9a1b2-5d34-4e8f-9a61-7b2c3d4e5f60";
const FOURTH_BOOT: &str = "1b6f7c8d-2e3a-4c5b-8d9e-0f1a2b3c4d5e";

/// What the verifier would hold of a host that was further on, and how it calls it that this one is not.
const FURTHER: [(&str, &str); 6] = [
    ("reset_count = reset_count + 1", "stale: the TPM's reset count is"),
    ("restart_count = restart_count + 1", "stale: the TPM's restart count is"),
    ("clock = clock + 3600000", "stale: the TPM's clock is"),
    // The same boot, in which the TPM was reset since.
    ("reset_count = reset_count - 1", "the TPM was reset during boot"),
    // Another boot, in which the TPM was not reset since.
    (
        "boot_id = 'c0e9a1b2-5d34-4e8f-9a61-7b2c3d4e5f60'",
        "its TPM was not reset since boot c0e9a1b2",
    ),
    ("records = records + 1000", "the log shrank"),
];

/// What the verifier holds, behind the service's back.
fn database(site: &Site) -> rusqlite::Connection {
    let database = rusqlite::Connection::open(site.state().path().join("state.db")).unwrap();
    database.busy_timeout(Duration::from_secs(20)).unwrap();
    database
}

/// Changes what it holds of its only host.
pub fn change(site: &Site, what: &str) {
    assert_eq!(
        database(site).execute(&format!("UPDATE {what}"), []).unwrap(),
        1,
        "{what}"
    );
}

#[test]
fn whatever_goes_back_is_refused_by_its_name() {
    let site = Site::serving(0.2);
    let machine = site.trusted_host("alpha");
    let (key, _) = site.new_key("default");
    for (further, named) in FURTHER {
        // Taken before, so that the host can be trusted again.
        let columns = "SELECT boot_id, reset_count, restart_count, clock, records FROM logs";
        let (boot_id, counters) = database(&site)
            .query_row(columns, [], |row| {
                let number = |at| row.get::<_, i64>(at);
                Ok((
                    row.get::<_, String>(0)?,
                    [number(1)?, number(2)?, number(3)?, number(4)?],
                ))
            })
            .unwrap();
        change(&site, &format!("logs SET {further}"));
        let shown = site.wait_for("alpha", "untrusted");
        assert!(reasons(&shown)[0].contains(named), "{named}: {shown:#}");
        run(async {
            let mut client = connect(&site, &machine).await;
            let asked = challenge(&mut client, &key).await;
            let (_release, proof) = prove(&machine, &key, asked.nonce, client.exporter, 0).await;
            refused(&client.post("/v1/release", &proof).await, 403, "evidence", named);
        });
        let [reset, restart, clock, records] = counters;
        let before = format!(
            "logs SET boot_id = '{boot_id}', reset_count = {reset}, restart_count = {restart}, clock = {clock}, records = {records}"
        );
        change(&site, &before);
        site.wait_for("alpha", "trusted");
    }
}

#[test]
fn a_tpm_that_was_put_back_is_refused() {
    let site = Site::serving(0.2);
    let mut machine = site.trusted_host("alpha");
    let earlier = machine.swtpm.copy().unwrap();
    for boot in [NEXT_BOOT, THIRD_BOOT] {
        machine.reboot(boot);
        site.wait_until("alpha", |shown| shown["boot_id"] == boot);
    }
    let counted = site.show("alpha")["reset_count"].as_u64();
    machine.stop();
    machine.swtpm = earlier;
    machine.boot(FOURTH_BOOT);
    let shown = site.wait_for("alpha", "untrusted");
    assert!(
        reasons(&shown)[0].contains("stale: the TPM's reset count is"),
        "{shown:#}"
    );
    assert_eq!(shown["reset_count"].as_u64(), counted, "what was seen stays known");
}

#[test]
fn a_second_host_with_the_same_identity_is_refused() {
    let site = Site::serving(0.2);
    let machine = site.trusted_host("alpha");
    // All that makes the host what it is, seeds of the TPM included, runs once more elsewhere.
    let clone = machine.cloned(NEXT_BOOT);
    site.run(&[
        "host",
        "add",
        "beta",
        &clone.address(),
        "--ek-sha256",
        &clone.ek_sha256(),
    ])
    .refused(&["endorsement key", "alpha"]);
    let at = |machine: &Machine| change(&site, &format!("hosts SET address = '{}'", machine.address()));

    // In the host's place it looks like the host after a reboot. From then on the host itself is the one from before.
    at(&clone);
    site.wait_until("alpha", |shown| shown["boot_id"] == NEXT_BOOT);
    at(&machine);
    let shown = site.wait_until("alpha", |shown| {
        reasons(shown)
            .first()
            .is_some_and(|reason| reason.contains("stale: the TPM's reset count is"))
    });
    assert_eq!(shown["state"], "untrusted", "{shown:#}");
}
