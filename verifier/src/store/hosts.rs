//! Hosts: what was pinned at enrolment, and what the last look at them found.

use std::collections::BTreeSet;

use assay_evidence::ear::Submod;
use assay_evidence::event::{AgentStart, Mode};
use assay_evidence::pcr::RuntimePcr;
use assay_evidence::policy::is_name;
use rusqlite::{Connection, OptionalExtension, Row, params};
use serde::{Deserialize, Serialize};

use super::{HostList, Store, StoreError, sql, standing};
use crate::time::{now, rfc3339};

/// Most tags of one host.
pub const MAX_TAGS: usize = 64;

/// How a host stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum HostState {
    /// Not judged yet, or there is no policy to judge by.
    Unknown,
    /// The last evidence appraised clean.
    Trusted,
    /// The last evidence was bad, or did not verify.
    Untrusted,
    /// No evidence could be had.
    Unreachable,
}

impl HostState {
    /// As in the database, in JSON and on the terminal.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Trusted => "trusted",
            Self::Untrusted => "untrusted",
            Self::Unreachable => "unreachable",
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        [Self::Unknown, Self::Trusted, Self::Untrusted, Self::Unreachable]
            .into_iter()
            .find(|s| s.name() == name)
    }
}

/// A host to be enrolled: every identity in it has been proved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewHost {
    /// The operator's name for it.
    pub name: String,
    /// `ADDRESS:PORT` of its agent.
    pub address: String,
    /// SHA-256 of the EK's TPMT_PUBLIC.
    pub ek_sha256: [u8; 32],
    /// The EK's TPMT_PUBLIC.
    pub ek_public: Vec<u8>,
    /// The EK certificate, DER, where the TPM has one.
    pub ek_certificate: Option<Vec<u8>>,
    /// The attestation key's TPMT_PUBLIC.
    pub ak_public: Vec<u8>,
    /// The attestation key's Name (algorithm and digest).
    pub ak_name: Vec<u8>,
    /// SHA-256 of the agent's TLS SubjectPublicKeyInfo.
    pub tls_spki_sha256: [u8; 32],
    /// The PCR that its runtime log must be in.
    pub pcr: RuntimePcr,
    /// Name of the policy that judges it.
    pub policy: String,
}

/// An enrolled host.
#[derive(Clone, Debug)]
pub struct Host {
    /// Row id; never reused, so a removed and re-added host is another one.
    pub id: i64,
    /// What was pinned.
    pub pinned: NewHost,
    /// How it stands.
    pub state: HostState,
    /// Why, one line each.
    pub reasons: Vec<String>,
    /// What the state does not rest on, one line each.
    pub notes: Vec<String>,
    /// Unix time of the last change of `state`.
    pub since: i64,
    /// Unix time of the last quote that verified.
    pub last_quote: Option<i64>,
    /// Boot that the last verified quote was about.
    pub boot_id: Option<String>,
    /// The TPM's reset counter in that quote.
    pub reset_count: Option<u32>,
    /// Log records covered by that quote.
    pub records: u64,
    /// How it measured, by that quote's log.
    pub measuring: Option<Measuring>,
    /// The approved list that was last signed for it.
    pub list: Option<HostList>,
    /// What the operator calls it, for keys that demand that.
    pub tags: BTreeSet<String>,
}

/// How a host measures, as its agent's last start says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measuring {
    /// 1 to 3; 1 is the full promise.
    pub tier: u8,
    /// What happens to a load before it is extended.
    pub mode: Mode,
    /// Whether the agent keeps root away from itself.
    pub protected: bool,
    /// What the tier cannot see on this host's kernel; empty when it sees all that is promised.
    pub blind: String,
}

impl From<&AgentStart> for Measuring {
    fn from(start: &AgentStart) -> Self {
        Self {
            tier: start.tier,
            mode: start.mode,
            protected: start.protected,
            blind: start.blind.clone(),
        }
    }
}

impl Host {
    /// The JSON that operators and schedulers read (`host show --json`, `GET /v1/hosts/NAME`).
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({
            "name": self.pinned.name,
            "address": self.pinned.address,
            "state": self.state,
            "reasons": self.reasons,
            "notes": self.notes,
            "since": rfc3339(self.since),
            "last_quote": self.last_quote.map(rfc3339),
            "boot_id": self.boot_id,
            "records": self.records,
            "measuring": self.measuring,
            "approved_list": self.list.as_ref().map(HostList::to_json),
            "pcr": self.pinned.pcr.index(),
            "policy": self.pinned.policy,
            "tags": self.tags,
            "ek_sha256": hex::encode(self.pinned.ek_sha256),
            "ak_name": hex::encode(&self.pinned.ak_name),
            "tls_spki_sha256": hex::encode(self.pinned.tls_spki_sha256),
        })
    }
}

/// What a quote that verified was about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quoted {
    /// The agent's boot id.
    pub boot_id: String,
    /// The TPM's reset counter.
    pub reset_count: u32,
    /// Log records covered.
    pub records: u64,
    /// How the host measured at its end.
    pub measuring: Measuring,
}

/// The outcome of one look at a host.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// How it stands now.
    pub state: HostState,
    /// Why, one line each; empty when trusted.
    pub reasons: Vec<String>,
    /// What the verdict does not rest on, such as a boot log that the host has not; one line each, no refusal.
    pub notes: Vec<String>,
    /// What the policy calls a host that meets it; empty where it does not.
    pub tags: Vec<String>,
    /// The evidence behind it, where there was any that verified.
    pub quoted: Option<Quoted>,
    /// The same for relying parties.
    pub submod: Submod,
}

/// A change of state, for the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transition {
    /// Before.
    pub from: HostState,
    /// Now.
    pub to: HostState,
}

/// Whether a host or policy name can be used everywhere: 1 to 64 of `A-Z a-z 0-9 . _ -`, first one alphanumeric.
pub fn valid_name(name: &str) -> Result<(), StoreError> {
    let ok = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    let first = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    if first && name.len() <= 64 && name.bytes().all(ok) {
        Ok(())
    } else {
        Err(StoreError::BadName(name.to_owned()))
    }
}

impl Store {
    /// Refuses a name that is unusable or taken, before anything is asked of the host.
    pub fn check_new_host(&self, name: &str) -> Result<(), StoreError> {
        valid_name(name)?;
        match self.read("look for the host", |c| find(c, "name", &name))? {
            Some(_) => Err(StoreError::HostExists(name.to_owned())),
            None => Ok(()),
        }
    }

    /// Enrols a host; a name or identity that is enrolled already is refused, never replaced.
    pub fn add_host(&self, host: &NewHost) -> Result<(), StoreError> {
        valid_name(&host.name)?;
        self.transaction("add the host", |t| {
            let failed = sql("add the host");
            if find(t, "name", &host.name).map_err(&failed)?.is_some() {
                return Err(StoreError::HostExists(host.name.clone()));
            }
            let identities: [(&str, &str, &[u8]); 3] = [
                ("endorsement key", "ek_sha256", &host.ek_sha256),
                ("attestation key", "ak_name", &host.ak_name),
                ("TLS key", "tls_spki_sha256", &host.tls_spki_sha256),
            ];
            for (what, column, value) in identities {
                if let Some(other) = find(t, column, &value).map_err(&failed)? {
                    return Err(StoreError::IdentityTaken { what, host: other });
                }
            }
            t.execute(
                "INSERT INTO hosts (name, address, ek_sha256, ek_public, ek_certificate, ak_public, ak_name, tls_spki_sha256, policy,
                 enrolled, state, reasons, since, pcr) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?10, ?13)",
                params![
                    host.name,
                    host.address,
                    host.ek_sha256,
                    host.ek_public,
                    host.ek_certificate,
                    host.ak_public,
                    host.ak_name,
                    host.tls_spki_sha256,
                    host.policy,
                    now(),
                    HostState::Unknown.name(),
                    r#"["not asked yet"]"#,
                    host.pcr.index(),
                ],
            )
            .map_err(&failed)?;
            Ok(())
        })
    }

    /// Forgets a host, its pins and its log.
    pub fn remove_host(&self, name: &str) -> Result<(), StoreError> {
        let gone = self.read("remove the host", |c| {
            c.execute("DELETE FROM hosts WHERE name = ?1", [name])
        })?;
        if gone == 0 {
            Err(StoreError::NoSuchHost(name.to_owned()))
        } else {
            Ok(())
        }
    }

    /// All hosts by name.
    pub fn hosts(&self) -> Result<Vec<Host>, StoreError> {
        let rows = self.read("list the hosts", |c| {
            let mut statement = c.prepare_cached(&format!("{SELECT} ORDER BY name"))?;
            statement
                .query_map([], |row| Ok(read_host(row)))?
                .collect::<rusqlite::Result<Vec<_>>>()
        })?;
        rows.into_iter().collect()
    }

    /// One host by name.
    pub fn host(&self, name: &str) -> Result<Host, StoreError> {
        self.host_where("name", &name)?
            .ok_or_else(|| StoreError::NoSuchHost(name.to_owned()))
    }

    /// The host that holds this TLS key, if one does.
    pub fn host_by_spki(&self, spki_sha256: &[u8; 32]) -> Result<Option<Host>, StoreError> {
        self.host_where("tls_spki_sha256", spki_sha256)
    }

    /// Which policy judges a host from now on.
    pub fn set_host_policy(&self, name: &str, policy: &str) -> Result<(), StoreError> {
        valid_name(policy)?;
        let changed = self.read("set the host's policy", |c| {
            c.execute("UPDATE hosts SET policy = ?2 WHERE name = ?1", [name, policy])
        })?;
        if changed == 0 {
            Err(StoreError::NoSuchHost(name.to_owned()))
        } else {
            Ok(())
        }
    }

    /// Gives a host tags, and takes some from it; returns those that it has then.
    ///
    /// # Errors
    /// [`StoreError::BadTag`], [`StoreError::TooManyTags`], [`StoreError::NoSuchHost`]; the host is then as before.
    pub fn tag_host(&self, name: &str, add: &[String], remove: &[String]) -> Result<BTreeSet<String>, StoreError> {
        if let Some(bad) = add.iter().find(|tag| !is_name(tag)) {
            return Err(StoreError::BadTag(bad.clone()));
        }
        self.transaction("change the host's tags", |t| {
            let failed = sql("change the host's tags");
            let row = t
                .query_row(&format!("{SELECT} WHERE name = ?1"), [name], |row| Ok(read_host(row)))
                .optional()
                .map_err(&failed)?;
            let host = row.ok_or_else(|| StoreError::NoSuchHost(name.to_owned()))??;
            let mut tags = host.tags;
            tags.extend(add.iter().cloned());
            tags.retain(|tag| !remove.contains(tag));
            if tags.len() > MAX_TAGS {
                return Err(StoreError::TooManyTags(tags.len()));
            }
            let json = serde_json::to_string(&tags).map_err(|_| StoreError::Corrupt { what: "list of tags" })?;
            t.execute("UPDATE hosts SET tags = ?2 WHERE id = ?1", params![host.id, json])
                .map_err(&failed)?;
            Ok(tags)
        })
    }

    /// Writes down the outcome of a look at a host. A verdict about fewer records of a boot than the stored one is older
    /// evidence that arrived late (a poll and a key request can overlap): it changes nothing. So does one for a host
    /// that was removed meanwhile.
    pub fn record_verdict(&self, host_id: i64, verdict: &Verdict) -> Result<Option<Transition>, StoreError> {
        self.transaction("record a verdict", |t| {
            let failed = sql("record a verdict");
            let row = t
                .query_row(&format!("{SELECT} WHERE id = ?1"), [host_id], |row| Ok(read_host(row)))
                .optional()
                .map_err(&failed)?;
            let Some(host) = row.transpose()? else { return Ok(None) };
            if verdict.quoted.as_ref().is_some_and(|q| stale(q, &host)) {
                return Ok(None);
            }
            let changed = host.state != verdict.state;
            let lines = |list| {
                serde_json::to_string(list).map_err(|_| StoreError::Corrupt {
                    what: "list of reasons",
                })
            };
            let (reasons, notes) = (lines(&verdict.reasons)?, lines(&verdict.notes)?);
            let time = now();
            let since = if changed { time } else { host.since };
            t.execute(
                "UPDATE hosts SET state = ?2, reasons = ?3, notes = ?4, since = ?5 WHERE id = ?1",
                params![host_id, verdict.state.name(), reasons, notes, since],
            )
            .map_err(&failed)?;
            standing::put(t, host_id, &verdict.submod)?;
            if let Some(quoted) = &verdict.quoted {
                let measuring = serde_json::to_string(&quoted.measuring).map_err(|_| StoreError::Corrupt {
                    what: "way of measuring",
                })?;
                t.execute(
                    "UPDATE hosts SET last_quote = ?2, boot_id = ?3, reset_count = ?4, records = ?5, measuring = ?6 WHERE id = ?1",
                    params![
                        host_id,
                        time,
                        quoted.boot_id,
                        quoted.reset_count,
                        i64::try_from(quoted.records).unwrap_or(i64::MAX),
                        measuring,
                    ],
                )
                .map_err(&failed)?;
            }
            Ok(changed.then_some(Transition {
                from: host.state,
                to: verdict.state,
            }))
        })
    }

    fn host_where(&self, column: &str, value: &dyn rusqlite::ToSql) -> Result<Option<Host>, StoreError> {
        let found = self.read("look for the host", |c| {
            c.query_row(&format!("{SELECT} WHERE {column} = ?1"), [value], |row| {
                Ok(read_host(row))
            })
            .optional()
        })?;
        found.transpose()
    }
}

fn stale(quoted: &Quoted, host: &Host) -> bool {
    let known = host.reset_count.unwrap_or(0);
    let same_boot = host.boot_id.as_deref() == Some(&quoted.boot_id) && quoted.reset_count == known;
    quoted.reset_count < known || (same_boot && quoted.records < host.records)
}

/// Name of the host whose `column` has this value. `column` is one of ours, never input.
fn find(connection: &Connection, column: &str, value: &dyn rusqlite::ToSql) -> rusqlite::Result<Option<String>> {
    connection
        .query_row(&format!("SELECT name FROM hosts WHERE {column} = ?1"), [value], |row| {
            row.get(0)
        })
        .optional()
}

const SELECT: &str =
    "SELECT id, name, address, ek_sha256, ek_public, ek_certificate, ak_public, ak_name, tls_spki_sha256, policy,
    state, reasons, since, last_quote, boot_id, reset_count, records, notes, pcr, measuring,
    serial, sha256, content, problem, tags FROM hosts LEFT JOIN host_lists ON host_lists.host_id = hosts.id";

fn read_host(row: &Row<'_>) -> Result<Host, StoreError> {
    let failed = sql("read a host");
    let corrupt = |what| StoreError::Corrupt { what };
    let state: String = row.get(10).map_err(&failed)?;
    let reasons: String = row.get(11).map_err(&failed)?;
    let records: i64 = row.get(16).map_err(&failed)?;
    let notes: String = row.get(17).map_err(&failed)?;
    let pcr: u8 = row.get(18).map_err(&failed)?;
    let measuring: Option<String> = row.get(19).map_err(&failed)?;
    let tags: String = row.get(24).map_err(&failed)?;
    Ok(Host {
        id: row.get(0).map_err(&failed)?,
        pinned: NewHost {
            name: row.get(1).map_err(&failed)?,
            address: row.get(2).map_err(&failed)?,
            ek_sha256: row.get(3).map_err(&failed)?,
            ek_public: row.get(4).map_err(&failed)?,
            ek_certificate: row.get(5).map_err(&failed)?,
            ak_public: row.get(6).map_err(&failed)?,
            ak_name: row.get(7).map_err(&failed)?,
            tls_spki_sha256: row.get(8).map_err(&failed)?,
            pcr: RuntimePcr::new(pcr).map_err(|_| corrupt("PCR of a host's runtime log"))?,
            policy: row.get(9).map_err(&failed)?,
        },
        state: HostState::from_name(&state).ok_or_else(|| corrupt("host state"))?,
        reasons: serde_json::from_str(&reasons).map_err(|_| corrupt("list of reasons"))?,
        notes: serde_json::from_str(&notes).map_err(|_| corrupt("list of notes"))?,
        since: row.get(12).map_err(&failed)?,
        last_quote: row.get(13).map_err(&failed)?,
        boot_id: row.get(14).map_err(&failed)?,
        reset_count: row.get(15).map_err(&failed)?,
        records: u64::try_from(records).map_err(|_| corrupt("record count"))?,
        measuring: measuring
            .map(|text| serde_json::from_str(&text).map_err(|_| corrupt("way of measuring")))
            .transpose()?,
        list: HostList::read(row, 20)?,
        tags: serde_json::from_str(&tags).map_err(|_| corrupt("list of tags"))?,
    })
}
