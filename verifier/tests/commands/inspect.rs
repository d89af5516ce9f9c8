//! `inspect`, run as a program on good evidence and on damaged evidence.

use std::fs;
use std::path::{Path, PathBuf};

use assay_evidence::bundle::{Bundle, LogPart, QuotePart};
use assay_evidence::cel::{Head, Record};
use assay_evidence::digest::{Algorithm, Sha256Digest};
use assay_evidence::event::{AgentStart, Event, LoadKind, Measurement, Mode, Violation, flags};
use assay_evidence::wire::{B64, Hex};
use serde_json::Value;
use tempfile::TempDir;

use super::program::{Ran, verifier};

const BOOT_ID: &str = "6b1f0e2a-93c4-4d5e-8f70-0123456789ab";

fn events() -> [Vec<Event>; 3] {
    let start = AgentStart {
        agent_version: "0.1.0".into(),
        agent_digest: Sha256Digest::of(b"agent"),
        bpf_digest: Sha256Digest::of(b"bpf"),
        boot_id: BOOT_ID.into(),
        kernel_release: "6.12.0".into(),
        cmdline: "quiet lsm=bpf".into(),
        lsm: "capability,bpf,ima".into(),
        lockdown: "none".into(),
        tier: 1,
        mode: Mode::Observe,
        pcr_start: vec![(Algorithm::Sha256, vec![0; 32])],
        predecessor: None,
        blind: "modules\x1b".into(),
        protected: true,
    };
    let load = Measurement {
        kind: LoadKind::Program,
        flags: flags::MEMFD | flags::UNLINKED,
        digest: Some(Sha256Digest::of(b"rogue")),
        size: 5,
        path: "/root/rogue\x1b[2J".into(),
        comm: "sh".into(),
        seq: Some(7),
        time_ns: 1,
        pid: 42,
        uid: 0,
        dev: 1,
        ino: 2,
        generation: 3,
        change: 4,
        fs_magic: 5,
        cgroup: 6,
    };
    let lost = Event::Violation(Violation::Lost { count: 3 });
    [
        vec![Event::from(start), Event::Ready],
        vec![Event::Load(load), lost],
        vec![Event::AgentStop],
    ]
}

fn records() -> Vec<Record> {
    let build = |(number, events): (u64, &Vec<Event>)| Record::build(number, 13, events, &[Algorithm::Sha256]).unwrap();
    (0..).zip(&events()).map(build).collect()
}

fn log() -> Vec<u8> {
    records().iter().flat_map(Record::encode).collect()
}

struct Saved {
    _dir: TempDir,
    path: PathBuf,
}

fn saved(bytes: &[u8]) -> Saved {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("evidence");
    fs::write(&path, bytes).unwrap();
    Saved { _dir: dir, path }
}

fn inspect(kind: &str, path: &Path, json: bool) -> Ran {
    let mut args = vec!["inspect", kind, path.to_str().unwrap()];
    if json {
        args.push("--json");
    }
    verifier(args)
}

#[test]
fn a_log_as_text() {
    let file = saved(&log());
    let out = inspect("cel", &file.path, false).good();
    let digest = Sha256Digest::of(b"rogue");
    assert!(
        out.contains(&format!(
            "load program sha256:{digest} /root/rogue\\u{{1b}}[2J (5 bytes) [deleted, memfd] #7 by sh pid 42"
        )),
        "{out}"
    );
    assert!(out.contains("agent-start agent 0.1.0"), "{out}");
    assert!(
        out.contains(" protected cannot see \"modules\\u{1b}\" cmdline"),
        "{out}"
    );
    assert!(out.contains("violation lost: 3 measurements were lost"), "{out}");
    assert!(!out.contains('\x1b'), "an escape sequence came through");
    let mut head = Head::new();
    records().iter().for_each(|record| head.push(record).unwrap());
    assert!(
        out.ends_with(&format!(
            "3 records, {} bytes, head sha256:{}\n",
            log().len(),
            head.value()
        )),
        "{out}"
    );
}

#[test]
fn a_log_as_json() {
    let file = saved(&log());
    let json: Value = serde_json::from_str(&inspect("cel", &file.path, true).good()).unwrap();
    assert_eq!(json["count"], 3);
    assert_eq!(json["records"].as_array().unwrap().len(), 3);
    assert_eq!(json["records"][1]["recnum"], 1);
    assert_eq!(json["records"][1]["content_type"], "assay");
    assert_eq!(json["head"].as_str().unwrap().len(), 64);
    let empty = saved(b"");
    let json: Value = serde_json::from_str(&inspect("cel", &empty.path, true).good()).unwrap();
    assert_eq!(json["count"], 0);
}

#[test]
fn a_damaged_log_is_shown_up_to_the_damage() {
    let good = log();
    let first = records()[0].encode().len();
    let second = records()[1].encode().len();

    let cut = saved(&good[..good.len() - 1]);
    let ran = inspect("cel", &cut.path, false);
    assert!(
        ran.out.contains("record 1 ") && !ran.out.contains("record 2 "),
        "{}",
        ran.out
    );
    ran.refused(&[
        "evidence",
        "record 2",
        &format!("byte {}", first + second),
        "ends inside a record",
    ]);

    let mut flipped = good.clone();
    flipped[first + second - 1] ^= 1;
    let ran = inspect("cel", &saved(&flipped).path, false);
    ran.refused(&["record 1", &format!("byte {first}"), "log was changed"]);

    let gap = saved(&[&good[..first], &good[first + second..]].concat());
    inspect("cel", &gap.path, false).refused(&["record 1", "record 2 comes where record 1 was due"]);

    // JSON is all or nothing: half a document is a trap for its reader.
    let ran = inspect("cel", &cut.path, true);
    assert_eq!(ran.out, "");
    ran.refused(&["record 2"]);
}

/// An IMA log with one entry, a violation: no digest covers it, and the PCR is extended with ones.
#[test]
fn an_ima_log() {
    let counted = |data: &[u8]| [&u32::try_from(data.len()).unwrap().to_le_bytes(), data].concat();
    let fields = [counted(b"sha256:\0digest"), counted(b"/usr/bin/a b\0")].concat();
    let list = |digest: usize| {
        let parts = [
            10_u32.to_le_bytes().to_vec(),
            vec![0; digest],
            counted(b"ima-ng"),
            counted(&fields),
        ];
        saved(&parts.concat())
    };
    let log = list(20);
    let text = inspect("ima-log", &log.path, false).good();
    assert!(
        text.contains("1 entries") && text.contains("violation /usr/bin/a b"),
        "{text}"
    );
    let json: Value = serde_json::from_str(&inspect("ima-log", &log.path, true).good()).unwrap();
    let ones = Algorithm::Sha256.extend(&[0; 32], &[0xff; 32]);
    assert_eq!(json["pcrs"]["sha256"]["10"], hex::encode(ones));
    assert_eq!(json["events"][0]["violation"], true);
    // The list of another bank has longer digests.
    let other = list(32);
    inspect("ima-log", &other.path, false).refused(&["entry 0"]);
    let args = ["inspect", "ima-log", "--bank", "sha256", other.path.to_str().unwrap()];
    assert_eq!(verifier(args).code, Some(0));
}

#[test]
fn what_is_no_evidence_is_refused_by_name() {
    let text = saved(b"this is not evidence at all, whoever reads it");
    inspect("cel", &text.path, false).refused(&["evidence", "record 0", "no canonical event log"]);
    inspect("boot-log", &text.path, false).refused(&["evidence", "byte 0"]);
    inspect("bundle", &text.path, false).refused(&["evidence", "not JSON", "line 1"]);
    inspect("boot-log", &saved(b"").path, false).refused(&["empty"]);
    inspect("ima-log", &text.path, false).refused(&["evidence", "entry 0", "byte 0"]);
    inspect("ima-log", &saved(b"").path, false).refused(&["empty"]);
    inspect("cel", Path::new("/nowhere/log.cel"), false).refused(&["/nowhere/log.cel", "No such file"]);
    inspect("boot-log", Path::new("/dev/zero"), false).refused(&["/dev/zero", "longer than"]);
    assert_eq!(verifier(["inspect", "sock-drawer", "x"]).code, Some(2));
}

/// `TPMS_ATTEST` of a quote over two PCRs, made by hand: shown, never verified.
fn attest() -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend([0xff, b'T', b'C', b'G', 0x80, 0x18]);
    bytes.extend([0, 2, 0xaa, 0xbb]); // qualified signer
    bytes.extend([0, 2, 0xcc, 0xdd]); // extra data
    bytes.extend(1234_u64.to_be_bytes());
    bytes.extend(5_u32.to_be_bytes());
    bytes.extend(6_u32.to_be_bytes());
    bytes.push(1);
    bytes.extend(7_u64.to_be_bytes());
    bytes.extend([0, 0, 0, 1, 0x00, 0x0b, 3, 0x01, 0x20, 0x00]); // sha256: PCR 0 and 13
    bytes.extend([0, 32]);
    bytes.extend([9; 32]);
    bytes
}

fn bundle() -> Bundle {
    let mut signature = vec![0x00, 0x18, 0x00, 0x0b];
    for part in [1, 2] {
        signature.extend([0, 32]);
        signature.extend([part; 32]);
    }
    let pcrs = [(0, Hex(vec![0x11; 32])), (13, Hex(vec![0x22; 32]))];
    Bundle {
        version: 1,
        boot_id: BOOT_ID.into(),
        quote: QuotePart {
            attest: B64(attest()),
            signature: B64(signature),
        },
        pcrs: [(Algorithm::Sha256, pcrs.into_iter().collect())].into_iter().collect(),
        log: LogPart {
            from: 0,
            records: 3,
            data: B64(log()),
        },
        boot_log: None,
        ima_log: None,
    }
}

#[test]
fn a_quote() {
    let file = saved(&attest());
    let out = inspect("quote", &file.path, false).good();
    for part in ["of sha256:0,13", "extra data ccdd", "reset count 5, restart count 6"] {
        assert!(out.contains(part), "{part:?} is not in {out}");
    }
    let json: Value = serde_json::from_str(&inspect("quote", &file.path, true).good()).unwrap();
    assert_eq!(json["attested"]["quote"]["pcrs"]["sha256"], serde_json::json!([0, 13]));
    let cut = saved(&attest()[..20]);
    inspect("quote", &cut.path, false).refused(&["evidence", "TPMS_ATTEST"]);
}

/// A damaged part that the TPM does not sign is no reason not to show the rest.
#[test]
fn a_bundle_with_an_ima_log() {
    let counted = |data: &[u8]| [&u32::try_from(data.len()).unwrap().to_le_bytes(), data].concat();
    let fields = [counted(b"sha1:\0digest"), counted(b"/usr/bin/a\0")].concat();
    let list = [vec![10, 0, 0, 0], vec![0; 20], counted(b"ima-ng"), counted(&fields)].concat();
    let mut bundle = bundle();
    bundle.ima_log = Some(B64(list));
    let whole = saved(&bundle.to_json().unwrap());
    let out = inspect("bundle", &whole.path, false).good();
    assert!(
        out.contains("IMA log: 1 entries") && out.contains("violation /usr/bin/a"),
        "{out}"
    );
    bundle.ima_log = Some(B64(vec![10, 0, 0]));
    let damaged = saved(&bundle.to_json().unwrap());
    let json: Value = serde_json::from_str(&inspect("bundle", &damaged.path, true).good()).unwrap();
    let error = json["ima_log"]["error"].as_str().unwrap();
    assert!(error.contains("ends inside entry 0"), "{error}");
}

#[test]
fn a_bundle() {
    let file = saved(&bundle().to_json().unwrap());
    let out = inspect("bundle", &file.path, false).good();
    for part in [
        "shown, not verified",
        "of sha256:0,13",
        "extra data ccdd",
        "reset count 5",
        "pcr sha256:13 2222",
        "record 2 ",
        "/root/rogue",
    ] {
        assert!(out.contains(part), "{part:?} is not in: {out}");
    }
    let json: Value = serde_json::from_str(&inspect("bundle", &file.path, true).good()).unwrap();
    assert_eq!(json["verified"], false);
    assert_eq!(
        json["quote"]["attested"]["quote"]["pcrs"]["sha256"],
        serde_json::json!([0, 13])
    );
    assert_eq!(json["log"]["data"].as_array().unwrap().len(), 3);
}

#[test]
fn damaged_bundles() {
    let refusal = |change: fn(&mut Bundle), named: &[&str]| {
        let mut bundle = bundle();
        change(&mut bundle);
        inspect("bundle", &saved(&bundle.to_json().unwrap()).path, false).refused(named);
    };
    refusal(|b| b.version = 2, &["version 2"]);
    refusal(|b| b.boot_id = "today".into(), &["boot_id"]);
    refusal(|b| b.quote.attest.0[0] = 0, &["quote.attest", "no TPM made it"]);
    refusal(|b| b.quote.signature.0.truncate(40), &["quote.signature"]);
    refusal(
        |b| b.log.data.0.truncate(b.log.data.0.len() - 1),
        &["record 2", "ends inside a record"],
    );
    refusal(|b| b.log.records = 4, &["log.records says 4"]);
    refusal(
        |b| b.log.from = 1,
        &["record 1", "record 0 comes where record 1 was due"],
    );
    refusal(
        |b| b.boot_log = Some(B64(vec![1, 2, 3])),
        &["boot log ends inside event 0"],
    );
    let unknown = String::from_utf8(bundle().to_json().unwrap())
        .unwrap()
        .replacen('{', "{\"surprise\":1,", 1);
    inspect("bundle", &saved(unknown.as_bytes()).path, false).refused(&["surprise"]);
}

/// Other projects' files, where they are at hand.
fn vector(name: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../shared/vectors")
        .join(name);
    if !path.exists() {
        eprintln!("skipped: no test vector at {}", path.display());
    }
    path.exists().then_some(path)
}

#[test]
fn a_boot_log_of_a_real_machine() {
    let Some(path) = vector("boot-logs/arch-linux-workstation.bin") else {
        return;
    };
    let out = inspect("boot-log", &path, false).good();
    assert!(
        out.contains("crypto-agile boot log") && out.contains("replay sha256 pcr  0"),
        "{out}"
    );
    let json: Value = serde_json::from_str(&inspect("boot-log", &path, true).good()).unwrap();
    assert!(json["pcrs"]["sha256"]["0"].is_string());
}

#[test]
fn a_canonical_event_log_of_another_project() {
    use base64::Engine as _;
    let Some(path) = vector("cel/go-tpm-tools-cel.b64") else {
        return;
    };
    let text: String = fs::read_to_string(path).unwrap().split_whitespace().collect();
    let bytes = base64::engine::general_purpose::STANDARD.decode(text).unwrap();
    let out = inspect("cel", &saved(&bytes).path, false).good();
    assert!(
        out.contains("content of type 80") && out.ends_with("head none\n"),
        "{out}"
    );
}
