//! Many disks at once: for how much of that time does the TPM work?
//!
//! The software TPM is not emulated while all else in the machine is, so that it seems quicker than any TPM is beside a computer, and the
//! computing seems to take a share that it does not have. Therefore all is done a second time with a TPM whose commands take as long as
//! a discrete one's, times the machine's slowdown: all is slow by the same factor then, but for the verifier and the network, which are
//! quick. From the first storm alone the same share is reckoned once more, as if nothing of the computing went on beside the TPM.

use std::time::Duration;

use assay_tests::stats::quantile;
use assay_tests::storm::{self, Opened};
use assay_tests::vm::{Delays, Done, SlowTpm};

use crate::{HOST, Outcome, PATIENCE, Stage};

/// Longer than the storm on the slow TPM shall take it, fewer disks are opened.
const LONGEST: Duration = Duration::from_secs(330);
/// How often a verifier that was told nothing else asks a host; at the machine's pace here.
const POLL: Duration = Duration::from_secs(10);
/// Of what the TPM waits for, so many are told.
const LONGEST_IDLE: usize = 8;

/// A storm, and what was seen of it outside the agent.
struct Storm {
    disks: usize,
    opened: Opened,
    done: Done,
    verifier: Duration,
}

/// Both storms; prints their figures.
pub fn run(stage: &mut Stage, disks: usize, pace: f64) -> Outcome<()> {
    // Of a slowdown that was measured wrong nothing good would come.
    let pace = pace.clamp(1.0, 50.0);
    stage
        .verifier
        .poll_every(u32::try_from(POLL.mul_f64(pace).as_secs())?)?;
    stage
        .verifier
        .wait_host(HOST, "trusted", PATIENCE, |host| host.state == "trusted")?;

    let quick = storm(stage, disks)?;
    println!("\n{disks} disks at once, swtpm as it is");
    quick.print();
    let discrete = |done: &Done| done.with(&Delays::discrete(1.0));
    for (name, took) in [("swtpm", quick.done.busy()), ("a discrete TPM", discrete(&quick.done))] {
        let (alone, waited) = quick.shares_at(pace, took);
        println!(
            "  at the computer's own pace, nothing at the same time, {name}: {alone:.0} %, {waited:.0} % with its driver"
        );
    }

    let delays = Delays::discrete(pace);
    let one = quick.done.with(&delays) / u32::try_from(disks)?;
    let fewer = usize::try_from(LONGEST.as_millis() / one.as_millis().max(1))?.clamp(1, disks);
    let why = if fewer < disks {
        ": more would take too long"
    } else {
        ""
    };
    println!("\n{fewer} disks at once, a discrete TPM {pace:.1} times as slow{why}");
    tpm(stage)?.set_delays(delays);
    let slow = storm(stage, fewer)?;
    tpm(stage)?.set_delays(Delays::default());
    slow.print();
    println!(
        "  on the computer: TPM {:.0} ms an unlock, {fewer} disks within {:.1} s",
        millis(discrete(&slow.done)) / real(fewer),
        slow.opened.all.as_secs_f64() / pace
    );
    Ok(())
}

fn storm(stage: &Stage, disks: usize) -> Outcome<Storm> {
    let guest = stage.vm.guest();
    let computed = stage.verifier.processor_time()?;
    tpm(stage)?.count_anew();
    let opened = storm::open(guest, &stage.agent, disks)?;
    let done = tpm(stage)?.done();
    let verifier = stage.verifier.processor_time()?.saturating_sub(computed);
    storm::close(guest)?;
    Ok(Storm {
        disks,
        opened,
        done,
        verifier,
    })
}

fn tpm(stage: &Stage) -> Outcome<&SlowTpm> {
    stage
        .vm
        .slow_tpm()
        .ok_or_else(|| "the machine's TPM cannot be slow".into())
}

impl Storm {
    fn print(&self) {
        let Opened { all, each_ms, tpm } = &self.opened;
        let quantile = |share| quantile(each_ms.clone(), share);
        let disks = real(self.disks);
        println!(
            "  all open within {:.0} ms, p50 {:.0}, p99 {:.0}",
            millis(*all),
            quantile(0.5),
            quantile(0.99)
        );
        println!(
            "  TPM commands an unlock: {:.1}; in all {}",
            real(self.done.commands()) / disks,
            self.done
        );
        println!(
            "  an unlock in ms: TPM {:.1}, as the agent waits for it {:.1}, verifier's processor {:.1}, all {:.1}",
            millis(self.done.busy()) / disks,
            millis(*tpm) / disks,
            millis(self.verifier) / disks,
            millis(*all) / disks
        );
        let idle = self.done.idle().into_iter().take(LONGEST_IDLE);
        let idle = idle.map(|(name, idle)| format!("{:.1} for {name}", millis(idle) / disks));
        println!(
            "  the TPM waited, ms an unlock: {}",
            idle.collect::<Vec<_>>().join(", ")
        );
        println!(
            "  the TPM worked {:.0} % of the time; as the agent waits for it, its driver included, {:.0} %",
            percent(self.done.busy(), *all),
            percent(*tpm, *all)
        );
    }

    /// The TPM's share, and that of the agent's waiting for it, if it takes `tpm` for this storm, and all that the machine did while the
    /// TPM was idle took as much less time as the computer is quicker, but what the verifier computed, which it did on the computer.
    fn shares_at(&self, pace: f64, tpm: Duration) -> (f64, f64) {
        let Opened { all, tpm: waited, .. } = &self.opened;
        let driver = waited.saturating_sub(self.done.busy()).div_f64(pace);
        let rest = all.saturating_sub(*waited);
        let verifier = self.verifier.min(rest);
        let rest = verifier + (rest - verifier).div_f64(pace);
        let whole = tpm + driver + rest;
        (percent(tpm, whole), percent(tpm + driver, whole))
    }
}

fn percent(part: Duration, whole: Duration) -> f64 {
    100.0 * part.as_secs_f64() / whole.as_secs_f64()
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

#[expect(clippy::cast_precision_loss, reason = "thousands at most")]
fn real(count: impl TryInto<u64>) -> f64 {
    count.try_into().unwrap_or(u64::MAX) as f64
}
