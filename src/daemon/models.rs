//! Where models are on this machine and whom they are pulled from, as configuration and environment say.

use std::fs;
use std::path::{Path, PathBuf};

use super::StartError;
use crate::config::Config;
use crate::egress::Url;
use crate::store::{Access, Hub, Kind, Retry, Store, StoreError, Token};
use crate::units::Bytes;

/// The store of this machine.
///
/// # Errors
/// If no folder is configured and none can be derived.
pub fn open_store(config: &Config) -> Result<Store, StartError> {
    let dir = match &config.store.path {
        Some(path) => path.clone(),
        None => usual_dir().ok_or_else(|| {
            StartError::Config("no folder for models: set store.path, or HOME".to_owned())
        })?,
    };
    Ok(Store::new(dir, Bytes(config.store.keep_free_bytes)))
}

/// The hub: `HF_ENDPOINT`, else the configured mirror, else the configured hub. A mirror gets no token.
///
/// # Errors
/// If an address, the token's file or a certificate cannot be used.
pub fn open_hub(config: &Config) -> Result<Hub, StartError> {
    let wrong =
        |key: &str, error: &dyn std::fmt::Display| StartError::Config(format!("{key}: {error}"));
    let address = |key: &str, text: &str| -> Result<Url, StartError> {
        text.trim_end_matches('/').parse().map_err(|error| wrong(key, &error))
    };
    let read = |key: &str, path: &Path| {
        fs::read(path).map_err(|error| wrong(&format!("{key} {}", path.display()), &error))
    };
    let token = || -> Result<Option<Token>, StartError> {
        let text = match (variable("HF_TOKEN"), &config.store.token_file) {
            (Some(token), _) => token,
            (None, None) => return Ok(None),
            (None, Some(path)) => {
                String::from_utf8_lossy(&read("store.token_file", path)?).into_owned()
            }
        };
        Token::new(&text).map_err(|error| wrong("token", &error))
    };
    let (base, token) = match (variable("HF_ENDPOINT"), &config.store.mirror) {
        (Some(endpoint), _) => (address("HF_ENDPOINT", &endpoint)?, token()?),
        (None, Some(mirror)) => (address("store.mirror", mirror)?, None),
        (None, None) => (address("store.hub", &config.store.hub)?, token()?),
    };
    let extra_ca_pem = match &config.store.ca_file {
        Some(path) => Some(read("store.ca_file", path)?),
        None => None,
    };
    Hub::new(Access { base, token, extra_ca_pem, retry: Retry::default() })
        .map_err(|error| StartError::Config(error.to_string()))
}

/// The file that a model's path or name means: a path that is there, else a name of the store.
///
/// # Errors
/// `Model` if it is neither.
pub fn find_model(config: &Config, model: &Path) -> Result<PathBuf, StartError> {
    let unusable = |message: String| StartError::Model { path: model.to_owned(), message };
    let name = model.to_str().filter(|name| !name.contains('/'));
    let Some(name) = name.filter(|_| !model.exists()) else { return Ok(model.to_owned()) };
    let store = open_store(config)?;
    let found = store.find(name).map_err(|error| unusable(error.to_string()))?;
    match found {
        Some(model) if model.kind == Kind::Gguf => Ok(store.path(&model)),
        Some(model) => Err(unusable(format!(
            "a checkpoint; make a file of it with `scoutd convert {}`",
            store.path(&model).display()
        ))),
        None => {
            let known = store.list().map_err(|error| unusable(error.to_string()))?;
            let known = known.into_iter().map(|model| model.name).collect();
            let unknown = StoreError::Unknown { name: name.to_owned(), known };
            Err(unusable(format!("no such file, and {unknown}")))
        }
    }
}

/// In the service's state folder, in root's usual place for it, else in the user's data folder.
fn usual_dir() -> Option<PathBuf> {
    if let Some(state) = variable("STATE_DIRECTORY") {
        return Some(PathBuf::from(state).join("models"));
    }
    if rustix::process::geteuid().is_root() {
        return Some(PathBuf::from("/var/lib/scoutd/models"));
    }
    let home = || variable("HOME").map(|home| PathBuf::from(home).join(".local/share"));
    let data = variable("XDG_DATA_HOME").map(PathBuf::from).or_else(home)?;
    Some(data.join("scoutd/models"))
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}
