//! The attack table: what the tests of the layer `attacks` found, and whether the documentation says the same.

use std::fmt::Write as _;
use std::path::PathBuf;

use serde_json::Value;

use crate::run::{Error, io};
use crate::ui::{heading, note};
use crate::workspace::{artifacts, root};

/// Rows of the table.
const ROWS: usize = 34;
/// The columns: as the tests name them, and as people do.
const COLUMNS: [(&str, &str); 4] = [
    ("observe", "Assay, observe"),
    ("hold", "Assay, hold"),
    ("enforce", "Assay, enforce"),
    ("ima", "IMA, `ima_policy=tcb`"),
];
/// Between these two lines of the document stands the table.
const BORDERS: [&str; 2] = ["<!-- table -->\n", "<!-- end of the table -->\n"];

/// Forgets what earlier runs found.
pub fn clear() -> Result<(), Error> {
    let folder = folder()?;
    match std::fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(io(format!("remove {}", folder.display()))(error))
        }
        _ => Ok(()),
    }
}

/// Prints the table. The document must have it as it is; with `update`, it gets it.
pub fn show(whole: bool, update: bool) -> Result<(), Error> {
    let rows = rows()?;
    let text = table(&rows);
    heading("attack table");
    print!("{text}");
    if !whole {
        note(&format!(
            "{} of {ROWS} rows; the document is compared with all of them",
            rows.len()
        ));
        return Ok(());
    }
    if rows.len() != ROWS {
        return Err(Error::Tests(format!(
            "the tests left {} rows of the attack table, and it has {ROWS}",
            rows.len()
        )));
    }
    compare(&text, update)
}

fn compare(text: &str, update: bool) -> Result<(), Error> {
    let path = root().join("agent/docs/attacks.md");
    let document = std::fs::read_to_string(&path).map_err(io(format!("read {}", path.display())))?;
    let [begin, end] = BORDERS;
    let parts = document
        .split_once(begin)
        .and_then(|(before, rest)| Some((before, rest.split_once(end)?)));
    let Some((before, (held, after))) = parts else {
        return Err(Error::Missing(format!(
            "{} has no place for the attack table",
            path.display()
        )));
    };
    if held == text {
        return Ok(());
    }
    if update {
        let document = format!("{before}{begin}{text}{end}{after}");
        return std::fs::write(&path, document).map_err(io(format!("write {}", path.display())));
    }
    Err(Error::Tests(format!(
        "{} has another table than the one above: look at what changed, and if it is right, run `cargo xtask test attacks --matrix --update`",
        path.display()
    )))
}

fn folder() -> Result<PathBuf, Error> {
    Ok(artifacts()?.join("attacks"))
}

/// What the tests left, in the order of the rows.
fn rows() -> Result<Vec<Value>, Error> {
    let folder = folder()?;
    let listed = std::fs::read_dir(&folder).map_err(io(format!("list {}", folder.display())))?;
    let mut files: Vec<PathBuf> = listed.flatten().map(|entry| entry.path()).collect();
    files.sort();
    let read = |path: &PathBuf| {
        let action = || format!("read {}", path.display());
        let text = std::fs::read(path).map_err(io(action()))?;
        serde_json::from_slice(&text).map_err(|error| io(action())(error.into()))
    };
    files.iter().map(read).collect()
}

fn table(rows: &[Value]) -> String {
    let mut text = "| # | attack |".to_owned();
    for (_, title) in COLUMNS {
        let _infallible = write!(text, " {title} |");
    }
    text.push_str("\n|---|---|---|---|---|---|\n");
    let mut notes = String::new();
    for row in rows {
        let word = |member: &str| row.get(member).and_then(Value::as_str).unwrap_or_default();
        let number = row.get("row").and_then(Value::as_u64).unwrap_or_default();
        let _infallible = write!(text, "| {number} | {} |", word("name"));
        for (column, _) in COLUMNS {
            let _infallible = write!(text, " {} |", cell(row, column));
        }
        text.push('\n');
        for note in list(row, "notes").iter().filter_map(Value::as_str) {
            let _infallible = writeln!(notes, "* {number}: {note}");
        }
    }
    if !notes.is_empty() {
        let _infallible = write!(text, "\n{notes}");
    }
    text
}

/// What came out in a column, the ways of one outcome together.
fn cell(row: &Value, column: &str) -> String {
    let mut outcomes: Vec<(&str, Vec<&str>)> = Vec::new();
    for cell in list(row, "cells") {
        let word = |member: &str| cell.get(member).and_then(Value::as_str).unwrap_or_default();
        if word("column") != column {
            continue;
        }
        match outcomes.iter_mut().find(|(outcome, _)| *outcome == word("outcome")) {
            Some((_, ways)) => ways.push(word("way")),
            None => outcomes.push((word("outcome"), vec![word("way")])),
        }
    }
    match outcomes.as_slice() {
        [] => "-".to_owned(),
        [(outcome, _)] => (*outcome).to_owned(),
        several => {
            let texts: Vec<String> = several
                .iter()
                .map(|(outcome, ways)| format!("**{outcome}**: {}", ways.join(", ")))
                .collect();
            texts.join("; ")
        }
    }
}

fn list<'a>(value: &'a Value, member: &str) -> &'a [Value] {
    value.get(member).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn ways_of_one_outcome_stand_together() {
        let cells = |outcomes: [&str; 3]| {
            let cells: Vec<Value> = ["a", "b", "c"]
                .iter()
                .zip(outcomes)
                .map(|(way, outcome)| json!({"column": "hold", "way": way, "outcome": outcome}))
                .collect();
            cell(&json!({"cells": cells}), "hold")
        };
        assert_eq!(cells(["refused", "refused", "refused"]), "refused");
        assert_eq!(
            cells(["refused", "recorded", "refused"]),
            "**refused**: a, c; **recorded**: b"
        );
        assert_eq!(cell(&json!({"cells": []}), "hold"), "-");
    }

    #[test]
    fn the_document_has_a_place_for_the_table() {
        let path = root().join("agent/docs/attacks.md");
        let document = std::fs::read_to_string(path).unwrap_or_default();
        let rows = (1..=ROWS).filter(|row| document.contains(&format!("\n| {row} | ")));
        assert_eq!(rows.count(), ROWS);
        for border in BORDERS {
            assert_eq!(document.matches(border).count(), 1, "{border}");
        }
    }
}
