//! The bill of materials: what the programs are linked from, as CycloneDX 1.5 JSON.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use serde_json::json;

use super::{Component, Part, version};
use crate::run::{Error, cargo, io, output};
use crate::workspace::root;

/// The document, with the crates that either program is built of, and the C libraries that the agent for XCP-ng 8.3 carries.
pub(super) fn make(carried: &[Component], epoch: u64) -> Result<String, Error> {
    let locked = checksums()?;
    let mut components = Vec::new();
    for (name, version) in linked()? {
        let mut component = json!({
            "type": "library",
            "bom-ref": format!("pkg:cargo/{name}@{version}"),
            "name": name,
            "version": version,
            "purl": format!("pkg:cargo/{name}@{version}"),
        });
        // Crates of this workspace have none.
        if let (Some(sha256), Some(component)) = (locked.get(&(name, version)), component.as_object_mut()) {
            component.insert("hashes".into(), json!([{ "alg": "SHA-256", "content": sha256 }]));
        }
        components.push(component);
    }
    components.extend(carried.iter().map(library));
    let document = json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "timestamp": timestamp(epoch)?,
            "component": { "type": "application", "bom-ref": "assay", "name": "assay", "version": version() },
        },
        "components": components,
    });
    let text = serde_json::to_string_pretty(&document);
    text.map(|text| text + "\n")
        .map_err(|error| Error::Missing(format!("the bill of materials cannot be written: {error}")))
}

/// A C library: compiled here from upstream's sources, or Debian's own archive.
fn library(of: &Component) -> serde_json::Value {
    let kind = if of.source.is_some() { "generic" } else { "deb/debian" };
    // The only character in Debian's versions that purl wants written otherwise, beside those of an epoch.
    let version = of.version.replace('~', "%7E").replace(':', "%3A").replace('+', "%2B");
    let purl = format!("pkg:{kind}/{}@{version}", of.name);
    let mut component = json!({
        "type": "library",
        "bom-ref": purl,
        "name": of.name,
        "version": of.version,
        "purl": purl,
        "description": "linked statically into the agent for XCP-ng 8.3",
    });
    if let (Some((sha256, licence)), Some(component)) = (of.source, component.as_object_mut()) {
        component.insert("hashes".into(), json!([{ "alg": "SHA-256", "content": sha256 }]));
        component.insert("licenses".into(), json!([{ "expression": licence }]));
    }
    component
}

/// Name and version of every crate that ends in one of the programs.
fn linked() -> Result<BTreeSet<(String, String)>, Error> {
    // The agent for XCP-ng 8.3 has one crate more.
    const XCPNG: &[&str] = &["--no-default-features", "--features", "sd-notify"];
    let mut crates = BTreeSet::new();
    let builds = Part::ALL.map(|part| (part, [].as_slice())).into_iter();
    for (part, features) in builds.chain([(Part::Agent, XCPNG)]) {
        let mut tree = cargo();
        tree.args([
            "tree",
            "--locked",
            "-p",
            part.name(),
            "-e",
            "normal",
            "--prefix",
            "none",
        ]);
        tree.args(features)
            .args(["--format", "{p}", "--target", "x86_64-unknown-linux-gnu"]);
        for line in output(&mut tree)?.lines() {
            let mut words = line.split_whitespace();
            if let (Some(name), Some(version)) = (words.next(), words.next()) {
                crates.insert((name.to_owned(), version.trim_start_matches('v').to_owned()));
            }
        }
    }
    Ok(crates)
}

/// What is read of Cargo.lock.
#[derive(Deserialize)]
struct Lock {
    package: Vec<Locked>,
}

/// A crate in it.
#[derive(Deserialize)]
struct Locked {
    name: String,
    version: String,
    checksum: Option<String>,
}

/// SHA-256 of each crate as the registry holds it.
fn checksums() -> Result<BTreeMap<(String, String), String>, Error> {
    let path = root().join("Cargo.lock");
    let text = std::fs::read_to_string(&path).map_err(io("read Cargo.lock"))?;
    let lock: Lock =
        toml::from_str(&text).map_err(|error| Error::Missing(format!("Cargo.lock cannot be read: {error}")))?;
    let packages = lock.package.into_iter();
    Ok(packages
        .filter_map(|package| Some(((package.name, package.version), package.checksum?)))
        .collect())
}

/// As RFC 3339 has it.
fn timestamp(epoch: u64) -> Result<String, Error> {
    let mut date = crate::run::command("date", ["-u", "+%Y-%m-%dT%H:%M:%SZ", "-d"]);
    Ok(output(date.arg(format!("@{epoch}")))?.trim().to_owned())
}
