//! What is being opened: a disk, and a name, are opened by one request at a time.
//!
//! Two requests that both find a disk closed would both ask for its key, and the one that comes second would take the entry of the
//! first among the open disks with it when it fails.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What is claimed; clones share it.
#[derive(Debug, Clone, Default)]
pub struct Claims(Arc<Mutex<HashSet<Claimed>>>);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Claimed {
    /// By the LUKS UUID.
    Disk([u8; 16]),
    /// Under `/dev/mapper`.
    Name(String),
}

/// A disk and a name that nobody else opens; dropping it lets others.
#[derive(Debug)]
pub struct Claim {
    of: Claims,
    held: [Claimed; 2],
}

impl Claims {
    /// Claims both, or neither.
    pub fn take(&self, disk: &[u8; 16], name: &str) -> Option<Claim> {
        let held = [Claimed::Disk(*disk), Claimed::Name(name.to_owned())];
        let mut claimed = self.lock();
        if held.iter().any(|part| claimed.contains(part)) {
            return None;
        }
        claimed.extend(held.iter().cloned());
        Some(Claim { of: self.clone(), held })
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<Claimed>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut claimed = self.of.lock();
        for part in &self.held {
            claimed.remove(part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_and_a_name_are_claimed_once_at_a_time() {
        let claims = Claims::default();
        let first = claims.take(&[1; 16], "a").unwrap();
        assert!(claims.take(&[1; 16], "b").is_none(), "the disk");
        assert!(claims.take(&[2; 16], "a").is_none(), "the name");
        let second = claims.take(&[2; 16], "b").unwrap();
        drop(first);
        assert!(claims.take(&[1; 16], "a").is_some());
        drop(second);
        assert!(claims.lock().is_empty());
    }
}
