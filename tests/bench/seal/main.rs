//! `cargo xtask bench seal [MIB]`: sealing a disk, beside `qemu-img convert` into LUKS of the same disk, in turns.
//!
//! Half of the disk is random and half of it zero, in pieces of a MiB. Both programs write all of it and then leave it to the system; ours
//! also waits until it is on the disk, as a seal does, and that wait is part of its time.
#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::error::Error;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use assay_evidence::digest::Sha256Digest;
use assay_verifier::keystore::{FileKeyStore, create_master};
use assay_verifier::seal::{self, Format, Request, Terms};

const MIB: usize = 1024 * 1024;
const DEFAULT_MIB: usize = 1024;
/// The middle one counts.
const ROUNDS: usize = 5;

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> Outcome<()> {
    // `--bench` is what cargo adds.
    let word = std::env::args().skip(1).find(|word| word != "--bench");
    let mib = word.map_or(Ok(DEFAULT_MIB), |word| word.parse())?;
    let folder = tempfile::tempdir()?;
    let (disk, key) = (folder.path().join("disk.raw"), folder.path().join("key"));
    write_disk(&disk, mib)?;
    std::fs::write(&key, "0123456789abcdef".repeat(4))?;
    create_master(folder.path())?;
    let keys = FileKeyStore::open(folder.path())?;

    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    for _ in 0..ROUNDS {
        let out = folder.path().join("disk.luks");
        theirs.push(timed(|| qemu_img(&disk, &key, &out))?);
        std::fs::remove_file(&out)?;
        ours.push(timed(|| seal(&disk, &out, &keys))?);
        std::fs::remove_file(&out)?;
    }
    let rate = |times: &mut Vec<Duration>| {
        times.sort();
        let middle = times.get(ROUNDS / 2).copied().unwrap_or_default();
        #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
        let rate = mib as f64 / middle.as_secs_f64();
        rate
    };
    let (ours, theirs) = (rate(&mut ours), rate(&mut theirs));
    println!("disk of {mib} MiB, half random, {ROUNDS} rounds in turns, median");
    println!("image seal                {ours:8.0} MiB/s, on the disk when it ends");
    println!("qemu-img convert -O luks  {theirs:8.0} MiB/s");
    println!(
        "ratio                     {:8.2}, ours to theirs: at least 0.80 is wanted, above 1 is faster than qemu-img",
        ours / theirs
    );
    Ok(())
}

fn timed(work: impl FnOnce() -> Outcome<()>) -> Outcome<Duration> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed())
}

fn write_disk(path: &Path, mib: usize) -> io::Result<()> {
    let mut disk = File::create(path)?;
    let mut random = File::open("/dev/urandom")?;
    let mut piece = vec![0; MIB];
    for number in 0..mib {
        if number.is_multiple_of(2) {
            piece.fill(0);
        } else {
            random.read_exact(&mut piece)?;
        }
        disk.write_all(&piece)?;
    }
    disk.sync_all()
}

fn qemu_img(disk: &Path, key: &Path, out: &Path) -> Outcome<()> {
    let status = Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "luks", "--object"])
        .arg(format!("secret,id=key,file={}", key.display()))
        .args(["-o", "key-secret=key,cipher-alg=aes-256,cipher-mode=xts,iter-time=1"])
        .args([disk, out])
        .status()?;
    if status.success() {
        return Ok(());
    }
    Err(format!("qemu-img: {status}").into())
}

fn seal(disk: &Path, out: &Path, keys: &FileKeyStore) -> Outcome<()> {
    let request = Request {
        input: disk,
        input_format: None,
        output: out,
        format: Format::Luks2,
        terms: Terms {
            policy: "default",
            tags: &[],
            verifiers: &["https://verifier.example:8440".to_owned()],
            verifier_spki_sha256: Sha256Digest::ZERO,
            recovery: None,
            now: 0,
        },
    };
    seal::seal(&request, keys, &mut |_, _| {})?;
    Ok(())
}
