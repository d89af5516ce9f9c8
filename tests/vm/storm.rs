//! A hundred machines that start at once, in a real kernel: each disk opens, none is left behind.

use std::time::Duration;

use assay_tests::stats::quantile;
use assay_tests::vm::{CC_CREATE_PRIMARY, Delays, Image, RestoreOptions, Vm};
use assay_tests::{HarnessError, agent, storm};

use crate::common::{Stage, enrolled, enrolled_on};

const DISKS: usize = 100;
/// On a TPM that takes seconds for each.
const FEW: usize = 8;
/// How much slower than a discrete TPM that one is: whoever waits for three others before it has waited for longer than a verifier waits
/// for a request, ten seconds.
const SLOWNESS: f64 = 13.0;

fn ready(stage: &Stage, disks: usize) -> Result<(), HarnessError> {
    storm::prepare(stage.vm.guest(), &stage.verifier, disks)?;
    // What the storm runs is known before it begins.
    agent::rehearse(stage.vm.guest())?;
    stage.capture()
}

#[test]
fn vm_a_hundred_disks_that_are_opened_at_once_all_open_and_none_is_left_behind() -> Result<(), HarnessError> {
    let stage = enrolled()?;
    let (guest, agent) = (stage.vm.guest(), &stage.agent);
    ready(&stage, DISKS)?;
    let opened = storm::open(guest, agent, DISKS)?;
    println!(
        "{DISKS} disks at once: all open within {} ms, p50 {} ms; the TPM worked {:.0} % of that time",
        opened.all.as_millis(),
        quantile(opened.each_ms, 0.5),
        100.0 * opened.tpm.as_secs_f64() / opened.all.as_secs_f64()
    );
    let devices = guest.run_ok(&["ls", "/dev/mapper"])?;
    assert_eq!(devices.matches("storm-").count(), DISKS, "{devices}");
    assert_eq!(agent.status()?["disks"].as_array().map(Vec::len), Some(DISKS));

    storm::close(guest)?;
    assert_eq!(guest.run_ok(&["ls", "/dev/mapper"])?.trim(), "control");
    assert_eq!(guest.run_ok(&["losetup", "-a"])?.trim(), "", "a loop device is left");
    assert_eq!(agent.status()?.get("disks"), None);
    Ok(())
}

#[test]
fn vm_disks_that_wait_for_a_slow_tpm_make_it_work_once_for_each() -> Result<(), HarnessError> {
    let options = RestoreOptions {
        extend_delay: Some(Duration::ZERO),
    };
    let mut stage = enrolled_on(Vm::restore_with(&Image::load()?, &options)?, "")?;
    ready(&stage, FEW)?;
    // Seldom, as the TPM is slow.
    stage.verifier.poll_every(60)?;
    let (guest, tpm) = (stage.vm.guest(), stage.vm.slow_tpm().expect("a proxy"));
    tpm.set_delays(Delays::discrete(SLOWNESS));
    tpm.count_anew();
    storm::open(guest, &stage.agent, FEW)?;
    let done = tpm.done();
    tpm.set_delays(Delays::default());
    // A key that a broken connection made useless is made again.
    assert_eq!(done.count(CC_CREATE_PRIMARY), 8, "{done}\n{}", stage.agent.journal());
    storm::close(guest)
}
