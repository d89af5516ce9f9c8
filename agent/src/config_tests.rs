use super::*;

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(text, Path::new("agent.toml"))
}

#[test]
fn an_empty_file_gives_the_documented_defaults() {
    let config = parse("").unwrap();
    assert_eq!(config.listen.to_string(), "0.0.0.0:8443");
    assert_eq!((config.tpm.pcr, config.tpm.ak_handle), (13, 0x8101_0A55));
    assert_eq!(config.tpm.tcti, "device:/dev/tpmrm0");
    assert_eq!(config.measure.log_max, 64 * 1024 * 1024);
    assert_eq!(config.socket(), Path::new("/run/assay/agent.sock"));
    assert_eq!(config.log_file(), Path::new("/run/assay/log.cel"));
    assert_eq!(config.unlock.timeout, Duration::from_secs(60));
}

#[test]
fn the_shipped_file_parses_and_says_the_defaults() {
    let shipped = include_str!("../../packaging/agent.toml");
    assert_eq!(parse(shipped).unwrap(), parse("").unwrap());
    // Everything in it is commented out or a default; with the comments taken away it must parse as well.
    let uncommented: String = shipped
        .lines()
        .map(|line| {
            line.strip_prefix("#")
                .filter(|rest| !rest.starts_with(' '))
                .unwrap_or(line)
        })
        .flat_map(|line| [line, "\n"])
        .collect();
    assert_eq!(parse(&uncommented).unwrap(), parse("").unwrap());
    assert!(uncommented.contains("\nlog_max_mib = 64"));
}

#[test]
fn an_unknown_key_is_named_with_file_and_line() {
    let error = parse("listen = \"127.0.0.1:1\"\n\n[tpm]\npcrr = 13\n").unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("agent.toml:4: unknown field `pcrr`"), "{text}");
    assert!(matches!(error, ConfigError::Syntax { line: 4, .. }));
    assert!(matches!(
        parse("[unlok]\n").unwrap_err(),
        ConfigError::Syntax { line: 1, .. }
    ));
}

#[test]
fn registers_of_others_are_refused_with_their_owner() {
    for pcr in (0..=11).chain(15..=24).chain([-1, 4096]) {
        let error = parse(&format!("[tpm]\npcr = {pcr}\n")).unwrap_err();
        assert!(matches!(error, ConfigError::Pcr { .. }), "PCR {pcr}: {error}");
    }
    for pcr in 12..=14 {
        assert_eq!(i64::from(parse(&format!("[tpm]\npcr = {pcr}\n")).unwrap().tpm.pcr), pcr);
    }
}

#[test]
fn values_out_of_range_are_refused() {
    for (text, key) in [
        ("[tpm]\nak_handle = 0x80000000", "tpm.ak_handle"),
        ("[tpm]\nak = \"rsa-1024\"", "tpm.ak"),
        ("[tpm]\ntimeout_s = 0", "tpm.timeout_s"),
        ("[tpm]\ntcti = \"\"", "tpm.tcti"),
        ("[measure]\nlog_max_mib = 0", "measure.log_max_mib"),
        ("[unlock]\ntimeout_s = 4000", "unlock.timeout_s"),
        ("[unlock]\nhook_deadline_s = 0", "unlock.hook_deadline_s"),
    ] {
        assert!(
            matches!(parse(text).unwrap_err(), ConfigError::Range { key: found, .. } if found == key),
            "{text}"
        );
    }
    assert!(matches!(
        parse("run_dir = \"run\"").unwrap_err(),
        ConfigError::RelativePath { key: "run_dir", .. }
    ));
    assert!(matches!(
        parse("[log]\nlevel = \"loud\"").unwrap_err(),
        ConfigError::Level { .. }
    ));
}

#[test]
fn modes_are_words_and_decide_about_protection() {
    let measure = |text: &str| parse(&format!("[measure]\n{text}")).unwrap().measure;
    assert_eq!(measure("").mode, Mode::Observe);
    assert!(!measure("").protect);
    for (word, mode) in [("hold", Mode::Hold), ("enforce", Mode::Enforce)] {
        let measured = measure(&format!("mode = \"{word}\""));
        assert_eq!((measured.mode, measured.protect), (mode, true));
        assert!(!measure(&format!("mode = \"{word}\"\nprotect = false")).protect);
    }
    assert!(matches!(
        parse("[measure]\nmode = \"off\"").unwrap_err(),
        ConfigError::ModeUnknown { .. }
    ));
}

#[test]
fn lists_are_short_and_of_absolute_paths() {
    assert!(matches!(
        parse("[measure]\nhold_folders = [\"lib\"]").unwrap_err(),
        ConfigError::RelativePath {
            key: "measure.hold_folders",
            ..
        }
    ));
    let many = vec!["\"/a\""; 65].join(",");
    assert!(matches!(
        parse(&format!("[measure]\ninterpreters = [{many}]")).unwrap_err(),
        ConfigError::Range { .. }
    ));
}

#[test]
fn a_named_file_must_exist() {
    let error = Config::load(Some(Path::new("/nonexistent/agent.toml"))).unwrap_err();
    assert!(matches!(error, ConfigError::Read { .. }));
}

#[test]
fn the_tier_is_auto_or_one_that_there_is() {
    let tier = |text: &str| parse(&format!("[measure]\ntier = {text}\n")).map(|config| config.measure.tier);
    assert_eq!(tier("\"auto\"").unwrap(), None);
    assert_eq!(tier("1").unwrap(), Some(1));
    assert_eq!(tier("3").unwrap(), Some(3));
    for (wrong, shown) in [("0", "0"), ("4", "4"), ("\"best\"", "\"best\"")] {
        let error = tier(wrong).unwrap_err();
        assert!(matches!(error, ConfigError::Range { .. }), "{error}");
        assert!(
            error.to_string().contains(&format!("measure.tier = {shown} ")),
            "{error}"
        );
    }
    assert!(matches!(tier("[1]").unwrap_err(), ConfigError::Syntax { line: 2, .. }));
    let error = parse("[measure]\nbtf = \"vmlinux\"\n").unwrap_err();
    assert!(matches!(error, ConfigError::RelativePath { .. }), "{error}");
}

#[test]
fn the_attestation_key_is_ecdsa_unless_told_otherwise() {
    let ak = |text: &str| parse(text).unwrap().tpm.ak;
    assert_eq!(ak(""), AkKind::EcdsaP256);
    assert_eq!(ak("[tpm]\nak = \"ecdsa-p256\""), AkKind::EcdsaP256);
    assert_eq!(ak("[tpm]\nak = \"rsa-2048\""), AkKind::Rsa2048);
    let error = parse("[tpm]\nak = \"rsa\"").unwrap_err().to_string();
    assert!(
        error.contains("tpm.ak = \"rsa\"") && error.contains("rsa-2048"),
        "{error}"
    );
}

#[test]
fn the_endorsement_key_is_the_certified_one_unless_told_otherwise() {
    let ek = |text: &str| parse(text).unwrap().tpm.ek;
    assert_eq!(ek(""), None);
    assert_eq!(ek("[tpm]\nek = \"auto\""), None);
    assert_eq!(ek("[tpm]\nek = \"rsa-2048\""), Some(EkKind::Rsa2048));
    assert_eq!(ek("[tpm]\nek = \"ecc-p256\""), Some(EkKind::EccP256));
    let error = parse("[tpm]\nek = \"ecdsa-p256\"").unwrap_err().to_string();
    assert!(
        error.contains("tpm.ek = \"ecdsa-p256\"") && error.contains("ecc-p256"),
        "{error}"
    );
}
