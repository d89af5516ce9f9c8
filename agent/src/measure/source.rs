//! Where measurements come from.
//!
//! The part that writes the log and extends the PCR reads through this trait, so that it can be driven by the kernel
//! programs of tier 1 ([`super::kernel::Kernel`]) and by a list of records in a test, and later by the other tiers.

use std::error::Error;
use std::os::fd::BorrowedFd;

use assay_ebpf::Record;

use super::kernel::KernelError;

/// Whatever makes the consumer of a record unable to take it.
pub type Refusal = Box<dyn Error + Send + Sync>;

/// Why records could not be read.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The kernel side could not be read.
    #[error("read the kernel's measurements")]
    Kernel(#[from] KernelError),
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

    /// A descriptor that becomes readable (epoll) when records are queued; `None` = there is nothing to wait for. The
    /// kernel wakes a reader that had caught up: wait only after a read returned 0.
    fn as_fd(&self) -> Option<BorrowedFd<'_>>;
}
