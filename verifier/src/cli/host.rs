//! `assay-verifier host …`: enrolling hosts and looking at them.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::PathBuf;

use assay_evidence::digest::Sha256Digest;
use assay_evidence::ear::Nonce;
use assay_evidence::ek::EkTrust;
use assay_evidence::pcr::RuntimePcr;
use clap::{ArgGroup, Args, Subcommand};

use super::{CliError, block_on, print, print_json};
use crate::client::Asker;
use crate::config::{Config, StateDir};
use crate::enrol::{Request, enrol};
use crate::store::{Host, HostList, Measuring, Store, StoreError};
use crate::time::rfc3339;
use crate::verdicts::{Fresh, Verdicts};

/// Subcommands of `host`.
#[derive(Debug, Subcommand)]
pub(super) enum HostCommand {
    /// Enrol a host: check its TPM, pin its attestation key and its TLS key
    Add(Add),
    /// List all hosts and how they stand
    List {
        /// As JSON, for programs
        #[arg(long)]
        json: bool,
    },
    /// Show one host, with every reason for its state
    Show {
        /// The host
        name: String,
        /// As JSON, for programs
        #[arg(long)]
        json: bool,
    },
    /// Judge a host by another policy from now on: all that are judged by one are a group
    SetPolicy {
        /// The host
        name: String,
        /// The policy; it must exist
        policy: String,
    },
    /// Give a host tags, which keys can demand of it (`image seal --require-tag`); shows those that it has then
    Tag {
        /// The host
        name: String,
        /// A tag that it gets
        #[arg(long, value_name = "TAG")]
        add: Vec<String>,
        /// A tag that it loses
        #[arg(long, value_name = "TAG")]
        remove: Vec<String>,
    },
    /// Show the verdict on a host as relying parties get it (EAT Attestation Result), while it is fresh
    Verdict {
        /// The host
        name: String,
        /// As a signed token (JWT), for who checks it by the key that `verdict-key` shows
        #[arg(long)]
        jwt: bool,
        /// The token's claims as JSON, not signed
        #[arg(long, conflicts_with = "jwt")]
        json: bool,
        /// What the relying party gave, to see that the result is for it: 8 to 64 bytes in base64url
        #[arg(long, value_name = "BASE64URL", value_parser = Nonce::parse)]
        nonce: Option<Nonce>,
    },
    /// Show the public key that verdicts are checked by, as a JSON Web Key
    VerdictKey {
        /// As PEM (SubjectPublicKeyInfo)
        #[arg(long)]
        pem: bool,
    },
    /// Forget a host, its pins and its log; it gets no more keys
    Remove {
        /// The host
        name: String,
    },
}

/// Options of `host add`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("trust").required(true).args(["ek_sha256", "ek_ca"])))]
pub(super) struct Add {
    /// Name for the host (letters, digits, '.', '_', '-')
    name: String,
    /// Where its agent listens
    #[arg(value_name = "ADDRESS:PORT")]
    address: String,
    /// Trust the TPM whose endorsement key has this SHA-256 (`assay-agent status` on the host shows it)
    #[arg(long, value_name = "HEX", value_parser = sha256_hex)]
    ek_sha256: Option<[u8; 32]>,
    /// Trust TPMs whose endorsement certificate chains to one of these CA certificates (PEM or DER)
    #[arg(long, value_name = "FILE", num_args = 1..)]
    ek_ca: Vec<PathBuf>,
    /// PCR of its runtime log, as `tpm.pcr` in its agent's configuration says: 12, 13 or 14
    #[arg(long, value_name = "N", default_value_t = RuntimePcr::DEFAULT, value_parser = runtime_pcr)]
    pcr: RuntimePcr,
    /// Name of the policy that judges it; it need not exist yet
    #[arg(long, value_name = "NAME", default_value = "default")]
    policy: String,
}

/// Parses 64 hex characters.
pub(super) fn sha256_hex(text: &str) -> Result<[u8; 32], String> {
    let mut digest = [0; 32];
    hex::decode_to_slice(text.strip_prefix("sha256:").unwrap_or(text), &mut digest)
        .map_err(|_| "a SHA-256 digest has 64 hex characters".to_owned())?;
    Ok(digest)
}

fn runtime_pcr(text: &str) -> Result<RuntimePcr, String> {
    let index = text
        .parse()
        .map_err(|_| "it is 12, 13 (the default) or 14".to_owned())?;
    RuntimePcr::new(index).map_err(|e| e.to_string())
}

pub(super) fn run(state: &StateDir, command: HostCommand) -> Result<(), CliError> {
    let config = Config::load(state)?;
    let store = Store::open(&state.database())?;
    match command {
        HostCommand::Add(args) => add(state, &config, &store, args),
        HostCommand::List { json: true } => print_json(&store.hosts()?.iter().map(Host::to_json).collect()),
        HostCommand::List { json: false } => print(&list(&store.hosts()?)),
        HostCommand::Show { name, json: true } => print_json(&store.host(&name)?.to_json()),
        HostCommand::Show { name, json: false } => print(&show(&store.host(&name)?)),
        HostCommand::SetPolicy { name, policy } => {
            if store.policy_version(&policy)?.is_none() {
                return Err(StoreError::NoSuchPolicy(policy).into());
            }
            store.set_host_policy(&name, &policy)?;
            print(&format!("{name} is judged by policy {policy} from now on\n"))
        }
        HostCommand::Tag { name, add, remove } => {
            let tags = store.tag_host(&name, &add, &remove)?;
            print(&format!("{name}: {}\n", listed(&tags)))
        }
        HostCommand::Verdict { name, jwt, json, nonce } => {
            let verdicts = Verdicts::open(state, &config)?;
            let fresh = verdicts.fresh(&store, &name)?;
            match (jwt, json) {
                (true, _) => print(&format!("{}\n", verdicts.token(&fresh, nonce.as_ref())?)),
                (_, true) => print_json(&fresh.to_json(nonce.as_ref())?),
                _ => print(&verdict(&store.host(&name)?, &fresh)),
            }
        }
        HostCommand::VerdictKey { pem } => {
            let verdicts = Verdicts::open(state, &config)?;
            if pem {
                print(&verdicts.key().pem())
            } else {
                print(&format!("{}\n", verdicts.key().jwk()))
            }
        }
        HostCommand::Remove { name } => {
            store.remove_host(&name)?;
            print(&format!("removed {name}; it gets no more keys\n"))
        }
    }
}

fn add(state: &StateDir, config: &Config, store: &Store, args: Add) -> Result<(), CliError> {
    let trust = match args.ek_sha256 {
        Some(digest) => EkTrust::PinnedSha256(Sha256Digest::new(digest)),
        None => EkTrust::Roots(read_roots(&args.ek_ca)?),
    };
    crate::store::valid_name(&args.policy)?;
    let request = Request {
        name: args.name,
        address: args.address,
        trust,
        pcr: args.pcr,
        policy: args.policy,
    };
    let asker = Asker::load(state)?;
    let host = block_on(async { Ok(enrol(store, &asker, &request, config.quote_timeout).await?) })?;
    print(&format!(
        "enrolled {}\n  EK  sha256 {}\n  AK  name   {}\n  TLS sha256 {}\n",
        host.name,
        hex::encode(host.ek_sha256),
        hex::encode(&host.ak_name),
        hex::encode(host.tls_spki_sha256),
    ))?;
    match store.policy(&host.policy)? {
        Some(_) => print(&format!("It is judged by policy {}.\n", host.policy)),
        None => print(&format!(
            "Next, while the host is known to be good: assay-verifier policy capture {} --name {}\n",
            host.name, host.policy
        )),
    }
}

fn read_roots(files: &[PathBuf]) -> Result<Vec<Vec<u8>>, CliError> {
    let mut roots = Vec::new();
    for path in files {
        let bytes = std::fs::read(path).map_err(|e| CliError::CaRead(path.clone(), e))?;
        roots.extend(EkTrust::read_ca_file(&bytes).map_err(|e| CliError::CaFile(path.clone(), e))?);
    }
    Ok(roots)
}

fn list(hosts: &[Host]) -> String {
    if hosts.is_empty() {
        return "no hosts: enrol one with `assay-verifier host add`\n".to_owned();
    }
    let width = hosts.iter().map(|h| h.pinned.name.len()).max().unwrap_or(0).max(4);
    let mut text = format!("{:width$}  {:11}  {:20}  FIRST REASON\n", "NAME", "STATE", "SINCE");
    for host in hosts {
        let reason = match host.reasons.as_slice() {
            [] => String::new(),
            [only] => only.clone(),
            [first, rest @ ..] => format!("{first} (and {} more)", rest.len()),
        };
        let _infallible = writeln!(
            text,
            "{:width$}  {:11}  {:20}  {reason}",
            host.pinned.name,
            host.state.name(),
            rfc3339(host.since)
        );
    }
    text
}

/// How a host stands, and every reason.
fn stands(host: &Host) -> String {
    let (name, state) = (&host.pinned.name, host.state.name());
    let mut text = format!("{name}: {state} since {}\n", rfc3339(host.since));
    for reason in &host.reasons {
        let _infallible = writeln!(text, "  {reason}");
    }
    for note in &host.notes {
        let _infallible = writeln!(text, "  note: {note}");
    }
    text
}

fn verdict(host: &Host, fresh: &Fresh) -> String {
    let standing = fresh.standing();
    let mut text = stands(host);
    let _infallible = write!(
        text,
        "EAR status  {}\njudged      {}\ngood until  {}\n",
        standing.submod.status().name(),
        rfc3339(standing.judged),
        rfc3339(fresh.expires()),
    );
    text
}

fn show(host: &Host) -> String {
    let pinned = &host.pinned;
    let mut text = stands(host);
    let unknown = || "-".to_owned();
    let _infallible = write!(
        text,
        "address     {}\npolicy      {}\ntags        {}\nruntime PCR {}\nmeasuring   {}\napproved    {}\nlast quote  {}\nboot id     {}\nrecords     {}\nEK sha256   {}\nAK name     {}\nTLS sha256  {}\n",
        pinned.address,
        pinned.policy,
        listed(&host.tags),
        pinned.pcr,
        host.measuring.as_ref().map_or_else(unknown, measuring),
        host.list.as_ref().map_or_else(unknown, approved),
        host.last_quote.map_or_else(unknown, rfc3339),
        host.boot_id.clone().unwrap_or_else(unknown),
        host.records,
        hex::encode(pinned.ek_sha256),
        hex::encode(&pinned.ak_name),
        hex::encode(pinned.tls_spki_sha256),
    );
    text
}

/// Tags in one line.
fn listed(tags: &BTreeSet<String>) -> String {
    if tags.is_empty() {
        "-".to_owned()
    } else {
        tags.iter().map(String::as_str).collect::<Vec<_>>().join(" ")
    }
}

/// Which list of what may run in enforce mode the host has.
fn approved(list: &HostList) -> String {
    match (&list.problem, list.serial) {
        (None, serial) => format!("list {serial}, held"),
        (Some(problem), 0) => format!("no list: {problem}"),
        (Some(problem), serial) => format!("list {serial}, not held: {problem}"),
    }
}

/// Tier, mode and protection, and what the tier cannot see.
fn measuring(how: &Measuring) -> String {
    let protected = if how.protected { "protected" } else { "not protected" };
    let mut text = format!("tier {}, mode {}, agent {protected} from root", how.tier, how.mode);
    if !how.blind.is_empty() {
        text.push_str("\ncannot see  ");
        text.extend(how.blind.escape_debug());
    }
    text
}
