//! A boot in short: which firmware, keys, loaders, kernel, command line and initrd were used.

use std::fmt;

use serde::Serialize;

use super::proven::{Claim, Meaning, Proven};
use super::text::{plain, quoted};
use super::uefi::{Keys, Variable, guid};
use crate::wire::Hex;

/// EV_S_CRTM_VERSION.
const FIRMWARE_VERSION: u32 = 8;

/// Whether the firmware checked signatures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SecureBoot {
    /// It did.
    On,
    /// It did not.
    Off,
    /// The log does not prove it one way or the other.
    #[default]
    Unknown,
}

/// A database of Secure Boot's keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KeyDatabase {
    /// PK, KEK, db, dbx, dbt or dbr.
    pub name: String,
    /// Digest of the event: it changes with every byte of the database.
    pub digest: Hex,
    /// What it holds; `None` if its content is of no known layout.
    pub keys: Option<Keys>,
}

/// Something that was loaded, by its digest. Its name is what the log claims.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Loaded {
    /// Digest in the bank that was asked for.
    pub digest: Hex,
    /// Its name; nothing proves it.
    pub claimed: Option<String>,
}

/// What GRUB used a file for. That the file is the one which the command names is a claim; the command is proven.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// `linux`.
    Kernel,
    /// `initrd`.
    Initrd,
    /// `multiboot`, `multiboot2`: Xen.
    Xen,
    /// `module`, `module2`: what Xen is given, the kernel and initrd of dom0.
    Module,
    /// `chainloader`: another boot program.
    Program,
}

/// A file that GRUB read, the whole of which is under its digest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GrubFile {
    /// Digest and name.
    #[serde(flatten)]
    pub file: Loaded,
    /// What a command used it for; `None` for GRUB's own configuration and modules.
    pub role: Option<Role>,
}

/// A command line, proven where its text is known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CommandLine {
    /// Digest in the bank that was asked for.
    pub digest: Hex,
    /// The text, if the log has it or it was given to [`super::BootLog::proven`]; the digest proves it.
    pub text: Option<String>,
}

/// A section of a unified kernel image: `.linux`, `.initrd`, `.cmdline`, ….
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Section {
    /// Its name, which is measured, too.
    pub name: String,
    /// Digest of its content.
    pub digest: Hex,
}

/// A boot in short. All is as proven as the log is, but for what is called claimed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct BootFacts {
    /// The firmware's version. The text is proven; that it is the version and not another text of PCR 0 is a claim.
    pub firmware: Option<String>,
    /// Whether the firmware checked signatures.
    pub secure_boot: SecureBoot,
    /// The keys that it checked by.
    pub keys: Vec<KeyDatabase>,
    /// Subjects of the certificates by which programs were allowed to start.
    pub started_by: Vec<String>,
    /// Programs that the firmware started: boot loaders, unified kernel images, kernels. Digests are the Authenticode ones.
    pub programs: Vec<Loaded>,
    /// Commands that GRUB ran.
    pub grub_commands: Vec<String>,
    /// Files that GRUB read.
    pub grub_files: Vec<GrubFile>,
    /// Command lines of kernels, Xen and modules.
    pub command_lines: Vec<CommandLine>,
    /// Initrds that the kernel's EFI stub loaded.
    pub initrds: Vec<Hex>,
    /// Sections of a unified kernel image.
    pub sections: Vec<Section>,
}

impl BootFacts {
    /// The facts that these events prove ([`super::BootLog::proven`]).
    #[must_use]
    pub fn of(events: &[Proven<'_>]) -> Self {
        let mut facts = Self::default();
        let mut secure_boot = Vec::new();
        let mut section: Option<&str> = None;
        for event in events {
            let digest = || Hex(event.digest.to_vec());
            match (&event.meaning, event.event.pcr) {
                (Meaning::Variable(variable), 7) => {
                    secure_boot.extend(state(variable));
                    facts.keys.extend(database(variable, digest()));
                }
                (Meaning::Authority(variable), _) => {
                    let keys = Keys::parse_one(variable.value).unwrap_or_default();
                    facts.started_by.extend(keys.certificates);
                }
                (Meaning::Section(name), _) => section = Some(name),
                (Meaning::Digest { .. } | Meaning::Text { .. }, 11) => {
                    facts.sections.extend(section.take().map(|name| Section {
                        name: name.to_owned(),
                        digest: digest(),
                    }));
                }
                (
                    Meaning::Data {
                        data,
                        claimed: Claim::Type(FIRMWARE_VERSION, _),
                    },
                    0,
                ) => {
                    // A version may be a GUID (PFP §10.4.1).
                    facts.firmware = <[u8; 16]>::try_from(*data).ok().map(|bytes| guid(bytes).to_string());
                }
                (Meaning::Text { text, claimed }, pcr) => facts.text(pcr, text, claimed, digest()),
                (Meaning::Digest { claimed }, pcr) => facts.digest(pcr, claimed, digest()),
                _ => {}
            }
        }
        facts.secure_boot = match secure_boot.as_slice() {
            [first, rest @ ..] if rest.iter().all(|other| other == first) => *first,
            _ => SecureBoot::Unknown,
        };
        facts.started_by.dedup();
        let roles = roles(&facts.grub_commands);
        for GrubFile { file, role } in &mut facts.grub_files {
            let named = |(name, _): &&(&str, Role)| file.claimed.as_deref() == Some(*name);
            *role = roles.iter().find(named).map(|(_, role)| *role);
        }
        facts
    }

    fn text(&mut self, pcr: u32, text: &str, claimed: &Claim, digest: Hex) {
        match (pcr, claimed) {
            (0, Claim::Type(FIRMWARE_VERSION, _)) => self.firmware = Some(text.trim_end().to_owned()),
            (8, Claim::GrubCommand) => self.grub_commands.push(text.to_owned()),
            (8, Claim::KernelCommandLine | Claim::ModuleCommandLine) | (8 | 9 | 12, Claim::LoadOptions) => {
                self.command_lines.push(CommandLine {
                    digest,
                    text: Some(text.to_owned()),
                });
            }
            _ => {}
        }
    }

    fn digest(&mut self, pcr: u32, claimed: &Claim, digest: Hex) {
        match (pcr, claimed) {
            (4, Claim::Image { file, .. }) => self.programs.push(Loaded {
                digest,
                claimed: file.clone(),
            }),
            (9, Claim::File(name)) => self.grub_files.push(GrubFile {
                file: Loaded {
                    digest,
                    claimed: Some(name.clone()),
                },
                role: None,
            }),
            (9, Claim::Initrd) => self.initrds.push(digest),
            (8 | 9 | 12, Claim::LoadOptions) => self.command_lines.push(CommandLine { digest, text: None }),
            _ => {}
        }
    }
}

/// What the variable SecureBoot says; its vendor must be UEFI itself. One that does not exist is off.
fn state(variable: &Variable<'_>) -> Option<SecureBoot> {
    variable.is_global("SecureBoot").then_some(match variable.value {
        [1] => SecureBoot::On,
        [0] | [] => SecureBoot::Off,
        _ => SecureBoot::Unknown,
    })
}

fn database(variable: &Variable<'_>, digest: Hex) -> Option<KeyDatabase> {
    variable.is_key_database().then(|| KeyDatabase {
        name: plain(&variable.name),
        digest,
        keys: Keys::parse(variable.value),
    })
}

/// The files that commands name, and what for.
fn roles(commands: &[String]) -> Vec<(&str, Role)> {
    let mut roles = Vec::new();
    for command in commands {
        let mut words = command.split_whitespace();
        let role = match words.next() {
            Some("linux" | "linux16" | "linuxefi") => Role::Kernel,
            Some("initrd" | "initrd16" | "initrdefi") => Role::Initrd,
            Some("multiboot" | "multiboot2" | "xen_hypervisor") => Role::Xen,
            Some("module" | "module2" | "xen_module") => Role::Module,
            Some("chainloader") => Role::Program,
            _ => continue,
        };
        // initrd takes several files; what follows the others' first file are arguments.
        let files = if role == Role::Initrd { usize::MAX } else { 1 };
        roles.extend(
            words
                .filter(|word| !word.starts_with("--"))
                .take(files)
                .map(|word| (word, role)),
        );
    }
    roles
}

impl fmt::Display for BootFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(version) = &self.firmware {
            writeln!(f, "firmware {}", quoted(version))?;
        }
        let state = match self.secure_boot {
            SecureBoot::On => "on",
            SecureBoot::Off => "off",
            SecureBoot::Unknown => "unknown",
        };
        writeln!(f, "Secure Boot {state}")?;
        for KeyDatabase { name, keys, .. } in &self.keys {
            match keys {
                Some(keys) => writeln!(f, "{name} {keys}")?,
                None => writeln!(f, "{name} of an unknown layout")?,
            }
        }
        for subject in &self.started_by {
            writeln!(f, "started by {}", quoted(subject))?;
        }
        for program in &self.programs {
            writeln!(f, "program {program}")?;
        }
        for GrubFile { file, role } in &self.grub_files {
            match role {
                Some(Role::Kernel) => writeln!(f, "kernel {file}")?,
                Some(Role::Initrd) => writeln!(f, "initrd {file}")?,
                Some(Role::Xen) => writeln!(f, "Xen {file}")?,
                Some(Role::Module) => writeln!(f, "module {file}")?,
                Some(Role::Program) => writeln!(f, "chain-loaded {file}")?,
                None => {}
            }
        }
        for Section { name, digest } in &self.sections {
            writeln!(f, "section {} {digest:?}", plain(name))?;
        }
        for digest in &self.initrds {
            writeln!(f, "initrd {digest:?}")?;
        }
        for CommandLine { digest, text } in &self.command_lines {
            match text {
                Some(text) => writeln!(f, "command line {}", quoted(text))?,
                None => writeln!(f, "command line {digest:?}, text unknown")?,
            }
        }
        Ok(())
    }
}

impl fmt::Display for Loaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.digest)?;
        match &self.claimed {
            Some(name) => write!(f, " (claimed {})", plain(name)),
            None => Ok(()),
        }
    }
}
