//! Against images that cryptsetup made. Opening needs device-mapper and is tested in a virtual machine.

use std::os::unix::fs::FileExt as _;
use std::process::Command;

use assay_evidence::token::TokenError;

use super::loaded::{check_ciphers, check_costs, load_luks2};
use super::*;

const PASSPHRASE: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
const UUID: &str = "6f9619ff-8b86-4011-b42d-00cf4fc964ff";
pub(super) const TOKEN: &str = r#"{"type":"assay","keyslots":["0"],"version":1,"verifiers":["https://verifier.example:8444"],
    "verifier_spki_sha256":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "key_id":"0d4c1f6e-7f0a-4f5e-9c53-2a6d6a0f9e11","policy":"default"}"#;

struct Image {
    dir: tempfile::TempDir,
}

impl Image {
    fn empty() -> Self {
        let image = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        std::fs::File::create(image.path())
            .unwrap()
            .set_len(16 * 1024 * 1024)
            .unwrap();
        image
    }

    fn luks2(extra: &[&str]) -> Self {
        let mut arguments = vec!["--type", "luks2", "--sector-size", "512"];
        arguments.extend(["--pbkdf", "pbkdf2", "--luks2-keyslots-size", "256k"]);
        arguments.extend(extra);
        Self::formatted(&arguments)
    }

    fn luks1() -> Self {
        Self::formatted(&["--type", "luks1", "--key-size", "512"])
    }

    fn formatted(how: &[&str]) -> Self {
        let image = Self::empty();
        let key = image.dir.path().join("key");
        std::fs::write(&key, PASSPHRASE).unwrap();
        let mut arguments = vec!["luksFormat", "--batch-mode", "--uuid", UUID];
        arguments.extend(["--pbkdf-force-iterations", "1000"]);
        arguments.extend(how);
        let (path, key) = (image.path(), key.display().to_string());
        arguments.extend([path.to_str().unwrap(), &key]);
        cryptsetup(&arguments);
        image
    }

    fn token(&self, json: &str) -> &Self {
        let file = self.dir.path().join("token");
        std::fs::write(&file, json).unwrap();
        cryptsetup(&[
            "token",
            "import",
            "--json-file",
            file.to_str().unwrap(),
            self.path().to_str().unwrap(),
        ]);
        self
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    fn sidecar(&self) -> PathBuf {
        self.dir.path().join("disk.assay.json")
    }

    fn write_at(&self, at: u64, bytes: &[u8]) {
        let file = std::fs::OpenOptions::new().write(true).open(self.path()).unwrap();
        file.write_all_at(bytes, at).unwrap();
    }
}

fn cryptsetup(arguments: &[&str]) {
    let output = Command::new("cryptsetup")
        .args(arguments)
        .output()
        .expect("cryptsetup: `cargo xtask setup` installs it");
    assert!(
        output.status.success(),
        "{arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn opens_with_its_passphrase_only(device: &mut CryptDevice) {
    let key = volume_key(device, PASSPHRASE.as_bytes()).unwrap();
    assert_eq!(key.len(), MAX_KEY, "two keys of AES-256");
    // By the header's digest, as libcryptsetup holds it against the key again before the mapping is made.
    device.volume_key_handle().verify(&key).unwrap();
    let wrong = volume_key(device, b"wrong").unwrap_err();
    assert!(
        matches!(&wrong, LibcryptErr::IOError(error) if error.raw_os_error() == Some(nix::libc::EPERM)),
        "{wrong}"
    );
}

#[test]
fn a_sealed_image_says_which_key_it_wants() {
    let image = Image::luks2(&[]);
    let header = Header::read(image.token(TOKEN).path().as_path()).unwrap();
    assert_eq!(hex::encode(header.uuid), UUID.replace('-', ""));
    assert_eq!(header.token.key_id(), "0d4c1f6e-7f0a-4f5e-9c53-2a6d6a0f9e11");
    assert_eq!(header.default_name(), "assay-6f9619ff");
    // The passphrase opens it; only the kernel's part is missing here.
    opens_with_its_passphrase_only(&mut load_luks2(&image.path()).unwrap());
}

#[test]
fn what_is_not_luks2_is_refused_by_name() {
    let missing = Header::read(Path::new("/nonexistent/disk")).unwrap_err();
    assert!(matches!(missing, DiskError::Open { .. }));
    assert!(
        matches!(Header::read(Path::new("/tmp")), Err(DiskError::Open { .. })),
        "a folder"
    );
    let plain = Image::empty();
    let error = Header::read(&plain.path()).unwrap_err();
    assert!(matches!(error, DiskError::NotLuks { .. }));
    assert!(error.to_string().contains("is not a LUKS2 image"), "{error}");
    let empty = tempfile::NamedTempFile::new().unwrap();
    assert!(matches!(Header::read(empty.path()), Err(DiskError::NotLuks { .. })));
}

#[test]
fn a_token_that_is_missing_malformed_or_double_is_refused_with_its_own_reason() {
    let image = Image::luks2(&[]);
    let read = || match Header::read(&image.path()).unwrap_err() {
        DiskError::Token { source, .. } => source,
        other => panic!("{other}"),
    };
    assert!(matches!(read(), TokenError::Missing));
    image.token(r#"{"type":"clevis","keyslots":["0"],"jwe":{}}"#);
    assert!(matches!(read(), TokenError::Missing), "tokens of others are left alone");
    image.token(r#"{"type":"assay","keyslots":["0"],"version":1}"#);
    assert!(matches!(read(), TokenError::Malformed(_)));
    image.token(TOKEN);
    assert!(matches!(read(), TokenError::Several(2)));
}

/// On the header's JSON: making such an image needs device-mapper.
#[test]
fn a_cipher_that_hides_nothing_is_refused() {
    let image = Image::luks2(&[]);
    let mut device = load_luks2(&image.path()).unwrap();
    let good = device.status_handle().dump_json().unwrap();
    assert!(check_ciphers(&good, &image.path()).is_ok());
    for (place, cipher) in [
        ("/segments/0/encryption", "cipher_null-ecb"),
        ("/segments/0/encryption", "aes-cbc-essiv:sha256"),
        ("/keyslots/0/area/encryption", "cipher_null-ecb"),
    ] {
        let mut metadata = good.clone();
        *metadata.pointer_mut(place).unwrap() = cipher.into();
        let error = check_ciphers(&metadata, &image.path()).unwrap_err();
        assert!(
            matches!(&error, DiskError::Cipher { cipher: found, .. } if found == cipher),
            "{error}"
        );
    }
    // A linear segment (as during reencryption) has no cipher at all.
    let mut linear = good.clone();
    linear["segments"]["0"].as_object_mut().unwrap().remove("encryption");
    assert!(matches!(
        check_ciphers(&linear, &image.path()),
        Err(DiskError::Cipher { .. })
    ));
    let mut reencrypting = good;
    reencrypting["keyslots"]["1"] = serde_json::json!({"type": "reencrypt", "area": {"type": "none"}});
    assert!(matches!(
        check_ciphers(&reencrypting, &image.path()),
        Err(DiskError::Cipher { .. })
    ));
}

/// One thread opens all disks: an image must not be able to keep it busy, or eat the host's memory.
#[test]
fn a_key_derivation_without_end_is_refused() {
    let image = Image::luks2(&[]);
    let good = load_luks2(&image.path()).unwrap().status_handle().dump_json().unwrap();
    assert!(check_costs(&good, &image.path()).is_ok());
    let mut argon = good.clone();
    argon["keyslots"]["0"]["kdf"] = serde_json::json!({"type": "argon2id", "time": 8, "memory": 1048576, "cpus": 4});
    assert!(check_costs(&argon, &image.path()).is_ok(), "as cryptsetup makes it");
    for (place, value) in [
        ("/keyslots/0/kdf/time", 4_000_000),
        ("/keyslots/0/kdf/memory", 4 * 1048576),
        ("/digests/0/iterations", 2_000_000_000),
    ] {
        let mut metadata = argon.clone();
        *metadata.pointer_mut(place).unwrap() = value.into();
        let error = check_costs(&metadata, &image.path()).unwrap_err();
        assert!(matches!(error, DiskError::Cost { .. }), "{place}: {error}");
    }
}

/// The key of the slot that opens is written into a buffer of the longest key that there can be, and libcryptsetup looks only how long
/// that of the first slot is.
#[test]
fn a_key_slot_with_a_longer_key_than_any_is_refused() {
    let image = Image::luks2(&["--key-size", "256", "--luks2-keyslots-size", "2m"]);
    let key = image.dir.path().join("key").display().to_string();
    let (path, file) = (image.path(), image.dir.path().join("volume-key"));
    std::fs::write(&file, [7; 128]).unwrap();
    assert!(Header::read(image.token(TOKEN).path().as_path()).is_ok());
    let (path, file) = (path.to_str().unwrap(), file.to_str().unwrap());
    let mut add = vec![
        "luksAddKey",
        "--batch-mode",
        "--key-file",
        &key,
        "--unbound",
        "--key-size",
        "1024",
    ];
    add.extend([
        "--pbkdf",
        "pbkdf2",
        "--pbkdf-force-iterations",
        "1000",
        "--volume-key-file",
        file,
    ]);
    cryptsetup(&[&add[..], &[path, &key]].concat());
    let error = Header::read(&image.path()).unwrap_err();
    assert!(
        matches!(&error, DiskError::Cost { part, wanted, .. } if part == "key in key slot 1" && wanted == "128 bytes"),
        "{error}"
    );
}

/// Between the question for the key and its use the storage can put another header in place.
#[test]
fn a_header_that_was_changed_meanwhile_is_not_opened() {
    let image = Image::luks2(&[]);
    let header = Header::read(image.token(TOKEN).path().as_path()).unwrap();
    cryptsetup(&["token", "remove", "--token-id", "0", image.path().to_str().unwrap()]);
    image.token(&TOKEN.replace("\"default\"", "\"other\""));
    let error = open(&header, "assay-never-opened", PASSPHRASE.as_bytes()).unwrap_err();
    assert!(matches!(error, DiskError::Changed { .. }), "{error}");
}

#[test]
fn luks1_has_its_token_beside_it() {
    let image = Image::luks1();
    let read = || Header::read(&image.path());
    let error = read().unwrap_err();
    assert!(
        matches!(&error, DiskError::Sidecar { sidecar, .. } if *sidecar == image.sidecar()),
        "{error}"
    );
    std::fs::write(image.sidecar(), TOKEN).unwrap();
    let header = read().unwrap();
    assert_eq!(hex::encode(header.uuid), UUID.replace('-', ""));
    assert_eq!(header.token.key_id(), "0d4c1f6e-7f0a-4f5e-9c53-2a6d6a0f9e11");
    let start = std::fs::read(image.path()).unwrap();
    assert_eq!(header.fingerprint, assay_evidence::luks::luks1(&start).unwrap());
    // The copy of header and key slots is what the passphrase opens.
    let mut loaded = Loaded::of(&image.path()).unwrap();
    opens_with_its_passphrase_only(&mut loaded.device);

    std::fs::write(image.sidecar(), "{").unwrap();
    assert!(matches!(read(), Err(DiskError::Token { .. })));
    std::fs::write(image.sidecar(), vec![b' '; 9000]).unwrap();
    assert!(matches!(
        read(),
        Err(DiskError::Token {
            source: TokenError::TooLong(_),
            ..
        })
    ));
    // What would be waited for.
    std::fs::remove_file(image.sidecar()).unwrap();
    nix::unistd::mkfifo(&image.sidecar(), nix::sys::stat::Mode::S_IRUSR).unwrap();
    assert!(matches!(read(), Err(DiskError::Sidecar { .. })));
}

#[test]
fn luks1_that_hides_nothing_or_never_ends_is_refused() {
    let image = Image::luks1();
    std::fs::write(image.sidecar(), TOKEN).unwrap();
    let before = std::fs::read(image.path()).unwrap()[..592].to_vec();
    let changed = |at: u64, bytes: &[u8]| {
        image.write_at(0, &before);
        image.write_at(at, bytes);
        Header::read(&image.path()).unwrap_err()
    };
    let cipher = |error: &DiskError, says: &str| matches!(error, DiskError::Cipher { cipher, .. } if cipher == says);
    assert!(cipher(&changed(8, b"cipher_null\0"), "cipher_null-xts-plain64"));
    assert!(cipher(&changed(40, b"cbc-plain\0"), "aes-cbc-plain"));
    let many = u32::MAX.to_be_bytes();
    for (at, part) in [
        (104, "header"),
        (108, "volume key"),
        (164, "digest"),
        (212, "key slot 0"),
        (252, "key slot 0"),
    ] {
        let error = changed(at, &many);
        assert!(
            matches!(&error, DiskError::Cost { part: said, .. } if said == part),
            "{at}: {error}"
        );
    }
    assert!(matches!(changed(168, b"xx"), DiskError::Luks1 { .. }));
    image.write_at(0, &before);
    assert!(Header::read(&image.path()).is_ok());
}

#[test]
fn a_luks1_header_that_was_changed_meanwhile_is_not_opened() {
    let image = Image::luks1();
    std::fs::write(image.sidecar(), TOKEN).unwrap();
    let header = Header::read(&image.path()).unwrap();
    let other = Image::luks1();
    std::fs::copy(other.path(), image.path()).unwrap();
    let error = open(&header, "assay-never-opened", PASSPHRASE.as_bytes()).unwrap_err();
    assert!(matches!(error, DiskError::Changed { .. }), "{error}");
}

/// Found before anything of the kernel's is asked for.
#[test]
fn a_key_of_another_image_is_named_with_the_image() {
    for image in [Image::luks2(&[]), Image::luks1()] {
        std::fs::write(image.sidecar(), TOKEN).unwrap();
        if std::fs::read(image.path()).unwrap()[7] == 2 {
            image.token(TOKEN);
        }
        let header = Header::read(&image.path()).unwrap();
        let error = open(&header, "assay-never-opened", &[b'f'; 64]).unwrap_err();
        assert!(
            matches!(&error, DiskError::WrongKey { image: named, key_id }
                if *named == image.path() && key_id == header.token.key_id()),
            "{error}"
        );
    }
}

#[test]
fn a_pipe_is_refused_and_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).unwrap();
    assert!(matches!(Header::read(&pipe), Err(DiskError::Open { .. })));
}

#[test]
fn names_are_those_that_device_mapper_and_people_can_read() {
    for good in ["assay-6f9619ff", "vm1", "a.b_c-d", "0"] {
        assert!(check_name(good).is_ok(), "{good}");
    }
    let long = "x".repeat(65);
    for bad in ["", ".", "..", "-x", "a/b", "a b", "control", "a\n", long.as_str()] {
        assert!(matches!(check_name(bad), Err(DiskError::BadName { .. })), "{bad}");
    }
}

#[test]
fn an_open_disk_is_found_by_its_uuid() {
    let block = tempfile::tempdir().unwrap();
    let mapping = |device: &str, uuid: &str, name: &str| {
        let dm = block.path().join(device).join("dm");
        std::fs::create_dir_all(&dm).unwrap();
        std::fs::write(dm.join("uuid"), uuid).unwrap();
        std::fs::write(dm.join("name"), name).unwrap();
    };
    mapping("dm-0", "LVM-abc\n", "root\n");
    mapping("dm-1", "CRYPT-LUKS2-6f9619ff8b864011b42d00cf4fc964ff-vm1\n", "vm1\n");
    std::fs::create_dir(block.path().join("sda")).unwrap();
    let uuid: [u8; 16] = hex::decode("6f9619ff8b864011b42d00cf4fc964ff")
        .unwrap()
        .try_into()
        .unwrap();
    assert_eq!(open_mapping(block.path(), &uuid).as_deref(), Some("vm1"));
    assert_eq!(open_mapping(block.path(), &[0; 16]), None);
    mapping("dm-2", "CRYPT-LUKS1-00112233445566778899aabbccddeeff-vm2\n", "vm2\n");
    mapping("dm-3", "CRYPT-PLAIN-ffffffffffffffffffffffffffffffff-vm3\n", "vm3\n");
    let luks1 = 0x0011_2233_4455_6677_8899_aabb_ccdd_eeff_u128.to_be_bytes();
    assert_eq!(open_mapping(block.path(), &luks1).as_deref(), Some("vm2"));
    assert_eq!(open_mapping(block.path(), &[0xff; 16]), None);
}

#[test]
fn closing_what_is_not_open_says_so() {
    assert!(matches!(
        close("assay-never-opened", None),
        Err(DiskError::NotOpen { .. })
    ));
    assert!(matches!(close("../sda", None), Err(DiskError::BadName { .. })));
}
