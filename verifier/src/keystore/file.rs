//! One encrypted file per key under `keys/` of the state directory, all under one master key file.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use assay_evidence::uuid::Uuid;
use zeroize::Zeroizing;

use super::{
    KeyInfo, KeySource, KeyStoreError, Listing, Passphrase, StoredKey,
    format::{self, MASTER_LEN, MAX_FILE, MasterKey},
    io::{failed, fill_random, private_dir, read_private, sync_parent, write_new_private},
};

/// Name of the master key file in the state directory.
pub const MASTER_FILE: &str = "keystore.key";
/// Name of the directory of key files in the state directory.
pub const KEY_DIR: &str = "keys";

/// Makes the master key file (32 random bytes, mode 0600) and the empty key directory (0700).
///
/// # Errors
/// [`KeyStoreError::MasterExists`] rather than overwriting one, since all stored keys depend on it;
/// [`KeyStoreError::Io`] when the state directory can't be written.
pub fn create_master(state_dir: &Path) -> Result<(), KeyStoreError> {
    let path = state_dir.join(MASTER_FILE);
    let mut key = Zeroizing::new([0_u8; MASTER_LEN]);
    fill_random(key.as_mut())?;
    private_dir(&state_dir.join(KEY_DIR))?;
    write_new_private(&path, key.as_ref()).map_err(|error| match error {
        KeyStoreError::Io { source, .. } if source.kind() == io::ErrorKind::AlreadyExists => {
            KeyStoreError::MasterExists { path }
        }
        other => other,
    })
}

/// The key store in files.
pub struct FileKeyStore {
    dir: PathBuf,
    master: MasterKey,
}

impl FileKeyStore {
    /// Opens the key store of a state directory.
    ///
    /// # Errors
    /// [`KeyStoreError::MasterMissing`], [`KeyStoreError::MasterSize`] and [`KeyStoreError::Permissions`] for the
    /// master key file or the key directory; [`KeyStoreError::Io`] when they can't be read.
    pub fn open(state_dir: &Path) -> Result<Self, KeyStoreError> {
        let path = state_dir.join(MASTER_FILE);
        let bytes = read_private(&path, MAX_FILE).map_err(|error| match error {
            KeyStoreError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                KeyStoreError::MasterMissing { path: path.clone() }
            }
            KeyStoreError::TooLong { len, .. } => KeyStoreError::MasterSize {
                path: path.clone(),
                len,
            },
            other => other,
        })?;
        let master = MasterKey::new(&bytes).ok_or_else(|| KeyStoreError::MasterSize {
            path,
            len: u64::try_from(bytes.len()).unwrap_or(u64::MAX),
        })?;
        let dir = state_dir.join(KEY_DIR);
        private_dir(&dir)?;
        Ok(Self { dir, master })
    }

    fn path_of(&self, key_id: Uuid) -> PathBuf {
        self.dir.join(format!("{key_id}.json"))
    }

    fn read(&self, key_id: Uuid, path: &Path) -> Result<StoredKey, KeyStoreError> {
        let key = format::open(&self.master, path, &read_private(path, MAX_FILE)?)?;
        if key.info.key_id != key_id {
            return Err(KeyStoreError::Renamed {
                path: path.to_owned(),
                key_id: key.info.key_id,
            });
        }
        Ok(key)
    }

    /// The id that a file's name stands for, in exactly the form that [`Self::path_of`] gives it.
    fn id_of(&self, path: &Path) -> Result<Uuid, KeyStoreError> {
        path.file_stem()
            .and_then(|stem| stem.to_str())
            .and_then(|stem| stem.parse().ok())
            .filter(|id| self.path_of(*id) == path)
            .ok_or_else(|| KeyStoreError::StrangeFile { path: path.to_owned() })
    }
}

impl KeySource for FileKeyStore {
    fn get(&self, key_id: Uuid) -> Result<StoredKey, KeyStoreError> {
        self.read(key_id, &self.path_of(key_id))
            .map_err(|error| not_found(error, key_id))
    }

    fn list(&self) -> Result<Listing, KeyStoreError> {
        let mut listing = Listing::default();
        let entries = fs::read_dir(&self.dir).map_err(failed("list", &self.dir))?;
        for entry in entries {
            let path = entry.map_err(failed("list", &self.dir))?.path();
            if path.extension().is_some_and(|extension| extension == "partial") {
                continue; // A key being written, or what a crash left of one: nobody was told of it.
            }
            match self.id_of(&path).and_then(|key_id| self.read(key_id, &path)) {
                Ok(key) => listing.keys.push(key.info),
                // Removed between listing and reading.
                Err(KeyStoreError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                Err(error) => listing.damaged.push(error),
            }
        }
        listing.keys.sort_by_key(|info| (info.created, info.key_id));
        Ok(listing)
    }

    fn put(&self, info: &KeyInfo, passphrase: &Passphrase) -> Result<(), KeyStoreError> {
        let bytes = format::seal(&self.master, info, passphrase)?;
        write_new_private(&self.path_of(info.key_id), &bytes).map_err(|error| match error {
            KeyStoreError::Io { source, .. } if source.kind() == io::ErrorKind::AlreadyExists => {
                KeyStoreError::Exists { key_id: info.key_id }
            }
            other => other,
        })
    }

    fn remove(&self, key_id: Uuid) -> Result<(), KeyStoreError> {
        let path = self.path_of(key_id);
        fs::remove_file(&path)
            .map_err(failed("remove", &path))
            .map_err(|error| not_found(error, key_id))?;
        sync_parent(&path)
    }
}

fn not_found(error: KeyStoreError, key_id: Uuid) -> KeyStoreError {
    match error {
        KeyStoreError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
            KeyStoreError::NotFound { key_id }
        }
        other => other,
    }
}
