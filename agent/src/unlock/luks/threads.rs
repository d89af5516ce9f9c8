//! The threads that open and close disks. libcryptsetup keeps state in globals, so that one thread makes all calls of it. qemu is waited for on another
//! one: an image on storage that stalls must not keep the keys of other disks from being wiped.

use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};

use assay_evidence::uuid::Uuid;
use zeroize::Zeroizing;

use super::qcow2::{self, linear::Linear};
use super::{Container, DiskError, Header, check_free, check_name, close, open, suspend};

type Job = Box<dyn FnOnce() + Send>;

/// A thread that does one thing after the other. It ends with the last handle.
#[derive(Debug, Clone)]
struct Thread(mpsc::Sender<Job>);

impl Thread {
    fn start(name: &str) -> std::io::Result<Self> {
        let (jobs, work) = mpsc::channel::<Job>();
        std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            while let Ok(job) = work.recv() {
                job();
            }
        })?;
        Ok(Self(jobs))
    }

    async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, DiskError> + Send + 'static,
    ) -> Result<T, DiskError> {
        let (reply, answer) = tokio::sync::oneshot::channel();
        let job: Job = Box::new(move || drop(reply.send(work())));
        self.0.send(job).map_err(|_| DiskError::Stopped)?;
        answer.await.map_err(|_| DiskError::Stopped)?
    }
}

/// Both threads. They end with the last handle.
#[derive(Debug, Clone)]
pub struct DiskThreads {
    cryptsetup: Thread,
    qemu: Thread,
    run_dir: Arc<Path>,
}

impl DiskThreads {
    /// Starts the threads; qemu-nbd has its sockets in the run folder. Disks that an agent before this one has not got open are closed.
    ///
    /// # Errors
    /// When the system has no thread to give.
    pub fn start(run_dir: &Path) -> std::io::Result<Self> {
        let (qemu, run_dir) = (Thread::start("qemu")?, Arc::<Path>::from(run_dir));
        let strays = Arc::clone(&run_dir);
        // Before it does anything else, and without keeping the start waiting.
        drop(qemu.0.send(Box::new(move || qcow2::end_strays(&strays))));
        Ok(Self {
            cryptsetup: Thread::start("disk")?,
            qemu,
            run_dir,
        })
    }

    /// Reads a header: see [`Header::read`].
    ///
    /// # Errors
    /// As there.
    pub async fn read(&self, image: PathBuf) -> Result<Header, DiskError> {
        self.cryptsetup.call(move || Header::read(&image)).await
    }

    /// Whether the disk can be opened under this name: see [`check_free`].
    ///
    /// # Errors
    /// As there.
    pub async fn check_free(&self, header: Header, name: String) -> Result<(), DiskError> {
        self.cryptsetup.call(move || check_free(&header, &name)).await
    }

    /// Opens a disk that [`DiskThreads::check_free`] was content with: see [`open`]. qcow2 gets a network block device, and a qemu-nbd.
    ///
    /// # Errors
    /// As there; of qcow2 [`DiskError::Changed`], [`DiskError::WrongKey`], [`DiskError::NoDevice`], [`DiskError::NameNotText`],
    /// [`DiskError::Program`], [`DiskError::Said`], [`DiskError::Device`].
    pub async fn open(&self, header: Header, name: String, key: Zeroizing<Vec<u8>>) -> Result<(), DiskError> {
        check_name(&name)?;
        match header.container {
            Container::None => self.cryptsetup.call(move || open(&header, &name, &key)).await,
            Container::Qcow2 => {
                let run_dir = Arc::clone(&self.run_dir);
                self.qemu
                    .call(move || qcow2::open(&header, &name, &key, &run_dir))
                    .await
            }
        }
    }

    /// Closes a disk: see [`close`].
    ///
    /// # Errors
    /// As there; of qcow2 [`DiskError::Busy`], [`DiskError::Program`], [`DiskError::Said`], [`DiskError::StillThere`], [`DiskError::Processes`].
    pub async fn close(&self, name: String, opened: Option<Uuid>) -> Result<(), DiskError> {
        check_name(&name)?;
        match Linear::find(&name) {
            Some(mapping) => self.qemu.call(move || qcow2::close(&mapping)).await,
            None => self.cryptsetup.call(move || close(&name, opened)).await,
        }
    }

    /// Makes a disk wait: see [`suspend::suspend`].
    ///
    /// # Errors
    /// As there.
    pub async fn suspend(&self, name: String) -> Result<(), DiskError> {
        self.cryptsetup.call(move || suspend::suspend(&name)).await
    }

    /// Lets a disk go on: see [`suspend::resume`].
    ///
    /// # Errors
    /// As there.
    pub async fn resume(&self, name: String) -> Result<(), DiskError> {
        self.cryptsetup.call(move || suspend::resume(&name)).await
    }

    /// Makes a disk wait without its key: see [`suspend::wipe`].
    ///
    /// # Errors
    /// As there; of qcow2 [`DiskError::StillThere`], [`DiskError::Processes`].
    pub async fn wipe(&self, name: String) -> Result<(), DiskError> {
        check_name(&name)?;
        let wipe = move || match Linear::find(&name) {
            Some(mapping) => qcow2::wipe(&mapping),
            None => suspend::wipe(&name),
        };
        self.cryptsetup.call(wipe).await
    }

    /// Gives a disk its key back: see [`suspend::resume_with`].
    ///
    /// # Errors
    /// As there; of qcow2 those of opening it.
    pub async fn resume_with(&self, header: Header, name: String, key: Zeroizing<Vec<u8>>) -> Result<(), DiskError> {
        check_name(&name)?;
        match header.container {
            Container::None => {
                let resume = move || suspend::resume_with(&header, &name, &key);
                self.cryptsetup.call(resume).await
            }
            Container::Qcow2 => {
                let run_dir = Arc::clone(&self.run_dir);
                let resume = move || qcow2::resume_with(&header, &name, &key, &run_dir);
                self.qemu.call(resume).await
            }
        }
    }
}
