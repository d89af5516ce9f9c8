//! Writes the manual pages and the shell completions of both programs into a folder: `man/NAME.8` and
//! `completions/SHELL/…`, named as their shells look for them. `cargo xtask package` runs it.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use clap_complete::{Shell, generate_to};

/// Section of the manual: commands for administrators.
const SECTION: &str = "8";
const SHELLS: [Shell; 3] = [Shell::Bash, Shell::Zsh, Shell::Fish];

fn main() -> Result<(), Box<dyn Error>> {
    let out = std::env::args_os().nth(1).ok_or("usage: manuals FOLDER")?;
    let out = PathBuf::from(out);
    for command in [assay_agent::cli::command(), assay_verifier::cli::command()] {
        manuals(&command, &out.join("man"))?;
        for shell in SHELLS {
            let folder = out.join("completions").join(shell.to_string());
            fs::create_dir_all(&folder)?;
            let name = command.get_name().to_owned();
            generate_to(shell, &mut command.clone(), name, folder)?;
        }
    }
    Ok(())
}

/// A page for the program and one for each of its commands: `assay-agent-join(8)` beside `assay-agent(8)`.
fn manuals(command: &clap::Command, folder: &Path) -> Result<(), Box<dyn Error>> {
    fs::create_dir_all(folder)?;
    let mut command = command.clone().disable_help_subcommand(true);
    // Tells each command below its full name.
    command.build();
    pages(&command, folder)
}

fn pages(command: &clap::Command, folder: &Path) -> Result<(), Box<dyn Error>> {
    let page = clap_mangen::Man::new(command.clone());
    page.section(SECTION).manual("Assay").generate_to(folder)?;
    for below in command.get_subcommands().filter(|below| !below.is_hide_set()) {
        pages(below, folder)?;
    }
    Ok(())
}
