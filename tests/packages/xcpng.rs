//! The agent for XCP-ng 8.3: everything that dom0's age asks of it, on the built file.
//!
//! glibc 2.17 itself cannot be had here. What a program wants of its C library is written in it, and is read from there.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use assay_tests::HarnessError;
use assay_tests::swtpm::Swtpm;
use assay_tests::verifier::Verifier;

use crate::built::{files, folder, package, succeeds, told};

/// The agent's RPM for XCP-ng 8.3.
const RPM: &str = ".xcpng8.3.x86_64.rpm";
/// The newest version of each that CentOS 7 has.
const NEWEST: [(&str, &[u32]); 2] = [("GLIBC_", &[2, 17]), ("LIBUDEV_", &[189])];
/// Libraries of CentOS 7's glibc and systemd-libs, which every dom0 has.
const BASE: [&str; 9] = [
    "ld-linux-x86-64.so.2",
    "libc.so.6",
    "libdl.so.2",
    "libm.so.6",
    "libpthread.so.0",
    "libresolv.so.2",
    "librt.so.1",
    "libudev.so.1",
    "libutil.so.1",
];
/// What rpm 4.11.3 knows of packages (lib/rpmds.c), of what rpmbuild has named since.
const RPMLIB: [&str; 4] = [
    "rpmlib(CompressedFileNames)",
    "rpmlib(FileDigests)",
    "rpmlib(PayloadFilesHavePrefix)",
    "rpmlib(PayloadIsXz)",
];
/// The first x86-64 processors, as QEMU plays them: qemu64 without what came later.
const FIRST_X86_64: &str = "qemu64,-pni,-cx16,-lahf-lm,-svm";
/// Settings of systemd 219 (its man pages systemd.unit, .service, .exec, .kill).
const SETTINGS_219: &[&str] = &[
    "After",
    "Before",
    "CapabilityBoundingSet",
    "ConditionPathExists",
    "Conflicts",
    "DefaultDependencies",
    "Description",
    "Documentation",
    "Environment",
    "ExecStart",
    "ExecStop",
    "LimitMEMLOCK",
    "LimitNOFILE",
    "NoNewPrivileges",
    "NotifyAccess",
    "OOMScoreAdjust",
    "PathChanged",
    "PrivateNetwork",
    "PrivateTmp",
    "ProtectHome",
    "RemainAfterExit",
    "Requires",
    "Restart",
    "RestartSec",
    "RestrictAddressFamilies",
    "SendSIGKILL",
    "SystemCallArchitectures",
    "TimeoutStartSec",
    "Type",
    "UMask",
    "WantedBy",
    "Wants",
    "WatchdogSec",
];

/// What the package installs, in a folder.
pub fn unpacked() -> tempfile::TempDir {
    let root = tempfile::tempdir().expect("a folder");
    told(
        Command::new("bsdtar")
            .arg("-xf")
            .arg(package("assay-agent", RPM))
            .arg("-C")
            .arg(root.path()),
    );
    root
}

/// Every file below a folder.
fn all(below: &Path, found: &mut Vec<PathBuf>) {
    for path in files(below) {
        if path.is_dir() {
            all(&path, found);
        } else {
            found.push(path);
        }
    }
}

/// The ELF files for this processor in the package.
fn programs(root: &Path) -> Vec<PathBuf> {
    const X86_64: u8 = 62;
    let mut found = Vec::new();
    all(root, &mut found);
    found.retain(|path| {
        let bytes = fs::read(path).expect("a file of the package");
        bytes.starts_with(b"\x7fELF") && bytes.get(18) == Some(&X86_64)
    });
    assert!(found.contains(&root.join("usr/bin/assay-agent")), "{found:?}");
    found
}

/// Versions such as GLIBC_2.17 that a program asks its libraries for.
fn versions(program: &Path) -> BTreeSet<String> {
    let text = told(Command::new("readelf").arg("-VW").arg(program));
    let names = text.split("Name: ").skip(1);
    names
        .filter_map(|rest| rest.split_whitespace().next())
        .map(str::to_owned)
        .collect()
}

/// Does CentOS 7 have this version?
fn is_there(version: &str) -> bool {
    NEWEST.iter().any(|(name, newest)| {
        version.strip_prefix(name).is_some_and(|numbers| {
            let numbers: Result<Vec<u32>, _> = numbers.split('.').map(str::parse).collect();
            numbers.is_ok_and(|numbers| numbers.as_slice() <= *newest)
        })
    })
}

#[test]
fn xcpng_programs_want_nothing_newer_than_glibc_2_17() {
    let root = unpacked();
    for program in programs(root.path()) {
        let versions = versions(&program);
        assert!(versions.contains("GLIBC_2.2.5"), "{versions:?}");
        let newer: Vec<_> = versions.iter().filter(|version| !is_there(version)).collect();
        assert!(newer.is_empty(), "{} wants {newer:?}", program.display());
        // A symbol without a version is taken from whatever library has it; without one that has it, only a weak one is forgiven.
        let symbols = told(Command::new("nm").args(["-D", "--undefined-only"]).arg(&program));
        for line in symbols.lines().filter(|line| !line.contains('@')) {
            assert!(line.trim_start().starts_with("w "), "{}: {line}", program.display());
        }
    }
    // The reading of this test finds what is newer: this very program is of a newer C library.
    let here = std::env::current_exe().expect("a path");
    let versions = versions(&here);
    assert!(versions.iter().any(|version| !is_there(version)), "{versions:?}");
}

#[test]
fn xcpng_programs_want_only_libraries_that_every_dom0_has() {
    let root = unpacked();
    for program in programs(root.path()) {
        let text = told(Command::new("readelf").arg("-dW").arg(&program));
        for line in text.lines().filter(|line| line.contains("(NEEDED)")) {
            let name = line.split(['[', ']']).nth(1).unwrap_or_default();
            assert!(BASE.contains(&name), "{} wants {name}", program.display());
        }
        assert!(!text.contains("RPATH") && !text.contains("RUNPATH"), "{text}");
    }
}

/// A program on the first x86-64 processor.
fn first_x86_64(program: &Path) -> Command {
    let mut qemu = Command::new("qemu-x86_64");
    qemu.args(["-cpu", FIRST_X86_64]).arg(program);
    qemu
}

#[test]
fn xcpng_program_runs_on_the_first_x86_64_processors() {
    let root = unpacked();
    let agent = root.path().join("usr/bin/assay-agent");
    let version = told(first_x86_64(&agent).arg("--version"));
    assert_eq!(version.trim(), concat!("assay-agent ", env!("CARGO_PKG_VERSION")));

    // The emulated processor refuses what came later: a program made for the next level ends there.
    let source = root.path().join("later.c");
    fs::write(
        &source,
        "int main(int n, char **v) { (void)v; return __builtin_popcount(n) - 1; }\n",
    )
    .expect("a source");
    let later = root.path().join("later");
    told(
        Command::new("gcc")
            .args(["-O2", "-march=x86-64-v2", "-o"])
            .args([&later, &source]),
    );
    assert!(succeeds(&mut Command::new(&later)));
    assert!(!succeeds(&mut first_x86_64(&later)), "{FIRST_X86_64} has popcnt");
}

/// tpm2-tss and OpenSSL in it, and ring, on that processor: it makes its keys in a TPM and joins a verifier.
#[test]
fn xcpng_program_joins_with_a_tpm_on_the_first_x86_64_processors() -> Result<(), HarnessError> {
    let root = unpacked();
    told(
        Command::new("dpkg-deb")
            .arg("--extract")
            .arg(package("assay-verifier", "_amd64.deb"))
            .arg(root.path().join("verifier")),
    );
    let verifier = Verifier::start(&root.path().join("verifier/usr/bin/assay-verifier"))?;
    let tpm = Swtpm::start()?;
    let (config, state) = (root.path().join("agent.toml"), root.path().join("state"));
    fs::create_dir(&state).expect("a folder");
    let text = format!(
        "state_dir = {state:?}\nrun_dir = {:?}\n[tpm]\ntcti = {:?}\n",
        root.path().join("run"),
        tpm.tcti()
    );
    fs::write(&config, text).expect("a configuration");
    let mut join = first_x86_64(&root.path().join("usr/bin/assay-agent"));
    let said = told(join.arg("--config").arg(&config).arg("join").arg(verifier.join_file()));
    assert!(said.contains("joined: this host has a new TLS key"), "{said}");
    // Another program finds the attestation key where the agent says that it is.
    let key = told(
        Command::new("tpm2_readpublic")
            .args(["-Q", "-c", "0x81010A55", "-f", "pem", "-o", "/dev/stdout"])
            .env("TPM2TOOLS_TCTI", tpm.tcti()),
    );
    assert!(key.starts_with("-----BEGIN PUBLIC KEY-----"), "{key}");
    Ok(())
}

#[test]
fn xcpng_rpm_is_one_that_rpm_4_11_reads() {
    let rpm = package("assay-agent", RPM);
    let query = |format: &str| {
        told(
            Command::new("rpm")
                .args(["-qp", "--nosignature", "--qf", format])
                .arg(&rpm),
        )
    };
    assert_eq!(query("%{PAYLOADFORMAT} %{PAYLOADCOMPRESSOR}"), "cpio xz");
    let weak = [
        "-qp",
        "--nosignature",
        "--recommends",
        "--suggests",
        "--supplements",
        "--enhances",
    ];
    assert_eq!(told(Command::new("rpm").args(weak).arg(&rpm)), "");
    // MD5 of all and SHA-1 of the header are what 4.11 checks beside the signature, which is RSA over SHA-256.
    for tag in ["SIGMD5", "SHA1HEADER"] {
        assert_ne!(query(&format!("%{{{tag}}}")), "(none)", "{tag}");
    }
    let signature = query("%{RSAHEADER:pgpsig}");
    assert!(signature.starts_with("RSA/SHA256, "), "{signature}");

    let requires = query("[%{REQUIRENAME} %{REQUIREFLAGS:depflags} %{REQUIREVERSION}\n]");
    for line in requires.lines() {
        let name = line.split_whitespace().next().unwrap_or_default();
        let library = name.split('(').next().unwrap_or_default();
        let version = name.split(['(', ')']).nth(1).unwrap_or_default();
        let known = RPMLIB.contains(&name)
            || (BASE.contains(&library) && (version.is_empty() || is_there(version)))
            // From glibc, bash and systemd there.
            || ["rtld(GNU_HASH)", "/bin/sh", "systemd", "config(assay-agent)"].contains(&name);
        assert!(known, "{line}");
    }
    let listed = told(Command::new("rpm").args(["-qp", "--nosignature", "-l"]).arg(&rpm));
    assert!(listed.lines().any(|line| line == "/var/lib/assay"), "{listed}");
    let size = fs::metadata(&rpm).expect("the package").len();
    assert!(size <= crate::contents::LIMIT, "{size} bytes");
    println!("the agent's RPM for XCP-ng 8.3 has {size} bytes");
}

#[test]
fn xcpng_units_hold_what_systemd_219_knows() {
    let root = unpacked();
    let units = root.path().join("usr/lib/systemd/system");
    for unit in files(&units) {
        let text = fs::read_to_string(&unit).expect("the unit");
        let name = unit.display();
        for line in text
            .lines()
            .filter(|line| !line.starts_with(['#', '[']) && !line.is_empty())
        {
            let (setting, value) = line.split_once('=').expect("a setting");
            assert!(SETTINGS_219.contains(&setting), "{name}: {line}");
            // No suffixes there, and no capabilities that came with Linux 5.8 and later.
            assert!(!setting.starts_with("Limit") || value.parse::<u64>().is_ok(), "{line}");
            assert!(!value.contains("CAP_BPF") && !value.contains("CAP_PERFMON"), "{line}");
        }
    }
    // What the other packages' unit has made by systemd.
    let folders = fs::read_to_string(root.path().join("usr/lib/tmpfiles.d/assay-agent.conf")).expect("tmpfiles");
    for folder in ["d /run/assay 0700 root root -", "d /var/lib/assay 0700 root root -"] {
        assert!(folders.lines().any(|line| line == folder), "{folders}");
    }
}

#[test]
fn xcpng_hooks_are_python_3_6() {
    let root = unpacked();
    let hooks = root.path().join("usr/share/assay/hooks");
    // The grammar of 3.6, as Python itself has it. The 2.7 of XCP-ng 8.2's storage manager cannot be had here.
    let check = "import ast, sys\nast.parse(open(sys.argv[1]).read(), feature_version=(3, 6))";
    let python = |file: &Path| {
        let mut python = Command::new("python3");
        python.args(["-W", "ignore", "-c", check]).arg(file);
        python
    };
    for name in ["assay_keys.py", "smapiv3-datapath"] {
        told(&mut python(&hooks.join(name)));
    }
    let newer = root.path().join("newer.py");
    fs::write(&newer, "if (n := 1):\n    print(f'{n}')\n").expect("a script");
    assert!(!succeeds(&mut python(&newer)));
}

#[test]
fn the_bill_of_materials_names_the_c_libraries() {
    let text = fs::read_to_string(folder().join("assay.cdx.json")).expect("the bill of materials");
    let document: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let components = document["components"].as_array().expect("components");
    for name in [
        "tpm2-tss",
        "cryptsetup",
        "lvm2",
        "libssl-dev",
        "libjson-c-dev",
        "uuid-dev",
    ] {
        let component = components.iter().find(|component| component["name"] == name);
        let component = component.unwrap_or_else(|| panic!("{name} is missing"));
        let compiled = component["purl"]
            .as_str()
            .is_some_and(|purl| purl.starts_with("pkg:generic/"));
        let hash = component["hashes"][0]["content"].as_str().map(str::len);
        assert_eq!(hash, compiled.then_some(64), "{component}");
    }
}
