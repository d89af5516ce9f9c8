//! Units for systemd 219, which dom0 of XCP-ng 8.3 has.

/// Settings that came after systemd 219, which would only warn about each at every start, and what stands in for them.
const UNKNOWN: &[&str] = &[
    // Instead, tmpfiles.d and the RPM make the folders.
    "StateDirectory",
    "StateDirectoryMode",
    "RuntimeDirectoryPreserve",
    // Of systemd 219, but without Preserve (235) it would be removed with every stop, and this boot's log with it.
    "RuntimeDirectory",
    "RuntimeDirectoryMode",
    // The watchdog ends with SIGABRT there. Only hold and enforce, which need a newer kernel, keep that from the agent.
    "WatchdogSignal",
    // Nothing stands in for these: the agent has them on newer hosts only.
    "ProtectHostname",
    "RestrictNamespaces",
    "RestrictRealtime",
    "RestrictSUIDSGID",
    "LockPersonality",
    "MemoryDenyWriteExecute",
    "ProtectKernelModules",
    "ProtectControlGroups",
    // Of systemd 219, but without groups of calls (231): it would take the filter for empty.
    "SystemCallFilter",
    "SystemCallErrorNumber",
];
/// Capabilities that Linux 4.19 does not have: CAP_SYS_ADMIN stands for them there.
const NEW_CAPABILITIES: [&str; 2] = ["CAP_BPF ", "CAP_PERFMON "];

/// The unit without what systemd 219 does not know, and without the comments on that.
pub(super) fn for_systemd_219(unit: &str) -> String {
    let mut text = String::new();
    let mut comments = String::new();
    for line in unit.lines() {
        if line.starts_with('#') {
            comments.push_str(&format!("{line}\n"));
            continue;
        }
        let key = line.split_once('=').map(|(key, _)| key);
        if !key.is_some_and(|key| UNKNOWN.contains(&key)) {
            text.push_str(&comments);
            text.push_str(&older(line));
            text.push('\n');
        }
        comments.clear();
    }
    text
}

/// One line in the form that systemd 219 reads.
fn older(line: &str) -> String {
    // Suffixes came with 228.
    if line == "LimitMEMLOCK=64M" {
        return format!("LimitMEMLOCK={}", 64 << 20);
    }
    let fewer = |line: String, name: &&str| line.replace(name, "");
    NEW_CAPABILITIES.iter().fold(line.to_owned(), fewer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_new_goes_with_its_comment() {
        let unit = "[Service]\n# why\nStateDirectory=assay\n# kept\nUMask=0077\nLimitMEMLOCK=64M\nCapabilityBoundingSet=CAP_BPF CAP_PERFMON CAP_SYS_ADMIN\n";
        assert_eq!(
            for_systemd_219(unit),
            "[Service]\n# kept\nUMask=0077\nLimitMEMLOCK=67108864\nCapabilityBoundingSet=CAP_SYS_ADMIN\n"
        );
    }
}
