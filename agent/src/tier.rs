//! Which tier this host is measured in, and what that starts.
//!
//! | tier | needs | where |
//! |---|---|---|
//! | 1 | BPF LSM, IMA | [`crate::measure::kernel`] |
//! | 2 | BPF LSM | the same programs; the agent hashes, see [`crate::measure::hold`] |
//! | 3 | probes on kernel functions | [`crate::measure::probe`] |
//!
//! A policy names the tiers that it allows, so a host that falls to another one is not trusted silently.

use assay_evidence::digest::Sha256Digest;
use assay_evidence::event::Mode;

use crate::config::Config;
use crate::daemon::{DaemonError, gate};
use crate::kernel_age;
use crate::measure::kernel::{Kernel, KernelError, Origin, Preflight};
use crate::measure::probe::{self, Probe};
use crate::measure::source::EventSource;

/// What tier 2 cannot see.
const WITHOUT_HASH: &str = "a change of a file between the agent's hash of it and its use that moves neither change \
    cookie, size nor time; in mode observe, a file outside of the held folders that is gone or changed by the time it is \
    hashed; programs in memory (memfd) that end before they are hashed";

/// The tier that was chosen; nothing runs yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// Tier 1: LSM programs that hash with the kernel's own function.
    Hooks,
    /// Tier 2: LSM programs, and an agent that hashes what fanotify hands to it.
    HooksWithoutHash,
    /// Tier 3: probes that tell, and an agent that hashes afterwards.
    Probes,
}

/// What measures, and what the log's first record says of it.
pub struct Started {
    /// The measurements.
    pub source: Box<dyn EventSource>,
    /// Number of the tier.
    pub tier: u8,
    /// What it cannot see.
    pub blind: &'static str,
    /// SHA-256 of the object with the kernel programs.
    pub object: Sha256Digest,
    /// They were attached just now.
    pub fresh: bool,
}

impl Plan {
    /// Looks at the host and at what the configuration wants.
    ///
    /// # Errors
    /// What the tier of the configuration lacks; with "auto", what keeps every tier from working. On a kernel that is too old for all
    /// of them: [`DaemonError::OldKernel`].
    pub fn choose(config: &Config) -> Result<Self, DaemonError> {
        Self::look(config).map_err(|error| match kernel_age::release() {
            Ok(release) if kernel_age::is_too_old(&release) => DaemonError::OldKernel {
                release,
                source: Box::new(error),
            },
            _ => error,
        })
    }

    fn look(config: &Config) -> Result<Self, DaemonError> {
        match config.measure.tier {
            Some(3) => return Self::probes(config),
            Some(2) => {
                return Ok(Self::hooks(&Preflight::check(&config.bpf_dir)?, 2));
            }
            Some(_) => {}
            None => match Preflight::check(&config.bpf_dir) {
                Err(KernelError::BpfLsmMissing { lsm }) => {
                    tracing::warn!(
                        lsm,
                        "this kernel runs without the BPF LSM (no `bpf` in lsm=): measuring in tier 3, which only detects, and after the fact"
                    );
                    return Self::probes(config);
                }
                found => {
                    let found = found?;
                    let tier = if found.ima { 1 } else { 2 };
                    return Ok(Self::hooks(&found, tier));
                }
            },
        }
        Ok(Self::hooks(&Preflight::check(&config.bpf_dir)?.tier_1()?, 1))
    }

    fn hooks(found: &Preflight, tier: u8) -> Self {
        tracing::info!(
            lsm = found.lsm,
            lockdown = found.lockdown,
            "this kernel can measure (tier {tier})"
        );
        if tier == 1 { Self::Hooks } else { Self::HooksWithoutHash }
    }

    fn probes(config: &Config) -> Result<Self, DaemonError> {
        if config.measure.mode != Mode::Observe || config.measure.protect {
            return Err(DaemonError::OnlyDetects {
                mode: config.measure.mode,
                protect: config.measure.protect,
            });
        }
        probe::preflight(&config.measure.btf)?;
        tracing::info!(btf = %config.measure.btf.display(), "this kernel can measure (tier 3)");
        Ok(Self::Probes)
    }

    /// Starts measuring.
    ///
    /// # Errors
    /// [`DaemonError::Kernel`], [`DaemonError::Probe`].
    pub fn start(self, config: &Config) -> Result<Started, DaemonError> {
        match self {
            Self::Hooks | Self::HooksWithoutHash => {
                let user_hash = self == Self::HooksWithoutHash;
                let kernel = Kernel::start(&config.bpf_object, &config.bpf_dir, gate(config, user_hash))?;
                tracing::info!(origin = ?kernel.origin(), "kernel programs are measuring");
                Ok(Started {
                    tier: if user_hash { 2 } else { 1 },
                    blind: if user_hash { WITHOUT_HASH } else { "" },
                    object: Sha256Digest::from(*kernel.object_digest()),
                    fresh: kernel.origin() == Origin::Loaded,
                    source: Box::new(kernel),
                })
            }
            Self::Probes => {
                let probe = Probe::start(&config.probe_object, &config.measure.btf, &config.measure.watch_devices)?;
                tracing::info!("probes are measuring");
                Ok(Started {
                    tier: 3,
                    blind: probe::BLIND,
                    object: Sha256Digest::from(*probe.object_digest()),
                    // They never outlive an agent.
                    fresh: true,
                    source: Box::new(probe),
                })
            }
        }
    }
}
