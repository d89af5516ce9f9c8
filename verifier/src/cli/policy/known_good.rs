//! `assay-verifier policy scan` and `policy add`: known-good digests from packages, installed roots and initramfs files.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use assay_evidence::event::LoadKind;
use assay_evidence::policy::{ALLOWED, Approved};
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{existing, part_name};
use crate::cli::{CliError, print, print_json};
use crate::known_good::{self, Found, Limits, Options, Progress};
use crate::store::Store;

/// Options of `policy scan`.
#[derive(Debug, Args)]
pub(in crate::cli) struct ScanArgs {
    #[command(flatten)]
    inputs: Inputs,
    /// As JSON, for programs
    #[arg(long)]
    json: bool,
}

/// Options of `policy add`.
#[derive(Debug, Args)]
pub(in crate::cli) struct AddArgs {
    #[command(flatten)]
    inputs: Inputs,
    /// Set of the policy that it is added to; made if there is none. A set of its own can expire and be dropped as a whole
    #[arg(long, value_name = "NAME", default_value = ALLOWED, value_parser = part_name)]
    set: String,
    /// Name of the policy
    #[arg(long, default_value = "default")]
    name: String,
}

#[derive(Debug, Args)]
struct Inputs {
    /// .deb or .rpm packages, folders with an installed system (a mounted image, or /), initramfs files, or single files such
    /// as a kernel module; each is known by its content. Whether packages are genuine is not looked at: check their
    /// signatures first
    #[arg(value_name = "INPUT", required = true)]
    inputs: Vec<PathBuf>,
    /// In a folder, enter other file systems that are mounted in it, such as /boot
    #[arg(long)]
    cross_file_systems: bool,
}

/// Prints what inputs would add to a policy.
pub(super) fn scan(args: &ScanArgs) -> Result<(), CliError> {
    let entries = args.inputs.scan()?;
    if args.json {
        return print_json(&serde_json::json!(entries));
    }
    let mut text = String::new();
    for entry in &entries {
        let kind = entry.kind.map_or("any", LoadKind::name);
        let path = entry.path.escape_debug();
        let _infallible = writeln!(text, "{kind:17}  sha256:{}  {path}", entry.sha256);
    }
    print(&text)
}

/// Adds what is in inputs to a policy: all of it, or after an error nothing.
pub(super) fn add(store: &Store, args: &AddArgs) -> Result<(), CliError> {
    // Looked up first: a wrong name should not cost a long scan.
    existing(store, &args.name)?;
    let entries: Vec<Approved> = args.inputs.scan()?.into_iter().collect();
    let count = entries.len();
    let mut new = 0;
    store.edit_policy(&args.name, |policy| {
        new = policy.allow_all(&args.set, entries)?;
        Ok(())
    })?;
    print(&format!(
        "policy {}: {new} digests are new, of {count} entries in set {}\n",
        args.name, args.set
    ))
}

impl Inputs {
    fn scan(&self) -> Result<BTreeSet<Approved>, CliError> {
        let mut entries = BTreeSet::new();
        for input in &self.inputs {
            let bar = Bar::new(input);
            let found = known_good::scan(
                input,
                &Options {
                    limits: Limits::default(),
                    cross_file_systems: self.cross_file_systems,
                    progress: &|progress| bar.show(progress),
                },
            );
            bar.bar.finish_and_clear();
            let found = found?;
            tell(input, &found);
            entries.extend(found.entries);
        }
        Ok(entries)
    }
}

/// One line on standard error for each input; the entries alone are on standard output.
fn tell(input: &Path, found: &Found) {
    let of = |wanted: fn(LoadKind) -> bool| {
        let kinds = found.entries.iter().filter_map(|entry| entry.kind);
        kinds.filter(|kind| wanted(*kind)).count()
    };
    let mut text = format!(
        "{}: {}, {} files, {} entries: {} programs and scripts, {} libraries, {} script arguments, {} modules, {} firmware, \
         {} kernels and initramfs files\n",
        input.display(),
        found.kind.name(),
        found.files,
        found.entries.len(),
        of(|kind| kind == LoadKind::Program),
        of(|kind| kind == LoadKind::Mapping),
        of(|kind| kind == LoadKind::Argument),
        of(LoadKind::is_module),
        of(|kind| kind == LoadKind::Firmware),
        of(|kind| matches!(kind, LoadKind::KexecImage | LoadKind::KexecInitramfs)),
    );
    for mount in &found.skipped {
        let _infallible = writeln!(
            text,
            "{}: not entered, as it is another file system: --cross-file-systems enters it",
            mount.display()
        );
    }
    // Nobody may be there to read it; the answer is on standard output.
    let _closed = io::stderr().write_all(text.as_bytes());
}

/// A bar on a terminal's standard error; nothing where it would only fill a log.
struct Bar {
    bar: ProgressBar,
    has_length: Cell<bool>,
}

impl Bar {
    fn new(input: &Path) -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10));
        bar.set_message(input.file_name().map_or_else(
            || input.display().to_string(),
            |name| name.to_string_lossy().into_owned(),
        ));
        if let Ok(style) = ProgressStyle::with_template("{msg} {spinner} {pos} files") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        Self {
            bar,
            has_length: Cell::new(false),
        }
    }

    fn show(&self, progress: Progress) {
        if let Some(total) = progress.total
            && !self.has_length.replace(true)
        {
            let template = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left";
            if let Ok(style) = ProgressStyle::with_template(template) {
                self.bar.set_style(style);
            }
            self.bar.set_length(total);
        }
        self.bar.set_position(progress.done);
    }
}
