//! `image push` and `image pull` with a real Glance, without Keystone.

use std::fs;
use std::process::Command;

use assay_tests::image_store::ImageStore;
use serde_json::Value;

use super::transfer::{Scene, as_str};

/// What Glance says of an image, asked by somebody else's client.
fn shown(store: &ImageStore, id: &str) -> Value {
    let url = format!("{}/v2/images/{id}", store.url());
    let output = Command::new("python3")
        .args([
            "-c",
            "import sys, urllib.request as u; sys.stdout.buffer.write(u.urlopen(sys.argv[1]).read())",
            &url,
        ])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn id_in(said: &str) -> &str {
    said.lines().find_map(|line| line.strip_prefix("image ")).unwrap()
}

#[test]
fn an_image_goes_to_glance_with_its_properties_and_comes_back() {
    let store = ImageStore::glance().unwrap();
    let url = store.url();
    for (format, disk_format, container, luks) in [
        ("luks1", "raw", "bare", "LUKSv1"),
        ("qcow2-luks", "qcow2", "bare", "LUKSv1"),
        ("luks2", "raw", "encrypted", "LUKSv2"),
    ] {
        let scene = Scene::new(format);
        let mut push = vec!["image", "push", "--glance", as_str(&scene.image), &url];
        push.extend(["--name", "web-1", "--container-format", container]);
        let said = scene.site.run(&push).good();
        let image = shown(&store, id_in(&said));
        for (property, value) in [
            ("name", "web-1"),
            ("status", "active"),
            ("disk_format", disk_format),
            ("container_format", container),
            ("os_encrypt_format", luks),
            ("os_encrypt_key_deletion_policy", "do_not_delete"),
            ("os_decrypt_container_format", "bare"),
            ("os_decrypt_size", "3072000"),
            ("assay_policy", "default"),
        ] {
            assert_eq!(image[property], value, "{property} in {image:#}");
        }
        let keys: Value = serde_json::from_str(&scene.site.run(&["key", "list", "--json"]).good()).unwrap();
        assert_eq!(image["os_encrypt_key_id"], keys["keys"][0]["key_id"]);
        scene.nothing_in_the_clear(store.images());

        let out = scene.site.path("pulled.img");
        let pull = ["image", "pull", &store.url(), as_str(&out), "--glance", id_in(&said)];
        // A part of it had come before.
        fs::write(
            scene.site.path("pulled.img.partial"),
            &fs::read(&scene.image).unwrap()[..300_000],
        )
        .unwrap();
        scene.site.run(&pull).good();
        assert!(fs::read(&out).unwrap() == fs::read(&scene.image).unwrap());
        scene.opens(&out);
    }
    // What Glance itself looks into must be something that it knows; nothing is left there then.
    let scene = Scene::new("luks2");
    let before = fs::read_dir(store.images()).unwrap().count();
    let bare = ["image", "push", "--glance", as_str(&scene.image), &store.url()];
    scene.site.run(&bare).refused(&["luks1", "--container-format"]);
    assert_eq!(fs::read_dir(store.images()).unwrap().count(), before);
    let bad = [
        "image",
        "push",
        "--glance",
        as_str(&scene.image),
        &store.url(),
        "--disk-format",
        "floppy",
    ];
    scene.site.run(&bad).refused(&["400", "floppy"]);
    let none = "0f2ff0a2-9c5b-4f6e-8d3e-6f0e3f4a5b6c";
    let out = scene.site.path("none");
    scene
        .site
        .run(&["image", "pull", &store.url(), as_str(&out), "--glance", none])
        .refused(&["404"]);
    scene
        .site
        .run(&["image", "pull", &store.url(), as_str(&out), "--glance", "../x"])
        .refused(&["UUID"]);
}
