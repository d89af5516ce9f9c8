//! A kernel's IMA log of a machine with 826 measurements: its template digests, made anew from the fields, are the same.

use assay_evidence::digest::Algorithm;
use assay_evidence::imalog::{ImaLogError, parse};

use crate::read;

fn counted(data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).expect("short");
    [length.to_le_bytes().as_slice(), data].concat()
}

/// The binary form of a line of the ASCII form: `10 <template digest> ima-ng <algorithm>:<digest> <path>`.
fn binary(line: &str) -> Vec<u8> {
    let mut words = line.splitn(5, ' ');
    let mut word = || words.next().expect("five words");
    let pcr: u32 = word().parse().expect("a PCR");
    let digest = hex(word());
    let template = word();
    let (algorithm, file) = word().split_once(':').expect("a file's digest");
    let file = [algorithm.as_bytes(), b":\0", &hex(file)].concat();
    let path = [word().as_bytes(), b"\0"].concat();
    let data = [counted(&file), counted(&path)].concat();
    let head = [pcr.to_le_bytes().as_slice(), &digest, &counted(template.as_bytes())].concat();
    [head, counted(&data)].concat()
}

fn hex(text: &str) -> Vec<u8> {
    serde_json::from_value::<assay_evidence::wire::Hex>(text.into())
        .expect("hex")
        .0
}

#[test]
fn vectors_ima_template_digests_are_those_of_the_kernel() {
    let text = String::from_utf8(read("ima/rust-keylime-ascii_runtime_measurements")).expect("text");
    let bytes: Vec<u8> = text.lines().flat_map(binary).collect();
    let log = parse(&bytes, Algorithm::Sha1).expect("every digest is that of its fields");
    assert_eq!(log.entries().len(), text.lines().count());
    assert_eq!(log.entries()[0].path(), b"boot_aggregate");
    for (entry, line) in log.entries().iter().zip(text.lines()) {
        assert!(line.as_bytes().ends_with(entry.path()), "{line}");
    }
    // And a digest that is not is found, with its number.
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines[7] = lines[7].replace("/conf/", "/conf2/");
    let changed: Vec<u8> = lines.iter().flat_map(|line| binary(line)).collect();
    let refused = parse(&changed, Algorithm::Sha1).expect_err("it was changed");
    assert!(matches!(refused, ImaLogError::Digest { entry: 7, .. }), "{refused}");
}
