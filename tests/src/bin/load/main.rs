//! The workload of `cargo xtask bench exec`, inside its machines: makes programs that nobody has seen, starts them, and
//! says in JSON how long each took. The clock is CLOCK_MONOTONIC; nothing is printed before all is done.

mod flood;
mod start;

use std::io::{Error, Result, Write};
use std::path::Path;
use std::process::ExitCode;

use assay_tests::{load, tiny};

const USAGE: &str = "\
usage: assay-load make FOLDER FROM COUNT SIZE        make COUNT programs, numbered from FROM, of SIZE bytes
       assay-load again PROGRAM COUNT                start one program COUNT times, one after another
       assay-load each FOLDER FROM COUNT JOBS        start each of them once, JOBS at a time
       assay-load flood FOLDER FROM RATE SECONDS JOBS NEW
                                                     start up to RATE programs a second, every NEW-th of them new
       assay-load map FILE RATE SECONDS              map a file that is open for writing up to RATE times a second";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("assay-load: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> Result<()> {
    match *words {
        ["make", folder, from, count, size] => {
            for number in numbers(from, count)? {
                make(Path::new(folder), number, parse(size)?)?;
            }
            // Nothing of it shall still be on its way to the disk when time is taken.
            nix::unistd::sync();
            Ok(())
        }
        ["again", program, count] => print(&start::again(program, parse(count)?)?),
        ["each", folder, from, count, jobs] => {
            print(&start::each(Path::new(folder), numbers(from, count)?, parse(jobs)?)?)
        }
        ["flood", folder, from, rate, seconds, jobs, new] => print(&flood::programs(&flood::Plan {
            folder: Path::new(folder).to_owned(),
            from: parse(from)?,
            rate: parse(rate)?,
            seconds: parse(seconds)?,
            jobs: parse(jobs)?,
            new: parse(new)?,
        })?),
        ["map", file, rate, seconds] => print(&flood::mappings(Path::new(file), parse(rate)?, parse(seconds)?)?),
        _ => Err(Error::other(USAGE)),
    }
}

/// Makes one program.
fn make(folder: &Path, number: u64, size: usize) -> Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::create_dir_all(folder)?;
    let path = folder.join(load::name(number));
    let mut file = std::fs::File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o755)
        .open(path)?;
    file.write_all(&tiny::program(size, number))
}

fn numbers(from: &str, count: &str) -> Result<std::ops::Range<u64>> {
    let from: u64 = parse(from)?;
    Ok(from..from.saturating_add(parse(count)?))
}

fn parse<T: std::str::FromStr>(word: &str) -> Result<T> {
    word.parse()
        .map_err(|_| Error::other(format!("{word:?} is no number that fits here\n{USAGE}")))
}

fn print(answer: &impl serde::Serialize) -> Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, answer)?;
    out.write_all(b"\n")
}
