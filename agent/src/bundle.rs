//! Puts a quote and the logs that explain it together: for verifiers that ask, and for disk keys.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use assay_evidence::bundle::{Bundle, LogPart, MAX_BOOT_LOG, MAX_IMA_LOG, MAX_LOG, Pcrs, QuotePart, VERSION};
use assay_evidence::digest::Algorithm;
use assay_evidence::quote::QUOTED_PCRS;
use assay_evidence::wire::{B64, Hex};

use crate::log_view::{LogView, LogViewError};
use crate::tpm::QuoteOut;

/// Why a bundle could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The log could not be read.
    #[error(transparent)]
    Log(#[from] LogViewError),
    /// More log than a bundle takes.
    #[error(
        "records {from} to {to} of the runtime log have {bytes} bytes, a bundle takes {MAX_LOG}: fetch the log with GET /v1/log first"
    )]
    LogTooLong {
        /// First record asked for.
        from: u64,
        /// End of the log.
        to: u64,
        /// Length of this part in bytes.
        bytes: u64,
    },
}

/// Where the logs come from.
#[derive(Debug, Clone)]
pub struct Source {
    log: LogView,
    boot_log: Option<PathBuf>,
    ima_log: Option<PathBuf>,
}

/// The kernel's own list of what IMA measured into PCR 10; read after a quote, so it may have entries that came later.
const IMA_LOG: &str = "/sys/kernel/security/ima/binary_runtime_measurements";

impl Source {
    /// The runtime log, and the firmware's log of the TPM that `tcti` reaches.
    #[must_use]
    pub fn new(log: LogView, tcti: &str) -> Self {
        Self {
            log,
            boot_log: boot_log_path(tcti),
            ima_log: None,
        }
    }

    /// Relays the kernel's IMA log with every bundle that has the firmware's: in tier 3, where it tells in time what our
    /// own log tells afterwards. Without IMA in the kernel there is none, which is no error.
    #[must_use]
    pub fn with_ima_log(self) -> Self {
        Self {
            ima_log: Some(IMA_LOG.into()),
            ..self
        }
    }

    /// The runtime log.
    #[must_use]
    pub fn log(&self) -> &LogView {
        &self.log
    }

    /// Where a bundle's log starts when the asker wants `from`: a log that is shorter than what the asker holds is another
    /// one (the host was rebooted), so it is sent whole; the boot id tells the asker why.
    #[must_use]
    pub fn start(quote: &QuoteOut, from: u64) -> u64 {
        if from > quote.log.records { 0 } else { from }
    }

    /// Makes the bundle. Reads files, so large ones are better not made on an async task.
    ///
    /// # Errors
    /// [`SourceError`]. A firmware log that is missing is no error: many hosts have none.
    pub fn bundle(&self, quote: QuoteOut, from: u64, boot_log: bool) -> Result<Bundle, SourceError> {
        let (from, to) = (Self::start(&quote, from), quote.log.records);
        let bytes = self.log.length(from, to)?;
        if bytes > MAX_LOG as u64 {
            return Err(SourceError::LogTooLong { from, to, bytes });
        }
        let data = self.log.read(from, to)?;
        let values = QUOTED_PCRS
            .into_iter()
            .zip(quote.pcrs)
            .map(|(index, value)| (index, Hex(value.to_vec())))
            .collect();
        Ok(Bundle {
            version: VERSION,
            boot_id: self.log.boot_id().to_owned(),
            quote: QuotePart {
                attest: B64(quote.attest),
                signature: B64(quote.signature),
            },
            pcrs: Pcrs::from([(Algorithm::Sha256, values)]),
            log: LogPart {
                from,
                records: to,
                data: B64(data),
            },
            boot_log: read_kernel_log(self.boot_log.as_deref().filter(|_| boot_log), MAX_BOOT_LOG),
            ima_log: read_kernel_log(self.ima_log.as_deref().filter(|_| boot_log), MAX_IMA_LOG),
        })
    }
}

/// The kernel keeps one firmware log for each TPM. A TPM that is not a device of this machine (swtpm on a port, in trials)
/// did not see this machine's firmware, so no log is sent with its quotes.
fn boot_log_path(tcti: &str) -> Option<PathBuf> {
    let device = tcti.strip_prefix("device:")?;
    let name = Path::new(device).file_name()?.to_str()?;
    let number = name.strip_prefix("tpmrm").or_else(|| name.strip_prefix("tpm"))?;
    let number: u16 = number.parse().ok()?;
    Some(format!("/sys/kernel/security/tpm{number}/binary_bios_measurements").into())
}

/// One of the kernel's logs, whole; a part of it would prove nothing.
fn read_kernel_log(path: Option<&Path>, limit: usize) -> Option<B64> {
    let path = path?;
    let mut data = Vec::new();
    match File::open(path).and_then(|file| file.take(limit as u64 + 1).read_to_end(&mut data)) {
        Ok(_) if data.len() > limit => {
            tracing::warn!(path = %path.display(), "the kernel's log is larger than {limit} bytes and is not sent");
            None
        }
        Ok(_) => Some(B64(data)),
        Err(error) => {
            tracing::debug!(path = %path.display(), "the kernel has no such log: {error}");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_sent_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        assert_eq!(read_kernel_log(Some(&path), 8), None);
        for (length, sent) in [(0, true), (8, true), (9, false)] {
            std::fs::write(&path, vec![7; length]).unwrap();
            assert_eq!(
                read_kernel_log(Some(&path), 8),
                sent.then(|| B64(vec![7; length])),
                "{length} bytes"
            );
        }
        assert_eq!(read_kernel_log(None, 8), None);
    }

    #[test]
    fn each_device_has_its_own_firmware_log() {
        let path = |tcti| boot_log_path(tcti).map(|path| path.display().to_string());
        let expected = |n: u8| Some(format!("/sys/kernel/security/tpm{n}/binary_bios_measurements"));
        assert_eq!(path("device:/dev/tpmrm0"), expected(0));
        assert_eq!(path("device:/dev/tpm1"), expected(1));
        assert_eq!(path("swtpm:host=127.0.0.1,port=2321"), None);
        assert_eq!(path("device:/dev/../tpmrm../x"), None);
    }
}
