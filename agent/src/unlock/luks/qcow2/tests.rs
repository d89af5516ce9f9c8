//! Against images that qemu-img made. Opening needs device-mapper and is tested in a virtual machine.

use std::path::PathBuf;
use std::process::Command;

use assay_evidence::luks;
use assay_evidence::token::sidecar_path;
use tempfile::TempDir;

use super::super::tests::TOKEN;
use super::*;

struct Image(TempDir);

impl Image {
    /// An image with its sidecar.
    fn make(options: &[&str]) -> Self {
        let image = Self(tempfile::tempdir().unwrap());
        std::fs::write(sidecar_path(&image.path()), TOKEN).unwrap();
        let key = format!("secret,id=key,file={}", image.file("key"));
        std::fs::write(image.file("key"), "0123456789abcdef").unwrap();
        let mut create = Command::new("qemu-img");
        create
            .args(["create", "-q", "-f", "qcow2", "--object", &key])
            .args(options);
        let output = create.arg(image.path()).arg("8M").output();
        let output = output.expect("qemu-img: `cargo xtask setup` installs it");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{options:?}: {said}");
        image
    }

    /// One with LUKS inside, and with these options beside.
    fn luks(more: &[&str]) -> Self {
        let encrypted = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=1";
        Self::make(&[&["-o", encrypted], more].concat())
    }

    fn file(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("disk.qcow2")
    }

    fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.path()).unwrap()
    }

    /// Where the LUKS header is.
    fn luks_at(&self) -> usize {
        let at = Qcow2::parse(&self.bytes()).unwrap().luks_at.unwrap();
        usize::try_from(at).unwrap()
    }

    /// What is said of it with these bytes there.
    fn with(&self, at: usize, bytes: &[u8]) -> DiskError {
        let before = self.bytes();
        let mut changed = before.clone();
        changed[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(self.path(), changed).unwrap();
        let error = read(&self.path()).unwrap_err();
        std::fs::write(self.path(), before).unwrap();
        error
    }
}

#[test]
fn the_headers_and_the_sidecar_say_which_key_is_wanted() {
    let image = Image::luks(&[]);
    let header = Header::read(&image.path()).unwrap();
    assert_eq!(header.container, Container::Qcow2);
    assert_eq!(header.token.key_id(), "0d4c1f6e-7f0a-4f5e-9c53-2a6d6a0f9e11");
    let (bytes, at) = (image.bytes(), image.luks_at());
    assert_eq!(header.fingerprint, luks::luks1(&bytes[at..]).unwrap());
    let info = Command::new("qemu-img").arg("info").arg(image.path()).output().unwrap();
    let uuid = assay_evidence::uuid::Uuid::new(header.uuid).to_string();
    let info = String::from_utf8_lossy(&info.stdout);
    assert!(info.contains(&format!("uuid: {uuid}")), "{uuid}: {info}");

    std::fs::remove_file(sidecar_path(&image.path())).unwrap();
    let error = Header::read(&image.path()).unwrap_err();
    assert!(matches!(error, DiskError::Sidecar { .. }), "{error}");
}

#[test]
fn one_in_the_clear_or_with_qemus_old_encryption_is_refused() {
    let clear = Image::make(&[]);
    let error = read(&clear.path()).unwrap_err();
    assert!(matches!(error, DiskError::NotEncrypted { .. }), "{error}");
    for method in [0, 1] {
        let error = Image::luks(&[]).with(35, &[method]);
        assert!(matches!(error, DiskError::NotEncrypted { .. }), "{method}: {error}");
    }
}

#[test]
fn one_that_names_another_file_is_refused() {
    let base = Image::make(&[]);
    let base = base.path().display().to_string();
    let error = read(&Image::luks(&["-b", &base, "-F", "qcow2"]).path()).unwrap_err();
    assert!(matches!(error, DiskError::NotAlone { .. }), "{error}");
    let folder = tempfile::tempdir().unwrap();
    let data = format!("data_file={}", folder.path().join("data").display());
    let error = read(&Image::luks(&["-o", &data]).path()).unwrap_err();
    assert!(matches!(error, DiskError::NotAlone { .. }), "{error}");
}

#[test]
fn one_that_is_damaged_or_hides_nothing_or_never_ends_is_refused() {
    let image = Image::luks(&[]);
    let at = image.luks_at();
    let damaged = image.with(7, &[9]);
    assert!(matches!(damaged, DiskError::Qcow2 { .. }), "{damaged}");
    let no_luks = image.with(at, b"nothing");
    assert!(matches!(no_luks, DiskError::Luks1 { .. }), "{no_luks}");
    let cipher = image.with(at + 40, b"ecb\0");
    assert!(
        matches!(&cipher, DiskError::Cipher { cipher, .. } if cipher == "aes-ecb"),
        "{cipher}"
    );
    let many = u32::MAX.to_be_bytes();
    for (field, part) in [(108, "volume key"), (164, "digest"), (212, "key slot 0")] {
        let error = image.with(at + field, &many);
        assert!(
            matches!(&error, DiskError::Cost { part: said, .. } if said == part),
            "{field}: {error}"
        );
    }
    assert!(read(&image.path()).is_ok());
}

#[test]
fn headers_that_were_changed_meanwhile_get_no_key() {
    let image = Image::luks(&[]);
    let header = Header::read(&image.path()).unwrap();
    std::fs::copy(Image::luks(&[]).path(), image.path()).unwrap();
    let error = open(&header, "assay-never-opened", b"0123456789abcdef", image.0.path()).unwrap_err();
    assert!(matches!(error, DiskError::Changed { .. }), "{error}");
}
