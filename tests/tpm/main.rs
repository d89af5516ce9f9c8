//! The harness's own promises about its TPMs, checked with tpm2-tools as an independent client.

use std::process::{Command, Output};
use std::time::{Duration, Instant};

use assay_tests::child::Child;
use assay_tests::proxy::{CC_PCR_EXTEND, TpmProxy};
use assay_tests::{HarnessError, Swtpm};

fn tpm2(tcti: &str, arguments: &[&str]) -> Output {
    Command::new("tpm2")
        .args(arguments)
        .env("TPM2TOOLS_TCTI", tcti)
        .output()
        .expect("run tpm2 (tpm2-tools)")
}

fn pcr_13(tcti: &str) -> String {
    let output = tpm2(tcti, &["pcrread", "sha256:13"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout)
        .split("0x")
        .nth(1)
        .expect("a value")
        .trim()
        .to_owned()
}

#[test]
fn tpm_each_one_is_its_own_and_starts_at_zero() -> Result<(), HarnessError> {
    let (first, second) = (Swtpm::start()?, Swtpm::start()?);
    let zero = "0".repeat(64);
    assert_eq!(pcr_13(&first.tcti()), zero);
    let extend = format!("13:sha256={}", "11".repeat(32));
    assert!(tpm2(&first.tcti(), &["pcrextend", &extend]).status.success());
    assert_ne!(pcr_13(&first.tcti()), zero);
    assert_eq!(pcr_13(&second.tcti()), zero);
    Ok(())
}

#[test]
fn tpm_power_cycle_clears_the_pcrs() -> Result<(), HarnessError> {
    let mut tpm = Swtpm::start()?;
    let extend = format!("13:sha256={}", "22".repeat(32));
    assert!(tpm2(&tpm.tcti(), &["pcrextend", &extend]).status.success());
    tpm.power_cycle()?;
    assert_eq!(pcr_13(&tpm.tcti()), "0".repeat(64));
    Ok(())
}

#[test]
fn tpm_ek_certificate_is_there_and_so_is_its_authority() -> Result<(), HarnessError> {
    let tpm = Swtpm::start_with_ek_certificate()?;
    let output = tpm2(&tpm.tcti(), &["nvreadpublic", "0x01c00002"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(tpm.ca_certificates().len(), 2);
    assert!(Swtpm::start()?.ca_certificates().is_empty());
    Ok(())
}

#[test]
fn tpm_of_an_ecc_maker_has_that_certificate_alone() -> Result<(), HarnessError> {
    let tpm = Swtpm::start_with_ecc_ek_certificate()?;
    let has = |index: &str| tpm2(&tpm.tcti(), &["nvreadpublic", index]).status.success();
    assert!(has("0x01c0000a") && !has("0x01c00002"));
    assert_eq!(tpm.ca_certificates().len(), 2);
    Ok(())
}

#[test]
fn tpm_ports_count_as_ones_own_only() -> Result<(), HarnessError> {
    let tpm = Swtpm::start()?;
    let own = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = own.local_addr().expect("an address").port();
    let child = Child::spawn("sleep", |command| {
        command.arg("60");
    })?;
    // Somebody listens on each of them, this child on none.
    assert!(![port, tpm.port()].iter().any(|port| child.listens_on(&[*port])));
    Ok(())
}

#[test]
fn tpm_proxy_retries_delays_and_hangs_as_told() -> Result<(), HarnessError> {
    let tpm = Swtpm::start()?;
    let proxy = TpmProxy::start(&tpm)?;
    assert_eq!(pcr_13(&proxy.tcti()), "0".repeat(64));

    proxy.only(Some(CC_PCR_EXTEND));
    proxy.fail_next(1, 0x101);
    let extend = format!("13:sha256={}", "33".repeat(32));
    assert!(!tpm2(&proxy.tcti(), &["pcrextend", &extend]).status.success());
    assert_eq!(
        pcr_13(&tpm.tcti()),
        "0".repeat(64),
        "a refused command must not reach the TPM"
    );
    assert_eq!(proxy.count(CC_PCR_EXTEND), 1);

    proxy.delay(Duration::from_millis(300));
    let start = Instant::now();
    assert!(tpm2(&proxy.tcti(), &["pcrextend", &extend]).status.success());
    assert!(start.elapsed() >= Duration::from_millis(300));

    proxy.delay(Duration::ZERO);
    proxy.hang();
    let tcti = proxy.tcti();
    let waiting = std::thread::spawn(move || tpm2(&tcti, &["pcrextend", &extend]).status.success());
    std::thread::sleep(Duration::from_millis(200));
    assert!(!waiting.is_finished());
    proxy.resume();
    assert!(waiting.join().expect("no panic"));
    Ok(())
}
