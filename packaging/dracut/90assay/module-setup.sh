#!/bin/bash
# /usr/lib/dracut/modules.d/90assay: the agent in the initramfs, where a file in /etc/dracut.conf.d says add_dracutmodules+=" assay ".

check() {
    require_binaries /usr/bin/assay-agent || return 1
    # Only where it is asked for.
    return 255
}

depends() {
    echo systemd
}

installkernel() {
    hostonly='' instmods tpm_tis tpm_crb
}

install() {
    # No keys and no enrolment: whoever reads the disk reads this.
    inst_multiple /usr/bin/assay-agent /usr/lib/assay/assay-ebpf.o /usr/lib/assay/assay-ebpf-probe.o
    inst_simple /etc/assay/agent.toml
    # tpm2-tss opens it by name.
    inst_libdir_file 'libtss2-tcti-device.so.0*'
    inst_simple /usr/lib/systemd/system/assay-early.service "$systemdsystemunitdir/assay-early.service"
    mkdir -p "$initdir/$systemdsystemunitdir/sysinit.target.wants"
    ln -sf ../assay-early.service "$initdir/$systemdsystemunitdir/sysinit.target.wants/assay-early.service"
}
