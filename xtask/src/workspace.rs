//! Where things are, and names for cached results made from their contents.

use std::fs::File;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::run::{Error, io};
use crate::ui::note;

/// The top of the source tree.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// Cargo's target folder.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// What xtask itself makes from this tree: kernel programs, the description of the test machine. Made if missing.
pub fn artifacts() -> Result<PathBuf, Error> {
    make_dir(target().join("assay"))
}

/// What outlives the tree and is shared by checkouts: tools, kernels, root filesystems. `ASSAY_CACHE` moves it.
pub fn cache(part: &str) -> Result<PathBuf, Error> {
    let variable = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let base = variable("ASSAY_CACHE")
        .or_else(|| variable("XDG_CACHE_HOME").map(|dir| dir.join("assay")))
        .or_else(|| variable("HOME").map(|dir| dir.join(".cache/assay")))
        .ok_or(Error::NoCache)?;
    make_dir(base.join(part))
}

/// Keeps other runs of xtask from making the same thing in the cache at the same time; given back on drop.
pub fn lock_cache() -> Result<File, Error> {
    let path = cache("")?.join("lock");
    let action = || format!("lock {}", path.display());
    let file = File::create(&path).map_err(io(action()))?;
    if file.try_lock().is_err() {
        note("waiting for another `cargo xtask` that is filling the cache");
        file.lock().map_err(io(action()))?;
    }
    Ok(file)
}

/// Makes a folder and those above it.
pub fn make_dir(dir: PathBuf) -> Result<PathBuf, Error> {
    std::fs::create_dir_all(&dir).map_err(io(format!("make {}", dir.display())))?;
    Ok(dir)
}

/// A short name for content: equal names, equal content.
pub struct Key(Sha256);

impl Key {
    /// Starts with what is being named and the version of its recipe.
    pub fn new(recipe: &str) -> Self {
        Self(Sha256::new()).text(recipe)
    }

    /// Adds a string.
    pub fn text(mut self, text: &str) -> Self {
        // The length in front keeps ("ab", "c") and ("a", "bc") apart.
        self.0.update((text.len() as u64).to_be_bytes());
        self.0.update(text);
        self
    }

    /// Adds a file's content.
    pub fn file(mut self, path: &Path) -> Result<Self, Error> {
        let bytes = std::fs::read(path).map_err(io(format!("read {}", path.display())))?;
        self.0.update((bytes.len() as u64).to_be_bytes());
        self.0.update(&bytes);
        Ok(self)
    }

    /// Adds every file below a folder, with its name.
    pub fn tree(self, dir: &Path) -> Result<Self, Error> {
        let action = || format!("list {}", dir.display());
        let mut entries = std::fs::read_dir(dir)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .map_err(io(action()))?;
        entries.sort_by_key(std::fs::DirEntry::file_name);
        entries.iter().try_fold(self, |key, entry| {
            let key = key.text(&entry.file_name().to_string_lossy());
            if entry.path().is_dir() {
                key.tree(&entry.path())
            } else {
                key.file(&entry.path())
            }
        })
    }

    /// 16 hexadecimal digits.
    pub fn name(self) -> String {
        hex::encode(self.0.finalize()).chars().take(16).collect()
    }
}
