//! From files, environment and flags to one table, and from the table to the typed tree.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::{Table, Value};

use super::Config;

/// Where a configuration comes from.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// The file, and whether somebody named it: a file nobody named may be absent.
    pub file: Option<(PathBuf, Named)>,
    /// Environment variables whose names begin with `SCOUTD_` and hold `__`.
    pub environment: Vec<(String, String)>,
    /// `section.key=value` from the command line.
    pub settings: Vec<String>,
}

/// Whether somebody asked for a file by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Named {
    /// Its absence is an error.
    Explicitly,
    /// It is the usual place; absent means defaults.
    ByDefault,
}

/// A fault of one source.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{origin}: {message}")]
pub struct ConfigError {
    /// The file, variable or flag.
    pub origin: String,
    /// What is wrong with it.
    pub message: String,
}

impl ConfigError {
    fn new(origin: impl Into<String>, message: impl ToString) -> ConfigError {
        ConfigError { origin: origin.into(), message: message.to_string().trim_end().to_owned() }
    }
}

pub(super) fn load(sources: &Sources) -> Result<Config, Vec<ConfigError>> {
    let mut table = Table::new();
    let mut errors = Vec::new();
    let mut add = |part: Result<Table, ConfigError>| match part {
        Ok(part) => merge(&mut table, part),
        Err(error) => errors.push(error),
    };
    if let Some((file, named)) = &sources.file {
        add(read_file(file, *named));
        match drop_ins(file) {
            Ok(paths) => paths.iter().for_each(|path| add(read_file(path, Named::Explicitly))),
            Err(error) => add(Err(error)),
        }
    }
    for (name, value) in &sources.environment {
        add(from_environment(name, value));
    }
    for setting in &sources.settings {
        add(from_setting(setting));
    }
    if !errors.is_empty() {
        return Err(errors);
    }
    // Each source was checked alone, so what fails here is a contradiction between two of them.
    Config::deserialize(table).map_err(|error| vec![ConfigError::new("configuration", error)])
}

fn read_file(path: &Path, named: Named) -> Result<Table, ConfigError> {
    let origin = path.display().to_string();
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound && named == Named::ByDefault => {
            return Ok(Table::new());
        }
        Err(error) => return Err(ConfigError::new(origin, error)),
    };
    // Through the typed tree first: only the text knows lines and columns.
    toml::from_str::<Config>(&text).map_err(|error| ConfigError::new(&origin, error))?;
    text.parse::<Table>().map_err(|error| ConfigError::new(&origin, error))
}

/// `scoutd.toml.d/*.toml` beside `scoutd.toml`, in the order of their names.
fn drop_ins(file: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let mut folder = file.as_os_str().to_owned();
    folder.push(".d");
    let folder = PathBuf::from(folder);
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(ConfigError::new(folder.display().to_string(), error)),
    };
    let mut paths: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .collect();
    paths.sort();
    Ok(paths)
}

/// `SCOUTD_REST__BIND` is `rest.bind`.
fn from_environment(name: &str, value: &str) -> Result<Table, ConfigError> {
    let path = name.strip_prefix("SCOUTD_").unwrap_or(name).to_ascii_lowercase();
    one_value(name, &path.split("__").collect::<Vec<_>>(), value)
}

fn from_setting(setting: &str) -> Result<Table, ConfigError> {
    let origin = format!("--set {setting}");
    let Some((path, value)) = setting.split_once('=') else {
        return Err(ConfigError::new(origin, "expected section.key=value"));
    };
    one_value(&origin, &path.trim().split('.').collect::<Vec<_>>(), value.trim())
}

/// A table that holds one value. The value is read as TOML if it is TOML, else it is text.
fn one_value(origin: &str, path: &[&str], text: &str) -> Result<Table, ConfigError> {
    if path.len() < 2 || path.iter().any(|part| part.is_empty()) {
        return Err(ConfigError::new(origin, "expected a section and a key"));
    }
    let as_text = || Value::String(text.to_owned());
    let as_toml =
        format!("value = {text}").parse::<Table>().ok().and_then(|mut t| t.remove("value"));
    let nested = |value: Value| {
        path.iter()
            .rev()
            .fold(value, |value, key| Value::Table(Table::from_iter([((*key).to_owned(), value)])))
    };
    let mut last = None;
    for value in as_toml.into_iter().chain([as_text()]) {
        let Value::Table(table) = nested(value) else { continue };
        match Config::deserialize(table.clone()) {
            Ok(_) => return Ok(table),
            // The first reading is the likelier one, so its fault is the one to tell.
            Err(error) => last = last.or(Some(error)),
        }
    }
    Err(ConfigError::new(origin, last.map_or_else(String::new, |error| error.to_string())))
}

/// Lays `over` on `base`: tables are merged, anything else replaced.
fn merge(base: &mut Table, over: Table) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(Value::Table(base)), Value::Table(over)) => merge(base, over),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}
