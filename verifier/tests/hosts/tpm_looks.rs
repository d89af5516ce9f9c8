//! Looks that a host asks for: what runs on it while a disk is open is judged at once, however seldom hosts are polled.

use std::time::Instant;

use assay_agent::leases::{Deed, boot_seconds};
use assay_evidence::terms::OnLoss;
use serde_json::json;

use crate::http::run;
use crate::tpm_leases::{opened, wait_for};
use crate::tpm_release::{connect, ready};
use crate::tpm_terms::{ask, terms};
use crate::tpm_verdict::operator;

#[test]
fn what_runs_while_a_disk_is_open_is_judged_at_once_and_not_with_the_next_poll() {
    // The poller is due in an hour.
    let (site, machine) = ready();
    let key = site.new_key("default").0;
    terms(&site, &key, &["--on-loss", "wipe"]);
    assert_eq!(ask(&site, &machine, &key).0, 200);
    machine.nudges();
    opened(&machine, "disk", &key, 600, OnLoss::Wipe);
    let start = Instant::now();
    machine.run_program("/root/rogue");
    let lost = wait_for(&site, &machine, "disk", |disk| !disk.lost.is_empty());
    println!(
        "from the program to the verifier's word: {} ms",
        start.elapsed().as_millis()
    );
    assert!(lost.why().contains("/root/rogue"), "{lost:?}");
    assert_eq!(lost.due(boot_seconds()), Some(Deed::Wipe));
}

#[test]
fn a_host_may_ask_for_looks_as_often_as_it_likes_and_gets_two_a_second() {
    let (site, machine) = ready();
    run(async {
        let mut client = connect(&site, &machine).await;
        let mut waits = Vec::new();
        for _ in 0..50 {
            let (status, body) = client.post("/v1/look", &json!({})).await;
            assert_eq!(status, 200, "{body}");
            waits.push(body["within_ms"].as_u64().unwrap());
        }
        assert_eq!(waits[0], 0);
        assert!(waits.iter().all(|wait| *wait <= 500), "{waits:?}");
        assert!(waits.iter().any(|wait| *wait > 0), "{waits:?}");
        let (status, body) = client.post("/v1/look", &json!({"host": "beta"})).await;
        assert_eq!((status, &body["error"]["code"]), (400, &json!("bad-request")), "{body}");
    });
    // Who is no host asks for nothing.
    run(async {
        let mut client = operator(&site).await;
        let (status, body) = client.post("/v1/look", &json!({})).await;
        assert_eq!((status, &body["error"]["code"]), (403, &json!("hosts-only")), "{body}");
    });
}
