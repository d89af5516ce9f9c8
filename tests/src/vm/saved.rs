//! Saved machines: each is booted once, by whoever wants it first, and from then on restored.

use std::path::PathBuf;

use crate::HarnessError;

use super::{BootOptions, Image, Vm};

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
    Vm::boot(image, &BootOptions::default())?.save(&part)?;
    std::fs::rename(&part, &saved).map_err(HarnessError::io(action(&saved)))?;
    Ok(saved)
}
