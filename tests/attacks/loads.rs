//! Rows about code that is loaded from somewhere.

use assay_ebpf::flags;
use assay_evidence::event::LoadKind;
use assay_tests::HarnessError;
use assay_tests::guest::{Ended, Guest, RUN_TIMEOUT};

use crate::payload::{EXIT, Payload};
use crate::row::Row;
use crate::scene::{Hook, Scene, UNTOLD};
use crate::way::{Way, play_all, play_with};

/// What the ways run, so that it is approved.
pub const TOOLS: &str = "perl -MIO::Handle -MFcntl -e 'my @x = glob(q(/*)); my $x = $!{EPERM}'; perl -e 'require DynaLoader'; insmod /nonexistent.ko || true
    rmmod nonexistent || true; env true; /lib64/ld-linux-x86-64.so.2 /usr/bin/true; python3 -c 1; bash -c true; dash -c true
    cp /usr/bin/true /root/t; ln /root/t /root/t2; cat /root/t > /dev/null; rm /root/t /root/t2; sleep 0; id > /dev/null
    mkdir -p /root/m; mount -t tmpfs t /root/m; umount /root/m; unshare -m true; mount > /dev/null; ln -sf x /root/s; rm /root/s
    modinfo -n dummy > /dev/null; busybox true; dd if=/dev/null of=/dev/null status=none; chmod 644 /etc/hostname; uname -r > /dev/null";

/// Runs a Perl script with the path as its argument.
pub fn perl(guest: &Guest, script: &str, path: &str, status: u8) -> Result<Hook, HarnessError> {
    Hook::of(&perl_with(guest, script, &[path])?, status)
}

/// Runs a Perl script. It gets its arguments by standard input: a file that is named on an interpreter's command line
/// counts as its script.
pub fn perl_with(guest: &Guest, script: &str, arguments: &[&str]) -> Result<Ended, HarnessError> {
    let script = format!("BEGIN {{ @ARGV = map {{ chomp; $_ }} <STDIN>; }} {script}");
    let command = ["perl", "-MIO::Handle", "-MFcntl", "-e", &script];
    guest.run_with(&command, arguments.join("\n").as_bytes(), RUN_TIMEOUT)
}

/// The file lies in /tmp, where IMA does not notice that it is read. Copies the file into a descriptor that `$open` leaves in `$out`, and runs that.
const RUN_COPY: &str = r#"open(my $in, "<", $ARGV[0]) or die; binmode($in); local $/; print {$out} <$in>; $out->flush();
    open(my $exec, "<", "/proc/self/fd/" . fileno($out)) or die; close($out);
    exec {"/proc/self/fd/" . fileno($exec)} "hidden" or exit(100 + $!);"#;

fn memfd(guest: &Guest, path: &str) -> Result<Hook, HarnessError> {
    let open = r#"my $name = "hidden"; my $fd = syscall(319, $name, 0); open(my $out, ">&=", $fd) or die;"#;
    perl(guest, &format!("{open}{RUN_COPY}"), path, EXIT)
}

fn nameless(guest: &Guest, path: &str) -> Result<Hook, HarnessError> {
    // O_TMPFILE | O_RDWR, with the right to run it.
    let open = r#"sysopen(my $out, "/root", 0x410002, 0755) or die "$!";"#;
    perl(guest, &format!("{open}{RUN_COPY}"), path, EXIT)
}

fn deleted(guest: &Guest, path: &str) -> Result<Hook, HarnessError> {
    let open = r#"open(my $out, "+>", "/root/gone") or die; chmod(0755, $out); unlink("/root/gone");"#;
    perl(guest, &format!("{open}{RUN_COPY}"), path, EXIT)
}

/// execveat(2) of a descriptor.
fn by_descriptor(guest: &Guest, path: &str) -> Result<Hook, HarnessError> {
    let script = r#"open(my $exec, "<", $ARGV[0]) or die; my $none = "";
        syscall(322, fileno($exec), $none, 0, 0, 0x1000); exit(100 + $!);"#;
    perl(guest, script, path, EXIT)
}

#[test]
fn attack_06_memfd_tmpfs_and_nameless_files() -> Result<(), HarnessError> {
    let mut row = Row::new(6, "memfd, /dev/shm, tmpfs, O_TMPFILE, deleted file, fexecve");
    let mut scene = Scene::set("", TOOLS)?;
    let in_memory = Way {
        marks: flags::TMPFS,
        ima: false,
        ..Way::program("tmpfs", "/tmp")
    };
    let ways = [
        Way {
            play: memfd,
            marks: flags::MEMFD | flags::TMPFS | flags::UNLINKED,
            waits: false,
            ima: false,
            ..Way::program("memfd", "/tmp")
        },
        in_memory,
        Way {
            name: "/dev/shm",
            folder: "/dev/shm",
            ..in_memory
        },
        Way {
            play: nameless,
            marks: flags::UNLINKED,
            ..Way::program("O_TMPFILE", "/tmp")
        },
        Way {
            play: deleted,
            marks: flags::UNLINKED,
            ..Way::program("deleted file", "/tmp")
        },
        Way {
            play: by_descriptor,
            ..Way::program("fexecve", "/root")
        },
    ];
    play_all(&mut row, &mut scene, &ways)?;
    row.done();
    Ok(())
}

#[test]
fn attack_07_ld_so_ld_preload_and_dlopen() -> Result<(), HarnessError> {
    let mut row = Row::new(7, "ld.so PROGRAM, LD_PRELOAD, dlopen");
    let mut scene = Scene::set("", TOOLS)?;
    let library = Way {
        payload: Payload::Library,
        kind: LoadKind::Mapping,
        waits: false,
        ..Way::program("LD_PRELOAD", "/root")
    };
    let preload: fn(&Guest, &str) -> _ =
        |guest, path| Hook::run(guest, &["env", &format!("LD_PRELOAD={path}"), "/usr/bin/true"], 0);
    let ways = [
        Way {
            name: "ld.so PROGRAM",
            payload: Payload::Dynamic,
            play: |guest, path| Hook::run(guest, &["/lib64/ld-linux-x86-64.so.2", path], 0),
            ..library
        },
        Way {
            play: preload,
            ..library
        },
        Way {
            name: "dlopen",
            play: |guest, path| {
                let script = "require DynaLoader; DynaLoader::dl_load_file($ARGV[0]) or die DynaLoader::dl_error()";
                perl(guest, script, path, 0)
            },
            ..library
        },
    ];
    play_all(&mut row, &mut scene, &ways)?;
    row.done();
    Ok(())
}

#[test]
fn attack_08_scripts_and_interpreters() -> Result<(), HarnessError> {
    let mut row = Row::new(8, "scripts and interpreters");
    let mut scene = Scene::set("", TOOLS)?;
    let script = Way {
        payload: Payload::Text("#!/bin/dash\nexit 42"),
        ..Way::program("#! script", "/root")
    };
    let named = Way {
        payload: Payload::Text("exit 42"),
        kind: LoadKind::Argument,
        waits: false,
        ..script
    };
    let unseen = Way { seen: false, ..named };
    let ways = [
        Way {
            name: "standard input",
            folder: "/tmp",
            play: |guest, path| Hook::of(&guest.run_with(&["bash"], &guest.get(path)?, RUN_TIMEOUT)?, EXIT),
            ima: false,
            ..unseen
        },
        Way {
            name: "BASH_ENV, imports",
            play: |guest, path| {
                Hook::run(
                    guest,
                    &["env", &format!("BASH_ENV={path}"), "bash", "-c", "exit 0"],
                    EXIT,
                )
            },
            ..unseen
        },
        Way {
            name: "a link of another name",
            play: |guest, path| {
                let link = "/root/another";
                guest.run_ok(&["ln", "-sfn", path, link])?;
                Hook::run(guest, &["bash", link], EXIT)
            },
            ..named
        },
        Way {
            name: "-c, eval",
            folder: "/tmp",
            play: |guest, path| Hook::run(guest, &["bash", "-c", &guest.get_text(path)?], EXIT),
            ima: false,
            ..unseen
        },
        Way {
            marks: flags::SCRIPT,
            ..script
        },
        Way {
            name: "bash FILE",
            play: |guest, path| Hook::run(guest, &["bash", path], EXIT),
            ..named
        },
        Way {
            name: "perl FILE",
            play: |guest, path| Hook::run(guest, &["perl", path], EXIT),
            ..named
        },
        Way {
            name: "python3 FILE",
            payload: Payload::Text("import sys\nsys.exit(42)"),
            play: |guest, path| Hook::run(guest, &["python3", path], EXIT),
            // It looks whether the file is an archive before it opens it as a script.
            retries: true,
            ..named
        },
    ];
    play_all(&mut row, &mut scene, &ways)?;
    row.note("what is typed, piped, sourced or imported is no file that an interpreter was told to run: the interpreter itself must be approved, and that is what a policy decides on. IMA's `tcb` sees these files because it logs whatever root reads");
    row.done();
    Ok(())
}

/// Loads a module by a system call, and unloads it.
fn module(guest: &Guest, call: &str, path: &str) -> Result<Hook, HarnessError> {
    let script = format!(
        r#"open(my $f, "<", $ARGV[0]) or die; binmode($f); local $/; my $image = <$f>; my $none = "";
        exit({call} == 0 ? 0 : 100 + $!);"#
    );
    let hook = perl(guest, &script, path, 0)?;
    if hook == Hook::Passed {
        guest.run_ok(&["rmmod", "dummy"])?;
    }
    Ok(hook)
}

#[test]
fn attack_10_modules_from_buffers_and_packed_files() -> Result<(), HarnessError> {
    let mut row = Row::new(10, "init_module (buffer), finit_module, compressed module");
    let mut scene = Scene::set("", TOOLS)?;
    let plain = Way {
        payload: Payload::Module,
        kind: LoadKind::ModuleFile,
        waits: false,
        play: |guest, path| module(guest, "syscall(313, fileno($f), $none, 0)", path),
        ..Way::program("finit_module", "/root")
    };
    let ways = [
        Way {
            name: "init_module",
            folder: "/tmp",
            kind: LoadKind::ModuleBuffer,
            play: |guest, path| module(guest, "syscall(175, $image, length($image), $none)", path),
            ima: false,
            ..plain
        },
        plain,
        Way {
            name: "finit_module, compressed",
            payload: Payload::PackedModule,
            // MODULE_INIT_COMPRESSED_FILE
            play: |guest, path| module(guest, "syscall(313, fileno($f), $none, 4)", path),
            ..plain
        },
    ];
    play_all(&mut row, &mut scene, &ways)?;
    row.done();
    Ok(())
}

#[test]
fn attack_16_overlays_binds_and_namespaces() -> Result<(), HarnessError> {
    let mut row = Row::new(16, "overlayfs, bind mounts, mount namespaces, path confusion");
    let mounts = "mkdir -p /root/low /root/up /root/work /root/over
        mount -t overlay o -o lowerdir=/root/low,upperdir=/root/up,workdir=/root/work /root/over";
    let mut scene = Scene::set("", &format!("{TOOLS}; {mounts}"))?;
    let ways = [
        Way {
            marks: flags::OVERLAY,
            ..Way::program("overlayfs", "/root/over")
        },
        Way {
            play: |guest, path| {
                guest.run_ok(&["mount", "--bind", path, "/usr/bin/id"])?;
                let hook = Hook::run(guest, &["/usr/bin/id"], EXIT);
                guest.run_ok(&["umount", "/usr/bin/id"])?;
                hook
            },
            ..Way::program("bind mount over an approved program", "/root")
        },
        Way {
            play: |guest, path| {
                let script = format!("mount -t tmpfs t /root/m && cp {path} /root/m/x && exec /root/m/x");
                // By standard input: a file that is named on a shell's command line counts as its script.
                let ended = guest.run_with(&["unshare", "-m", "bash"], script.as_bytes(), RUN_TIMEOUT)?;
                Hook::of(&ended, EXIT)
            },
            marks: flags::TMPFS,
            waits: false,
            ima: false,
            ..Way::program("tmpfs in a mount namespace", "/tmp")
        },
    ];
    play_with(&mut row, &mut scene, &ways, mounts)?;
    row.done();
    Ok(())
}

#[test]
fn attack_33_programs_that_the_kernel_starts() -> Result<(), HarnessError> {
    let mut row = Row::new(33, "core_pattern, modprobe_path, binfmt_misc");
    let prepare =
        "printf '\\377\\377\\377\\377' > /root/unknown; printf MAGIC > /root/misc; chmod 755 /root/unknown /root/misc
        modprobe binfmt_misc; mount -t binfmt_misc b /proc/sys/fs/binfmt_misc";
    // What no loader knows is a program, too: it must be approved for the kernel to look for one.
    let rehearsal =
        format!("{TOOLS}; {prepare}; touch /root/x; rm -f /root/ran; /root/unknown || true; /root/misc || true");
    let mut scene = Scene::set("", &rehearsal)?;
    // The kernel tells nobody how it ended: it leaves a file.
    let helper = Way {
        payload: Payload::Text("#!/bin/dash\n: > /root/ran"),
        marks: flags::SCRIPT,
        ..Way::program("core_pattern", "/root")
    };
    let ways = [
        Way {
            play: |guest, path| {
                left_a_file(
                    guest,
                    // With a limit, whoever crashes waits until the handler has ended.
                    &format!(
                        "echo 4 > /proc/sys/kernel/core_pipe_limit; echo '|{path}' > /proc/sys/kernel/core_pattern
                         ulimit -c 1; perl -e 'kill 11, $$'"
                    ),
                    "echo core > /proc/sys/kernel/core_pattern",
                )
            },
            ..helper
        },
        Way {
            name: "modprobe_path",
            play: |guest, path| {
                left_a_file(
                    guest,
                    &format!("echo {path} > /proc/sys/kernel/modprobe; /root/unknown"),
                    "echo /sbin/modprobe > /proc/sys/kernel/modprobe",
                )
            },
            ..helper
        },
        Way {
            play: |guest, path| {
                guest.put(
                    "/proc/sys/fs/binfmt_misc/register",
                    0o200,
                    format!(":attack:M::MAGIC::{path}:").as_bytes(),
                )?;
                let hook = Hook::run(guest, &["/root/misc"], EXIT);
                guest.put("/proc/sys/fs/binfmt_misc/attack", 0o200, b"-1")?;
                hook
            },
            ..Way::program("binfmt_misc", "/root")
        },
    ];
    play_with(&mut row, &mut scene, &ways, prepare)?;
    row.done();
    Ok(())
}

/// Provokes a helper, for whose end the kernel makes `provoke` wait, and tells whether it ran.
fn left_a_file(guest: &Guest, provoke: &str, restore: &str) -> Result<Hook, HarnessError> {
    let script = format!(
        "rm -f /root/ran; ({provoke}) 2> /dev/null; {restore}; if [ -e /root/ran ]; then exit 0; else exit 100; fi"
    );
    let ended = guest.run(&["bash", "-c", &script])?;
    Ok(match ended.code {
        Some(0) => Hook::Passed,
        Some(100) => Hook::Refused(UNTOLD),
        _ => return Hook::of(&ended, 0),
    })
}
