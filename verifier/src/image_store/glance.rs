//! OpenStack's image service, API version 2: the image with the properties by which its key is found.

use std::path::Path;

use hyper::{Method, StatusCode};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::upload::Sent;
use super::{Hear, ImageStoreError, Store, download, upload};
use crate::files::create_private;
use crate::seal::sidecar_path;

/// Property with the image's SHA-256, in hex.
const SHA256: &str = "assay_sha256";
/// Property with the token of an image that has no place for it.
const TOKEN: &str = "assay_token";

/// A Glance service.
pub struct Glance(Store);

/// What Glance says of an image; what we do not use is left.
#[derive(Deserialize)]
struct Image {
    id: String,
    status: String,
    size: Option<u64>,
    os_hash_algo: Option<String>,
    os_hash_value: Option<String>,
    assay_sha256: Option<String>,
    assay_token: Option<String>,
}

/// What Glance is told of a new image.
pub struct NewImage<'a> {
    /// Its name, for people.
    pub name: &'a str,
    /// Such as `raw`.
    pub disk_format: &'a str,
    /// Such as `bare`.
    pub container_format: &'a str,
    /// Names and values of properties of our own.
    pub properties: &'a [(&'a str, String)],
}

impl Glance {
    /// The service's URL, without `/v2`. The token is Keystone's, sent as `X-Auth-Token`.
    ///
    /// # Errors
    /// [`ImageStoreError::Remote`] for a URL or CA file that can't be used, [`ImageStoreError::TokenInClear`].
    pub fn new(url: &str, ca_file: Option<&Path>, token: Option<&str>) -> Result<Self, ImageStoreError> {
        Store::new(url, ca_file, token.map(|token| ("x-auth-token", token))).map(Self)
    }

    /// Makes an image of these properties, and uploads it. Gives its id. After a failure there is no image.
    ///
    /// # Errors
    /// One [`ImageStoreError`] for each refusal.
    pub async fn push(&self, image: &Path, new: &NewImage<'_>, hear: Hear<'_>) -> Result<String, ImageStoreError> {
        let mut members: Map<String, Value> = new
            .properties
            .iter()
            .map(|(name, value)| ((*name).to_owned(), value.as_str().into()))
            .collect();
        for (name, value) in [
            ("name", new.name),
            ("disk_format", new.disk_format),
            ("container_format", new.container_format),
        ] {
            members.insert(name.to_owned(), value.into());
        }
        let sidecar = sidecar_path(image);
        if sidecar.exists() {
            let token = std::fs::read_to_string(&sidecar).map_err(ImageStoreError::file("read", &sidecar))?;
            members.insert(TOKEN.to_owned(), token.trim().into());
        }
        let made = self.ask(Method::POST, IMAGES, Some(&Value::Object(members))).await?;
        let path = format!("{IMAGES}/{}", checked(&self.0, made.id.clone())?);
        match self.fill(&path, image, hear).await {
            Ok(()) => Ok(made.id),
            Err(error) => {
                let error = match error {
                    ImageStoreError::Refused {
                        store,
                        status: StatusCode::UNSUPPORTED_MEDIA_TYPE,
                        words,
                        ..
                    } => ImageStoreError::Uninspectable { store, words },
                    other => other,
                };
                // The first error is the one to report; an image left over is "queued" there, and has no data.
                drop(self.0.ask(Method::DELETE, &path, None).await);
                Err(error)
            }
        }
    }

    async fn fill(&self, path: &str, image: &Path, hear: Hear<'_>) -> Result<(), ImageStoreError> {
        let sent = upload::put_file(&self.0, &format!("{path}/file"), image, hear).await?;
        let there = self.ask(Method::GET, path, None).await?;
        self.compare(&there, &sent)?;
        let digest = json!([{"op": "add", "path": format!("/{SHA256}"), "value": sent.sha256}]);
        self.patch(path, &digest).await
    }

    /// What Glance hashed must be what was sent.
    fn compare(&self, there: &Image, sent: &Sent) -> Result<(), ImageStoreError> {
        let hash = match there.os_hash_algo.as_deref() {
            Some("sha256") => Some(&sent.sha256),
            Some("sha512") => Some(&sent.sha512),
            _ => None,
        };
        let same = hash.is_none_or(|hash| there.os_hash_value.as_ref() == Some(hash));
        if there.status == "active" && there.size == Some(sent.bytes) && same {
            return Ok(());
        }
        Err(ImageStoreError::OtherUpload {
            store: self.0.name(),
            found: format!("{:?} bytes, {}", there.size, crate::client::printable(&there.status)),
            wanted: format!("{} bytes, sha256 {}", sent.bytes, sent.sha256),
        })
    }

    /// Downloads an image by its id, and its token where that is a file of its own. `sha256`, in hex, is what it must be; `None`: what the
    /// image's property says. Gives its length.
    ///
    /// # Errors
    /// One [`ImageStoreError`] for each refusal; the same call goes on where the last one ended.
    pub async fn pull(
        &self,
        id: &str,
        out: &Path,
        sha256: Option<&str>,
        hear: Hear<'_>,
    ) -> Result<u64, ImageStoreError> {
        let path = format!("{IMAGES}/{}", checked(&self.0, id.to_owned())?);
        let image = self.ask(Method::GET, &path, None).await?;
        let wanted = sha256.map(str::to_owned).or(image.assay_sha256);
        let wanted = wanted.ok_or_else(|| ImageStoreError::NoDigest {
            url: format!("{}{path}", self.0.name()),
        })?;
        let length = download::get_file(&self.0, &format!("{path}/file"), out, &wanted, hear).await?;
        if let Some(token) = image.assay_token {
            write_sidecar(out, token.as_bytes())?;
        }
        Ok(length)
    }

    async fn ask(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Image, ImageStoreError> {
        let (status, bytes) = self.0.ask(method, path, body).await?;
        self.0.good(status, path, &bytes)?;
        serde_json::from_slice(&bytes).map_err(|_| ImageStoreError::Malformed {
            store: self.0.name(),
            path: path.to_owned(),
            what: "an image",
        })
    }

    async fn patch(&self, path: &str, changes: &Value) -> Result<(), ImageStoreError> {
        let (status, bytes) = self.0.ask_as(Method::PATCH, path, Some(changes), PATCH_TYPE).await?;
        self.0.good(status, path, &bytes)
    }
}

/// An id of ours or of the store's goes into paths.
fn checked(store: &Store, id: String) -> Result<String, ImageStoreError> {
    if id.parse::<assay_evidence::uuid::Uuid>().is_ok() {
        return Ok(id);
    }
    Err(ImageStoreError::Malformed {
        store: store.name(),
        path: IMAGES.to_owned(),
        what: "an image's id (a UUID)",
    })
}

/// Puts an image's token beside it; overwrites none.
pub(super) fn write_sidecar(image: &Path, token: &[u8]) -> Result<(), ImageStoreError> {
    let path = sidecar_path(image);
    create_private(&path, token).map_err(ImageStoreError::file("create", &path))
}

const IMAGES: &str = "/v2/images";
const PATCH_TYPE: &str = "application/openstack-images-v2.1-json-patch";
