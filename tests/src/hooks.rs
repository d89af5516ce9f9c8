//! The files in `packaging/hooks`, for tests that call them as their toolstacks do.

use std::path::{Path, PathBuf};

/// All of them, by name.
pub const FILES: [&str; 5] = [
    "assay_keys.py",
    "block-assay",
    "libvirt",
    "smapiv3-datapath",
    "xapi-vm-pre-start",
];

/// What Xen's own `block-common.sh` gives to a block script, with the folder `$STORE` in the place of xenstore: that needs Xen.
pub const BLOCK_COMMON: &str = r#"
set -e
command=$1
log() { shift; echo "$@" >&2; }
xenstore_read_default() { cat "$STORE/${1##*/}" 2>/dev/null || echo "$2"; }
xenstore_write() { printf '%s' "$2" > "$STORE/${1##*/}"; }
fatal() { xenstore_write x/hotplug-error "$*"; xenstore_write x/hotplug-status error; exit 1; }
write_dev() {
    mm=$(stat -L -c %t:%T "$1") || fatal "Backend device does not exist"
    xenstore_write x/physical-device "$mm"
    xenstore_write x/physical-device-path "$1"
    xenstore_write x/hotplug-status connected
}
"#;

/// Where one of them is.
#[must_use]
pub fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../packaging/hooks")
        .join(name)
}
