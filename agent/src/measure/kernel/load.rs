//! From the object file to attached and pinned programs.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use aya::programs::links::FdLink;
use aya::programs::{Program, ProgramError};
use aya::{Ebpf, EbpfLoader};
use sha2::{Digest, Sha256};

use super::KernelError;
use super::btf::Btf;
use super::layout;
use super::pins::{MAPS, Pins};

/// The programs of the object and the hooks they go to, in the order in which they are attached: the one that tells a
/// module's path comes before the one that needs it.
pub const PROGRAMS: [(&str, &str); 26] = [
    ("program", "bprm_check_security"),
    ("mapping", "mmap_file"),
    ("module_path", "kernel_read_file"),
    ("module_file", "kernel_post_read_file"),
    ("module_buffer", "kernel_post_load_data"),
    ("kexec", "kernel_load_data"),
    ("asked", "file_ioctl"),
    ("protect", "file_mprotect"),
    ("anonymous_mapping", "mmap_file"),
    ("opened", "file_open"),
    ("link", "inode_follow_link"),
    ("signal", "task_kill"),
    ("trace", "ptrace_access_check"),
    ("moved", "cgroup_attach_task"),
    (TIDIER, "cgroup_rmdir"),
    ("limit", "task_setrlimit"),
    ("schedule", "task_setscheduler"),
    ("map_asked", "bpf_map"),
    ("program_asked", "bpf_prog"),
    ("link_asked", "bpf"),
    ("unpin", "inode_unlink"),
    ("unpin_folder", "inode_rmdir"),
    ("repin", "inode_rename"),
    ("unmount", "sb_umount"),
    ("mount", "sb_mount"),
    ("move_over", "move_mount"),
];

/// Programs of which a kernel has the first's hook, or gets the second: name and hook of each.
pub const EITHER: [[(&str, &str); 2]; 2] = [
    [("argument", "file_post_open"), ("argument_named", "file_open")],
    // Last, so that it does not see these programs being loaded.
    [("bpf_load", "bpf_prog_load"), ("bpf_seen", "bpf_prog")],
];

/// Those of [`PROGRAMS`] that queue nothing themselves.
pub const SILENT: [&str; 3] = ["module_path", "link", TIDIER];

/// The one of [`PROGRAMS`] that nothing is missed without.
pub const TIDIER: &str = "gone";

/// Ours has less than 1 MiB.
pub const OBJECT_LIMIT: u64 = 16 << 20;
/// The kernel's has 5 MiB to 15 MiB.
pub const BTF_LIMIT: u64 = 64 << 20;

/// The object file's content.
pub struct Object {
    path: PathBuf,
    bytes: Vec<u8>,
    digest: [u8; 32],
}

impl Object {
    /// Reads the object once: what is hashed is what is loaded.
    pub fn read(path: &Path) -> Result<Self, KernelError> {
        let too_large = || KernelError::ObjectTooLarge {
            path: path.to_owned(),
            limit: OBJECT_LIMIT,
        };
        let bytes = read_limited(path, OBJECT_LIMIT)
            .map_err(KernelError::file("read the kernel programs", path))?
            .ok_or_else(too_large)?;
        let digest = Sha256::digest(&bytes).into();
        Ok(Self {
            path: path.to_owned(),
            bytes,
            digest,
        })
    }

    /// SHA-256 of the file.
    pub fn digest(&self) -> &[u8; 32] {
        &self.digest
    }

    /// Loads every program, attaches it and pins its link into `folder`. The maps that outlive the programs are opened
    /// from their pins, or made and pinned. Programs attached by the time of an error go when the error is dropped,
    /// or, if pinned, at the next start.
    pub fn attach(&self, pins: &Pins, folder: &Path) -> Result<Vec<FdLink>, KernelError> {
        let btf = aya::Btf::from_sys_fs().map_err(|error| KernelError::KernelBtf(Box::new(error)))?;
        let kernel = kernel_btf()?;
        let wanted = wanted(&kernel)?;
        let words = layout::resolve(&kernel)?.words();
        // Megabytes, and no longer needed.
        drop(kernel);
        let mut ebpf = self.load(&btf, &words, pins)?;
        let mut links = Vec::new();
        for (name, hook) in wanted {
            let program = ebpf.program_mut(name).ok_or_else(|| self.lacks(name))?;
            let link = self.start(program, name, hook, &btf)?;
            // How far it is from the kernel's limit; kernels before 5.16 do not say.
            if let Some(instructions) = program.info().ok().and_then(|info| info.verified_instruction_count()) {
                tracing::debug!(program = name, instructions, "verified");
            }
            let path = folder.join(name);
            let pinned = link.pin(&path).map_err(|error| KernelError::Link {
                path,
                step: "pinned",
                source: Box::new(error),
            })?;
            links.push(pinned.into());
        }
        Ok(links)
    }

    /// Loads and attaches one: to a hook for security modules, or to a tracepoint.
    fn start(
        &self,
        program: &mut Program,
        name: &'static str,
        hook: &str,
        btf: &aya::Btf,
    ) -> Result<FdLink, KernelError> {
        let failed = |step| {
            move |error: ProgramError| KernelError::Program {
                program: name,
                step,
                source: Box::new(error),
            }
        };
        let (attached, detached) = (failed("attached"), failed("detached from the loader"));
        let refused = |error| KernelError::load(name, error);
        match program {
            Program::Lsm(program) => {
                program.load(hook, btf).map_err(refused)?;
                let id = program.attach().map_err(attached)?;
                program.take_link(id).map(FdLink::from).map_err(detached)
            }
            Program::BtfTracePoint(program) => {
                program.load(hook, btf).map_err(refused)?;
                let id = program.attach().map_err(attached)?;
                program.take_link(id).map(FdLink::from).map_err(detached)
            }
            _ => Err(self.lacks(name)),
        }
    }

    fn lacks(&self, program: &'static str) -> KernelError {
        KernelError::NoProgram {
            path: self.path.clone(),
            program,
        }
    }

    fn load(&self, btf: &aya::Btf, words: &[u32], pins: &Pins) -> Result<Ebpf, KernelError> {
        let mut loader = EbpfLoader::new();
        loader.btf(Some(btf)).override_global("LAYOUT", words, true);
        for map in MAPS {
            loader.map_pin_path(map, pins.map(map));
        }
        loader.load(&self.bytes).map_err(|error| KernelError::Object {
            path: self.path.clone(),
            source: Box::new(error),
        })
    }
}

/// The programs for the kernel with this BTF.
fn wanted(kernel: &Btf) -> Result<Vec<(&'static str, &'static str)>, KernelError> {
    let mut chosen = PROGRAMS.to_vec();
    for [new, old] in EITHER {
        let has = kernel.has_function(&format!("bpf_lsm_{}", new.1))?;
        chosen.push(if has { new } else { old });
    }
    Ok(chosen)
}

fn kernel_btf() -> Result<Btf, KernelError> {
    let path = Path::new("/sys/kernel/btf/vmlinux");
    let missing = |source| KernelError::BtfMissing {
        path: path.to_owned(),
        source,
    };
    let bytes = read_limited(path, BTF_LIMIT)
        .map_err(missing)?
        .ok_or_else(|| missing(std::io::ErrorKind::FileTooLarge.into()))?;
    Ok(Btf::parse(bytes)?)
}

/// A whole file; `None` = it has more than `limit` bytes.
pub fn read_limited(path: &Path, limit: u64) -> std::io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    let length = File::open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
    Ok(u64::try_from(length)
        .is_ok_and(|length| length <= limit)
        .then_some(bytes))
}
