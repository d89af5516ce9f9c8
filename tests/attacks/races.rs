//! Rows about code that changes: between the hash and its use, under a name, below a file system, while it runs.

use std::collections::BTreeMap;

use assay_ebpf::flags;
use assay_evidence::event::{LoadKind, Mode};
use assay_tests::HarnessError;
use assay_tests::guest::Guest;
use assay_tests::vm::Vm;

use crate::loads::{TOOLS, perl, perl_with};
use crate::payload::{EXIT, Payload, digest, tiny};
use crate::row::{Column, MODES, Outcome, Row};
use crate::scene::{Hook, Scene, about, count, ima_has, ima_machine};
use crate::way::{Way, play_with};

/// What the approved program of a race ends with, and the other.
const GOOD: u8 = 71;
const EVIL: u8 = 72;

/// Reads `$good` and `$evil`, and runs `attempt()` until both have run, or for long enough; prints how often each exit
/// status came. `writer()` runs beside it, over and over.
const RACE: &str = r#"
    my ($good, $evil, $target) = @ARGV; my %seen; my $parent = $$;
    my $writer = fork(); if (!$writer) { writer() while getppid() == $parent; exit(0); }
    for my $try (1..400) {
        my $pid = fork(); if (!$pid) { attempt(); exit(100 + $!); }
        waitpid($pid, 0); $seen{$? >> 8}++;
        last if $try > 60 && $seen{71} && $seen{72};
    }
    kill(9, $writer); waitpid($writer, 0);
    print "$_ $seen{$_}\n" for keys %seen;"#;

/// The file itself is changed between the two.
const CHANGED_FILE: &str = r#"
    sub writer { for my $from ($good, $evil) { open(my $in, "<", $from) or die; local $/; my $content = <$in>;
        if (open(my $out, "+<", $target)) { syswrite($out, $content); close($out); select(undef, undef, undef, 0.002); } } }
    sub attempt { exec {$target} $target; }"#;

/// The path in the caller's memory is changed between the two: shared memory, into which the writer reads them.
const CHANGED_PATH: &str = r#"
    my $page = syscall(9, 0, 4096, 3, 0x21, -1, 0);
    open(my $paths, "+>", "/tmp/paths") or die; syswrite($paths, pack("a64a64", $ARGV[0], $ARGV[1]));
    my $fd = fileno($paths);
    sub writer { syscall(17, $fd, $page, 64, 0); syscall(17, $fd, $page, 64, 64); }
    sub attempt { syscall(59, $page, 0, 0); }"#;

/// Exit statuses, and how often each came.
fn race(guest: &Guest, how: &str) -> Result<BTreeMap<u8, u32>, HarnessError> {
    let script = format!("our ($good, $evil, $target); {how} {}", RACE.replacen("my (", "(", 1));
    let ended = perl_with(guest, &script, &["/root/good", "/root/evil", "/root/target"])?;
    assert!(ended.ok(), "{ended}");
    let numbers = |line: &str| {
        let (status, count) = line.split_once(' ').expect("two numbers");
        (status.parse().expect("a status"), count.parse().expect("a count"))
    };
    Ok(ended.stdout.lines().map(numbers).collect())
}

/// Both programs, and the one that changes.
fn put_programs(guest: &Guest, salt: &str) -> Result<[String; 2], HarnessError> {
    let [good, evil] = [GOOD, EVIL].map(|status| tiny(status, if status == GOOD { "approved" } else { salt }));
    guest.put("/root/evil", 0o755, &evil)?;
    Ok([digest(&good), digest(&evil)])
}

fn put_good(guest: &Guest) -> Result<(), HarnessError> {
    let good = tiny(GOOD, "approved");
    guest.put("/root/good", 0o755, &good)?;
    guest.put("/root/target", 0o755, &good)
}

/// Plays a race in every mode: whatever ran is in the log, and in enforce only what is approved ran.
fn play_race(row: &mut Row, scene: &mut Scene, how: &str) -> Result<(), HarnessError> {
    for &mode in MODES {
        let salt = format!("{:-<8}", mode.name());
        let [good, evil] = put_programs(scene.guest(), &salt)?;
        scene.enter(mode)?;
        let ran = race(scene.guest(), how)?;
        let times = |status: u8| ran.get(&status).copied().unwrap_or_default();
        assert!(times(GOOD) > 0, "{mode}: nothing is raced against: {ran:?}");
        let log = scene.all_so_far()?;
        let passed = |digest: &str| about(&log, digest).iter().any(|load| load.flags & flags::REFUSED == 0);
        assert!(passed(&good), "{mode}: {ran:?} {:?}", about(&log, &good));
        if mode == Mode::Enforce {
            assert_eq!(times(EVIL), 0, "{ran:?}");
            assert!(!passed(&evil), "{mode}");
            row.set(Column::Assay(mode), "", Outcome::Refused);
            continue;
        }
        assert!(times(EVIL) > 0, "{mode}: {ran:?}");
        assert!(passed(&evil), "{mode}: it ran, and is not in the log");
        scene.distrusted_for(&evil)?;
        let outcome = if mode == Mode::Hold {
            Outcome::ExtendedFirst
        } else {
            Outcome::Recorded
        };
        row.set(Column::Assay(mode), "", outcome);
    }
    let vm = ima_machine()?;
    put_good(vm.guest())?;
    let [_, evil] = put_programs(vm.guest(), "measured")?;
    let ran = race(vm.guest(), how)?;
    assert!(ran.contains_key(&EVIL), "{ran:?}");
    let has = ima_has(vm.guest(), &evil)?;
    row.set(Column::Ima, "", if has { Outcome::Recorded } else { Outcome::Unseen });
    Ok(())
}

#[test]
fn attack_01_a_file_changes_between_hash_and_use() -> Result<(), HarnessError> {
    let mut row = Row::new(
        1,
        "TOCTOU of hashing: path opened again, content changed after the hash",
    );
    let mut scene = Scene::set("", TOOLS)?;
    put_good(scene.guest())?;
    approve_target(&scene)?;
    play_race(&mut row, &mut scene, CHANGED_FILE)?;
    row.note("the hash is made over the open file while writers are locked out, and it is that file which runs");
    row.done();
    Ok(())
}

#[test]
fn attack_02_a_path_changes_in_the_callers_memory() -> Result<(), HarnessError> {
    let mut row = Row::new(2, "TOCTOU of system call arguments");
    let mut scene = Scene::set("", TOOLS)?;
    put_good(scene.guest())?;
    approve_target(&scene)?;
    play_race(&mut row, &mut scene, CHANGED_PATH)?;
    row.done();
    Ok(())
}

/// Has the good program of a race approved, by its digest.
fn approve_target(scene: &Scene) -> Result<(), HarnessError> {
    let good = digest(&tiny(GOOD, "approved"));
    scene.stage.verifier.run_ok(&["policy", "allow", &good]).map(drop)
}

/// An approved program of the same size as every [`Payload::Tiny`].
const BASE: &str = "/root/base";

fn base_program() -> Vec<u8> {
    tiny(EXIT + 1, "base01")
}

/// Runs the approved program in a file, has `change` put the payload (`/tmp/payload`) over it, and runs the file.
fn change_and_run(guest: &Guest, path: &str, change: &str) -> Result<Hook, HarnessError> {
    let script = format!(
        "rm -f /root/victim; cp {BASE} /root/victim; cp {path} /tmp/payload; /root/victim || true; touch -r /root/victim /tmp/times
         {change}; touch -r /tmp/times /root/victim; exec /root/victim"
    );
    Hook::run(guest, &["bash", "-c", &script], EXIT)
}

#[test]
fn attack_17_a_cache_that_goes_by_inode_size_or_time() -> Result<(), HarnessError> {
    let mut row = Row::new(17, "hash cache keyed by inode, size or time");
    let rehearsal = format!("{TOOLS}; {BASE} || true; touch -r {BASE} /tmp/x");
    let mut scene = Scene::set_after("", &rehearsal, |guest| guest.put(BASE, 0o755, &base_program()))?;
    let ways = [
        Way {
            play: |guest, path| {
                change_and_run(
                    guest,
                    path,
                    "dd if=/tmp/payload of=/root/victim conv=notrunc status=none",
                )
            },
            ..Way::program("write, same size and times", "/root")
        },
        Way {
            play: |guest, path| {
                // A private copy of the content is read into a shared mapping of the file.
                let store = r#"open(my $f, "+<", "/root/victim") or die; open(my $in, "<", "/tmp/payload") or die;
                    my $at = syscall(9, 0, 4096, 3, 1, fileno($f), 0); syscall(0, fileno($in), $at, 4096); syscall(11, $at, 4096);"#;
                change_and_run(guest, path, &format!("perl -e '{store}'"))
            },
            waits: false,
            ..Way::program("store through a mapping, same size and times", "/root")
        },
        Way {
            play: |guest, path| change_and_run(guest, path, "rm /root/victim; cp /tmp/payload /root/victim"),
            ..Way::program("another file with the inode's number", "/root")
        },
    ];
    let base: String = base_program().iter().map(|byte| format!("\\x{byte:02x}")).collect();
    let prepare = format!("printf '{base}' > {BASE}; chmod 755 {BASE}");
    play_with(&mut row, &mut scene, &ways, &prepare)?;
    row.done();
    Ok(())
}

/// A file system on a loop device, with the approved program in it.
const LOOP: &str = "truncate -s 8M /root/disk.img; mke2fs -q -t ext4 /root/disk.img; mkdir -p /root/m
    losetup /dev/loop0 /root/disk.img; mount /dev/loop0 /root/m; cp /root/base /root/m/victim; sync; /root/m/victim || true";

#[test]
fn attack_15_content_changes_below_the_file_system() -> Result<(), HarnessError> {
    let mut row = Row::new(
        15,
        "content changes below the cache: raw writes to a mounted block device",
    );
    let mut scene = Scene::set_after(
        "",
        &format!("{TOOLS}; {LOOP}; sync; umount /root/m; mount /dev/loop0 /root/m"),
        |guest| guest.put(BASE, 0o755, &base_program()),
    )?;
    let ways = [Way {
        play: |guest, path| {
            let overwrite = r#"
                my ($from, $to) = map { chomp; open(my $f, "<", $_) or die; local $/; <$f> } my @names = <STDIN>;
                open(my $disk, "+<", "/dev/loop0") or die "$!"; local $/; my $all = <$disk>; my ($at, $found) = (-1, 0);
                while (($at = index($all, $from, $at + 1)) >= 0) { seek($disk, $at, 0); print {$disk} $to; $found++; }
                close($disk) or die "$!"; die "not found" if !$found;"#;
            let script = format!(
                "cp {BASE} /root/m/victim; sync; /root/m/victim; printf '{BASE}\\n{path}\\n' | perl -e '{overwrite}'; sync
                 echo 3 > /proc/sys/vm/drop_caches; exec /root/m/victim"
            );
            Hook::run(guest, &["bash", "-c", &script], EXIT)
        },
        deed: Some("opened the block device"),
        ..Way::program("raw write, then run", "/root")
    }];
    let base: String = base_program().iter().map(|byte| format!("\\x{byte:02x}")).collect();
    let prepare = format!("printf '{base}' > {BASE}; chmod 755 {BASE}; {LOOP}");
    play_with(&mut row, &mut scene, &ways, &prepare)?;
    // The write is a deed of its own, whatever is run afterwards.
    scene.wait_log("each mode's write", |log| {
        count(log, LoadKind::BlockWrite) >= MODES.len()
    })?;
    scene.distrusted_for("block device")?;
    row.note("writing to a mounted device is recorded in every mode, and no policy allows it unasked. What a network server, a FUSE daemon or the storage itself changes behind the kernel's back is out of scope: dm-verity or fs-verity answer it");
    row.done();
    Ok(())
}

#[test]
fn attack_14_stores_into_mapped_code() -> Result<(), HarnessError> {
    let mut row = Row::new(14, "writing to a mapped or running binary");
    let library = "/root/library.so";
    let hold_it = format!(
        "cp /usr/lib/x86_64-linux-gnu/libc.so.6 {library}; printf approved >> {library}; LD_PRELOAD={library} sleep 0"
    );
    let mut scene = Scene::set("", &format!("{TOOLS}; {hold_it}"))?;
    for &mode in MODES {
        scene.enter(mode)?;
        let guest = scene.guest();
        let before = stores(&scene)?;
        let pid = mapped_by(guest, library)?;
        // A program that runs cannot be written to, whatever measures.
        let busy = guest.run(&[
            "perl",
            "-e",
            r#"open(my $f, "+<", "/usr/bin/sleep") or exit(100 + $!);"#,
        ])?;
        assert_eq!(Hook::of(&busy, 0)?, Hook::Refused(26), "{busy}");
        row.set(Column::Assay(mode), "running program", Outcome::Fails);
        assert_eq!(perl(guest, STORE, library, 0)?, Hook::Passed);
        scene.wait_log("the store", |log| {
            log.loads()
                .iter()
                .filter(|load| load.kind == LoadKind::CodeWrite && load.path == library)
                .count()
                > before
        })?;
        scene.distrusted_for(library)?;
        row.set(Column::Assay(mode), "mapped library", Outcome::Recorded);
        // And whoever maps it from now on gets what it holds now.
        let next = guest.run(&["env", &format!("LD_PRELOAD={library}"), "true"])?;
        match mode {
            // ld.so goes on without what it cannot map.
            Mode::Enforce => assert!(next.stderr.contains("failed to map segment"), "{next}"),
            _ => assert!(next.ok(), "{next}"),
        }
        guest.signal(pid, 9)?;
        guest.wait(pid, crate::common::PATIENCE)?;
        restore(guest, library)?;
    }
    ima_store(&mut row, library, &hold_it)?;
    row.note("the process that has the library mapped sees the store at once; the record says that somebody could write to it");
    row.done();
    Ok(())
}

/// Turns one byte of a mapped page, and back.
const STORE: &str = r#"open(my $f, "+<", $ARGV[0]) or exit(100 + $!); my $at = syscall(9, 0, 4096, 3, 1, fileno($f), 0);
    open(my $in, "<", "/dev/zero") or die; syscall(0, fileno($in), $at + 4000, 8); syscall(11, $at, 4096);"#;

fn restore(guest: &Guest, library: &str) -> Result<(), HarnessError> {
    let mut content = guest.get("/usr/lib/x86_64-linux-gnu/libc.so.6")?;
    content.extend(b"approved");
    guest.put(library, 0o755, &content)
}

fn stores(scene: &Scene) -> Result<usize, HarnessError> {
    Ok(count(&scene.log()?, LoadKind::CodeWrite))
}

/// A process with the library mapped.
fn mapped_by(guest: &Guest, library: &str) -> Result<i32, HarnessError> {
    let pid = guest.spawn(&["env", &format!("LD_PRELOAD={library}"), "sleep", "1000"], "/dev/null")?;
    Guest::wait_for("the library was never mapped", crate::common::PATIENCE, || {
        let maps = guest.get_text(&format!("/proc/{pid}/maps"))?;
        Ok((maps.contains(library) && maps.contains("/sleep")).then_some(()))
    })?;
    Ok(pid)
}

/// IMA notices a writer of a file that somebody has open after it was measured: a violation in its log.
fn ima_store(row: &mut Row, library: &str, hold_it: &str) -> Result<(), HarnessError> {
    let vm: Vm = ima_machine()?;
    let guest = vm.guest();
    guest.script(hold_it)?;
    mapped_by(guest, library)?;
    row.set(Column::Ima, "running program", Outcome::Fails);
    assert_eq!(perl(guest, STORE, library, 0)?, Hook::Passed);
    let log = guest.get_text("/sys/kernel/security/ima/ascii_runtime_measurements")?;
    let violation = log
        .lines()
        .any(|line| line.contains(library) && line.contains(&format!("sha256:{}", "0".repeat(64))));
    row.set(
        Column::Ima,
        "mapped library",
        if violation { Outcome::Recorded } else { Outcome::Unseen },
    );
    Ok(())
}

#[test]
fn attack_18_folders_left_out_and_content_that_comes_back() -> Result<(), HarnessError> {
    let mut row = Row::new(
        18,
        "folders left out, a verdict that stops at the first failure, content that comes back",
    );
    let mut scene = Scene::set_after(
        "",
        &format!("{TOOLS}; {BASE} || true; cp {BASE} /root/again"),
        |guest| guest.put(BASE, 0o755, &base_program()),
    )?;
    let in_memory = Way {
        marks: flags::TMPFS,
        ima: false,
        ..Way::program("/run", "/run")
    };
    let ways = [
        in_memory,
        Way {
            name: "/tmp",
            folder: "/tmp",
            ..in_memory
        },
        Way::program("/var/tmp", "/var/tmp"),
    ];
    play_with(&mut row, &mut scene, &ways, "true")?;
    // All of them are reasons, not only the first; those of enforce never ran.
    let host = scene.stage.wait("untrusted", |host| host.state == "untrusted")?;
    for mode in MODES.iter().filter(|mode| **mode != Mode::Enforce) {
        for folder in ["run/-run", "tmp/-tmp", "var/tmp/-var-tmp"] {
            let path = format!("/{folder}-{mode}");
            assert!(
                host.reasons.iter().any(|reason| reason.contains(&path)),
                "{path}: {:?}",
                host.reasons
            );
        }
    }
    comes_back(&mut row, &scene)?;
    row.done();
    Ok(())
}

/// Approved, not approved, approved again: three records. IMA has two.
fn comes_back(row: &mut Row, scene: &Scene) -> Result<(), HarnessError> {
    let other = Payload::Tiny.make(scene.guest())?;
    let (base, evil) = (digest(&base_program()), digest(&other));
    let path = "/root/comes-back";
    let play = |guest: &Guest| -> Result<(), HarnessError> {
        for content in [&base_program(), &other, &base_program()] {
            guest.put(path, 0o755, content)?;
            guest.run(&[path])?;
        }
        Ok(())
    };
    play(scene.guest())?;
    let log = scene.wait_log("the content that came back", |log| log.of(path).len() >= 3)?;
    let digests: Vec<String> = log.of(path).into_iter().map(|(_, digest, _)| digest).collect();
    assert_eq!(digests, [base.clone(), evil.clone(), base.clone()]);
    row.set(Column::Assay(Mode::Observe), "old content again", Outcome::Recorded);
    let vm = ima_machine()?;
    play(vm.guest())?;
    let ima = vm
        .guest()
        .get_text("/sys/kernel/security/ima/ascii_runtime_measurements")?;
    let lines = ima.lines().filter(|line| line.ends_with(path)).count();
    row.set(
        Column::Ima,
        "old content again",
        if lines >= 3 { Outcome::Recorded } else { Outcome::Unseen },
    );
    Ok(())
}
