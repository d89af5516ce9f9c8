#[path = "tampering.rs"]
mod tampering;

use super::*;
use crate::binding::{Exporter, Nonce};
use crate::replay::{ReplayError, ReplayedLog};
use crate::testing::{BINDING, BOOT, EXPORTER, Host, NONCE, OTHER_BOOT, SoftKey, agent_start, load};
use crate::tpm::Name;
use crate::wire::Hex;

#[derive(Debug)]
enum Refusal {
    Quote(QuoteError),
    Replay(ReplayError),
}

fn judge(host: &Host, bundle: &Bundle, held: &HeldLog) -> Result<ReplayedLog, Refusal> {
    let quote = bundle.verify(&host.key.ak(), &BINDING, held).map_err(Refusal::Quote)?;
    quote.replay(crate::pcr::RuntimePcr::DEFAULT).map_err(Refusal::Replay)
}

fn quote_error(host: &Host, bundle: &Bundle, held: &HeldLog) -> QuoteError {
    bundle
        .verify(&host.key.ak(), &BINDING, held)
        .expect_err("should be refused")
}

#[test]
fn good_evidence_is_accepted() {
    let host = Host::measuring();
    let replayed = judge(&host, &host.bundle(&BINDING, 0), &HeldLog::none()).unwrap();
    assert_eq!(replayed.records(), 3);
    assert_eq!(replayed.boot_id(), BOOT);
    assert_eq!(replayed.pcr(13), Some(host.pcrs[&13].0.as_slice()));
    assert_eq!(replayed.pcr_start(), [0; 32]);
    let names: Vec<_> = replayed
        .events()
        .map(|(record, event)| (record, event.name()))
        .collect();
    assert_eq!(
        names,
        [
            (0, "agent-start"),
            (0, "inventory"),
            (0, "ready"),
            (1, "load"),
            (2, "load")
        ]
    );
    assert_eq!(replayed.to_held(), replayed.into_held());
}

#[test]
fn each_changed_field_is_refused_with_its_own_reason() {
    let host = Host::measuring();
    let good = host.bundle(&BINDING, 0);
    for (name, change, wanted) in tampering::CASES {
        let mut bundle = good.clone();
        change(&mut bundle);
        match judge(&host, &bundle, &HeldLog::none()) {
            Ok(_) => panic!("{name}: accepted"),
            Err(refusal) => assert!(wanted(&refusal), "{name}: {refusal:?}"),
        }
    }
}

#[test]
fn each_flipped_byte_of_the_signed_statement_is_refused() {
    let host = Host::measuring();
    let good = host.bundle(&BINDING, 0);
    for at in 0..good.quote.attest.0.len() {
        let mut bundle = good.clone();
        tampering::flip(&mut bundle.quote.attest.0, at);
        let error = quote_error(&host, &bundle, &HeldLog::none());
        assert!(
            matches!(error, QuoteError::Signature(SignatureError::Invalid)),
            "byte {at}: {error:?}"
        );
    }
}

#[test]
fn each_flipped_byte_of_the_log_is_refused() {
    let host = Host::measuring();
    let good = host.bundle(&BINDING, 0);
    for at in 0..good.log.data.0.len() {
        let mut bundle = good.clone();
        tampering::flip(&mut bundle.log.data.0, at);
        assert!(judge(&host, &bundle, &HeldLog::none()).is_err(), "byte {at}");
    }
}

#[test]
fn another_key_is_refused() {
    let host = Host::measuring();
    let stranger = SoftKey::new().ak();
    let error = host
        .bundle(&BINDING, 0)
        .verify(&stranger, &BINDING, &HeldLog::none())
        .unwrap_err();
    assert!(matches!(error, QuoteError::Signature(SignatureError::Invalid)));
}

#[test]
fn another_question_is_refused() {
    let host = Host::measuring();
    let name = Name::new(Algorithm::Sha256, b"key");
    let (nonce, exporter) = (Nonce::new([9; 32]), Exporter::new([9; 32]));
    let release = Binding::Release {
        nonce: &NONCE,
        exporter: &EXPORTER,
        key_name: &name,
        disk: [1; 16],
        key_id: "k",
    };
    let other_disk = Binding::Release {
        nonce: &NONCE,
        exporter: &EXPORTER,
        key_name: &name,
        disk: [2; 16],
        key_id: "k",
    };
    let questions = [
        (
            BINDING,
            Binding::Quote {
                nonce: &nonce,
                exporter: &EXPORTER,
            },
        ),
        (
            BINDING,
            Binding::Quote {
                nonce: &NONCE,
                exporter: &exporter,
            },
        ),
        (BINDING, release),
        (release, BINDING),
        (release, other_disk),
    ];
    for (answered, asked) in questions {
        let bundle = host.bundle(&answered, 0);
        let error = bundle.verify(&host.key.ak(), &asked, &HeldLog::none()).unwrap_err();
        assert!(matches!(error, QuoteError::Binding), "{asked:?}: {error:?}");
    }
    assert!(
        host.bundle(&release, 0)
            .verify(&host.key.ak(), &release, &HeldLog::none())
            .is_ok()
    );
}

#[test]
fn signed_statements_that_are_no_full_quote_are_refused() {
    let host = Host::measuring();
    let good = host.quote_fields(&BINDING);
    let refused = |change: fn(&mut crate::testing::QuoteFields)| {
        let mut fields = good.clone();
        change(&mut fields);
        quote_error(&host, &host.bundle_with(&fields, 0), &HeldLog::none())
    };
    assert!(matches!(
        refused(|f| f.magic = 0x1234_5678),
        QuoteError::Attest(TpmError::Magic(0x1234_5678))
    ));
    assert!(matches!(
        refused(|f| f.kind = 0x801A),
        QuoteError::Attest(TpmError::Unsupported { .. })
    ));
    let small = |f: &mut crate::testing::QuoteFields| f.selections = vec![(0x0B, vec![0xFF, 0xDF, 0])];
    assert!(matches!(
        refused(small),
        QuoteError::PcrNotQuoted {
            bank: Algorithm::Sha256,
            index: 13
        }
    ));
    let none = |f: &mut crate::testing::QuoteFields| f.selections.clear();
    assert!(matches!(refused(none), QuoteError::PcrNotQuoted { index: 0, .. }));
    let other = |f: &mut crate::testing::QuoteFields| f.selections.push((0x0C, vec![1, 0, 0]));
    assert!(matches!(
        refused(other),
        QuoteError::QuotedButNotGiven {
            bank: Algorithm::Sha384,
            index: 0
        }
    ));
    assert!(matches!(refused(|f| f.extra_data.truncate(20)), QuoteError::Binding));
    assert!(matches!(refused(|f| f.digest.clear()), QuoteError::PcrDigest { .. }));
}

#[test]
fn certification_is_no_quote() {
    let host = Host::measuring();
    let mut attest = host.quote_fields(&BINDING);
    attest.kind = 0x8017;
    attest.selections.clear();
    let mut bytes = attest.encode();
    // After the fixed part: a Name and a qualified Name in place of selection and digest.
    bytes.truncate(bytes.len() - 4 - 2 - 32);
    crate::testing::sized(&mut bytes, &[0x0B; 34]);
    crate::testing::sized(&mut bytes, &[0x0B; 34]);
    let mut bundle = host.bundle(&BINDING, 0);
    bundle.quote.signature = B64(host.key.sign(&bytes));
    bundle.quote.attest = B64(bytes);
    assert!(matches!(
        quote_error(&host, &bundle, &HeldLog::none()),
        QuoteError::NotAQuote
    ));
}

#[test]
fn a_poll_brings_what_is_new() {
    let mut host = Host::measuring();
    let held = judge(&host, &host.bundle(&BINDING, 0), &HeldLog::none())
        .unwrap()
        .into_held();
    assert_eq!(held.records, 3);
    host.record(&[load("/bin/cat", 2)]);
    let next = judge(&host, &host.bundle(&BINDING, 3), &held).unwrap();
    assert_eq!(next.records(), 4);
    assert_eq!(next.to_held().bytes, host.log_bytes(0));
    // Nothing new, and the whole log again, are fine too.
    assert_eq!(
        judge(&host, &host.bundle(&BINDING, 4), &next.to_held())
            .unwrap()
            .records(),
        4
    );
    assert_eq!(
        judge(&host, &host.bundle(&BINDING, 0), &next.to_held())
            .unwrap()
            .records(),
        4
    );
}

#[test]
fn what_the_verifier_holds_cannot_be_undone() {
    let mut host = Host::measuring();
    let old = host.bundle(&BINDING, 0);
    host.record(&[load("/root/rogue", 2)]);
    let held = judge(&host, &host.bundle(&BINDING, 0), &HeldLog::none())
        .unwrap()
        .into_held();

    assert!(matches!(
        quote_error(&host, &old, &held),
        QuoteError::LogShrank { held: 4, found: 3 }
    ));

    let mut rewritten = Host::measuring();
    rewritten.record(&[load("/bin/good", 2)]);
    assert!(matches!(
        quote_error(&rewritten, &rewritten.bundle(&BINDING, 0), &held),
        QuoteError::LogRewritten { held: 4 }
    ));

    host.record(&[load("/bin/cat", 3)]);
    assert!(matches!(
        quote_error(&host, &host.bundle(&BINDING, 3), &held),
        QuoteError::LogFrom { from: 3, held: 4 }
    ));
    assert!(matches!(
        quote_error(&host, &host.bundle(&BINDING, 5), &held),
        QuoteError::LogFrom { from: 5, held: 4 }
    ));
}

#[test]
fn counters_that_go_back_are_stale() {
    let host = Host::measuring();
    let held = judge(&host, &host.bundle(&BINDING, 0), &HeldLog::none())
        .unwrap()
        .into_held();
    let stale = |change: fn(&mut HeldLog)| {
        let mut held = held.clone();
        change(&mut held);
        match quote_error(&host, &host.bundle(&BINDING, 3), &held) {
            QuoteError::StaleQuote { counter, .. } => counter,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(stale(|held| held.reset_count += 1), "reset count");
    assert_eq!(stale(|held| held.restart_count += 1), "restart count");
    assert_eq!(stale(|held| held.clock += 1), "clock");
}

#[test]
fn reset_and_reboot_come_together() {
    let mut host = Host::measuring();
    let held = judge(&host, &host.bundle(&BINDING, 0), &HeldLog::none())
        .unwrap()
        .into_held();

    host.clock.reset_count += 1;
    assert!(matches!(
        quote_error(&host, &host.bundle(&BINDING, 3), &held),
        QuoteError::ResetWithoutReboot { held: 5, found: 6, .. }
    ));
    host.clock.reset_count -= 1;

    let log_before = host.records.clone();
    let mut after = host.reboot(OTHER_BOOT);
    after.record(&[crate::event::Event::from(agent_start(OTHER_BOOT))]);
    assert_eq!(judge(&after, &after.bundle(&BINDING, 0), &held).unwrap().records(), 1);

    // The log of the new boot cannot go on from the old one's.
    let mut part = after.bundle(&BINDING, 0);
    part.log.from = 3;
    assert!(matches!(
        quote_error(&after, &part, &held),
        QuoteError::LogFrom { from: 3, held: 0 }
    ));

    after.clock.reset_count -= 1;
    assert!(matches!(
        quote_error(&after, &after.bundle(&BINDING, 0), &held),
        QuoteError::BootWithoutReset { .. }
    ));

    // A log from before the reboot, under the new boot's id: the TPM's PCR started anew, and does not fit.
    after.clock.reset_count += 1;
    after.records = log_before;
    let refusal = judge(&after, &after.bundle(&BINDING, 0), &held).unwrap_err();
    assert!(
        matches!(refusal, Refusal::Replay(ReplayError::LogFromAnotherBoot { .. })),
        "{refusal:?}"
    );
}
