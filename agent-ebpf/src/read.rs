//! Records from bytes and back, without a cast: lengths, kinds and flags are checked before anyone sees a field.

use crate::{HASH_ALGO_SHA256, PATH_MAX, RECORD_SIZE, Record, flags, kind};

impl Record {
    /// Reads a record as it lies in the ring buffer. `None` = not a record that our kernel side writes: wrong size,
    /// unknown kind or flag, a path longer than its field, a digest where none can be, or none where one must be.
    #[must_use]
    pub fn read(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != RECORD_SIZE {
            return None;
        }
        let mut fields = Fields(bytes);
        let record = Self {
            seq: u64::from_ne_bytes(fields.take()?),
            time_ns: u64::from_ne_bytes(fields.take()?),
            size: u64::from_ne_bytes(fields.take()?),
            ino: u64::from_ne_bytes(fields.take()?),
            change: u64::from_ne_bytes(fields.take()?),
            cgroup: u64::from_ne_bytes(fields.take()?),
            fs_magic: u64::from_ne_bytes(fields.take()?),
            dev: u32::from_ne_bytes(fields.take()?),
            generation: u32::from_ne_bytes(fields.take()?),
            kind: u32::from_ne_bytes(fields.take()?),
            flags: u32::from_ne_bytes(fields.take()?),
            hash_algo: u32::from_ne_bytes(fields.take()?),
            hash_error: i32::from_ne_bytes(fields.take()?),
            pid: u32::from_ne_bytes(fields.take()?),
            uid: u32::from_ne_bytes(fields.take()?),
            digest: fields.take()?,
            comm: fields.take()?,
            path_len: u32::from_ne_bytes(fields.take()?),
            pad: u32::from_ne_bytes(fields.take()?),
            path: fields.take()?,
        };
        record.checked()
    }

    /// The record's bytes, as [`Record::read`] takes them: for the agent's journal.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; RECORD_SIZE] {
        let mut out = [0; RECORD_SIZE];
        let mut rest = out.as_mut_slice();
        for field in [
            self.seq,
            self.time_ns,
            self.size,
            self.ino,
            self.change,
            self.cgroup,
            self.fs_magic,
        ] {
            put(&mut rest, &field.to_ne_bytes());
        }
        for field in [self.dev, self.generation, self.kind, self.flags, self.hash_algo] {
            put(&mut rest, &field.to_ne_bytes());
        }
        put(&mut rest, &self.hash_error.to_ne_bytes());
        put(&mut rest, &self.pid.to_ne_bytes());
        put(&mut rest, &self.uid.to_ne_bytes());
        put(&mut rest, &self.digest);
        put(&mut rest, &self.comm);
        put(&mut rest, &self.path_len.to_ne_bytes());
        put(&mut rest, &self.pad.to_ne_bytes());
        put(&mut rest, &self.path);
        out
    }

    /// The path's bytes; empty when the kernel could not tell it.
    #[must_use]
    pub fn path(&self) -> &[u8] {
        usize::try_from(self.path_len)
            .ok()
            .and_then(|len| self.path.get(..len))
            .unwrap_or(&[])
    }

    /// The task's name, without the padding.
    #[must_use]
    pub fn comm(&self) -> &[u8] {
        self.comm.split(|byte| *byte == 0).next().unwrap_or(&[])
    }

    /// The SHA-256 digest, unless none could be made.
    #[must_use]
    pub const fn digest(&self) -> Option<&[u8; 32]> {
        if self.flags & flags::NOT_HASHED == 0 {
            Some(&self.digest)
        } else {
            None
        }
    }

    /// The rules between fields. What lies behind the path's end is left over from older records in the ring buffer:
    /// it is wiped, so that equal measurements are equal records.
    fn checked(mut self) -> Option<Self> {
        if !kind::is_known(self.kind) || self.flags & !flags::ALL != 0 {
            return None;
        }
        let hashed = self.flags & flags::NOT_HASHED == 0;
        if hashed && (self.hash_algo != HASH_ALGO_SHA256 || self.hash_error != 0) {
            return None;
        }
        if !hashed && (self.digest != [0; 32] || self.hash_error >= 0) {
            return None;
        }
        let used = usize::try_from(self.path_len).ok().filter(|len| *len < PATH_MAX)?;
        self.path.get_mut(used..)?.fill(0);
        (self.pad == 0).then_some(self)
    }
}

/// Takes fixed-size fields off the front of a slice.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl Fields<'_> {
    pub(crate) fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*field)
    }
}

/// Puts `field` at the front of `out` and moves `out` behind it. The caller's fields are as long as the record, which
/// a test proves; a field that did not fit would be left out, never panic.
pub(crate) fn put(out: &mut &mut [u8], field: &[u8]) {
    if let Some((place, rest)) = core::mem::take(out).split_at_mut_checked(field.len()) {
        place.copy_from_slice(field);
        *out = rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Record {
        let mut path = [0; PATH_MAX];
        path[..9].copy_from_slice(b"/bin/true");
        let mut comm = [0; 16];
        comm[..4].copy_from_slice(b"bash");
        Record {
            seq: 1,
            time_ns: 2,
            size: 3,
            ino: 4,
            change: 5,
            cgroup: 6,
            fs_magic: 0xef53,
            dev: 8,
            generation: 9,
            kind: kind::PROGRAM,
            flags: 0,
            hash_algo: HASH_ALGO_SHA256,
            hash_error: 0,
            pid: 13,
            uid: 14,
            digest: [15; 32],
            comm,
            path_len: 9,
            pad: 0,
            path,
        }
    }

    #[test]
    fn a_record_survives_its_bytes() {
        let read = Record::read(&sample().to_bytes()).unwrap();
        assert_eq!(read, sample());
        assert_eq!(read.path(), b"/bin/true");
        assert_eq!(read.comm(), b"bash");
        assert_eq!(read.digest(), Some(&[15; 32]));
    }

    #[test]
    fn every_field_is_read_from_its_own_place() {
        let bytes = sample().to_bytes();
        for at in 0..RECORD_SIZE {
            let mut changed = bytes;
            changed[at] ^= 0x10;
            // Behind the path's end the bytes mean nothing.
            let tail = at >= RECORD_SIZE - PATH_MAX + 9;
            assert_eq!(Record::read(&changed) == Some(sample()), tail, "byte {at}");
        }
    }

    #[test]
    fn wrong_lengths_are_refused() {
        let bytes = sample().to_bytes();
        assert_eq!(Record::read(&[]), None);
        assert_eq!(Record::read(&bytes[1..]), None);
        let mut longer = [0; RECORD_SIZE + 8];
        longer[..RECORD_SIZE].copy_from_slice(&bytes);
        assert_eq!(Record::read(&longer), None);
    }

    #[test]
    fn what_the_kernel_side_never_writes_is_refused() {
        let refused = |change: fn(&mut Record)| {
            let mut record = sample();
            change(&mut record);
            Record::read(&record.to_bytes()).is_none()
        };
        assert!(refused(|r| r.kind = 0));
        assert!(refused(|r| r.kind = 17));
        assert!(refused(|r| r.kind = 39));
        assert!(refused(|r| r.flags = 1 << 15));
        assert!(refused(|r| r.hash_algo = 2));
        assert!(refused(|r| r.hash_error = -5));
        assert!(refused(|r| r.path_len = 512));
        assert!(refused(|r| r.path_len = u32::MAX));
        assert!(refused(|r| r.pad = 1));
        assert!(refused(|r| r.flags = flags::NOT_HASHED));
        assert!(!refused(|r| {
            r.flags = flags::NOT_HASHED;
            r.digest = [0; 32];
            r.hash_error = -27;
        }));
    }
}
