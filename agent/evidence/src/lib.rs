//! Evidence: every format that a host and its verifier exchange, and every judgement on it.
//!
//! Nothing here does input or output: bytes, keys and held state go in, a value or a refusal comes out. Each value of
//! the chain [`bundle::Bundle`] → [`quote::VerifiedQuote`] → [`replay::ReplayedLog`] → [`appraise::Appraisal`] can only
//! be made by the check before it; attestation key, nonce, channel binding and the log's PCR are arguments, never read from the
//! evidence itself.
//!
//! Bytes from strangers are read through [`reader::Reader`]: short input is an error, trailing input is an error, and
//! lengths, counts and strings are limited.
#![forbid(unsafe_code)]

pub mod appraise;
pub mod approved;
pub mod audit;
pub mod binding;
pub mod bootlog;
pub mod bundle;
pub mod cel;
pub mod credential;
pub mod digest;
pub mod ear;
pub mod ek;
pub mod event;
pub mod host_port;
pub mod imalog;
pub mod jwe;
pub mod jws;
pub mod luks;
pub mod luks1;
pub mod pcr;
pub mod policy;
pub mod qcow2;
pub mod quote;
pub mod reader;
pub mod release;
pub mod replay;
pub mod terms;
pub mod token;
pub mod tpm;
pub mod uuid;
pub mod vhd;
pub mod wire;

#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod tlv;
