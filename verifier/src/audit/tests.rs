use std::io::Write as _;

use assay_evidence::audit::{AuditError, Checker, Request};
use assay_evidence::digest::Sha256Digest;
use assay_evidence::uuid::Uuid;

use super::*;

fn terms(number: u8) -> Event {
    Event::Terms {
        key_id: Uuid::new([number; 16]),
        terms: "none".to_owned(),
    }
}

fn refused(host: &str) -> Event {
    Event::Refused {
        request: Request {
            host: host.to_owned(),
            ak_name: String::new(),
            key_id: "k".to_owned(),
            disk: Uuid::new([1; 16]),
            vm: None,
        },
        code: "untrusted".to_owned(),
        message: String::new(),
        reasons: Vec::new(),
        unrecorded: 0,
    }
}

/// Every record of a log, checked.
fn all(state: &StateDir) -> Result<Vec<Event>, AuditLogError> {
    let key = public_key(state)?;
    let paths: Vec<_> = files(&state.audit_dir())?.into_iter().map(|file| file.path).collect();
    let mut events = Vec::new();
    read(&paths, Checker::new(&key, None), &mut |record| {
        events.push(record.event)
    })?;
    Ok(events)
}

fn state() -> (tempfile::TempDir, StateDir) {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::new(dir.path());
    (dir, state)
}

#[test]
fn two_writers_make_one_chain_over_many_files() {
    let (_dir, state) = state();
    let open = || AuditLog {
        max_file: 2000,
        ..AuditLog::open(&state).unwrap()
    };
    let (one, other) = (open(), open());
    std::thread::scope(|scope| {
        for (log, from) in [(&one, 0), (&other, 100)] {
            scope.spawn(move || (0..20).for_each(|n| assert!(log.append(terms(from + n)).is_ok())));
        }
    });
    let events = all(&state).unwrap();
    assert_eq!(events.len(), 40);
    for n in (0..20).chain(100..120) {
        assert!(events.contains(&terms(n)), "{n}");
    }
    let files = files(&state.audit_dir()).unwrap();
    assert!(files.len() > 3, "{files:?}");
    for file in files {
        assert!(std::fs::metadata(file.path).unwrap().len() <= 2000);
    }
}

#[test]
fn what_a_crash_left_is_written_down_and_the_log_goes_on() {
    let (_dir, state) = state();
    for torn in ["eyJhbGciOi", "\0\0\0\0"] {
        let log = AuditLog::open(&state).unwrap();
        log.append(terms(1)).unwrap();
        drop(log);
        let last = files(&state.audit_dir()).unwrap().pop().unwrap().path;
        let mut file = std::fs::OpenOptions::new().append(true).open(last).unwrap();
        file.write_all(torn.as_bytes()).unwrap();
        let error = all(&state).unwrap_err();
        let AuditLogError::Record { cause, .. } = error else {
            panic!("{error}")
        };
        assert!(
            matches!(cause, AuditError::Torn { bytes, .. } if bytes == torn.len()),
            "{cause}"
        );
        AuditLog::open(&state).unwrap();
        let sha256 = Sha256Digest::of(torn.as_bytes());
        let bytes = u64::try_from(torn.len()).unwrap();
        assert_eq!(all(&state).unwrap().last(), Some(&Event::Torn { bytes, sha256 }));
    }
    // A crash right after a new file was begun, with nothing of its first record.
    let log = AuditLog {
        max_file: 1,
        ..AuditLog::open(&state).unwrap()
    };
    std::fs::File::create(file_name(&state.audit_dir(), 5)).unwrap();
    log.append(terms(7)).unwrap();
    log.append(terms(8)).unwrap();
    let events = all(&state).unwrap();
    assert_eq!(events[4..], [terms(7), terms(8)]);
}

#[test]
fn a_log_whose_end_was_changed_is_not_continued() {
    let (_dir, state) = state();
    AuditLog::open(&state).unwrap().append(terms(1)).unwrap();
    let path = files(&state.audit_dir()).unwrap().pop().unwrap().path;
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replacen('.', ".e30", 1)).unwrap();
    let error = AuditLog::open(&state).err().unwrap();
    assert!(
        matches!(
            error,
            AuditLogError::End {
                cause: AuditError::Signature(_),
                ..
            }
        ),
        "{error}"
    );
    std::fs::write(&path, text).unwrap();
    std::fs::remove_file(state.audit_key()).unwrap();
    let error = AuditLog::open(&state).err().unwrap();
    assert!(matches!(error, AuditLogError::KeyMissing { .. }), "{error}");
    assert!(!state.audit_key().exists(), "no other key is made");
}

#[test]
fn very_many_refusals_of_one_host_are_counted() {
    let (_dir, state) = state();
    let log = AuditLog::open(&state).unwrap();
    let start = Instant::now();
    for _ in 0..MAX_REFUSALS {
        assert_eq!(log.count_refusal("a", start), Some(0));
    }
    assert_eq!(
        (log.count_refusal("a", start), log.count_refusal("a", start)),
        (None, None)
    );
    assert_eq!(log.count_refusal("b", start), Some(0), "another host");
    assert_eq!(log.count_refusal("a", start + WINDOW), Some(2));
    for _ in 0..100 {
        log.append_refusal(refused("c")).unwrap();
    }
    assert_eq!(all(&state).unwrap().len(), usize::try_from(MAX_REFUSALS).unwrap());
}
