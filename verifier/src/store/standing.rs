//! The last verdict on each host as relying parties get it.

use assay_evidence::ear::Submod;
use rusqlite::{OptionalExtension, Transaction, params};

use super::{Store, StoreError, sql};
use crate::time::now;

/// How a host stood at the last look at it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Unix time of the look.
    pub judged: i64,
    /// What was found.
    pub submod: Submod,
}

const CORRUPT: StoreError = StoreError::Corrupt {
    what: "verdict for relying parties",
};

/// Keeps what a look found.
pub(super) fn put(t: &Transaction<'_>, host_id: i64, submod: &Submod) -> Result<(), StoreError> {
    let json = serde_json::to_string(submod).map_err(|_| CORRUPT)?;
    t.prepare_cached("INSERT OR REPLACE INTO standings (host_id, judged, submod) VALUES (?1, ?2, ?3)")
        .and_then(|mut statement| statement.execute(params![host_id, now(), json]))
        .map_err(sql("keep a verdict"))?;
    Ok(())
}

impl Store {
    /// How a host stands; none before the first look.
    pub fn standing(&self, host: &str) -> Result<Option<Standing>, StoreError> {
        let found = self.read("look for a verdict", |c| {
            c.query_row(
                "SELECT judged, submod FROM hosts LEFT JOIN standings ON standings.host_id = hosts.id WHERE name = ?1",
                [host],
                |row| Ok((row.get::<_, Option<i64>>(0)?, row.get::<_, Option<String>>(1)?)),
            )
            .optional()
        })?;
        match found {
            None => Err(StoreError::NoSuchHost(host.to_owned())),
            Some((Some(judged), Some(json))) => Ok(Some(Standing {
                judged,
                submod: serde_json::from_str(&json).map_err(|_| CORRUPT)?,
            })),
            Some(_) => Ok(None),
        }
    }
}
