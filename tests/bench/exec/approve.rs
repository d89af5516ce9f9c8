//! The approved list of a machine in enforce mode: what runs in it, what the benchmark uses, and everything that the
//! workload will make. Signed as a verifier signs it, and brought to the machine by the agent's own command.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use assay_evidence::approved::ListDraft;
use assay_evidence::digest::Sha256Digest;
use assay_tests::guest::Guest;
use assay_tests::tiny;
use assay_verifier::cli::init;
use assay_verifier::config::StateDir;
use assay_verifier::lists;

use crate::Outcome;
use crate::alone;
use crate::figures;

/// Hashing some megabytes, under emulation and load.
const TIMEOUT: Duration = Duration::from_secs(600);

/// Joins the machine to a verifier that is nowhere, and gives it a list.
pub fn workload(guest: &Guest) -> Outcome<()> {
    let folder = tempfile::tempdir()?;
    let state = StateDir::new(folder.path().join("verifier"));
    init::create(&state, &"https://127.0.0.1:1".parse()?, None)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let draft = ListDraft {
        policy: "bench".to_owned(),
        host: None,
        serial: now,
        issued: now,
        expires: None,
        digests: in_use(guest)?.into_iter().chain(of_workload()).collect(),
    };
    let list = draft.sign(&lists::read_key(&state)?)?;
    guest.put_file("/root/join.json", 0o600, &state.join_file())?;
    guest.put("/root/list.jws", 0o600, list.as_bytes())?;
    guest.run_ok(&["assay-agent", "join", "/root/join.json"])?;
    guest.run_ok(&["assay-agent", "approve", "/root/list.jws"])?;
    Ok(())
}

/// What runs, and what the benchmark runs, with all libraries; the rest of the disk would take emulation minutes to hash.
fn in_use(guest: &Guest) -> Outcome<Vec<Sha256Digest>> {
    let script = "programs=$(which bash rm mkdir sync cat dmesg grep tail sha256sum assay-agent assay-load assay-guest)
         { echo $programs; ldd $programs; cat /proc/[0-9]*/maps; echo /usr/lib/assay/*; } |
             grep -oE '/(usr|lib|bin)[^ :]*' | xargs readlink -e | sort -u | xargs sha256sum | cut -c1-64";
    let ended = guest.run_with(&["bash", "-c", script], b"", TIMEOUT)?;
    let digests = ended.stdout.lines().map(str::parse).collect::<Result<Vec<_>, _>>()?;
    if digests.is_empty() {
        return Err(format!("hashing what is in use: {ended}").into());
    }
    Ok(digests)
}

fn of_workload() -> impl Iterator<Item = Sha256Digest> {
    let programs = figures::programs().chain(alone::programs());
    let digests = programs.map(|(number, size)| Sha256Digest::of(&tiny::program(size, number)));
    digests.chain([Sha256Digest::of(&alone::MAPPED)])
}
