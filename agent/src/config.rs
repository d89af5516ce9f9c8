//! The agent's configuration file: the form an operator writes, and the form the program uses.
//!
//! Every key is optional and every unknown key is refused, with its file and line: a misspelt limit that is silently
//! ignored is worse than one that was never set. [`Config`] can only be made from checked values, so nothing after this
//! module asks again whether a PCR is allowed or a timeout is sane.

mod error;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use assay_evidence::event::Mode;
use serde::Deserialize;

pub use self::error::ConfigError;
use crate::tpm::{AkKind, EkKind};

/// Where the configuration is looked for when `--config` is not given.
pub const DEFAULT_PATH: &str = "/etc/assay/agent.toml";

/// A configuration file larger than this is not one.
const MAX_FILE: u64 = 64 * 1024;
/// TPM handles that TPM2_EvictControl accepts (TPM 2.0 part 2, TPM_HT_PERSISTENT).
const PERSISTENT_HANDLES: std::ops::RangeInclusive<u32> = 0x8100_0000..=0x81FF_FFFF;
/// Where programs find their libraries, the kernel its modules and firmware, and `ld.so` the programs that it is given.
const HOLD_FOLDERS: [&str; 9] = [
    "/usr/lib",
    "/usr/lib64",
    "/usr/libexec",
    "/usr/bin",
    "/usr/sbin",
    "/lib",
    "/lib64",
    "/bin",
    "/sbin",
];
/// What runs the scripts of a dom0: its storage and toolstack plugins are Python.
const INTERPRETERS: [&str; 5] = [
    "/usr/bin/python3",
    "/usr/bin/bash",
    "/usr/bin/dash",
    "/usr/bin/perl",
    "/bin/sh",
];
/// Through this device a process has the hypervisor do things.
const WATCH_DEVICES: [&str; 1] = ["/dev/xen/privcmd"];
/// The value of a key for which the agent decides by itself.
const AUTO: &str = "auto";
/// Entries of a list.
const MAX_LIST: usize = 64;
const SECONDS: std::ops::RangeInclusive<u64> = 1..=3600;
const LOG_MIB: std::ops::RangeInclusive<u64> = 1..=1024;

/// The checked configuration of one agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Address and port of the quote server.
    pub listen: SocketAddr,
    /// What survives a reboot: TLS key, certificate and join file.
    pub state_dir: PathBuf,
    /// What lives as long as a boot: runtime log, journal and the local socket.
    pub run_dir: PathBuf,
    /// The compiled kernel programs.
    pub bpf_object: PathBuf,
    /// The compiled probes of tier 3.
    pub probe_object: PathBuf,
    /// Where the kernel programs and their maps are pinned (a folder on bpffs).
    pub bpf_dir: PathBuf,
    /// How the TPM is reached and which register is ours.
    pub tpm: Tpm,
    /// What is measured, and how strictly.
    pub measure: Measure,
    /// Disk keys.
    pub unlock: Unlock,
    /// The least severe level that is logged.
    pub log_level: tracing::Level,
}

/// The `[tpm]` section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tpm {
    /// TCTI string for tpm2-tss, such as `device:/dev/tpmrm0`.
    pub tcti: String,
    /// The PCR that runtime measurements extend: 12, 13 or 14.
    pub pcr: u8,
    /// Persistent handle of the attestation key.
    pub ak_handle: u32,
    /// What the attestation key signs with.
    pub ak: AkKind,
    /// Which endorsement key the TPM is known by; none: the one that has a certificate.
    pub ek: Option<EkKind>,
    /// How long one TPM command may take before the TPM counts as dead.
    pub timeout: Duration,
}

/// The `[measure]` section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Measure {
    /// What happens to code that is not yet in the log.
    pub mode: Mode,
    /// Whether other processes are kept away from the agent.
    pub protect: bool,
    /// Folders whose libraries, modules and firmware wait already when they are opened.
    pub hold_folders: Vec<PathBuf>,
    /// Whether memory without a file may become executable.
    pub deny_anonymous: bool,
    /// Programs whose files on the command line are measured.
    pub interpreters: Vec<PathBuf>,
    /// Devices whose opening is recorded.
    pub watch_devices: Vec<PathBuf>,
    /// Size in bytes at which the runtime log is full.
    pub log_max: u64,
    /// The tier to measure in; none: the best that this kernel is capable of.
    pub tier: Option<u8>,
    /// The BTF file that tells tier 3 the kernel's structures.
    pub btf: PathBuf,
}

/// The `[unlock]` section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unlock {
    /// How long an unlock keeps trying to reach a verifier before it refuses.
    pub timeout: Duration,
    /// How long a toolstack's hook may take in all.
    pub hook_deadline: Duration,
}

impl Config {
    /// Reads the file given with `--config`, or [`DEFAULT_PATH`] if it exists, or else the defaults.
    ///
    /// # Errors
    /// Any [`ConfigError`]. A file named on the command line must exist.
    pub fn load(explicit: Option<&Path>) -> Result<Self, ConfigError> {
        match explicit {
            Some(path) => Self::from_file(path),
            None => match Self::from_file(Path::new(DEFAULT_PATH)) {
                Err(ConfigError::Read { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                    Self::parse("", Path::new(DEFAULT_PATH))
                }
                other => other,
            },
        }
    }

    /// Reads and checks one file.
    ///
    /// # Errors
    /// Any [`ConfigError`].
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read {
            path: path.to_owned(),
            source,
        };
        if std::fs::metadata(path).map_err(read)?.len() > MAX_FILE {
            return Err(ConfigError::TooLarge { path: path.to_owned() });
        }
        Self::parse(&std::fs::read_to_string(path).map_err(read)?, path)
    }

    /// Checks a configuration's text; `path` is used in messages only.
    ///
    /// # Errors
    /// Any [`ConfigError`] but those of reading.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let raw: Raw = toml::from_str(text).map_err(|error| syntax(text, path, &error))?;
        raw.check(path)
    }

    /// The local socket that hooks and operators' commands use.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.run_dir.join("agent.sock")
    }

    /// The runtime log: concatenated CEL-TLV records.
    #[must_use]
    pub fn log_file(&self) -> PathBuf {
        self.run_dir.join("log.cel")
    }
}

/// The file as written. Field names are the keys that operators see.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Raw {
    listen: SocketAddr,
    state_dir: PathBuf,
    run_dir: PathBuf,
    bpf_object: PathBuf,
    probe_object: PathBuf,
    bpf_dir: PathBuf,
    tpm: RawTpm,
    measure: RawMeasure,
    unlock: RawUnlock,
    log: RawLog,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawTpm {
    tcti: String,
    pcr: i64,
    ak_handle: i64,
    ak: String,
    ek: String,
    timeout_s: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawMeasure {
    mode: String,
    protect: Option<bool>,
    hold_folders: Vec<PathBuf>,
    deny_anonymous: bool,
    interpreters: Vec<PathBuf>,
    watch_devices: Vec<PathBuf>,
    log_max_mib: u64,
    tier: RawTier,
    btf: PathBuf,
}

/// `"auto"`, or a number.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "measure.tier is \"auto\", 1, 2 or 3")]
enum RawTier {
    Number(i64),
    Word(String),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawUnlock {
    timeout_s: u64,
    hook_deadline_s: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawLog {
    level: String,
}

impl Default for Raw {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([0, 0, 0, 0], 8443)),
            state_dir: "/var/lib/assay".into(),
            run_dir: "/run/assay".into(),
            bpf_object: "/usr/lib/assay/assay-ebpf.o".into(),
            probe_object: "/usr/lib/assay/assay-ebpf-probe.o".into(),
            bpf_dir: "/sys/fs/bpf/assay".into(),
            tpm: RawTpm::default(),
            measure: RawMeasure::default(),
            unlock: RawUnlock::default(),
            log: RawLog::default(),
        }
    }
}

impl Default for RawTpm {
    fn default() -> Self {
        Self {
            tcti: "device:/dev/tpmrm0".to_owned(),
            pcr: 13,
            ak_handle: 0x8101_0A55,
            ak: AkKind::EcdsaP256.name().to_owned(),
            ek: AUTO.to_owned(),
            timeout_s: 30,
        }
    }
}

impl Default for RawMeasure {
    fn default() -> Self {
        Self {
            mode: "observe".to_owned(),
            protect: None,
            hold_folders: HOLD_FOLDERS.iter().map(PathBuf::from).collect(),
            deny_anonymous: false,
            interpreters: INTERPRETERS.iter().map(PathBuf::from).collect(),
            watch_devices: WATCH_DEVICES.iter().map(PathBuf::from).collect(),
            log_max_mib: 64,
            tier: RawTier::Word(AUTO.to_owned()),
            btf: "/sys/kernel/btf/vmlinux".into(),
        }
    }
}

impl Default for RawUnlock {
    fn default() -> Self {
        Self {
            timeout_s: 60,
            hook_deadline_s: 35,
        }
    }
}

impl Default for RawLog {
    fn default() -> Self {
        Self {
            level: "info".to_owned(),
        }
    }
}

impl RawTier {
    /// The tier, or what was written instead of one.
    fn check(self) -> Result<Option<u8>, String> {
        match self {
            Self::Word(word) if word == AUTO => Ok(None),
            Self::Word(word) => Err(format!("{word:?}")),
            Self::Number(number) => match u8::try_from(number) {
                Ok(tier @ 1..=3) => Ok(Some(tier)),
                _ => Err(number.to_string()),
            },
        }
    }
}

/// What all keys are checked by; errors name the file.
struct Checks<'a> {
    path: &'a Path,
}

impl Checks<'_> {
    fn range(&self, key: &'static str, value: String, range: &'static str) -> ConfigError {
        ConfigError::Range {
            path: self.path.to_owned(),
            key,
            value,
            range,
        }
    }

    fn seconds(&self, key: &'static str, value: u64) -> Result<Duration, ConfigError> {
        if SECONDS.contains(&value) {
            Ok(Duration::from_secs(value))
        } else {
            Err(self.range(key, value.to_string(), "1 to 3600 seconds"))
        }
    }

    fn absolute(&self, key: &'static str, value: PathBuf) -> Result<PathBuf, ConfigError> {
        if value.is_absolute() {
            Ok(value)
        } else {
            Err(ConfigError::RelativePath {
                path: self.path.to_owned(),
                key,
                value,
            })
        }
    }

    fn list(&self, key: &'static str, paths: Vec<PathBuf>) -> Result<Vec<PathBuf>, ConfigError> {
        if paths.len() > MAX_LIST {
            return Err(self.range(key, format!("{} entries", paths.len()), "at most 64 entries"));
        }
        paths.into_iter().map(|path| self.absolute(key, path)).collect()
    }
}

impl Raw {
    fn check(self, path: &Path) -> Result<Config, ConfigError> {
        let checks = Checks { path };
        Ok(Config {
            listen: self.listen,
            state_dir: checks.absolute("state_dir", self.state_dir)?,
            run_dir: checks.absolute("run_dir", self.run_dir)?,
            bpf_object: checks.absolute("bpf_object", self.bpf_object)?,
            probe_object: checks.absolute("probe_object", self.probe_object)?,
            bpf_dir: checks.absolute("bpf_dir", self.bpf_dir)?,
            tpm: self.tpm.check(&checks)?,
            measure: self.measure.check(&checks)?,
            unlock: Unlock {
                timeout: checks.seconds("unlock.timeout_s", self.unlock.timeout_s)?,
                hook_deadline: checks.seconds("unlock.hook_deadline_s", self.unlock.hook_deadline_s)?,
            },
            log_level: self.log.level.parse().map_err(|_| ConfigError::Level {
                path: path.to_owned(),
                value: self.log.level.clone(),
            })?,
        })
    }
}

impl RawTpm {
    fn check(self, checks: &Checks<'_>) -> Result<Tpm, ConfigError> {
        let ak_handle = u32::try_from(self.ak_handle)
            .ok()
            .filter(|handle| PERSISTENT_HANDLES.contains(handle))
            .ok_or_else(|| {
                let value = format!("{:#x}", self.ak_handle);
                checks.range("tpm.ak_handle", value, "0x81000000 to 0x81ffffff")
            })?;
        let ak = AkKind::from_name(&self.ak).ok_or_else(|| {
            let value = format!("{:?}", self.ak);
            checks.range("tpm.ak", value, "\"ecdsa-p256\" (the default) or \"rsa-2048\"")
        })?;
        let ek = match self.ek.as_str() {
            AUTO => None,
            name => Some(EkKind::from_name(name).ok_or_else(|| {
                let accepted = "\"auto\" (the default), \"rsa-2048\" or \"ecc-p256\"";
                checks.range("tpm.ek", format!("{name:?}"), accepted)
            })?),
        };
        if self.tcti.is_empty() || self.tcti.contains('\0') {
            let value = format!("{:?}", self.tcti);
            return Err(checks.range("tpm.tcti", value, "a TCTI such as \"device:/dev/tpmrm0\""));
        }
        Ok(Tpm {
            pcr: check_pcr(self.pcr, checks.path)?,
            tcti: self.tcti,
            ak_handle,
            ak,
            ek,
            timeout: checks.seconds("tpm.timeout_s", self.timeout_s)?,
        })
    }
}

impl RawMeasure {
    fn check(self, checks: &Checks<'_>) -> Result<Measure, ConfigError> {
        if !LOG_MIB.contains(&self.log_max_mib) {
            return Err(checks.range("measure.log_max_mib", self.log_max_mib.to_string(), "1 to 1024 MiB"));
        }
        let mode = check_mode(self.mode, checks.path)?;
        let tier = self.tier.check();
        Ok(Measure {
            mode,
            protect: self.protect.unwrap_or(mode != Mode::Observe),
            hold_folders: checks.list("measure.hold_folders", self.hold_folders)?,
            deny_anonymous: self.deny_anonymous,
            interpreters: checks.list("measure.interpreters", self.interpreters)?,
            watch_devices: checks.list("measure.watch_devices", self.watch_devices)?,
            log_max: self.log_max_mib.saturating_mul(1024 * 1024),
            tier: tier.map_err(|value| checks.range("measure.tier", value, "\"auto\", 1, 2 or 3"))?,
            btf: checks.absolute("measure.btf", self.btf)?,
        })
    }
}

/// Sorts the registers by owner (TCG PC Client Platform Firmware Profile §2.3.4; the Linux TPM PCR registry of the UAPI group).
fn check_pcr(pcr: i64, path: &Path) -> Result<u8, ConfigError> {
    let reason = match pcr {
        12 => return Ok(12),
        13 => return Ok(13),
        14 => return Ok(14),
        0..=7 => "the firmware and the boot loader measure the boot into it",
        8 | 9 => "the boot loader measures kernel, initrd and command line into it",
        10 => "the kernel's IMA extends it",
        11 => "systemd measures unified kernel images and boot phases into it",
        15 => "systemd measures the machine id and volume keys into it",
        16 | 23 => "anybody may reset it without a reboot, so it proves nothing",
        17..=22 => "it belongs to the dynamic launch (DRTM) and may be reset by it",
        _ => "a PC's TPM has no such register",
    };
    Err(ConfigError::Pcr {
        path: path.to_owned(),
        pcr,
        reason,
    })
}

fn check_mode(mode: String, path: &Path) -> Result<Mode, ConfigError> {
    [Mode::Observe, Mode::Hold, Mode::Enforce]
        .into_iter()
        .find(|known| known.name() == mode)
        .ok_or_else(|| ConfigError::ModeUnknown {
            path: path.to_owned(),
            mode,
        })
}

/// One line that names file, line and key; the parser's own display is a drawing over five lines.
fn syntax(text: &str, path: &Path, error: &toml::de::Error) -> ConfigError {
    let before = error.span().map_or(0, |span| span.start);
    let line = text
        .bytes()
        .take(before)
        .filter(|byte| *byte == b'\n')
        .count()
        .saturating_add(1);
    ConfigError::Syntax {
        path: path.to_owned(),
        line,
        message: error.message().replace('\n', " "),
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
