//! Writes inputs to begin with: `seeds FOLDER`, a folder for each target below it.

use std::error::Error;
use std::fs;
use std::path::Path;

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args().nth(1).ok_or("seeds FOLDER")?;
    for (target, _) in assay_fuzz::TARGETS {
        let folder = Path::new(&folder).join(target);
        fs::create_dir_all(&folder)?;
        for (number, sample) in assay_fuzz::samples(target).iter().enumerate() {
            fs::write(folder.join(format!("seed-{number}")), sample)?;
        }
    }
    Ok(())
}
