//! A connection that cannot be held open for nothing.
//!
//! hyper has one timer for "the client has not sent its headers", which runs while a kept-alive connection waits for its next
//! request as well. A verifier that asks every ten seconds should keep its connection, and a client that sends one byte a
//! second should not; so the two are told apart here: [`IDLE`] for silence, [`HEADER`] from a request's first byte on.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

/// Silence after which a connection is closed; also how long a peer may leave its answer unread.
pub const IDLE: Duration = Duration::from_secs(90);
/// From the first byte of a request to the end of its headers.
pub const HEADER: Duration = Duration::from_secs(10);
/// After the last answer, how long and how much is read and thrown away, so that a client that is still sending sees the
/// answer instead of a reset connection.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: usize = 16 * 1024 * 1024;

/// Tells the stream whether a request is being worked on.
#[derive(Debug, Clone, Default)]
pub struct Activity(Arc<AtomicBool>);

impl Activity {
    /// A request's headers are complete; dropping the guard ends the request.
    #[must_use]
    pub fn begin(&self) -> InRequest {
        self.0.store(true, Ordering::Relaxed);
        InRequest(self.clone())
    }

    fn busy(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Lives as long as one request is worked on.
#[derive(Debug)]
pub struct InRequest(Activity);

impl Drop for InRequest {
    fn drop(&mut self) {
        self.0.0.store(false, Ordering::Relaxed);
    }
}

/// A stream with deadlines.
#[derive(Debug)]
pub struct Guarded<S> {
    inner: S,
    activity: Activity,
    timer: Pin<Box<Sleep>>,
    /// A request has begun to arrive: the deadline no longer moves with each byte.
    in_header: bool,
    lingering: Option<usize>,
}

impl<S> Guarded<S> {
    /// Wraps a stream; `activity` is shared with whoever handles its requests.
    pub fn new(inner: S, activity: Activity) -> Self {
        Self {
            inner,
            activity,
            timer: Box::pin(tokio::time::sleep(IDLE)),
            in_header: false,
            lingering: None,
        }
    }

    fn set(&mut self, after: Duration) {
        self.timer.as_mut().reset(Instant::now() + after);
    }

    fn received(&mut self) {
        if self.activity.busy() {
            self.in_header = false;
            self.set(IDLE);
        } else if !self.in_header {
            self.in_header = true;
            self.set(HEADER);
        }
    }

    /// Called when nothing can be done now: is it still worth waiting?
    fn waiting(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        if self.in_header && self.activity.busy() {
            self.in_header = false;
            self.set(IDLE);
        }
        self.timer.as_mut().poll(cx).map(|()| io::ErrorKind::TimedOut.into())
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        match Pin::new(&mut self.inner).poll_read(cx, buf) {
            Poll::Ready(result) => {
                if buf.filled().len() > before {
                    self.received();
                }
                Poll::Ready(result)
            }
            Poll::Pending => self.waiting(cx).map(Err),
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        match Pin::new(&mut self.inner).poll_write(cx, data) {
            Poll::Ready(result) => {
                self.in_header = false;
                Self::set(&mut self, IDLE);
                Poll::Ready(result)
            }
            Poll::Pending => self.waiting(cx).map(Err),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match Pin::new(&mut self.inner).poll_flush(cx) {
            Poll::Ready(result) => Poll::Ready(result),
            Poll::Pending => self.waiting(cx).map(Err),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut left = match self.lingering {
            Some(left) => left,
            None => {
                match Pin::new(&mut self.inner).poll_shutdown(cx) {
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Pending => return self.waiting(cx).map(Err),
                }
                Self::set(&mut self, LINGER);
                LINGER_BYTES
            }
        };
        let mut scratch = [0; 4096];
        loop {
            let mut buf = ReadBuf::new(&mut scratch);
            match Pin::new(&mut self.inner).poll_read(cx, &mut buf) {
                Poll::Ready(Ok(())) if !buf.filled().is_empty() && left > 0 => {
                    left = left.saturating_sub(buf.filled().len());
                }
                Poll::Ready(_) => return Poll::Ready(Ok(())),
                Poll::Pending => {
                    self.lingering = Some(left);
                    return self.timer.as_mut().poll(cx).map(|()| Ok(()));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn silence_ends_after_the_idle_time() {
        let (server, _client) = tokio::io::duplex(64);
        let mut stream = Guarded::new(server, Activity::default());
        let start = Instant::now();
        let error = stream.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(start.elapsed() >= IDLE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_trickled_header_ends_after_the_header_time() {
        let (server, mut client) = tokio::io::duplex(64);
        let mut stream = Guarded::new(server, Activity::default());
        let start = Instant::now();
        let trickle = async {
            loop {
                tokio::time::sleep(Duration::from_secs(1)).await;
                if client.write_u8(b'x').await.is_err() {
                    break;
                }
            }
        };
        let read = async { while stream.read_u8().await.is_ok() {} };
        tokio::select! { () = trickle => {}, () = read => {} }
        assert!(
            start.elapsed() < HEADER + Duration::from_secs(3),
            "{:?}",
            start.elapsed()
        );
    }

    #[tokio::test(start_paused = true)]
    async fn work_on_a_request_is_not_silence() {
        let (server, mut client) = tokio::io::duplex(64);
        let activity = Activity::default();
        let mut stream = Guarded::new(server, activity.clone());
        client.write_u8(b'x').await.unwrap();
        stream.read_u8().await.unwrap();
        let guard = activity.begin();
        let slow = tokio::time::timeout(HEADER * 3, stream.read_u8()).await;
        assert!(
            slow.is_err(),
            "the header timer must not run while the request is worked on"
        );
        drop(guard);
    }
}
