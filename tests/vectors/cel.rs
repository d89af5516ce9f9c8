//! A canonical event log that another project wrote.

use assay_evidence::cel::{CelError, read_all};

use crate::{base64, read};

#[test]
fn vectors_another_projects_canonical_event_log_is_read_and_its_digests_hold() {
    let text = String::from_utf8(read("cel/go-tpm-tools-cel.b64")).expect("base64 is text");
    let bytes = base64(&text.split_whitespace().collect::<String>());
    let records = read_all(&bytes).expect("a log");
    assert!(!records.is_empty());
    let mut again = Vec::new();
    for (number, record) in (0_u64..).zip(&records) {
        assert_eq!(record.number, number);
        record.check_digests().expect("digests over the exact content");
        assert!(!record.digests.is_empty());
        // Its events are that project's own: ours must not be read into them.
        assert!(matches!(record.events(), Err(CelError::ContentType { .. })));
        again.extend(record.encode());
    }
    assert_eq!(again, bytes, "written again, it is the same");
}
