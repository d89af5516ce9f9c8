//! From a bundle to a verdict, with a log that a stranger chose and a key that signs it: a host may say what it likes, and must not
//! be able to say anything else afterwards.

use assay_evidence::bundle::Bundle;
use assay_evidence::event::{self, Event};
use assay_evidence::pcr::RuntimePcr;
use assay_evidence::policy::Policy;
use assay_evidence::quote::HeldLog;
use assay_evidence::replay::ReplayedLog;
use assay_evidence::testing::{BINDING, Host, NOW};

use crate::samples;

/// Events in a record, and records, that are made of one input.
const MOST: usize = 64;

/// The input: a byte for each record says how many events it has, each behind its length in two bytes; the last three bytes
/// say what is tampered with.
pub fn chain(data: &[u8]) {
    let Some((log, tampering)) = data.split_last_chunk::<3>() else {
        return;
    };
    let mut host = Host::measuring();
    let policy = samples::policy(&host);
    for events in records(log) {
        host.record(&events);
    }
    let bundle = host.bundle(&BINDING, 0);
    let Some(whole) = replayed(&bundle, &host, &HeldLog::none()) else {
        return;
    };
    let verdict = whole.appraise(&policy, NOW);
    assert_eq!(verdict.is_trusted(), verdict.failures().is_empty());
    drop(verdict.reasons());

    increment(&host, &whole);
    progress(&mut host, &policy, &whole, log);
    tampered(&host, &bundle, &whole, *tampering);
}

/// What a sample says to this target.
pub fn input(host: &Host) -> Vec<u8> {
    let mut input = Vec::new();
    for record in host.records.iter().skip(1) {
        let events = record.events().expect("it was built");
        input.push(u8::try_from(events.len()).expect("few"));
        for event in events {
            let bytes = event::encode(&event).expect("it was built");
            input.extend(u16::try_from(bytes.len()).expect("short").to_be_bytes());
            input.extend(bytes);
        }
    }
    input.extend([1, 2, 3]);
    input
}

fn records(mut input: &[u8]) -> Vec<Vec<Event>> {
    let mut records = Vec::new();
    while let Some((&count, rest)) = input.split_first() {
        input = rest;
        let mut events = Vec::new();
        for _ in 0..usize::from(count).clamp(1, MOST) {
            let Some((length, rest)) = input.split_first_chunk() else {
                break;
            };
            let length = usize::from(u16::from_be_bytes(*length)).min(rest.len());
            let (bytes, rest) = rest.split_at(length);
            input = rest;
            events.extend(event::decode(bytes));
        }
        if !events.is_empty() {
            records.push(events);
        }
        if records.len() >= MOST {
            break;
        }
    }
    records
}

/// The log, if its events make sense; that the quote is good is certain.
fn replayed(bundle: &Bundle, host: &Host, held: &HeldLog) -> Option<ReplayedLog> {
    let quote = bundle.verify(&host.key.ak(), &BINDING, held);
    quote.expect("signed as it is").replay(RuntimePcr::DEFAULT).ok()
}

/// Who holds a part of the log, and is sent the rest, ends where one does who is sent it all.
fn increment(host: &Host, whole: &ReplayedLog) {
    let all = whole.to_held();
    let poll = host.bundle(&BINDING, host.records.len());
    let again = replayed(&poll, host, &all).expect("nothing new");
    assert_eq!(again.to_held(), all);
}

/// Who judges only what came since ends where one does who judges all.
fn progress(host: &mut Host, policy: &Policy, before: &ReplayedLog, log: &[u8]) {
    let (held, kept) = (host.records.len(), host.pcrs.clone());
    // The same events once more, the last first: what was refused before can pass alone, and the other way round.
    for events in records(log).iter().rev() {
        host.record(events);
    }
    let news = host.bundle(&BINDING, held);
    let judged = news.verify_progress(&host.key.ak(), &BINDING, &before.judged(), &policy.passes(NOW));
    if let Some(judged) = judged {
        let whole = replayed(&host.bundle(&BINDING, 0), host, &HeldLog::none()).expect("all of it passes");
        assert_eq!(judged, whole.judged());
        let (was, is) = (before.appraise(policy, NOW), whole.appraise(policy, NOW));
        assert_eq!((was.reasons(), was.notes()), (is.reasons(), is.notes()));
    }
    host.records.truncate(held);
    host.pcrs = kept;
}

/// A byte of the evidence is changed: it is refused, or says the very same.
fn tampered(host: &Host, bundle: &Bundle, whole: &ReplayedLog, [part, place, bit]: [u8; 3]) {
    let mut changed = bundle.clone();
    let bytes = match part % 4 {
        0 => &mut changed.log.data.0,
        1 => &mut changed.quote.attest.0,
        2 => &mut changed.quote.signature.0,
        _ => {
            let bank = changed.pcrs.values_mut().next();
            let Some(value) = bank.and_then(|bank| bank.values_mut().nth(usize::from(place % 16))) else {
                return;
            };
            &mut value.0
        }
    };
    // Spread over all of it, however long it is.
    let place = usize::from(place) * bytes.len() / 256;
    let Some(byte) = bytes.get_mut(place) else { return };
    *byte ^= 1 << (bit % 8);
    let replay = |bundle: &Bundle| {
        let quote = bundle.verify(&host.key.ak(), &BINDING, &HeldLog::none()).ok()?;
        quote.replay(RuntimePcr::DEFAULT).ok()
    };
    if let Some(accepted) = replay(&changed) {
        assert_eq!(
            accepted.to_held(),
            whole.to_held(),
            "other evidence under the same quote"
        );
    }
}
