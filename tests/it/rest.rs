//! The HTTP door on a real server, with doubles for the engine.

mod bounds;
mod disconnect;
mod fusion;
mod guard;
mod home_assistant;
mod ollama;
mod openai;
mod refusals;
mod stop;

use std::fs;
use std::path::PathBuf;

/// Compares with `tests/golden/rest/<name>`; `SCOUTD_BLESS=1` writes it instead. Times are taken out first.
fn check_golden(name: &str, text: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/rest").join(name);
    let text = without_times(text);
    if std::env::var_os("SCOUTD_BLESS").is_some() {
        fs::write(&path, &text).expect("the golden directory exists");
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, expected, "{}", path.display());
}

fn without_times(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((key, at)) = [r#""created":"#, r#""created_at":"#, r#""expires_at":"#]
        .iter()
        .filter_map(|key| rest.find(key).map(|at| (*key, at)))
        .min_by_key(|&(_, at)| at)
    {
        let value = &rest[at + key.len()..];
        let end = value.find([',', '}']).expect("a value ends");
        out.push_str(&rest[..at + key.len()]);
        out.push_str(if value.starts_with('"') { "\"TIME\"" } else { "0" });
        rest = &value[end..];
    }
    out.push_str(rest);
    out
}
