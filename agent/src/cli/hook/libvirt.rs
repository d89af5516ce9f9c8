//! The libvirt hook: `/etc/libvirt/hooks/qemu` and `/etc/libvirt/hooks/libxl` (libvirt.org/hooks.html).
//!
//! A domain names its sealed disks in its metadata, each with the image and the name under `/dev/mapper` that its device refers to:
//!
//! ```xml
//! <metadata>
//!   <assay:disks xmlns:assay="urn:assay:libvirt:1">
//!     <assay:disk name="assay-mail" image="/srv/mail.luks"/>
//!   </assay:disks>
//! </metadata>
//! ```
//!
//! The same XML comes on the destination of a migration, so the disks are opened there as well, by the destination's own evidence.

use std::path::{Path, PathBuf};

use roxmltree::{Document, Node, ParsingOptions};

use super::{CliError, Hook, complain, input};

/// Namespace of the metadata.
pub(super) const NAMESPACE: &str = "urn:assay:libvirt:1";
/// Disks of ours begin so.
const PREFIX: &str = "assay-";
const MAPPER: &str = "/dev/mapper/";
/// libvirt itself has 1024 targets on a bus at the most; all their keys would not be here in time.
const MAX_DISKS: usize = 64;
const MAX_NODES: u32 = 100_000;

/// Why a domain's XML is refused.
#[derive(Debug, thiserror::Error)]
pub enum DomainError {
    /// Not XML.
    #[error("the XML of domain {domain} cannot be read")]
    Xml {
        /// The domain.
        domain: String,
        /// Where and why.
        #[source]
        source: roxmltree::Error,
    },
    /// The metadata say nothing sensible.
    #[error(
        "domain {domain}: a disk in its metadata ({NAMESPACE}) {what}; write <disk name=\"assay-NAME\" image=\"/PATH\"/>"
    )]
    Metadata {
        /// The domain.
        domain: String,
        /// What is wrong.
        what: &'static str,
    },
    /// Too many disks.
    #[error("domain {domain} has more than {MAX_DISKS} sealed disks")]
    TooMany {
        /// The domain.
        domain: String,
    },
    /// A device that nobody opens.
    #[error(
        "domain {domain} uses {device}, which is not open, and its metadata ({NAMESPACE}) do not say which image it is"
    )]
    Unknown {
        /// The domain.
        domain: String,
        /// The device.
        device: PathBuf,
    },
}

/// What a domain says of its sealed disks.
#[derive(Debug, PartialEq, Eq)]
struct Domain {
    disks: Vec<Disk>,
    /// Devices under `/dev/mapper/assay-` that it uses, and does not have opened.
    others: Vec<PathBuf>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Disk {
    name: String,
    image: PathBuf,
}

/// Prints nothing: libvirt takes what a hook prints at a migration for the domain's new XML.
pub(super) fn run(hook: &Hook, domain: &str, operation: &str, sub_operation: &str) -> Result<(), CliError> {
    // Whatever is done with it, libvirt wants to be rid of it.
    let xml = input()?;
    match (operation, sub_operation) {
        ("prepare", "begin") => prepare(hook, domain, &Domain::parse(domain, &xml)?),
        ("release", "end") => release(hook, &Domain::parse(domain, &xml)?),
        _ => Ok(()),
    }
}

/// All of them, or none.
fn prepare(hook: &Hook, name: &str, domain: &Domain) -> Result<(), CliError> {
    if let Some(device) = domain.others.iter().find(|device| !device.exists()) {
        return Err(CliError::Domain(DomainError::Unknown {
            domain: name.to_owned(),
            device: device.clone(),
        }));
    }
    for (done, disk) in domain.disks.iter().enumerate() {
        if let Err(error) = hook.open(&disk.image, Some(&disk.name), Some(name)) {
            for opened in domain.disks.iter().take(done).rev() {
                if let Err(error) = hook.close(&opened.name) {
                    complain(&error);
                }
            }
            return Err(error);
        }
    }
    Ok(())
}

/// As many as go.
fn release(hook: &Hook, domain: &Domain) -> Result<(), CliError> {
    let mut last = Ok(());
    for disk in domain.disks.iter().rev() {
        if let Err(error) = hook.close(&disk.name)
            && let Err(before) = std::mem::replace(&mut last, Err(error))
        {
            complain(&before);
        }
    }
    last
}

impl Domain {
    fn parse(name: &str, xml: &str) -> Result<Self, DomainError> {
        let domain = || name.to_owned();
        let options = ParsingOptions {
            allow_dtd: false,
            nodes_limit: MAX_NODES,
            ..ParsingOptions::default()
        };
        let document = Document::parse_with_options(xml, options).map_err(|source| DomainError::Xml {
            domain: domain(),
            source,
        })?;
        let root = document.root_element();
        let mut disks: Vec<Disk> = Vec::new();
        for element in children(root, "metadata")
            .flat_map(|metadata| metadata.children())
            .filter(|node| node.has_tag_name((NAMESPACE, "disks")))
            .flat_map(|disks| disks.children())
            .filter(Node::is_element)
        {
            let what = |what| DomainError::Metadata { domain: domain(), what };
            let disk = Disk::parse(element).map_err(what)?;
            if disks.iter().any(|other| other.name == disk.name) {
                return Err(what("has the name of another one"));
            }
            disks.push(disk);
            if disks.len() > MAX_DISKS {
                return Err(DomainError::TooMany { domain: domain() });
            }
        }
        let others = children(root, "devices")
            .flat_map(|devices| children(devices, "disk"))
            .flat_map(|disk| children(disk, "source"))
            .filter_map(|source| source.attribute("dev"))
            .filter(|device| {
                let ours = device.strip_prefix(MAPPER).filter(|name| name.starts_with(PREFIX));
                ours.is_some_and(|name| disks.iter().all(|disk| disk.name != name))
            })
            .map(PathBuf::from)
            .collect();
        Ok(Self { disks, others })
    }
}

impl Disk {
    fn parse(element: Node<'_, '_>) -> Result<Self, &'static str> {
        if !element.has_tag_name((NAMESPACE, "disk")) {
            return Err("is an element of another name");
        }
        let name = element.attribute("name").ok_or("has no name")?;
        let image = element.attribute("image").map(Path::new).ok_or("has no image")?;
        if !name.starts_with(PREFIX) {
            return Err("has a name that does not begin with assay-");
        }
        if !image.is_absolute() {
            return Err("has an image that is not an absolute path");
        }
        Ok(Self {
            name: name.to_owned(),
            image: image.to_owned(),
        })
    }
}

/// Elements of libvirt's own, which have no namespace.
fn children<'a, 'input: 'a>(node: Node<'a, 'input>, name: &'static str) -> impl Iterator<Item = Node<'a, 'input>> {
    node.children().filter(move |child| child.has_tag_name(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain(metadata: &str, devices: &str) -> Result<Domain, String> {
        let xml = format!(
            "<domain type='kvm'><name>mail</name><metadata><x:other xmlns:x='urn:x'/>{metadata}</metadata><devices>{devices}</devices></domain>"
        );
        Domain::parse("mail", &xml).map_err(|error| error.to_string())
    }

    fn metadata(disks: &str) -> String {
        format!("<a:disks xmlns:a='{NAMESPACE}'>{disks}</a:disks>")
    }

    #[test]
    fn disks_are_those_of_the_metadata() {
        let two =
            metadata("<a:disk name='assay-1' image='/srv/a &amp; b'/> <a:disk image='/dev/vg/2' name='assay-2'/>");
        let devices = "<disk type='block'><source dev='/dev/mapper/assay-1'/></disk>
            <disk type='block'><source dev='/dev/mapper/assay-9'/></disk>
            <disk type='block'><source dev='/dev/mapper/vg-x'/></disk><disk type='file'><source file='/x'/></disk>";
        let found = domain(&two, devices).unwrap();
        let disk = |name: &str, image: &str| Disk {
            name: name.into(),
            image: image.into(),
        };
        assert_eq!(
            found.disks,
            [disk("assay-1", "/srv/a & b"), disk("assay-2", "/dev/vg/2")]
        );
        assert_eq!(found.others, [PathBuf::from("/dev/mapper/assay-9")]);
        assert!(domain("", "").unwrap().disks.is_empty());
        // Another's namespace is another's business.
        let foreign = "<b:disks xmlns:b='urn:b'><b:disk name='assay-1' image='/x'/></b:disks>";
        assert!(domain(foreign, "").unwrap().disks.is_empty());
    }

    #[test]
    fn odd_domains_are_refused() {
        for (disks, named) in [
            ("<a:disk image='/x'/>", "has no name"),
            ("<a:disk name='assay-1'/>", "has no image"),
            ("<a:disk name='sda' image='/x'/>", "does not begin with assay-"),
            ("<a:disk name='assay-1' image='x'/>", "not an absolute path"),
            ("<a:dsk name='assay-1' image='/x'/>", "another name"),
            (
                "<a:disk name='assay-1' image='/x'/><a:disk name='assay-1' image='/y'/>",
                "the name of another",
            ),
        ] {
            let said = domain(&metadata(disks), "").unwrap_err();
            assert!(said.contains("domain mail") && said.contains(named), "{said}");
        }
        let many: String = (0..70)
            .map(|n| format!("<a:disk name='assay-{n}' image='/x'/>"))
            .collect();
        assert!(domain(&metadata(&many), "").unwrap_err().contains("more than 64"));
        for bad in [
            "",
            "<domain>",
            "no xml",
            "<!DOCTYPE d [<!ENTITY e 'x'>]><domain>&e;</domain>",
        ] {
            assert!(Domain::parse("mail", bad).is_err(), "{bad}");
        }
        let wide = "<a/>".repeat(200_000);
        assert!(Domain::parse("mail", &format!("<domain>{wide}</domain>")).is_err());
    }
}
