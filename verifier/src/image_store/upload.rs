//! A file as the body of a request, hashed as it goes.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http_body_util::BodyExt as _;
use hyper::body::{Bytes, Frame, SizeHint};
use ring::digest::{SHA256, SHA512};

use super::{Hear, ImageStoreError, STALL, Store};

/// What is read at a time.
const BLOCK: usize = 256 * 1024;
/// How often a bar moves.
const TICK: Duration = Duration::from_millis(100);

/// What was sent.
pub(super) struct Sent {
    pub bytes: u64,
    pub sha256: String,
    pub sha512: String,
}

/// Shared by the body and who waits for it.
struct Under {
    done: AtomicU64,
    hashes: Mutex<[ring::digest::Context; 2]>,
}

struct FileBody {
    file: File,
    left: u64,
    way: Arc<Under>,
}

impl hyper::body::Body for FileBody {
    type Data = Bytes;
    type Error = io::Error;

    /// Reads the disk where it is polled: nothing but this transfer runs on its thread.
    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        let wanted = usize::try_from(self.left).unwrap_or(BLOCK).min(BLOCK);
        let mut block = vec![0; wanted];
        // A file that is shorter now ends the request, not the image.
        Poll::Ready(Some(self.file.read_exact(&mut block).map(|()| {
            for hash in self
                .way
                .hashes
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .iter_mut()
            {
                hash.update(&block);
            }
            let read = u64::try_from(wanted).unwrap_or(u64::MAX);
            self.left = self.left.saturating_sub(read);
            self.way.done.fetch_add(read, Ordering::Relaxed);
            Frame::data(Bytes::from(block))
        })))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

/// PUTs a file. Ends when the store takes nothing for [`STALL`].
pub(super) async fn put_file(store: &Store, path: &str, image: &Path, hear: Hear<'_>) -> Result<Sent, ImageStoreError> {
    let file = File::open(image).map_err(ImageStoreError::file("open", image))?;
    let metadata = file.metadata().map_err(ImageStoreError::file("look at", image))?;
    let total = metadata.len();
    let way = Arc::new(Under {
        done: AtomicU64::new(0),
        hashes: Mutex::new([&SHA256, &SHA512].map(ring::digest::Context::new)),
    });
    let sent = FileBody {
        file,
        left: total,
        way: way.clone(),
    };
    let sending = store.put(path, sent.boxed_unsync());
    tokio::pin!(sending);
    let (mut last, mut since) = (0, Instant::now());
    loop {
        if let Ok(answered) = tokio::time::timeout(TICK, &mut sending).await {
            answered?;
            break;
        }
        let done = way.done.load(Ordering::Relaxed);
        hear(done, total);
        if done != last {
            (last, since) = (done, Instant::now());
        } else if since.elapsed() > STALL {
            return Err(store.remote.late("take the image on", STALL).into());
        }
    }
    let hashes = way.hashes.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let [sha256, sha512] = hashes.map(super::hex_of);
    Ok(Sent {
        bytes: total,
        sha256,
        sha512,
    })
}
