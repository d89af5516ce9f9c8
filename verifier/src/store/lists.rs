//! The approved list that was last signed for each host, and the last serial number.

use assay_evidence::digest::Sha256Digest;
use rusqlite::{OptionalExtension, Row, params};

use super::{Store, StoreError, sql};
use crate::time::now;

/// The list that was last signed for a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostList {
    /// Its serial number.
    pub serial: u64,
    /// SHA-256 of the signed text.
    pub sha256: Sha256Digest,
    /// Digest over what it says, whatever its serial.
    pub content: Sha256Digest,
    /// Why the host does not hold it, one line; none when it does.
    pub problem: Option<String>,
}

impl HostList {
    /// What operators and schedulers read.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({
            "serial": self.serial,
            "sha256": self.sha256,
            "held": self.problem.is_none(),
            "problem": self.problem,
        })
    }

    /// From four columns: serial, sha256, content and problem. None where the first is null.
    pub(super) fn read(row: &Row<'_>, from: usize) -> Result<Option<Self>, StoreError> {
        let failed = sql("read an approved list");
        let Some(serial) = row.get::<_, Option<i64>>(from).map_err(&failed)? else {
            return Ok(None);
        };
        let serial = u64::try_from(serial).map_err(|_| CORRUPT)?;
        Ok(Some(Self {
            serial,
            sha256: Sha256Digest::new(row.get(from.saturating_add(1)).map_err(&failed)?),
            content: Sha256Digest::new(row.get(from.saturating_add(2)).map_err(&failed)?),
            problem: row.get(from.saturating_add(3)).map_err(&failed)?,
        }))
    }
}

const CORRUPT: StoreError = StoreError::Corrupt {
    what: "serial number of approved lists",
};

impl Store {
    /// A serial number for a new list: the time, or one more than the last.
    pub fn next_list_serial(&self) -> Result<u64, StoreError> {
        self.transaction("count approved lists", |t| {
            let failed = sql("count approved lists");
            let last: Option<i64> = t
                .query_row("SELECT serial FROM list_serial", [], |row| row.get(0))
                .optional()
                .map_err(&failed)?;
            let next = now().max(last.unwrap_or(0).saturating_add(1));
            t.execute("DELETE FROM list_serial", []).map_err(&failed)?;
            t.execute("INSERT INTO list_serial (serial) VALUES (?1)", [next])
                .map_err(&failed)?;
            u64::try_from(next).map_err(|_| CORRUPT)
        })
    }

    /// The list that was last signed for a host.
    pub fn host_list(&self, host_id: i64) -> Result<Option<HostList>, StoreError> {
        let found = self.read("look for an approved list", |c| {
            c.query_row(
                "SELECT serial, sha256, content, problem FROM host_lists WHERE host_id = ?1",
                [host_id],
                |row| Ok(HostList::read(row, 0)),
            )
            .optional()
        })?;
        Ok(found.transpose()?.flatten())
    }

    /// Keeps what was signed for a host; nothing for one that was removed meanwhile.
    pub fn put_host_list(&self, host_id: i64, list: &HostList) -> Result<(), StoreError> {
        self.read("keep an approved list", |c| {
            c.execute(
                "INSERT OR REPLACE INTO host_lists (host_id, serial, sha256, content, problem)
                 SELECT id, ?2, ?3, ?4, ?5 FROM hosts WHERE id = ?1",
                params![
                    host_id,
                    i64::try_from(list.serial).unwrap_or(i64::MAX),
                    list.sha256.as_bytes(),
                    list.content.as_bytes(),
                    list.problem
                ],
            )
        })?;
        Ok(())
    }

    /// Writes down why a host does not hold its list, or that it does. Whether that is news.
    pub fn set_list_problem(&self, host_id: i64, problem: Option<&str>) -> Result<bool, StoreError> {
        let zero = [0_u8; 32];
        let changed = self.read("note an approved list's delivery", |c| {
            c.execute(
                "INSERT INTO host_lists (host_id, serial, sha256, content, problem)
                 SELECT id, 0, ?3, ?3, ?2 FROM hosts WHERE id = ?1
                 ON CONFLICT (host_id) DO UPDATE SET problem = ?2 WHERE problem IS NOT ?2",
                params![host_id, problem, zero],
            )
        })?;
        Ok(changed > 0)
    }
}
