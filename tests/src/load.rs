//! What the workload program `assay-load` says of its work: one JSON object on standard output. One definition for the
//! program in the machine and the benchmark outside.

use serde::{Deserialize, Serialize};

/// Programs that were started, each waited for to its end.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Started {
    /// From the first start to the last end, in nanoseconds.
    pub wall_ns: u64,
    /// For each program that ran, in the order of starting where one followed another: from its start to its end, in
    /// nanoseconds.
    pub ns: Vec<u64>,
    /// Numbers of the programs that the kernel refused to start, with the errno.
    pub refused: Vec<(u64, i32)>,
}

/// What a flood came to.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Flooded {
    /// How long it lasted, in nanoseconds.
    pub wall_ns: u64,
    /// Loads that the kernel let through: programs that ran to their end, or mappings.
    pub done: u64,
    /// Loads that it refused.
    pub refused: u64,
    /// Numbers of the programs that were new and ran.
    pub new: Vec<u64>,
}

/// The name of a program that `assay-load` makes in the folder it was given.
pub fn name(number: u64) -> String {
    format!("p{number:08}")
}
