//! The tables, and the steps from each older version of them to the present one.

use rusqlite::{Connection, OptionalExtension, TransactionBehavior};

use super::{StoreError, sql};

/// Step `n` leads from version `n` to `n + 1`. Steps are never edited once released; new ones are added below.
const STEPS: [&str; 7] = [
    "
CREATE TABLE hosts (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    address TEXT NOT NULL,
    ek_sha256 BLOB NOT NULL UNIQUE,
    ek_public BLOB NOT NULL,
    ek_certificate BLOB,
    ak_public BLOB NOT NULL,
    ak_name BLOB NOT NULL UNIQUE,
    tls_spki_sha256 BLOB NOT NULL UNIQUE,
    policy TEXT NOT NULL,
    enrolled INTEGER NOT NULL,
    state TEXT NOT NULL,
    reasons TEXT NOT NULL,
    notes TEXT NOT NULL DEFAULT '[]',
    since INTEGER NOT NULL,
    last_quote INTEGER,
    boot_id TEXT,
    reset_count INTEGER,
    records INTEGER NOT NULL DEFAULT 0
) STRICT;
-- What is held of each host's present boot. The bytes are in chunks, so that a poll writes only what is new.
CREATE TABLE logs (
    host_id INTEGER PRIMARY KEY REFERENCES hosts(id) ON DELETE CASCADE,
    boot_id TEXT NOT NULL,
    reset_count INTEGER NOT NULL,
    restart_count INTEGER NOT NULL,
    clock INTEGER NOT NULL,
    records INTEGER NOT NULL,
    length INTEGER NOT NULL
) STRICT;
CREATE TABLE log_chunks (
    host_id INTEGER NOT NULL REFERENCES logs(host_id) ON DELETE CASCADE,
    start INTEGER NOT NULL,
    data BLOB NOT NULL,
    PRIMARY KEY (host_id, start)
) STRICT;
CREATE TABLE policies (
    name TEXT PRIMARY KEY,
    json TEXT NOT NULL,
    updated INTEGER NOT NULL
) STRICT;
",
    // Where each host's runtime log is; those enrolled before could only have it in the default PCR.
    "ALTER TABLE hosts ADD COLUMN pcr INTEGER NOT NULL DEFAULT 13 CHECK (pcr IN (12, 13, 14));",
    // How each host measures, JSON; unknown until its next quote.
    "ALTER TABLE hosts ADD COLUMN measuring TEXT;",
    // The approved list last signed for each host, and the last serial of all. Serial 0 stands for a host that none could be
    // signed for yet.
    "
CREATE TABLE host_lists (
    host_id INTEGER PRIMARY KEY REFERENCES hosts(id) ON DELETE CASCADE,
    serial INTEGER NOT NULL,
    sha256 BLOB NOT NULL,
    content BLOB NOT NULL,
    problem TEXT
) STRICT;
CREATE TABLE list_serial (serial INTEGER NOT NULL) STRICT;
",
    // What the operator calls each host, JSON: keys can demand it.
    "ALTER TABLE hosts ADD COLUMN tags TEXT NOT NULL DEFAULT '[]';",
    // The last verdict on each host for relying parties, JSON.
    "
CREATE TABLE standings (
    host_id INTEGER PRIMARY KEY REFERENCES hosts(id) ON DELETE CASCADE,
    judged INTEGER NOT NULL,
    submod TEXT NOT NULL
) STRICT;
",
    // Which host holds which key, of those that are to be watched; `until` is NULL where the key has no lease.
    "
CREATE TABLE holdings (
    host_id INTEGER NOT NULL REFERENCES hosts(id) ON DELETE CASCADE,
    key_id TEXT NOT NULL,
    disk TEXT NOT NULL,
    since INTEGER NOT NULL,
    until INTEGER,
    withdrawn INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (host_id, key_id, disk)
) STRICT;
",
];

/// Brings the database to the present version, in one transaction a step.
pub(super) fn migrate(connection: &mut Connection) -> Result<(), StoreError> {
    let failed = sql("bring its tables to the present version");
    let known = u32::try_from(STEPS.len()).unwrap_or(u32::MAX);
    loop {
        let transaction = connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(&failed)?;
        transaction
            .execute_batch("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL) STRICT")
            .map_err(&failed)?;
        let version = transaction
            .query_row("SELECT version FROM schema_version", [], |row| row.get::<_, u32>(0))
            .optional()
            .map_err(&failed)?;
        let version = version.unwrap_or(0);
        if version > known {
            return Err(StoreError::TooNew { found: version, known });
        }
        let Some(step) = usize::try_from(version).ok().and_then(|v| STEPS.get(v)) else {
            return transaction.commit().map_err(&failed);
        };
        transaction.execute_batch(step).map_err(&failed)?;
        transaction.execute("DELETE FROM schema_version", []).map_err(&failed)?;
        transaction
            .execute("INSERT INTO schema_version (version) VALUES (?1)", [version + 1])
            .map_err(&failed)?;
        transaction.commit().map_err(&failed)?;
    }
}
