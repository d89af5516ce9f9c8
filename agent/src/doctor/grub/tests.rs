use super::*;

/// As the installer of XCP-ng 8.3 writes it, in short.
const CONFIG: &str = "serial --unit=0 --speed=115200
terminal_input serial console
set default=0
set timeout=5
if [ -s $prefix/grubenv ]; then
\tload_env
fi
menuentry 'XCP-ng' {
\tsearch --label --set root root-vgdorj
\tmultiboot2 /boot/xen.gz dom0_mem=2672M,max:2672M
\tmodule2 /boot/vmlinuz-4.19-xen root=LABEL=root-vgdorj ro
\tmodule2 /boot/initrd-4.19-xen.img
}
";

struct Machine {
    root: tempfile::TempDir,
    host: Host,
}

impl Machine {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let host = Host::below(root.path());
        let machine = Self { root, host };
        machine.put(KNOWN[0], CONFIG);
        machine.put(MODULE, "");
        machine.put("/sys/firmware/efi/config_table", "");
        machine
    }

    fn put(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path.trim_start_matches('/'))
    }

    fn config(&self) -> String {
        fs::read_to_string(self.path(KNOWN[0])).unwrap()
    }

    fn plan(&self) -> Result<Option<Fix>, GrubError> {
        Fix::plan(&self.host, None)
    }
}

#[test]
fn the_module_is_loaded_before_all_else_and_once() {
    let machine = Machine::new();
    let fix = machine.plan().unwrap().expect("something to do");
    assert_eq!(machine.config(), CONFIG, "a plan changes nothing");
    fix.apply().unwrap();
    let lines = "search --set=assay_root --label root-vgdorj\ninsmod ($assay_root)/usr/lib/grub/x86_64-efi/tpm.mod\n";
    assert_eq!(machine.config(), format!("{BEGIN}\n{lines}{END}\n{CONFIG}"));
    let kept = fs::read_to_string(machine.path(&format!("{}.before-assay", KNOWN[0]))).unwrap();
    assert_eq!(kept, CONFIG);
    assert_eq!(machine.plan().unwrap(), None);
    assert!(!reassert(&machine.host).unwrap(), "nothing is missing");

    machine.put(KNOWN[0], &CONFIG.replace("4.19", "4.20"));
    assert!(reassert(&machine.host).unwrap(), "an update wrote it anew");
    assert!(machine.config().starts_with(BEGIN) && machine.config().contains("vmlinuz-4.20"));
}

#[test]
fn nothing_is_put_back_without_consent() {
    let machine = Machine::new();
    assert!(!reassert(&machine.host).unwrap());
    assert_eq!(machine.config(), CONFIG);
}

#[test]
fn what_cannot_be_done_is_refused_by_its_name() {
    let machine = Machine::new();
    fs::remove_file(machine.path(MODULE)).unwrap();
    assert!(matches!(machine.plan(), Err(GrubError::NoModule { .. })));

    let machine = Machine::new();
    machine.put(KNOWN[0], "linux /vmlinuz\n");
    assert!(matches!(machine.plan(), Err(GrubError::NoSearch { .. })));

    let machine = Machine::new();
    fs::remove_file(machine.path(KNOWN[0])).unwrap();
    assert!(matches!(machine.plan(), Err(GrubError::NoConfig)));

    let machine = Machine::new();
    fs::remove_dir_all(machine.path("/sys")).unwrap();
    assert!(matches!(machine.plan(), Err(GrubError::Bios)));

    let machine = Machine::new();
    machine.put(
        "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c",
        "\u{6}\0\0\0\u{1}",
    );
    assert!(matches!(machine.plan(), Err(GrubError::SecureBoot)));

    let machine = Machine::new();
    machine.put(KNOWN[0], &" ".repeat(usize::try_from(MAX_FILE).unwrap() + 1));
    assert!(matches!(machine.plan(), Err(GrubError::File { action: "read", .. })));
}

#[test]
fn a_full_or_read_only_place_leaves_the_configuration_as_it_was() {
    let machine = Machine::new();
    let fix = machine.plan().unwrap().expect("something to do");
    // A folder in the place of the new file: nobody, root included, writes there.
    fs::create_dir(machine.path(&format!("{}.assay-new", KNOWN[0]))).unwrap();
    assert!(matches!(fix.apply(), Err(GrubError::File { action: "write", .. })));
    assert_eq!(machine.config(), CONFIG);
    assert!(!machine.path(CONSENT).exists());
}

#[test]
fn the_root_is_looked_for_as_the_configuration_does() {
    let cases = [
        (
            "search --label --set root root-a",
            Some("search --set=assay_root --label root-a"),
        ),
        (
            "search --no-floppy --fs-uuid --set=root 12-34",
            Some("search --set=assay_root --no-floppy --fs-uuid 12-34"),
        ),
        (
            "  search -s root -f /boot/x",
            Some("search --set=assay_root -f /boot/x"),
        ),
        ("search --set=dev --label x", None),
        ("search --label --set root $label", None),
        ("search --label --set root \"a;reboot\"", None),
        ("search --set root", None),
        ("search", None),
        ("researcher --set root x", None),
    ];
    for (line, wanted) in cases {
        assert_eq!(search(line).as_deref(), wanted, "{line}");
    }
}
