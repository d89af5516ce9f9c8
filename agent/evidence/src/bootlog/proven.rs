//! What a boot log proves about the boot.
//!
//! A replay that matches quoted PCRs proves for each event its PCR, its place among that PCR's events, and its digest.
//! Neither type nor data are under the digest as such. But where the digest *is* the hash of the data, or of a part of it that is
//! known, nobody can have logged other data: that part is proven with it. Everything else that a log says, the type
//! always, is a claim, and is called one here. (go-attestation's event-log disclosure tells what comes of believing it.)
//!
//! What a proven digest means follows from its PCR (PC Client PFP §3.3.4): 0 to 7 are extended by the firmware and by boot loaders on
//! its behalf; 8 and 9 by GRUB and the kernel's EFI stub; 11 to 13 by systemd-stub; 14 by shim.

use std::collections::BTreeMap;

use super::text;
use super::uefi::{Variable, image_file};
use super::{BootEvent, BootLog, BootLogError};
use crate::digest::Algorithm;

/// Most command lines that load options are compared with.
const MAX_HINTS: usize = 64;

/// An extended event, and what its digest in one bank proves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proven<'a> {
    pub(super) number: usize,
    pub(super) event: &'a BootEvent,
    pub(super) digest: &'a [u8],
    pub(super) meaning: Meaning<'a>,
}

impl<'a> Proven<'a> {
    /// The event's place in the log, from 0.
    #[must_use]
    pub fn number(&self) -> usize {
        self.number
    }

    /// The PCR.
    #[must_use]
    pub fn pcr(&self) -> u32 {
        self.event.pcr()
    }

    /// The digest that the PCR was extended with.
    #[must_use]
    pub fn digest(&self) -> &'a [u8] {
        self.digest
    }

    /// What the digest is known to stand for.
    #[must_use]
    pub fn meaning(&self) -> &Meaning<'a> {
        &self.meaning
    }
}

/// What a digest stands for. What is not called claimed is proven.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Meaning<'a> {
    /// The line between what the firmware measured before it started a boot loader and what came after (PCRs 0 to 7).
    Separator {
        /// The firmware met an error, and says so.
        error: bool,
    },
    /// A UEFI variable: vendor, name and content.
    Variable(Variable<'a>),
    /// In PCR 7 after its separator: the entry of a key database by which a program was allowed to start, or a variable
    /// of shim's.
    Authority(Variable<'a>),
    /// The content of a UEFI variable. Older firmware hashes it without the name, which is a claim therefore.
    Content {
        /// Vendor and name (claimed) with content (proven).
        claimed: Variable<'a>,
    },
    /// The partition table of the disk that was booted from.
    PartitionTable,
    /// A text.
    Text {
        /// The text, without closing NUL.
        text: String,
        /// What it is.
        claimed: Claim,
    },
    /// That a section of this name was found in a unified kernel image; the next event has the digest of its content.
    Section(String),
    /// Data of no kind that is known here.
    Data {
        /// The data.
        data: &'a [u8],
        /// What it is.
        claimed: Claim,
    },
    /// The digest of something that is not in the log.
    Digest {
        /// What it is the digest of.
        claimed: Claim,
    },
}

/// What a log says of an event and nothing proves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claim {
    /// A command that GRUB ran.
    GrubCommand,
    /// The command line of the kernel, or of Xen, that GRUB started.
    KernelCommandLine,
    /// The command line of a module that GRUB passed to Xen (the kernel of dom0, say).
    ModuleCommandLine,
    /// The command line that a kernel's EFI stub was started with.
    LoadOptions,
    /// An initrd that a kernel's EFI stub loaded.
    Initrd,
    /// A file that GRUB read. Its digest is that of the whole file.
    File(String),
    /// A program or driver that the firmware loaded; the digest is the Authenticode one, which leaves out the signature.
    Image {
        /// Its file, where the log names one.
        file: Option<String>,
        /// Whether the log says driver.
        driver: bool,
    },
    /// The content of a section of a unified kernel image.
    SectionContent(String),
    /// A list of shim's (MokList, MokListX, …).
    MokList(String),
    /// An event type, by number, with the event's data in short.
    Type(u32, String),
}

impl BootLog {
    /// What this log proves in one bank, event by event, extended events only.
    ///
    /// The kernel's EFI stub logs the digest of its command line without the text. `command_line` is the text that somebody claims
    /// (the agent tells the kernel's); it shows up where a digest proves it, and nowhere else.
    ///
    /// # Errors
    /// [`BootLogError::NoBank`], or [`BootLogError::NoDigest`] for an event without a digest in this bank.
    pub fn proven(&self, bank: Algorithm, command_line: Option<&str>) -> Result<Vec<Proven<'_>>, BootLogError> {
        if !self.banks.contains(&bank) {
            return Err(BootLogError::NoBank(bank, self.banks.clone()));
        }
        let mut hints = Hints::new(bank);
        command_line.into_iter().for_each(|text| hints.add(text));
        let mut separated = false;
        let mut proven = Vec::new();
        for (number, event) in self.events.iter().enumerate().filter(|(_, event)| event.is_extended()) {
            let digest = event
                .digest(bank)
                .ok_or(BootLogError::NoDigest { event: number, bank })?;
            let mut meaning = meaning(event, bank, digest);
            if event.pcr == 7 {
                meaning = after_separator(meaning, &mut separated);
            }
            if let Meaning::Text {
                text,
                claimed: Claim::KernelCommandLine | Claim::ModuleCommandLine | Claim::LoadOptions,
            } = &meaning
            {
                hints.add(text);
            }
            proven.push(Proven {
                number,
                event,
                digest,
                meaning,
            });
        }
        for one in &mut proven {
            hints.apply(one);
        }
        Ok(proven)
    }
}

/// PCR 7 has the configuration first, then its separator, then what was used of it.
fn after_separator<'a>(meaning: Meaning<'a>, separated: &mut bool) -> Meaning<'a> {
    match meaning {
        Meaning::Separator { error } => {
            *separated = true;
            Meaning::Separator { error }
        }
        Meaning::Variable(variable) if *separated => Meaning::Authority(variable),
        other => other,
    }
}

fn meaning<'a>(event: &'a BootEvent, bank: Algorithm, digest: &[u8]) -> Meaning<'a> {
    let is_hash_of = |data: &[u8]| bank.hash(data) == digest;
    let data = event.data.as_slice();
    // Some loaders (old shim, firmware with texts) log a byte more than they hash.
    let shorter = data.split_last().map(|(_, shorter)| shorter);
    if let Some(covered) = [Some(data), shorter]
        .into_iter()
        .flatten()
        .find(|part| is_hash_of(part))
    {
        return of_covered(event, covered);
    }
    if event.pcr == 8
        && let Some((claimed, text)) = grub_text(data)
        && is_hash_of(text)
    {
        return match std::str::from_utf8(text) {
            Ok(text) => Meaning::Text {
                text: text.to_owned(),
                claimed,
            },
            Err(_) => Meaning::Data { data: text, claimed },
        };
    }
    if let Some(variable) = Variable::parse(data)
        && is_hash_of(variable.value)
    {
        return Meaning::Content { claimed: variable };
    }
    if let Some(text) = text::utf16(even(data)) {
        // systemd-stub hashes the closing NUL, and has logged less than all of it.
        if is_hash_of(&text::to_utf16(&text)) {
            return Meaning::Text {
                text,
                claimed: claim(event),
            };
        }
        let mut name = text.clone().into_bytes();
        name.push(0);
        if event.pcr == 11 && is_hash_of(&name) {
            return Meaning::Section(text);
        }
    }
    Meaning::Digest { claimed: claim(event) }
}

/// Data that is all under the digest: what it is follows from the PCR and from itself.
fn of_covered<'a>(event: &BootEvent, data: &'a [u8]) -> Meaning<'a> {
    match (event.pcr, data) {
        (0..=7, [0, 0, 0, 0] | [0xFF, 0xFF, 0xFF, 0xFF]) => return Meaning::Separator { error: false },
        (0..=7, [1, 0, 0, 0]) => return Meaning::Separator { error: true },
        (5, data) if data.starts_with(b"EFI PART") => return Meaning::PartitionTable,
        _ => {}
    }
    if matches!(event.pcr, 1 | 3 | 5 | 7)
        && let Some(variable) = Variable::parse(data)
    {
        return Meaning::Variable(variable);
    }
    let claimed = match claim(event) {
        // The data is no claim, then.
        Claim::Type(number, _) => Claim::Type(number, String::new()),
        other => other,
    };
    match text::decode(data) {
        Some(text) => Meaning::Text { text, claimed },
        None => Meaning::Data { data, claimed },
    }
}

/// GRUB hashes a text without the words that it logs before it, and without the closing NUL (grub-core/commands/tpm.c).
fn grub_text(data: &[u8]) -> Option<(Claim, &[u8])> {
    let text = data.strip_suffix(&[0]).unwrap_or(data);
    [
        ("grub_cmd: ", Claim::GrubCommand),
        ("kernel_cmdline: ", Claim::KernelCommandLine),
        ("module_cmdline: ", Claim::ModuleCommandLine),
    ]
    .into_iter()
    .find_map(|(prefix, claim)| Some((claim, text.strip_prefix(prefix.as_bytes())?)))
}

/// What the log says of an event whose data its digest does not cover.
fn claim(event: &BootEvent) -> Claim {
    /// Linux, drivers/firmware/efi/libstub/efistub.h.
    const INITRD_TAG: [u8; 4] = 0x8F3B_22EC_u32.to_le_bytes();
    const LOAD_OPTIONS_TAG: [u8; 4] = 0x8F3B_22ED_u32.to_le_bytes();
    const EV_EVENT_TAG: u32 = 6;
    const EV_IPL: u32 = 13;
    const APPLICATION: u32 = 0x8000_0003;
    const DRIVERS: [u32; 2] = [0x8000_0004, 0x8000_0005];
    let data = event.data.as_slice();
    let name = || text::decode(even(data)).or_else(|| text::decode(data));
    match (event.event_type, event.pcr) {
        (EV_EVENT_TAG, 9) if data.starts_with(&INITRD_TAG) => Claim::Initrd,
        (EV_EVENT_TAG, 9) if data.starts_with(&LOAD_OPTIONS_TAG) => Claim::LoadOptions,
        (EV_IPL, 9) if name().is_some() => Claim::File(name().unwrap_or_default()),
        (EV_IPL, 11) if name().is_some() => Claim::SectionContent(name().unwrap_or_default()),
        (EV_IPL, 8 | 12) if text::utf16(even(data)).is_some() => Claim::LoadOptions,
        (EV_IPL, 14) if name().is_some() => Claim::MokList(name().unwrap_or_default()),
        (APPLICATION, _) => Claim::Image {
            file: image_file(data),
            driver: false,
        },
        (kind, _) if DRIVERS.contains(&kind) => Claim::Image {
            file: image_file(data),
            driver: true,
        },
        (other, _) => Claim::Type(other, text::summary(data)),
    }
}

/// All but a last odd byte.
fn even(data: &[u8]) -> &[u8] {
    data.get(..data.len() & !1).unwrap_or(data)
}

/// Texts that are known from elsewhere, by the digests that they would have as a command line.
struct Hints {
    bank: Algorithm,
    texts: usize,
    known: BTreeMap<Vec<u8>, String>,
}

impl Hints {
    fn new(bank: Algorithm) -> Self {
        Self {
            bank,
            texts: 0,
            known: BTreeMap::new(),
        }
    }

    fn add(&mut self, text: &str) {
        if self.texts == MAX_HINTS {
            return;
        }
        self.texts = self.texts.saturating_add(1);
        // GRUB puts this before the text that it measured.
        for text in [text.to_owned(), format!("BOOT_IMAGE={text}")] {
            let utf16 = text::to_utf16(&text);
            let unclosed = utf16.get(..utf16.len().saturating_sub(2)).unwrap_or_default();
            // The last two: sections of a unified kernel image, as tools write them.
            let forms = [
                &utf16,
                unclosed,
                text.as_bytes(),
                format!("{text}\0").as_bytes(),
                format!("{text}\n").as_bytes(),
            ]
            .map(|form| self.bank.hash(form));
            for form in forms {
                self.known.entry(form).or_insert_with(|| text.clone());
            }
        }
    }

    /// Puts the text in, where the digest is one of a known text and so proves it.
    fn apply(&self, proven: &mut Proven<'_>) {
        if !matches!(proven.event.pcr, 8 | 9 | 11 | 12) {
            return;
        }
        if let Meaning::Digest { claimed } = &proven.meaning
            && let Some(text) = self.known.get(proven.digest)
        {
            proven.meaning = Meaning::Text {
                text: text.clone(),
                claimed: claimed.clone(),
            };
        }
    }
}
