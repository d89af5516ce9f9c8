//! `assay-agent log`: the runtime log, readable or as CEL-JSON. Reads the file itself, so it works without the daemon too.

use std::io::Write;
use std::path::Path;

use assay_evidence::cel::{self, CelError, Record};
use assay_evidence::event::{AgentStart, Event, Measurement, flag_names};

use super::{CliError, printable};

/// Prints the log, one line an event, or one line of JSON a record.
pub(super) fn run(path: &Path, json: bool) -> Result<(), CliError> {
    let bytes = std::fs::read(path).map_err(|source| CliError::Read {
        path: path.to_owned(),
        source,
    })?;
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    let mut offset = 0;
    while let Some(rest) = bytes.get(offset..).filter(|rest| !rest.is_empty()) {
        let damaged = |source| CliError::Log {
            path: path.to_owned(),
            offset,
            source,
        };
        let (record, length) = match cel::read(rest) {
            // The agent is writing the last record just now.
            Err(CelError::Short(_)) => break,
            other => other.map_err(damaged)?,
        };
        if json {
            writeln!(out, "{}", cel::to_json(&record)).map_err(CliError::Output)?;
        } else {
            print_record(&mut out, &record)
                .map_err(damaged)?
                .map_err(CliError::Output)?;
        }
        offset = offset.saturating_add(length);
    }
    out.flush().map_err(CliError::Output)
}

fn print_record(out: &mut impl Write, record: &Record) -> Result<std::io::Result<()>, CelError> {
    for event in record.events()? {
        if let Err(error) = writeln!(out, "{:>6}  {}", record.number, printable(&describe(&event))) {
            return Ok(Err(error));
        }
    }
    Ok(Ok(()))
}

fn describe(event: &Event) -> String {
    let name = event.name();
    match event {
        Event::AgentStart(start) => format!("{name:<12}{}", describe_start(start)),
        Event::Inventory(measurement) | Event::Load(measurement) => {
            format!("{name:<12}{}", describe_measurement(measurement))
        }
        Event::Violation(violation) => format!("{name:<12}{violation}"),
        Event::Notice(notice) => format!("{name:<12}{notice}"),
        Event::Ready | Event::AgentStop => name.to_owned(),
    }
}

fn describe_start(start: &AgentStart) -> String {
    format!(
        "version {} tier {} mode {}{} kernel {} boot {} agent sha256:{} bpf sha256:{}{}{}",
        start.agent_version,
        start.tier,
        start.mode,
        if start.protected { " protected" } else { "" },
        start.kernel_release,
        start.boot_id,
        start.agent_digest,
        start.bpf_digest,
        start
            .predecessor
            .map(|seq| format!(" restarted after kernel record {seq}"))
            .unwrap_or_default(),
        match start.blind.as_str() {
            "" => String::new(),
            blind => format!(" cannot see: {blind}"),
        },
    )
}

fn describe_measurement(measurement: &Measurement) -> String {
    let digest = measurement
        .digest
        .map_or_else(|| "not hashed".to_owned(), |digest| format!("sha256:{digest}"));
    let flags = match flag_names(measurement.flags) {
        none if none.is_empty() => String::new(),
        names => format!(" [{}]", names.join(", ")),
    };
    format!(
        "{:<17} {digest} {}{flags} ({} pid {} uid {})",
        measurement.kind.name(),
        measurement.path,
        measurement.comm,
        measurement.pid,
        measurement.uid
    )
}
