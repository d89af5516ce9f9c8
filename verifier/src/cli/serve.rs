//! `assay-verifier serve`.

use std::io;

use tokio::signal::unix::{SignalKind, signal};

use super::CliError;
use crate::config::{Config, StateDir};
use crate::serve::{ServeError, Server};

pub(super) fn run(state: &StateDir) -> Result<(), CliError> {
    let config = Config::load(state)?;
    tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_max_level(config.log_level)
        .with_ansi(false)
        .with_target(false)
        .init();
    // A core file would hold the master key, and with it every disk's.
    if let Err(error) = nix::sys::prctl::set_dumpable(false) {
        tracing::warn!("core dumps of this process cannot be turned off: {error}");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(CliError::Runtime)?;
    runtime.block_on(serve(state, &config))?;
    Ok(())
}

async fn serve(state: &StateDir, config: &Config) -> Result<(), ServeError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(ServeError::Signal)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(ServeError::Signal)?;
    let server = Server::bind(state, config).await?;
    tracing::info!("listening on {}, hosts reach it at {}", server.address(), config.url);
    tokio::select! {
        ended = server.run() => match ended? {},
        _ = terminate.recv() => tracing::info!("terminated"),
        _ = interrupt.recv() => tracing::info!("interrupted"),
    }
    Ok(())
}
