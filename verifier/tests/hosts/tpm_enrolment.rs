//! Who is not enrolled, and why.

use assay_agent::tpm::{AkKind, EkKind};
use assay_tests::Swtpm;

use crate::host::{BOOT, Machine, NEXT_BOOT};
use crate::site::Site;

fn hosts(site: &Site) -> String {
    site.run(&["host", "list", "--json"]).good().trim().to_owned()
}

#[test]
fn another_tpm_than_the_pinned_one_is_refused() {
    let site = Site::init(10.0);
    let machine = Machine::joined(&site.join_file());
    let wrong = "00".repeat(32);
    site.run(&["host", "add", "alpha", &machine.address(), "--ek-sha256", &wrong])
        .refused(&[&machine.ek_sha256(), &wrong]);
    assert_eq!(hosts(&site), "[]");
}

#[test]
fn nothing_enrols_twice() {
    let site = Site::init(10.0);
    let machine = Machine::joined(&site.join_file());
    let told = site.add("alpha", &machine).good();
    assert!(told.contains(&machine.ek_sha256()), "{told}");
    assert!(told.contains(&machine.identity().spki().to_string()), "{told}");
    site.add("alpha", &machine).refused(&["alpha", "host remove"]);
    site.add("beta", &machine)
        .refused(&["endorsement key", "alpha", "host remove"]);
    site.run(&["host", "remove", "alpha"]).good();
    site.add("beta", &machine).good();
    site.run(&["host", "remove", "alpha"]).refused(&["alpha"]);
}

#[test]
fn a_host_with_another_kind_of_attestation_key_is_refused_until_it_is_enrolled_anew() {
    let site = Site::serving(0.2);
    let mut machine = site.trusted_host("alpha");
    let shown = site.show("alpha");
    machine.ak = AkKind::Rsa2048;
    machine.reboot(NEXT_BOOT);
    let refused = site.wait_for("alpha", "untrusted");
    let reason = refused["reasons"][0].as_str().unwrap();
    for named in ["Rsassa(Sha256)", "ECDSA P-256", "[tpm] ak", "host remove", "host add"] {
        assert!(reason.contains(named), "{named} is not named in: {reason}");
    }
    assert_eq!(refused["ak_name"], shown["ak_name"], "the pin stays");

    site.run(&["host", "remove", "alpha"]).good();
    let machine = site.trusted("alpha", machine);
    assert_ne!(site.show("alpha")["ak_name"], shown["ak_name"]);
    drop(machine);
}

#[test]
fn a_host_with_another_endorsement_key_is_refused_until_it_is_enrolled_anew() {
    let site = Site::serving(0.2);
    let mut machine = site.trusted_host("alpha");
    let (shown, enrolled) = (site.show("alpha"), machine.ek_sha256());
    machine.ek = Some(EkKind::EccP256);
    machine.reboot(NEXT_BOOT);
    let refused = site.wait_for("alpha", "untrusted");
    let reason = refused["reasons"][0].as_str().unwrap();
    let (found, enrolled) = (
        format!("sha256:{} (ecc-p256)", machine.ek_sha256()),
        format!("sha256:{enrolled} (rsa-2048)"),
    );
    for named in [&found, &enrolled, "[tpm] ek", "host remove", "host add"] {
        assert!(reason.contains(named), "{named} is not named in: {reason}");
    }
    assert_eq!(refused["ek_sha256"], shown["ek_sha256"], "the pin stays");

    // Changed back, it is the host that it was.
    machine.ek = None;
    machine.stop();
    machine.boot(NEXT_BOOT);
    site.run(&["policy", "capture", "alpha", "--add"]).good();
    site.wait_for("alpha", "trusted");
    machine.ek = Some(EkKind::EccP256);
    machine.stop();
    machine.swtpm.power_cycle().unwrap();
    machine.boot(BOOT);
    site.wait_for("alpha", "untrusted");
    site.run(&["host", "remove", "alpha"]).good();
    let machine = site.trusted("alpha", machine);
    assert_eq!(site.show("alpha")["ek_sha256"], machine.ek_sha256());
}

#[test]
fn a_certified_tpm_is_enrolled_by_its_maker() {
    for start in [Swtpm::start_with_ek_certificate, Swtpm::start_with_ecc_ek_certificate] {
        is_enrolled_by_its_maker(start().unwrap(), &start().unwrap());
    }
}

fn is_enrolled_by_its_maker(swtpm: Swtpm, other: &Swtpm) {
    let site = Site::init(10.0);
    let authority = |swtpm: &Swtpm| -> Vec<String> {
        let paths = swtpm.ca_certificates();
        paths.iter().map(|p| p.to_str().unwrap().to_owned()).collect()
    };
    let (ours, foreign) = (authority(&swtpm), authority(other));
    let machine = Machine::with_tpm(swtpm, &site.join_file());
    let address = machine.address();
    let add = |authority: &[String]| {
        let mut args = vec!["host", "add", "alpha", address.as_str(), "--ek-ca"];
        args.extend(authority.iter().map(String::as_str));
        site.run(&args)
    };
    add(&foreign).refused(&["not trusted"]);
    assert_eq!(hosts(&site), "[]");
    add(&ours).good();
}

#[test]
fn a_tpm_without_certificate_is_told_to_be_pinned() {
    let site = Site::init(10.0);
    let machine = Machine::joined(&site.join_file());
    let other = Swtpm::start_with_ek_certificate().unwrap();
    let ca = other.ca_certificates()[0].to_str().unwrap().to_owned();
    site.run(&["host", "add", "alpha", &machine.address(), "--ek-ca", &ca])
        .refused(&["no endorsement key certificate", "--ek-sha256"]);
}

#[test]
fn an_agent_of_another_verifier_is_not_enrolled() {
    let (site, other) = (Site::init(10.0), Site::init(10.0));
    let machine = Machine::joined(&other.join_file());
    site.add("alpha", &machine)
        .refused(&[&machine.address(), "joined another verifier"]);
    assert_eq!(hosts(&site), "[]");
}

#[test]
fn a_log_in_another_pcr_than_the_pinned_one_is_not_believed() {
    let site = Site::serving(0.2);
    let machine = Machine::joined(&site.join_file());
    let (address, ek) = (machine.address(), machine.ek_sha256());
    site.run(&["host", "add", "alpha", &address, "--ek-sha256", &ek, "--pcr", "12"])
        .good();
    let shown = site.wait_for("alpha", "untrusted");
    let reasons = shown["reasons"].to_string();
    assert!(
        reasons.contains("PCR 13") && reasons.contains("pinned to PCR 12"),
        "{reasons}"
    );
    assert_eq!(shown["pcr"], 12);
    let text = site.run(&["host", "show", "alpha"]).good();
    assert!(text.contains("runtime PCR 12"), "{text}");
    site.run(&["policy", "capture", "alpha"]).refused(&["pinned to PCR 12"]);
}

#[test]
fn mistakes_on_the_command_line_are_named() {
    let site = Site::init(10.0);
    let zeros = "00".repeat(32);
    site.run(&["host", "add", "alpha", "127.0.0.1:1", "--ek-sha256", &zeros])
        .refused(&["127.0.0.1:1", "refused"]);
    site.run(&["host", "add", "no/name", "127.0.0.1:1", "--ek-sha256", &zeros])
        .refused(&["no/name", "letters"]);
    assert_eq!(site.run(&["host", "add", "alpha", "127.0.0.1:1"]).code, Some(2));
    assert_eq!(
        site.run(&["host", "add", "alpha", "127.0.0.1:1", "--ek-sha256", "00"])
            .code,
        Some(2)
    );
    for pcr in ["11", "16", "thirteen"] {
        let args = [
            "host",
            "add",
            "alpha",
            "127.0.0.1:1",
            "--ek-sha256",
            &zeros,
            "--pcr",
            pcr,
        ];
        let ran = site.run(&args);
        assert!(
            ran.code == Some(2) && ran.err.contains("12, 13 (the default) or 14"),
            "{}",
            ran.err
        );
    }
    site.run(&["host", "show", "alpha"]).refused(&["alpha", "host list"]);
    site.run(&["policy", "capture", "alpha"]).refused(&["alpha"]);
}
