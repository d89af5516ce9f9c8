//! Reading a disk inside a container format, through `qemu-nbd` on a socket of our own: as a stream, so that the disk in the clear never
//! lies on the verifier a second time.
//!
//! Of the NBD protocol (NetworkBlockDevice/nbd, doc/proto.md) this is the fixed newstyle handshake, and reads with simple replies.

use std::{
    ffi::OsString,
    fs::{self, DirBuilder},
    io::{self, Read, Write},
    os::unix::{fs::DirBuilderExt, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use super::{SealError, new_uuid, qemu};

const OPEN_MAGIC: &[u8; 8] = b"NBDMAGIC";
const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
/// `NBD_FLAG_FIXED_NEWSTYLE` and `NBD_FLAG_NO_ZEROES`; their answers from the client have the same numbers.
const HANDSHAKE_FLAGS: u16 = 3;
const OPT_EXPORT_NAME: u32 = 1;
/// How long qemu-nbd may take until it listens; large qcow2 tables are read first.
const START: Duration = Duration::from_secs(30);
/// How long it may take to end, once it has closed the connection.
const LAST_WORDS: Duration = Duration::from_secs(10);
/// Between two looks at it.
const PAUSE: Duration = Duration::from_millis(5);
/// How long one read may take; network storage stalls now and then.
const READ: Duration = Duration::from_secs(120);

/// A disk that qemu-nbd reads for us; it ends with this.
pub(super) struct Nbd {
    server: Server,
    stream: UnixStream,
    len: u64,
}

impl Nbd {
    /// Starts qemu-nbd on the image of this name for qemu, read-only; with the secret that it needs as [`qemu::SECRET_ID`].
    pub(super) fn open(path: &Path, name: OsString, secret: Option<&qemu::SecretFile>) -> Result<Self, SealError> {
        let mut server = Server::start(name, secret)?;
        let failed = |source| SealError::Input {
            operation: "read with qemu-nbd",
            path: path.to_owned(),
            source,
        };
        let mut stream = server.connect(path)?;
        stream.set_read_timeout(Some(READ)).map_err(failed)?;
        stream.set_write_timeout(Some(READ)).map_err(failed)?;
        match handshake(&mut stream) {
            Ok(len) => Ok(Self { server, stream, len }),
            // It listens before it looks at the image; what it found there it says when it ends.
            Err(source) => Err(server.gave_up(path).unwrap_or_else(|| failed(source))),
        }
    }

    /// Length of the disk in bytes.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Fills the block with the bytes at an offset.
    pub(super) fn read_at(&mut self, block: &mut [u8], offset: u64) -> io::Result<()> {
        let length = u32::try_from(block.len()).map_err(io::Error::other)?;
        let mut request = Vec::with_capacity(28);
        request.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        // No flags; command 0, read; the offset serves as the request's name, too.
        request.extend_from_slice(&[0; 4]);
        request.extend_from_slice(&offset.to_be_bytes());
        request.extend_from_slice(&offset.to_be_bytes());
        request.extend_from_slice(&length.to_be_bytes());
        self.stream.write_all(&request)?;
        let [magic, error] = [self.word()?, self.word()?];
        let mut name = [0; 8];
        self.stream.read_exact(&mut name)?;
        if magic != REPLY_MAGIC || name != offset.to_be_bytes() {
            return Err(io::Error::other("qemu-nbd answers something else than was asked"));
        }
        if let Ok(code @ 1..) = i32::try_from(error) {
            return Err(io::Error::from_raw_os_error(code));
        }
        self.stream.read_exact(block)
    }

    fn word(&mut self) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.stream.read_exact(&mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }
}

impl Drop for Nbd {
    fn drop(&mut self) {
        // It ends with the connection; waited for, so that it lets go of the image before anybody else wants it.
        drop(self.stream.shutdown(std::net::Shutdown::Both));
        self.server.end();
    }
}

/// Goes through the handshake, and gives the length of the one export in bytes.
fn handshake(stream: &mut UnixStream) -> io::Result<u64> {
    let odd = || io::Error::other("qemu-nbd does not speak the protocol that it should");
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    let flags = HANDSHAKE_FLAGS.to_be_bytes();
    if greeting != *[OPEN_MAGIC.as_slice(), OPTION_MAGIC, &flags].concat() {
        return Err(odd());
    }
    stream.write_all(&u32::from(HANDSHAKE_FLAGS).to_be_bytes())?;
    let mut option = OPTION_MAGIC.to_vec();
    option.extend_from_slice(&OPT_EXPORT_NAME.to_be_bytes());
    // An empty name: the only export.
    option.extend_from_slice(&0_u32.to_be_bytes());
    stream.write_all(&option)?;
    let mut len = [0; 8];
    stream.read_exact(&mut len)?;
    // Flags of the export: that it is read-only is known.
    stream.read_exact(&mut [0; 2])?;
    Ok(u64::from_be_bytes(len))
}

/// The process, and the private folder of its socket.
struct Server {
    child: Child,
    folder: PathBuf,
}

impl Server {
    fn start(name: OsString, secret: Option<&qemu::SecretFile>) -> Result<Self, SealError> {
        let folder = std::env::temp_dir().join(format!("assay-seal-{}", new_uuid()?));
        let failed = |source| SealError::Program {
            program: "qemu-nbd",
            source,
        };
        DirBuilder::new().mode(0o700).create(&folder).map_err(failed)?;
        let mut socket = OsString::from("--socket=");
        socket.push(folder.join("nbd"));
        let mut command = qemu::command("qemu-nbd");
        if let Some(secret) = secret {
            command.args(["--object", &secret.object(qemu::SECRET_ID)]);
        }
        let started = command
            .args(["--read-only", "--shared=1"])
            .arg(socket)
            .arg(name)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        match started {
            Ok(child) => Ok(Self { child, folder }),
            Err(source) => {
                drop(fs::remove_dir_all(&folder));
                Err(failed(source))
            }
        }
    }

    fn connect(&mut self, path: &Path) -> Result<UnixStream, SealError> {
        let socket = self.folder.join("nbd");
        let start = Instant::now();
        loop {
            if let Ok(stream) = UnixStream::connect(&socket) {
                return Ok(stream);
            }
            let ended = !matches!(self.child.try_wait(), Ok(None));
            if ended || start.elapsed() > START {
                return Err(self.refused(path, ended));
            }
            thread::sleep(PAUSE);
        }
    }

    /// What it says if it ends now: it closed the connection.
    fn gave_up(&mut self, path: &Path) -> Option<SealError> {
        let start = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) {
            if start.elapsed() > LAST_WORDS {
                return None;
            }
            thread::sleep(PAUSE);
        }
        Some(self.refused(path, true))
    }

    fn refused(&mut self, path: &Path, ended: bool) -> SealError {
        SealError::Qemu {
            program: "qemu-nbd",
            path: path.to_owned(),
            said: self.last_words(ended),
        }
    }

    fn last_words(&mut self, ended: bool) -> String {
        let mut said = Vec::new();
        // Only of one that has ended: another would be waited for.
        if let Some(stderr) = self.child.stderr.take().filter(|_| ended) {
            drop(stderr.take(qemu::MAX_WORDS).read_to_end(&mut said));
        }
        qemu::words(&said)
    }

    fn end(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
        drop(fs::remove_dir_all(&self.folder));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}
