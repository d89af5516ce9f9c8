//! What came out, for the table: one file a row.

use std::path::PathBuf;

use assay_evidence::event::Mode;
use serde_json::{Value, json};

/// A column of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Column {
    /// Assay, in this mode.
    Assay(Mode),
    /// The kernel's IMA with `ima_policy=tcb`, by its own log.
    Ima,
}

/// All modes, in the order in which a scene goes through them: where attacks fail comes first.
pub const MODES: &[Mode] = &[Mode::Enforce, Mode::Hold, Mode::Observe];

impl Column {
    const fn name(self) -> &'static str {
        match self {
            Self::Assay(mode) => mode.name(),
            Self::Ima => "ima",
        }
    }
}

/// How an attack went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It went through, and is in the log.
    Recorded,
    /// It went through, once it was in the log and the TPM's register had it.
    ExtendedFirst,
    /// It was refused and recorded, and goes through when it is tried again: by then the register has it.
    RefusedFirst,
    /// It was refused and recorded.
    Refused,
    /// Neither mode nor log matter: whoever judges finds it.
    Detected,
    /// It fails without anybody's refusal.
    Fails,
    /// It went through, and nobody knows.
    Unseen,
    /// Nothing that this column is meant to answer.
    OutOfScope,
}

impl Outcome {
    const fn text(self) -> &'static str {
        match self {
            Self::Recorded => "recorded",
            Self::ExtendedFirst => "extended first",
            Self::RefusedFirst => "refused until extended",
            Self::Refused => "refused",
            Self::Detected => "detected",
            Self::Fails => "fails",
            Self::Unseen => "not seen",
            Self::OutOfScope => "out of scope",
        }
    }
}

/// A row of the table.
pub struct Row {
    number: u8,
    name: &'static str,
    cells: Vec<Value>,
    notes: Vec<&'static str>,
}

impl Row {
    /// Begins a row; what an earlier run left of it is gone.
    pub fn new(number: u8, name: &'static str) -> Self {
        // There may be none.
        let _ = std::fs::remove_file(file(number));
        Self {
            number,
            name,
            cells: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// A row that is not for the table.
    pub fn unkept(number: u8) -> Self {
        Self {
            number,
            name: "",
            cells: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// One way to play the attack, in one column. `way` is empty where there is only one.
    pub fn set(&mut self, column: Column, way: &str, outcome: Outcome) {
        self.cells
            .push(json!({"column": column.name(), "way": way, "outcome": outcome.text()}));
    }

    /// The same in every mode.
    pub fn set_modes(&mut self, way: &str, outcome: Outcome) {
        for &mode in MODES {
            self.set(Column::Assay(mode), way, outcome);
        }
    }

    /// A sentence below the table: why something is out of scope, or is not what it seems.
    pub fn note(&mut self, text: &'static str) {
        self.notes.push(text);
    }

    /// Leaves it for `cargo xtask test attacks --matrix`.
    pub fn done(self) {
        let row = json!({"row": self.number, "name": self.name, "cells": self.cells, "notes": self.notes});
        let path = file(self.number);
        let folder = path.parent().expect("a folder");
        std::fs::create_dir_all(folder).expect("a folder for the table");
        std::fs::write(&path, row.to_string()).expect("a file for the row");
    }
}

fn file(number: u8) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("../target/assay/attacks/{number:02}.json"))
}
