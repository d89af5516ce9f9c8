//! Which distribution this is, and where it takes its packages from.

use std::collections::HashMap;
use std::path::Path;

/// Distributions by how they install.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Debian.
    Debian,
    /// Ubuntu: apt as well, other archives.
    Ubuntu,
    /// Fedora and the Enterprise Linux family.
    Dnf,
    /// Anything else.
    Other,
}

/// This machine's distribution.
#[derive(Debug)]
pub struct System {
    /// How it installs.
    pub family: Family,
    /// The release's name in the archive, such as `bookworm`; empty where there is none.
    pub codename: String,
    name: String,
}

impl System {
    /// Reads os-release(5).
    pub fn detect() -> Self {
        Self::parse(&std::fs::read_to_string("/etc/os-release").unwrap_or_default())
    }

    fn parse(os_release: &str) -> Self {
        let fields: HashMap<&str, &str> = os_release
            .lines()
            .filter_map(|line| line.split_once('='))
            .map(|(key, value)| (key, value.trim_matches('"')))
            .collect();
        let get = |key| fields.get(key).copied().unwrap_or_default();
        let is = |id: &str| get("ID") == id || get("ID_LIKE").split(' ').any(|like| like == id);
        let family = if is("ubuntu") {
            Family::Ubuntu
        } else if is("debian") {
            Family::Debian
        } else if is("fedora") || is("rhel") {
            Family::Dnf
        } else {
            Family::Other
        };
        let name = if get("PRETTY_NAME").is_empty() {
            "this system"
        } else {
            get("PRETTY_NAME")
        };
        Self {
            family,
            codename: get("VERSION_CODENAME").to_owned(),
            name: name.to_owned(),
        }
    }

    /// Does it install with apt?
    pub fn has_apt(&self) -> bool {
        matches!(self.family, Family::Debian | Family::Ubuntu)
    }

    /// The mirror from which this machine takes `suite`, if its own sources name one.
    pub fn mirror(&self, suite: &str) -> Option<String> {
        let mut files = vec![Path::new("/etc/apt/sources.list").to_owned()];
        if let Ok(entries) = std::fs::read_dir("/etc/apt/sources.list.d") {
            files.extend(entries.flatten().map(|entry| entry.path()));
        }
        files.sort();
        files
            .iter()
            .filter_map(|file| std::fs::read_to_string(file).ok())
            .find_map(|text| mirror_in(&text, suite))
    }
}

impl std::fmt::Display for System {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)
    }
}

/// Finds the archive of a suite in either format of sources.list(5).
fn mirror_in(text: &str, suite: &str) -> Option<String> {
    let names = |words: &str| words.split_whitespace().any(|word| word == suite);
    for stanza in text.split("\n\n") {
        let field = |name: &str| {
            stanza
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                .map(str::trim)
        };
        if field("Enabled") == Some("no") {
            continue;
        }
        if let (Some(uris), Some(suites)) = (field("URIs"), field("Suites"))
            && names(suites)
        {
            return uris.split_whitespace().next().map(str::to_owned);
        }
    }
    text.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("deb ")?.trim_start();
        // Options stand in brackets before the address.
        let rest = if rest.starts_with('[') {
            rest.split_once(']')?.1.trim_start()
        } else {
            rest
        };
        let mut words = rest.split_whitespace();
        let uri = words.next()?;
        (words.next() == Some(suite)).then(|| uri.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_families_apart() {
        assert_eq!(
            System::parse("ID=debian\nVERSION_CODENAME=bookworm\n").family,
            Family::Debian
        );
        assert_eq!(
            System::parse("ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n").family,
            Family::Ubuntu
        );
        assert_eq!(
            System::parse("ID=\"almalinux\"\nID_LIKE=\"rhel centos fedora\"\n").family,
            Family::Dnf
        );
        assert_eq!(System::parse("").family, Family::Other);
    }

    #[test]
    fn finds_a_mirror_in_both_formats() {
        let deb822 = "# old\nTypes: deb\nURIs: http://m/debian\nSuites: bookworm bookworm-updates\n\nTypes: deb\nURIs: http://m/security\nSuites: bookworm-security\n";
        assert_eq!(mirror_in(deb822, "bookworm").as_deref(), Some("http://m/debian"));
        assert_eq!(
            mirror_in(deb822, "bookworm-security").as_deref(),
            Some("http://m/security")
        );
        assert_eq!(mirror_in(deb822, "trixie"), None);
        let list = "deb-src http://s/ trixie main\ndeb [arch=amd64 signed-by=/k] https://m/d trixie main contrib\n";
        assert_eq!(mirror_in(list, "trixie").as_deref(), Some("https://m/d"));
    }
}
