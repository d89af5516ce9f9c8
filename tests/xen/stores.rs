//! Domains that boot from images out of image stores: sealed by the owner, pushed, fetched by the host, opened by libvirt's hook. Firmware
//! starts what is on their disks.

use std::path::{Path, PathBuf};

use assay_evidence::token::sidecar_path;
use assay_tests::HarnessError;
use assay_tests::agent::QCOW2;
use assay_tests::guest::Guest;
use assay_tests::image_store::ImageStore;
use assay_tests::verifier::{FROM_GUEST, Verifier};

use crate::common::enrolled_on;
use crate::disk;
use crate::libvirt::{HOOK_DEADLINE, Sealed, host, rehearse, wait_said};

/// Whose lines for a host without the verifier's program are run here.
const DOCUMENT: &str = include_str!("../../agent/docs/image-stores.md");
/// The store in these lines, and the image's name.
const DOCUMENTED: (&str, &str) = ("https://images.example", "vm.luks");

const WEB: Sealed = Sealed {
    domain: "web",
    image: "/srv/vm.luks",
};
const MAIL: Sealed = Sealed {
    domain: "mail",
    image: "/srv/mail.img",
};
const NEWS: Sealed = Sealed {
    domain: "news",
    image: "/srv/news.qcow2",
};

/// What the domain's disk says.
fn line(domain: &Sealed) -> String {
    format!("{} came out of a store", domain.domain)
}

/// A bootable disk, sealed.
fn sealed(verifier: &Verifier, domain: &Sealed, format: &str) -> Result<PathBuf, HarnessError> {
    let file = |ending: &str| verifier.scratch().join(format!("{}.{ending}", domain.domain));
    let (plain, sealed) = (file("raw"), file(format));
    disk::write(&line(domain), &plain)?;
    verifier.run_ok(&["image", "seal", "--format", format, &text(&plain), &text(&sealed)])?;
    Ok(sealed)
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// The documentation's lines by which a host fetches an image, with this store in them.
fn fetching(store: &str) -> String {
    let lines: Vec<&str> = DOCUMENT.lines().filter(|line| line.starts_with("curl ")).collect();
    assert_eq!(lines.len(), 2, "an image and its digest: {lines:?}");
    lines.join("\n").replace(DOCUMENTED.0, store)
}

/// To a plain store, in the format that has its token within; and fetched from there by the host itself.
fn through_plain_store(verifier: &Verifier, guest: &Guest, store: &ImageStore) -> Result<(), HarnessError> {
    let image = sealed(verifier, &WEB, "luks2")?;
    let url = format!("{}/{}", store.url(), DOCUMENTED.1);
    verifier.run_ok(&["image", "push", &text(&image), &url])?;
    // The guest has another address for this machine's loopback.
    let store = store.url().replace("127.0.0.1", FROM_GUEST);
    guest.script(&format!("set -o pipefail\ncd /srv\n{}", fetching(&store)))?;
    Ok(())
}

/// To Glance, in a format that it takes; fetched by the operator, and carried to the host with its token.
fn through_glance(
    verifier: &Verifier,
    guest: &Guest,
    store: &ImageStore,
    domain: &Sealed,
    format: &str,
) -> Result<(), HarnessError> {
    let image = sealed(verifier, domain, format)?;
    let said = verifier.run_ok(&[
        "image",
        "push",
        "--glance",
        &text(&image),
        &store.url(),
        "--name",
        domain.domain,
    ])?;
    let id = said
        .lines()
        .find_map(|line| line.strip_prefix("image "))
        .unwrap_or_default();
    let pulled = verifier.scratch().join(format!("pulled.{format}"));
    verifier.run_ok(&["image", "pull", &store.url(), &text(&pulled), "--glance", id])?;
    let there = text(&sidecar_path(Path::new(domain.image)));
    guest.put_file(&there, 0o600, &sidecar_path(&pulled))?;
    guest.put_file(domain.image, 0o600, &pulled)
}

#[test]
fn libvirt_domains_boot_from_images_that_came_out_of_a_plain_store_and_out_of_glance() -> Result<(), HarnessError> {
    let stage = enrolled_on(host()?, HOOK_DEADLINE)?;
    let (guest, verifier) = (stage.vm.guest(), &stage.verifier);
    through_plain_store(verifier, guest, &ImageStore::plain(0)?)?;
    let glance = ImageStore::glance()?;
    through_glance(verifier, guest, &glance, &MAIL, "luks1")?;
    through_glance(verifier, guest, &glance, &NEWS, "qcow2-luks")?;
    rehearse(guest)?;
    guest.script(QCOW2)?;
    stage.capture()?;

    let domains = [&WEB, &MAIL, &NEWS];
    for domain in domains {
        domain.define(guest)?;
        domain.start(guest)?;
    }
    for domain in domains {
        wait_said(guest, domain.domain, &line(domain))?;
    }
    for domain in domains {
        domain.end(guest)?;
    }
    let audit = verifier.run_ok(&["audit", "show"])?;
    for domain in domains {
        assert!(audit.contains(&format!("for {:?}", domain.domain)), "{audit}");
    }
    Ok(())
}
