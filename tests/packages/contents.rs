//! What is in the packages, by dpkg-deb, rpm and sha256sum.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::built::{again, files, folder, package, told};

const PROGRAMS: [&str; 2] = ["assay-agent", "assay-verifier"];
/// What the agent's packages have to bring; paths below `/`.
const AGENT: &[&str] = &[
    "etc/assay/agent.toml",
    "usr/bin/assay-agent",
    "usr/lib/assay/assay-ebpf-probe.o",
    "usr/lib/assay/assay-ebpf.o",
    "usr/lib/dracut/modules.d/90assay/module-setup.sh",
    "usr/lib/modules-load.d/assay.conf",
    "usr/lib/systemd/system-preset/85-assay-agent.preset",
    "usr/lib/systemd/system/assay-agent.service",
    "usr/lib/systemd/system/assay-disk@.service",
    "usr/lib/systemd/system/assay-early.service",
    "usr/lib/systemd/system/assay-grub.path",
    "usr/lib/systemd/system/assay-grub.service",
    "usr/share/assay/hooks/assay_keys.py",
    "usr/share/assay/hooks/libvirt",
    "usr/share/bash-completion/completions/assay-agent",
    "usr/share/doc/assay-agent/CHANGELOG.md",
    "usr/share/doc/assay-agent/LICENSE-MIT",
    "usr/share/man/man5/agent.toml.5.gz",
    "usr/share/man/man8/assay-agent-doctor.8.gz",
    "usr/share/man/man8/assay-agent-unlock.8.gz",
    "usr/share/man/man8/assay-agent.8.gz",
];
/// And on Debian, for the other maker of initramfs files.
const DEBIAN_AGENT: &[&str] = &[
    "usr/share/initramfs-tools/hooks/assay",
    "usr/share/initramfs-tools/scripts/init-top/assay",
];
/// And the verifier's.
const VERIFIER: &[&str] = &[
    "usr/bin/assay-verifier",
    "usr/lib/systemd/system/assay-verifier.service",
    "usr/lib/sysusers.d/assay-verifier.conf",
    "usr/lib/tmpfiles.d/assay-verifier.conf",
    "usr/share/man/man5/assay-verifier.toml.5.gz",
    "usr/share/man/man8/assay-verifier-image-seal.8.gz",
    "usr/share/man/man8/assay-verifier.8.gz",
];
/// What is run; all else is read.
const RUN: [&str; 3] = ["usr/bin/", "usr/share/initramfs-tools/", "/module-setup.sh"];
/// Folders of other packages, without which no system is (`filesystem`, `systemd`).
const SHARED_FOLDERS: &[&str] = &[
    "usr",
    "usr/bin",
    "usr/lib",
    "usr/lib/modules-load.d",
    "usr/lib/systemd",
    "usr/lib/systemd/system",
    "usr/lib/systemd/system-preset",
    "usr/lib/sysusers.d",
    "usr/lib/tmpfiles.d",
    "usr/share",
    "usr/share/doc",
    "usr/share/man",
    "usr/share/man/man5",
    "usr/share/man/man8",
];
/// RPMs for Enterprise Linux 10.
const EL10: &str = ".el10.x86_64.rpm";
/// Largest RPM of the agent in bytes.
pub const LIMIT: u64 = 12 << 20;

fn wanted(program: &str) -> &'static [&'static str] {
    if program == "assay-agent" { AGENT } else { VERIFIER }
}

#[test]
fn packages_of_the_same_sources_are_the_same_bytes() {
    let (once, twice) = (files(&folder()), files(&again()));
    let names = |list: &[PathBuf]| {
        list.iter()
            .map(|path| path.file_name().map(Into::into))
            .collect::<Vec<Option<std::ffi::OsString>>>()
    };
    assert_eq!(names(&once), names(&twice));
    assert_eq!(once.len(), 9, "{once:?}");
    for (one, other) in once.iter().zip(&twice) {
        let same = fs::read(one).expect("a package") == fs::read(other).expect("a package");
        assert!(same, "{} is not what it was before", one.display());
    }
}

#[test]
fn checksums_are_those_of_the_files() {
    let text = told(
        Command::new("sha256sum")
            .args(["--check", "--strict", "SHA256SUMS"])
            .current_dir(folder()),
    );
    assert_eq!(text.lines().count(), 8, "{text}");
}

/// Every file is there, with its mode and these owners; what lists it begins each path so.
fn assert_listed<'a>(listed: &str, paths: impl IntoIterator<Item = &'a &'a str>, owners: &str, root: &str) {
    for path in paths {
        let line = listed.lines().find(|line| line.ends_with(&format!("{root}{path}")));
        assert!(line.is_some(), "{path} is missing: {listed}");
        let mode = if RUN.iter().any(|part| path.contains(part)) {
            "-rwxr-xr-x"
        } else {
            "-rw-r--r--"
        };
        let line = line.unwrap_or_default();
        assert!(line.starts_with(&format!("{mode} {owners} ")), "{line}");
    }
}

#[test]
fn debian_packages_hold_what_a_host_needs() {
    for program in PROGRAMS {
        let deb = package(program, "_amd64.deb");
        let listed = told(Command::new("dpkg-deb").arg("--contents").arg(&deb));
        let more = if program == "assay-agent" { DEBIAN_AGENT } else { &[] };
        assert_listed(&listed, wanted(program).iter().chain(more), "root/root", " ./");
        let field = |name: &str| told(Command::new("dpkg-deb").arg("--field").arg(&deb).arg(name));
        assert_eq!(field("Package").trim(), program);
        let depends = field("Depends");
        assert!(
            depends.contains("libc6 (>= 2.") && depends.contains("libcryptsetup12"),
            "{depends}"
        );
        assert_eq!(depends.contains("libtss2-esys"), program == "assay-agent", "{depends}");
    }
    let conffiles = told(
        Command::new("dpkg-deb")
            .args(["--info"])
            .arg(package("assay-agent", "_amd64.deb"))
            .arg("conffiles"),
    );
    assert_eq!(conffiles.trim(), "/etc/assay/agent.toml");
}

#[test]
fn rpms_hold_what_a_host_needs() {
    for program in PROGRAMS {
        let rpm = package(program, EL10);
        let query = |what: &[&str]| told(Command::new("rpm").arg("-qp").args(what).arg(&rpm));
        let listed = query(&[
            "--qf",
            "[%{FILEMODES:perms} %{FILEUSERNAME}:%{FILEGROUPNAME} %{FILENAMES}\n]",
        ]);
        assert_listed(&listed, wanted(program), "root:root", " /");
        assert!(!listed.contains("initramfs-tools"), "{listed}");
        // Nothing of this machine: not its name, not the folders that the programs were built in.
        assert_eq!(query(&["--qf", "%{BUILDHOST}"]), "assay");
        let requires = query(&["--requires"]);
        assert!(requires.contains("libcryptsetup.so.12()(64bit)"), "{requires}");
        assert_eq!(
            requires.contains("libtss2-esys.so.0()(64bit)"),
            program == "assay-agent",
            "{requires}"
        );
        assert!(!requires.contains("libbpf"), "{requires}");
    }
    let agent = package("assay-agent", EL10);
    assert_eq!(
        told(Command::new("rpm").arg("-qpc").arg(&agent)).trim(),
        "/etc/assay/agent.toml"
    );
    let size = fs::metadata(&agent).expect("the package").len();
    assert!(size <= LIMIT, "{size} bytes");
    println!("the agent's RPM has {size} bytes");
}

/// This folder and every one below it, as paths in the root.
fn folders(root: &Path, folder: &Path, found: &mut BTreeSet<PathBuf>) {
    found.insert(folder.to_owned());
    for path in files(&root.join(folder)) {
        if path.is_dir() {
            folders(root, path.strip_prefix(root).expect("a path in the root"), found);
        }
    }
}

#[test]
fn rpms_install_into_an_empty_root_and_verify() {
    let root = tempfile::tempdir().expect("a folder");
    // Its libraries and the shell that its scripts want are not in there.
    let rpm = |words: &[&str]| {
        let mut rpm = Command::new("rpm");
        rpm.arg("--root").arg(root.path()).args(words);
        rpm
    };
    told(
        rpm(&["--install", "--nodeps", "--noscripts", "--nosignature", "--ignorearch"])
            .arg(package("assay-agent", EL10))
            .arg(package("assay-verifier", EL10)),
    );
    told(&mut rpm(&[
        "--verify",
        "--nodeps",
        "--noscripts",
        "assay-agent",
        "assay-verifier",
    ]));
    for path in AGENT.iter().chain(VERIFIER) {
        assert!(root.path().join(path).is_file(), "{path}");
    }
    told(&mut rpm(&["--erase", "--nodeps", "--noscripts", "assay-verifier"]));
    // What somebody changed is told, and kept.
    let config = root.path().join("etc/assay/agent.toml");
    fs::write(&config, "[measure]\nmode = \"hold\"\n").expect("the configuration");
    told(&mut rpm(&["--erase", "--nodeps", "--noscripts", "assay-agent"]));
    assert!(root.path().join("etc/assay/agent.toml.rpmsave").is_file());
    assert!(!root.path().join("usr/bin/assay-agent").exists());
    // Folders that were made for both are gone with them.
    let mut left = BTreeSet::new();
    folders(root.path(), Path::new("usr"), &mut left);
    left.retain(|folder| !SHARED_FOLDERS.iter().any(|shared| Path::new(shared) == folder));
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn programs_do_not_tell_where_they_were_built() {
    let here = env!("CARGO_MANIFEST_DIR").trim_end_matches("/tests");
    let home = std::env::var("HOME").unwrap_or_default();
    for program in PROGRAMS {
        let root = tempfile::tempdir().expect("a folder");
        let deb = package(program, "_amd64.deb");
        told(Command::new("dpkg-deb").arg("--extract").arg(deb).arg(root.path()));
        let bytes = fs::read(root.path().join("usr/bin").join(program)).expect("the program");
        for path in [format!("{here}/"), format!("{home}/.cargo/")] {
            let found = bytes.windows(path.len()).any(|window| window == path.as_bytes());
            assert!(!found, "{program} holds {path}");
        }
    }
}

#[test]
fn the_bill_of_materials_names_what_the_programs_are_made_of() {
    let text = fs::read_to_string(folder().join("assay.cdx.json")).expect("the bill of materials");
    let document: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(
        (&document["bomFormat"], &document["specVersion"]),
        (&"CycloneDX".into(), &"1.5".into())
    );
    let components = document["components"].as_array().expect("components");
    let of = |name: &str| components.iter().find(|component| component["name"] == name);
    for name in ["aya", "tss-esapi", "rustls", "assay-evidence"] {
        let component = of(name).unwrap_or_else(|| panic!("{name} is missing"));
        let purl = component["purl"].as_str().unwrap_or_default();
        assert!(purl.starts_with(&format!("pkg:cargo/{name}@")), "{purl}");
        let hash = component["hashes"][0]["content"].as_str().map(str::len);
        assert_eq!(hash, (!name.starts_with("assay")).then_some(64), "{component}");
    }
    // What only tests are made of is not in the programs.
    assert!(of("proptest").is_none() && of("libfuzzer-sys").is_none());
}
