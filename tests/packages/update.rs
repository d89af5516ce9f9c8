//! The update ISO for XCP-ng 8.3, read as xapi, yum and rpm read it, without the programs that made it.

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use roxmltree::Document;
use sha2::{Digest as _, Sha256};

use crate::built::{files, folder, package, succeeds, told};

/// An offset of ISO 9660: the primary volume descriptor (ECMA-119 section 8.4), and in it the volume's name of 32 bytes.
const DESCRIPTOR: usize = 0x8000;
const NAME: std::ops::Range<usize> = DESCRIPTOR + 40..DESCRIPTOR + 72;

/// The ISO's files, in a folder.
struct Pack {
    root: tempfile::TempDir,
}

impl Pack {
    fn open() -> Self {
        let root = tempfile::tempdir().expect("a folder");
        told(
            Command::new("bsdtar")
                .arg("-xf")
                .arg(package("assay-agent", ".iso"))
                .arg("-C")
                .arg(root.path()),
        );
        Self { root }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).expect("a text of the update")
    }

    fn rpms(&self) -> Vec<PathBuf> {
        files(&self.path("Packages"))
    }
}

/// What xapi takes from update.xml, or why it refuses it (xen-api, `xapi_pool_update.ml`: parse_update_info).
struct Update {
    label: String,
    version: String,
    uuid: String,
    key: String,
    size: u64,
    description: String,
}

impl Update {
    fn read(text: &str) -> Result<Self, String> {
        let document = Document::parse(text).map_err(|error| error.to_string())?;
        let update = document.root_element();
        if !update.has_tag_name("update") {
            return Err("missing <update> in update.xml".into());
        }
        let named = |name: &str| {
            let value = update.attribute(name).map(str::to_owned);
            value.ok_or_else(|| format!("missing <{name}> in update.xml"))
        };
        let description = update.children().find(|child| child.has_tag_name("name-description"));
        let key = update.attribute("key").unwrap_or_default();
        Ok(Self {
            uuid: named("uuid")?,
            label: named("name-label")?,
            version: named("version")?,
            key: key.rsplit('/').next().unwrap_or_default().to_owned(),
            size: update
                .attribute("installation-size")
                .map_or(Ok(0), str::parse)
                .unwrap_or(0),
            description: description
                .and_then(|child| child.text())
                .ok_or("missing <name-description> in update.xml")?
                .to_owned(),
        })
    }
}

/// A folder of gpg's own that trusts one public key, as import-update-key leaves xapi's.
fn keyring(public: &Path) -> tempfile::TempDir {
    let home = tempfile::tempdir().expect("a folder");
    let gpg = |words: &[&str]| {
        let mut gpg = Command::new("gpg");
        gpg.args(["--batch", "--homedir"]).arg(home.path()).args(words);
        gpg
    };
    told(gpg(&["--import"]).arg(public));
    let listed = told(&mut gpg(&["--with-colons", "--list-keys"]));
    let fingerprint = listed
        .lines()
        .find_map(|line| line.strip_prefix("fpr:"))
        .map(|rest| rest.trim_matches(':').to_owned());
    let trust = home.path().join("trust");
    fs::write(&trust, format!("{}:6:\n", fingerprint.expect("a fingerprint"))).expect("a file");
    told(gpg(&["--import-ownertrust"]).arg(&trust));
    home
}

/// xapi wants GOODSIG and TRUST_ULTIMATE (`gpg.ml`).
fn is_signed(home: &Path, file: &Path) -> bool {
    let mut signature = file.as_os_str().to_owned();
    signature.push(".asc");
    let ended = Command::new("gpg")
        .args(["--batch", "--status-fd", "1", "--homedir"])
        .arg(home)
        .arg("--verify")
        .args([Path::new(&signature), file])
        .output()
        .expect("gpg");
    let status = String::from_utf8_lossy(&ended.stdout);
    ended.status.success() && status.contains("GOODSIG") && status.contains("TRUST_ULTIMATE")
}

/// A key of somebody else.
fn other_key() -> (tempfile::TempDir, PathBuf) {
    let home = tempfile::tempdir().expect("a folder");
    let gpg = |words: &[&str]| {
        let mut gpg = Command::new("gpg");
        gpg.args([
            "--batch",
            "--pinentry-mode",
            "loopback",
            "--passphrase",
            "",
            "--homedir",
        ]);
        gpg.arg(home.path()).args(words);
        gpg
    };
    told(&mut gpg(&[
        "--quick-generate-key",
        "somebody else",
        "rsa2048",
        "sign",
        "never",
    ]));
    let public = home.path().join("public.asc");
    fs::write(&public, told(&mut gpg(&["--armor", "--export"]))).expect("a file");
    told(
        Command::new("gpgconf")
            .args(["--kill", "all"])
            .env("GNUPGHOME", home.path()),
    );
    (home, public)
}

fn public_key() -> PathBuf {
    folder().join("RPM-GPG-KEY-assay-TEST")
}

fn sha256(path: &Path) -> String {
    hex::encode(Sha256::digest(fs::read(path).expect("a file")))
}

/// The first text of an element of this name below, in whatever namespace.
fn text_of<'a>(node: roxmltree::Node<'a, '_>, name: &str) -> &'a str {
    let found = node.descendants().find(|child| child.tag_name().name() == name);
    found.and_then(|child| child.text()).unwrap_or_default()
}

#[test]
fn an_update_is_described_as_xapi_wants_it() {
    let pack = Pack::open();
    let text = pack.text("update.xml");
    let update = Update::read(&text).expect("an update");
    assert_eq!(update.version, env!("CARGO_PKG_VERSION"));
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    assert!(update.label.chars().all(plain), "{}", update.label);
    let lengths: Vec<usize> = update.uuid.split('-').map(str::len).collect();
    assert_eq!(lengths, [8, 4, 4, 4, 12], "{}", update.uuid);
    let lower = |c: char| c == '-' || c.is_ascii_digit() || ('a'..='f').contains(&c);
    assert!(update.uuid.chars().all(lower), "{}", update.uuid);
    // Room for three times of this is asked of a host.
    assert!((1 << 20..64 << 20).contains(&update.size), "{}", update.size);
    assert!(folder().join(&update.key).is_file(), "{}", update.key);
    // Signed with the key that is made where none is given: everything says so.
    let iso = package("assay-agent", ".iso");
    let mut start = vec![0; NAME.end];
    fs::File::open(&iso)
        .and_then(|mut iso| iso.read_exact(&mut start))
        .expect("the ISO");
    assert_eq!(start.get(DESCRIPTOR + 1..DESCRIPTOR + 6), Some(b"CD001".as_slice()));
    let volume = String::from_utf8_lossy(start.get(NAME).unwrap_or_default()).into_owned();
    for text in [&update.label, &update.key, &update.description, &volume] {
        assert!(text.contains("TEST"), "{text}");
    }
    // And this reading refuses what xapi refuses.
    for attribute in ["uuid", "name-label", "version"] {
        let without = text.replace(&format!("{attribute}="), "x=");
        assert!(Update::read(&without).is_err(), "{attribute} is not wanted");
    }
    assert!(Update::read(&text.replace("name-description", "x")).is_err());
}

#[test]
fn an_update_is_signed_and_another_key_is_refused() {
    let pack = Pack::open();
    let ours = keyring(&public_key());
    let (_home, public) = other_key();
    let others = keyring(&public);
    for name in ["update.xml", "repodata/repomd.xml"] {
        let file = pack.path(name);
        assert!(is_signed(ours.path(), &file), "{name}");
        assert!(!is_signed(others.path(), &file), "{name} passes with another key");
        let mut changed = fs::read(&file).expect("the file");
        changed.push(b'\n');
        fs::write(&file, changed).expect("the file");
        assert!(!is_signed(ours.path(), &file), "{name} passes changed");
    }
}

/// What a list of the repository says of itself: the hash in repomd.xml is that of the file, which is gzip.
fn list(pack: &Pack, kind: &str) -> String {
    let repomd = pack.text("repodata/repomd.xml");
    let repomd = Document::parse(&repomd).expect("repomd.xml");
    let data = repomd
        .descendants()
        .find(|node| node.tag_name().name() == "data" && node.attribute("type") == Some(kind))
        .expect("a list");
    let location = data.descendants().find(|node| node.tag_name().name() == "location");
    let path = pack.path(location.and_then(|node| node.attribute("href")).expect("a location"));
    assert_eq!(text_of(data, "checksum"), sha256(&path), "{kind}");
    if path.extension().is_some_and(|extension| extension == "gz") {
        told(Command::new("gzip").arg("-dc").arg(&path))
    } else {
        fs::read_to_string(path).expect("a list")
    }
}

#[test]
fn an_update_is_a_repository_whose_group_draws_in_the_agent() {
    let pack = Pack::open();
    let update = Update::read(&pack.text("update.xml")).expect("an update");
    let marker = format!("update-{}", update.label);

    let groups = list(&pack, "group");
    let groups = Document::parse(&groups).expect("groups");
    let group = groups
        .descendants()
        .find(|node| node.tag_name().name() == "group")
        .expect("a group");
    assert_eq!(text_of(group, "id"), "update");
    let wanted = group
        .descendants()
        .find(|node| node.tag_name().name() == "packagereq")
        .expect("a package");
    assert_eq!(
        (wanted.attribute("type"), wanted.text()),
        (Some("mandatory"), Some(marker.as_str()))
    );

    let primary = list(&pack, "primary");
    let primary = Document::parse(&primary).expect("the packages");
    let packages: Vec<_> = primary
        .descendants()
        .filter(|node| node.tag_name().name() == "package")
        .collect();
    assert_eq!(packages.len(), pack.rpms().len());
    for package in &packages {
        let location = package.descendants().find(|node| node.tag_name().name() == "location");
        let path = pack.path(location.and_then(|node| node.attribute("href")).expect("a location"));
        assert_eq!(text_of(*package, "checksum"), sha256(&path), "{}", path.display());
    }
    let found = packages.iter().find(|package| text_of(**package, "name") == marker);
    let needs: Vec<_> = found
        .expect("the package that the group names")
        .descendants()
        .filter(|node| node.attribute("name") == Some("assay-agent"))
        .map(|node| (node.attribute("flags"), node.attribute("ver"), node.attribute("rel")))
        .collect();
    let release = Some("1.xcpng8.3");
    assert_eq!(needs, [(Some("GE"), Some(env!("CARGO_PKG_VERSION")), release)]);
    let agent = packages
        .iter()
        .find(|package| text_of(**package, "name") == "assay-agent");
    let version = agent.and_then(|agent| agent.descendants().find(|node| node.tag_name().name() == "version"));
    assert_eq!(version.and_then(|node| node.attribute("rel")), release);
}

/// rpm, with a root of its own in which this key is trusted, and nothing that is not signed passes.
fn rpm(root: &Path, words: &[&str]) -> Command {
    let mut rpm = Command::new("rpm");
    rpm.arg("--root")
        .arg(root)
        .args(["--define", "_pkgverify_level all"])
        .args(words);
    rpm
}

#[test]
fn an_update_installs_into_an_empty_root_with_its_key_and_with_no_other() {
    const INSTALL: [&str; 4] = ["--install", "--nodeps", "--noscripts", "--ignorearch"];
    let pack = Pack::open();
    let update = Update::read(&pack.text("update.xml")).expect("an update");
    let (_home, public) = other_key();
    let other = tempfile::tempdir().expect("a folder");
    told(rpm(other.path(), &["--import"]).arg(public));
    assert!(!succeeds(rpm(other.path(), &INSTALL).args(pack.rpms())));
    assert!(!other.path().join("usr/bin/assay-agent").exists());

    let root = tempfile::tempdir().expect("a folder");
    told(rpm(root.path(), &["--import"]).arg(public_key()));
    told(rpm(root.path(), &INSTALL).args(pack.rpms()));
    told(&mut rpm(
        root.path(),
        &["--verify", "--nodeps", "--noscripts", "assay-agent"],
    ));
    // What xapi lists as applied is what it was told at the upload.
    let applied = root.path().join("var/update/applied").join(&update.uuid);
    assert_eq!(fs::read_to_string(applied).expect("the mark"), pack.text("update.xml"));
    // A removal of the mark leaves the agent, and one of both leaves nothing.
    let marker = format!("update-{}", update.label);
    told(&mut rpm(root.path(), &["--erase", "--nodeps", "--noscripts", &marker]));
    assert!(root.path().join("usr/bin/assay-agent").is_file());
    told(&mut rpm(
        root.path(),
        &["--erase", "--nodeps", "--noscripts", "assay-agent"],
    ));
    assert!(!root.path().join("usr/bin/assay-agent").exists());
}

#[test]
fn a_broken_update_is_noticed_before_anything_is_installed() {
    let pack = Pack::open();
    let agent = pack
        .rpms()
        .into_iter()
        .find(|path| path.to_string_lossy().contains("/assay-agent-"))
        .expect("the agent's RPM");
    let mut bytes = fs::read(&agent).expect("the RPM");
    let whole = bytes.clone();
    let middle = bytes.len() / 2;
    bytes.iter_mut().skip(middle).take(1).for_each(|byte| *byte ^= 1);
    let root = tempfile::tempdir().expect("a folder");
    told(rpm(root.path(), &["--import"]).arg(public_key()));
    for broken in [bytes.as_slice(), whole.get(..middle).unwrap_or_default()] {
        fs::write(&agent, broken).expect("the RPM");
        assert!(!list(&pack, "primary").contains(&sha256(&agent)));
        let install = ["--install", "--nodeps", "--noscripts", "--ignorearch"];
        assert!(!succeeds(rpm(root.path(), &install).arg(&agent)));
        assert!(!root.path().join("usr/bin/assay-agent").exists());
    }
    // A medium that ends early has no repository that is complete.
    let iso = fs::read(package("assay-agent", ".iso")).expect("the ISO");
    let cut = root.path().join("cut.iso");
    fs::write(&cut, iso.get(..iso.len() / 2).unwrap_or_default()).expect("a file");
    let to = tempfile::tempdir().expect("a folder");
    assert!(!succeeds(
        Command::new("bsdtar").arg("-xf").arg(&cut).arg("-C").arg(to.path())
    ));
}
