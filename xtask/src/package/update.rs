//! The update ISO (supplemental pack) for XCP-ng and XenServer 8: a signed yum repository with a description that xapi reads.
//!
//! xapi checks the signatures of update.xml and repodata/repomd.xml, then has yum install the group `update` of the repository,
//! checking each RPM's signature with the key that update.xml names.

use std::fs;
use std::path::Path;

use sha2::{Digest as _, Sha256};

use super::rpm::marker;
use super::sign::Signer;
use super::tree::{Tree, settle};
use super::version;
use crate::run::{Error, command, io, step};

/// What xapi calls the update; `[A-Za-z0-9_-]`, for it becomes the name of a repository and of a package.
const LABEL: &str = "assay-agent";

/// Makes the ISO in `out`, of the agent's RPM that lies there; the RPM is signed already.
pub(super) fn build(
    tree: &Tree,
    rpm: &Path,
    signer: &Signer,
    work: &Path,
    out: &Path,
    epoch: u64,
) -> Result<(), Error> {
    let label = if signer.test {
        format!("{LABEL}-TEST")
    } else {
        LABEL.to_owned()
    };
    let uuid = uuid(&label, version());
    let iso = work.join("iso");
    let packages = iso.join("Packages");
    fs::create_dir_all(&packages).map_err(io("make the folder of the update"))?;
    let description = iso.join("update.xml");
    fs::write(&description, describe(&label, &uuid, tree.size()?, signer)).map_err(io("write update.xml"))?;
    signer.detached(&description)?;
    fs::copy(rpm, packages.join(rpm.file_name().unwrap_or_default())).map_err(io("copy the agent's RPM"))?;
    signer.rpm(&marker(&label, &uuid, &description, work, &packages, epoch)?)?;
    // The lists have the times of the packages' files.
    settle(&iso, epoch)?;
    repository(&label, &iso, work, epoch)?;
    signer.detached(&iso.join("repodata/repomd.xml"))?;
    settle(&iso, epoch)?;
    write(&iso, &label, &out.join(format!("{label}-{}.iso", version())), epoch)
}

/// update.xml (xen-api, `xapi_pool_update.ml`: parse_update_info). No guidance: what is installed starts only when it is told to.
fn describe(label: &str, uuid: &str, size: u64, signer: &Signer) -> String {
    let test = if signer.test {
        " TEST: signed with a key that nobody answers for."
    } else {
        ""
    };
    format!(
        "<update name-label=\"{label}\" version=\"{}\" uuid=\"{uuid}\" installation-size=\"{size}\" key=\"{}\">\n  \
         <name-description>Assay agent: measures what this host runs, and attests to it.{test}</name-description>\n</update>\n",
        version(),
        signer.key_name(),
    )
}

/// The repository's lists, in the forms that yum 3.4 and host-installer read: gzip and SHA-256, and no databases.
fn repository(label: &str, iso: &Path, work: &Path, epoch: u64) -> Result<(), Error> {
    let groups = work.join("groups.xml");
    let text = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<comps>\n  <group>\n    <id>update</id>\n    <name>update</name>\n    \
         <description>{label}</description>\n    <default>false</default>\n    <uservisible>true</uservisible>\n    <packagelist>\n      \
         <packagereq type=\"mandatory\">update-{label}</packagereq>\n    </packagelist>\n  </group>\n</comps>\n"
    );
    fs::write(&groups, text).map_err(io("write groups.xml"))?;
    let mut lists = command("createrepo_c", ["--quiet", "--no-database", "--simple-md-filenames"]);
    lists.args([
        "--checksum",
        "sha256",
        "--general-compress-type",
        "gz",
        "--set-timestamp-to-revision",
    ]);
    lists.args(["--revision", &epoch.to_string(), "--workers", "1", "--groupfile"]);
    step("repository of the update", lists.arg(&groups).arg(iso))
}

/// ISO 9660 with Joliet and Rock Ridge. xorriso takes every date and identifier from SOURCE_DATE_EPOCH.
fn write(from: &Path, label: &str, iso: &Path, epoch: u64) -> Result<(), Error> {
    let volume = format!("{label}-{}", version()).to_uppercase().replace(['-', '.'], "_");
    let mut xorriso = command("xorriso", ["-as", "mkisofs", "-quiet", "-r", "-J", "-joliet-long"]);
    xorriso.args(["-V", &volume, "-o"]).arg(iso).arg(from);
    step("update ISO", xorriso.env("SOURCE_DATE_EPOCH", epoch.to_string()))
}

/// The same for the same release of the pack. In version 8's form (RFC 9562 section 5.8), of the first 16 bytes of a SHA-256.
fn uuid(label: &str, version: &str) -> String {
    let digest = Sha256::digest(format!("assay update {label} {version}"));
    let hex = hex::encode(digest);
    let part = |from: usize, to: usize| hex.get(from..to).unwrap_or_default();
    format!(
        "{}-{}-8{}-a{}-{}",
        part(0, 8),
        part(8, 12),
        part(13, 16),
        part(17, 20),
        part(20, 32)
    )
}

#[cfg(test)]
mod tests {
    use super::uuid;

    #[test]
    fn a_release_has_one_uuid() {
        let one = uuid("assay-agent", "1.2.3");
        assert_eq!(one, uuid("assay-agent", "1.2.3"));
        assert_ne!(one, uuid("assay-agent", "1.2.4"));
        assert_ne!(one, uuid("assay-agent-TEST", "1.2.3"));
        let lengths: Vec<usize> = one.split('-').map(str::len).collect();
        assert_eq!(lengths, [8, 4, 4, 4, 12]);
        assert!(
            one.bytes()
                .all(|c| c == b'-' || c.is_ascii_digit() || (b'a'..=b'f').contains(&c)),
            "{one}"
        );
    }
}
