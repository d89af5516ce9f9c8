//! Ways to have code loaded, each played in every mode and under IMA.

use assay_ebpf::flags;
use assay_evidence::event::{LoadKind, Mode};
use assay_tests::HarnessError;
use assay_tests::guest::Guest;

use crate::common::PATIENCE;
use crate::payload::{Payload, digest};
use crate::row::{Column, MODES, Outcome, Row};
use crate::scene::{EAGAIN, EPERM, Hook, Scene, UNTOLD, about, ima_has, ima_machine};

/// Marks that say where code came from.
const MARKS: u32 = flags::UNLINKED | flags::MEMFD | flags::TMPFS | flags::OVERLAY | flags::SCRIPT | flags::MODIFIED;

/// One way, and what must come of it.
#[derive(Clone, Copy)]
pub struct Way {
    /// For the table.
    pub name: &'static str,
    /// What is loaded.
    pub payload: Payload,
    /// The folder in which it is put.
    pub folder: &'static str,
    /// The digest in its record, from the payload.
    pub digest: fn(&[u8]) -> String,
    /// Has it loaded from that path.
    pub play: fn(&Guest, &str) -> Result<Hook, HarnessError>,
    /// As what it is recorded.
    pub kind: LoadKind,
    /// Where it came from, in the record.
    pub marks: u32,
    /// Whether hold lets it wait; otherwise the first try is refused.
    pub waits: bool,
    /// Whether hold lets it pass as observe does: it is recorded, and no danger to anybody but its owner.
    pub passes: bool,
    /// Whether what loads it tries again by itself after a refusal: where hold refuses the first try, the second may
    /// then go through, if the agent was quick.
    pub retries: bool,
    /// Whether Assay sees it at all.
    pub seen: bool,
    /// Whether IMA's log has it.
    pub ima: bool,
    /// Words of the verdict on what is done to have it loaded, if that is a reason in itself, in every mode.
    pub deed: Option<&'static str>,
}

impl Way {
    /// A program in a folder, run.
    pub fn program(name: &'static str, folder: &'static str) -> Self {
        Self {
            name,
            payload: Payload::Tiny,
            folder,
            digest,
            play: |guest, path| Hook::run(guest, &[path], crate::payload::EXIT),
            kind: LoadKind::Program,
            marks: 0,
            waits: true,
            passes: false,
            retries: false,
            seen: true,
            ima: true,
            deed: None,
        }
    }

    /// The file's place in this mode.
    fn path(&self, mode: &str) -> String {
        let name: String = self
            .name
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
            .collect();
        let ending = match self.payload {
            Payload::Module => ".ko",
            Payload::PackedModule => ".ko.xz",
            _ => "",
        };
        format!("{}/{name}-{mode}{ending}", self.folder)
    }

    /// Puts a new payload there; gives its digest.
    fn put(&self, guest: &Guest, path: &str) -> Result<String, HarnessError> {
        let bytes = self.payload.make(guest)?;
        guest.put(path, 0o755, &bytes)?;
        Ok((self.digest)(&bytes))
    }
}

/// Plays all ways in all modes, and under IMA, and writes them down.
pub fn play_all(row: &mut Row, scene: &mut Scene, ways: &[Way]) -> Result<(), HarnessError> {
    play_with(row, scene, ways, "true")
}

/// The same; the machine with IMA is first prepared with a shell script, as the scene was.
pub fn play_with(row: &mut Row, scene: &mut Scene, ways: &[Way], prepare: &str) -> Result<(), HarnessError> {
    // Made while nothing is refused: what makes them is not what is tried.
    let mut prepared = Vec::new();
    for &mode in MODES {
        let mut files = Vec::new();
        for way in ways {
            let path = way.path(mode.name());
            let digest = way.put(scene.guest(), &path)?;
            files.push((path, digest));
        }
        prepared.push((mode, files));
    }
    for (mode, files) in prepared {
        scene.enter(mode)?;
        for (way, (path, digest)) in ways.iter().zip(&files) {
            let outcome = play(scene, way, mode, path, digest)?;
            row.set(Column::Assay(mode), way.name, outcome);
        }
        // What is not in the log by now never will be.
        let log = scene.all_so_far()?;
        let mut seen = Vec::new();
        for (way, (_, digest)) in ways.iter().zip(files) {
            let name = format!("{}, {mode}", way.name);
            let records = about(&log, &digest);
            if !way.seen {
                assert!(records.is_empty(), "{name}: it is in the log: {records:?}");
                continue;
            }
            let passed = records.into_iter().find(|load| ran(load.flags));
            assert!(passed.is_none() || mode != Mode::Enforce, "{name}: {passed:?}");
            seen.push(digest);
        }
        let deed = ways.iter().find_map(|way| way.deed);
        judged(scene, mode, &seen, deed)?;
    }
    play_ima(row, ways, prepare)
}

/// The same ways in a machine with IMA.
fn play_ima(row: &mut Row, ways: &[Way], prepare: &str) -> Result<(), HarnessError> {
    let vm = ima_machine()?;
    let guest = vm.guest();
    guest.script(&format!("mkdir -p /root/m; {prepare}"))?;
    for way in ways {
        let path = way.path("ima");
        let digest = way.put(guest, &path)?;
        assert_eq!((way.play)(guest, &path)?, Hook::Passed, "{}", way.name);
        let has = ima_has(guest, &digest)?;
        assert_eq!(has, way.ima, "IMA: {}", way.name);
        row.set(
            Column::Ima,
            way.name,
            if has { Outcome::Recorded } else { Outcome::Unseen },
        );
    }
    Ok(())
}

fn play(scene: &Scene, way: &Way, mode: Mode, path: &str, digest: &str) -> Result<Outcome, HarnessError> {
    let name = format!("{}, {mode}", way.name);
    let go = || (way.play)(scene.guest(), path);
    if !way.seen {
        assert_eq!(go()?, Hook::Passed, "{name}");
        return Ok(Outcome::Unseen);
    }
    let first = go()?;
    let outcome = match mode {
        Mode::Enforce => {
            assert!(is_refusal(first, EPERM), "{name}: {first:?}");
            recorded(scene, way, digest, true)?;
            // Not only the first time.
            let second = go()?;
            assert!(is_refusal(second, EPERM), "{name}: {second:?}");
            return Ok(Outcome::Refused);
        }
        Mode::Hold if way.waits => {
            assert_eq!(first, Hook::Passed, "{name}");
            // By now, not soon: it was let through only afterwards.
            let log = scene.log()?;
            let loads = about(&log, digest);
            assert!(!loads.is_empty(), "{name}: it ran, and is not in the log");
            assert!(
                loads.iter().all(|load| load.flags & flags::REFUSED == 0),
                "{name}: {loads:?}"
            );
            Outcome::ExtendedFirst
        }
        Mode::Hold if !way.passes => {
            assert!(
                is_refusal(first, EAGAIN) || way.retries && first == Hook::Passed,
                "{name}: {first:?}"
            );
            // Also where it went through in the end: there is no first load without one.
            recorded(scene, way, digest, true)?;
            Guest::wait_for(&format!("{name} is refused for ever"), PATIENCE, || {
                Ok((go()? == Hook::Passed).then_some(()))
            })?;
            Outcome::RefusedFirst
        }
        Mode::Hold | Mode::Observe => {
            assert_eq!(first, Hook::Passed, "{name}");
            Outcome::Recorded
        }
    };
    recorded(scene, way, digest, false)?;
    Ok(outcome)
}

/// What was refused for good is no reason to distrust the host, and is told all the same; everything else is a reason, each
/// for itself.
fn judged(scene: &Scene, mode: Mode, digests: &[String], deed: Option<&str>) -> Result<(), HarnessError> {
    if mode == Mode::Enforce {
        let notes = match deed {
            Some(deed) => scene.distrusted_alone_for(deed)?,
            None => scene.still_trusted()?,
        };
        for digest in digests {
            assert!(
                notes.iter().any(|note| note.contains(digest)),
                "{digest} is not in {notes:?}"
            );
        }
        return Ok(());
    }
    let all = |reasons: &[String]| {
        digests
            .iter()
            .all(|digest| reasons.iter().any(|reason| reason.contains(digest)))
    };
    scene
        .stage
        .wait(&format!("untrusted for each of {digests:?}"), |host| {
            host.state == "untrusted" && all(&host.reasons)
        })?;
    Ok(())
}

/// Waits for the record: of a load, or of its refusal.
fn recorded(scene: &Scene, way: &Way, digest: &str, refused: bool) -> Result<(), HarnessError> {
    let what = format!(
        "{}: {} {digest}, marks {:#x}, refused: {refused}",
        way.name, way.kind, way.marks
    );
    scene.wait_log(&what, |log| {
        about(log, digest).iter().any(|load| {
            load.kind == way.kind && load.flags & MARKS == way.marks && (load.flags & flags::REFUSED != 0) == refused
        })
    })?;
    Ok(())
}

fn is_refusal(hook: Hook, errno: i32) -> bool {
    hook == Hook::Refused(errno) || hook == Hook::Refused(UNTOLD)
}

const fn ran(marks: u32) -> bool {
    marks & (flags::REFUSED | flags::AHEAD) == 0
}
