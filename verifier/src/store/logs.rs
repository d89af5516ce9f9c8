//! The log held of each host's present boot, in chunks: a poll appends what is new.

use assay_evidence::quote::{HeldLog, Judged};
use rusqlite::{OptionalExtension, Transaction, params};

use super::{Store, StoreError, sql};

impl Store {
    /// What is held of a host: records that replayed to a quote that verified, and nothing else.
    pub fn held_log(&self, host_id: i64) -> Result<HeldLog, StoreError> {
        self.transaction("read a log", |t| {
            let Some(Head { mut held, length }) = head(t, host_id)? else {
                return Ok(HeldLog::none());
            };
            let failed = sql("read a log");
            held.bytes.reserve_exact(length);
            let mut statement = t
                .prepare_cached("SELECT data FROM log_chunks WHERE host_id = ?1 ORDER BY start")
                .map_err(&failed)?;
            let mut rows = statement.query([host_id]).map_err(&failed)?;
            while let Some(row) = rows.next().map_err(&failed)? {
                let chunk = row.get_ref(0).map_err(&failed)?.as_blob().map_err(|_| CORRUPT)?;
                held.bytes.extend_from_slice(chunk);
            }
            if held.bytes.len() == length {
                Ok(held)
            } else {
                Err(CORRUPT)
            }
        })
    }

    /// As [`Store::held_log`], without the log's bytes: their length instead.
    pub fn held_log_head(&self, host_id: i64) -> Result<(HeldLog, usize), StoreError> {
        let head = self.transaction("read a log", |t| head(t, host_id))?;
        Ok(head.map_or((HeldLog::none(), 0), |head| (head.held, head.length)))
    }

    /// Keeps a log that verified. Within a boot it only grows: an older one that arrived late changes nothing, and
    /// neither does one of an earlier boot, or of a host that was removed.
    pub fn keep_log(&self, host_id: i64, log: &HeldLog) -> Result<(), StoreError> {
        self.transaction("keep a log", |t| {
            let failed = sql("keep a log");
            let exists: Option<i64> = t
                .query_row("SELECT id FROM hosts WHERE id = ?1", [host_id], |r| r.get(0))
                .optional()
                .map_err(&failed)?;
            if exists.is_none() {
                return Ok(());
            }
            let start = match head(t, host_id)? {
                None => 0,
                Some(known) if known.held.boot_id == log.boot_id && known.held.reset_count == log.reset_count => {
                    if known.length > log.bytes.len() || known.held.clock > log.clock {
                        return Ok(());
                    }
                    if chunks(t, host_id)? < MAX_CHUNKS {
                        known.length
                    } else {
                        0
                    }
                }
                Some(known) if known.held.reset_count > log.reset_count => return Ok(()),
                Some(_) => 0,
            };
            write_head(t, host_id, log, log.bytes.len())?;
            if start == 0 {
                t.execute("DELETE FROM log_chunks WHERE host_id = ?1", [host_id])
                    .map_err(&failed)?;
            }
            append(t, host_id, start, log.bytes.get(start..).unwrap_or_default())
        })
    }

    /// Appends what came since `before`, if that is what is held still. `false`: it is not, or it is in so many pieces that the
    /// whole is to be written anew, by [`Store::keep_log`].
    pub fn append_log(&self, host_id: i64, before: &Judged, now: &Judged, news: &[u8]) -> Result<bool, StoreError> {
        self.transaction("keep a log", |t| {
            let Some(known) = head(t, host_id)? else {
                return Ok(false);
            };
            let last = before.held();
            let same = known.held.boot_id == last.boot_id
                && known.held.reset_count == last.reset_count
                && known.held.records == last.records
                && known.length == before.length();
            if !same || chunks(t, host_id)? >= MAX_CHUNKS {
                return Ok(false);
            }
            let held = HeldLog {
                clock: now.held().clock.max(known.held.clock),
                ..now.held().clone()
            };
            write_head(t, host_id, &held, now.length())?;
            append(t, host_id, known.length, news)?;
            Ok(true)
        })
    }

    /// Takes note of a later quote of the log that is held, if it still is.
    pub fn keep_clock(&self, host_id: i64, held: &HeldLog) -> Result<(), StoreError> {
        let [clock, records] = [held.clock, held.records].map(|n| i64::try_from(n).unwrap_or(i64::MAX));
        let statement = "UPDATE logs SET clock = max(clock, ?2) WHERE host_id = ?1 AND boot_id = ?3 AND reset_count = ?4 AND records = ?5";
        self.read("keep a log", |c| {
            c.execute(
                statement,
                params![host_id, clock, held.boot_id, held.reset_count, records],
            )
        })
        .map(drop)
    }
}

/// A row of `logs`: what is held, its bytes aside, and their number.
struct Head {
    held: HeldLog,
    length: usize,
}

fn head(t: &Transaction<'_>, host_id: i64) -> Result<Option<Head>, StoreError> {
    let statement = "SELECT boot_id, reset_count, restart_count, clock, records, length FROM logs WHERE host_id = ?1";
    let row = t.query_row(statement, [host_id], |row| {
        let counts: [i64; 3] = [row.get(3)?, row.get(4)?, row.get(5)?];
        Ok((
            row.get::<_, String>(0)?,
            row.get::<_, u32>(1)?,
            row.get::<_, u32>(2)?,
            counts,
        ))
    });
    let Some((boot_id, reset_count, restart_count, [clock, records, length])) =
        row.optional().map_err(sql("read a log"))?
    else {
        return Ok(None);
    };
    let count = |n: i64| u64::try_from(n).map_err(|_| CORRUPT);
    let held = HeldLog {
        boot_id,
        reset_count,
        restart_count,
        clock: count(clock)?,
        records: count(records)?,
        bytes: Vec::new(),
    };
    Ok(Some(Head {
        held,
        length: usize::try_from(length).map_err(|_| CORRUPT)?,
    }))
}

fn append(t: &Transaction<'_>, host_id: i64, start: usize, tail: &[u8]) -> Result<(), StoreError> {
    if tail.is_empty() {
        return Ok(());
    }
    let start = i64::try_from(start).map_err(|_| CORRUPT)?;
    t.execute(
        "INSERT INTO log_chunks (host_id, start, data) VALUES (?1, ?2, ?3)",
        params![host_id, start, tail],
    )
    .map_err(sql("keep a log"))?;
    Ok(())
}

fn write_head(t: &Transaction<'_>, host_id: i64, log: &HeldLog, length: usize) -> Result<(), StoreError> {
    let length = i64::try_from(length).map_err(|_| CORRUPT)?;
    // A TPM's clock counts milliseconds: it stays below 2^63.
    let [clock, records] = [log.clock, log.records].map(|n| i64::try_from(n).unwrap_or(i64::MAX));
    t.execute(
        "INSERT INTO logs (host_id, boot_id, reset_count, restart_count, clock, records, length) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)
         ON CONFLICT (host_id) DO UPDATE SET boot_id = ?2, reset_count = ?3, restart_count = ?4, clock = ?5, records = ?6, length = ?7",
        params![host_id, log.boot_id, log.reset_count, log.restart_count, clock, records, length],
    )
    .map_err(sql("keep a log"))?;
    Ok(())
}

fn chunks(t: &Transaction<'_>, host_id: i64) -> Result<i64, StoreError> {
    t.query_row("SELECT count(*) FROM log_chunks WHERE host_id = ?1", [host_id], |row| {
        row.get(0)
    })
    .map_err(sql("keep a log"))
}

const CORRUPT: StoreError = StoreError::Corrupt { what: "log" };
/// Past this many chunks a log is written anew as one.
const MAX_CHUNKS: i64 = 512;
