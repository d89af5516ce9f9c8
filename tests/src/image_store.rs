//! Image stores as peers of the verifier: a plain HTTP one, and a real OpenStack Glance without Keystone. Gone on drop.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::HarnessError;
use crate::child::{Child, run};
use crate::swtpm::{free_port_pair, last_words};

/// Where `cargo xtask test peers` says that it has Glance.
const VARIABLE: &str = "ASSAY_TEST_GLANCE";
/// How long either may take to listen: Glance imports half of OpenStack.
const START_TIMEOUT: Duration = Duration::from_secs(120);
/// The plain store.
const PUT_SERVER: &str = include_str!("../python/put_server.py");
/// What serves Glance's application.
const GLANCE_SERVER: &str = include_str!("../python/glance_server.py");

/// An image store.
#[derive(Debug)]
pub struct ImageStore {
    _server: Child,
    port: u16,
    images: PathBuf,
    _dir: tempfile::TempDir,
}

impl ImageStore {
    /// Files that are put and got. Every answer that is longer than `break_after` bytes, if that isn't 0, breaks off there.
    ///
    /// # Errors
    /// Without `python3`, or when it does not listen.
    pub fn plain(break_after: u64) -> Result<Self, HarnessError> {
        let dir = folder(&std::env::temp_dir())?;
        let images = made(dir.path(), "images")?;
        let port = free_port_pair()?;
        let script = written(dir.path(), "server.py", PUT_SERVER)?;
        let server = spawn(Path::new("python3"), dir.path(), |command| {
            command
                .arg(script)
                .arg(port.to_string())
                .arg(&images)
                .arg(break_after.to_string());
        })?;
        Self::listening(server, port, images, dir)
    }

    /// Glance, with its own database and files, and a container format `encrypted` beside `bare`.
    ///
    /// # Errors
    /// When it is not installed, its database cannot be made, or it does not listen.
    pub fn glance() -> Result<Self, HarnessError> {
        let env = std::env::var_os(VARIABLE).map(PathBuf::from);
        let env = env.ok_or_else(|| HarnessError::Start {
            program: "Glance".to_owned(),
            source: std::io::ErrorKind::NotFound.into(),
        })?;
        // Making its database is hundreds of small transactions, each synced.
        let memory = Path::new("/dev/shm");
        let dir = folder(if memory.is_dir() { memory } else { Path::new("/tmp") })?;
        let images = made(dir.path(), "images")?;
        let (tasks, staging) = (made(dir.path(), "tasks")?, made(dir.path(), "staging")?);
        let config = format!(
            "[DEFAULT]\nenabled_backends = disk:file\n\
             [database]\nconnection = sqlite:///{db}\n\
             [glance_store]\ndefault_backend = disk\n\
             [disk]\nfilesystem_store_datadir = {images}\n\
             [image_format]\ncontainer_formats = bare,encrypted\n\
             [os_glance_tasks_store]\nfilesystem_store_datadir = {tasks}\n\
             [os_glance_staging_store]\nfilesystem_store_datadir = {staging}\n\
             [oslo_policy]\nenforce_scope = false\nenforce_new_defaults = false\n",
            db = dir.path().join("glance.sqlite").display(),
            images = images.display(),
            tasks = tasks.display(),
            staging = staging.display(),
        );
        let config = written(dir.path(), "glance-api.conf", &config)?;
        let paste = env.join("etc/glance/glance-api-paste.ini");
        std::fs::copy(&paste, dir.path().join("glance-api-paste.ini"))
            .map_err(HarnessError::io(format!("copy {}", paste.display())))?;
        run(Command::new(env.join("bin/glance-manage"))
            .arg("--config-file")
            .arg(config)
            .arg("db_sync"))?;
        let port = free_port_pair()?;
        let script = written(dir.path(), "server.py", GLANCE_SERVER)?;
        let server = spawn(&env.join("bin/python"), dir.path(), |command| {
            command
                .arg(script)
                .arg(port.to_string())
                .env("OS_GLANCE_CONFIG_DIR", dir.path());
        })?;
        Self::listening(server, port, images, dir)
    }

    /// Where it listens, without a slash at the end.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The folder in which it has what it was given.
    #[must_use]
    pub fn images(&self) -> &Path {
        &self.images
    }

    fn listening(mut server: Child, port: u16, images: PathBuf, dir: tempfile::TempDir) -> Result<Self, HarnessError> {
        let start = Instant::now();
        while !server.listens_on(&[port]) {
            if server.ended().is_some() || start.elapsed() > START_TIMEOUT {
                return Err(HarnessError::Timeout {
                    what: "the image store did not listen".to_owned(),
                    seconds: start.elapsed().as_secs(),
                    detail: last_words(&dir.path().join("server.log")),
                });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Self {
            _server: server,
            port,
            images,
            _dir: dir,
        })
    }
}

fn folder(within: &Path) -> Result<tempfile::TempDir, HarnessError> {
    tempfile::Builder::new()
        .prefix("assay-images-")
        .tempdir_in(within)
        .map_err(HarnessError::io("make a folder for an image store"))
}

fn made(dir: &Path, name: &str) -> Result<PathBuf, HarnessError> {
    let path = dir.join(name);
    std::fs::create_dir(&path).map_err(HarnessError::io(format!("make {}", path.display())))?;
    Ok(path)
}

fn written(dir: &Path, name: &str, text: &str) -> Result<PathBuf, HarnessError> {
    let path = dir.join(name);
    std::fs::write(&path, text).map_err(HarnessError::io(format!("write {}", path.display())))?;
    Ok(path)
}

fn spawn(program: &Path, dir: &Path, configure: impl FnOnce(&mut Command)) -> Result<Child, HarnessError> {
    let log = dir.join("server.log");
    let file = std::fs::File::create(&log).map_err(HarnessError::io(format!("write {}", log.display())))?;
    Child::spawn(&program.to_string_lossy(), |command| {
        configure(command);
        command.stdout(Stdio::null()).stderr(file);
    })
}
