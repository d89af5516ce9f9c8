//! What the manual says of the source is checked against the source.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::workspace::root;

/// The names of all functions below this folder.
fn functions(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            functions(&path, found);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let names = text
                .split("fn ")
                .skip(1)
                .filter_map(|rest| rest.split(['(', '<']).next());
            found.extend(names.map(str::to_owned));
        }
    }
}

#[test]
fn every_test_that_the_manual_names_exists() {
    let mut found = BTreeSet::new();
    for folder in ["agent", "verifier", "tests", "xtask"] {
        functions(&root().join(folder), &mut found);
    }
    let text = fs::read_to_string(root().join("agent/docs/past-failures.md")).unwrap();
    let rows = text
        .lines()
        .filter(|line| line.starts_with("| ") && !line.contains("| tests |"));
    let (mut rows_seen, mut names_seen) = (0, 0);
    for row in rows {
        let tests = row.trim_end_matches('|').rsplit('|').next().unwrap_or_default();
        let names: Vec<&str> = tests.split('`').skip(1).step_by(2).collect();
        assert!(!names.is_empty(), "no test is named: {row}");
        for name in &names {
            assert!(found.contains(*name), "there is no test {name}");
        }
        rows_seen += 1;
        names_seen += names.len();
    }
    assert!(
        rows_seen > 15 && names_seen > 30,
        "{rows_seen} rows, {names_seen} names"
    );
}
