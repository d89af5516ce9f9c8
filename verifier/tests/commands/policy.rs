//! `policy …` on policies that come from files, run as programs.

use std::fs;

use assay_evidence::digest::Sha256Digest;
use assay_evidence::policy::Policy;
use serde_json::{Value, json};

use super::program::Site;

fn digest(text: &str) -> String {
    Sha256Digest::of(text.as_bytes()).to_string()
}

fn file(name: &str) -> Value {
    json!({
        "version": 2, "name": name,
        "boots": [{"name": "old", "pcrs": {"4": [digest("loader")]}}],
        "sets": [{"name": "base", "agents": [digest("agent")], "code": [
            {"path": "/bin/a", "kind": "program", "sha256": digest("a")},
        ]}],
        "rules": {"tiers": [1], "modes": ["hold"], "flags": {"memfd": "refuse"}},
    })
}

/// A verifier with this policy.
fn site(policy: &Value) -> Site {
    let site = Site::init();
    fs::write(site.path("policy.json"), policy.to_string()).unwrap();
    let imported = site
        .run(&["policy", "import", site.path("policy.json").to_str().unwrap()])
        .good();
    assert!(imported.ends_with(": 1 digests, 1 boot configuration\n"), "{imported}");
    site
}

#[test]
fn a_policy_goes_out_and_comes_back() {
    let site = site(&file("pool"));
    let out = site.path("out.json");
    let out = out.to_str().unwrap();
    site.run(&["policy", "export", "pool", "--out", out]).good();
    site.run(&["policy", "export", "pool", "--out", out])
        .refused(&["cannot write", out]);
    assert_eq!(site.run(&["policy", "diff", "pool", out]).good(), "no difference\n");
    site.run(&["policy", "import", out])
        .refused(&["policy pool exists already", "--replace", "--name"]);
    site.run(&["policy", "import", out, "--name", "a b"])
        .refused(&[out, "is no name"]);
    site.run(&["policy", "import", out, "--name", "copy"]).good();
    site.run(&["policy", "import", out, "--replace"]).good();
    assert_eq!(site.run(&["policy", "diff", "pool", "copy"]).good(), "no difference\n");

    let broken = file("pool").to_string().replace("refuse", "refuze");
    fs::write(site.path("broken.json"), broken).unwrap();
    let broken = site.path("broken.json");
    site.run(&["policy", "import", broken.to_str().unwrap(), "--replace"])
        .refused(&["broken.json holds no policy", "refuze"]);
    site.run(&["policy", "import", "/nowhere/x.json"])
        .refused(&["cannot read /nowhere/x.json"]);
    let shown = site.run(&["policy", "show", "pool"]).good();
    for part in [
        "boot configuration old\n",
        "set base\n",
        "{\"memfd\":\"refuse\"}",
        "/bin/a",
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
}

#[test]
fn a_signed_policy_goes_to_another_verifier() {
    let (here, there) = (site(&file("pool")), Site::init());
    let (out, key) = (there.path("pool.jws"), there.path("key.pem"));
    let [out, key] = [&out, &key].map(|path| path.to_str().unwrap());
    here.run(&["policy", "export", "pool", "--out", out, "--sign"]).good();
    fs::write(key, here.run(&["policy", "key"]).good()).unwrap();
    there
        .run(&["policy", "import", out])
        .refused(&["pool.jws looks like a signed policy", "--signer"]);
    let own = there.path("own.pem");
    fs::write(&own, there.run(&["policy", "key"]).good()).unwrap();
    there
        .run(&["policy", "import", out, "--signer", own.to_str().unwrap()])
        .refused(&["pool.jws", "not signed with this key"]);
    there
        .run(&["policy", "import", out, "--signer", out])
        .refused(&["no public key"]);
    there.run(&["policy", "import", out, "--signer", key]).good();
    let back = there.path("back.json");
    there
        .run(&["policy", "export", "pool", "--out", back.to_str().unwrap()])
        .good();
    assert_eq!(
        here.run(&["policy", "diff", "pool", back.to_str().unwrap()]).good(),
        "no difference\n"
    );
    // What is not signed at all is not let in by a key.
    there
        .run(&["policy", "import", back.to_str().unwrap(), "--signer", key])
        .refused(&["no signed policy"]);
}

#[test]
fn an_update_of_the_agent_is_allowed_ahead() {
    let site = site(&file("default"));
    let (agent, object) = (site.path("assay-agent"), site.path("assay-ebpf.o"));
    fs::write(&agent, "agent 2").unwrap();
    fs::write(&object, "bpf 2").unwrap();
    let [agent, object] = [&agent, &object].map(|path| path.to_str().unwrap());
    assert_eq!(site.run(&["policy", "allow-agent"]).code, Some(2));
    site.run(&["policy", "allow-agent", "--agent", "/nowhere/x"])
        .refused(&["/nowhere/x"]);
    let args = [
        "policy",
        "allow-agent",
        "--agent",
        agent,
        "--kernel-programs",
        object,
        "--set",
        "update",
    ];
    let out = site.run(&args).good();
    for line in [
        format!("policy default now allows agent sha256:{}\n", digest("agent 2")),
        format!("policy default now allows kernel programs sha256:{}\n", digest("bpf 2")),
    ] {
        assert!(out.contains(&line), "{out}");
    }
    assert!(site.run(&args).good().contains("allowed already"));
    let json = site.run(&["policy", "show", "default", "--json"]).good();
    let policy = Policy::from_json(json.as_bytes()).unwrap();
    assert_eq!(policy.sets()[1].agents().len(), 1);
}

#[test]
fn policies_merge_differ_expire_and_lose_parts() {
    let site = site(&file("pool"));
    let mut update = file("update");
    update["boots"] = json!([{"name": "new", "pcrs": {"4": [digest("loader 2")]}}]);
    update["sets"] = json!([{"name": "2026-12", "code": [{"sha256": digest("b")}]}]);
    update["rules"] = json!({"tiers": [1], "modes": ["hold"]});
    let path = site.path("update.json");
    fs::write(&path, update.to_string()).unwrap();
    let path = path.to_str().unwrap();
    let changes = site.run(&["policy", "diff", "pool", path]).good();
    assert!(
        changes.contains(&format!("+ set 2026-12 code:  any sha256:{}\n", digest("b"))),
        "{changes}"
    );
    assert!(changes.contains("- rules: flags"), "{changes}");
    let as_json: Value = serde_json::from_str(&site.run(&["policy", "diff", "pool", path, "--json"]).good()).unwrap();
    assert_eq!(as_json.as_array().unwrap().len(), changes.lines().count());

    site.run(&["policy", "import", path]).good();
    site.run(&["policy", "merge", "pool", "nothing"]).refused(&["nothing"]);
    let merged = site.run(&["policy", "merge", "pool", "update"]).good();
    assert_eq!(merged, "policy pool: 2 digests, 2 boot configurations\n");

    site.run(&["policy", "expire", "pool", "--part", "base", "--at", "2027-01-31"])
        .good();
    site.run(&["policy", "expire", "pool", "--part", "bass", "--never"])
        .refused(&["bass"]);
    assert_eq!(site.run(&["policy", "expire", "pool"]).code, Some(2));
    let json = site.run(&["policy", "show", "pool", "--json"]).good();
    let pool = Policy::from_json(json.as_bytes()).unwrap();
    assert_eq!(pool.sets()[0].expires().unwrap().to_string(), "2027-01-31T00:00:00Z");
    site.run(&["policy", "expire", "pool", "--at", "2020-01-01"]).good();
    let shown = site.run(&["policy", "show", "pool"]).good();
    assert!(shown.contains("until 2020-01-01T00:00:00Z: it has EXPIRED"), "{shown}");

    site.run(&["policy", "drop", "pool", "base"]).good();
    site.run(&["policy", "drop", "pool", "base"]).refused(&["base", "pool"]);
    let allowed = site
        .run(&["policy", "allow", &digest("c"), "--name", "pool", "--set", "2026-12"])
        .good();
    assert!(allowed.contains("now allows"), "{allowed}");
    let json = site.run(&["policy", "show", "pool", "--json"]).good();
    let pool = Policy::from_json(json.as_bytes()).unwrap();
    assert_eq!((pool.sets().len(), pool.sets()[0].code().len()), (1, 2));
}
