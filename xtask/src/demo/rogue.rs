//! What nobody approved: a real module of the running kernel that was never loaded, and a real program that was not
//! there when the known-good values were captured.

use assay_tests::verifier::HostState;
use assay_tests::vm::{Image, Vm};
use sha2::{Digest, Sha256};

use crate::image::decompress;
use crate::run::Error;

/// Where the module lies in the guest.
pub const MODULE: &str = "/root/rogue/dummy.ko";
/// Where the program lies in the guest.
pub const PROGRAM: &str = "/root/rogue/program";
/// A network driver without hardware: harmless, and in every kernel package.
const MODULE_FILE: &str = "kernel/drivers/net/dummy.ko";

/// Both, put into the guest but not yet run.
pub struct Rogue {
    module_sha256: String,
    program_sha256: String,
}

impl Rogue {
    /// Puts them there.
    pub fn new(image: &Image, vm: &Vm) -> Result<Self, Error> {
        let candidates = [
            image.modules.join(MODULE_FILE),
            image.modules.join(format!("{MODULE_FILE}.xz")),
        ];
        let file = candidates
            .iter()
            .find(|file| file.exists())
            .ok_or_else(|| Error::Demo(format!("the kernel package has no {MODULE_FILE}")))?;
        let module = decompress(file)?;
        // One byte after the end of an ELF file changes its digest and nothing else.
        let mut program = vm.guest().get("/usr/bin/true").map_err(Error::from)?;
        program.push(0);
        vm.guest().put(MODULE, 0o644, &module)?;
        vm.guest().put(PROGRAM, 0o755, &program)?;
        if vm.guest().get(PROGRAM)? != program {
            return Err(Error::Io {
                action: format!("copy {PROGRAM}"),
                source: std::io::ErrorKind::InvalidData.into(),
            });
        }
        let digest = |bytes: &[u8]| hex::encode(Sha256::digest(bytes));
        Ok(Self {
            module_sha256: digest(&module),
            program_sha256: digest(&program),
        })
    }

    /// The verifier's reason that names the module and its digest.
    pub fn module_reason<'a>(&self, host: &'a HostState) -> Option<&'a str> {
        names(host, MODULE, &self.module_sha256)
    }

    /// The verifier's reason that names the program and its digest.
    pub fn program_reason<'a>(&self, host: &'a HostState) -> Option<&'a str> {
        names(host, PROGRAM, &self.program_sha256)
    }
}

fn names<'a>(host: &'a HostState, path: &str, sha256: &str) -> Option<&'a str> {
    host.reasons
        .iter()
        .map(String::as_str)
        .find(|reason| reason.contains(path) && reason.contains(sha256))
}
