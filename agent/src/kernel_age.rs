//! Kernels that are too old for every tier, and what to do about one.
//!
//! The number alone turns nobody away: distributions give old kernels new features, so what a tier needs is looked for by itself.

use procfs::sys::kernel::Version;

/// The oldest kernel that has anything to measure with (tier 3).
const OLDEST: (u8, u8) = (4, 19);

/// What to do on an older one.
pub const REMEDY: &str = "install Linux 6.1 or newer, with BPF LSM and IMA (tier 1), and restart; 4.19 is the oldest that can \
    be measured at all (tier 3, which only detects)";

/// The running kernel's release, as uname(2) gives it.
///
/// # Errors
/// As uname(2).
pub fn release() -> std::io::Result<String> {
    let names = nix::sys::utsname::uname()?;
    Ok(names.release().to_string_lossy().into_owned())
}

/// Whether a kernel of this release is older than any that can be measured. A number in another form is no reason to send anybody away.
#[must_use]
pub fn is_too_old(release: &str) -> bool {
    let numbers = release.split(['-', '+']).next().unwrap_or_default();
    numbers
        .parse::<Version>()
        .is_ok_and(|version| (version.major, version.minor) < OLDEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_is_told_by_the_first_two_numbers() {
        for old in ["2.6.32-754.el6.x86_64", "3.10.0+2", "4.18.9-x"] {
            assert!(is_too_old(old), "{old}");
        }
        for new in ["4.19.0+1", "5.10.0-46-cloud-amd64", "6.1.0-45-amd64", "of our own"] {
            assert!(!is_too_old(new), "{new}");
        }
    }
}
