//! A plain HTTP store: the image at its URL, and beside it `URL.sha256`, as `sha256sum -c` takes it, and `URL.assay.json` where the image
//! has no place for its token.

use std::path::Path;

use hyper::{Method, StatusCode};

use super::{Hear, ImageStoreError, Store, download, upload};
use crate::remote::{RemoteError, body};
use crate::seal::sidecar_path;

/// An image's place in such a store.
pub struct PlainStore(Store);

impl PlainStore {
    /// The image's URL. A token is sent as `Authorization: Bearer`.
    ///
    /// # Errors
    /// [`ImageStoreError::Remote`] for a URL or CA file that can't be used, [`ImageStoreError::TokenInClear`].
    pub fn new(url: &str, ca_file: Option<&Path>, token: Option<&str>) -> Result<Self, ImageStoreError> {
        let bearer = token.map(|token| format!("Bearer {token}"));
        let token = bearer.as_deref().map(|bearer| ("authorization", bearer));
        let store = Store::new(url, ca_file, token)?;
        if store.remote.endpoint().base().is_empty() {
            let (url, why) = (url.to_owned(), "it names the store, and no image in it");
            return Err(RemoteError::Url { url, why }.into());
        }
        Ok(Self(store))
    }

    /// Uploads an image, and what belongs beside it. The digest goes last: where it is, the image is whole. Gives its SHA-256.
    ///
    /// # Errors
    /// One [`ImageStoreError`] for each refusal; the same call may be made again.
    pub async fn push(&self, image: &Path, hear: Hear<'_>) -> Result<String, ImageStoreError> {
        let sent = upload::put_file(&self.0, "", image, hear).await?;
        let sidecar = sidecar_path(image);
        if sidecar.exists() {
            let token = std::fs::read(&sidecar).map_err(ImageStoreError::file("read", &sidecar))?;
            self.0.put(SIDECAR, body(token)).await?;
        }
        let url = self.0.name();
        let name = url.rsplit('/').next().unwrap_or_default();
        let digest = format!("{}  {name}\n", sent.sha256);
        self.0.put(DIGEST, body(digest)).await?;
        Ok(sent.sha256)
    }

    /// Downloads an image, and its token where that is a file of its own. `sha256`, in hex, is what it must be; `None`: what the store
    /// says. Gives its length.
    ///
    /// # Errors
    /// One [`ImageStoreError`] for each refusal; the same call goes on where the last one ended.
    pub async fn pull(&self, out: &Path, sha256: Option<&str>, hear: Hear<'_>) -> Result<u64, ImageStoreError> {
        let wanted = match sha256 {
            Some(digest) => digest.to_owned(),
            None => self.digest().await?,
        };
        let length = download::get_file(&self.0, "", out, &wanted, hear).await?;
        if let Some(token) = self.beside(SIDECAR).await? {
            super::glance::write_sidecar(out, &token)?;
        }
        Ok(length)
    }

    async fn digest(&self) -> Result<String, ImageStoreError> {
        let url = self.0.name();
        let text = self.beside(DIGEST).await?.ok_or(ImageStoreError::NoDigest { url })?;
        let text = String::from_utf8(text).unwrap_or_default();
        let digest = text.split_whitespace().next().unwrap_or_default();
        if digest.len() != 64 || !digest.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(ImageStoreError::Malformed {
                store: self.0.name(),
                path: DIGEST.to_owned(),
                what: "a SHA-256",
            });
        }
        Ok(digest.to_owned())
    }

    /// A small file beside the image; `None` where there is none.
    async fn beside(&self, ending: &str) -> Result<Option<Vec<u8>>, ImageStoreError> {
        let (status, bytes) = self.0.ask(Method::GET, ending, None).await?;
        if status == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        self.0.good(status, ending, &bytes)?;
        Ok(Some(bytes))
    }
}

const DIGEST: &str = ".sha256";
const SIDECAR: &str = ".assay.json";
