//! Saved machines: each is booted once, by whoever wants it first, and from then on restored.

use std::path::PathBuf;

use crate::HarnessError;

use super::{BootOptions, Image, Vm};

/// Boots until the firmware got along with the TPM.
const BOOTS: u32 = 4;

/// The folder with the image's saved machine, which is booted and saved if nobody has done so before.
pub(super) fn ensure(image: &Image) -> Result<PathBuf, HarnessError> {
    let saved = image.snapshot();
    if saved.exists() {
        return Ok(saved);
    }
    let action = |path: &PathBuf| format!("make {}", path.display());
    std::fs::create_dir_all(&image.saved).map_err(HarnessError::io(action(&image.saved)))?;
    // Tests run side by side, and so do test runs.
    let path = saved.with_extension("lock");
    let lock = std::fs::File::create(&path).map_err(HarnessError::io(action(&path)))?;
    lock.lock().map_err(HarnessError::io(action(&path)))?;
    if saved.exists() {
        return Ok(saved);
    }
    let part = saved.with_extension("part");
    // What an interrupted run left.
    let _ = std::fs::remove_dir_all(&part);
    boot(image)?.save(&part)?;
    std::fs::rename(&part, &saved).map_err(HarnessError::io(action(&saved)))?;
    Ok(saved)
}

/// A machine whose TPM is whole. SeaBIOS gives a TPM less than a second for a command, and shuts all its hierarchies when
/// it is late (`tpm20_set_failure`): on a machine under load that happens, and once saved it would be so for good.
fn boot(image: &Image) -> Result<Vm, HarnessError> {
    let mut booted = 0;
    loop {
        let vm = Vm::boot(image, &BootOptions::default())?;
        let state = vm.guest().run_ok(&["tpm2", "getcap", "properties-variable"])?;
        booted += 1;
        let endorsement = state.lines().find(|line| line.contains("ehEnable"));
        if endorsement.is_some_and(|line| line.ends_with('1')) {
            return Ok(vm);
        }
        if booted >= BOOTS {
            return Err(HarnessError::Guest {
                request: "use the TPM that the firmware left".to_owned(),
                message: format!("its hierarchies are shut after {booted} boots\n{state}"),
            });
        }
    }
}
