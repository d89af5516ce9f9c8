//! Which host holds which key: of those keys that have a lease, or a rule for when it is lost.

use assay_evidence::uuid::Uuid;
use rusqlite::{Row, params};

use super::{Store, StoreError, sql};

/// A key that a host holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holding {
    /// The key.
    pub key_id: Uuid,
    /// The disk.
    pub disk: Uuid,
    /// Unix time of the last release.
    pub since: i64,
    /// Unix time at which the lease ends; none without a lease.
    pub until: Option<i64>,
    /// Whether the host was told that it may not hold it any more.
    pub withdrawn: bool,
}

/// A release, about to happen.
#[derive(Clone, Copy, Debug)]
pub struct Taking {
    /// The key.
    pub key_id: Uuid,
    /// The disk.
    pub disk: Uuid,
    /// Unix time.
    pub now: i64,
    /// In seconds.
    pub lease_s: Option<u64>,
    /// On how many hosts at once.
    pub hosts_at_once: Option<u32>,
}

const CORRUPT: StoreError = StoreError::Corrupt { what: "held key" };

impl Store {
    /// Writes down that a host takes a key. If as many others hold it as may, gives the Unix time at which the first of them holds
    /// it no more, and writes nothing.
    pub fn take_key(&self, host_id: i64, taking: &Taking) -> Result<Result<(), i64>, StoreError> {
        self.unless_too_many(
            host_id,
            taking,
            "INSERT OR REPLACE INTO holdings (host_id, key_id, disk, since, until) VALUES (?1, ?2, ?3, ?4, ?5)",
        )
    }

    /// The same for a key that the host holds already, with a new end of its lease.
    pub fn renew_key(&self, host_id: i64, taking: &Taking) -> Result<Result<(), i64>, StoreError> {
        self.unless_too_many(
            host_id,
            taking,
            "UPDATE holdings SET until = ?5 WHERE host_id = ?1 AND key_id = ?2 AND disk = ?3 AND since <= ?4",
        )
    }

    fn unless_too_many(&self, host_id: i64, taking: &Taking, write: &str) -> Result<Result<(), i64>, StoreError> {
        let (key_id, disk, now) = (taking.key_id.to_string(), taking.disk.to_string(), taking.now);
        let until = taking.lease_s.map(|lease| end_of(now, lease));
        self.transaction("write down who holds a key", |t| {
            if let Some(limit) = taking.hosts_at_once {
                let others = t.query_row(
                    "SELECT COUNT(DISTINCT host_id), MIN(COALESCE(until, ?4)) FROM holdings
                     WHERE key_id = ?1 AND host_id != ?2 AND (until IS NULL OR until > ?3)",
                    params![key_id, host_id, now, i64::MAX],
                    |row| Ok((row.get::<_, u32>(0)?, row.get::<_, Option<i64>>(1)?)),
                );
                let (count, first) = others.map_err(sql("count who holds a key"))?;
                if count >= limit {
                    return Ok(Err(first.unwrap_or(now)));
                }
            }
            t.execute(write, params![host_id, key_id, disk, now, until])
                .map_err(sql("write down who holds a key"))?;
            Ok(Ok(()))
        })
    }

    /// What a host holds.
    pub fn holdings(&self, host_id: i64) -> Result<Vec<Holding>, StoreError> {
        let rows = self.read("look for held keys", |c| {
            c.prepare_cached(
                "SELECT key_id, disk, since, until, withdrawn FROM holdings WHERE host_id = ?1 ORDER BY since, key_id, disk",
            )?
            .query_map([host_id], raw)?
            .collect::<rusqlite::Result<Vec<_>>>()
        })?;
        rows.into_iter().map(holding).collect()
    }

    /// Writes down whether a host was told that it may not hold a key any more.
    pub fn withdraw_holding(&self, host_id: i64, held: &Holding) -> Result<(), StoreError> {
        self.transaction("write down a withdrawn key", |t| {
            t.execute(
                "UPDATE holdings SET withdrawn = ?4 WHERE host_id = ?1 AND key_id = ?2 AND disk = ?3",
                params![host_id, held.key_id.to_string(), held.disk.to_string(), held.withdrawn],
            )
            .map_err(sql("write down a withdrawn key"))?;
            Ok(())
        })
    }

    /// Forgets a holding, unless the key was released anew since it was read.
    pub fn drop_holding(&self, host_id: i64, held: &Holding) -> Result<bool, StoreError> {
        self.transaction("forget a held key", |t| {
            let dropped = t.execute(
                "DELETE FROM holdings WHERE host_id = ?1 AND key_id = ?2 AND disk = ?3 AND since = ?4",
                params![host_id, held.key_id.to_string(), held.disk.to_string(), held.since],
            );
            Ok(dropped.map_err(sql("forget a held key"))? > 0)
        })
    }
}

/// When a lease ends that begins at this Unix time.
fn end_of(now: i64, lease_s: u64) -> i64 {
    now.saturating_add(i64::try_from(lease_s).unwrap_or(i64::MAX))
}

type Raw = (String, String, i64, Option<i64>, bool);

fn raw(row: &Row<'_>) -> rusqlite::Result<Raw> {
    Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?))
}

fn holding((key_id, disk, since, until, withdrawn): Raw) -> Result<Holding, StoreError> {
    Ok(Holding {
        key_id: key_id.parse().map_err(|_| CORRUPT)?,
        disk: disk.parse().map_err(|_| CORRUPT)?,
        since,
        until,
        withdrawn,
    })
}
