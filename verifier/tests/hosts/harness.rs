//! What the harness promises of the verifiers that it starts for machines.

use std::net::TcpListener;
use std::path::Path;

use assay_evidence::wire::JoinFile;
use assay_tests::verifier::Verifier;

use crate::site::PROGRAM;

#[test]
fn a_verifier_is_up_when_it_is_the_one_that_listens() {
    let mut verifier = Verifier::start(Path::new(PROGRAM)).unwrap();
    let join: JoinFile = serde_json::from_slice(&std::fs::read(verifier.join_file()).unwrap()).unwrap();
    let port: u16 = join.verifiers[0].rsplit(':').next().unwrap().parse().unwrap();
    verifier.stop();
    // Somebody else answers there now.
    let other = TcpListener::bind(("127.0.0.1", port)).unwrap();
    let refused = verifier.resume().unwrap_err().to_string();
    assert!(refused.contains("the verifier did not listen"), "{refused}");
    drop(other);
    verifier.resume().unwrap();
}
