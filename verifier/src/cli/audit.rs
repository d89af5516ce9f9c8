//! `assay-verifier audit`: the signed log of keys, shown and checked.

use std::fmt::Write as _;
use std::path::PathBuf;

use assay_evidence::audit::{Checker, Event, Record};
use assay_evidence::digest::Sha256Digest;
use assay_evidence::policy::Expiry;
use serde_json::json;

use super::host::sha256_hex;
use super::policy::read_public_key;
use super::{CliError, print, print_json};
use crate::audit::{self, files, read};
use crate::config::{Config, StateDir};
use crate::time::rfc3339;

/// `audit …`.
#[derive(Debug, clap::Subcommand)]
pub(super) enum AuditCommand {
    /// Show which key went to which host, and who was refused; every record is checked while it is read
    Show {
        /// Only what is about this host
        #[arg(long, value_name = "NAME")]
        host: Option<String>,
        /// Only what is about this key
        #[arg(long, value_name = "ID")]
        key: Option<String>,
        /// Only what was written from then on: 2027-01-31 or 2027-01-31T12:00:00Z
        #[arg(long, value_name = "TIME")]
        since: Option<Expiry>,
        /// Print each record as a line of JSON
        #[arg(long)]
        json: bool,
    },
    /// Check the whole log, and show its head: keep that elsewhere, so that a log which was cut at its end shows itself
    Verify {
        /// Check by this public key (PEM, as `audit key` shows it) [default: that of the state directory]
        #[arg(long = "key", value_name = "FILE")]
        key: Option<PathBuf>,
        /// The log must lead by this head, which an earlier `audit verify` showed
        #[arg(long, value_name = "HASH", value_parser = sha256_hex)]
        from_head: Option<[u8; 32]>,
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// The log's files, oldest first [default: those of the state directory]
        #[arg(value_name = "FILE", requires = "key")]
        files: Vec<PathBuf>,
    },
    /// Show the public key that records are checked by (PEM)
    Key,
}

pub(super) fn run(state: &StateDir, command: AuditCommand) -> Result<(), CliError> {
    match command {
        AuditCommand::Show { host, key, since, json } => {
            let wanted = Wanted { host, key, since };
            show(state, &wanted, json)
        }
        AuditCommand::Verify {
            key,
            from_head,
            json,
            files,
        } => verify(state, key, from_head.map(Sha256Digest::new), json, files),
        AuditCommand::Key => {
            Config::load(state)?;
            print(&audit::public_key(state)?.pem())
        }
    }
}

/// Which records are wanted.
struct Wanted {
    host: Option<String>,
    key: Option<String>,
    since: Option<Expiry>,
}

impl Wanted {
    fn includes(&self, record: &Record) -> bool {
        let event = &record.event;
        let host = self.host.as_deref().is_none_or(|host| event.host() == Some(host));
        let key = || self.key.is_none() || event.key_id() == self.key;
        let time = || {
            self.since
                .is_none_or(|since| u64::try_from(record.time).is_ok_and(|time| since.is_past(time)))
        };
        host && key() && time()
    }
}

fn show(state: &StateDir, wanted: &Wanted, json: bool) -> Result<(), CliError> {
    Config::load(state)?;
    let key = audit::public_key(state)?;
    let (mut trouble, mut shown) = (Ok(()), 0_u64);
    let mut see = |record: Record| {
        if trouble.is_ok() && wanted.includes(&record) {
            shown = shown.saturating_add(1);
            trouble = print(&if json { as_json(&record) } else { as_text(&record) });
        }
    };
    let files = own_files(state)?;
    // What was put away is not missed here; `verify` asks for it.
    let read = read(&files, Checker::of_part(&key), &mut see);
    trouble?;
    read?;
    if shown == 0 && !json {
        print("No records\n")?;
    }
    Ok(())
}

fn verify(
    state: &StateDir,
    key: Option<PathBuf>,
    from: Option<Sha256Digest>,
    json: bool,
    files: Vec<PathBuf>,
) -> Result<(), CliError> {
    let key = match key {
        Some(path) => read_public_key(&path, CliError::AuditKey)?,
        None => {
            Config::load(state)?;
            audit::public_key(state)?
        }
    };
    let files = if files.is_empty() { own_files(state)? } else { files };
    let (mut count, mut first) = (0_u64, None);
    let mut see = |record: Record| {
        count = count.saturating_add(1);
        first.get_or_insert(record.seq);
    };
    let head = read(&files, Checker::new(&key, from), &mut see)?;
    if json {
        return print_json(&json!({
            "records": count, "first": first, "last": head.seq, "head": head.hash, "key_sha256": key.spki_sha256(),
        }));
    }
    let from = first.unwrap_or(0);
    print(&format!(
        "{count} records, {from} to {last}: each is signed and follows the one before\nhead {hash}\n",
        last = head.seq,
        hash = head.hash,
    ))
}

fn own_files(state: &StateDir) -> Result<Vec<PathBuf>, CliError> {
    Ok(files(&state.audit_dir())?.into_iter().map(|file| file.path).collect())
}

fn as_json(record: &Record) -> String {
    let json = json!({
        "seq": record.seq, "time": rfc3339(record.time), "prev": record.prev, "event": record.event,
    });
    format!("{json}\n")
}

fn as_text(record: &Record) -> String {
    let mut text = format!("{:>6}  {}  ", record.seq, rfc3339(record.time));
    let _infallible = match &record.event {
        Event::Released {
            request,
            policy,
            lease_s,
            ..
        } => {
            let lease = lease_s.map(|s| format!(", lease {s} s")).unwrap_or_default();
            write!(text, "released  {}, policy {policy}{lease}", asked(request))
        }
        Event::Refused {
            request,
            code,
            message,
            reasons,
            unrecorded,
        } => {
            let first = reasons.first().map(|r| format!(": {r}")).unwrap_or_default();
            let others = match unrecorded {
                0 => String::new(),
                n => format!(" ({n} more before this one)"),
            };
            write!(text, "refused   {}, {code}: {message}{first}{others}", asked(request))
        }
        Event::Returned { key, why } => write!(text, "returned  {}: {why}", taken(key)),
        Event::Withdrawn { key, reasons, on_loss } => {
            write!(text, "withdrawn {}, {on_loss}: {}", taken(key), reasons.join("; "))
        }
        Event::Terms { key_id, terms } => write!(text, "terms     key {key_id}: {terms}"),
        Event::Removed { key_id } => write!(text, "removed   key {key_id}"),
        Event::Torn { bytes, .. } => write!(text, "torn      {bytes} bytes that a crash had left were removed"),
    };
    let mut text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    text.push('\n');
    text
}

fn asked(request: &assay_evidence::audit::Request) -> String {
    let vm = request.vm.as_ref().map(|vm| format!(" for {vm:?}")).unwrap_or_default();
    format!("host {} key {} disk {}{vm}", request.host, request.key_id, request.disk)
}

fn taken(key: &assay_evidence::audit::Taken) -> String {
    format!("host {} key {} disk {}", key.host, key.key_id, key.disk)
}
