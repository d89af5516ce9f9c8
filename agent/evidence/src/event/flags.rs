//! Circumstances of a measurement, as bits of its `flags`.
//!
//! The same bits as `assay_ebpf::flags`, which this crate doesn't import: a verifier needs no kernel programs. A test holds
//! the two together.

/// The path did not fit, or could not be told.
pub const PATH_CUT: u32 = 1 << 0;
/// The file has no name any more: deleted, `O_TMPFILE`, or a memfd.
pub const UNLINKED: u32 = 1 << 1;
/// No digest could be made.
pub const NOT_HASHED: u32 = 1 << 2;
/// The file could change while it was hashed: what ran need not be what was hashed.
pub const UNSTABLE: u32 = 1 << 3;
/// The file is a memfd: it never had a name.
pub const MEMFD: u32 = 1 << 4;
/// The file is on tmpfs: its content came from nowhere that was measured at boot.
pub const TMPFS: u32 = 1 << 5;
/// The file is on overlayfs.
pub const OVERLAY: u32 = 1 << 6;
/// A `#!` script.
pub const SCRIPT: u32 = 1 << 7;
/// Run as the interpreter of a script, or by binfmt_misc.
pub const INTERPRETER: u32 = 1 << 8;
/// Measured ahead of its first load.
pub const AHEAD: u32 = 1 << 9;
/// The hook refused it: this time it was not loaded.
pub const REFUSED: u32 = 1 << 10;
/// Hashed by the agent and not by the kernel.
pub const USER_HASH: u32 = 1 << 11;
/// On a file system without a change counter.
pub const NO_COUNTER: u32 = 1 << 12;
/// The mapping has pages of its own: what became executable need not be what the file holds.
pub const MODIFIED: u32 = 1 << 13;
/// The block device is not in use: nothing on it is mounted.
pub const IDLE: u32 = 1 << 14;
/// Every bit that has a meaning.
pub const ALL: u32 = (1 << 15) - 1;

/// What tells an operator where code came from and what became of it: these stand in a failure's text. The others have
/// rules of their own, or say how it was hashed.
pub(crate) const TOLD: u32 = UNLINKED | MEMFD | TMPFS | OVERLAY | SCRIPT | INTERPRETER | AHEAD | REFUSED;

/// Each bit with its name for people.
const NAMES: [(u32, &str); 15] = [
    (PATH_CUT, "path cut"),
    (UNLINKED, "deleted"),
    (NOT_HASHED, "not hashed"),
    (UNSTABLE, "open for writing"),
    (MEMFD, "memfd"),
    (TMPFS, "tmpfs"),
    (OVERLAY, "overlayfs"),
    (SCRIPT, "script"),
    (INTERPRETER, "interpreter"),
    (AHEAD, "measured ahead"),
    (REFUSED, "refused"),
    (USER_HASH, "hashed by the agent"),
    (NO_COUNTER, "no change counter"),
    (MODIFIED, "modified in memory"),
    (IDLE, "not in use"),
];

/// The names of the bits that are set, lowest first: `memfd`, `tmpfs`, `refused`, … Bits without a meaning have none;
/// [`decode`](super::decode) refuses them.
#[must_use]
pub fn flag_names(flags: u32) -> Vec<&'static str> {
    NAMES
        .into_iter()
        .filter(|(bit, _)| flags & bit != 0)
        .map(|(_, name)| name)
        .collect()
}

/// The bit with this name.
#[must_use]
pub fn flag_bit(name: &str) -> Option<u32> {
    NAMES.into_iter().find(|(_, known)| *known == name).map(|(bit, _)| bit)
}

/// All names, lowest bit first.
#[must_use]
pub fn names() -> [&'static str; NAMES.len()] {
    NAMES.map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use assay_ebpf::flags as kernel;

    use super::*;

    #[test]
    fn bits_are_the_kernel_programs() {
        let pairs = [
            (PATH_CUT, kernel::PATH_CUT),
            (UNLINKED, kernel::UNLINKED),
            (NOT_HASHED, kernel::NOT_HASHED),
            (UNSTABLE, kernel::UNSTABLE),
            (MEMFD, kernel::MEMFD),
            (TMPFS, kernel::TMPFS),
            (OVERLAY, kernel::OVERLAY),
            (SCRIPT, kernel::SCRIPT),
            (INTERPRETER, kernel::INTERPRETER),
            (AHEAD, kernel::AHEAD),
            (REFUSED, kernel::REFUSED),
            (USER_HASH, kernel::USER_HASH),
            (NO_COUNTER, kernel::NO_COUNTER),
            (MODIFIED, kernel::MODIFIED),
            (IDLE, kernel::IDLE),
            (ALL, kernel::ALL),
        ];
        for (ours, theirs) in pairs {
            assert_eq!(ours, theirs);
        }
    }

    #[test]
    fn every_bit_has_one_name() {
        assert_eq!(flag_names(ALL).len(), 15);
        assert_eq!(NAMES.iter().fold(0, |all, (bit, _)| all | bit), ALL);
        assert_eq!(flag_names(MEMFD | TMPFS), ["memfd", "tmpfs"]);
        assert!(flag_names(!ALL).is_empty());
        assert!(
            names()
                .into_iter()
                .all(|name| flag_names(flag_bit(name).unwrap()) == [name])
        );
    }
}
