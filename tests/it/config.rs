//! The shipped configuration says what the program does.

use std::fs;
use std::path::Path;

use scoutd::config::{Config, Named, Sources};

fn shipped() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("etc/scoutd.toml");
    fs::read_to_string(path).expect("the file is shipped")
}

fn load(text: &str) -> Config {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("scoutd.toml");
    fs::write(&file, text).expect("the file can be written");
    let sources = Sources { file: Some((file, Named::Explicitly)), ..Sources::default() };
    Config::load(&sources).unwrap_or_else(|errors| panic!("{errors:?}"))
}

/// Commented defaults are `#key = value`; examples and explanations have a space after the `#`.
fn uncommented(text: &str) -> (String, usize) {
    let is_default =
        |line: &str| line.starts_with('#') && !line.starts_with("# ") && line.contains('=');
    let lines: Vec<&str> =
        text.lines().map(|line| if is_default(line) { &line[1..] } else { line }).collect();
    (lines.join("\n"), text.lines().filter(|line| is_default(line)).count())
}

#[test]
fn as_shipped_it_changes_nothing() {
    assert_eq!(load(&shipped()), Config::default());
}

#[test]
fn every_commented_default_is_the_default() {
    let (text, count) = uncommented(&shipped());
    assert!(count > 40, "only {count} defaults found");
    assert_eq!(load(&text), Config::default());
}

#[test]
fn every_key_of_the_tree_is_in_the_file() {
    let text = shipped();
    // Unknown keys are refused with the list of the known ones: ask each section for its list.
    for section in [
        "log",
        "daemon",
        "model",
        "store",
        "memory",
        "engine",
        "rest",
        "rest.limits",
        "mqtt",
        "fusion",
    ] {
        let sources =
            Sources { settings: vec![format!("{section}.no_such_key=1")], ..Sources::default() };
        let error = Config::load(&sources).expect_err("no such key")[0].to_string();
        let (_, list) = error.split_once("expected").unwrap_or_else(|| panic!("no list: {error}"));
        let list = list.lines().next().unwrap_or_default();
        let keys: Vec<&str> = list.split('`').skip(1).step_by(2).collect();
        assert!(!keys.is_empty(), "{error}");
        for key in keys.into_iter().filter(|key| *key != "limits") {
            let named = text
                .lines()
                .any(|line| line.trim_start_matches(['#', ' ']).split(" =").next() == Some(key));
            assert!(named, "{section}.{key} is not in etc/scoutd.toml");
        }
    }
}
