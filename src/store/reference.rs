//! What is to be pulled, as people write it: `REPO`, `REPO:QUANT`, `REPO:FILE`.

use std::fmt;
use std::str::FromStr;

use super::StoreError;

/// A repository of the hub and what of it: `owner/name[:QUANT|:FILE]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// The repository.
    pub repo: Repo,
    /// A quantization as `Q4_0`, or a file's name.
    pub part: Option<String>,
}

/// `owner/name`, or `name` alone for a few old ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repo(String);

impl Repo {
    /// As the hub writes it.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The part behind the owner.
    pub fn name(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or(&self.0)
    }
}

impl fmt::Display for Repo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Repo {
    type Err = StoreError;

    fn from_str(text: &str) -> Result<Repo, StoreError> {
        let part_is_valid = |part: &str| {
            let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            (1..=96).contains(&part.len())
                && part.chars().all(allowed)
                && !part.starts_with(['-', '.'])
                && !part.contains("..")
        };
        let parts: Vec<&str> = text.split('/').collect();
        if parts.len() <= 2 && parts.iter().all(|part| part_is_valid(part)) {
            return Ok(Repo(text.to_owned()));
        }
        Err(StoreError::Name(format!("`{text}` is no repository; write owner/name")))
    }
}

impl FromStr for Reference {
    type Err = StoreError;

    /// Addresses as browsers and other tools have them (`https://hub/owner/name`, `hf.co/owner/name`) are
    /// taken too; their host is ignored, because which hub is asked is configured.
    fn from_str(text: &str) -> Result<Reference, StoreError> {
        let bare = text.strip_prefix("https://").unwrap_or(text);
        let bare = HOSTS.iter().find_map(|host| bare.strip_prefix(host)).unwrap_or(bare);
        let (repo, part) = match bare.trim_end_matches('/').split_once(':') {
            Some((repo, part)) => (repo, Some(part)),
            None => (bare.trim_end_matches('/'), None),
        };
        if part.is_some_and(|part| !is_path(part)) {
            return Err(StoreError::Name(format!("`{text}`: no quantization and no file name")));
        }
        Ok(Reference { repo: repo.parse()?, part: part.map(str::to_owned) })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.part {
            Some(part) => write!(f, "{}:{part}", self.repo),
            None => self.repo.fmt(f),
        }
    }
}

/// Whether this can be the path of a file in a repository: relative, no step upwards, no control characters.
pub(super) fn is_path(path: &str) -> bool {
    path.len() <= PATH_BYTES_MAX
        && !path.chars().any(char::is_control)
        && path.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
}

/// Whether a model in the store may be called so.
pub fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    (1..=128).contains(&name.len())
        && name.chars().all(allowed)
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && !name.contains("..")
}

/// The same in letters that a name may have.
pub(super) fn to_name(text: &str) -> String {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let mapped: String =
        text.chars().map(|c| if allowed(c) { c } else { '-' }).take(NAME_BYTES).collect();
    let name = mapped.trim_start_matches(|c: char| !c.is_ascii_alphanumeric()).replace("..", ".");
    if is_name(&name) { name } else { "model".to_owned() }
}

/// A path in a URL: everything but unreserved characters and `/` is escaped (RFC 3986 §2.3).
pub(super) fn escape(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    for byte in path.bytes() {
        let plain =
            byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~' | b'/');
        if plain { out.push(byte.into()) } else { out.push_str(&format!("%{byte:02X}")) }
    }
    out
}

const HOSTS: [&str; 2] = ["huggingface.co/", "hf.co/"];
const PATH_BYTES_MAX: usize = 512;
/// Of a name that is made: leaves room for `.gguf.part.json`.
const NAME_BYTES: usize = 100;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references() {
        let parse = |text: &str| {
            let reference: Reference = text.parse().map_err(|e: StoreError| e.to_string())?;
            Ok::<_, String>((reference.repo.as_str().to_owned(), reference.part))
        };
        let part = |text: &str| Some(text.to_owned());
        let owner = || "owner/name-GGUF".to_owned();
        assert_eq!(parse("owner/name-GGUF"), Ok((owner(), None)));
        assert_eq!(parse("owner/name-GGUF:q4_k_m"), Ok((owner(), part("q4_k_m"))));
        assert_eq!(parse("hf.co/owner/name-GGUF:Q8_0"), Ok((owner(), part("Q8_0"))));
        assert_eq!(parse("https://huggingface.co/owner/name-GGUF/"), Ok((owner(), None)));
        assert_eq!(parse("owner/name-GGUF:a/b.gguf"), Ok((owner(), part("a/b.gguf"))));
        assert_eq!(parse("gpt2"), Ok(("gpt2".to_owned(), None)));
        for bad in [
            "",
            "/",
            "a/b/c",
            "../x",
            "a/..",
            "a b/c",
            "a/b:",
            "a/b:../c",
            "a/b:/etc/passwd",
            "http://x/y",
            ".a/b",
            "a/b?c",
            "a/b:c\nd",
            "owner/",
        ] {
            assert_eq!(parse(bad).is_ok(), bad == "owner/", "{bad}");
        }
    }

    #[test]
    fn names_and_escapes() {
        assert_eq!(to_name("Llama 3.2-1B_Q4_0"), "Llama-3.2-1B_Q4_0");
        assert_eq!(to_name("..x..y"), "x.y");
        assert_eq!(to_name("ß"), "model");
        assert!(!is_name("a/b") && !is_name("..") && !is_name("-x") && is_name("a.b-c_1"));
        assert_eq!(escape("a b/c+ü.gguf"), "a%20b/c%2B%C3%BC.gguf");
    }
}
