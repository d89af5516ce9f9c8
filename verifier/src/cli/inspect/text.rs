//! Records and events as lines for people. Paths and names are a stranger's: nothing but printable characters comes
//! out of them.

use std::fmt::Write as _;

use assay_evidence::event::{AgentStart, Event, Measurement, flag_names};

use super::cel::Placed;

/// A record with its events, one a line.
pub(super) fn record(placed: &Placed) -> String {
    let Placed { record, offset, len } = placed;
    let mut text = format!(
        "record {} pcr {} (byte {offset}, {len} bytes)",
        record.number, record.pcr
    );
    for (bank, digest) in &record.digests {
        add(&mut text, format_args!(" {}:{}", bank.name(), hex::encode(digest)));
    }
    text.push('\n');
    match record.events() {
        Ok(events) => events
            .iter()
            .for_each(|event| add(&mut text, format_args!("  {}\n", line(event)))),
        Err(_) => add(
            &mut text,
            format_args!(
                "  content of type {}, {} bytes: not this agent's\n",
                record.content_type,
                record.content.len()
            ),
        ),
    }
    text
}

fn line(event: &Event) -> String {
    let name = event.name();
    match event {
        Event::AgentStart(start) => format!("{name} {}", agent_start(start)),
        Event::Inventory(measurement) | Event::Load(measurement) => format!("{name} {}", measured(measurement)),
        Event::Violation(violation) => format!("{name} {}: {violation}", violation.name()),
        Event::Notice(notice) => format!("{name} {}: {notice}", notice.name()),
        Event::Ready | Event::AgentStop => name.to_owned(),
    }
}

fn agent_start(start: &AgentStart) -> String {
    let mut text = format!(
        "agent {} sha256:{} bpf sha256:{} tier {} mode {} boot {} kernel {} lsm {} lockdown {}",
        start.agent_version.escape_debug(),
        start.agent_digest,
        start.bpf_digest,
        start.tier,
        start.mode,
        start.boot_id.escape_debug(),
        start.kernel_release.escape_debug(),
        start.lsm.escape_debug(),
        if start.lockdown.is_empty() {
            "-".to_owned()
        } else {
            start.lockdown.escape_debug().to_string()
        },
    );
    for (bank, value) in &start.pcr_start {
        add(&mut text, format_args!(" start {}:{}", bank.name(), hex::encode(value)));
    }
    if let Some(seq) = start.predecessor {
        add(&mut text, format_args!(" after {seq}"));
    }
    if start.protected {
        text.push_str(" protected");
    }
    if !start.blind.is_empty() {
        add(
            &mut text,
            format_args!(" cannot see \"{}\"", start.blind.escape_debug()),
        );
    }
    add(&mut text, format_args!(" cmdline \"{}\"", start.cmdline.escape_debug()));
    text
}

fn measured(load: &Measurement) -> String {
    let digest = load
        .digest
        .map_or_else(|| "NOT HASHED".to_owned(), |digest| format!("sha256:{digest}"));
    let mut text = format!(
        "{} {digest} {} ({} bytes)",
        load.kind,
        load.path.escape_debug(),
        load.size
    );
    let flags = flag_names(load.flags);
    if !flags.is_empty() {
        add(&mut text, format_args!(" [{}]", flags.join(", ")));
    }
    if let Some(seq) = load.seq {
        let comm = load.comm.escape_debug();
        add(
            &mut text,
            format_args!(" #{seq} by {comm} pid {} uid {}", load.pid, load.uid),
        );
    }
    text
}

fn add(text: &mut String, what: std::fmt::Arguments<'_>) {
    let _infallible = text.write_fmt(what);
}
