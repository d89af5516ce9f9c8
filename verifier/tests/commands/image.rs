//! `image seal` and `key list`, run as programs.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use assay_evidence::digest::Sha256Digest;
use assay_evidence::token::LuksToken;
use serde_json::Value;

use super::program::{Ran, Site, verifier};

fn site_with_disk() -> Site {
    let site = Site::init();
    fs::write(site.path("disk.raw"), vec![0x42; 1024 * 1024]).unwrap();
    site
}

/// `name value` lines of a command's answer.
fn value_of<'a>(out: &'a str, name: &str) -> &'a str {
    let line = out.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name} in: {out}"))
}

#[test]
fn seals_and_lists_the_key() {
    let site = site_with_disk();
    assert!(site.run(&["key", "list"]).good().contains("No keys"));
    let out = site.seal(&site.path("disk.raw"), &site.path("disk.luks")).good();
    let (key, disk) = (value_of(&out, "key"), value_of(&out, "disk"));
    assert_eq!(value_of(&out, "size"), "1048576 bytes");
    assert_eq!(value_of(&out, "policy"), "default");
    assert!(out.contains("policy capture HOST --name default"), "{out}");

    let list: Value = serde_json::from_str(&site.run(&["key", "list", "--json"]).good()).unwrap();
    assert_eq!(list["keys"].as_array().unwrap().len(), 1);
    assert_eq!(list["keys"][0]["key_id"], key);
    assert_eq!(list["keys"][0]["disk_uuid"], disk);
    assert_eq!(list["keys"][0]["image"], "disk.luks");
    assert_eq!(list["damaged"], Value::Array(Vec::new()));
    let text = site.run(&["key", "list"]).good();
    assert!(
        text.contains(key) && text.contains(disk) && text.contains("disk.luks"),
        "{text}"
    );
}

#[test]
fn the_recovery_key_is_told_once_and_opens_the_image_without_a_verifier() {
    let site = site_with_disk();
    let [disk, image, out, file] = ["disk.raw", "disk.luks", "out.raw", "recovery"].map(|name| site.path(name));
    let said = site.seal(&disk, &image).good();
    let key = value_of(&said, "recovery").to_owned();
    assert_eq!((key.len(), key.split('-').count()), (71, 8), "{key}");
    // Nothing that stays knows it.
    for folder in [site.state(), site.state().join("keys")] {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let kept = fs::read(&path).unwrap_or_default();
            assert!(
                !kept.windows(key.len()).any(|window| window == key.as_bytes()),
                "{}",
                path.display()
            );
        }
    }
    fs::write(&file, format!("{key}\n")).unwrap();
    let nowhere = site.path("nowhere");
    let unseal = |recovery: &std::path::Path, out: &std::path::Path| {
        verifier([
            "--state".as_ref(),
            nowhere.as_os_str(),
            "image".as_ref(),
            "unseal".as_ref(),
            image.as_os_str(),
            out.as_os_str(),
            "--recovery-file".as_ref(),
            recovery.as_os_str(),
        ])
    };
    unseal(&file, &out).good();
    assert!(fs::read(&out).unwrap() == fs::read(&disk).unwrap());
    unseal(&file, &out).refused(&["out.raw", "exists already"]);
    fs::write(&file, key.replace(&key[..8], "00000000")).unwrap();
    let other = site.path("other.raw");
    unseal(&file, &other).refused(&["opens no key slot", "disk.luks"]);
    fs::write(&file, vec![b'0'; 600]).unwrap();
    unseal(&file, &other).refused(&["512 bytes"]);
    assert!(!other.exists());
}

#[test]
fn a_recovery_file_is_private_new_and_goes_with_a_failure() {
    use std::os::unix::fs::PermissionsExt as _;
    let site = site_with_disk();
    let [disk, image, file] = ["disk.raw", "disk.luks", "recovery"].map(|name| site.path(name));
    let seal = |options: &[&OsStr]| {
        let words = ["image", "seal"].map(OsStr::new);
        site.run(&[&words, options, &[disk.as_os_str(), image.as_os_str()]].concat())
    };
    let option = [OsStr::new("--recovery-file"), file.as_os_str()];
    assert!(!seal(&option).good().contains("shown once"));
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    // As stock cryptsetup takes it.
    let opened = Command::new("cryptsetup")
        .args(["open", "--test-passphrase", "--key-file"])
        .args([&file, &image])
        .status();
    assert!(opened.unwrap().success());
    let kept = fs::read(&file).unwrap();
    seal(&option).refused(&["recovery", "does not exist"]);
    assert_eq!(fs::read(&file).unwrap(), kept);
    fs::remove_file(&file).unwrap();
    seal(&option).refused(&["disk.luks", "exists already"]);
    assert!(!file.exists(), "a recovery key for nothing");
    fs::remove_file(&image).unwrap();
    let without = seal(&[OsStr::new("--no-recovery")]).good();
    assert!(without.contains("no recovery key"), "{without}");
    assert!(!without.lines().any(|line| line.starts_with("recovery")), "{without}");
}

#[test]
fn an_image_is_inspected_and_its_properties_are_openstacks() {
    let site = site_with_disk();
    let [disk, image] = ["disk.raw", "disk.luks"].map(|name| site.path(name));
    let (disk, image) = (disk.to_str().unwrap(), image.to_str().unwrap());
    let said = site.run(&["image", "seal", "--format", "luks1", disk, image]).good();
    let key = value_of(&said, "key");
    assert!(value_of(&said, "sidecar").ends_with("disk.luks.assay.json"));
    let text = site.run(&["image", "inspect", image]).good();
    assert_eq!((value_of(&text, "format"), value_of(&text, "key")), ("luks1", key));
    assert!(text.contains("key store: has this key"), "{text}");
    let properties = site.run(&["image", "properties", image]).good();
    for line in [
        "os_encrypt_format=LUKSv1",
        &format!("os_encrypt_key_id={key}"),
        "os_encrypt_key_deletion_policy=do_not_delete",
        "os_decrypt_container_format=bare",
        "os_decrypt_size=1048576",
        "assay_verifiers=https://192.0.2.1:8440",
        "assay_policy=default",
    ] {
        assert!(
            properties.lines().any(|found| found == line),
            "{line} is not in {properties}"
        );
    }
    let json: Value = serde_json::from_str(&site.run(&["image", "properties", "--json", image]).good()).unwrap();
    assert_eq!(json["os_encrypt_key_id"], key);

    let other = Site::init();
    let json: Value = serde_json::from_str(&other.run(&["image", "inspect", "--json", image]).good()).unwrap();
    assert_eq!(
        (&json["key_store"], &json["disk_bytes"]),
        (&"unknown".into(), &1_048_576.into())
    );
    site.run(&["image", "inspect", disk])
        .refused(&["disk.raw", "not a sealed image"]);

    let rotated = site.run(&["image", "rotate", image]).good();
    assert_ne!(value_of(&rotated, "key"), key);
    site.run(&["image", "rotate", image]).refused(&[key, "--confirm"]);
    assert!(site.run(&["image", "rotate", "--confirm", image]).good().contains(key));
    site.run(&["image", "rotate", "--confirm", image])
        .refused(&["nothing to confirm"]);
}

#[test]
fn the_token_names_this_verifier() {
    let site = site_with_disk();
    let out = site.seal(&site.path("disk.raw"), &site.path("disk.luks")).good();
    let dump = Command::new("cryptsetup")
        .args(["luksDump", "--dump-json-metadata"])
        .arg(site.path("disk.luks"))
        .output()
        .expect("cryptsetup is not installed: `cargo xtask setup` installs it");
    let json: Value = serde_json::from_slice(&dump.stdout).unwrap();
    let tokens: Vec<Value> = json["tokens"].as_object().unwrap().values().cloned().collect();
    let token = LuksToken::find(&tokens).unwrap();
    assert_eq!(token.key_id().to_string(), value_of(&out, "key"));

    // The CA of the join file, as a host computes it.
    let pem = fs::read(site.state().join("ca.pem")).unwrap();
    let (_, pem) = x509_parser::pem::parse_x509_pem(&pem).unwrap();
    let spki = Sha256Digest::of(pem.parse_x509().unwrap().public_key().raw);
    assert!(
        token
            .allowed_verifiers(&["https://192.0.2.1:8440".to_owned()], &spki)
            .is_ok()
    );
}

#[test]
fn refusals_name_the_thing_and_leave_nothing() {
    let site = site_with_disk();
    let [input, output, odd, missing] = ["disk.raw", "disk.luks", "odd.raw", "missing.raw"].map(|name| site.path(name));
    fs::write(&odd, vec![0; 1000]).unwrap();
    site.seal(&odd, &output).refused(&["odd.raw", "1000 bytes", "truncate"]);
    site.seal(&missing, &output).refused(&["missing.raw", "No such file"]);
    fs::write(&output, "precious").unwrap();
    site.seal(&input, &output).refused(&["disk.luks", "exists already"]);
    assert_eq!(fs::read(&output).unwrap(), b"precious");
    assert!(site.run(&["key", "list"]).good().contains("No keys"));
}

#[test]
fn no_room_says_how_much_is_needed() {
    let site = site_with_disk();
    // A file size limit stands in for a full disk: it can be had without a file system of one's own. 2048 blocks of
    // 512 bytes are less than the header.
    let script = "trap '' XFSZ; ulimit -f 2048; exec \"$@\"";
    let output = Command::new("sh")
        .args(["-c", script, "sh", env!("CARGO_BIN_EXE_assay-verifier"), "--state"])
        .arg(site.state())
        .args(["image", "seal"])
        .args([site.path("disk.raw"), site.path("disk.luks")])
        .output()
        .unwrap();
    Ran::new(output).refused(&["no room for", "disk.luks.partial", "5242880 bytes"]);
    assert!(!site.path("disk.luks").exists());
    assert!(!site.path("disk.luks.partial").exists());
    assert!(site.run(&["key", "list"]).good().contains("No keys"));
}

#[test]
fn no_room_in_place_leaves_the_disk_as_it_was_and_is_gone_on_with() {
    let site = site_with_disk();
    let disk = site.path("disk.raw");
    let before = fs::read(&disk).unwrap();
    // Room for the header and the journal, and not for both header and disk in one file.
    let script = "trap '' XFSZ; ulimit -f 9000; exec \"$@\"";
    let output = Command::new("sh")
        .args(["-c", script, "sh", env!("CARGO_BIN_EXE_assay-verifier"), "--state"])
        .arg(site.state())
        .args(["image", "seal", "--in-place", "--no-recovery"])
        .arg(&disk)
        .output()
        .unwrap();
    Ran::new(output).refused(&["no room for", "disk.raw", "5242880 bytes", "image seal --in-place"]);
    assert!(fs::read(&disk).unwrap() == before);
    let (image, copy) = (disk.to_str().unwrap(), site.path("copy.luks"));
    site.seal(&disk, &copy).refused(&["disk.raw", "--in-place"]);
    let said = site.run(&["image", "seal", "--in-place", image]).good();
    assert!(!said.contains("recovery"), "told when it was begun, if at all: {said}");
    site.run(&["image", "seal", "--in-place", image])
        .refused(&["LUKS image already"]);
}

/// Runs the verifier with a file system of 4.5 MiB, empty but for `disk.raw`, at a folder; what is on it afterwards follows its output.
fn on_a_small_file_system(site: &Site, folder: &Path, args: &[&OsStr]) -> Ran {
    let script = "mount -t tmpfs -o size=4608k none \"$0\" && cp \"$1\" \"$0\"/disk.raw && original=\"$1\" && shift && \
                  { \"$@\"; code=$?; ls -A \"$0\"; cmp \"$original\" \"$0\"/disk.raw || exit 99; exit $code; }";
    // Only root may mount; who is not root is it in a namespace of his own.
    let mine: &[&str] = if fs::metadata("/proc/self").unwrap().uid() == 0 {
        &["--mount"]
    } else {
        &["--user", "--map-root-user", "--mount"]
    };
    let output = Command::new("unshare")
        .args(mine)
        .args(["sh", "-c", script])
        .arg(folder)
        .arg(site.path("disk.raw"))
        .args([env!("CARGO_BIN_EXE_assay-verifier"), "--state"])
        .arg(site.state())
        .args(args)
        .output()
        .unwrap();
    Ran::new(output)
}

#[test]
fn a_full_file_system_is_named_and_left_as_it_was() {
    let site = site_with_disk();
    let folder = site.path("small");
    fs::create_dir(&folder).unwrap();
    let [disk, image] = ["disk.raw", "disk.luks"].map(|name| folder.join(name));
    let ran = on_a_small_file_system(
        &site,
        &folder,
        &["image".as_ref(), "seal".as_ref(), disk.as_ref(), image.as_ref()],
    );
    assert_eq!(ran.out, "disk.raw\n", "{}", ran.err);
    ran.refused(&["no room for", "disk.luks.partial", "5242880 bytes"]);
    assert!(site.run(&["key", "list"]).good().contains("No keys"));

    let in_place = ["image", "seal", "--in-place", "--no-recovery"].map(OsStr::new);
    let ran = on_a_small_file_system(&site, &folder, &[&in_place[..], &[disk.as_ref()]].concat());
    assert_eq!(ran.out, "disk.raw\n", "{}", ran.err);
    ran.refused(&["no room for", "disk.raw", "5242880 bytes"]);
}

#[test]
fn a_key_that_a_sealing_in_place_needs_is_not_removed_unless_the_image_is_given_up() {
    let site = site_with_disk();
    // No room for the disk in its new place: begun, and not ended.
    let script = "trap '' XFSZ; ulimit -f 9000; exec \"$@\"";
    let output = Command::new("sh")
        .args(["-c", script, "sh", env!("CARGO_BIN_EXE_assay-verifier"), "--state"])
        .arg(site.state())
        .args(["image", "seal", "--in-place", "--no-recovery"])
        .arg(site.path("disk.raw"))
        .output()
        .unwrap();
    Ran::new(output).refused(&["no room for"]);
    let list: Value = serde_json::from_str(&site.run(&["key", "list", "--json"]).good()).unwrap();
    let key = list["keys"][0]["key_id"].as_str().unwrap();
    site.run(&["key", "remove", key, "--forever"])
        .refused(&[key, "image seal --in-place", "--force"]);
    assert!(site.run(&["key", "list"]).good().contains(key));
    site.run(&["key", "remove", key, "--forever", "--force"]).good();
    assert!(site.run(&["key", "list"]).good().contains("No keys"));
    site.run(&["key", "remove", key, "--forever"]).refused(&[key]);
}

#[test]
fn in_place_survives_being_killed_at_any_time() {
    let plain: Vec<u8> = (0..6 * 1024 * 1024_u32)
        .flat_map(|n| n.wrapping_mul(0x9e37_79b1).to_le_bytes())
        .collect();
    for pause in [0, 60, 250, 700] {
        let site = Site::init();
        let (disk, recovery) = (site.path("disk.raw"), site.path("recovery"));
        fs::write(&disk, &plain).unwrap();
        let in_place = |options: &[&str]| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_assay-verifier"));
            command
                .arg("--state")
                .arg(site.state())
                .args(["image", "seal", "--in-place"]);
            command
                .args(options)
                .arg(&disk)
                .stdout(Stdio::null())
                .stderr(Stdio::piped());
            command
        };
        let mut run = in_place(&["--recovery-file", recovery.to_str().unwrap()])
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(pause));
        run.kill().unwrap();
        let killed = !run.wait().unwrap().success();
        // Whenever it was: without a journal nothing has happened, with one it is gone on with, and once it has ended it is sealed.
        if fs::exists(&recovery).unwrap() && !site.state().join("sealing").exists() {
            fs::remove_file(&recovery).unwrap();
        }
        let again = in_place(&["--recovery-file", site.path("second").to_str().unwrap()])
            .output()
            .unwrap();
        let said = String::from_utf8(again.stderr).unwrap();
        assert!(
            again.status.success() || (!killed && said.contains("LUKS image already")),
            "{pause} ms: {said}"
        );
        let inspected: Value =
            serde_json::from_str(&site.run(&["image", "inspect", "--json", disk.to_str().unwrap()]).good()).unwrap();
        assert_eq!(inspected["key_store"], "known", "{pause} ms: {inspected:#}");
        let out = site.path("out.raw");
        site.run(&["image", "unseal", disk.to_str().unwrap(), out.to_str().unwrap()])
            .good();
        assert!(fs::read(&out).unwrap() == plain, "{pause} ms");
    }
}

#[test]
fn a_damaged_key_is_named_and_hides_no_other() {
    let site = site_with_disk();
    let first = site.seal(&site.path("disk.raw"), &site.path("a.luks")).good();
    let second = site.seal(&site.path("disk.raw"), &site.path("b.luks")).good();
    let file = site
        .state()
        .join("keys")
        .join(format!("{}.json", value_of(&first, "key")));
    let edited = fs::read_to_string(&file).unwrap().replace("default", "lenient");
    fs::write(&file, edited).unwrap();
    let ran = site.run(&["key", "list"]);
    assert!(
        ran.out.contains(value_of(&second, "key")) && !ran.out.contains(value_of(&first, "key")),
        "{}",
        ran.out
    );
    ran.refused(&[value_of(&first, "key"), "fails its authentication"]);
}

#[test]
fn without_a_verifier_nothing_is_sealed() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("disk.raw"), vec![0; 512]).unwrap();
    let state = dir.path().join("state");
    let [input, output] = ["disk.raw", "disk.luks"].map(|name| dir.path().join(name));
    let ran = verifier([
        "--state".as_ref(),
        state.as_os_str(),
        "image".as_ref(),
        "seal".as_ref(),
        input.as_os_str(),
        output.as_os_str(),
    ]);
    ran.refused(&["init"]);
    assert!(!output.exists());
}
