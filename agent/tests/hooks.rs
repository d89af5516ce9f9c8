//! The files in `packaging/hooks`, called as their toolstacks call them, where there is no agent, or one that hangs: each ends, fails
//! as its caller understands it, and says what to do. What they do with an agent is tested beside a verifier, and in a machine.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test says what it expects by panicking"
)]

use std::io::Write as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use assay_tests::hooks::{self, path as hook};
use serde_json::Value;

const HASH: &str = "dc7a48014fc1fac8b52af39bc7ea5cafafabf8bb81fb8f880fdf3b4a4566795c";
const VDI: &str = "6f9619ff-8b86-4011-b42d-00cf4fc964ff";
const DOMAIN: &str = "<domain type='kvm'><name>mail</name><metadata><a:disks xmlns:a='urn:assay:libvirt:1'>
    <a:disk name='assay-mail' image='/srv/mail.luks'/></a:disks></metadata></domain>";

/// A host without an agent, or with a socket behind which nobody answers.
struct Host {
    dir: tempfile::TempDir,
    _silent: Option<UnixListener>,
}

/// What is said without an agent, and when it hangs.
const DEAD: &str = "systemctl start assay-agent";
const SILENT: &str = "did not answer within 1 s";

impl Host {
    fn dead() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = format!("run_dir = {:?}\n[unlock]\nhook_deadline_s = 1\n", dir.path());
        std::fs::write(dir.path().join("agent.toml"), config).unwrap();
        let program = format!(
            "#!/bin/sh\nexec {} --config {} \"$@\"\n",
            env!("CARGO_BIN_EXE_assay-agent"),
            dir.path().join("agent.toml").display()
        );
        executable(&dir.path().join("assay-agent"), &program);
        Self { dir, _silent: None }
    }

    fn silent() -> Self {
        let host = Self::dead();
        let listener = UnixListener::bind(host.dir.path().join("agent.sock")).unwrap();
        Self {
            _silent: Some(listener),
            ..host
        }
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command
            .env("ASSAY_AGENT", self.dir.path().join("assay-agent"))
            .env("ASSAY_SOCKET", self.dir.path().join("agent.sock"));
        command
    }

    fn hook(&self, file: &str, arguments: &[&str], input: &str) -> Output {
        run(self.command(&hook(file)).args(arguments), input)
    }
}

/// Written by another process: whatever a test beside this one starts meanwhile would inherit a descriptor of ours, and a file that is
/// open for writing is not run.
fn executable(path: &Path, text: &str) {
    let output = run(
        Command::new("install").args(["-m", "755", "/dev/stdin"]).arg(path),
        text,
    );
    assert!(output.status.success(), "{output:?}");
}

fn run(command: &mut Command, input: &str) -> Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A hook that does not read its input fails the test here, as it would fail its caller.
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn the_xapi_gate_refuses_with_2_and_says_why_on_standard_output() {
    for (host, named) in [(Host::dead(), DEAD), (Host::silent(), SILENT)] {
        let output = host.hook("xapi-vm-pre-start", &["-vmuuid", VDI, "-reason", "none"], "");
        let said = text(&output.stdout);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(
            said.starts_with("Assay does not let this VM start here: ") && said.contains(named),
            "{said}"
        );
        assert!(output.stderr.is_empty());
    }
    // Not even the program is there.
    let output = Command::new(hook("xapi-vm-pre-start"))
        .env("ASSAY_AGENT", "/nonexistent/assay-agent")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stdout).contains("/nonexistent/assay-agent"));
}

#[test]
fn the_libvirt_hook_keeps_a_domain_with_sealed_disks_from_starting_and_no_other() {
    for (host, named) in [(Host::dead(), DEAD), (Host::silent(), SILENT)] {
        let output = host.hook("libvirt", &["mail", "prepare", "begin", "-"], DOMAIN);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(named), "{said}");
        // What is printed at a migration is taken for the domain's new XML.
        assert!(output.stdout.is_empty());
    }
    let host = Host::dead();
    for arguments in [
        ["mail", "start", "begin", "-"],
        ["mail", "started", "begin", "-"],
        ["mail", "migrate", "begin", "-"],
        ["mail", "stopped", "end", "shutdown"],
        ["mail", "reconnect", "begin", "-"],
    ] {
        let output = host.hook("libvirt", &arguments, DOMAIN);
        assert_eq!(output.status.code(), Some(0), "{arguments:?} {}", text(&output.stderr));
        assert!(output.stdout.is_empty());
    }
    let plain = "<domain type='xen'><name>mail</name><devices/></domain>";
    assert!(
        host.hook("libvirt", &["mail", "prepare", "begin", "-"], plain)
            .status
            .success()
    );
    let unknown = "<domain><devices><disk><source dev='/dev/mapper/assay-nobody'/></disk></devices></domain>";
    for (xml, named) in [
        ("<domain>", "the XML of domain mail"),
        (unknown, "/dev/mapper/assay-nobody, which is not open"),
    ] {
        let output = host.hook("libvirt", &["mail", "prepare", "begin", "-"], xml);
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output.stderr).contains(named), "{}", text(&output.stderr));
    }
}

#[test]
fn the_datapath_answers_in_json_whatever_happens() {
    let call = |host: &Host, method: &str, input: &str| {
        let script = host.dir.path().join(method);
        std::os::unix::fs::symlink(hook("smapiv3-datapath"), &script).unwrap();
        let output = run(host.command(&script).arg("--json"), input);
        let answer: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{method}: {error}: {}", text(&output.stderr)));
        (output.status.code(), answer)
    };
    let volume = r#"{"dbg": "d", "uri": "assay+crypt:///dev/vg/disk-1", "domain": "0", "persistent": true}"#;
    for (host, named) in [(Host::dead(), DEAD), (Host::silent(), SILENT)] {
        for method in ["Datapath.activate", "Datapath.deactivate"] {
            let (code, answer) = call(&host, method, volume);
            assert_eq!((code, &answer["code"]), (Some(1), &"ASSAY_REFUSED".into()), "{answer}");
            assert!(answer["params"][0].as_str().unwrap().contains(named), "{answer}");
            assert!(answer["backtrace"]["files"].is_array() && answer["backtrace"]["lines"].is_array());
        }
    }
    let host = Host::dead();
    let (code, answer) = call(&host, "Plugin.Query", r#"{"dbg": "d"}"#);
    assert_eq!((code, &answer["required_api_version"]), (Some(0), &"5.0".into()));
    let device = "/dev/mapper/assay-fb766a9974921970";
    let (code, answer) = call(&host, "Datapath.attach", volume);
    assert_eq!(code, Some(0));
    assert_eq!(answer["implementations"][0][1]["params"], device);
    assert_eq!(answer["implementations"][1][1]["path"], device);
    for method in ["Datapath.open", "Datapath.detach", "Datapath.close"] {
        assert_eq!(call(&host, method, volume), (Some(0), Value::Null), "{method}");
    }
    std::fs::remove_file(host.dir.path().join("Datapath.open")).unwrap();
    let forgetful = volume.replace("true", "false");
    for (method, input, named) in [
        ("Datapath.open", forgetful.as_str(), "persistent"),
        ("Datapath.grow", volume, "has no method"),
        ("Plugin.diagnostics", "no JSON", "malformed"),
    ] {
        let (code, answer) = call(&host, method, input);
        assert_eq!((code, &answer["code"]), (Some(1), &"ASSAY_REFUSED".into()), "{answer}");
        assert!(answer["params"][0].as_str().unwrap().contains(named), "{answer}");
    }
}

#[test]
fn the_key_plugin_raises_what_is_to_be_done() {
    for (host, named) in [
        (Host::dead(), DEAD),
        (Host::silent(), "assay-agent did not answer within 1 s"),
    ] {
        for python in assay_tests::pythons() {
            let code = format!(
                "import assay_keys\nassay_keys.DEADLINE_S = 1\ntry:\n  assay_keys.load_key('{HASH}', '{VDI}')\n\
                 except assay_keys.Refused as refusal:\n  print(refusal)"
            );
            let mut command = host.command(&python);
            command
                .args(["-c", &code])
                .env("PYTHONPATH", hook(""))
                .env("PYTHONDONTWRITEBYTECODE", "1");
            let output = run(&mut command, "");
            let said = text(&output.stdout);
            assert!(
                said.contains(named),
                "{}: {said} {}",
                python.display(),
                text(&output.stderr)
            );
        }
    }
}

#[test]
fn the_block_script_tells_xl_why_through_xenstore() {
    for (host, params, named) in [
        (Host::dead(), "/srv/mail.luks", DEAD),
        (Host::silent(), "/srv/mail.luks", SILENT),
        (Host::dead(), "mail.luks", "is not the absolute path"),
        (Host::dead(), "", "is not the absolute path"),
    ] {
        let (scripts, store) = (host.dir.path().join("scripts"), host.dir.path().join("store"));
        std::fs::create_dir(&scripts).unwrap();
        std::fs::create_dir(&store).unwrap();
        std::fs::copy(hook("block-assay"), scripts.join("block-assay")).unwrap();
        std::fs::write(scripts.join("block-common.sh"), hooks::BLOCK_COMMON).unwrap();
        std::fs::write(store.join("params"), params).unwrap();
        let script = |argument: &str| {
            let mut command = host.command(&scripts.join("block-assay"));
            command
                .arg(argument)
                .env("XENBUS_PATH", "backend/vbd/1/51712")
                .env("STORE", &store);
            run(&mut command, "").status.code()
        };
        assert_eq!(script("add"), Some(1));
        let wrote = |name: &str| std::fs::read_to_string(store.join(name)).ok();
        assert_eq!(wrote("hotplug-status").as_deref(), Some("error"));
        let said = wrote("hotplug-error").unwrap();
        assert!(said.starts_with("Assay: ") && said.contains(named), "{said}");
        assert_eq!(wrote("physical-device-path"), None);
        // What was not opened needs no agent to be closed.
        assert_eq!(script("remove"), Some(0));
    }
}
