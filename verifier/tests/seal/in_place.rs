//! Sealing in place: whenever it is interrupted, the next run ends it, and stock cryptsetup gives the whole disk back.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    panic::{AssertUnwindSafe, catch_unwind},
    process::Command,
};

use assay_verifier::{
    keystore::{KeyInfo, KeySource},
    seal::{self, HEADER_LEN, InPlace, InPlaceRequest, RecoveryKey, SealError, Sealed, Terms},
};

use crate::bench::{Bench, MIB, decrypted_by_cryptsetup, disk, opens, terms};

fn begin(bench: &Bench) -> Result<InPlace, SealError> {
    let image = bench.path("disk.raw");
    let request = InPlaceRequest {
        image: &image,
        disk_size: None,
        terms: terms(),
    };
    InPlace::begin(&request, &bench.path("sealing"), &bench.keys)
}

fn find(bench: &Bench) -> Result<Option<InPlace>, SealError> {
    InPlace::find(&bench.path("disk.raw"), &bench.path("sealing"))
}

fn journals(bench: &Bench) -> usize {
    fs::read_dir(bench.path("sealing")).map_or(0, Iterator::count)
}

/// Moved at a time.
const CHUNK: usize = 4 * MIB;

/// The end of every story here.
fn assert_sealed(bench: &Bench, info: &KeyInfo, plain: &[u8]) {
    let image = bench.path("disk.raw");
    assert_eq!(fs::metadata(&image).unwrap().len(), HEADER_LEN + plain.len() as u64);
    let sealed = Sealed::read(&image).unwrap();
    sealed.check_key(info).unwrap();
    assert_eq!(sealed.key_id().unwrap(), info.key_id);
    assert_eq!(journals(bench), 0, "the journal is gone");
    let decrypted = decrypted_by_cryptsetup(&image, &bench.key_file(info.key_id));
    assert!(decrypted.starts_with(plain), "the disk is another one");
}

/// Two whole chunks and a part.
fn three_chunks() -> Vec<u8> {
    disk(9 * MIB + 512)
}

#[test]
fn a_file_is_sealed_where_it_is() {
    let plain = three_chunks();
    let bench = Bench::new(&plain);
    let recovery = RecoveryKey::generate().unwrap();
    let image = bench.path("disk.raw");
    let request = InPlaceRequest {
        image: &image,
        disk_size: Some(plain.len() as u64),
        terms: Terms {
            recovery: Some(&recovery),
            ..terms()
        },
    };
    let begun = InPlace::begin(&request, &bench.path("sealing"), &bench.keys).unwrap();
    assert!(fs::read(&image).unwrap() == plain, "nothing is changed before the run");
    let mut heard = Vec::new();
    let info = begun
        .run(&bench.keys, &mut |done, total| heard.push((done, total)))
        .unwrap();
    let (chunk, total) = (HEADER_LEN, plain.len() as u64);
    assert_eq!(
        heard,
        [(total - 2 * chunk, total), (total - chunk, total), (total, total)]
    );
    fs::write(bench.path("recovery"), recovery.expose()).unwrap();
    assert!(opens(&image, &bench.path("recovery")));
    assert_sealed(&bench, &info, &plain);
}

#[test]
fn a_crash_after_any_chunk_is_gone_on_with() {
    let plain = three_chunks();
    for crash_after in 0..4_usize {
        let bench = Bench::new(&plain);
        let begun = begin(&bench).unwrap();
        let mut chunks = 0;
        let crashed = catch_unwind(AssertUnwindSafe(|| {
            if crash_after == 0 {
                drop(begun);
                return;
            }
            let crash = &mut |_, _| {
                chunks += 1;
                assert!(chunks < crash_after, "crash");
            };
            drop(begun.run(&bench.keys, crash));
        }));
        assert_eq!(crashed.is_err(), crash_after > 0);
        assert_eq!(journals(&bench), 3);

        // The write that was under way left anything at all in the place that it went to: where the next chunk to be moved goes.
        let image = File::options().write(true).open(bench.path("disk.raw")).unwrap();
        let next = [2_usize, 1, 0].get(crash_after);
        match next {
            Some(number) => {
                let place = ((number + 1) * CHUNK) as u64;
                let len = CHUNK.min(plain.len() - number * CHUNK);
                image.write_all_at(&vec![0xab; len / 2], place).unwrap();
            }
            None => image.write_all_at(&vec![0xab; CHUNK / 2], 0).unwrap(),
        }
        drop(image);

        let found = find(&bench).unwrap().expect("the journal names the image");
        let info = found.run(&bench.keys, &mut |_, _| {}).unwrap();
        assert_eq!(bench.keys.list().unwrap().keys.len(), 1, "the same key");
        assert_sealed(&bench, &info, &plain);
    }
}

#[test]
fn only_the_image_that_the_run_left_is_gone_on_with() {
    let plain = three_chunks();
    let bench = Bench::new(&plain);
    let mut chunks = 0;
    let begun = begin(&bench).unwrap();
    let crashed = catch_unwind(AssertUnwindSafe(|| {
        drop(begun.run(&bench.keys, &mut |_, _| {
            chunks += 1;
            assert!(chunks < 2, "crash");
        }))
    }));
    assert!(crashed.is_err());
    let half = fs::read(bench.path("disk.raw")).unwrap();

    // Its backup was written over it, with and without the end that had grown.
    let image = File::options().write(true).open(bench.path("disk.raw")).unwrap();
    image.write_all_at(&plain, 0).unwrap();
    image.write_all_at(&[0; 512], plain.len() as u64).unwrap();
    for len in [half.len(), plain.len()] {
        image.set_len(len as u64).unwrap();
        let error = find(&bench).unwrap().unwrap().run(&bench.keys, &mut |_, _| {});
        let error = error.unwrap_err();
        assert!(
            matches!(&error, SealError::InPlace { source, .. } if matches!(**source, SealError::InPlaceChanged(_))),
            "{error:?}"
        );
        let now = fs::read(bench.path("disk.raw")).unwrap();
        assert!(now.len() == len && now.starts_with(&plain), "the backup is as it was");
    }
    image.write_all_at(&half, 0).unwrap();
    drop(image);

    // Another image has no journal.
    fs::write(bench.path("other.raw"), &plain).unwrap();
    assert!(
        InPlace::find(&bench.path("other.raw"), &bench.path("sealing"))
            .unwrap()
            .is_none()
    );
    // Under another name it is the same.
    fs::rename(bench.path("disk.raw"), bench.path("moved.raw")).unwrap();
    assert!(
        InPlace::find(&bench.path("moved.raw"), &bench.path("sealing"))
            .unwrap()
            .is_some()
    );
    fs::rename(bench.path("moved.raw"), bench.path("disk.raw")).unwrap();
    let info = find(&bench).unwrap().unwrap().run(&bench.keys, &mut |_, _| {}).unwrap();
    assert_sealed(&bench, &info, &plain);
}

#[test]
fn an_image_in_use_is_left_alone() {
    let bench = Bench::new(&disk(MIB));
    // As a VM has it: qemu holds its locks while it is open for writing.
    let mut vm = Command::new("qemu-io")
        .args(["-f", "raw"])
        .arg(bench.path("disk.raw"))
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("qemu-io: `cargo xtask setup` installs it");
    // It answers once it has the image open.
    std::io::Write::write_all(vm.stdin.as_mut().unwrap(), b"length\n").unwrap();
    let mut answer = [0; 1];
    std::io::Read::read_exact(vm.stdout.as_mut().unwrap(), &mut answer).unwrap();
    let mut line = String::new();
    let mut out = std::io::BufReader::new(vm.stdout.take().unwrap());
    while !line.contains("MiB") {
        line.clear();
        std::io::BufRead::read_line(&mut out, &mut line).unwrap();
    }
    assert!(matches!(begin(&bench), Err(SealError::InUse(_))));
    drop(vm.stdin.take());
    vm.wait().unwrap();
    // And of two runs, one.
    let first = begin(&bench).unwrap();
    assert!(matches!(find(&bench), Err(SealError::InUse(_))));
    assert!(matches!(begin(&bench), Err(SealError::InUse(_))));
    let info = first.run(&bench.keys, &mut |_, _| {}).unwrap();
    assert_eq!(info.size, MIB as u64);
}

#[test]
fn what_cannot_be_sealed_in_place_is_refused_untouched() {
    let bench = Bench::new(&disk(MIB));
    let mut container = disk(MIB);
    container[..4].copy_from_slice(b"QFI\xfb");
    let mut luks = disk(MIB);
    luks[..8].copy_from_slice(b"LUKS\xba\xbe\0\x02");
    let image = bench.path("disk.raw");
    for (bytes, size) in [
        (container, None),
        (luks, None),
        (disk(MIB + 7), None),
        (disk(MIB), Some(512)),
        (Vec::new(), None),
    ] {
        fs::write(&image, &bytes).unwrap();
        let request = InPlaceRequest {
            image: &image,
            disk_size: size,
            terms: terms(),
        };
        let refused = InPlace::begin(&request, &bench.path("sealing"), &bench.keys).err();
        assert!(
            matches!(
                refused,
                Some(
                    SealError::InPlaceFormat { format: "qcow2", .. }
                        | SealError::InputLuks(_)
                        | SealError::InputSize { .. }
                        | SealError::InPlaceSize { size: 512, .. }
                        | SealError::InputEmpty(_)
                )
            ),
            "{refused:?}"
        );
        assert!(fs::read(&image).unwrap() == bytes);
        assert!(bench.keys.list().unwrap().keys.is_empty());
        assert_eq!(journals(&bench), 0);
    }
}

#[test]
fn the_sealed_image_is_not_sealed_again() {
    let bench = Bench::new(&disk(MIB));
    begin(&bench).unwrap().run(&bench.keys, &mut |_, _| {}).unwrap();
    assert!(matches!(begin(&bench), Err(SealError::InputLuks(_))));
    let (input, output) = (bench.path("disk.raw"), bench.path("copy.luks"));
    let request = crate::bench::request(&input, &output);
    assert!(matches!(
        seal::seal(&request, &bench.keys, &mut |_, _| {}),
        Err(SealError::InputLuks(_))
    ));
}
