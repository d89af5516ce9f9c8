//! Asking every host, again and again, and writing down how it stands.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use assay_evidence::ear::Submod;
use assay_evidence::quote::Judged;
use assay_evidence::replay::{HeldLog, ReplayedLog};
use assay_evidence::wire::ListStatus;
use ring::rand::{SecureRandom, SystemRandom};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::client::{Agent, Asker, ClientError, Pin};
use crate::config::Config;
use crate::judge::{self, Evidence, LookError};
use crate::leases::{Found, Leases, Standing, Watched};
use crate::lists::{Lists, Wanted};
use crate::memory::{Memory, Remembered};
use crate::nudges::Nudges;
use crate::store::{Host, HostState, Store, StoreError, Verdict};
use crate::time::unix_now;

/// Polls all enrolled hosts.
pub struct Poller {
    store: Store,
    how: How,
    nudges: Arc<Nudges>,
    interval: Duration,
}

/// What every look needs.
#[derive(Clone)]
struct How {
    asker: Asker,
    lists: Arc<Lists>,
    leases: Arc<Leases>,
    memory: Arc<Memory>,
    timeout: Duration,
    looks: Arc<Semaphore>,
}

impl Poller {
    /// Nothing is asked before [`Poller::run`].
    pub fn new(store: Store, asker: Asker, lists: Lists, leases: Leases, config: &Config) -> Self {
        let how = How {
            asker,
            lists: Arc::new(lists),
            leases: Arc::new(leases),
            memory: Arc::default(),
            timeout: config.quote_timeout,
            looks: Arc::new(Semaphore::new(MAX_LOOKS)),
        };
        Self {
            store,
            how,
            nudges: Arc::default(),
            interval: config.poll_interval,
        }
    }

    /// Where hosts ask for a look before their next poll.
    pub(crate) fn nudges(&self) -> Arc<Nudges> {
        self.nudges.clone()
    }

    /// Polls until the database fails: states that are not written down any more would look fresh.
    pub async fn run(self) -> Result<Infallible, StoreError> {
        let mut due: HashMap<i64, Instant> = HashMap::new();
        let mut looks = Looks::default();
        loop {
            let hosts = self.store.run(|s| s.hosts()).await?;
            due.retain(|id, _| hosts.iter().any(|h| h.id == *id));
            self.how.memory.retain(&hosts);
            for host in hosts {
                if looks.is_busy(host.id) || due.get(&host.id).is_some_and(|at| *at > Instant::now()) {
                    continue;
                }
                looks.begin(&self, host);
            }
            let pause = tokio::time::sleep(self.tick());
            tokio::pin!(pause);
            loop {
                let (asked, next) = self.nudges.take(Instant::now(), |id| looks.is_busy(id));
                for host in asked {
                    looks.begin(&self, host);
                }
                tokio::select! {
                    () = &mut pause => break,
                    () = self.nudges.asked() => {}
                    () = tokio::time::sleep(next.unwrap_or(FAR_AWAY)) => {}
                    Some(ended) = looks.running.join_next() => {
                        let id = ended.map_err(|_| StoreError::Interrupted)??;
                        looks.busy.remove(&id);
                        due.insert(id, Instant::now() + self.jittered());
                    }
                }
            }
        }
    }

    /// How often new and removed hosts are noticed.
    fn tick(&self) -> Duration {
        (self.interval / 4).clamp(Duration::from_millis(20), Duration::from_secs(1))
    }

    /// The interval, a tenth more or less: hosts that started together drift apart.
    fn jittered(&self) -> Duration {
        let mut byte = [0];
        // Without random numbers there is no jitter, and soon no nonce either, which is reported.
        let _no_jitter = SystemRandom::new().fill(&mut byte);
        let [byte] = byte;
        self.interval.mul_f64(0.9 + 0.2 * f64::from(byte) / 255.0)
    }
}

/// The looks under way, one at most of each host.
#[derive(Default)]
struct Looks {
    running: JoinSet<Result<i64, StoreError>>,
    busy: HashSet<i64>,
}

impl Looks {
    fn is_busy(&self, id: i64) -> bool {
        self.busy.contains(&id)
    }

    fn begin(&mut self, poller: &Poller, host: Host) {
        self.busy.insert(host.id);
        self.running.spawn(look(poller.store.clone(), poller.how.clone(), host));
    }
}

/// One look at one host, written down; gives back the host's id. Over the same connection the host then gets its approved
/// list, if that is another than the one it holds.
async fn look(store: Store, how: How, host: Host) -> Result<i64, StoreError> {
    let id = host.id;
    let Ok(_turn) = how.looks.acquire().await else {
        return Err(StoreError::Interrupted);
    };
    let (row, leases) = (host.clone(), how.leases.clone());
    let watched = store.run(move |s| leases.watched(s, &row)).await?;
    // What is remembered is a verdict by the host's own policy, and no other.
    let own = |watched: &Watched| watched.policy().is_none_or(|policy| policy == host.pinned.policy);
    let looked = if watched.iter().all(own) {
        look_for_news(&store, &how, &host).await?
    } else {
        Looked::NotKnown
    };
    let asked = match looked {
        Looked::Unchanged(mut agent, verdict) => {
            let found = Found::new(&host.pinned.policy, &verdict);
            how.leases.settle(&store, &host, &mut agent, watched, found).await?;
            return Ok(id);
        }
        Looked::News(asked) => *asked,
        Looked::NotKnown => {
            // What is held now, before asking: a key request can move it on meanwhile.
            let held = store.run(move |s| s.held_log(id)).await?;
            ask(&how.asker, &host, held, how.timeout, false).await
        }
    };
    let (asked, mut agent) = match asked {
        Ok((evidence, agent)) => (Ok(evidence), Some(agent)),
        Err(error) => (Err(error), None),
    };
    let row = host.clone();
    let Concluded {
        list,
        remembered,
        found,
        watched,
    } = store.run(move |s| conclude(s, &row, asked, watched)).await?;
    how.memory.forget(id);
    if agent.is_none() && !watched.is_empty() && found.speaks_against() {
        // Its evidence was none, and ended the connection; that it may not hold its keys is worth another.
        agent = connect(&how.asker, &host, how.timeout).await.ok();
    }
    let Some(mut agent) = agent else { return Ok(id) };
    how.leases.settle(&store, &host, &mut agent, watched, found).await?;
    if let Some(List { wanted, status }) = list {
        let settled = how
            .lists
            .deliver(&store, &host, &mut agent, status.as_ref(), wanted)
            .await?;
        // As long as there is a list to bring, each look must try.
        if let Some(remembered) = remembered.filter(|_| settled || status.is_none()) {
            how.memory.put(id, remembered);
        }
    }
    Ok(id)
}

/// What a look at a host of which the last verdict is remembered brought.
enum Looked {
    /// Nothing, and that is written down; what the host was judged then still holds.
    Unchanged(Box<Agent>, Box<Verdict>),
    /// Something, or the reason why not.
    News(Box<Result<(Evidence, Agent), LookError>>),
    /// Nothing is remembered that would help: the host must be asked for everything.
    NotKnown,
}

/// Asks a host whose last verdict is remembered for what is new since.
async fn look_for_news(store: &Store, how: &How, host: &Host) -> Result<Looked, StoreError> {
    let (id, policy) = (host.id, host.pinned.policy.clone());
    let known = store.run(move |s| Ok((s.held_log_head(id)?.0, s.policy_version(&policy)?)));
    let (held, version) = known.await?;
    let Some(known) = how.memory.of(host, version, &held, unix_now()) else {
        return Ok(Looked::NotKnown);
    };
    let asking = async {
        let mut agent = connect(&how.asker, host, how.timeout).await?;
        let evidence = Evidence::ask_for_news(&mut agent, held).await?;
        Ok(evidence.map(|evidence| (evidence, agent)))
    };
    let (mut evidence, agent) = match within(host, how.timeout, asking).await {
        Ok(Some(answer)) => answer,
        Ok(None) => return Ok(Looked::NotKnown),
        Err(error) => return Ok(Looked::News(Box::new(Err(error)))),
    };
    if evidence.approved() == known.status.as_ref() {
        if let Some(judged) = evidence.unchanged(host, &known.judged) {
            still_so(store, how, host, &known, judged).await?;
            return Ok(Looked::Unchanged(Box::new(agent), Box::new(known.verdict.clone())));
        }
        match went_on(store, how, host, &known, evidence).await? {
            // All that came is approved: it stays trusted.
            None => return Ok(Looked::Unchanged(Box::new(agent), Box::new(known.verdict.clone()))),
            Some(back) => evidence = back,
        }
    }
    let held = store.run(move |s| s.held_log(id)).await?;
    Ok(if evidence.complete(held, known.boot_log.as_deref().cloned()) {
        Looked::News(Box::new(Ok((evidence, agent))))
    } else {
        Looked::NotKnown
    })
}

/// Writes down that a host stands as it stood.
async fn still_so(store: &Store, how: &How, host: &Host, known: &Remembered, judged: Judged) -> Result<(), StoreError> {
    let (row, verdict, now) = (host.clone(), known.verdict.clone(), judged.held().clone());
    let written = store.run(move |s| {
        s.keep_clock(row.id, &now)?;
        write_down(s, &row, &verdict)
    });
    written.await?;
    tracing::debug!("host {}: nothing new", host.pinned.name);
    how.memory.put(host.id, known.at(judged));
    Ok(())
}

/// Judges a trusted host by what came since, and writes that down, if all of it is approved code. Otherwise gives the evidence
/// back.
async fn went_on(
    store: &Store,
    how: &How,
    host: &Host,
    known: &Arc<Remembered>,
    evidence: Evidence,
) -> Result<Option<Evidence>, StoreError> {
    let (row, remembered, memory) = (host.clone(), known.clone(), how.memory.clone());
    let work = move |s: &Store| {
        if remembered.verdict.state != HostState::Trusted {
            return Ok(Err(evidence));
        }
        let policy = memory.policy(s, &row.pinned.policy, remembered.policy)?;
        let judged = policy.and_then(|policy| evidence.progress(&row, &remembered.judged, &policy));
        let Some(judged) = judged else { return Ok(Err(evidence)) };
        if !s.append_log(row.id, &remembered.judged, &judged, evidence.news())? {
            return Ok(Err(evidence));
        }
        let now = remembered.at(judged);
        write_down(s, &row, &now.verdict)?;
        Ok(Ok(now))
    };
    match store.run(work).await? {
        Ok(now) => {
            let records = now.judged.held().records;
            tracing::debug!("host {}: went on to {records} records, all approved", host.pinned.name);
            how.memory.put(host.id, now);
            Ok(None)
        }
        Err(evidence) => Ok(Some(evidence)),
    }
}

/// What a host that gave good evidence should hold, and how its agent stands with that.
struct List {
    wanted: Wanted,
    status: Option<ListStatus>,
}

async fn connect(asker: &Asker, host: &Host, timeout: Duration) -> Result<Agent, LookError> {
    let pin = Pin::Expect(host.pinned.tls_spki_sha256);
    Ok(asker.connect(&host.pinned.address, pin, timeout).await?)
}

async fn ask(
    asker: &Asker,
    host: &Host,
    held: HeldLog,
    timeout: Duration,
    whole: bool,
) -> Result<(Evidence, Agent), LookError> {
    let asking = async {
        let mut agent = connect(asker, host, timeout).await?;
        Ok((Evidence::ask(&mut agent, held, whole).await?, agent))
    };
    within(host, timeout, asking).await
}

/// Each answer has its own limit, but a log can come in pages without end, and as long as a host is being asked its last state
/// stands.
async fn within<T>(
    host: &Host,
    timeout: Duration,
    asking: impl Future<Output = Result<T, LookError>>,
) -> Result<T, LookError> {
    let after = timeout.saturating_mul(ANSWERS);
    tokio::time::timeout(after, asking).await.unwrap_or_else(|_| {
        Err(LookError::Client(ClientError::Timeout {
            address: host.pinned.address.clone(),
            step: "give all its evidence".to_owned(),
            after,
        }))
    })
}

/// Looks at a host's whole log, verified and replayed. Writes nothing down.
pub async fn look_from_start(
    asker: &Asker,
    host: &Host,
    held: HeldLog,
    timeout: Duration,
) -> Result<ReplayedLog, LookError> {
    let (mut evidence, _) = ask(asker, host, held, timeout, true).await?;
    evidence.replay(host)
}

/// What follows from a verdict.
struct Concluded {
    list: Option<List>,
    remembered: Option<Remembered>,
    found: Found,
    watched: Vec<Watched>,
}

/// Judges what was asked, and writes down the verdict, and the log if it replayed. Gives the list that such a host should
/// hold, whatever the verdict: a host that ran something bad still needs to know what is good.
fn conclude(
    store: &Store,
    host: &Host,
    asked: Result<Evidence, LookError>,
    watched: Vec<Watched>,
) -> Result<Concluded, StoreError> {
    let replayed = asked.and_then(|mut evidence| Ok((evidence.replay(host)?, evidence)));
    let (mut list, mut remembered, mut others) = (None, None, BTreeMap::new());
    let verdict = match replayed {
        Ok((log, evidence)) => {
            // Before the policy: what is changed in between is judged by the next look.
            let version = store.policy_version(&host.pinned.policy)?;
            let policy = store.policy(&host.pinned.policy)?;
            let before = unix_now();
            let appraisal = judge::appraise(&log, policy.as_ref());
            let verdict = judge::verdict(&log, &host.pinned.policy, appraisal.as_ref());
            others = by_other_policies(store, host, &log, &watched)?;
            let status = evidence.approved().cloned();
            let until = policy.as_ref().and_then(|policy| policy.next_expiry(before));
            // What IMA measures is new with each look, and is judged whole.
            let version = version.filter(|_| !evidence.has_ima_log());
            remembered = version.map(|policy| Remembered {
                pinned: host.pinned.clone(),
                policy,
                until,
                judged: log.judged(),
                boot_log: evidence.boot_log().cloned().map(Arc::new),
                status: status.clone(),
                verdict: verdict.clone(),
            });
            store.keep_log(host.id, &log.into_held())?;
            list = policy.map(|policy| List {
                wanted: Wanted::of(&policy),
                status,
            });
            verdict
        }
        Err(error) => without_log(host, &error),
    };
    write_down(store, host, &verdict)?;
    let mut found = Found::new(&host.pinned.policy, &verdict);
    for (policy, standing) in others {
        found.put(&policy, standing);
    }
    if verdict.quoted.is_none() {
        found.put_for_all(&watched, &verdict);
    }
    Ok(Concluded {
        list,
        remembered,
        found,
        watched,
    })
}

/// How a host stands by the policies of keys that it holds, other than its own; nothing of a policy that does not exist.
fn by_other_policies(
    store: &Store,
    host: &Host,
    log: &ReplayedLog,
    watched: &[Watched],
) -> Result<BTreeMap<String, Standing>, StoreError> {
    let names: BTreeSet<_> = watched.iter().filter_map(Watched::policy).collect();
    let mut found = BTreeMap::new();
    for name in names.into_iter().filter(|name| *name != host.pinned.policy) {
        if let Some(appraisal) = judge::appraise(log, store.policy(name)?.as_ref()) {
            let standing = if appraisal.is_trusted() {
                Standing::Met(appraisal.tags().to_vec())
            } else {
                Standing::Unmet(judge::reasons(&appraisal))
            };
            found.insert(name.to_owned(), standing);
        }
    }
    Ok(found)
}

/// Stores a verdict and tells the journal of a change.
pub fn write_down(store: &Store, host: &Host, verdict: &Verdict) -> Result<(), StoreError> {
    if let Some(change) = store.record_verdict(host.id, verdict)? {
        let (from, to) = (change.from.name(), change.to.name());
        tracing::info!("host {}: {from} -> {to}", host.pinned.name);
        for reason in crate::serve::shorten(&verdict.reasons, MAX_LOGGED) {
            tracing::info!("host {}: {reason}", host.pinned.name);
        }
    }
    Ok(())
}

/// The verdict on a host that gave no usable evidence. What was bad about it before it went silent stays known.
fn without_log(host: &Host, error: &LookError) -> Verdict {
    let mut reasons = vec![judge::reason(error)];
    if error.state() == HostState::Unreachable {
        let before = host.reasons.iter();
        match host.state {
            HostState::Untrusted => reasons.extend(before.map(|r| format!("{BEFORE}{r}"))),
            HostState::Unreachable => reasons.extend(before.filter(|r| r.starts_with(BEFORE)).cloned()),
            HostState::Unknown | HostState::Trusted => {}
        }
    }
    let submod = match error.state() {
        HostState::Untrusted => Submod::bad_evidence(reasons.clone()),
        _ => Submod::no_evidence(reasons.clone()),
    };
    Verdict {
        state: error.state(),
        reasons,
        notes: Vec::new(),
        tags: Vec::new(),
        quoted: None,
        submod,
    }
}

const BEFORE: &str = "before that: ";
/// So many times the limit of one answer is the limit of one look.
const ANSWERS: u32 = 10;
/// Hosts asked at the same time.
const MAX_LOOKS: usize = 16;
/// Reasons in the journal at one change; `host show` has them all.
const MAX_LOGGED: usize = 20;
const FAR_AWAY: Duration = Duration::from_secs(365 * 24 * 3600);
