//! Inputs and outputs in qemu's formats, held against qemu-img.

use std::{collections::HashSet, fs};

use assay_evidence::token::LuksToken;
use assay_verifier::{
    keystore::KeyInfo,
    seal::{self, Format, InputFormat, Request, SealError, Sealed, sidecar_path},
};

use crate::bench::{Bench, MIB, decrypted_by_cryptsetup, disk, opens, qemu_img, request};

fn seal_as(bench: &Bench, input: &str, from: Option<InputFormat>, format: Format) -> Result<KeyInfo, SealError> {
    let (input, output) = (bench.path(input), bench.path("disk.luks"));
    let request = Request {
        input_format: from,
        format,
        ..request(&input, &output)
    };
    seal::seal(&request, &bench.keys, &mut |_, _| {})
}

/// `disk.raw` in another format, by qemu-img.
fn convert(bench: &Bench, format: &str, name: &str) {
    let (raw, out) = (bench.path("disk.raw"), bench.path(name));
    let (raw, out) = (raw.to_str().unwrap(), out.to_str().unwrap());
    let options: &[&str] = if format == "vpc" { &["-o", "force_size=on"] } else { &[] };
    qemu_img(&[&["convert", "-f", "raw", "-O", format], options, &[raw, out]].concat());
}

fn sparse_disk() -> Vec<u8> {
    let mut plain = disk(3 * MIB);
    plain[MIB..2 * MIB].fill(0);
    plain
}

#[test]
fn the_disk_inside_a_container_is_what_is_sealed() {
    let plain = sparse_disk();
    for (driver, format) in [
        ("qcow2", InputFormat::Qcow2),
        ("vpc", InputFormat::Vhd),
        ("vhdx", InputFormat::Vhdx),
    ] {
        let bench = Bench::new(&plain);
        // No name is taken for an option, a protocol or a pattern.
        let name = "json: a,b=c%d.img";
        convert(&bench, driver, name);
        let container = fs::read(bench.path(name)).unwrap();
        let info = seal_as(&bench, name, Some(format), Format::Luks2).unwrap();
        let key_file = bench.key_file(info.key_id);
        let decrypted = decrypted_by_cryptsetup(&bench.path("disk.luks"), &key_file);
        // VHDX counts in MiB, the others in sectors; this disk is whole in both.
        assert_eq!(info.size, plain.len() as u64, "{driver}");
        assert!(decrypted.starts_with(&plain), "{driver}");
        assert_eq!(
            fs::read(bench.path(name)).unwrap(),
            container,
            "{driver}: the input was changed"
        );
    }
}

#[test]
fn a_guest_does_not_choose_the_format_of_its_disk() {
    // A raw disk into which its guest wrote a qcow2 header, with one of the verifier's files as backing file.
    let bench = Bench::new(&disk(MIB));
    fs::write(bench.path("secret"), vec![0x5e; MIB]).unwrap();
    let (trap, secret) = (bench.path("trap.raw"), bench.path("secret"));
    let (trap, secret) = (trap.to_str().unwrap(), secret.to_str().unwrap());
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", trap, "1M"]);
    let refused = seal_as(&bench, "trap.raw", None, Format::Luks2).unwrap_err();
    assert!(matches!(refused, SealError::InputFormat { format: "qcow2", .. }));
    assert!(refused.to_string().contains("--input-format raw"), "{refused}");
    // Said to be qcow2, it still reads no other file.
    let refused = seal_as(&bench, "trap.raw", Some(InputFormat::Qcow2), Format::Luks2).unwrap_err();
    assert!(
        matches!(&refused, SealError::InputParts { other, .. } if other == secret),
        "{refused}"
    );
    bench.assert_nothing_left();
    // Said to be raw, its bytes are sealed as they are.
    let bytes = fs::read(trap).unwrap();
    let padded = [
        bytes.as_slice(),
        &vec![0; bytes.len().next_multiple_of(512) - bytes.len()],
    ]
    .concat();
    fs::write(trap, &padded).unwrap();
    let info = seal_as(&bench, "trap.raw", Some(InputFormat::Raw), Format::Luks2).unwrap();
    let decrypted = decrypted_by_cryptsetup(&bench.path("disk.luks"), &bench.key_file(info.key_id));
    assert!(decrypted.starts_with(&padded));
}

#[test]
fn a_vhd_of_fixed_size_is_told_by_its_end() {
    let bench = Bench::new(&disk(MIB));
    let (raw, vhd) = (bench.path("disk.raw"), bench.path("fixed.vhd"));
    qemu_img(&[
        "convert",
        "-f",
        "raw",
        "-O",
        "vpc",
        "-o",
        "subformat=fixed,force_size=on",
        raw.to_str().unwrap(),
        vhd.to_str().unwrap(),
    ]);
    assert!(matches!(
        seal_as(&bench, "fixed.vhd", None, Format::Luks2),
        Err(SealError::InputFormat { format: "VHD", .. })
    ));
    let info = seal_as(&bench, "fixed.vhd", Some(InputFormat::Vhd), Format::Luks2).unwrap();
    assert_eq!(info.size, MIB as u64, "the footer is no part of the disk");
}

#[test]
fn what_is_not_in_the_format_named_is_refused_in_qemus_words() {
    let bench = Bench::new(&disk(MIB));
    let refused = seal_as(&bench, "disk.raw", Some(InputFormat::Qcow2), Format::Luks2).unwrap_err();
    assert!(matches!(refused, SealError::Qemu { .. }));
    assert!(refused.to_string().contains("qcow2"), "{refused}");
    assert_eq!(refused.to_string().lines().count(), 1);
    bench.assert_nothing_left();
}

/// What qemu reads of an encrypted image with the key that the store has.
fn read_by_qemu(bench: &Bench, info: &KeyInfo, driver: &str, secret: &str) -> Vec<u8> {
    let key = format!("secret,id=key,file={}", bench.key_file(info.key_id).display());
    let image = format!(
        "driver={driver},{secret}=key,file.filename={}",
        bench.path("disk.luks").display()
    );
    let out = bench.path("by-qemu");
    let out = out.to_str().unwrap();
    qemu_img(&["convert", "--object", &key, "--image-opts", &image, "-O", "raw", out]);
    fs::read(out).unwrap()
}

#[test]
fn qemu_opens_luks1_and_qcow2_with_the_key_of_the_store() {
    let plain = sparse_disk();
    for (format, driver, secret) in [
        (Format::Luks1, "luks", "key-secret"),
        (Format::Qcow2Luks, "qcow2", "encrypt.key-secret"),
    ] {
        let bench = Bench::new(&plain);
        let info = seal_as(&bench, "disk.raw", None, format).unwrap();
        assert!(read_by_qemu(&bench, &info, driver, secret) == plain, "{format:?}");
        let image = bench.path("disk.luks");
        let sealed = Sealed::read(&image).unwrap();
        assert_eq!((sealed.uuid, Some(sealed.fingerprint)), (info.disk_uuid, info.header));
        assert_eq!(sealed.cipher, "aes-xts-plain64");
        assert_eq!(sealed.key_id().unwrap(), info.key_id);
        // The sidecar is the very token of a LUKS2 header.
        let token = LuksToken::parse(&fs::read(sidecar_path(&image)).unwrap()).unwrap();
        assert_eq!(token.key_id(), info.key_id.to_string());
        // No sector of the disk stands in the image, but for those of zeros that qcow2 leaves out.
        let sectors: HashSet<&[u8]> = plain.chunks(512).filter(|sector| *sector != [0; 512]).collect();
        let bytes = fs::read(&image).unwrap();
        assert!(!bytes.chunks(512).any(|sector| sectors.contains(sector)), "{format:?}");
    }
}

#[test]
fn qcow2_from_a_container_is_the_disk_inside_it() {
    let plain = sparse_disk();
    let bench = Bench::new(&plain);
    convert(&bench, "qcow2", "in.qcow2");
    let info = seal_as(&bench, "in.qcow2", Some(InputFormat::Qcow2), Format::Qcow2Luks).unwrap();
    assert!(read_by_qemu(&bench, &info, "qcow2", "encrypt.key-secret") == plain);
    assert!(matches!(
        seal_as(&bench, "disk.luks", Some(InputFormat::Qcow2), Format::Luks2),
        Err(SealError::InputLuks(_) | SealError::OutputExists(_))
    ));
}

#[test]
fn cryptsetup_opens_luks1_as_well() {
    let bench = Bench::new(&disk(MIB));
    let info = seal_as(&bench, "disk.raw", None, Format::Luks1).unwrap();
    assert!(opens(&bench.path("disk.luks"), &bench.key_file(info.key_id)));
}

#[test]
fn a_sidecar_is_no_image_and_nothing_strange_is_overwritten() {
    let bench = Bench::new(&disk(MIB));
    let beside = sidecar_path(&bench.path("disk.luks"));
    fs::write(&beside, "{\"somebody\": \"else's\"}").unwrap();
    assert!(matches!(
        seal_as(&bench, "disk.raw", None, Format::Luks1),
        Err(SealError::OutputExists(path)) if path == beside
    ));
    fs::remove_file(&beside).unwrap();
    bench.assert_nothing_left();
    // What an interrupted run left is replaced: there is no image for it.
    let first = seal_as(&bench, "disk.raw", None, Format::Luks1).unwrap();
    fs::remove_file(bench.path("disk.luks")).unwrap();
    let second = seal_as(&bench, "disk.raw", None, Format::Luks1).unwrap();
    assert_ne!(first.key_id, second.key_id);
    assert_eq!(
        Sealed::read(&bench.path("disk.luks")).unwrap().key_id().unwrap(),
        second.key_id
    );
    assert!(matches!(Sealed::read(&beside), Err(SealError::NotSealed(_))));
}
