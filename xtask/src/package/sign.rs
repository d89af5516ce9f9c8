//! Signatures of RPMs and of the update ISO, by gpg and rpmsign, with an RSA key.
//!
//! dom0 of XCP-ng 8.3 has GnuPG 2.0 and rpm 4.11: RSA only. The same key gives the same bytes: such signatures have nothing random in
//! them, and their time is that of all files.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::{Error, command, io, output};
use crate::ui::note;
use crate::workspace::{cache, lock_cache};

/// Shortest modulus that is taken.
const MIN_BITS: u32 = 2048;
/// OpenPGP's number of RSA, RFC 4880 section 9.1.
const RSA: &str = "1";
/// What the key is called that is made where none is given.
const TEST_NAME: &str = "Assay TEST key, not for production";

/// Signs with one key, in a folder of gpg's own that goes away with it.
pub(super) struct Signer {
    home: tempfile::TempDir,
    fingerprint: String,
    /// Seconds since 1970 of all signatures.
    time: u64,
    /// Made here, and trusted by nobody.
    pub(super) test: bool,
}

impl Signer {
    /// Takes the secret key in `key`, as `gpg --export-secret-keys` writes it; without one, this machine's test key.
    pub(super) fn new(key: Option<&Path>, epoch: u64) -> Result<Self, Error> {
        // Not below the target folder: gpg-agent's socket there may have too long a name.
        let home = tempfile::tempdir().map_err(io("make a folder for the signing key"))?;
        let mut signer = Self {
            home,
            fingerprint: String::new(),
            time: epoch,
            test: key.is_none(),
        };
        let test;
        let file = if let Some(file) = key {
            file
        } else {
            note("no --sign-key: signing with a test key, which no host should be told to trust");
            test = test_key()?;
            &test
        };
        let import = signer.gpg(["--import"]).arg(file).output();
        let import = import.map_err(|source| Error::Start {
            program: "gpg".into(),
            source,
        })?;
        let listed = output(&mut signer.gpg(["--with-colons", "--list-secret-keys"]))?;
        let told = String::from_utf8_lossy(&import.stderr);
        let found = Found::read(&listed).map_err(|why| {
            Error::Missing(format!(
                "{} {why}: give the file that `gpg --armor --export-secret-keys KEY` writes, of one RSA key of {MIN_BITS} bits or more\n{}",
                file.display(),
                told.trim_end()
            ))
        })?;
        signer.time = signer.time.max(found.created);
        signer.fingerprint = found.fingerprint;
        let trial = signer.home.path().join("trial");
        fs::write(&trial, "trial").map_err(io("write a file to sign"))?;
        signer.detached(&trial).map_err(|error| {
            Error::Missing(format!(
                "{} cannot sign: its passphrase has to be removed (gpg --edit-key, passwd), it must not have expired, and its primary key must be allowed to sign\n{error}",
                file.display()
            ))
        })?;
        Ok(signer)
    }

    /// The name of the file with the public key, which update.xml and the hosts' /etc/pki/rpm-gpg call it by.
    pub(super) const fn key_name(&self) -> &'static str {
        if self.test {
            "RPM-GPG-KEY-assay-TEST"
        } else {
            "RPM-GPG-KEY-assay"
        }
    }

    /// The public key, armoured.
    pub(super) fn public(&self) -> Result<String, Error> {
        output(&mut self.gpg([
            "--armor",
            "--export-options",
            "export-minimal",
            "--export",
            &self.fingerprint,
        ]))
    }

    /// Writes FILE.asc beside a file.
    pub(super) fn detached(&self, file: &Path) -> Result<(), Error> {
        let mut gpg = self.gpg(["--yes", "--digest-algo", "SHA256", "--armor", "--detach-sign", "-u"]);
        output(gpg.arg(format!("{}!", self.fingerprint)).arg(file)).map(drop)
    }

    /// Signs an RPM where it lies.
    pub(super) fn rpm(&self, rpm: &Path) -> Result<(), Error> {
        let mut sign = command("rpmsign", ["--addsign"]);
        let defines = [
            // Some distributions' rpm looks for gpg2.
            ("__gpg", "/usr/bin/gpg".to_owned()),
            ("_gpg_name", format!("{}!", self.fingerprint)),
            ("_gpg_path", self.home.path().display().to_string()),
            ("_gpg_digest_algo", "sha256".into()),
            (
                "_gpg_sign_cmd_extra_args",
                format!("--batch --pinentry-mode loopback --faked-system-time {}!", self.time),
            ),
        ];
        for (name, value) in defines {
            sign.arg("--define").arg(format!("{name} {value}"));
        }
        output(sign.arg(rpm)).map(drop)
    }

    fn gpg<'a>(&self, words: impl IntoIterator<Item = &'a str>) -> Command {
        gpg(self.home.path(), self.time, words)
    }
}

impl Drop for Signer {
    fn drop(&mut self) {
        // Its agent would live on until it notices that the folder is gone.
        let _ = command("gpgconf", ["--kill", "all"])
            .env("GNUPGHOME", self.home.path())
            .output();
    }
}

fn gpg<'a>(home: &Path, time: u64, words: impl IntoIterator<Item = &'a str>) -> Command {
    let mut gpg = command(
        "gpg",
        ["--batch", "--no-tty", "--pinentry-mode", "loopback", "--passphrase", ""],
    );
    gpg.arg("--homedir").arg(home);
    gpg.args(["--faked-system-time", &format!("{time}!")]).args(words);
    gpg
}

/// The key in what `gpg --with-colons` lists (GnuPG's doc/DETAILS).
#[derive(Debug, PartialEq, Eq)]
struct Found {
    fingerprint: String,
    /// Seconds since 1970.
    created: u64,
}

impl Found {
    fn read(listed: &str) -> Result<Self, String> {
        let records: Vec<Vec<&str>> = listed.lines().map(|line| line.split(':').collect()).collect();
        let field = |record: &[&str], number: usize| record.get(number).copied().unwrap_or_default().to_owned();
        let of =
            |kind: &str| -> Vec<&Vec<&str>> { records.iter().filter(|record| record.first() == Some(&kind)).collect() };
        let keys = of("sec");
        let [key] = keys.as_slice() else {
            return Err(format!("holds {} secret keys", keys.len()));
        };
        if field(key, 3) != RSA {
            return Err("holds a key that is not RSA, which XCP-ng 8.3 cannot check".into());
        }
        let bits: u32 = field(key, 2).parse().unwrap_or(0);
        if bits < MIN_BITS {
            return Err(format!("holds a key of {bits} bits"));
        }
        let first = of("fpr").first().map(|record| field(record, 9));
        Ok(Self {
            fingerprint: first
                .filter(|text| !text.is_empty())
                .ok_or("holds a key without a fingerprint")?,
            created: field(key, 5).parse().unwrap_or(0),
        })
    }
}

/// This machine's test key, made when first needed. It is not in the sources: a key that everybody has would sign for everybody, on a
/// host that was once told to trust it.
fn test_key() -> Result<PathBuf, Error> {
    let _lock = lock_cache()?;
    let folder = cache("test-sign-key")?;
    let file = folder.join("secret.asc");
    if file.exists() {
        return Ok(file);
    }
    let home = tempfile::tempdir().map_err(io("make a folder for a test key"))?;
    // Dated 1980, as files without a history are, so that it is older than whatever it signs.
    let time = 315_532_800;
    let made = output(&mut gpg(
        home.path(),
        time,
        ["--quick-generate-key", TEST_NAME, "rsa2048", "sign", "never"],
    ))
    .and_then(|_| output(&mut gpg(home.path(), time, ["--armor", "--export-secret-keys"])));
    let _ = command("gpgconf", ["--kill", "all"])
        .env("GNUPGHOME", home.path())
        .output();
    let part = folder.join("secret.part");
    let writing = || format!("write {}", part.display());
    fs::write(&part, "").map_err(io(writing()))?;
    fs::set_permissions(&part, fs::Permissions::from_mode(0o600)).map_err(io(writing()))?;
    fs::write(&part, made?).map_err(io(writing()))?;
    fs::rename(&part, &file).map_err(io(writing()))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTED: &str =
        "sec:u:2048:1:AABB:1700000000:::u:::scSC:::+:::23::0:\nfpr:::::::::0123456789ABCDEF:\ngrp:::::::::FF:\n";

    #[test]
    fn a_key_is_found_in_gpgs_list() {
        let found = Found::read(LISTED);
        assert_eq!(
            found,
            Ok(Found {
                fingerprint: "0123456789ABCDEF".into(),
                created: 1_700_000_000
            })
        );
    }

    #[test]
    fn other_keys_are_refused_with_the_reason() {
        let refused = |listed: &str| Found::read(listed).err().unwrap_or_default();
        assert_eq!(refused(""), "holds 0 secret keys");
        assert_eq!(refused(&LISTED.repeat(2)), "holds 2 secret keys");
        let ed25519 = LISTED.replace(":2048:1:", ":255:22:");
        assert_eq!(
            refused(&ed25519),
            "holds a key that is not RSA, which XCP-ng 8.3 cannot check"
        );
        assert_eq!(refused(&LISTED.replace(":2048:", ":1024:")), "holds a key of 1024 bits");
    }

    #[test]
    fn what_is_no_key_is_refused_by_name() -> Result<(), Error> {
        let file = tempfile::NamedTempFile::new().map_err(io("make a file"))?;
        let refused = Signer::new(Some(file.path()), 0).err().map(|error| error.to_string());
        let words = refused.unwrap_or_default();
        assert!(words.contains(&file.path().display().to_string()), "{words}");
        assert!(words.contains("holds 0 secret keys"), "{words}");
        Ok(())
    }
}
