//! The SMAPIv3 datapath `assay+crypt`: a volume plugin of XCP-ng that returns `assay+crypt:///PATH` has the sealed image or block device at
//! `/PATH` opened while a VM uses it (xapi-storage-script, `main.ml`: arguments as JSON on standard input, result or error as JSON on
//! standard output).

use std::path::PathBuf;

use assay_evidence::digest::Sha256Digest;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{CliError, Hook, chain, input, say};

const SCHEME: &str = "assay+crypt://";
/// What xapi shows beside the message.
const ERROR_CODE: &str = "ASSAY_REFUSED";

/// Why a call is refused.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// The arguments are not what the method has.
    #[error("the arguments of {method} are malformed")]
    Arguments {
        /// The method.
        method: String,
        /// What the parser says.
        #[source]
        source: serde_json::Error,
    },
    /// Not a URI of this datapath.
    #[error("{uri:?} is no volume of this datapath: write {SCHEME}/PATH, absolute, without %, ? and #")]
    Uri {
        /// The URI, cut to a printable length.
        uri: String,
    },
    /// A disk that forgets is asked for.
    #[error("this datapath has no disks that forget what was written: make the VDI persistent")]
    NotPersistent,
    /// No such method.
    #[error("the datapath assay+crypt has no method {method:?}")]
    Method {
        /// As called.
        method: String,
    },
}

/// What methods are given; later versions of the interface may add to it.
#[derive(Debug, Deserialize)]
struct Arguments {
    #[serde(default)]
    uri: String,
    /// As xapi-storage-script names the machine.
    #[serde(default)]
    domain: String,
    #[serde(default = "yes")]
    persistent: bool,
}

fn yes() -> bool {
    true
}

/// A volume: where it is, and what it is called when it is open.
#[derive(Debug, PartialEq, Eq)]
struct Volume {
    image: PathBuf,
    name: String,
}

/// Answers in JSON whatever happens; the error is the exit status's, too.
pub(super) fn run(hook: &Hook, method: &str) -> Result<(), CliError> {
    match call(hook, method) {
        Ok(result) => say(&result.to_string()),
        Err(error) => {
            let mut params = vec![chain(&error)];
            if let CliError::Refused { reasons, .. } = &error {
                params.extend(reasons.iter().cloned());
            }
            let backtrace = json!({"error": "", "files": [], "lines": []});
            say(&json!({"code": ERROR_CODE, "params": params, "backtrace": backtrace}).to_string())?;
            Err(error)
        }
    }
}

fn call(hook: &Hook, method: &str) -> Result<Value, CliError> {
    let text = input()?;
    let arguments: Arguments = serde_json::from_str(&text).map_err(|source| DatapathError::Arguments {
        method: method.to_owned(),
        source,
    })?;
    let volume = || Volume::of(&arguments.uri);
    match method {
        "Plugin.Query" => Ok(query()),
        "Plugin.diagnostics" => Ok(json!("see `assay-agent status`, and `journalctl -u assay-agent`")),
        "Datapath.open" if !arguments.persistent => Err(DatapathError::NotPersistent.into()),
        "Datapath.open" | "Datapath.close" | "Datapath.detach" => volume().map(|_| Value::Null),
        "Datapath.attach" => Ok(implementations(&volume()?)),
        "Datapath.activate" => {
            let volume = volume()?;
            hook.open(&volume.image, Some(&volume.name), Some(&arguments.domain))
                .map(|_| Value::Null)
        }
        "Datapath.deactivate" => hook.close(&volume()?.name).map(|()| Value::Null),
        _ => Err(DatapathError::Method {
            method: method.chars().take(80).collect(),
        }
        .into()),
    }
}

impl Volume {
    fn of(uri: &str) -> Result<Self, CliError> {
        let path = uri.strip_prefix(SCHEME).filter(|path| {
            // What a URI may spell in two ways has two names.
            path.starts_with('/') && !path.contains(['%', '?', '#', '\0'])
        });
        let path = path.ok_or_else(|| DatapathError::Uri {
            uri: uri.chars().take(100).collect(),
        })?;
        // By the path, since attach tells the name before anything is read.
        let digest: String = Sha256Digest::of(path.as_bytes()).to_string().chars().take(16).collect();
        Ok(Self {
            image: path.into(),
            name: format!("assay-{digest}"),
        })
    }
}

/// The device is there from activate to deactivate; attach tells its name.
fn implementations(volume: &Volume) -> Value {
    let device = format!("/dev/mapper/{}", volume.name);
    let disk = json!({"params": device, "extra": {}, "backend_type": "vbd"});
    json!({"implementations": [["XenDisk", disk], ["BlockDevice", {"path": device}]]})
}

fn query() -> Value {
    json!({
        "plugin": "assay+crypt",
        "name": "Assay",
        "description": "Sealed LUKS2 images, opened while this host is trusted",
        "vendor": "Assay",
        "copyright": "Apache-2.0 OR MIT",
        "version": env!("CARGO_PKG_VERSION"),
        "required_api_version": "5.0",
        "features": [],
        "configuration": {},
        "required_cluster_stack": [],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_has_one_name() {
        let volume = Volume::of("assay+crypt:///dev/vg/disk-1").unwrap();
        assert_eq!(volume.image, PathBuf::from("/dev/vg/disk-1"));
        // printf /dev/vg/disk-1 | sha256sum
        assert_eq!(volume.name, "assay-fb766a9974921970");
        assert_eq!(
            implementations(&volume)["implementations"][1][1]["path"],
            format!("/dev/mapper/{}", volume.name)
        );
        for bad in [
            "",
            "/dev/vg/disk-1",
            "assay+crypt://dev/vg",
            "assay+crypt:///dev/%76g",
            "assay+crypt:///dev/vg?x",
            "raw+block:///dev/vg",
        ] {
            let said = Volume::of(bad).unwrap_err().to_string();
            assert!(said.contains("no volume of this datapath"), "{said}");
        }
    }
}
