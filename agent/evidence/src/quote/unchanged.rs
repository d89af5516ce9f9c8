//! Evidence that brings nothing new: what is remembered of evidence that was judged, so that a poll of a host on which nothing
//! has happened costs its quote and no more, however long its log is.

use super::{Attested, Bundle, HeldLog, VerifiedQuote, check_progress, compare_pcr_sets};
use crate::binding::Binding;
use crate::bundle::Pcrs;
use crate::digest::Sha256Digest;
use crate::tpm::{AttestationKey, ClockInfo};
use crate::wire::B64;

/// What was quoted when a log was judged. Whoever is shown the same again, signed anew, can only come to the same verdict by the
/// same policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judged {
    /// Without the log's bytes.
    held: HeldLog,
    head: Sha256Digest,
    firmware_version: u64,
    pcrs: Pcrs,
    ima_log: Option<Sha256Digest>,
}

impl Judged {
    /// What a verifier holds of the host, but for the log's bytes, which are those that were judged.
    #[must_use]
    pub const fn held(&self) -> &HeldLog {
        &self.held
    }

    pub(crate) fn of(quote: &VerifiedQuote) -> Self {
        Self {
            held: quote.held(Vec::new()),
            head: quote.head.value(),
            firmware_version: quote.firmware_version,
            pcrs: quote.pcrs.clone(),
            ima_log: digest(quote.ima_log.as_ref()),
        }
    }

    fn at(&self, clock: ClockInfo) -> Self {
        let mut now = self.clone();
        now.held.clock = clock.clock;
        now
    }
}

impl Bundle {
    /// Whether `ak` quoted, for the question of `binding`, the very state that was judged: the same boot, log, PCRs and TPM, and
    /// a clock that went on. Gives what is to be remembered from now on.
    ///
    /// The firmware's log may be left out: PCRs that did not change are the end of the one that was judged.
    ///
    /// `None` is no verdict: anything is new, or wrong, and [`Bundle::verify`] tells which.
    #[must_use]
    pub fn verify_unchanged(&self, ak: &AttestationKey, binding: &Binding<'_>, judged: &Judged) -> Option<Judged> {
        let held = &judged.held;
        let same = self.boot_id == held.boot_id
            && self.log.from == held.records
            && self.log.records == held.records
            && self.log.data.as_ref().is_empty()
            && self.pcrs == judged.pcrs
            && digest(self.ima_log.as_ref()) == judged.ima_log;
        if !same {
            return None;
        }
        self.check().ok()?;
        let attest = self.signed_attest(ak).ok()?;
        let Attested::Quote { selections, digest } = &attest.attested else {
            return None;
        };
        if attest.extra_data != binding.digest(held.records, &judged.head) {
            return None;
        }
        compare_pcr_sets(selections, &self.pcrs).ok()?;
        self.check_pcr_digest(selections, digest).ok()?;
        check_progress(&self.boot_id, &attest.clock, held).ok()?;
        let same = attest.firmware_version == judged.firmware_version
            && attest.clock.restart_count == held.restart_count
            && attest.clock.safe;
        same.then(|| judged.at(attest.clock))
    }
}

fn digest(log: Option<&B64>) -> Option<Sha256Digest> {
    log.map(|log| Sha256Digest::of(log.as_ref()))
}

#[cfg(test)]
mod tests {
    use crate::bundle::Bundle;
    use crate::pcr::RuntimePcr;
    use crate::quote::HeldLog;
    use crate::testing::{BINDING, Host, NONCE, OTHER_BOOT, SoftKey, load};

    use super::*;
    use crate::binding::Exporter;

    fn judged(host: &Host) -> Judged {
        let bundle = host.bundle(&BINDING, 0);
        let quote = bundle.verify(&host.key.ak(), &BINDING, &HeldLog::none()).unwrap();
        quote.replay(RuntimePcr::DEFAULT).unwrap().judged()
    }

    fn poll(host: &Host) -> Bundle {
        host.bundle(&BINDING, host.records.len())
    }

    #[test]
    fn the_same_state_signed_anew_is_unchanged_and_its_clock_is_remembered() {
        let mut host = Host::measuring();
        let before = judged(&host);
        host.clock.clock += 60_000;
        let now = poll(&host)
            .verify_unchanged(&host.key.ak(), &BINDING, &before)
            .expect("nothing is new");
        assert_eq!(now.held().clock, host.clock.clock);
        // And with that, an older quote is none any more.
        host.clock.clock -= 1;
        assert_eq!(poll(&host).verify_unchanged(&host.key.ak(), &BINDING, &now), None);
        let held = judged(&host);
        assert_eq!(
            Judged {
                held: held.held.clone(),
                ..now
            },
            held
        );
    }

    type Change = (&'static str, fn(&mut Host));

    #[test]
    fn whatever_is_new_or_wrong_is_for_the_whole_check() {
        let before = judged(&Host::measuring());
        let changes: [Change; 8] = [
            ("a record", |host| host.record(&[load("/bin/new", 2)])),
            ("the log's PCR alone", |host| host.extend(&[7; 32])),
            ("another PCR", |host| host.pcrs.get_mut(&10).unwrap().0 = vec![9; 32]),
            ("another boot", |host| host.boot_id = OTHER_BOOT.to_owned()),
            ("a reset", |host| host.clock.reset_count += 1),
            ("a restart", |host| host.clock.restart_count += 1),
            ("a clock that is not safe", |host| host.clock.safe = false),
            ("a clock that went back", |host| host.clock.clock -= 1),
        ];
        for (what, change) in changes {
            // Keys are made anew for each host; what is remembered has none in it.
            let mut host = Host::measuring();
            let good = poll(&host).verify_unchanged(&host.key.ak(), &BINDING, &before);
            assert!(good.is_some(), "{what}");
            change(&mut host);
            let found = poll(&host).verify_unchanged(&host.key.ak(), &BINDING, &before);
            assert_eq!(found, None, "{what}");
        }
    }

    #[test]
    fn it_must_be_an_answer_to_this_question_by_this_key() {
        let host = Host::measuring();
        let before = judged(&host);
        let ak = host.key.ak();
        let other = Exporter::new([9; 32]);
        let elsewhere = Binding::Quote {
            nonce: &NONCE,
            exporter: &other,
        };
        assert_eq!(poll(&host).verify_unchanged(&ak, &elsewhere, &before), None);
        assert_eq!(
            poll(&host).verify_unchanged(&SoftKey::new().ak(), &BINDING, &before),
            None
        );
        let mut bundle = poll(&host);
        bundle.quote.attest.0[60] ^= 1;
        assert_eq!(bundle.verify_unchanged(&ak, &BINDING, &before), None);
        // The log once more, and a part of it.
        assert_eq!(host.bundle(&BINDING, 0).verify_unchanged(&ak, &BINDING, &before), None);
        // Another log of as many records.
        let mut forged = Host::measuring();
        forged.records.pop();
        forged.record(&[load("/bin/other", 1)]);
        let mut bundle = host.bundle(&BINDING, 3);
        bundle.log.records = 4;
        assert_eq!(bundle.verify_unchanged(&ak, &BINDING, &before), None);
        let found = poll(&forged).verify_unchanged(&forged.key.ak(), &BINDING, &before);
        assert_eq!(found, None);
        let mut told = poll(&host);
        told.ima_log = Some(B64(vec![1]));
        assert_eq!(told.verify_unchanged(&ak, &BINDING, &before), None);
    }
}
