//! The hooks in `packaging/hooks` with their genuine callers: xl on Xen, and libvirt, whose domains also boot from images out of image stores. Each test has a whole host in a machine.
//! `cargo xtask test xen` runs them.

#[expect(dead_code, reason = "shared with the tests of the layer vm")]
#[path = "../vm/common.rs"]
mod common;

mod disk;
mod libvirt;
mod stores;
mod xl;

use assay_tests::HarnessError;

use common::Stage;

/// Seals a disk that begins with these bytes, and puts it into the machine.
fn seal(stage: &Stage, path: &str, content: &[u8]) -> Result<(), HarnessError> {
    let mut disk = content.to_vec();
    disk.resize(1 << 20, 0);
    stage.sealed(path, |plain| {
        std::fs::write(plain, &disk).map_err(HarnessError::io("write a disk image"))
    })
}
