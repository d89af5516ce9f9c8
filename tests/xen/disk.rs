//! A disk that boots as any small VM's does: a first sector, GRUB behind it, and a root filesystem out of which GRUB loads what it starts. That
//! is a sector of machine code here: a Linux takes more than a minute of processor time where one machine is emulated within another.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use assay_tests::HarnessError;
use assay_tests::child::run;

/// Where Debian's `grub-pc-bin` has GRUB's first sector.
const FIRST_SECTOR: &str = "/usr/lib/grub/i386-pc/boot.img";
/// What GRUB needs to find a file, and to start what is in it.
const BUILT_IN: [&str; 4] = ["biosdisk", "part_msdos", "ext2", "chain"];
/// GRUB does as it is told here, and has no menu.
const SCRIPT: &str = "chainloader (hd0,msdos1)/boot/system\nboot\n";
const SECTOR: u64 = 512;
/// Where the root filesystem begins. What is before it is GRUB's.
const BEGIN: u64 = 1 << 20;
/// The root filesystem's size.
const SIZE: u64 = 3 << 20;
/// Where the table of partitions is in the first sector.
const TABLE: std::ops::Range<usize> = 446..510;
/// Real mode: clears DS, sends what follows to the first serial port up to a zero byte, and halts for ever.
const CODE: [u8; 22] = [
    0x31, 0xc0, // xor ax, ax
    0x8e, 0xd8, // mov ds, ax
    0xfc, // cld
    0xbe, 0x16, 0x7c, // mov si, 0x7c16: behind this
    0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xac, // next: lodsb
    0x84, 0xc0, // test al, al
    0x74, 0x03, // jz end
    0xee, // out dx, al
    0xeb, 0xf8, // jmp next
    0xf4, // end: hlt
    0xeb, 0xfd, // jmp end
];

/// A sector that firmware or a loader can start, and that says this on the first serial port.
pub fn boot_sector(line: &str) -> Vec<u8> {
    let mut sector = [&CODE, line.as_bytes()].concat();
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    sector
}

/// Writes a raw disk whose system says this.
pub fn write(line: &str, disk: &Path) -> Result<(), HarnessError> {
    let scratch = tempfile::tempdir().map_err(HarnessError::io("make a scratch folder"))?;
    let (root, loader) = (scratch.path().join("root"), scratch.path().join("loader"));
    let boot = root.join("boot");
    fs::create_dir_all(&boot).map_err(HarnessError::io(format!("make {}", boot.display())))?;
    put(&boot.join("system"), &boot_sector(line))?;
    let failed = || HarnessError::io(format!("write {}", disk.display()));
    let file = File::create(disk).map_err(failed())?;
    file.set_len(BEGIN + SIZE).map_err(failed())?;
    let mut mke2fs = Command::new("mke2fs");
    // GRUB of every age reads the second version.
    mke2fs.args(["-q", "-F", "-t", "ext2", "-E", &format!("offset={BEGIN}"), "-d"]);
    run(mke2fs.arg(&root).arg(disk).arg(format!("{}k", SIZE / 1024)))?;
    make_loader(scratch.path(), &loader)?;
    let loader = read(&loader)?;
    assert!(
        loader.len() as u64 <= BEGIN - SECTOR,
        "GRUB does not fit before the partition"
    );
    file.write_all_at(&first_sector()?, 0).map_err(failed())?;
    file.write_all_at(&loader, SECTOR).map_err(failed())
}

/// GRUB, as it lies behind the first sector, with its script in it.
fn make_loader(scratch: &Path, to: &Path) -> Result<(), HarnessError> {
    let script = scratch.join("grub.cfg");
    put(&script, SCRIPT.as_bytes())?;
    let mut make = Command::new("grub-mkimage");
    make.args(["-O", "i386-pc", "-p", "(hd0,msdos1)/boot", "-c"])
        .arg(script)
        .arg("-o");
    run(make.arg(to).args(BUILT_IN))
}

/// GRUB's first sector, which loads what follows it, with a table of one partition.
fn first_sector() -> Result<Vec<u8>, HarnessError> {
    let mut sector = read(Path::new(FIRST_SECTOR))?;
    // Active; its place is in the sectors' numbers alone; Linux.
    let mut table = vec![0x80, 0xfe, 0xff, 0xff, 0x83, 0xfe, 0xff, 0xff];
    for bytes in [BEGIN, SIZE] {
        let sectors = u32::try_from(bytes / SECTOR).expect("a small disk");
        table.extend(sectors.to_le_bytes());
    }
    // In the place of further partitions GRUB has code for floppy disks.
    table.resize(TABLE.len(), 0);
    let place = sector.get_mut(TABLE).ok_or_else(|| HarnessError::Image {
        path: PathBuf::from(FIRST_SECTOR),
        message: "it is shorter than a sector".to_owned(),
    })?;
    place.copy_from_slice(&table);
    Ok(sector)
}

fn read(path: &Path) -> Result<Vec<u8>, HarnessError> {
    fs::read(path).map_err(HarnessError::io(format!(
        "read {}: `cargo xtask setup` installs what has it",
        path.display()
    )))
}

fn put(path: &Path, content: &[u8]) -> Result<(), HarnessError> {
    fs::write(path, content).map_err(HarnessError::io(format!("write {}", path.display())))
}
