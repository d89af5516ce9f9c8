//! How the verifier is logged in at a real OpenBao server: for how long, and in which namespace.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use assay_tests::bao::Bao;
use assay_verifier::config::Config;
use assay_verifier::keystore::{self, KeySource as _};
use serde_json::Value;

use crate::peer_key_source::{configure_in, introduce};
use crate::site::Site;

/// So many seconds a token lives. For half of that it is waited for, in the other half a busy machine has to ask once.
const LIVES: u64 = 6;
const PATIENCE: Duration = Duration::from_secs(120);
const APPROLE: &str = "auth/approle/login";

/// What the server knows of the tokens of logins that live, each with its accessor.
fn tokens(bao: &Bao) -> Vec<Value> {
    let list = bao.run(&["list", "-format=json", "auth/token/accessors"], "").unwrap();
    let accessors: Vec<String> = serde_json::from_str(&list).unwrap();
    let look = |accessor: &String| {
        // One that has run out meanwhile is no token.
        let said = bao.run(&["token", "lookup", "-format=json", "-accessor", accessor], "");
        let mut shown: Value = serde_json::from_str(&said.ok()?).unwrap();
        Some(shown["data"].take()).filter(|token| token["path"] == APPROLE)
    };
    accessors.iter().filter_map(look).collect()
}

/// Asks for the key again and again until its one token is as wanted. `None`: it is gone, and another one in its place.
fn ask_until(bao: &Bao, ask: &dyn Fn(), accessor: &Value, wanted: impl Fn(&Value) -> bool) -> Option<Value> {
    let start = Instant::now();
    loop {
        ask();
        let token = tokens(bao).into_iter().find(|token| token["accessor"] == *accessor)?;
        if wanted(&token) {
            return Some(token);
        }
        assert!(start.elapsed() < PATIENCE, "{token:#}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// One login, until its token has served for longer than it was given for at first. `None`: the machine stood still for so long
/// that the token ran out.
fn outlived(bao: &Bao, ask: &dyn Fn()) -> Option<()> {
    bao.run(&["lease", "revoke", "-force", "-prefix", APPROLE], "").unwrap();
    ask();
    let first = tokens(bao).pop()?;
    let renewed = ask_until(bao, ask, &first["accessor"], |token| {
        token["last_renewal_time"].is_u64()
    })?;
    let [made, again] = ["creation_time", "last_renewal_time"].map(|when| renewed[when].as_u64().unwrap());
    assert!(
        again - made >= LIVES / 2,
        "renewed before half of its life: {renewed:#}"
    );
    let over = UNIX_EPOCH + Duration::from_secs(made + LIVES + 1);
    ask_until(bao, ask, &first["accessor"], |_| SystemTime::now() > over)?;
    assert_eq!(tokens(bao).len(), 1, "there was no other login");
    Some(())
}

#[test]
fn a_token_is_renewed_when_half_of_its_life_is_over_and_serves_on() {
    let site = Site::init(10.0);
    let bao = Bao::start().unwrap();
    introduce(&bao, &site, "");
    let lives = format!("token_ttl={LIVES}s");
    bao.run(
        &["write", "auth/approle/role/assay", "token_policies=assay", &lives],
        "",
    )
    .unwrap();
    configure_in(&site, &bao, "", "kv", true);
    let (key, passphrase) = site.new_key("default");
    let source = Config::load(&site.state()).unwrap().key_source;
    let store = keystore::open(site.state().path(), source.as_ref()).unwrap();
    let ask = || assert_eq!(store.get(key.key_id).unwrap().passphrase.expose(), passphrase.expose());
    let seen = (0..10).any(|_| outlived(&bao, &ask).is_some());
    assert!(seen, "each token ran out before it was renewed: {:?}", tokens(&bao));
}

#[test]
fn keys_are_in_the_namespace_that_is_named_and_in_no_other() {
    let site = Site::init(10.0);
    let bao = Bao::start().unwrap();
    bao.run(&["namespace", "create", "team"], "").unwrap();
    // The one at the root is there from the start, with this name.
    bao.run_in("team", &["secrets", "enable", "-path=secret", "-version=2", "kv"], "")
        .unwrap();
    introduce(&bao, &site, "team");
    configure_in(&site, &bao, "team", "kv", true);
    let (key, passphrase) = site.new_key("default");
    let id = key.key_id.to_string();
    let half = |namespace| {
        let place = format!("secret/assay/{id}");
        bao.run_in(namespace, &["kv", "get", "-field=half", &place], "").is_ok()
    };
    assert_eq!((half("team"), half("")), (true, false));
    let get = || {
        let source = Config::load(&site.state()).unwrap().key_source;
        let store = keystore::open(site.state().path(), source.as_ref()).unwrap();
        store.get(key.key_id)
    };
    assert_eq!(get().unwrap().passphrase.expose(), passphrase.expose());

    // Nobody knows this verifier elsewhere.
    let file = site.state().config();
    let good = std::fs::read_to_string(&file).unwrap();
    let line = "namespace = \"team\"\n";
    assert_eq!(good.matches(line).count(), 1);
    for other in ["", "namespace = \"other\"\n"] {
        std::fs::write(&file, good.replace(line, other)).unwrap();
        site.run(&["key", "move", &id, "--to", "files"]).refused(&["AppRole"]);
    }
    std::fs::write(&file, good).unwrap();
    site.run(&["key", "move", &id, "--to", "files"]).good();
    assert_eq!((half("team"), half("")), (false, false));
    assert_eq!(get().unwrap().passphrase.expose(), passphrase.expose());
}
