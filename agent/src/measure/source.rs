//! Where measurements come from.
//!
//! The part that writes the log and extends the PCR reads through this trait, so that it can be driven by the kernel
//! programs of tier 1 ([`super::kernel::Kernel`]), by the probes of tier 3 ([`super::probe::Probe`]) and by a list of records in
//! a test.

use std::error::Error;
use std::os::fd::BorrowedFd;

use assay_ebpf::Record;
use assay_evidence::event::Measurement;

use super::kernel::{GateError, KernelError};
use super::probe::ProbeError;

/// Whatever makes the consumer of a record unable to take it.
pub type Refusal = Box<dyn Error + Send + Sync>;

/// Why records could not be read.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The kernel side could not be read.
    #[error("read the kernel's measurements")]
    Kernel(#[from] KernelError),
    /// The gate in the kernel cannot be worked.
    #[error("the gate in the kernel does not work")]
    Gate(#[from] GateError),
    /// The probes of tier 3 could not be read.
    #[error("read the probes' measurements")]
    Probe(#[from] ProbeError),
    /// The consumer did not take a record. The record stays in the queue and is delivered again by the next read.
    #[error("a measurement could not be taken over")]
    Refused(#[source] Refusal),
}

/// A stream of measurements, in the order in which the kernel queued them.
pub trait EventSource: Send {
    /// Hands up to `max` queued records to `take`, oldest first, and returns how many were taken; 0 = none is queued.
    ///
    /// `take` is called while the record still occupies its place in the queue, and the place is freed only after it
    /// returned `Ok`: a consumer that puts the record into its journal first cannot lose it. On an error the record
    /// stays queued, and those taken before it are gone.
    fn read(&mut self, max: usize, take: &mut dyn FnMut(&Record) -> Result<(), Refusal>) -> Result<usize, SourceError>;

    /// Measurements that the kernel made, or should have made, and could not queue, since the host booted. It only
    /// grows while the kernel side stays loaded.
    fn lost(&mut self) -> Result<u64, SourceError>;

    /// How many records each CPU has numbered ([`assay_ebpf::seq`]), by CPU. Empty where no queue lies between the numbers
    /// and the reader.
    ///
    /// # Errors
    /// When the kernel side does not answer.
    fn numbered(&mut self) -> Result<Vec<u64>, SourceError> {
        Ok(Vec::new())
    }

    /// Loads that were refused because their record could not be queued, as [`Self::lost`]. None of them ran.
    ///
    /// # Errors
    /// When the kernel side does not answer.
    fn refused_for_room(&mut self) -> Result<u64, SourceError> {
        Ok(0)
    }

    /// A descriptor that becomes readable (epoll) when records are queued; `None` = there is nothing to wait for. The
    /// kernel wakes a reader that had caught up: wait only after a read returned 0.
    fn as_fd(&self) -> Option<BorrowedFd<'_>>;

    /// These are in log and PCR. A source that holds loads back lets go of those that waited for them.
    ///
    /// # Errors
    /// When whoever waits cannot be told: measuring must end, since they would wait for ever.
    fn landed(&mut self, _loads: &mut dyn Iterator<Item = &Measurement>) -> Result<(), SourceError> {
        Ok(())
    }

    /// READY is in log and PCR: from now on the configured mode is in force.
    ///
    /// # Errors
    /// When it cannot be put in force.
    fn ready(&mut self) -> Result<(), SourceError> {
        Ok(())
    }

    /// The log takes no more: whoever waits to be let go would wait for ever. What the gate has not seen yet it refuses.
    ///
    /// # Errors
    /// When whoever waits cannot be told.
    fn full(&mut self) -> Result<(), SourceError> {
        Ok(())
    }

    /// Called every few seconds, and once before the agent stops: what a successor needs is measured while somebody can.
    ///
    /// # Errors
    /// When the kernel side does not answer.
    fn tick(&mut self) -> Result<(), SourceError> {
        Ok(())
    }

    /// From now on these digests are approved, and no others.
    ///
    /// # Errors
    /// When they cannot be told to the kernel side.
    fn approve(&mut self, _digests: &mut dyn Iterator<Item = [u8; 32]>) -> Result<(), SourceError> {
        Ok(())
    }
}
