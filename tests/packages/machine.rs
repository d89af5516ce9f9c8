//! A machine with systemd, as an operator gets it: nothing of Assay on it but the packages' files.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use assay_tests::HarnessError;
use assay_tests::guest::{Ended, Guest};
use assay_tests::vm::{Image, Variant, Vm};

use crate::built::{package, told};

/// The agent starts, and the host is judged, within this, on a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(600);
/// The names that the README has for the two machines, of which there is one here.
const NAMES: &str = "127.0.0.1 verifier.example dom0-1.example";

/// The image that all of these tests boot.
pub fn image() -> Result<Image, HarnessError> {
    Ok(Image::load()?.booted(Variant::Systemd))
}

/// The machine, with both packages in /root.
pub fn machine() -> Result<Vm, HarnessError> {
    let vm = Vm::restore(&image()?)?;
    let guest = vm.guest();
    guest.run_with(&["systemctl", "is-system-running", "--wait"], b"", PATIENCE)?;
    guest.script(&format!("echo '{NAMES}' >> /etc/hosts"))?;
    for program in ["assay-agent", "assay-verifier"] {
        let package = package(program, "_amd64.deb");
        guest.put_file(&format!("/root/{}", name(&package)), 0o644, &package)?;
    }
    Ok(vm)
}

/// The file's name.
pub fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The same package with other words in its control file, and with another program: one that was built anew.
pub fn changed(folder: &Path, package: &Path, field: &str, value: &str) -> PathBuf {
    changed_with(folder, package, field, value, None)
}

/// The same with this program's bytes in place of its own.
pub fn changed_with(folder: &Path, package: &Path, field: &str, value: &str, other: Option<&Path>) -> PathBuf {
    let stem = name(package).replace(".deb", "");
    let tree = folder.join(format!("{stem}-{value}"));
    told(Command::new("dpkg-deb").arg("-R").arg(package).arg(&tree));
    let control = tree.join("DEBIAN/control");
    let text = fs::read_to_string(&control).expect("a control file");
    let start = format!("{field}: ");
    let lines = text.lines().map(|line| {
        if line.starts_with(&start) {
            format!("{start}{value}\n")
        } else {
            format!("{line}\n")
        }
    });
    fs::write(&control, lines.collect::<String>()).expect("the control file");
    for program in ["assay-agent", "assay-verifier"] {
        let program = tree.join("usr/bin").join(program);
        if program.exists() {
            let mut bytes = fs::read(other.unwrap_or(&program)).expect("the program");
            bytes.extend(value.as_bytes());
            fs::write(&program, bytes).expect("the program");
        }
    }
    let made = folder.join(format!("{stem}-{value}.deb"));
    told(
        Command::new("dpkg-deb")
            .args(["--root-owner-group", "-Zgzip", "-z1", "--build"])
            .arg(&tree)
            .arg(&made),
    );
    made
}

/// What systemd knows of a unit.
pub fn property(guest: &Guest, unit: &str, name: &str) -> Result<String, HarnessError> {
    let value = guest.run_ok(&["systemctl", "show", "--value", "-p", name, unit])?;
    Ok(value.trim().to_owned())
}

/// TCP ports that something listens on, by `ss`.
pub fn listening(guest: &Guest) -> Result<Vec<u16>, HarnessError> {
    let text = guest.run_ok(&["ss", "-Htln"])?;
    let port = |line: &str| line.split_whitespace().nth(3)?.rsplit(':').next()?.parse().ok();
    let mut ports: Vec<u16> = text.lines().filter_map(port).collect();
    ports.sort_unstable();
    ports.dedup();
    Ok(ports)
}

/// Runs `dpkg --install` on a package of this machine, which has as long as the agent's start may take; says how long it took.
pub fn install(guest: &Guest, package: &Path) -> Result<Ended, HarnessError> {
    let path = format!("/root/{}", name(package));
    guest.put_file(&path, 0o644, package)?;
    let start = Instant::now();
    let ended = guest.run_with(&["dpkg", "--install", &path], b"", PATIENCE)?;
    println!("{:>6.1} s  dpkg --install {path}", start.elapsed().as_secs_f64());
    Ok(ended)
}

/// Whether there is such a file or folder.
pub fn exists(guest: &Guest, path: &str) -> Result<bool, HarnessError> {
    Ok(guest.run(&["test", "-e", path])?.ok())
}
