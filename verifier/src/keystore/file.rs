//! One encrypted file per key under `keys/` of the state directory, all under one master key file; of a key in two halves, what a
//! server of secrets does not have.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use assay_evidence::terms::Terms;
use assay_evidence::uuid::Uuid;
use zeroize::Zeroizing;

use crate::files::replace_private;

use super::{
    Held, KeyInfo, KeySource, KeyStoreError, Listing, Passphrase, SecretsServer, StoredKey,
    format::{self, Kept, KeptKey, MASTER_LEN, MAX_FILE, MasterKey},
    half,
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
    server: Option<Box<dyn SecretsServer>>,
}

/// Where a key's secret is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Whole, in the key store's own file.
    Files,
    /// In two halves, one of them in the key source that is configured.
    Source,
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
        Ok(Self {
            dir,
            master,
            server: None,
        })
    }

    /// With a server that has one half of each new key, and of those that say so.
    #[must_use]
    pub fn with_server(self, server: Box<dyn SecretsServer>) -> Self {
        Self {
            server: Some(server),
            ..self
        }
    }

    /// Moves a key's secret; what it belongs to stays as it is. A crash leaves it where it was, or where it shall be; in a
    /// key source it may leave a half of no key.
    ///
    /// # Errors
    /// [`KeyStoreError::Stays`] when it is there already, [`KeyStoreError::NoTarget`] without a key source; those of [`KeySource::get`]
    /// and of the server.
    pub fn move_to(&self, key_id: Uuid, place: Place) -> Result<(), KeyStoreError> {
        let kept = self.kept(key_id)?;
        let stays = |place| KeyStoreError::Stays { key_id, place };
        let before = kept.secret.held().cloned();
        let secret = match (place, &before) {
            (Place::Files, None) => return Err(stays("in the key store's files")),
            (Place::Source, Some(_)) => return Err(stays("in a key source")),
            (Place::Source, None) if self.server.is_none() => return Err(KeyStoreError::NoTarget),
            (Place::Source, None) => self.split(key_id, &self.whole(kept.info.clone(), kept.secret)?.passphrase)?,
            (Place::Files, Some(_)) => Kept::Whole(self.whole(kept.info.clone(), kept.secret)?.passphrase),
        };
        self.replace(&kept.info, &secret)?;
        match &before {
            None => Ok(()),
            Some(held) => self.server_for(key_id, held)?.forget(held),
        }
    }

    fn path_of(&self, key_id: Uuid) -> PathBuf {
        self.dir.join(format!("{key_id}.json"))
    }

    fn kept(&self, key_id: Uuid) -> Result<KeptKey, KeyStoreError> {
        self.read(key_id, &self.path_of(key_id))
            .map_err(|error| not_found(error, key_id))
    }

    /// The key with its secret, wherever that is.
    fn whole(&self, info: KeyInfo, secret: Kept) -> Result<StoredKey, KeyStoreError> {
        let passphrase = match secret {
            Kept::Whole(passphrase) => passphrase,
            Kept::Rest { held, rest } => {
                let half = self.server_for(info.key_id, &held)?.reveal(&held)?;
                half::join(info.key_id, &half, &rest)
                    .and_then(|clear| format::secret_of(info.kind, clear))
                    .ok_or(KeyStoreError::OtherHalf { key_id: info.key_id })?
            }
        };
        Ok(StoredKey { info, passphrase })
    }

    /// Gives one half to the server.
    fn split(&self, key_id: Uuid, passphrase: &Passphrase) -> Result<Kept, KeyStoreError> {
        let server = self.server.as_ref().ok_or(KeyStoreError::NoTarget)?;
        let (half, rest) = half::split(key_id, passphrase)?;
        let held = server.keep(key_id, &half)?;
        Ok(Kept::Rest { held, rest })
    }

    fn server_for(&self, key_id: Uuid, held: &Held) -> Result<&dyn SecretsServer, KeyStoreError> {
        let engine = held.engine();
        self.server.as_deref().ok_or(KeyStoreError::NoSource { key_id, engine })
    }

    fn replace(&self, info: &KeyInfo, secret: &Kept) -> Result<(), KeyStoreError> {
        let bytes = format::seal(&self.master, info, secret.bytes(), secret.held())?;
        let path = self.path_of(info.key_id);
        replace_private(&path, &bytes).map_err(failed("replace", &path))
    }

    fn read(&self, key_id: Uuid, path: &Path) -> Result<KeptKey, KeyStoreError> {
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
        let KeptKey { info, secret } = self.kept(key_id)?;
        self.whole(info, secret)
    }

    fn describe(&self, key_id: Uuid) -> Result<KeyInfo, KeyStoreError> {
        Ok(self.kept(key_id)?.info)
    }

    fn list(&self) -> Result<Listing, KeyStoreError> {
        let mut listing = Listing::default();
        let entries = fs::read_dir(&self.dir).map_err(failed("list", &self.dir))?;
        for entry in entries {
            let path = entry.map_err(failed("list", &self.dir))?.path();
            if path.extension().is_some_and(|extension| extension == "partial") {
                continue; // A key being written, or what a crash left of one: nobody was told of it.
            }
            let read = self.id_of(&path).and_then(|key_id| self.read(key_id, &path));
            match read {
                Ok(key) => {
                    listing
                        .held
                        .extend(key.secret.held().map(|held| (key.info.key_id, held.clone())));
                    listing.keys.push(key.info);
                }
                // Removed between listing and reading.
                Err(KeyStoreError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                Err(error) => listing.damaged.push(error),
            }
        }
        listing.keys.sort_by_key(|info| (info.created, info.key_id));
        Ok(listing)
    }

    fn put(&self, info: &KeyInfo, passphrase: &Passphrase) -> Result<(), KeyStoreError> {
        let path = self.path_of(info.key_id);
        let write = |clear: &[u8], held: Option<&Held>| {
            let bytes = format::seal(&self.master, info, clear, held)?;
            write_new_private(&path, &bytes).map_err(|error| match error {
                KeyStoreError::Io { source, .. } if source.kind() == io::ErrorKind::AlreadyExists => {
                    KeyStoreError::Exists { key_id: info.key_id }
                }
                other => other,
            })
        };
        let Some(server) = &self.server else {
            return write(passphrase.expose(), None);
        };
        if path.exists() {
            return Err(KeyStoreError::Exists { key_id: info.key_id });
        }
        let secret = self.split(info.key_id, passphrase)?;
        write(secret.bytes(), secret.held()).inspect_err(|_| {
            // A second failure here leaves a half of no key there, which opens nothing.
            if let Some(held) = secret.held() {
                drop(server.forget(held));
            }
        })
    }

    fn set_terms(&self, key_id: Uuid, terms: &Terms) -> Result<(), KeyStoreError> {
        let KeptKey { mut info, secret } = self.kept(key_id)?;
        info.terms = terms.clone();
        self.replace(&info, &secret)
    }

    fn remove(&self, key_id: Uuid) -> Result<(), KeyStoreError> {
        let path = self.path_of(key_id);
        // The half first: what is left after a failure can be tried again. Of a file that doesn't open, no half is known.
        if let Ok(kept) = self.read(key_id, &path)
            && let Some(held) = kept.secret.held()
        {
            self.server_for(key_id, held)?.forget(held)?;
        }
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
