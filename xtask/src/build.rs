//! Building: the kernel programs with their own compiler, the rest with cargo's.

use std::path::{Path, PathBuf};
use std::process::Command;

use assay_tests::verifier::PROGRAMS_VARIABLE;
use assay_tests::vm::IMAGE_VARIABLE;

use crate::run::{Error, cargo, io, loud, output};
use crate::setup::{BpfCompiler, Tools};
use crate::ui::note;
use crate::workspace::{Key, artifacts, root, target};

/// The programs of tiers 1 and 2.
/// Debug information and `--btf`: functions called across programs, callbacks and maps need BTF, or do not load.
/// `v3`: 32-bit arithmetic and jumps, which the verifier follows better; every kernel since 5.1 has it.
const HOOKS: Object = Object {
    name: "assay-ebpf",
    flags: r#"--cfg=bpf_target_arch="x86_64" -Ctarget-cpu=v3 -Cdebuginfo=2 -Clink-arg=--btf"#,
    target: "bpf",
};
/// The probes of tier 3, for kernels as old as 4.19: those have neither `v3` nor use for BTF.
const PROBES: Object = Object {
    name: "assay-ebpf-probe",
    flags: r#"--cfg=bpf_target_arch="x86_64" -Ctarget-cpu=v2 -Cdebuginfo=0"#,
    target: "bpf-probe",
};

/// One object with kernel programs.
struct Object {
    /// The program's name in its package.
    name: &'static str,
    /// The compiler's.
    flags: &'static str,
    /// Folder below cargo's target folder: other flags would rebuild what is there.
    target: &'static str,
}

/// The workspace's release profile is made for daemons: strip and thin LTO would spoil the kernel programs.
const BPF_PROFILE: &[(&str, &str)] = &[
    ("CARGO_PROFILE_RELEASE_LTO", "true"),
    ("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1"),
    ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "3"),
    ("CARGO_PROFILE_RELEASE_DEBUG", "2"),
    ("CARGO_PROFILE_RELEASE_PANIC", "abort"),
    ("CARGO_PROFILE_RELEASE_STRIP", "none"),
];

/// How the programs are built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// Quick to build, for tests.
    Debug,
    /// As shipped.
    Release,
}

/// What building leaves.
#[derive(Debug)]
pub struct Built {
    /// The kernel programs of tiers 1 and 2.
    pub bpf_object: PathBuf,
    /// Those of tier 3.
    pub probe_object: PathBuf,
    /// The folder with the programs.
    pub bin: PathBuf,
    /// Which of them test machines carry.
    pub on_board: &'static [&'static str],
}

/// Builds everything.
pub fn all(tools: &Tools, profile: Profile) -> Result<Built, Error> {
    let packages = ["-p", "assay-agent", "-p", "assay-verifier", "-p", "assay-tests"];
    programs(tools, profile, &packages, &["assay-guest", "assay-agent"])
}

/// Builds what is shipped, as it is.
pub fn shipped(tools: &Tools) -> Result<Built, Error> {
    let packages = ["-p", "assay-agent", "-p", "assay-verifier"];
    programs(tools, Profile::Release, &packages, &[])
}

/// Builds the agent as shipped for XCP-ng 8.3, with a compiler and libraries of its own, apart from all else.
pub fn agent_for_xcpng(tools: &Tools, configure: impl FnOnce(&mut Command)) -> Result<Built, Error> {
    const TRIPLE: &str = "x86_64-unknown-linux-gnu";
    let folder = target().join("xcpng");
    let bpf_object = bpf(&tools.bpf, &HOOKS)?;
    let probe_object = bpf(&tools.bpf, &PROBES)?;
    let mut command = cargo();
    command.args(["build", "--release", "--bins", "-p", "assay-agent", "--target", TRIPLE]);
    // Its libsystemd is older than the crate for it wants.
    command.args(["--no-default-features", "--features", "sd-notify"]);
    command.arg("--target-dir").arg(&folder);
    command.env("CARGO_ENCODED_RUSTFLAGS", path_flags());
    configure(&mut command);
    loud(&mut command)?;
    Ok(Built {
        bpf_object,
        probe_object,
        bin: folder.join(TRIPLE).join("release"),
        on_board: &[],
    })
}

/// Builds everything as shipped, and the benchmarks' workload for their machines.
pub fn for_bench(tools: &Tools) -> Result<Built, Error> {
    let packages = ["-p", "assay-agent", "-p", "assay-verifier", "-p", "assay-tests"];
    programs(
        tools,
        Profile::Release,
        &packages,
        &["assay-guest", "assay-agent", "assay-load"],
    )
}

/// Builds what a machine without the agent needs.
pub fn bare(tools: &Tools) -> Result<Built, Error> {
    programs(tools, Profile::Debug, &["-p", "assay-tests"], &["assay-guest"])
}

fn programs(
    tools: &Tools,
    profile: Profile,
    packages: &[&str],
    on_board: &'static [&'static str],
) -> Result<Built, Error> {
    let bpf_object = bpf(&tools.bpf, &HOOKS)?;
    let probe_object = bpf(&tools.bpf, &PROBES)?;
    let mut command = cargo();
    command.args(["build", "--bins"]).args(packages);
    if profile == Profile::Release {
        command.arg("--release").env("CARGO_ENCODED_RUSTFLAGS", path_flags());
    }
    loud(&mut command)?;
    let bin = target().join(if profile == Profile::Release {
        "release"
    } else {
        "debug"
    });
    Ok(Built {
        bpf_object,
        probe_object,
        bin,
        on_board,
    })
}

/// Maps the paths of this machine away: a program does not tell where it was built, and is the same wherever it was.
fn path_flags() -> String {
    let map = |from: &Path, to| format!("--remap-path-prefix={}={to}", from.display());
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    let flags = [Some(map(&root(), "/assay")), home.map(|home| map(&home, "/cargo"))];
    flags.into_iter().flatten().collect::<Vec<_>>().join("\u{1f}")
}

/// Runs a benchmark, optimised, with words of its own.
pub fn bench(name: &str, words: &[String]) -> Result<(), Error> {
    let mut command = cargo();
    command
        .args(["bench", "-p", "assay-tests", "--bench", name, "--"])
        .args(words);
    loud(&mut command)
}

/// Runs a benchmark of programs as shipped, in a machine and beside it. It only looks on: it is built as tests are, with what is built for
/// those already.
pub fn bench_shipped(name: &str, words: &[String], built: &Built, image: &Path) -> Result<(), Error> {
    let mut command = cargo();
    command
        .args(["bench", "--profile", "dev", "-p", "assay-tests", "--bench", name, "--"])
        .args(words)
        .env(IMAGE_VARIABLE, image)
        .env(PROGRAMS_VARIABLE, &built.bin);
    loud(&mut command)
}

/// Runs a benchmark of the evidence alone, which needs its software host.
pub fn bench_evidence(name: &str, words: &[String]) -> Result<(), Error> {
    let mut command = cargo();
    command
        .args([
            "bench",
            "-p",
            "assay-evidence",
            "--features",
            "testing",
            "--bench",
            name,
            "--",
        ])
        .args(words);
    loud(&mut command)
}

/// Builds the kernel programs, unless their sources and their compiler are those of the object that is there.
fn bpf(compiler: &BpfCompiler, of: &Object) -> Result<PathBuf, Error> {
    let object = artifacts()?.join(of.name).with_extension("o");
    let stamp = object.with_extension("key");
    let key = Key::new("bpf object 1")
        .tree(&root().join("agent-ebpf"))?
        .file(&root().join("Cargo.lock"))?
        .text(of.flags)
        .text(&compiler.describe()?)
        .name();
    if object.exists() && std::fs::read_to_string(&stamp).is_ok_and(|old| old == key) {
        return Ok(object);
    }
    note(&format!("building {} with {compiler}", of.name));
    let target = target().join(of.target);
    let mut command = cargo();
    compiler.configure(&mut command);
    command
        .args([
            "build",
            "--release",
            "--target",
            "bpfel-unknown-none",
            "-p",
            "assay-ebpf",
        ])
        .args(["--features", "kernel", "--bin", of.name, "--target-dir"])
        .arg(&target)
        .env("RUSTFLAGS", of.flags)
        .envs(BPF_PROFILE.iter().copied());
    loud(&mut command)?;
    let built = target.join("bpfel-unknown-none/release").join(of.name);
    std::fs::copy(&built, &object).map_err(io(format!("copy {}", built.display())))?;
    std::fs::write(&stamp, key).map_err(io(format!("write {}", stamp.display())))?;
    Ok(object)
}

/// Copies a program without its debug information: test machines have little memory, and a debug build is mostly that.
pub fn strip_debug(from: &Path, to: &Path) -> Result<(), Error> {
    output(Command::new("objcopy").arg("--strip-debug").args([from, to])).map(drop)
}
