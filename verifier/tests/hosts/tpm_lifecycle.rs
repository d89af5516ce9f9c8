//! A host's way from enrolled to trusted to untrusted, and back.

use assay_ebpf::kind;
use assay_evidence::digest::Sha256Digest;

use crate::host::{BOOT, Machine, NEXT_BOOT};
use crate::site::{Site, reasons};
use crate::tpm_counters::change;

#[test]
fn a_host_is_trusted_until_it_runs_what_nobody_approved() {
    let site = Site::serving(0.2);
    let machine = Machine::joined(&site.join_file());
    site.add("alpha", &machine).good();

    let shown = site.wait_until("alpha", |shown| !shown["last_quote"].is_null());
    assert_eq!(
        (shown["state"].as_str(), reasons(&shown)),
        (Some("unknown"), vec!["no policy: capture one"])
    );
    assert_eq!(shown["boot_id"], BOOT);

    site.run(&["policy", "capture", "alpha"]).good();
    let shown = site.wait_for("alpha", "trusted");
    assert!(reasons(&shown).is_empty());

    let program = machine.run_program("/root/rogue");
    let module = Sha256Digest::of(b"module");
    machine.load(kind::MODULE_FILE, "/root/rogue.ko", module);
    let shown = site.wait_until("alpha", |shown| {
        shown["state"] == "untrusted" && reasons(shown).len() >= 2
    });
    for named in [
        "/root/rogue ",
        "/root/rogue.ko",
        &program.to_string(),
        &module.to_string(),
    ] {
        assert!(reasons(&shown).iter().any(|r| r.contains(named)), "{named}: {shown:#}");
    }

    site.run(&[
        "policy",
        "allow",
        &program.to_string(),
        "--path",
        "/root/rogue",
        "--kind",
        "program",
    ])
    .good();
    let shown = site.wait_until("alpha", |shown| reasons(shown).len() == 1);
    assert_eq!(shown["state"], "untrusted");
    site.run(&["policy", "allow", &module.to_string()]).good();
    site.wait_for("alpha", "trusted");

    // A deed is another thing than the code of the program that does it.
    machine.load(kind::ANONYMOUS, "/root/rogue", program);
    let shown = site.wait_for("alpha", "untrusted");
    let [reason] = reasons(&shown)[..] else {
        panic!("{shown:#}")
    };
    assert!(reason.contains("made memory executable"), "{reason}");
    let told = site
        .run(&["policy", "allow", &program.to_string(), "--kind", "anonymous"])
        .good();
    assert_eq!(
        told,
        format!("policy default now allows anonymous by sha256:{program}\n")
    );
    let shown = site.wait_for("alpha", "trusted");
    assert!(
        site.log().contains("host alpha: trusted -> untrusted"),
        "{}",
        site.log()
    );
    let text = site.run(&["host", "show", "alpha"]).good();
    assert!(text.starts_with("alpha: trusted since 20"), "{text}");
    for line in [
        "\n  note: measured by tier 1 in mode observe, the agent not protected from root\n",
        "\nmeasuring   tier 1, mode observe, agent not protected from root\n",
    ] {
        assert!(text.contains(line), "{text}");
    }
    assert_eq!(
        (&shown["measuring"]["tier"], &shown["measuring"]["mode"]),
        (&1.into(), &"observe".into())
    );
}

#[test]
fn a_poll_with_nothing_new_costs_its_quote_and_all_that_is_new_is_seen() {
    let mut site = Site::serving(0.2);
    let mut machine = site.trusted_host("alpha");
    site.serve_talkative();
    let quiet = |site: &Site| site.log().matches("host alpha: nothing new").count();
    let two_more = |site: &Site| {
        let before = quiet(site);
        site.wait_until("alpha", |_| quiet(site) >= before + 2)
    };
    let shown = two_more(&site);
    assert_eq!(shown["state"], "trusted");

    // The host's log, the policy, the host itself: each is new.
    let program = machine.run_program("/root/rogue");
    let shown = site.wait_for("alpha", "untrusted");
    assert!(reasons(&shown)[0].contains("/root/rogue"), "{shown:#}");
    let shown = two_more(&site);
    assert!(
        reasons(&shown)[0].contains("/root/rogue"),
        "a bad verdict stands: {shown:#}"
    );
    site.run(&["policy", "allow", &program.to_string()]).good();
    site.wait_for("alpha", "trusted");
    two_more(&site);
    machine.reboot(NEXT_BOOT);
    site.wait_until("alpha", |shown| shown["boot_id"] == NEXT_BOOT);
    // The inventory is that of the machine that runs this test, on which other programs may have begun since.
    site.run(&["policy", "capture", "alpha", "--add"]).good();
    let shown = site.wait_for("alpha", "trusted");
    assert!(reasons(&shown).is_empty(), "{shown:#}");
    two_more(&site);
    machine.stop();
    site.wait_for("alpha", "unreachable");
}

#[test]
fn a_poll_of_a_host_that_went_on_costs_what_is_new() {
    let mut site = Site::serving(0.2);
    let machine = site.trusted_host("alpha");
    let program = machine.run_program("/root/tool");
    site.run(&["policy", "allow", &program.to_string()]).good();
    site.serve_talkative();
    site.wait_for("alpha", "trusted");
    let went_on = |site: &Site| site.log().matches("host alpha: went on to").count();
    let records = |shown: &serde_json::Value| shown["records"].as_u64().unwrap();
    site.wait_until("alpha", |_| site.log().contains("host alpha: nothing new"));
    for _ in 0..3 {
        let (times, before) = (went_on(&site), records(&site.show("alpha")));
        machine.run_program("/root/tool");
        // The verifier stores the verdict, and then says in its log how it came to it.
        let shown = site.wait_until("alpha", |shown| records(shown) > before && went_on(&site) > times);
        assert_eq!((shown["state"].as_str(), went_on(&site)), (Some("trusted"), times + 1));
    }
    // By another group's policy it is judged whole.
    let strict = site.state().path().join("strict.json");
    let strict = strict.to_str().unwrap();
    site.run(&["policy", "export", "default", "--out", strict]).good();
    let text = std::fs::read_to_string(strict)
        .unwrap()
        .replace("\"observe\"", "\"hold\"");
    std::fs::write(strict, text).unwrap();
    site.run(&["policy", "import", strict, "--name", "strict"]).good();
    site.run(&["host", "set-policy", "alpha", "stricter"])
        .refused(&["stricter"]);
    site.run(&["host", "set-policy", "alpha", "strict"]).good();
    let shown = site.wait_for("alpha", "untrusted");
    assert!(reasons(&shown)[0].contains("mode observe"), "{shown:#}");
    site.run(&["host", "set-policy", "alpha", "default"]).good();
    site.wait_for("alpha", "trusted");

    // What it ran is held: a verifier that starts anew goes on from there, and what nobody approved is seen.
    let before = records(&site.show("alpha"));
    site.serve_again();
    machine.run_program("/root/tool");
    let shown = site.wait_until("alpha", |shown| records(shown) > before);
    assert_eq!(shown["state"], "trusted", "{shown:#}");
    machine.run_program("/root/rogue");
    let shown = site.wait_for("alpha", "untrusted");
    assert!(reasons(&shown)[0].contains("/root/rogue"), "{shown:#}");
}

#[test]
fn a_silent_host_is_unreachable_and_what_was_bad_stays_known() {
    let site = Site::serving(0.2);
    let mut machine = site.trusted_host("alpha");
    machine.run_program("/root/rogue");
    site.wait_for("alpha", "untrusted");

    machine.stop();
    // A look that was on its way breaks off; the next one finds nobody.
    let shown = site.wait_until("alpha", |shown| {
        shown["state"] == "unreachable" && reasons(shown)[0].contains("cannot connect to 127.0.0.1:")
    });
    let lines = reasons(&shown);
    assert!(
        lines
            .iter()
            .any(|r| r.starts_with("before that: ") && r.contains("/root/rogue")),
        "{lines:?}"
    );

    machine.swtpm.power_cycle().unwrap();
    machine.boot(NEXT_BOOT);
    // The inventory is this very machine's: other programs may run by now.
    site.run(&["policy", "capture", "alpha", "--add"]).good();
    let shown = site.wait_for("alpha", "trusted");
    assert_eq!(shown["boot_id"], NEXT_BOOT);
}

#[test]
fn a_new_boot_without_a_tpm_reset_is_refused() {
    let site = Site::serving(0.2);
    let mut machine = site.trusted_host("alpha");
    machine.stop();
    site.wait_for("alpha", "unreachable");
    machine.boot(NEXT_BOOT);
    let shown = site.wait_for("alpha", "untrusted");
    assert!(reasons(&shown)[0].contains("TPM was not reset"), "{shown:#}");
}

#[test]
fn the_service_remembers_across_its_own_restart() {
    let mut site = Site::serving(0.2);
    let machine = site.trusted_host("alpha");
    let records = site.show("alpha")["records"].as_u64().unwrap();
    site.serve_again();
    machine.run_program("/root/rogue");
    let shown = site.wait_for("alpha", "untrusted");
    assert!(shown["records"].as_u64().unwrap() > records);
}

#[test]
fn a_policy_is_never_replaced_by_accident() {
    let site = Site::serving(0.2);
    let machine = site.trusted_host("alpha");
    let digest = machine.run_program("/root/new");
    site.wait_for("alpha", "untrusted");
    site.run(&["policy", "capture", "alpha"])
        .refused(&["default", "--replace", "--add"]);
    site.run(&["policy", "capture", "alpha", "--add"]).good();
    site.wait_for("alpha", "trusted");
    assert!(
        site.run(&["policy", "show", "default"])
            .good()
            .contains(&digest.to_string())
    );
    site.run(&["policy", "show", "other"])
        .refused(&["other", "policy capture"]);
    site.run(&["policy", "allow", &digest.to_string(), "--name", "other"])
        .refused(&["other"]);
}

#[test]
fn a_log_longer_than_one_answer_is_fetched_in_pages() {
    let mut site = Site::serving(0.2);
    let mut machine = site.trusted_host("alpha");
    let digest = machine.run_program("/root/new");
    site.run(&["policy", "capture", "alpha", "--add"]).good();

    // The verifier is away while this boot's log grows.
    site.stop();
    machine.run_until_longer(LONGER, digest);
    site.serve();
    let records = machine.tpm().log().snapshot().records;
    let shown = site.wait_until("alpha", |shown| shown["records"].as_u64() >= Some(records));
    assert_eq!(shown["state"], "trusted", "{shown:#}");

    // And while the next one's does, of which it holds nothing.
    site.stop();
    machine.reboot(NEXT_BOOT);
    machine.run_until_longer(LONGER, digest);
    // A capture takes the same way.
    site.run(&["policy", "capture", "alpha", "--add"]).good();
    site.serve();
    let shown = site.wait_until("alpha", |shown| shown["boot_id"] == NEXT_BOOT);
    assert_eq!(shown["state"], "trusted", "{shown:#}");

    // Without a TPM reset, it is no way around the check for one.
    site.stop();
    machine.stop();
    machine.boot(BOOT);
    machine.run_until_longer(LONGER, digest);
    site.serve();
    let shown = site.wait_for("alpha", "untrusted");
    assert!(reasons(&shown)[0].contains("TPM was not reset"), "{shown:#}");
    // Nor for one that went back.
    change(&site, "logs SET reset_count = reset_count + 1");
    site.wait_until("alpha", |shown| {
        reasons(shown)
            .first()
            .is_some_and(|reason| reason.contains("stale: the TPM's reset count is"))
    });
}

/// More than one bundle takes.
const LONGER: u64 = 17 << 20;
