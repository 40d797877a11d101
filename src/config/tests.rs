use std::fs;

use super::load::Named;
use super::*;

fn settings(settings: &[&str]) -> Sources {
    Sources { settings: settings.iter().map(|s| (*s).to_owned()).collect(), ..Sources::default() }
}

#[test]
fn later_sources_override_earlier_ones() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("scoutd.toml");
    fs::write(&file, "[model]\nthreads = 1\nname = \"a\"\n").expect("the file can be written");
    fs::create_dir(folder.path().join("scoutd.toml.d")).expect("the folder can be made");
    fs::write(folder.path().join("scoutd.toml.d/10-x.toml"), "[model]\nthreads = 2\n")
        .expect("the file can be written");
    let mut sources = Sources { file: Some((file, Named::Explicitly)), ..Sources::default() };
    let loaded = Config::load(&sources).expect("valid");
    assert_eq!((loaded.model.threads, loaded.model.name.as_deref()), (2, Some("a")));

    sources.environment = vec![("SCOUTD_MODEL__THREADS".into(), "3".into())];
    assert_eq!(Config::load(&sources).expect("valid").model.threads, 3);

    sources.settings = vec!["model.threads=4".into(), "model.name=b c".into()];
    let loaded = Config::load(&sources).expect("valid");
    assert_eq!((loaded.model.threads, loaded.model.name.as_deref()), (4, Some("b c")));
}

#[test]
fn text_that_looks_like_a_number_still_becomes_text() {
    let loaded = Config::load(&settings(&["model.name=7"])).expect("valid");
    assert_eq!(loaded.model.name.as_deref(), Some("7"));
}

#[test]
fn every_fault_is_told_with_its_source() {
    let sources = Sources {
        environment: vec![("SCOUTD_MODEL__COLOUR".into(), "red".into())],
        ..settings(&["model.threads=many", "model"])
    };
    let errors = Config::load(&sources).expect_err("three faults");
    assert_eq!(errors.len(), 3, "{errors:?}");
    assert!(errors[0].to_string().starts_with("SCOUTD_MODEL__COLOUR: unknown field `colour`"));
    assert!(errors[0].to_string().contains("`threads`"), "the choices are listed");
    assert!(errors[1].to_string().starts_with("--set model.threads=many: invalid type"));
    assert_eq!(errors[2].to_string(), "--set model: expected section.key=value");
}

#[test]
fn a_fault_in_a_file_names_file_and_line() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("scoutd.toml");
    fs::write(&file, "[model]\nthreads = 1\nthread = 2\n").expect("the file can be written");
    let sources = Sources { file: Some((file, Named::Explicitly)), ..Sources::default() };
    let errors = Config::load(&sources).expect_err("a misspelt key");
    let text = errors[0].to_string();
    assert!(text.contains("scoutd.toml") && text.contains("line 3"), "{text}");
}

#[test]
fn only_a_named_file_must_exist() {
    let missing = std::path::PathBuf::from("/nonexistent/scoutd.toml");
    let absent = |named| Sources { file: Some((missing.clone(), named)), ..Sources::default() };
    assert_eq!(Config::load(&absent(Named::ByDefault)), Ok(Config::default()));
    assert!(Config::load(&absent(Named::Explicitly)).is_err());
}
