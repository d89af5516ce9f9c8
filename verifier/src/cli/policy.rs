//! `assay-verifier policy …`: known-good values.

mod edit;
mod exchange;
mod known_good;
mod show;

pub(super) use exchange::read_public_key;

use std::path::PathBuf;

use assay_evidence::digest::Sha256Digest;
use assay_evidence::event::LoadKind;
use assay_evidence::policy::{ALLOWED, Approved, MAX_NAME, MAX_PARTS, Policy, is_name};
use clap::{ArgGroup, Args, Subcommand};

use super::host::sha256_hex;
use super::{CliError, block_on, print};
use crate::client::Asker;
use crate::config::{Config, StateDir};
use crate::files::create_private;
use crate::lists::{Lists, Wanted};
use crate::poll;
use crate::store::{Store, StoreError, valid_name};
use crate::time::{now, rfc3339, unix_now};

/// Subcommands of `policy`.
#[derive(Debug, Subcommand)]
pub(super) enum PolicyCommand {
    /// Take what a host shows now as known good, and judge the host by it from now on
    Capture {
        /// An enrolled host that is known to be good
        host: String,
        /// Name of the policy
        #[arg(long, default_value = "default")]
        name: String,
        /// Name of the boot configuration and the set of code that the host's state becomes [default: HOST-DATE-TIME]
        #[arg(long, value_name = "NAME", value_parser = part_name)]
        part: Option<String>,
        /// Replace a policy of this name, with everything that it allows
        #[arg(long, conflicts_with = "add")]
        replace: bool,
        /// Add to a policy of this name: it then allows what it allowed, and what this host shows
        #[arg(long)]
        add: bool,
    },
    /// Show a policy, or list all
    Show {
        /// The policy; without it, all are listed
        name: Option<String>,
        /// As JSON, for programs
        #[arg(long)]
        json: bool,
    },
    /// Allow one more digest, or a program's deed
    Allow {
        /// SHA-256 of the file, as the host's reasons show it
        #[arg(value_name = "SHA256", value_parser = digest)]
        digest: Sha256Digest,
        /// Path that the file is known by; for people, it decides nothing
        #[arg(long)]
        path: Option<String>,
        /// Kind of code, such as program or module-file, for people; or the deed that the program with this digest may do
        /// from now on: anonymous, device, block-write, code-write or one of attempt-*
        #[arg(long, value_name = "KIND")]
        kind: Option<LoadKind>,
        /// Set of the policy that it is added to; made if there is none
        #[arg(long, value_name = "NAME", default_value = ALLOWED, value_parser = part_name)]
        set: String,
        /// Name of the policy
        #[arg(long, default_value = "default")]
        name: String,
    },
    /// Allow an agent, or kernel programs, before any host measures with them: an update of Assay itself
    AllowAgent(edit::AllowAgent),
    /// Let a policy allow everything that others allow, too
    Merge(edit::Merge),
    /// Show what one policy allows and another does not; `-` stands before what only the first has, `+` before what only the
    /// second has
    Diff(exchange::Diff),
    /// Say until when a policy, or a part of it, is approved
    Expire(edit::Expire),
    /// Remove a boot configuration or a set from a policy
    Drop(edit::Drop),
    /// Write a policy to a file, to be read, edited and imported again, or signed for another verifier
    Export(exchange::Export),
    /// Read a policy from a file
    Import(exchange::Import),
    /// Show the public key (PEM) that this verifier signs policies and approved lists with
    Key,
    /// Show what packages, an installed root or an initramfs bring that a host can load: the entries that `policy add` adds
    Scan(known_good::ScanArgs),
    /// Allow all that packages, an installed root or an initramfs bring: approves an update before it is rolled out
    Add(known_good::AddArgs),
    /// Write a signed list of what a policy approves, for a host in enforce mode that no verifier reaches: `assay-agent
    /// approve FILE` takes it there. Hosts that are polled get theirs by themselves
    SignList(SignList),
}

/// Options of `policy sign-list`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("whom").required(true).args(["host", "policy"])))]
pub(super) struct SignList {
    /// For this enrolled host alone, by the policy that judges it
    host: Option<String>,
    /// For every host that has joined this verifier, by this policy
    #[arg(long, value_name = "NAME")]
    policy: Option<String>,
    /// File to write; must not exist
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Days after which no host takes the list over any more [default: it can always be taken over]
    #[arg(long, value_name = "DAYS", value_parser = clap::value_parser!(u64).range(1..=3650))]
    expires_in_days: Option<u64>,
}

pub(super) fn run(state: &StateDir, command: PolicyCommand) -> Result<(), CliError> {
    // It only reads what it is given.
    if let PolicyCommand::Scan(args) = command {
        return known_good::scan(&args);
    }
    let config = Config::load(state)?;
    let store = Store::open(&state.database())?;
    match command {
        PolicyCommand::Capture {
            host,
            name,
            part,
            replace,
            add,
        } => {
            let existing = match (replace, add) {
                (true, _) => Existing::Replace,
                (_, true) => Existing::Add,
                _ => Existing::Keep,
            };
            capture(
                state,
                &config,
                &store,
                &Capture {
                    host,
                    name,
                    part,
                    existing,
                },
            )
        }
        PolicyCommand::Show { name: None, json } => show::list(&store, json),
        PolicyCommand::Show { name: Some(name), json } => show::show(&existing(&store, &name)?, json),
        PolicyCommand::Allow {
            digest,
            path,
            kind,
            set,
            name,
        } => {
            let path = path.unwrap_or_default().into();
            let sha256 = digest;
            allow(&store, &name, &set, Approved { path, kind, sha256 })
        }
        PolicyCommand::AllowAgent(args) => edit::allow_agent(&store, &args),
        PolicyCommand::Merge(args) => edit::merge(&store, &args),
        PolicyCommand::Diff(args) => exchange::diff(&store, &args),
        PolicyCommand::Expire(args) => edit::expire(&store, &args),
        PolicyCommand::Drop(args) => edit::drop_part(&store, &args),
        PolicyCommand::Export(args) => exchange::export(state, &store, &args),
        PolicyCommand::Import(args) => exchange::import(&store, &args),
        PolicyCommand::Key => exchange::key(state),
        PolicyCommand::Scan(args) => known_good::scan(&args),
        PolicyCommand::Add(args) => known_good::add(&store, &args),
        PolicyCommand::SignList(args) => sign_list(state, &store, &args),
    }
}

/// What becomes of a policy that has the name already.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Existing {
    Keep,
    Replace,
    Add,
}

/// Arguments of `policy capture`.
struct Capture {
    host: String,
    name: String,
    part: Option<String>,
    existing: Existing,
}

/// What a capture's part is called where the operator does not say: the host and the minute, and a number where that minute has
/// one already.
fn part_of(host: &str, policy: Option<&Policy>) -> String {
    let stamp = rfc3339(now()).replace(['-', ':'], "").replace('T', "-");
    let stamp = stamp.get(..13).unwrap_or(&stamp);
    let taken = |name: &str| policy.is_some_and(|policy| policy.has_part(name));
    let name = |number: usize| {
        let end = if number == 1 {
            format!("-{stamp}")
        } else {
            format!("-{stamp}-{number}")
        };
        let room = MAX_NAME.saturating_sub(end.len());
        format!("{}{end}", host.get(..room).unwrap_or(host))
    };
    // A policy has fewer parts than that.
    (1..=2 * MAX_PARTS)
        .map(name)
        .find(|name| !taken(name))
        .unwrap_or_else(|| name(1))
}

fn capture(state: &StateDir, config: &Config, store: &Store, args: &Capture) -> Result<(), CliError> {
    let Capture {
        host,
        name,
        part,
        existing,
    } = args;
    valid_name(name)?;
    let row = store.host(host)?;
    let before = store.policy(name)?;
    let known = before.is_some();
    if known && *existing == Existing::Keep {
        return Err(CliError::PolicyExists(name.to_owned()));
    }
    let asker = Asker::load(state)?;
    let held = store.held_log(row.id)?;
    let log = block_on(async { Ok(poll::look_from_start(&asker, &row, held, config.quote_timeout).await?) })?;
    let part = part.clone().unwrap_or_else(|| part_of(host, before.as_ref()));
    let captured = Policy::capture(name, &part, &log).map_err(CliError::Policy)?;
    if known && *existing == Existing::Add {
        store.edit_policy(name, |policy| policy.learn(&captured))?;
    } else if !store.put_policy(name, &captured, *existing == Existing::Replace)? {
        // Somebody else was quicker.
        return Err(CliError::PolicyExists(name.to_owned()));
    }
    store.set_host_policy(host, name)?;
    if let Some(problem) = log.ima_problem() {
        let line: String = problem.escape_debug().collect();
        print(&format!("The kernel's IMA log is not judged: {line}\n"))?;
    }
    let policy = store.policy(name)?.unwrap_or(captured);
    print(&format!(
        "captured policy {name} from host {host} (boot {}, {} records): {}\n{host} is judged by it from now on.\n",
        log.boot_id(),
        log.records(),
        show::summary(&policy),
    ))
}

fn allow(store: &Store, name: &str, set: &str, entry: Approved) -> Result<(), CliError> {
    let (kind, digest) = (entry.kind, entry.sha256);
    let mut new = 0;
    store.edit_policy(name, |policy| {
        new = policy.allow_all(set, vec![entry])?;
        Ok(())
    })?;
    let what = if new > 0 { "now allows" } else { "allowed already" };
    let deed = match kind {
        Some(kind) if kind.is_deed() => format!("{kind} by "),
        _ => String::new(),
    };
    print(&format!("policy {name} {what} {deed}sha256:{digest}\n"))
}

fn sign_list(state: &StateDir, store: &Store, args: &SignList) -> Result<(), CliError> {
    let lists = Lists::open(state)?;
    let expires = args
        .expires_in_days
        .map(|days| unix_now().saturating_add(days.saturating_mul(24 * 3600)));
    let (signed, name, whom) = match (&args.host, &args.policy) {
        (Some(host), _) => {
            let row = store.host(host)?;
            let name = row.pinned.policy.clone();
            let wanted = Wanted::of(&existing(store, &name)?);
            (
                lists.sign_for(store, &row, wanted, expires)?,
                name,
                format!("host {host}"),
            )
        }
        (None, name) => {
            let name = name.clone().unwrap_or_default();
            let policy = existing(store, &name)?;
            (
                lists.sign_for_all(store, &policy, expires)?,
                name,
                "every host".to_owned(),
            )
        }
    };
    let failed = |error| CliError::ListWrite(args.out.clone(), error);
    create_private(&args.out, format!("{}\n", signed.text).as_bytes()).map_err(failed)?;
    print(&format!(
        "approved list {} of policy {name} with {} digests for {whom} is in {}\nNext, on the host: assay-agent approve FILE\n",
        signed.head.serial,
        signed.head.entries,
        args.out.display(),
    ))
}

fn existing(store: &Store, name: &str) -> Result<Policy, CliError> {
    let policy = store.policy(name)?;
    Ok(policy.ok_or_else(|| StoreError::NoSuchPolicy(name.to_owned()))?)
}

pub(super) fn part_name(text: &str) -> Result<String, String> {
    if is_name(text) {
        Ok(text.to_owned())
    } else {
        Err(format!("1 to {MAX_NAME} letters, digits, '-', '_' or '.'"))
    }
}

fn digest(text: &str) -> Result<Sha256Digest, String> {
    sha256_hex(text).map(Sha256Digest::new)
}
