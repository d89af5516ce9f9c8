//! What events prove: logs made by hand, with what real ones can't be made to show.

use super::*;
use crate::uuid::Uuid;

const EV_IPL: u32 = 13;
const EV_ACTION: u32 = 0x8000_0007;
const EV_CONFIG: u32 = 0x8000_0001;
const EV_EVENT_TAG: u32 = 6;
/// As bytes of a log.
const GLOBAL: [u8; 16] = *b"\x61\xdf\xe4\x8b\xca\x93\xd2\x11\xaa\x0d\x00\xe0\x98\x03\x2b\x8c";
const SHIM: [u8; 16] = *b"\x50\xab\x5d\x60\x46\xe0\x00\x43\xab\xb6\x3d\xd8\x10\xdd\x8b\x23";

/// An event whose digest is the hash of `hashed`.
fn event(pcr: u32, event_type: u32, hashed: &[u8], data: &[u8]) -> Vec<u8> {
    agile(pcr, event_type, &[(0x0B, &Algorithm::Sha256.hash(hashed))], data)
}

/// An event that hashes what it logs.
fn honest(pcr: u32, event_type: u32, data: &[u8]) -> Vec<u8> {
    event(pcr, event_type, data, data)
}

fn utf16(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

fn variable(vendor: [u8; 16], name: &str, value: &[u8]) -> Vec<u8> {
    let mut data = vendor.to_vec();
    data.extend(u64::try_from(name.len()).unwrap().to_le_bytes());
    data.extend(u64::try_from(value.len()).unwrap().to_le_bytes());
    data.extend(utf16(name));
    data.extend(value);
    data
}

fn log(events: &[Vec<u8>]) -> BootLog {
    parse(&[header(SHA256, b""), events.concat()].concat()).unwrap()
}

/// The description of the log's only event.
fn described(event: Vec<u8>) -> String {
    let log = log(&[event]);
    let proven = log.proven(Algorithm::Sha256, None).unwrap();
    let [only] = proven.as_slice() else {
        panic!("{proven:?}")
    };
    only.describe()
}

fn facts(events: &[Vec<u8>]) -> BootFacts {
    BootFacts::of(&log(events).proven(Algorithm::Sha256, None).unwrap())
}

#[test]
fn data_counts_only_where_the_digest_is_its_hash() {
    let on = variable(GLOBAL, "SecureBoot", &[1]);
    let off = variable(GLOBAL, "SecureBoot", &[0]);
    assert_eq!(described(honest(7, EV_CONFIG, &on)), "variable SecureBoot = 01 (on)");
    let lie = described(event(7, EV_CONFIG, &off, &on));
    assert!(
        lie.starts_with("claimed EV_EFI_VARIABLE_DRIVER_CONFIG 61dfe48b"),
        "{lie}"
    );

    let action = b"Calling EFI Application from Boot Option";
    assert_eq!(
        described(honest(4, EV_ACTION, action)),
        "\"Calling EFI Application from Boot Option\" (claimed EV_EFI_ACTION)"
    );
    assert_eq!(
        described(event(4, EV_ACTION, b"x", action)),
        "claimed EV_EFI_ACTION \"Calling EFI Application from Boot Option\""
    );
    // The type is a claim, whatever it is.
    assert_eq!(
        described(honest(4, 0x8000_0003, action)),
        "\"Calling EFI Application from Boot Option\" (claimed program)"
    );
}

#[test]
fn secure_boot_is_known_only_from_uefis_own_variable_in_pcr_7() {
    let state = |events: &[Vec<u8>]| facts(events).secure_boot;
    let one = |value: &[u8]| honest(7, EV_CONFIG, &variable(GLOBAL, "SecureBoot", value));
    assert_eq!(state(&[one(&[1])]), SecureBoot::On);
    assert_eq!(state(&[one(&[0])]), SecureBoot::Off);
    assert_eq!(state(&[one(&[])]), SecureBoot::Off);
    assert_eq!(state(&[one(&[2])]), SecureBoot::Unknown);
    assert_eq!(state(&[one(&[1]), one(&[0])]), SecureBoot::Unknown);
    assert_eq!(state(&[one(&[1]), one(&[1])]), SecureBoot::On);
    assert_eq!(state(&[]), SecureBoot::Unknown);
    let on = variable(GLOBAL, "SecureBoot", &[1]);
    assert_eq!(state(&[honest(1, EV_CONFIG, &on)]), SecureBoot::Unknown);
    assert_eq!(state(&[event(7, EV_CONFIG, b"", &on)]), SecureBoot::Unknown);
    assert_eq!(
        state(&[honest(7, EV_CONFIG, &variable(SHIM, "SecureBoot", &[1]))]),
        SecureBoot::Unknown
    );
    // What comes after the separator was not there when the firmware decided.
    let separator = honest(7, 4, &[0; 4]);
    assert_eq!(state(&[separator, one(&[1])]), SecureBoot::Unknown);
}

/// The vendor's bytes before the entries of a list are none of them, whatever they look like (UEFI specification, 32.4.1).
#[test]
fn the_header_of_a_signature_list_is_no_entry() {
    let list = |header: &[u8], entries: &[[u8; 48]], told: u32| {
        let size = 28 + header.len() + 48 * entries.len();
        let mut list = b"\x26\x16\xc4\xc1\x4c\x50\x92\x40\xac\xa9\x41\xf9\x36\x93\x43\x28".to_vec();
        for number in [u32::try_from(size).unwrap(), told, 48] {
            list.extend(number.to_le_bytes());
        }
        [&list, header, entries.as_flattened()].concat()
    };
    let digests = |list: &[u8]| uefi::Keys::parse(list).map(|keys| keys.digests);
    assert_eq!(digests(&list(&[], &[[1; 48]; 2], 0)), Some(2));
    assert_eq!(digests(&list(&[9; 96], &[[1; 48]], 96)), Some(1));
    assert_eq!(digests(&list(&[9; 7], &[[1; 48]], 7)), Some(1));
    // A header that is said to be shorter, or longer than the list.
    assert_eq!(digests(&list(&[9; 7], &[[1; 48]], 0)), None);
    assert_eq!(digests(&list(&[], &[[1; 48]], 49)), None);
    assert_eq!(digests(&list(&[], &[], u32::MAX)), None);
}

#[test]
fn a_variable_of_another_vendor_is_named_with_it() {
    assert_eq!(
        described(honest(7, EV_CONFIG, &variable([0x11; 16], "SecureBoot", &[1]))),
        "variable SecureBoot-11111111-1111-1111-1111-111111111111 = 01"
    );
    assert_eq!(
        described(honest(7, EV_CONFIG, &variable(SHIM, "SecureBoot", &[1]))),
        "variable SecureBoot of shim = 01"
    );
    let proven = honest(7, EV_CONFIG, &variable(GLOBAL, "PK", b""));
    let log = log(&[proven]);
    let proven = log.proven(Algorithm::Sha256, None).unwrap();
    assert_eq!(proven[0].describe(), "variable PK does not exist");
    let Meaning::Variable(variable) = proven[0].meaning() else {
        panic!("{proven:?}")
    };
    assert_eq!(
        variable.vendor,
        "8be4df61-93ca-11d2-aa0d-00e098032b8c".parse::<Uuid>().unwrap()
    );
}

#[test]
fn a_variables_content_alone_does_not_prove_its_name() {
    let order = variable(GLOBAL, "BootOrder", &[0, 0, 1, 0]);
    assert_eq!(
        described(event(1, 0x8000_0002, &[0, 0, 1, 0], &order)),
        "content = 00000100 (claimed variable BootOrder)"
    );
}

#[test]
fn grub_hashes_less_than_it_logs() {
    let command = "linux /vmlinuz root=/dev/vda quiet";
    assert_eq!(
        described(event(
            8,
            EV_IPL,
            command.as_bytes(),
            format!("grub_cmd: {command}\0").as_bytes()
        )),
        "\"linux /vmlinuz root=/dev/vda quiet\" (claimed GRUB command)"
    );
    // Another text than was hashed.
    assert_eq!(
        described(event(8, EV_IPL, command.as_bytes(), b"grub_cmd: linux /vmlinuz\0")),
        "claimed EV_IPL \"grub_cmd: linux /vmlinuz\""
    );
    // The prefix with it is not what GRUB hashes, yet it is proven then.
    assert_eq!(
        described(honest(8, EV_IPL, b"grub_cmd: linux /vmlinuz")),
        "\"grub_cmd: linux /vmlinuz\" (claimed EV_IPL)"
    );
    // Only GRUB's PCR is read so.
    assert_eq!(
        described(event(4, EV_IPL, b"ls", b"grub_cmd: ls\0")),
        "claimed EV_IPL \"grub_cmd: ls\""
    );
    assert_eq!(
        described(event(9, EV_IPL, b"\x7fELF", b"/vmlinuz\0")),
        "claimed file /vmlinuz"
    );
}

#[test]
fn xen_and_its_modules_by_grub() {
    let command = |text: &str| event(8, EV_IPL, text.as_bytes(), format!("grub_cmd: {text}\0").as_bytes());
    let file = |name: &str| event(9, EV_IPL, b"its content", format!("{name}\0").as_bytes());
    let line = |prefix: &str, text: &str| event(8, EV_IPL, text.as_bytes(), format!("{prefix}: {text}\0").as_bytes());
    let facts = facts(&[
        file("/boot/grub/grub.cfg"),
        command("multiboot2 /xen.gz placeholder dom0_mem=1024M"),
        file("/xen.gz"),
        line("kernel_cmdline", "/xen.gz placeholder dom0_mem=1024M"),
        command("module2 --nounzip /vmlinuz root=/dev/vda"),
        file("/vmlinuz"),
        line("module_cmdline", "/vmlinuz root=/dev/vda"),
        command("module2 /initrd.img"),
        file("/initrd.img"),
    ]);
    let roles: Vec<(Option<&str>, Option<Role>)> = facts
        .grub_files
        .iter()
        .map(|file| (file.file.claimed.as_deref(), file.role))
        .collect();
    assert_eq!(
        roles,
        [
            (Some("/boot/grub/grub.cfg"), None),
            (Some("/xen.gz"), Some(Role::Xen)),
            (Some("/vmlinuz"), Some(Role::Module)),
            (Some("/initrd.img"), Some(Role::Module)),
        ]
    );
    let lines: Vec<_> = facts
        .command_lines
        .iter()
        .filter_map(|line| line.text.as_deref())
        .collect();
    assert_eq!(lines, ["/xen.gz placeholder dom0_mem=1024M", "/vmlinuz root=/dev/vda"]);
    assert!(facts.to_string().contains("\nXen "), "{facts}");
}

/// The EFI stub of Linux logs tags only; what a digest is of, somebody else must know.
#[test]
fn a_command_line_from_elsewhere_counts_where_a_digest_proves_it() {
    let tag = |tag: u32, text: &[u8]| {
        let size = u32::try_from(text.len()).unwrap();
        [&tag.to_le_bytes()[..], &size.to_le_bytes(), text].concat()
    };
    let options = tag(0x8F3B_22ED, b"LOADED_IMAGE::LoadOptions\0");
    let text = "root=/dev/vda ro";
    let events = [
        event(9, EV_EVENT_TAG, &[utf16(text), vec![0, 0]].concat(), &options),
        event(9, EV_EVENT_TAG, b"an initrd", &tag(0x8F3B_22EC, b"Linux initrd\0")),
    ];
    let log = log(&events);
    let lines = |known: Option<&str>| -> Vec<String> {
        let proven = log.proven(Algorithm::Sha256, known).unwrap();
        proven.iter().map(Proven::describe).collect()
    };
    assert_eq!(lines(None), ["claimed load options", "claimed initrd"]);
    assert_eq!(lines(Some("root=/dev/vdb ro")), lines(None));
    assert_eq!(
        lines(Some(text)),
        ["\"root=/dev/vda ro\" (claimed load options)", "claimed initrd"]
    );
    let facts = BootFacts::of(&log.proven(Algorithm::Sha256, Some(text)).unwrap());
    assert_eq!(facts.command_lines[0].text.as_deref(), Some(text));
    assert_eq!(facts.initrds[0].0, Algorithm::Sha256.hash(b"an initrd"));
    // GRUB's own measurement of the line is as good as the agent's word.
    let line = event(8, EV_IPL, b"/vmlinuz ro", b"kernel_cmdline: /vmlinuz ro\0");
    let given = [utf16("BOOT_IMAGE=/vmlinuz ro"), vec![0, 0]].concat();
    let log = super::proven::log(&[line, event(9, EV_EVENT_TAG, &given, &options)]);
    let proven = log.proven(Algorithm::Sha256, None).unwrap();
    assert_eq!(
        proven[1].describe(),
        "\"BOOT_IMAGE=/vmlinuz ro\" (claimed load options)"
    );
}

#[test]
fn sections_of_a_unified_kernel_image() {
    let name = |name: &str| {
        event(
            11,
            EV_IPL,
            format!("{name}\0").as_bytes(),
            &[utf16(name), vec![0, 0]].concat(),
        )
    };
    let content = |name: &str, content: &[u8]| event(11, EV_IPL, content, &[utf16(name), vec![0, 0]].concat());
    let options = [utf16("root=/dev/vda"), vec![0, 0]].concat();
    let facts = facts(&[
        name(".linux"),
        content(".linux", b"a kernel"),
        name(".cmdline"),
        content(".cmdline", b"root=/dev/vda"),
        // A name that was not measured is none.
        content(".initrd", b"an initrd"),
        // systemd before 253 logs one byte of the closing NUL too few.
        event(12, EV_IPL, &options, &options[..options.len() - 1]),
    ]);
    let sections: Vec<_> = facts
        .sections
        .iter()
        .map(|one| (one.name.as_str(), one.digest.0.clone()))
        .collect();
    assert_eq!(
        sections,
        [
            (".linux", Algorithm::Sha256.hash(b"a kernel")),
            (".cmdline", Algorithm::Sha256.hash(b"root=/dev/vda"))
        ]
    );
    assert_eq!(facts.command_lines[0].text.as_deref(), Some("root=/dev/vda"));
}

#[test]
fn an_error_of_the_firmware_shows() {
    assert_eq!(described(honest(4, 4, &[0; 4])), "separator");
    assert_eq!(described(honest(4, 4, &[0xFF; 4])), "separator");
    assert_eq!(
        described(honest(4, 4, &[1, 0, 0, 0])),
        "separator, the firmware met an error"
    );
    assert_eq!(described(honest(14, 4, b"WBCL")), "\"WBCL\" (claimed EV_SEPARATOR)");
}

/// A stranger's words come out printable, on one line, and short.
#[test]
fn descriptions_hold_no_surprises() {
    let long = vec![b'"'; MAX_EVENT_DATA / 2];
    for text in [
        &b"one\ntwo"[..],
        b"\x1b[2J\x1b[31mfine",
        "\u{202e}\u{2066}".as_bytes(),
        &long,
    ] {
        for event in [
            honest(8, EV_IPL, text),
            event(9, EV_IPL, b"", text),
            event(4, 0x8000_0003, b"", text),
            honest(7, EV_CONFIG, &variable(GLOBAL, "x\ny", text)),
        ] {
            let text = described(event);
            assert!(text.chars().count() <= MAX_DESCRIPTION, "{}", text.len());
            assert!(text.chars().all(|c| !c.is_control() && c != '\u{202e}'), "{text:?}");
        }
    }
}

#[test]
fn a_bank_that_the_log_lacks_proves_nothing() {
    let log = log(&[honest(4, 4, &[0; 4])]);
    assert_eq!(
        log.proven(Algorithm::Sha1, None),
        Err(BootLogError::NoBank(Algorithm::Sha1, vec![Algorithm::Sha256]))
    );
}
