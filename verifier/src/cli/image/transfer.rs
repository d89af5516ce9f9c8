//! `image push` and `image pull`: sealed images and image stores. Needs no verifier: whoever has the file may carry it.

use std::path::{Path, PathBuf};

use assay_evidence::digest::Sha256Digest;
use zeroize::Zeroizing;

use super::inspect::property_list;
use super::{ImageError, Progress};
use crate::cli::{CliError, block_on, print};
use crate::image_store::{Glance, NewImage, PlainStore};
use crate::seal::{Format, Sealed};

/// OpenStack's own name for it.
const TOKEN_VARIABLE: &str = "OS_TOKEN";

/// What both commands need of a store.
#[derive(Debug, clap::Args)]
struct StoreArgs {
    /// PEM file of the CAs that the store's certificate may be of [default: the system's]
    #[arg(long, value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// Read the store's token from this file: Keystone's for Glance, where the environment's OS_TOKEN does as well; for a plain store it
    /// is sent as "Authorization: Bearer"
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

/// Options of `image push`.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct PushArgs {
    /// The sealed image; anything else is refused
    #[arg(value_name = "IMAGE")]
    image: PathBuf,
    /// Where to: the image's own URL in a plain store, or with --glance the service's
    #[arg(value_name = "URL")]
    url: String,
    /// URL is an OpenStack image service (API version 2)
    #[arg(long)]
    glance: bool,
    /// The image's name in Glance [default: the file's]
    #[arg(long, value_name = "NAME", requires = "glance")]
    name: Option<String>,
    /// What Glance is told that the file is [default: raw, or qcow2 for that]
    #[arg(long, value_name = "FORMAT", requires = "glance")]
    disk_format: Option<String>,
    /// What Glance is told that the file is wrapped in. A Glance that looks into bare images refuses LUKS2
    #[arg(long, value_name = "FORMAT", requires = "glance", default_value = "bare")]
    container_format: String,
    #[command(flatten)]
    store: StoreArgs,
}

/// Options of `image pull`.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct PullArgs {
    /// Where from: the image's own URL in a plain store, or with --glance the service's
    #[arg(value_name = "URL")]
    url: String,
    /// The file to make; must not exist. What has come of it is in OUT.partial until all has
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// URL is an OpenStack image service (API version 2), which has the image under this id
    #[arg(long, value_name = "ID")]
    glance: Option<String>,
    /// What the image's SHA-256 must be [default: what the store says that it is]
    #[arg(long, value_name = "HEX")]
    sha256: Option<Sha256Digest>,
    #[command(flatten)]
    store: StoreArgs,
}

pub(super) fn push(args: &PushArgs) -> Result<(), CliError> {
    // Nothing in the clear is ever uploaded.
    let image = Sealed::read(&args.image).map_err(ImageError::Seal)?;
    let token = args.store.token(args.glance)?;
    let (ca_file, token) = (args.store.ca_file.as_deref(), token.as_deref().map(String::as_str));
    let progress = Progress::new("uploading");
    let mut hear = |done, total| progress.hear(done, total);
    let said = block_on(async {
        let failed = ImageError::Store;
        if !args.glance {
            let store = PlainStore::new(&args.url, ca_file, token).map_err(failed)?;
            let sha256 = store.push(&args.image, &mut hear).await.map_err(failed)?;
            return Ok(format!("Uploaded to {}\nsha256 {sha256}\n", args.url));
        }
        let properties = property_list(&image)?;
        let name = args.name.clone().unwrap_or_else(|| file_name(&args.image));
        let disk_format = args.disk_format.as_deref().unwrap_or(match image.format {
            Format::Luks2 | Format::Luks1 => "raw",
            Format::Qcow2Luks => "qcow2",
        });
        let store = Glance::new(&args.url, ca_file, token).map_err(failed)?;
        let new = NewImage {
            name: &name,
            disk_format,
            container_format: &args.container_format,
            properties: &properties,
        };
        let id = store.push(&args.image, &new, &mut hear).await.map_err(failed)?;
        Ok(format!("Uploaded to {}\nimage {id}\n", args.url))
    })?;
    drop(progress);
    print(&said)
}

pub(super) fn pull(args: &PullArgs) -> Result<(), CliError> {
    let token = args.store.token(args.glance.is_some())?;
    let (ca_file, token) = (args.store.ca_file.as_deref(), token.as_deref().map(String::as_str));
    let sha256 = args.sha256.as_ref().map(ToString::to_string);
    let progress = Progress::new("downloading");
    let mut hear = |done, total| progress.hear(done, total);
    let length = block_on(async {
        let (out, sha256, failed) = (&args.output, sha256.as_deref(), ImageError::Store);
        let pulled = match &args.glance {
            None => {
                let store = PlainStore::new(&args.url, ca_file, token).map_err(failed)?;
                store.pull(out, sha256, &mut hear).await
            }
            Some(id) => {
                let store = Glance::new(&args.url, ca_file, token).map_err(failed)?;
                store.pull(id, out, sha256, &mut hear).await
            }
        };
        Ok(pulled.map_err(failed)?)
    })?;
    drop(progress);
    print(&format!("Downloaded {}\nsize {length} bytes\n", args.output.display()))
}

impl StoreArgs {
    /// From the file, or, for OpenStack, from the environment; never from the command line, which everybody on the machine can read.
    fn token(&self, openstack: bool) -> Result<Option<Zeroizing<String>>, ImageError> {
        let text = match &self.token_file {
            Some(path) => std::fs::read_to_string(path).map_err(|source| ImageError::Token {
                path: path.clone(),
                source,
            })?,
            None if openstack => std::env::var(TOKEN_VARIABLE).unwrap_or_default(),
            None => String::new(),
        };
        let text = Zeroizing::new(text);
        Ok(Some(Zeroizing::new(text.trim().to_owned())).filter(|token| !token.is_empty()))
    }
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}
