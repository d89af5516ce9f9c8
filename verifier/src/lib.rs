//! The customer's side of Assay: asks hosts for evidence, keeps what is known of them, and lets disk keys go only to
//! hosts whose evidence appraises clean.
//!
//! Every judgement is made in `assay-evidence`; this crate carries bytes to it and remembers what it said:
//!
//! * [`pki`] and [`config`]: what `assay-verifier init` makes and every later command reads;
//! * [`store`]: hosts, their logs and the known-good policies, in SQLite;
//! * [`client`] and [`enrol`]: asking agents, and the one moment in which a host's identity is decided;
//! * [`poll`] and [`serve`]: asking every host at an interval, and answering requests for keys;
//! * [`verdicts`] and [`lists`]: what is signed here for relying parties and for hosts;
//! * [`audit`]: the signed log of which key went to whom;
//! * [`leases`]: what a verdict means for the keys that a host holds;
//! * [`keystore`] and [`seal`]: disk keys at rest, and images sealed to them;
//! * [`remote`]: services of others: the server that keeps halves of keys, and the [`image_store`]s;
//! * [`known_good`]: what packages and installed roots bring, as entries of a policy;
//! * [`cli`]: the operator's commands.

pub mod audit;
pub mod cli;
pub mod client;
pub mod config;
pub mod enrol;
pub mod files;
pub mod image_store;
pub mod judge;
pub mod keystore;
pub mod known_good;
pub mod leases;
pub mod lists;
mod memory;
mod nudges;
pub mod pki;
pub mod poll;
pub mod remote;
pub mod seal;
pub mod serve;
pub mod signing;
pub mod store;
pub mod time;
pub mod verdicts;
