//! Which accelerator QEMU can use here.

use std::fs::OpenOptions;
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The processor that is emulated: all that QEMU knows but the registers that a kernel saves by XSAVE (AVX and what builds on
/// it). On machines with them programs have died of damaged memory: rarely, different ones, never under a memory checker.
/// What damages it has not been found.
pub const EMULATED: &str = "max,-xsave,-avx,-avx2,-f16c,-fma,-vaes,-vpclmulqdq,-pku,-mpx";

/// How QEMU runs the guest's instructions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accelerator {
    /// Hardware virtualisation?
    pub kvm: bool,
    /// Why this one, in a few words.
    pub why: String,
}

impl Accelerator {
    /// The best accelerator of this machine, probed once a process.
    ///
    /// A `/dev/kvm` alone proves nothing: on hosts that offer it without hardware virtualisation (no vmx or svm
    /// among the processor's flags) Debian's kernels do not come up, so such a device is left alone.
    pub fn detect() -> &'static Self {
        static FOUND: OnceLock<Accelerator> = OnceLock::new();
        FOUND.get_or_init(|| match unusable() {
            None => Self {
                kvm: true,
                why: "hardware virtualisation works".to_owned(),
            },
            Some(why) => Self { kvm: false, why },
        })
    }

    /// QEMU's arguments for it.
    pub fn arguments(&self) -> [&'static str; 4] {
        if self.kvm {
            ["-accel", "kvm", "-cpu", "host"]
        } else {
            ["-accel", "tcg,thread=multi", "-cpu", EMULATED]
        }
    }
}

impl std::fmt::Display for Accelerator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} ({})",
            if self.kvm { "KVM" } else { "TCG, software emulation" },
            self.why
        )
    }
}

fn unusable() -> Option<String> {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let capable = cpu
        .lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| line.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"));
    if !capable {
        return Some("the processor shows neither vmx nor svm".to_owned());
    }
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return Some(format!("cannot open /dev/kvm: {error}"));
    }
    if probe() {
        None
    } else {
        Some("QEMU does not start with -accel kvm".to_owned())
    }
}

/// Starts an empty machine under KVM and asks it to quit.
fn probe() -> bool {
    let child = Command::new("qemu-system-x86_64")
        .args([
            "-accel",
            "kvm",
            "-cpu",
            "host",
            "-M",
            "q35",
            "-m",
            "64",
            "-nodefaults",
            "-display",
            "none",
        ])
        .args(["-monitor", "stdio", "-S"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = child else { return false };
    if let Some(mut stdin) = child.stdin.take() {
        // When QEMU is gone already, its exit status says so below.
        let _ = stdin.write_all(b"quit\n");
    }
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(10) {
        match child.try_wait() {
            Ok(Some(status)) => return status.success(),
            Ok(None) => std::thread::sleep(Duration::from_millis(10)),
            Err(_) => break,
        }
    }
    let _ = child.kill();
    let _ = child.wait();
    false
}
