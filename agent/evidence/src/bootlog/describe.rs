//! An event in one line: first what its digest proves, then, after "claimed", what only the log says.

use std::fmt;

use super::proven::{Claim, Meaning, Proven};
use super::text::{hex_of, plain, quoted};
use super::uefi::{Keys, Variable, load_option};
use super::{event_name, text};

/// Longest description of an event, in characters.
pub const MAX_DESCRIPTION: usize = 1200;

impl Proven<'_> {
    /// The event in one line. It says "claimed" before everything that its digest does not prove. Whatever the log holds, it is
    /// printable, has no line breaks, and is at most [`MAX_DESCRIPTION`] characters long.
    #[must_use]
    pub fn describe(&self) -> String {
        let text = self.meaning.to_string();
        match text.char_indices().nth(MAX_DESCRIPTION) {
            None => text,
            Some(_) => text.chars().take(MAX_DESCRIPTION - 1).chain(['…']).collect(),
        }
    }
}

impl fmt::Display for Meaning<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Meaning::Separator { error: false } => f.write_str("separator"),
            Meaning::Separator { error: true } => f.write_str("separator, the firmware met an error"),
            Meaning::Variable(variable) => write!(f, "variable {} {}", variable.full_name(), value(variable)),
            Meaning::Authority(variable) => match Keys::parse_one(variable.value) {
                Some(keys) => write!(f, "started by {}: {keys}", variable.full_name()),
                None => write!(f, "variable {} {}", variable.full_name(), value(variable)),
            },
            Meaning::Content { claimed } => {
                write!(
                    f,
                    "content {} (claimed variable {})",
                    value(claimed),
                    claimed.full_name()
                )
            }
            Meaning::PartitionTable => f.write_str("partition table"),
            Meaning::Text { text, claimed } => write!(f, "{} (claimed {claimed})", quoted(text)),
            Meaning::Section(name) => write!(f, "section {}", plain(name)),
            Meaning::Data { data, claimed } => write!(f, "{} (claimed {claimed})", hex_of(data)),
            Meaning::Digest { claimed } => write!(f, "claimed {claimed}"),
        }
    }
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Claim::GrubCommand => f.write_str("GRUB command"),
            Claim::KernelCommandLine => f.write_str("kernel command line"),
            Claim::ModuleCommandLine => f.write_str("module command line"),
            Claim::LoadOptions => f.write_str("load options"),
            Claim::Initrd => f.write_str("initrd"),
            Claim::File(name) => write!(f, "file {}", plain(name)),
            Claim::Image { file, driver } => {
                f.write_str(if *driver { "driver" } else { "program" })?;
                file.iter().try_for_each(|file| write!(f, " {}", plain(file)))
            }
            Claim::SectionContent(name) => write!(f, "content of section {}", plain(name)),
            Claim::MokList(name) => write!(f, "list {}", plain(name)),
            Claim::Type(number, data) if data.is_empty() => f.write_str(&event_name(*number)),
            Claim::Type(number, data) => write!(f, "{} {data}", event_name(*number)),
        }
    }
}

/// A variable's content, as far as its kind is known.
fn value(variable: &Variable<'_>) -> String {
    let value = variable.value;
    if value.is_empty() {
        return "does not exist".into();
    }
    if variable.is_key_database()
        && let Some(keys) = Keys::parse(value)
    {
        return format!("= {keys}");
    }
    if variable.is_global("SecureBoot") {
        match value {
            [0] => return "= 00 (off)".into(),
            [1] => return "= 01 (on)".into(),
            _ => {}
        }
    }
    let is_boot_entry = variable
        .name
        .strip_prefix("Boot")
        .is_some_and(|number| number.len() == 4);
    if is_boot_entry && let Some((description, file)) = load_option(value) {
        let file = file.map(|file| format!(", {}", plain(&file))).unwrap_or_default();
        return format!("= {}{file}", quoted(&description));
    }
    format!("= {}", text::summary(value))
}

impl fmt::Display for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts: Vec<String> = self.certificates.iter().map(|subject| quoted(subject)).collect();
        for (count, what) in [
            (self.more, "more certificates"),
            (self.digests, "digests of programs"),
            (self.others, "other entries"),
        ] {
            if count > 0 {
                parts.push(format!("{count} {what}"));
            }
        }
        if parts.is_empty() {
            return f.write_str("no entries");
        }
        f.write_str(&parts.join(", "))
    }
}
