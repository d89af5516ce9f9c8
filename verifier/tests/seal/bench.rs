//! A key store, a disk, and the programs for a second opinion.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use assay_evidence::{digest::Sha256Digest, uuid::Uuid};
use assay_verifier::{
    keystore::{self, FileKeyStore, KeyInfo, KeySource, Listing},
    seal::{self, Format, Request, SealError, Terms},
};
use tempfile::TempDir;

/// Bytes in a MiB.
pub const MIB: usize = 1024 * 1024;

/// A state directory with a key store, and a disk image beside it.
pub struct Bench {
    dir: TempDir,
    /// The key store.
    pub keys: FileKeyStore,
}

impl Bench {
    /// With this disk as `disk.raw`.
    pub fn new(disk: &[u8]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        keystore::create_master(dir.path()).unwrap();
        let keys = FileKeyStore::open(dir.path()).unwrap();
        fs::write(dir.path().join("disk.raw"), disk).unwrap();
        Self { dir, keys }
    }

    /// A file of this name.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Seals `disk.raw` into `disk.luks`.
    pub fn seal(&self) -> Result<KeyInfo, SealError> {
        self.seal_into("disk.luks", &self.keys)
    }

    /// Seals `disk.raw` with a key store of one's own.
    pub fn seal_into(&self, output: &str, keys: &dyn KeySource) -> Result<KeyInfo, SealError> {
        let (input, output) = (self.path("disk.raw"), self.path(output));
        seal::seal(&request(&input, &output), keys, &mut |_, _| {})
    }

    /// The passphrase in a file, as `--key-file` wants it.
    pub fn key_file(&self, key_id: Uuid) -> PathBuf {
        let path = self.path(&format!("passphrase-{key_id}"));
        fs::write(&path, self.keys.get(key_id).unwrap().passphrase.expose()).unwrap();
        path
    }

    /// Nothing half done: neither the image, nor a partial one, nor a key.
    pub fn assert_nothing_left(&self) {
        for name in ["disk.luks", "disk.luks.partial", "disk.luks.assay.json"] {
            assert!(!self.path(name).exists(), "{name}");
        }
        let Listing { keys, damaged, .. } = self.keys.list().unwrap();
        assert!(keys.is_empty() && damaged.is_empty());
    }
}

/// A plain request.
pub fn request<'a>(input: &'a Path, output: &'a Path) -> Request<'a> {
    Request {
        input,
        input_format: None,
        output,
        format: Format::Luks2,
        terms: terms(),
    }
}

/// Who gets the key, when it doesn't matter; without a recovery key.
pub fn terms() -> Terms<'static> {
    static VERIFIERS: std::sync::LazyLock<[String; 1]> =
        std::sync::LazyLock::new(|| ["https://verifier.example:8440".to_owned()]);
    Terms {
        policy: "default",
        tags: &[],
        verifiers: VERIFIERS.as_slice(),
        verifier_spki_sha256: ca(),
        recovery: None,
        now: 1_795_465_020,
    }
}

/// Digest of the CA's key.
pub fn ca() -> Sha256Digest {
    "5a".repeat(32).parse().unwrap()
}

/// Bytes without any pattern that could hide a block in the wrong place.
pub fn disk(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Runs cryptsetup on an image; it must succeed.
pub fn cryptsetup(args: &[&str], path: &Path) -> Output {
    good("cryptsetup", Command::new("cryptsetup").args(args).arg(path))
}

/// Whether cryptsetup opens a key slot of the image with this key file.
pub fn opens(image: &Path, key_file: &Path) -> bool {
    let tried = Command::new("cryptsetup")
        .args(["open", "--test-passphrase", "--key-file"])
        .args([key_file, image])
        .output();
    tried
        .expect("cryptsetup: `cargo xtask setup` installs it")
        .status
        .success()
}

/// Runs qemu-img; it must succeed.
pub fn qemu_img(args: &[&str]) -> Output {
    good("qemu-img", Command::new("qemu-img").args(args))
}

fn good(program: &str, command: &mut Command) -> Output {
    let output = command.output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}; `cargo xtask setup` installs it"));
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// What stock cryptsetup makes of an image with this key file: the disk in the clear, without device-mapper. The image is used up.
pub fn decrypted_by_cryptsetup(image: &Path, key_file: &Path) -> Vec<u8> {
    let header = image.with_extension("exported-header");
    let args = [
        "reencrypt",
        "--decrypt",
        "--header",
        header.to_str().unwrap(),
        "--force-offline-reencrypt",
        "--key-file",
        key_file.to_str().unwrap(),
        "--batch-mode",
    ];
    cryptsetup(&args, image);
    fs::read(image).unwrap()
}
