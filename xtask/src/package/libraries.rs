//! Which Debian packages hold the libraries that a program is linked with.

use std::path::Path;

use crate::run::{Error, command, output};

/// Libraries by their name in the program, with what Debian calls their packages; the versions of Debian 12. Debian 13's
/// packages for the TPM provide the names of 12.
const PACKAGES: &[(&str, &str)] = &[
    ("libcryptsetup.so.12", "libcryptsetup12 (>= 2:2.6)"),
    ("libtss2-esys.so.0", "libtss2-esys-3.0.2-0 (>= 3.2)"),
    ("libtss2-mu.so.0", "libtss2-mu0 (>= 3.2) | libtss2-mu-4.0.1-0"),
    (
        "libtss2-tctildr.so.0",
        "libtss2-tctildr0 (>= 3.2), libtss2-tcti-device0 (>= 3.2)",
    ),
    ("libsystemd.so.0", "libsystemd0 (>= 252)"),
    ("libsqlite3.so.0", "libsqlite3-0 (>= 3.40)"),
    ("libgcc_s.so.1", "libgcc-s1 (>= 4.2)"),
    ("libm.so.6", ""),
    ("ld-linux-x86-64.so.2", ""),
];

/// The `Depends` of a program.
pub(super) fn depends(program: &Path) -> Result<String, Error> {
    let mut depends = vec![format!("libc6 (>= {})", glibc(program)?)];
    for name in needed(program)? {
        if name == "libc.so.6" {
            continue;
        }
        let known = PACKAGES.iter().find(|(library, _)| *library == name);
        let (_, package) = known.ok_or_else(|| {
            Error::Missing(format!(
                "{} is linked with {name}, of which xtask does not know the package: add it to xtask/src/package/libraries.rs",
                program.display()
            ))
        })?;
        depends.extend((!package.is_empty()).then(|| (*package).to_owned()));
    }
    Ok(depends.join(", "))
}

/// The libraries that a program names.
fn needed(program: &Path) -> Result<Vec<String>, Error> {
    let text = output(command("readelf", ["-dW"]).arg(program))?;
    let names = text.lines().filter(|line| line.contains("(NEEDED)"));
    let names = names.filter_map(|line| Some(line.split_once('[')?.1.split_once(']')?.0.to_owned()));
    Ok(names.collect())
}

/// The newest version of the C library that a program uses a symbol of, `2.34`.
fn glibc(program: &Path) -> Result<String, Error> {
    let text = output(command("readelf", ["-VW"]).arg(program))?;
    let versions = text.split("GLIBC_").skip(1).filter_map(|rest| {
        let version: String = rest.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
        let numbers: Vec<u32> = version.split('.').map(str::parse).collect::<Result<_, _>>().ok()?;
        Some((numbers, version))
    });
    let newest = versions.max();
    newest
        .map(|(_, version)| version)
        .ok_or_else(|| Error::Missing(format!("{} uses no C library: is it a program?", program.display())))
}
