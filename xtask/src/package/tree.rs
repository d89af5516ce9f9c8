//! What a package installs, laid out as it will lie on the host.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use flate2::{Compression, GzBuilder};

use super::Part;
use super::rpm::Dist;
use super::units::for_systemd_219;
use crate::build::Built;
use crate::run::{Error, io};
use crate::workspace::root;

/// The contents of one package.
pub(super) struct Tree {
    /// Which.
    pub(super) part: Part,
    /// The folder that stands for `/`.
    pub(super) root: PathBuf,
    /// Every file, as a path below it, in order.
    pub(super) files: Vec<PathBuf>,
    dist: Dist,
    epoch: u64,
}

impl Tree {
    /// Lays a package out below `work`. What is laid out for Enterprise Linux is for Debian, too.
    pub(super) fn lay_out(
        part: Part,
        dist: Dist,
        work: &Path,
        built: &Built,
        manuals: &Path,
        epoch: u64,
    ) -> Result<Self, Error> {
        let name = part.name();
        let mut tree = Self {
            part,
            root: work.join(format!("{}{}", name.trim_start_matches("assay-"), dist.tag())),
            files: Vec::new(),
            dist,
            epoch,
        };
        let packaging = root().join("packaging");
        tree.copy(&built.bin.join(name), &format!("usr/bin/{name}"), 0o755)?;
        let unit = format!("{name}.service");
        tree.unit(&packaging.join(&unit), &unit)?;
        match part {
            Part::Agent => tree.agent(&packaging, built)?,
            Part::Verifier => tree.verifier(&packaging)?,
        }
        tree.manuals(manuals)?;
        for file in ["LICENSE-APACHE", "LICENSE-MIT"] {
            tree.copy(&root().join(file), &format!("usr/share/doc/{name}/{file}"), 0o644)?;
        }
        let changes = fs::read(packaging.join("CHANGELOG.md")).map_err(io("read the changelog"))?;
        tree.put(&changes, &format!("usr/share/doc/{name}/CHANGELOG.md"), 0o644)?;
        tree.files.sort();
        tree.settle()?;
        Ok(tree)
    }

    fn agent(&mut self, packaging: &Path, built: &Built) -> Result<(), Error> {
        for object in [&built.bpf_object, &built.probe_object] {
            let name = object.file_name().unwrap_or_default().to_string_lossy();
            self.copy(object, &format!("usr/lib/assay/{name}"), 0o644)?;
        }
        let config = packaging.join("agent.toml");
        self.copy(&config, "etc/assay/agent.toml", 0o644)?;
        self.copy(
            &packaging.join("modules-load.conf"),
            "usr/lib/modules-load.d/assay.conf",
            0o644,
        )?;
        self.copy(
            &packaging.join("assay.preset"),
            "usr/lib/systemd/system-preset/85-assay-agent.preset",
            0o644,
        )?;
        for unit in ["assay-grub.path", "assay-grub.service"] {
            self.unit(&packaging.join(unit), unit)?;
        }
        if self.dist == Dist::Xcpng83 {
            self.copy(
                &packaging.join("xcpng/assay-agent.tmpfiles"),
                "usr/lib/tmpfiles.d/assay-agent.conf",
                0o644,
            )?;
        }
        self.hooks(&packaging.join("hooks"))?;
        // Tier 3's probes end with the agent, and so could not be handed over.
        if self.dist != Dist::Xcpng83 {
            self.initramfs(packaging)?;
        }
        let mut page = fs::read_to_string(packaging.join("man/agent.toml.5")).map_err(io("read agent.toml.5"))?;
        let shown = fs::read_to_string(&config).map_err(io("read agent.toml"))?;
        page.push_str(".PP\n.nf\n");
        for line in shown.lines() {
            // A line of the file must not be taken for one of troff's.
            page.push_str(&format!("\\&{}\n", line.replace('\\', "\\e").replace('-', "\\-")));
        }
        page.push_str(".fi\n.SH SEE ALSO\n.BR assay\\-agent (8)\n");
        self.manual("agent.toml.5", page.as_bytes())
    }

    /// For the operator to install where a toolstack looks for them: none is in force by being in the package, and so none is executable here.
    fn hooks(&mut self, folder: &Path) -> Result<(), Error> {
        const UNIT: &str = "assay-disk@.service";
        for entry in fs::read_dir(folder).map_err(io(format!("list {}", folder.display())))? {
            let path = entry.map_err(io("list the hooks"))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name == UNIT {
                self.unit(&path, UNIT)?;
            } else {
                self.copy(&path, &format!("usr/share/assay/hooks/{name}"), 0o644)?;
            }
        }
        Ok(())
    }

    /// What starts the agent in an initramfs, for both makers of one; none does so before it is asked to.
    fn initramfs(&mut self, packaging: &Path) -> Result<(), Error> {
        const PARTS: [(&str, &str, u32); 3] = [
            ("initramfs-tools/hook", "usr/share/initramfs-tools/hooks/assay", 0o755),
            (
                "initramfs-tools/script",
                "usr/share/initramfs-tools/scripts/init-top/assay",
                0o755,
            ),
            (
                "dracut/90assay/module-setup.sh",
                "usr/lib/dracut/modules.d/90assay/module-setup.sh",
                0o755,
            ),
        ];
        for (from, to, mode) in PARTS {
            self.copy(&packaging.join(from), to, mode)?;
        }
        self.unit(&packaging.join("dracut/assay-early.service"), "assay-early.service")
    }

    fn verifier(&mut self, packaging: &Path) -> Result<(), Error> {
        self.copy(
            &packaging.join("assay-verifier.sysusers"),
            "usr/lib/sysusers.d/assay-verifier.conf",
            0o644,
        )?;
        self.copy(
            &packaging.join("assay-verifier.tmpfiles"),
            "usr/lib/tmpfiles.d/assay-verifier.conf",
            0o644,
        )?;
        self.copy(
            &packaging.join("assay.preset"),
            "usr/lib/systemd/system-preset/85-assay-verifier.preset",
            0o644,
        )?;
        let page = fs::read(packaging.join("man/assay-verifier.toml.5")).map_err(io("read assay-verifier.toml.5"))?;
        self.manual("assay-verifier.toml.5", &page)
    }

    fn manuals(&mut self, manuals: &Path) -> Result<(), Error> {
        let name = self.part.name();
        let folder = manuals.join("man");
        for entry in fs::read_dir(&folder).map_err(io(format!("list {}", folder.display())))? {
            let path = entry.map_err(io("list the manual pages"))?.path();
            let page = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if page.starts_with(&format!("{name}.")) || page.starts_with(&format!("{name}-")) {
                let text = fs::read(&path).map_err(io(format!("read {page}")))?;
                self.manual(&page, &text)?;
            }
        }
        for (from, to) in [
            (
                format!("bash/{name}.bash"),
                format!("usr/share/bash-completion/completions/{name}"),
            ),
            (format!("zsh/_{name}"), format!("usr/share/zsh/site-functions/_{name}")),
            (
                format!("fish/{name}.fish"),
                format!("usr/share/fish/vendor_completions.d/{name}.fish"),
            ),
        ] {
            self.copy(&manuals.join("completions").join(from), &to, 0o644)?;
        }
        Ok(())
    }

    fn unit(&mut self, from: &Path, name: &str) -> Result<(), Error> {
        let text = fs::read_to_string(from).map_err(io(format!("read {}", from.display())))?;
        let text = match self.dist {
            Dist::El10 => text,
            Dist::Xcpng83 => for_systemd_219(&text),
        };
        self.put(text.as_bytes(), &format!("usr/lib/systemd/system/{name}"), 0o644)
    }

    fn manual(&mut self, page: &str, text: &[u8]) -> Result<(), Error> {
        let section = page.rsplit('.').next().unwrap_or_default();
        let mut packed = GzBuilder::new().write(Vec::new(), Compression::best());
        let packed = packed.write_all(text).and_then(|()| packed.finish());
        let packed = packed.map_err(io(format!("compress {page}")))?;
        self.put(&packed, &format!("usr/share/man/man{section}/{page}.gz"), 0o644)
    }

    fn copy(&mut self, from: &Path, to: &str, mode: u32) -> Result<(), Error> {
        let bytes = fs::read(from).map_err(io(format!("read {}", from.display())))?;
        self.put(&bytes, to, mode)
    }

    fn put(&mut self, bytes: &[u8], to: &str, mode: u32) -> Result<(), Error> {
        let path = self.root.join(to);
        let writing = || format!("write {}", path.display());
        fs::create_dir_all(path.parent().unwrap_or(&self.root)).map_err(io(writing()))?;
        fs::write(&path, bytes).map_err(io(writing()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).map_err(io(writing()))?;
        self.files.push(to.into());
        Ok(())
    }

    /// Bytes of all files.
    pub(super) fn size(&self) -> Result<u64, Error> {
        let mut size = 0_u64;
        for file in &self.files {
            let path = self.root.join(file);
            let length = fs::metadata(&path)
                .map_err(io(format!("look at {}", path.display())))?
                .len();
            size = size.saturating_add(length);
        }
        Ok(size)
    }

    /// Gives every file and folder the one time, and folders the one mode.
    pub(super) fn settle(&self) -> Result<(), Error> {
        settle(&self.root, self.epoch)
    }
}

/// Gives every file and folder below the one time, and folders the one mode.
pub(super) fn settle(path: &Path, epoch: u64) -> Result<(), Error> {
    let doing = || format!("set the time of {}", path.display());
    if path.is_dir() {
        for entry in fs::read_dir(path).map_err(io(doing()))? {
            settle(&entry.map_err(io(doing()))?.path(), epoch)?;
        }
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).map_err(io(doing()))?;
    }
    let file = File::open(path).map_err(io(doing()))?;
    file.set_modified(UNIX_EPOCH + Duration::from_secs(epoch))
        .map_err(io(doing()))
}
