//! The maker of a test's TPM: a certificate authority in the TPM's own folder. Nothing under /etc or /var is read, no root is needed.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::Swtpm;
use crate::{HarnessError, child};

/// Sizes of a P-256 coordinate, and of it as a TPM2B.
const COORDINATE: usize = 32;
const SIZED: usize = 2 + COORDINATE;

/// Its certificates below a state folder, root first; none before it has certified anything.
pub(crate) fn certificates(state: &Path) -> Vec<PathBuf> {
    ["swtpm-localca-rootca-cert.pem", "issuercert.pem"]
        .into_iter()
        .map(|name| state.join("ca").join(name))
        .filter(|path| path.exists())
        .collect()
}

/// Writes down where it lives, and gives the file that swtpm_setup wants to know that from.
pub(super) fn configure(dir: &Path) -> Result<PathBuf, HarnessError> {
    let ca = dir.join("ca");
    std::fs::create_dir_all(&ca).map_err(HarnessError::io(format!("make {}", ca.display())))?;
    let (localca, options, setup) = (localca(dir), options(dir), dir.join("setup.conf"));
    let c = ca.display();
    write(
        &localca,
        format!(
            "statedir = {c}\nsigningkey = {c}/signkey.pem\nissuercert = {c}/issuercert.pem\ncertserial = {c}/certserial\n"
        ),
    )?;
    write(
        &options,
        "--platform-manufacturer Assay\n--platform-version 1.0\n--platform-model test\n".to_owned(),
    )?;
    write(
        &setup,
        format!(
            "create_certs_tool = swtpm_localca\ncreate_certs_tool_config = {}\ncreate_certs_tool_options = {}\nactive_pcr_banks = sha1,sha256\n",
            localca.display(),
            options.display()
        ),
    )?;
    Ok(setup)
}

/// The certificate (DER) of a TPM's P-256 endorsement key. swtpm_setup certifies RSA and P-384 only, so this is done by hand.
pub(super) fn certify_p256(tpm: &Swtpm) -> Result<Vec<u8>, HarnessError> {
    let dir = tpm.dir();
    configure(dir)?;
    tpm.tool(&["createek", "-G", "ecc", "-c", "certified.ctx", "-u", "certified.pub"])?;
    // Without a resource manager the tools leave their objects in the TPM's few slots.
    tpm.tool(&["flushcontext", "-t"])?;
    let public = read(&dir.join("certified.pub"))?;
    // A TPM2B_PUBLIC ends with both coordinates, each with its size.
    let coordinate = |from_end: usize| -> String {
        let at = public.len().saturating_sub(from_end);
        let bytes = public.iter().skip(at).take(COORDINATE);
        bytes.map(|byte| format!("{byte:02x}")).collect()
    };
    let (x, y) = (coordinate(SIZED + COORDINATE), coordinate(COORDINATE));
    let mut command = Command::new("swtpm_localca");
    command
        .args(["--type", "ek", "--tpm2", "--vmid", "test", "--ek"])
        .arg(format!("x={x},y={y},id=secp256r1"))
        .arg("--dir")
        .arg(dir)
        .arg("--configfile")
        .arg(localca(dir))
        .arg("--optsfile")
        .arg(options(dir))
        .args([
            "--tpm-spec-family",
            "2.0",
            "--tpm-spec-revision",
            "164",
            "--tpm-spec-level",
            "0",
        ])
        .args([
            "--tpm-manufacturer",
            "id:00001014",
            "--tpm-model",
            "swtpm",
            "--tpm-version",
            "id:20191023",
        ]);
    child::run(&mut command)?;
    read(&dir.join("ek.cert"))
}

fn localca(dir: &Path) -> PathBuf {
    dir.join("localca.conf")
}

fn options(dir: &Path) -> PathBuf {
    dir.join("localca.options")
}

fn write(path: &Path, text: String) -> Result<(), HarnessError> {
    std::fs::write(path, text).map_err(HarnessError::io(format!("write {}", path.display())))
}

fn read(path: &Path) -> Result<Vec<u8>, HarnessError> {
    std::fs::read(path).map_err(HarnessError::io(format!("read {}", path.display())))
}
