//! A file from a store, gone on with where it broke off, and given its name when its digest is right.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::header::{CONTENT_LENGTH, CONTENT_RANGE, HeaderValue, RANGE};
use hyper::{HeaderMap, Method, StatusCode};
use ring::digest::{Context, SHA256};

use super::{Hear, ImageStoreError, MAX_ANSWER, STALL, Store};
use crate::files::sync_dir;
use crate::remote::RemoteError;

/// Breaks in a row without a byte between them.
const MAX_BREAKS: u32 = 5;
/// Before it is tried again.
const PAUSE: Duration = Duration::from_millis(500);
/// What is read at a time of a file that is here already.
const BLOCK: usize = 256 * 1024;

/// What has been got so far.
struct Partial {
    path: PathBuf,
    file: File,
    hash: Context,
    length: u64,
}

/// Gets a file; `wanted` is its SHA-256 in hex. A file that broke off stays as `OUT.partial`, from which the next call goes on.
pub(super) async fn get_file(
    store: &Store,
    path: &str,
    out: &Path,
    wanted: &str,
    hear: Hear<'_>,
) -> Result<u64, ImageStoreError> {
    if out.exists() {
        let taken = io::Error::from(io::ErrorKind::AlreadyExists);
        return Err(ImageStoreError::file("create", out)(taken));
    }
    let mut partial = Partial::open(out)?;
    let mut breaks = 0;
    loop {
        let before = partial.length;
        match get_once(store, path, &mut partial, hear).await {
            Ok(()) => break,
            Err(error) if error.is_broken_off() => {
                breaks = if partial.length > before { 0 } else { breaks + 1 };
                if breaks >= MAX_BREAKS {
                    return Err(ImageStoreError::BreaksOff {
                        store: store.name(),
                        times: breaks,
                        partial: partial.path,
                        cause: Box::new(error),
                    });
                }
                tokio::time::sleep(PAUSE).await;
            }
            Err(error) => return Err(error),
        }
    }
    partial.publish(store, out, wanted)
}

async fn get_once(store: &Store, path: &str, partial: &mut Partial, hear: Hear<'_>) -> Result<(), ImageStoreError> {
    let begun = partial.length;
    let range = HeaderValue::from_str(&format!("bytes={begun}-"))
        .ok()
        .filter(|_| begun > 0);
    let headers = store.headers(range.map(|range| (RANGE, range)).as_slice());
    let asking = async {
        let mut connection = store.connect().await?;
        let answer = connection
            .send(Method::GET, path, &headers, crate::remote::body(""))
            .await?;
        Ok::<_, ImageStoreError>((connection, answer))
    };
    let (connection, answer) = tokio::time::timeout(STALL, asking)
        .await
        .unwrap_or_else(|_| Err(store.remote.late("answer", STALL).into()))?;
    let malformed = |what| ImageStoreError::Malformed {
        store: store.name(),
        path: path.to_owned(),
        what,
    };
    let status = answer.status();
    match status {
        StatusCode::PARTIAL_CONTENT if starts_at(answer.headers(), begun) => {}
        StatusCode::PARTIAL_CONTENT => return Err(malformed("the part that was asked for")),
        // Nothing is missing; whether it is the image, its digest tells.
        StatusCode::RANGE_NOT_SATISFIABLE if begun > 0 => return Ok(()),
        // A store without ranges gives all of it again.
        StatusCode::OK => partial.begin_anew()?,
        _ => {
            let words = connection.read(answer.into_body(), MAX_ANSWER).await?;
            return store.good(status, path, &words);
        }
    }
    let length = answer
        .headers()
        .get(CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok());
    let length: u64 = length
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| malformed("a length"))?;
    let total = partial.length.saturating_add(length);
    take(store, partial, answer.into_body(), total, hear).await
}

/// Takes the body as it comes; HTTP itself lets no more come than was announced.
async fn take(
    store: &Store,
    partial: &mut Partial,
    mut body: Incoming,
    total: u64,
    hear: Hear<'_>,
) -> Result<(), ImageStoreError> {
    while partial.length < total {
        let frame = tokio::time::timeout(STALL, body.frame()).await;
        let frame = frame.map_err(|_| store.remote.late("send the image on", STALL))?;
        let data = match frame {
            Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
            Some(Err(cause)) => {
                return Err(RemoteError::Broken {
                    server: store.name(),
                    cause,
                }
                .into());
            }
            None => {
                return Err(RemoteError::Body {
                    server: store.name(),
                    limit: usize::try_from(total).unwrap_or(usize::MAX),
                }
                .into());
            }
        };
        partial.append(&data)?;
        hear(partial.length, total);
    }
    Ok(())
}

/// Whether `Content-Range: bytes START-…` (RFC 9110 section 14.4) begins where it must.
fn starts_at(headers: &HeaderMap, start: u64) -> bool {
    let range = headers.get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
    let first = range.and_then(|range| range.strip_prefix("bytes ")?.split('-').next()?.parse().ok());
    first == Some(start)
}

impl Partial {
    /// What an earlier run left, or an empty file.
    fn open(out: &Path) -> Result<Self, ImageStoreError> {
        let mut name = out.file_name().unwrap_or_default().to_owned();
        name.push(".partial");
        let path = out.with_file_name(name);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(ImageStoreError::file("create", &path))?;
        let mut partial = Self {
            path,
            file,
            hash: Context::new(&SHA256),
            length: 0,
        };
        let mut block = vec![0; BLOCK];
        loop {
            let read = partial.file.read(&mut block);
            let read = read.map_err(ImageStoreError::file("read", &partial.path))?;
            let Some(got) = block.get(..read).filter(|got| !got.is_empty()) else {
                return Ok(partial);
            };
            partial.hash.update(got);
            partial.length = partial.length.saturating_add(u64::try_from(read).unwrap_or(u64::MAX));
        }
    }

    fn begin_anew(&mut self) -> Result<(), ImageStoreError> {
        let emptied = self.file.set_len(0).and_then(|()| self.file.seek(SeekFrom::Start(0)));
        emptied.map_err(ImageStoreError::file("empty", &self.path))?;
        self.hash = Context::new(&SHA256);
        self.length = 0;
        Ok(())
    }

    fn append(&mut self, data: &[u8]) -> Result<(), ImageStoreError> {
        self.file
            .write_all(data)
            .map_err(ImageStoreError::file("write", &self.path))?;
        self.hash.update(data);
        self.length = self
            .length
            .saturating_add(u64::try_from(data.len()).unwrap_or(u64::MAX));
        Ok(())
    }

    /// Gives it its name, durably; or removes it, since going on with it would give the same.
    fn publish(self, store: &Store, out: &Path, wanted: &str) -> Result<u64, ImageStoreError> {
        let found = super::hex_of(self.hash);
        if found != wanted {
            std::fs::remove_file(&self.path).map_err(ImageStoreError::file("remove", &self.path))?;
            return Err(ImageStoreError::OtherDigest {
                store: store.name(),
                found,
                wanted: wanted.to_owned(),
                partial: self.path,
            });
        }
        let folder = match out.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        self.file
            .sync_all()
            // A link refuses to replace; a rename would not.
            .and_then(|()| std::fs::hard_link(&self.path, out))
            .and_then(|()| std::fs::remove_file(&self.path))
            .and_then(|()| sync_dir(folder))
            .map_err(ImageStoreError::file("create", out))?;
        Ok(self.length)
    }
}
