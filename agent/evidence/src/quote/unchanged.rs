//! Evidence that brings little new: what is remembered of evidence that was judged, so that a poll of a host costs its quote and
//! what has happened since, however long its log is.

use super::{Attested, Bundle, HeldLog, MAX_WHOLE_LOG, QUOTED_BANK, check_progress, compare_pcr_sets};
use crate::binding::Binding;
use crate::bundle::Pcrs;
use crate::cel::{self, Head};
use crate::digest::{Algorithm, Sha256Digest};
use crate::event::Event;
use crate::pcr::RuntimePcr;
use crate::replay::{MAX_LOG_EVENTS, ReplayedLog};
use crate::tpm::{AttestationKey, ClockInfo};
use crate::wire::B64;

/// What was quoted when a log was judged. Whoever is shown the same again, signed anew, can only come to the same verdict by the
/// same policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judged {
    /// Without the log's bytes.
    held: HeldLog,
    /// Bytes of the log.
    length: usize,
    /// Events in it.
    events: usize,
    head: Head,
    /// Where the log is.
    pcr: RuntimePcr,
    /// Banks that every record of the log has digests for.
    banks: Vec<Algorithm>,
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

    /// Bytes of the log that was judged.
    #[must_use]
    pub const fn length(&self) -> usize {
        self.length
    }

    pub(crate) fn of(log: &ReplayedLog) -> Self {
        let quote = log.quote();
        Self {
            held: quote.held(Vec::new()),
            length: quote.log.len(),
            events: log.events().count(),
            head: quote.head,
            pcr: log.runtime_pcr(),
            banks: log.banks().to_vec(),
            firmware_version: quote.firmware_version,
            pcrs: quote.pcrs.clone(),
            ima_log: digest(quote.ima_log.as_ref()),
        }
    }

    fn at(&self, clock: &ClockInfo) -> Self {
        let mut now = self.clone();
        now.held.clock = clock.clock;
        now
    }

    /// Takes in what the log has had since, if `passes` all of its events. What is quoted then is for the caller to compare.
    fn after(&self, data: &[u8], passes: &dyn Fn(&Event) -> bool) -> Option<Self> {
        let mut now = self.clone();
        now.length = self
            .length
            .checked_add(data.len())
            .filter(|length| *length <= MAX_WHOLE_LOG)?;
        let runtime = now.pcrs.get_mut(&QUOTED_BANK)?.get_mut(&self.pcr.index())?;
        for record in cel::read_all(data).ok()? {
            let banks = record.digests.iter().map(|(bank, _)| *bank);
            if !record.is_in(self.pcr) || !banks.eq(self.banks.iter().copied()) {
                return None;
            }
            record.check_digests().ok()?;
            let events = record.events().ok()?;
            now.events = now.events.checked_add(events.len())?;
            if now.events > MAX_LOG_EVENTS || !events.iter().all(passes) {
                return None;
            }
            runtime.0 = QUOTED_BANK.extend(&runtime.0, record.digest(QUOTED_BANK)?);
            now.head.push(&record).ok()?;
        }
        now.held.records = now.head.records();
        Some(now)
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
        self.log.data.as_ref().is_empty().then_some(())?;
        self.verify_progress(ak, binding, judged, &|_| false)
    }

    /// As [`Bundle::verify_unchanged`], where the log went on by events that all `passes`: those that change nothing in a
    /// verdict that trusts, see [`Policy::passes`](crate::policy::Policy::passes).
    #[must_use]
    pub fn verify_progress(
        &self,
        ak: &AttestationKey,
        binding: &Binding<'_>,
        judged: &Judged,
        passes: &dyn Fn(&Event) -> bool,
    ) -> Option<Judged> {
        let held = &judged.held;
        if self.boot_id != held.boot_id || self.log.from != held.records {
            return None;
        }
        self.check().ok()?;
        let attest = self.signed_attest(ak).ok()?;
        let Attested::Quote {
            selections,
            digest: quoted,
        } = &attest.attested
        else {
            return None;
        };
        let now = judged.after(self.log.data.as_ref(), passes)?;
        let same = self.log.records == now.held.records
            && self.pcrs == now.pcrs
            && digest(self.ima_log.as_ref()) == judged.ima_log
            && attest.extra_data == binding.digest(now.held.records, &now.head.value());
        if !same {
            return None;
        }
        compare_pcr_sets(selections, &self.pcrs).ok()?;
        self.check_pcr_digest(selections, quoted).ok()?;
        check_progress(&self.boot_id, &attest.clock, held).ok()?;
        let same = attest.firmware_version == judged.firmware_version
            && attest.clock.restart_count == held.restart_count
            && attest.clock.safe;
        same.then(|| now.at(&attest.clock))
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
    fn new_records_are_taken_in_where_all_of_them_pass() {
        let mut host = Host::measuring();
        let before = judged(&host);
        let held = host.records.len();
        host.clock.clock += 60_000;
        host.record(&[load("/bin/new", 2), load("/bin/newer", 3)]);
        host.record(&[load("/bin/newest", 4)]);
        let news = host.bundle(&BINDING, held);
        let ak = host.key.ak();
        let now = news.verify_progress(&ak, &BINDING, &before, &|_| true).unwrap();
        assert_eq!(now, judged(&host), "as if all of it had been replayed");
        assert_eq!(now.length(), host.log_bytes(0).len());
        assert_eq!(poll(&host).verify_unchanged(&ak, &BINDING, &now).as_ref(), Some(&now));
        // One that does not pass is for the whole check, as is everything that is wrong.
        let newest = |event: &Event| event.code().is_some_and(|code| code.path != "/bin/newest");
        assert_eq!(news.verify_progress(&ak, &BINDING, &before, &newest), None);
        assert_eq!(news.verify_unchanged(&ak, &BINDING, &before), None);
        let wrong: [fn(&mut Bundle); 5] = [
            |b| *b.log.data.0.last_mut().unwrap() ^= 1,
            |b| b.log.data.0.truncate(0),
            |b| b.log.records -= 1,
            |b| b.log.from -= 1,
            |b| b.pcrs.values_mut().for_each(|bank| bank.get_mut(&4).unwrap().0[0] ^= 1),
        ];
        for (number, change) in wrong.into_iter().enumerate() {
            let mut bundle = news.clone();
            change(&mut bundle);
            assert_eq!(
                bundle.verify_progress(&ak, &BINDING, &before, &|_| true),
                None,
                "{number}"
            );
        }
        // Records that the quoted PCR does not have.
        let mut beside = host.records.len();
        host.extend(&[7; 32]);
        assert_eq!(
            host.bundle(&BINDING, beside)
                .verify_progress(&ak, &BINDING, &now, &|_| true),
            None
        );
        host.pcr = 12;
        host.record(&[load("/bin/elsewhere", 5)]);
        beside = host.records.len() - 1;
        assert_eq!(
            host.bundle(&BINDING, beside)
                .verify_progress(&ak, &BINDING, &now, &|_| true),
            None
        );
    }

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
