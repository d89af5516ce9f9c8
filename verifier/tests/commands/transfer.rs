//! `image push` and `image pull` with a plain HTTP store, run as programs.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use assay_tests::image_store::ImageStore;

use super::program::{Ran, Site};

/// A disk of sectors that are all different, but for an empty stretch.
const SECTORS: u32 = 6000;

/// A verifier with a disk in the clear, and sealed in this format.
pub struct Scene {
    pub site: Site,
    pub raw: PathBuf,
    pub image: PathBuf,
}

impl Scene {
    pub fn new(format: &str) -> Self {
        let site = Site::init();
        let [raw, image] = ["disk.raw", "disk.img"].map(|name| site.path(name));
        let mut disk = Vec::new();
        for number in 0..SECTORS {
            let word = if (1000..2000).contains(&number) {
                [0; 4]
            } else {
                (number + 1).to_be_bytes()
            };
            disk.extend(word.repeat(128));
        }
        fs::write(&raw, disk).unwrap();
        let words = ["image", "seal", "--format", format, as_str(&raw), as_str(&image)];
        site.run(&words).good();
        Self { site, raw, image }
    }

    /// What was pulled opens, and is the disk.
    pub fn opens(&self, pulled: &Path) {
        let out = self.site.path("again.raw");
        self.site.run(&["image", "unseal", as_str(pulled), as_str(&out)]).good();
        assert!(fs::read(&out).unwrap() == fs::read(&self.raw).unwrap());
        fs::remove_file(out).unwrap();
    }

    /// No sector of the disk is in any file of this folder, at any place where a sector can be.
    pub fn nothing_in_the_clear(&self, folder: &Path) {
        let disk = fs::read(&self.raw).unwrap();
        let sectors: HashSet<&[u8]> = disk
            .chunks(512)
            .filter(|sector| sector.iter().any(|b| *b != 0))
            .collect();
        assert_eq!(sectors.len(), 5000);
        let mut seen = 0;
        for entry in fs::read_dir(folder).unwrap() {
            let bytes = fs::read(entry.unwrap().path()).unwrap();
            seen += bytes.len();
            let clear = bytes.chunks(512).filter(|sector| sectors.contains(sector)).count();
            assert_eq!(clear, 0);
        }
        assert!(seen >= disk.len());
    }
}

pub fn as_str(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn pull(site: &Site, url: &str, out: &Path) -> Ran {
    site.run(&["image", "pull", url, as_str(out)])
}

#[test]
fn an_image_goes_to_a_plain_store_and_comes_back() {
    for format in ["luks2", "luks1"] {
        let scene = Scene::new(format);
        let store = ImageStore::plain(0).unwrap();
        let url = format!("{}/web-1.img", store.url());
        let said = scene.site.run(&["image", "push", as_str(&scene.image), &url]).good();
        scene.nothing_in_the_clear(store.images());
        let digest = fs::read_to_string(store.images().join("web-1.img.sha256")).unwrap();
        assert!(said.contains(digest.split(' ').next().unwrap()), "{said}{digest}");
        // As everybody checks it.
        let checked = std::process::Command::new("sha256sum")
            .args(["-c", "web-1.img.sha256"])
            .current_dir(store.images())
            .output()
            .unwrap();
        assert!(checked.status.success(), "{checked:?}");

        let out = scene.site.path("pulled.img");
        pull(&scene.site, &url, &out).good();
        assert!(fs::read(&out).unwrap() == fs::read(&scene.image).unwrap());
        scene.opens(&out);
        pull(&scene.site, &url, &out).refused(&["pulled.img", "exists"]);
    }
}

#[test]
fn what_breaks_off_is_gone_on_with() {
    let scene = Scene::new("luks2");
    let store = ImageStore::plain(1 << 20).unwrap();
    let [whole, part] = ["pulled.img", "begun.img"].map(|name| scene.site.path(name));
    let url = format!("{}/web-1.img", store.url());
    scene.site.run(&["image", "push", as_str(&scene.image), &url]).good();
    pull(&scene.site, &url, &whole).good();
    scene.opens(&whole);
    // Another run had come as far as this.
    let image = fs::read(&scene.image).unwrap();
    let partial = scene.site.path("begun.img.partial");
    fs::write(&partial, &image[..3_000_000]).unwrap();
    pull(&scene.site, &url, &part).good();
    assert!(fs::read(&part).unwrap() == image && !partial.exists());
}

#[test]
fn what_is_not_the_image_is_refused() {
    let scene = Scene::new("luks2");
    let store = ImageStore::plain(0).unwrap();
    let url = format!("{}/web-1.img", store.url());
    let out = scene.site.path("pulled.img");
    // A disk in the clear never leaves.
    scene
        .site
        .run(&["image", "push", as_str(&scene.raw), &url])
        .refused(&["disk.raw"]);
    assert_eq!(fs::read_dir(store.images()).unwrap().count(), 0);
    // Without a digest nobody could say what came.
    fs::write(store.images().join("web-1.img"), "x").unwrap();
    pull(&scene.site, &url, &out).refused(&["web-1.img.sha256", "--sha256"]);

    scene.site.run(&["image", "push", as_str(&scene.image), &url]).good();
    let there = store.images().join("web-1.img");
    let mut bytes = fs::read(&there).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&there, bytes).unwrap();
    pull(&scene.site, &url, &out).refused(&["SHA-256"]);
    // What another run left of something else is not kept either.
    fs::copy(&scene.image, &there).unwrap();
    fs::write(scene.site.path("pulled.img.partial"), "something else").unwrap();
    pull(&scene.site, &url, &out).refused(&["SHA-256"]);
    assert!(!out.exists() && !scene.site.path("pulled.img.partial").exists());
    pull(&scene.site, &url, &out).good();

    pull(
        &scene.site,
        &format!("{}/none.img", store.url()),
        &scene.site.path("none"),
    )
    .refused(&["none.img"]);
    pull(&scene.site, &store.url(), &scene.site.path("none")).refused(&["no image in it"]);
    // A token is for the store alone.
    let token = scene.site.path("token");
    fs::write(&token, "geheim").unwrap();
    fs::set_permissions(&token, fs::Permissions::from_mode(0o600)).unwrap();
    let words = [
        "image",
        "push",
        as_str(&scene.image),
        "http://images.example/x",
        "--token-file",
        as_str(&token),
    ];
    let said = scene.site.run(&words).refused(&["in the clear"]);
    assert!(!said.contains("geheim"));
}
