use serde_json::{Value, json};

use super::*;
use crate::testing::{BINDING, Host};

fn sample() -> Value {
    let bundle = Host::measuring().bundle(&BINDING, 0);
    serde_json::from_slice(&bundle.to_json().unwrap()).unwrap()
}

fn refused(change: impl FnOnce(&mut Value)) -> BundleError {
    let mut value = sample();
    change(&mut value);
    Bundle::from_json(value.to_string().as_bytes()).expect_err("should be refused")
}

fn json_error(change: impl FnOnce(&mut Value)) -> String {
    match refused(change) {
        BundleError::Json(error) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn json_goes_both_ways() {
    let mut bundle = Host::measuring().bundle(&BINDING, 0);
    assert_eq!(Bundle::from_json(&bundle.to_json().unwrap()).unwrap(), bundle);
    bundle.boot_log = Some(B64(vec![1, 2, 3]));
    bundle.ima_log = Some(B64(vec![]));
    assert_eq!(Bundle::from_json(&bundle.to_json().unwrap()).unwrap(), bundle);
}

#[test]
fn form_on_the_wire() {
    let value = sample();
    assert_eq!(value["version"], 1);
    assert_eq!(value["pcrs"]["sha256"]["0"], "01".repeat(32));
    assert_eq!(value["log"]["from"], 0);
    assert_eq!(value["log"]["records"], 3);
    assert!(
        value["quote"]["attest"].as_str().unwrap().starts_with("/1RDR4AY"),
        "TPM_GENERATED, quote"
    );
    assert!(value.get("boot_log").is_none());
}

#[test]
fn each_malformed_part_is_named() {
    assert!(json_error(|v| v["extra"] = json!(1)).contains("unknown field `extra`"));
    assert!(json_error(|v| v["log"]["extra"] = json!(1)).contains("unknown field `extra`"));
    assert!(json_error(|v| drop(v["quote"].as_object_mut().unwrap().remove("attest"))).contains("`attest`"));
    assert!(json_error(|v| v["log"]["from"] = json!(-1)).contains("u64"));
    assert!(json_error(|v| v["log"]["from"] = json!("0")).contains("u64"));
    assert!(json_error(|v| v["log"]["data"] = json!("!!!")).contains("base64"));
    assert!(json_error(|v| v["log"]["data"] = json!("AAA")).contains("base64"));
    assert!(json_error(|v| v["pcrs"]["sha256"]["0"] = json!("AA")).contains("lower-case hex"));
    assert!(json_error(|v| v["pcrs"]["md5"] = json!({})).contains("md5"));
    assert!(matches!(refused(|v| v["version"] = json!(2)), BundleError::Version(2)));
    assert!(matches!(refused(|v| v["boot_id"] = json!("x")), BundleError::BootId));
    assert!(matches!(
        refused(|v| v["pcrs"]["sha256"]["24"] = json!("00".repeat(32))),
        BundleError::PcrIndex { index: 24 }
    ));
    let short = refused(|v| v["pcrs"]["sha256"]["0"] = json!("00"));
    assert!(matches!(
        short,
        BundleError::PcrValue {
            bank: Algorithm::Sha256,
            index: 0,
            found: 1,
            wanted: 32
        }
    ));
}

#[test]
fn sizes_are_limited() {
    let mut bundle = Host::measuring().bundle(&BINDING, 0);
    bundle.quote.attest = B64(vec![0; MAX_TPM_PART + 1]);
    assert!(matches!(
        bundle.check(),
        Err(BundleError::Part {
            part: "quote.attest",
            found: 4097,
            limit: 4096
        })
    ));
    let mut bundle = Host::measuring().bundle(&BINDING, 0);
    bundle.log.data = B64(vec![0; MAX_LOG + 1]);
    assert!(matches!(
        bundle.check(),
        Err(BundleError::Part { part: "log.data", .. })
    ));
    let mut bundle = Host::measuring().bundle(&BINDING, 0);
    bundle.boot_log = Some(B64(vec![0; MAX_BOOT_LOG + 1]));
    assert!(matches!(
        bundle.check(),
        Err(BundleError::Part { part: "boot_log", .. })
    ));
    let mut bundle = Host::measuring().bundle(&BINDING, 0);
    bundle.ima_log = Some(B64(vec![0; MAX_IMA_LOG + 1]));
    assert!(matches!(bundle.check(), Err(BundleError::Part { part: "ima_log", .. })));
    let huge = vec![b' '; MAX_BUNDLE + 1];
    assert!(matches!(Bundle::from_json(&huge), Err(BundleError::TooLarge { .. })));
}

#[test]
fn the_largest_log_fits_a_bundle() {
    let mut bundle = Host::measuring().bundle(&BINDING, 0);
    bundle.log.data = B64(vec![0; MAX_LOG]);
    bundle.boot_log = Some(B64(vec![0; MAX_BOOT_LOG]));
    let json = bundle.to_json().unwrap();
    assert!(json.len() <= MAX_BUNDLE, "{}", json.len());
}

#[test]
fn every_prefix_is_refused() {
    let json = sample().to_string();
    for end in 0..json.len() {
        assert!(Bundle::from_json(&json.as_bytes()[..end]).is_err(), "{end} bytes");
    }
}
