//! The machines with toolstacks of virtual machines: one root filesystem and one kernel, with and without Xen below it.

use assay_tests::vm::{Image, LIBVIRT, XEN, Xen};

use super::kernel::{self, Series};
use super::rootfs::Contents;
use super::{Parts, describe, initrd, rootfs};
use crate::build::Built;
use crate::run::Error;
use crate::ui::note;
use crate::workspace::{artifacts, lock_cache};

/// The series of the kernel that Xen's guests run: what the other tests have already.
const GUEST: &str = "6.1";

/// Both, described where the harness looks for them. The first test that wants one boots and saves it.
pub fn prepare(built: &Built) -> Result<(), Error> {
    let _lock = lock_cache()?;
    let parts = Parts::ensure(built, Contents::Toolstacks)?;
    let (host, guest) = (
        kernel::HOST.ensure(&parts.system)?,
        Series::named(GUEST)?.ensure(&parts.system)?,
    );
    let xen = Xen {
        hypervisor: rootfs::hypervisor(&parts.root)?,
        guest_kernel: guest.bzimage(),
        guest_initrd: initrd::guest(&guest)?,
    };
    let folder = artifacts()?;
    for (name, xen) in [(LIBVIRT, None), (XEN, Some(xen))] {
        describe(&parts.image_with(&host, xen)?, &folder.join(Image::file_name(name)))?;
    }
    note(&format!(
        "machines: Linux {} with and without Xen, emulated",
        host.release
    ));
    Ok(())
}
