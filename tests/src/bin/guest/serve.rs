//! Executes the harness's requests, one a connection, each in its own thread.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Error, Result, Seek, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use assay_tests::wire::{self, GUEST_PORT, Request, Response};
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use nix::unistd::Pid;

/// Programs started in the background; the exit status once known.
type Background = Arc<Mutex<HashMap<i32, Option<ExitStatus>>>>;

/// Listens for ever.
pub fn run() -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, GUEST_PORT))?;
    let background = Background::default();
    // The harness and whoever watches the console learn from this line that the machine is up.
    println!("assay-guest: listening on port {GUEST_PORT}");
    for stream in listener.incoming() {
        let (stream, background) = (stream?, Arc::clone(&background));
        std::thread::spawn(move || {
            if let Err(error) = answer(stream, &background) {
                eprintln!("assay-guest: {error}");
            }
        });
    }
    Ok(())
}

fn answer(mut stream: TcpStream, background: &Background) -> Result<()> {
    stream.set_nodelay(true)?;
    let (request, body) = wire::receive(&mut stream)?;
    let power_off = matches!(request, Request::PowerOff);
    let (response, body) = execute(request, &body, background).unwrap_or_else(|error| {
        (
            Response::Failed {
                message: error.to_string(),
            },
            Vec::new(),
        )
    });
    wire::send(&mut stream, &response, &body)?;
    if power_off {
        super::init::power_off();
    }
    Ok(())
}

fn execute(request: Request, body: &[u8], background: &Background) -> Result<(Response, Vec<u8>)> {
    let done = || (Response::Done, Vec::new());
    Ok(match request {
        Request::Ping => (pong()?, Vec::new()),
        Request::Run { argv, env, timeout_ms } => run_program(&argv, env, body, Duration::from_millis(timeout_ms))?,
        Request::Spawn { argv, env, log } => (start(&argv, env, &log, background)?, Vec::new()),
        Request::Wait { pid, timeout_ms } => (wait(pid, Duration::from_millis(timeout_ms), background)?, Vec::new()),
        Request::Signal { pid, signal } => {
            kill(Pid::from_raw(pid), Signal::try_from(signal)?)?;
            done()
        }
        Request::SignalFromInit { pid, signal } => {
            super::from_init::signal(pid, signal)?;
            done()
        }
        Request::Put { path, mode } => {
            put(&path, mode, body)?;
            done()
        }
        Request::Get { path } => (Response::Done, std::fs::read(path)?),
        Request::SetClock { unix_ms } => {
            let since_epoch = Duration::from_millis(unix_ms);
            clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(since_epoch))?;
            done()
        }
        Request::PowerOff => done(),
    })
}

fn pong() -> Result<Response> {
    let read = |path: &str| Ok::<_, Error>(std::fs::read_to_string(path)?.trim().to_owned());
    Ok(Response::Pong {
        boot_id: read("/proc/sys/kernel/random/boot_id")?,
        kernel: read("/proc/sys/kernel/osrelease")?,
    })
}

fn command(argv: &[String], env: Vec<(String, String)>) -> Result<Command> {
    let (program, arguments) = argv.split_first().ok_or_else(|| Error::other("no program given"))?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("HOME", "/root")
        .envs(env)
        .current_dir("/root")
        .process_group(0);
    Ok(command)
}

/// Output goes to files, not pipes: a daemon left behind would hold a pipe open for ever.
fn run_program(
    argv: &[String],
    env: Vec<(String, String)>,
    input: &[u8],
    timeout: Duration,
) -> Result<(Response, Vec<u8>)> {
    let (mut stdin, mut stdout, mut stderr) = (scratch()?, scratch()?, scratch()?);
    stdin.write_all(input)?;
    stdin.rewind()?;
    let mut child = command(argv, env)?
        .stdin(stdin)
        .stdout(stdout.try_clone()?)
        .stderr(stderr.try_clone()?)
        .spawn()
        .map_err(|error| Error::new(error.kind(), format!("cannot start: {error}")))?;
    let (status, timed_out) = wait_or_kill(&mut child, timeout)?;
    let mut body = contents(&mut stdout)?;
    let length = body.len() as u64;
    body.extend(contents(&mut stderr)?);
    Ok((ended(status, timed_out, length), body))
}

fn scratch() -> Result<File> {
    tempfile::tempfile_in("/run")
}

fn contents(file: &mut File) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.rewind()?;
    std::io::Read::read_to_end(file, &mut bytes)?;
    Ok(bytes)
}

fn wait_or_kill(child: &mut Child, timeout: Duration) -> Result<(ExitStatus, bool)> {
    let start = Instant::now();
    let mut pause = Duration::from_millis(1);
    while start.elapsed() < timeout {
        if let Some(status) = child.try_wait()? {
            return Ok((status, false));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
    // It leads its own group: whatever it started goes with it.
    let _ = killpg(
        Pid::from_raw(i32::try_from(child.id()).map_err(Error::other)?),
        Signal::SIGKILL,
    );
    Ok((child.wait()?, true))
}

fn ended(status: ExitStatus, timed_out: bool, stdout: u64) -> Response {
    Response::Ended {
        code: status.code(),
        signal: status.signal(),
        timed_out,
        stdout,
    }
}

fn start(argv: &[String], env: Vec<(String, String)>, log: &str, background: &Background) -> Result<Response> {
    let output = File::options().create(true).append(true).open(log)?;
    let mut child = command(argv, env)?
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .spawn()
        .map_err(|error| Error::new(error.kind(), format!("cannot start: {error}")))?;
    let pid = i32::try_from(child.id()).map_err(Error::other)?;
    background
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .insert(pid, None);
    let background = Arc::clone(background);
    std::thread::spawn(move || {
        if let Ok(status) = child.wait() {
            background
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(pid, Some(status));
        }
    });
    Ok(Response::Started { pid })
}

fn wait(pid: i32, timeout: Duration, background: &Background) -> Result<Response> {
    let start = Instant::now();
    loop {
        let known = background
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&pid)
            .copied();
        match known {
            None => return Err(Error::other("no such process was started")),
            Some(Some(status)) => return Ok(ended(status, false, 0)),
            Some(None) if start.elapsed() >= timeout => {
                return Ok(Response::Ended {
                    code: None,
                    signal: None,
                    timed_out: true,
                    stdout: 0,
                });
            }
            Some(None) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

fn put(path: &str, mode: u32, content: &[u8]) -> Result<()> {
    if let Some(folder) = std::path::Path::new(path).parent() {
        std::fs::create_dir_all(folder)?;
    }
    let mut file = File::create(path)?;
    file.write_all(content)?;
    file.set_permissions(std::fs::Permissions::from_mode(mode))
}
