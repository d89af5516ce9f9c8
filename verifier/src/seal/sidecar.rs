//! The file beside an image whose format has no place for a token: `IMAGE.assay.json`, the very object that a LUKS2 header would hold.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use assay_evidence::token::{LuksToken, MAX_TOKEN, sidecar_path};

use super::SealError;

/// A sidecar whose image is not there yet; goes again unless it is kept.
pub(super) struct Sidecar(Option<PathBuf>);

impl Sidecar {
    /// The image is there.
    pub(super) fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            drop(fs::remove_file(path));
        }
    }
}

/// Writes the sidecar of an image that is about to get its name. Overwrites none but what an interrupted run left: there is no image yet.
pub(super) fn create(image: &Path, token: &LuksToken) -> Result<Sidecar, SealError> {
    let path = sidecar_path(image);
    if matches!(read(image), Ok(Some(_))) {
        drop(fs::remove_file(&path));
    }
    let failed = |operation| {
        let path = path.clone();
        move |source: io::Error| match source.kind() {
            io::ErrorKind::AlreadyExists => SealError::OutputExists(path),
            _ => SealError::Output {
                operation,
                path,
                source,
            },
        }
    };
    let mut json = token.to_json().map_err(SealError::Token)?.into_bytes();
    json.push(b'\n');
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&path)
        .map_err(failed("create"))?;
    let sidecar = Sidecar(Some(path.clone()));
    file.write_all(&json)
        .and_then(|()| file.sync_all())
        .map_err(failed("write"))?;
    Ok(sidecar)
}

/// Writes another token into the sidecar of an image: whole, or not at all.
pub(super) fn replace(image: &Path, token: &LuksToken) -> Result<(), SealError> {
    let path = sidecar_path(image);
    let mut json = token.to_json().map_err(SealError::Token)?.into_bytes();
    json.push(b'\n');
    crate::files::replace_private(&path, &json).map_err(|source| SealError::Output {
        operation: "replace",
        path,
        source,
    })
}

/// Reads the sidecar of an image; `None` where there is none.
pub(super) fn read(image: &Path) -> Result<Option<LuksToken>, SealError> {
    let path = sidecar_path(image);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            return Err(SealError::Input {
                operation: "open",
                path,
                source,
            });
        }
    };
    let mut json = Vec::new();
    // One byte more than fits, so that a longer file is refused and not cut.
    file.take(MAX_TOKEN as u64 + 1)
        .read_to_end(&mut json)
        .map_err(|source| SealError::Input {
            operation: "read",
            path,
            source,
        })?;
    LuksToken::parse(&json).map(Some).map_err(SealError::Token)
}
