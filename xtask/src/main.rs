//! The repository's own commands: `cargo xtask <command>`. Each does its own set-up first, and is quick when all is there.

mod build;
mod demo;
#[cfg(test)]
mod docs;
mod fuzz;
mod image;
mod matrix;
mod package;
mod run;
mod setup;
mod test;
mod ui;
mod workspace;

use std::process::ExitCode;

use assay_tests::vm::{DEFAULT_KERNEL, KERNELS, Variant};
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Set up, build, test and show Assay", version)]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what building and testing needs
    Setup {
        /// Only report; exit with status 1 if something is missing
        #[arg(long)]
        check: bool,
    },
    /// Build the kernel programs, the agent and the verifier
    Build {
        /// Optimised, as shipped
        #[arg(long)]
        release: bool,
    },
    /// Run the tests, all layers or the ones named
    Test {
        /// unit, vectors, fuzz, tpm, peers, vm, attacks, xen, packages
        layers: Vec<test::Layer>,
        /// Run only the tests whose name contains this
        #[arg(long)]
        filter: Option<String>,
        /// Afterwards, print the table of attacks, and compare it with agent/docs/attacks.md
        #[arg(long)]
        matrix: bool,
        /// Write the table of attacks to agent/docs/attacks.md instead
        #[arg(long, requires = "matrix")]
        update: bool,
    },
    /// Boot a test machine and use its console (`exit` or Ctrl-A X switches it off)
    Vm {
        /// Build the machines that the tests restore, but do not start one
        #[arg(long)]
        build_only: bool,
        /// Without the agent on board
        #[arg(long)]
        bare: bool,
        /// The kernel's series
        #[arg(long, default_value = DEFAULT_KERNEL, value_parser = KERNELS)]
        kernel: String,
        /// How the machine of the script was booted: default, no-bpf-lsm, ima-tcb, ima-exec
        #[arg(long, requires = "script", default_value = "default", value_parser = variant)]
        boot: Variant,
        /// Words for the kernel's command line
        #[arg(long, default_value = "")]
        cmdline: String,
        /// Instead of a console: restore the saved machine, run this shell script in it, and print what it prints
        #[arg(long, conflicts_with_all = ["build_only", "cmdline"])]
        script: Option<String>,
        /// A file to copy to /root of the machine before the script runs; may be repeated
        #[arg(long, requires = "script")]
        file: Vec<std::path::PathBuf>,
    },
    /// Measure: `quote` gives the latency of quotes over mutual TLS, and the agent's memory; `verify` how many hosts a
    /// verifier can judge; `seal` the speed of sealing, beside qemu-img's; `unlock` the time from a hook's call to the open disk, beside
    /// cryptsetup's, and what a hundred at once wait for, and `exec` what measuring adds to starting programs, beside the kernel's IMA, both in
    /// test machines
    Bench {
        /// Which benchmark
        #[arg(default_value = "quote")]
        name: String,
        /// Words for the benchmark itself: `exec --help` names them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<String>,
    },
    /// Run the fuzz targets of what reads evidence; inputs that are refused with a panic are left in target/fuzz
    Fuzz {
        /// Which targets; all if none is named
        #[arg(value_parser = fuzz::TARGETS)]
        targets: Vec<String>,
        /// How long each runs
        #[arg(long, value_name = "SECONDS", default_value_t = fuzz::SHORT, value_parser = clap::value_parser!(u64).range(1..=fuzz::LONGEST))]
        seconds: u64,
    },
    /// Make RPMs, .debs, the update ISO for XCP-ng 8.3, their checksums and a bill of materials; the same sources give the same bytes
    Package {
        /// Where to [default: target/package]
        #[arg(long, value_name = "FOLDER")]
        out: Option<std::path::PathBuf>,
        /// A secret RSA key without a passphrase, as `gpg --armor --export-secret-keys` writes it, that signs RPMs and ISO; without it a
        /// test key signs, and the ISO says so
        #[arg(long, value_name = "FILE")]
        sign_key: Option<std::path::PathBuf>,
    },
    /// Show the whole story in a virtual machine: measured, trusted, given a disk key, then refused after a rogue load
    Demo,
}

fn variant(name: &str) -> Result<Variant, String> {
    let found = Variant::ALL.into_iter().find(|variant| variant.name() == name);
    found.ok_or_else(|| format!("one of {}", Variant::ALL.map(Variant::name).join(", ")))
}

/// `cargo xtask bench`.
fn bench(name: &str, words: &[String]) -> Result<(), run::Error> {
    let tools = setup::install()?;
    match name {
        "verify" => return build::bench_evidence(name, words),
        "exec" | "unlock" => {}
        _ => return build::bench(name, words),
    }
    let built = build::for_bench(&tools)?;
    let image = image::prepare_bench(&built)?;
    build::bench_shipped(name, words, &built, &image)
}

/// `cargo xtask fuzz`.
fn fuzz(targets: &[String], seconds: u64) -> Result<(), run::Error> {
    let tools = setup::install()?;
    let wanted = |name: &&str| targets.is_empty() || targets.iter().any(|one| one == name);
    let targets: Vec<&str> = fuzz::TARGETS.into_iter().filter(wanted).collect();
    let found = fuzz::run(&tools.fuzzer, &targets, seconds)?;
    match found.failed.as_slice() {
        [] => Ok(()),
        failed => Err(run::Error::Tests(format!("fuzz targets failed: {}", failed.join(", ")))),
    }
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Task::Setup { check: true } => setup::check(),
        Task::Setup { check: false } => setup::install().and_then(|_| setup::install_servers()),
        Task::Build { release } => setup::install().and_then(|tools| {
            build::all(
                &tools,
                if release {
                    build::Profile::Release
                } else {
                    build::Profile::Debug
                },
            )
            .map(drop)
        }),
        Task::Test {
            layers,
            filter,
            matrix,
            update,
        } => test::run(&layers, filter.as_deref()).and_then(|()| {
            if matrix {
                test::show_matrix(&layers, filter.as_deref(), update)
            } else {
                Ok(())
            }
        }),
        Task::Vm {
            bare,
            kernel,
            boot,
            script: Some(script),
            file,
            ..
        } => image::script(bare, &kernel, boot, &script, &file),
        Task::Vm {
            build_only,
            bare,
            kernel,
            cmdline,
            ..
        } => image::console(build_only, bare, &kernel, cmdline),
        Task::Fuzz { targets, seconds } => fuzz(&targets, seconds),
        Task::Bench { name, words } => bench(&name, &words),
        Task::Package { out, sign_key } => package::run(out, sign_key.as_deref()),
        Task::Demo => demo::run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            ui::report(&error);
            ExitCode::FAILURE
        }
    }
}
