//! `assay-verifier policy …`: known-good values.

use std::fmt::Write as _;
use std::path::PathBuf;

use assay_evidence::digest::Sha256Digest;
use assay_evidence::event::LoadKind;
use assay_evidence::policy::Policy;
use clap::{ArgGroup, Args, Subcommand};

use super::host::sha256_hex;
use super::{CliError, block_on, print, print_json};
use crate::client::Asker;
use crate::config::{Config, StateDir};
use crate::files::create_private;
use crate::lists::{Lists, Wanted};
use crate::poll;
use crate::store::{Store, StoreError, valid_name};
use crate::time::{now, rfc3339};

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
        /// Name of the policy
        #[arg(long, default_value = "default")]
        name: String,
    },
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
    let config = Config::load(state)?;
    let store = Store::open(&state.database())?;
    match command {
        PolicyCommand::Capture {
            host,
            name,
            replace,
            add,
        } => {
            let existing = match (replace, add) {
                (true, _) => Existing::Replace,
                (_, true) => Existing::Add,
                _ => Existing::Keep,
            };
            capture(state, &config, &store, &host, &name, existing)
        }
        PolicyCommand::Show { name: None, json } => list(&store, json),
        PolicyCommand::Show { name: Some(name), json } => show(&store, &name, json),
        PolicyCommand::Allow {
            digest,
            path,
            kind,
            name,
        } => allow(&store, digest, kind, path.as_deref(), &name),
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

fn capture(
    state: &StateDir,
    config: &Config,
    store: &Store,
    host: &str,
    name: &str,
    existing: Existing,
) -> Result<(), CliError> {
    valid_name(name)?;
    let row = store.host(host)?;
    let known = store.policy(name)?.is_some();
    if known && existing == Existing::Keep {
        return Err(CliError::PolicyExists(name.to_owned()));
    }
    let asker = Asker::load(state)?;
    let held = store.held_log(row.id)?;
    let log = block_on(async { Ok(poll::look_from_start(&asker, &row, held, config.quote_timeout).await?) })?;
    let captured = Policy::capture(name, &log).map_err(CliError::Policy)?;
    if known && existing == Existing::Add {
        store.edit_policy(name, |policy| policy.merge(&captured))?;
    } else if !store.put_policy(name, &captured, existing == Existing::Replace)? {
        // Somebody else was quicker.
        return Err(CliError::PolicyExists(name.to_owned()));
    }
    store.set_host_policy(host, name)?;
    let policy = store.policy(name)?.unwrap_or(captured);
    print(&format!(
        "captured policy {name} from host {host} (boot {}, {} records): {}\n{host} is judged by it from now on.\n",
        log.boot_id(),
        log.records(),
        summary(&policy),
    ))
}

fn allow(
    store: &Store,
    digest: Sha256Digest,
    kind: Option<LoadKind>,
    path: Option<&str>,
    name: &str,
) -> Result<(), CliError> {
    let mut new = false;
    store.edit_policy(name, |policy| {
        new = policy.allow(digest, kind, path)?;
        Ok(())
    })?;
    let what = if new { "now allows" } else { "allowed already" };
    let deed = match kind {
        Some(kind) if kind.is_deed() => format!("{kind} by "),
        _ => String::new(),
    };
    print(&format!("policy {name} {what} {deed}sha256:{digest}\n"))
}

fn sign_list(state: &StateDir, store: &Store, args: &SignList) -> Result<(), CliError> {
    let lists = Lists::open(state)?;
    let expires = args.expires_in_days.map(|days| {
        let now = u64::try_from(now()).unwrap_or_default();
        now.saturating_add(days.saturating_mul(24 * 3600))
    });
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

fn list(store: &Store, json: bool) -> Result<(), CliError> {
    let policies = store.policies()?;
    if json {
        return print_json(
            &policies
                .iter()
                .map(|(name, at)| serde_json::json!({"name": name, "updated": rfc3339(*at)}))
                .collect(),
        );
    }
    if policies.is_empty() {
        return print("no policies: make one with `assay-verifier policy capture HOST`\n");
    }
    let width = policies.iter().map(|(name, _)| name.len()).max().unwrap_or(0).max(4);
    let mut text = format!("{:width$}  CHANGED\n", "NAME");
    for (name, at) in &policies {
        let _infallible = writeln!(text, "{name:width$}  {}", rfc3339(*at));
    }
    print(&text)
}

fn show(store: &Store, name: &str, json: bool) -> Result<(), CliError> {
    let policy = existing(store, name)?;
    if json {
        return print(&policy.to_json());
    }
    let mut text = format!("{name}: {}\n", summary(&policy));
    for (title, digests) in [
        ("agent", policy.agents()),
        ("kernel programs", policy.kernel_programs()),
    ] {
        for digest in digests {
            let _infallible = writeln!(text, "{title:15}  sha256:{digest}");
        }
    }
    for (pcr, values) in policy.pcrs() {
        for value in values {
            let _infallible = writeln!(text, "PCR {pcr:<11}  {value}");
        }
    }
    for entry in policy.runtime() {
        let kind = entry.kind.map_or("any", LoadKind::name);
        let _infallible = writeln!(
            text,
            "{kind:15}  sha256:{}  {}",
            entry.sha256,
            entry.path.escape_debug()
        );
    }
    print(&text)
}

fn summary(policy: &Policy) -> String {
    let pcrs = policy.pcrs().values().filter(|values| !values.is_empty()).count();
    let deeds = match policy.deeds() {
        0 => String::new(),
        number => format!(", {number} permitted deeds"),
    };
    format!("{} digests{deeds}, {pcrs} boot PCRs", policy.digests())
}

fn digest(text: &str) -> Result<Sha256Digest, String> {
    sha256_hex(text).map(Sha256Digest::new)
}
