//! The C libraries' sources, as Debian 13 has them: what upstream released, by its hash, without Debian's patches.

use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use crate::run::{Error, command, io, output};
use crate::setup::{PrivateApt, System};
use crate::workspace::{cache, make_dir};

/// The release whose archive has them.
const SUITES: [&str; 2] = ["trixie", "trixie-security"];

/// One library's sources.
#[derive(Debug)]
pub(super) struct Source {
    /// What Debian calls the source package.
    pub(super) name: &'static str,
    /// Upstream's version.
    pub(super) version: &'static str,
    /// The ending of its archive's name.
    pub(super) packed: &'static str,
    /// SHA-256 of the archive.
    pub(super) sha256: &'static str,
    /// SPDX expression.
    pub(super) licence: &'static str,
}

/// TPM commands and sessions.
pub(super) const TSS2: Source = Source {
    name: "tpm2-tss",
    version: "4.1.3",
    packed: "tar.gz",
    sha256: "8a389bda64690910e7af7deaf64703a3faed416dc538c9c3e4f893f24893524d",
    licence: "BSD-2-Clause",
};
/// Device-mapper; only libdm of it is compiled.
pub(super) const DEVMAPPER: Source = Source {
    name: "lvm2",
    version: "2.03.31",
    packed: "tar.xz",
    sha256: "5541d15f739bc62263b551b1d8091ea8fc889a31ed20cdc58ff9f7192d8ecd4a",
    licence: "LGPL-2.1-only",
};
/// LUKS.
pub(super) const CRYPTSETUP: Source = Source {
    name: "cryptsetup",
    version: "2.7.5",
    packed: "tar.gz",
    sha256: "66f82757456411353216def2e93ee6f82e1dc5c8b583cb9b1c84ecb918b60980",
    licence: "GPL-2.0-or-later WITH cryptsetup-OpenSSL-exception",
};

impl Source {
    /// Unpacked, below `folder`.
    pub(super) fn unpack(&self, system: &System, folder: &Path) -> Result<PathBuf, Error> {
        let archive = self.archive(system)?;
        let to = make_dir(folder.join(self.name))?;
        let mut tar = command("tar", ["--strip-components=1", "-xf"]);
        output(tar.arg(&archive).arg("-C").arg(&to))?;
        Ok(to)
    }

    /// The archive, downloaded unless it is there; of no other content than the named.
    fn archive(&self, system: &System) -> Result<PathBuf, Error> {
        let folder = cache("sources")?;
        let archive = folder.join(format!("{}_{}.orig.{}", self.name, self.version, self.packed));
        if !archive.exists() {
            let apt = PrivateApt::debian_sources(system, &SUITES)?;
            apt.update()?;
            let what = format!("downloading the sources of {} {}", self.name, self.version);
            apt.download_source(&what, self.name, &folder)?;
        }
        let bytes = fs::read(&archive).map_err(io(format!(
            "read {}: Debian's archive may have another release by now, see xtask/src/package/xcpng/sources.rs",
            archive.display()
        )))?;
        let found = hex::encode(Sha256::digest(bytes));
        if found == self.sha256 {
            return Ok(archive);
        }
        Err(Error::Missing(format!(
            "{} has the SHA-256 {found}, and not the pinned {}: remove it and try again",
            archive.display(),
            self.sha256
        )))
    }
}
