//! The measured process: the agent's daemon, its log fed by [`super::source::Paced`].

use std::fs;
use std::path::Path;

use assay_agent::config::Config;
use assay_agent::daemon::{self, Parts};
use assay_agent::join;
use assay_agent::log_view::LogView;
use assay_agent::measure::{Settings, host};
use assay_agent::memory;
use assay_agent::tpm::{self, TpmConfig};
use assay_evidence::digest::Sha256Digest;
use assay_verifier::config::StateDir;

use super::source::Paced;
use super::{Outcome, RECORDS};

/// Writes the configuration and joins the verifier.
pub fn prepare(folder: &Path, verifier: &StateDir, listen: &str, tcti: &str) -> Outcome<()> {
    let path = folder.display();
    let text = format!(
        "listen = \"{listen}\"\nstate_dir = \"{path}/agent\"\nrun_dir = \"{path}/run\"\n[tpm]\ntcti = \"{tcti}\"\n[log]\nlevel = \"warn\"\n"
    );
    fs::write(folder.join("agent.toml"), text)?;
    fs::create_dir(folder.join("run"))?;
    let file = verifier.join_file();
    join::join(&folder.join("agent"), &file, &join::Membership::read(&file)?, false)?;
    Ok(())
}

/// Runs the daemon until it is killed.
pub fn run(folder: &Path) -> Outcome<()> {
    memory::give_back_early();
    let config = Config::load(Some(&folder.join("agent.toml")))?;
    let boot_id = host::boot_id()?;
    let tpm = TpmConfig {
        tcti: config.tpm.tcti.clone(),
        pcr: config.tpm.pcr,
        ak_handle: config.tpm.ak_handle,
        ak: config.tpm.ak,
        ek: config.tpm.ek,
        timeout: config.tpm.timeout,
    };
    let tpm = tpm::Handle::open(tpm, LogView::new(boot_id.clone()))?;
    let settings = Settings {
        run_dir: config.run_dir.clone(),
        log_max_bytes: config.measure.log_max,
        pcr: config.tpm.pcr,
        boot_id,
        bpf_digest: Sha256Digest::from([0; 32]),
        tier: 1,
        mode: config.measure.mode,
        blind: String::new(),
        protected: false,
        fresh_hooks: true,
    };
    let source = Box::new(Paced::new(tpm.log().clone(), RECORDS));
    let parts = Parts { tpm, source, settings };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(daemon::run_with(&config, parts))?)
}
