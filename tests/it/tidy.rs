//! The house rules that a compiler does not hold: who may use whom, where `unsafe` may stand, and who alone
//! touches `/proc`, the environment, status codes and page locks. Each rule is a function over text and is itself
//! tested below.

use std::fs;
use std::path::{Path, PathBuf};

/// A module and the modules it may use; `kernels` is the crate `scoutd_kernels`. Lowest first: a module may only
/// name modules that stand above it in this table.
const LAYERS: &[(&str, &[&str])] = &[
    ("units", &[]),
    ("metrics", &["units"]),
    ("gguf", &["units", "kernels"]),
    ("tokenizer", &["units", "gguf"]),
    ("chat", &["units"]),
    ("template", &["units", "gguf", "tokenizer", "chat"]),
    ("memory", &["units", "metrics"]),
    ("egress", &["units", "metrics"]),
    ("residency", &["units", "metrics", "gguf", "memory"]),
    ("model", &["units", "metrics", "gguf", "memory", "residency", "kernels"]),
    ("store", &["units", "metrics", "gguf", "memory", "egress", "residency", "model"]),
    (
        "engine",
        &["units", "metrics", "tokenizer", "chat", "template", "memory", "residency", "model"],
    ),
    ("wire", &["units", "chat"]),
    ("peer", &["units", "metrics", "chat", "egress", "wire"]),
    ("fusion", &["units", "metrics", "chat"]),
    ("rest", &["units", "metrics", "chat", "store", "wire", "peer", "fusion"]),
    ("mqtt", &["units", "metrics", "chat", "wire", "peer", "fusion"]),
    ("convert", &["units", "gguf", "tokenizer", "chat", "template", "model", "engine", "kernels"]),
    (
        "config",
        &[
            "units",
            "memory",
            "egress",
            "residency",
            "model",
            "store",
            "engine",
            "peer",
            "fusion",
            "rest",
            "mqtt",
            "kernels",
        ],
    ),
    ("daemon", ALL_BUT_CLI),
    ("cli", ALL),
];

const ALL_BUT_CLI: &[&str] = &[
    "units",
    "metrics",
    "gguf",
    "tokenizer",
    "chat",
    "template",
    "memory",
    "egress",
    "residency",
    "model",
    "store",
    "engine",
    "wire",
    "peer",
    "fusion",
    "rest",
    "mqtt",
    "convert",
    "config",
    "kernels",
];

const ALL: &[&str] = &[
    "units",
    "metrics",
    "gguf",
    "tokenizer",
    "chat",
    "template",
    "memory",
    "egress",
    "residency",
    "model",
    "store",
    "engine",
    "wire",
    "peer",
    "fusion",
    "rest",
    "mqtt",
    "convert",
    "config",
    "kernels",
    "daemon",
];

/// The rooms where `unsafe` may stand.
const UNSAFE_ROOMS: &[&str] = &[
    "kernels/src/arch/",
    "kernels/src/table.rs",
    "kernels/src/blocks.rs",
    "kernels/src/team.rs",
    "src/gguf/mapping.rs",
    "src/residency/pager.rs",
];

/// A text that only some modules may contain, and why.
const RESERVED: &[(&str, &[&str], &str)] = &[
    ("\"/proc", &["memory"], "only `memory` reads /proc"),
    ("std::env::var", &["daemon", "cli"], "nothing below `daemon` reads the environment"),
    ("env::args", &["cli"], "only `cli` reads arguments"),
    (
        "StatusCode",
        &["rest", "egress", "peer", "store"],
        "a door's status codes are known to `rest` alone",
    ),
    ("HttpResponse", &["rest"], "only `rest` speaks HTTP"),
    ("mlock(", &["residency"], "only `residency` locks pages"),
    (".advise(", &["residency"], "only `residency` advises the kernel about pages"),
    ("println!", &["cli"], "only `cli` prints"),
];

/// Marks of unfinished or private work.
const LEFTOVERS: &[&str] = &["TODO", "FIXME", "HACK", "dbg!(", "todo!(", "unimplemented!("];

struct Finding {
    line: usize,
    rule: String,
}

fn modules_named(code: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut offset = 0;
    while let Some(at) = code[offset..].find("crate::") {
        let start = offset + at;
        offset = start + "crate::".len();
        let word_before = code[..start].chars().next_back();
        if word_before.is_some_and(|c| c.is_alphanumeric() || c == '_') {
            continue;
        }
        let line = code[..start].matches('\n').count() + 1;
        let rest = &code[offset..];
        if rest.starts_with('{') {
            found.extend(group_heads(rest).into_iter().map(|name| (line, name)));
        } else {
            found.push((line, identifier(rest)));
        }
    }
    for (index, text) in code.lines().enumerate() {
        if text.contains("scoutd_kernels") {
            found.push((index + 1, "kernels".to_owned()));
        }
    }
    found
}

/// `{chat::{A, B}, units::C}` names `chat` and `units`.
fn group_heads(text: &str) -> Vec<String> {
    let mut heads = Vec::new();
    let mut depth = 0;
    let mut expects_head = false;
    for (at, c) in text.char_indices() {
        match c {
            '{' => {
                depth += 1;
                expects_head = depth == 1;
            }
            '}' => {
                depth -= 1;
                if depth == 0 {
                    break;
                }
            }
            ',' if depth == 1 => expects_head = true,
            c if expects_head && (c.is_alphabetic() || c == '_') => {
                heads.push(identifier(&text[at..]));
                expects_head = false;
            }
            _ => {}
        }
    }
    heads
}

fn identifier(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// The code without line comments, and without the unit tests at the end.
fn product_code(source: &str) -> String {
    let tests = source.match_indices("#[cfg(test)]\n").find(|(at, mark)| {
        source[at + mark.len()..].lines().next().is_some_and(|line| line.contains("mod tests"))
    });
    let product = tests.map_or(source, |(at, _)| &source[..at]);
    let without_comment = |line: &str| match line.find("//") {
        // A `//` inside a string (an address) is not a comment; cutting there only hides the rest of that line.
        Some(at) if !line[..at].contains('"') => line[..at].to_owned(),
        _ => line.to_owned(),
    };
    product.lines().map(without_comment).collect::<Vec<_>>().join("\n")
}

fn check_layers(module: &str, source: &str) -> Vec<Finding> {
    let code = product_code(source);
    let position = |name: &str| LAYERS.iter().position(|(layer, _)| *layer == name);
    let Some(own) = position(module) else {
        return vec![Finding {
            line: 1,
            rule: format!("module `{module}` is not in the layer table"),
        }];
    };
    let allowed = LAYERS[own].1;
    modules_named(&code)
        .into_iter()
        .filter(|(_, used)| used != module && !allowed.contains(&used.as_str()))
        .map(|(line, used)| Finding { line, rule: format!("`{module}` may not use `{used}`") })
        .collect()
}

/// `super::` steps that lead out of the module hide which module is meant. `depth` is the file's: 1 for
/// `src/wire.rs`, 3 for `src/wire/ollama/request.rs`.
fn check_supers(depth: usize, source: &str) -> Vec<Finding> {
    let leaves = "super::".repeat(depth);
    product_code(source)
        .lines()
        .enumerate()
        .filter(|(_, line)| line.contains(&leaves))
        .map(|(index, _)| {
            let rule = format!("`{leaves}` leaves the module: write `crate::`");
            Finding { line: index + 1, rule }
        })
        .collect()
}

fn check_unsafe(path: &str, source: &str) -> Vec<Finding> {
    if UNSAFE_ROOMS.iter().any(|room| path.starts_with(room)) {
        return Vec::new();
    }
    let is_word = |line: &str| {
        line.match_indices("unsafe").any(|(at, _)| {
            let after = line[at + "unsafe".len()..].chars().next();
            let before = line[..at].chars().next_back();
            let joins = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
            !joins(before) && !joins(after)
        })
    };
    product_code(source)
        .lines()
        .enumerate()
        .filter(|(_, line)| is_word(line))
        .map(|(index, _)| Finding {
            line: index + 1,
            rule: "`unsafe` outside its rooms".to_owned(),
        })
        .collect()
}

fn check_reserved(module: &str, source: &str) -> Vec<Finding> {
    let code = product_code(source);
    let mut findings = Vec::new();
    for (index, line) in code.lines().enumerate() {
        for (text, owners, why) in RESERVED {
            if line.contains(text) && !owners.contains(&module) {
                findings.push(Finding { line: index + 1, rule: (*why).to_owned() });
            }
        }
    }
    findings
}

fn check_leftovers(source: &str) -> Vec<Finding> {
    source
        .lines()
        .enumerate()
        .filter_map(|(index, line)| {
            let mark = LEFTOVERS.iter().find(|mark| line.contains(**mark))?;
            Some(Finding { line: index + 1, rule: format!("leftover mark `{mark}`") })
        })
        .collect()
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("the folder exists").flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    files
}

fn module_of(path: &Path) -> Option<String> {
    let first = path.strip_prefix("src").ok()?.components().next()?;
    let name = first.as_os_str().to_str()?.trim_end_matches(".rs").to_owned();
    (name != "lib" && name != "main").then_some(name)
}

#[test]
fn the_house_is_tidy() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut report = String::new();
    let mut files = 0;
    for folder in ["src", "kernels/src"] {
        for file in rust_files(&root.join(folder)) {
            files += 1;
            let source = fs::read_to_string(&file).expect("source files are UTF-8");
            let path = file.strip_prefix(root).expect("the file lies below the root");
            let shown = path.to_str().expect("our file names are UTF-8");
            let mut findings = check_unsafe(shown, &source);
            findings.extend(check_leftovers(&source));
            if let Some(module) = module_of(path) {
                findings.extend(check_layers(&module, &source));
                findings.extend(check_supers(path.components().count() - 1, &source));
                if !shown.ends_with("tests.rs") && !shown.contains("/tests/") {
                    findings.extend(check_reserved(&module, &source));
                }
            }
            for Finding { line, rule } in findings {
                report.push_str(&format!("{shown}:{line}: {rule}\n"));
            }
        }
    }
    assert!(files > 10, "the walk found only {files} files");
    assert!(report.is_empty(), "\n{report}");
}

#[test]
fn the_table_points_upwards_only() {
    for (index, (module, allowed)) in LAYERS.iter().enumerate() {
        for used in *allowed {
            let above = LAYERS[..index].iter().any(|(name, _)| name == used);
            assert!(*used == "kernels" || above, "`{module}` stands above `{used}`");
        }
    }
}

#[test]
fn the_table_and_lib_rs_name_the_same_modules_in_the_same_order() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let lib = fs::read_to_string(root.join("src/lib.rs")).expect("lib.rs is there");
    let declared: Vec<&str> =
        lib.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    let table: Vec<&str> = LAYERS.iter().map(|(name, _)| *name).collect();
    assert_eq!(declared, table);
}

#[test]
fn each_rule_finds_what_it_is_for() {
    let rules = |findings: Vec<Finding>| findings.into_iter().map(|f| f.rule).collect::<Vec<_>>();
    assert_eq!(
        rules(check_layers("units", "use crate::chat::Message;")),
        ["`units` may not use `chat`"]
    );
    assert_eq!(
        rules(check_layers("chat", "use crate::{\n    rest::{A, B},\n    units::Bytes,\n};")),
        ["`chat` may not use `rest`"]
    );
    assert_eq!(
        rules(check_layers("chat", "use scoutd_kernels::Format;")),
        ["`chat` may not use `kernels`"]
    );
    assert_eq!(rules(check_layers("nowhere", "")), ["module `nowhere` is not in the layer table"]);
    assert_eq!(check_supers(2, "super::super::mqtt::start()").len(), 1);
    assert!(check_supers(3, "super::super::message::Message").is_empty());
    assert!(check_layers("chat", "// crate::rest is a door\nuse crate::units::Bytes;").is_empty());
    assert_eq!(check_unsafe("src/chat.rs", "let x = unsafe { y };").len(), 1);
    assert_eq!(check_unsafe("src/chat.rs", "unsafe impl Send for X {}").len(), 1);
    assert!(check_unsafe("src/lib.rs", "#![deny(unsafe_code)]").is_empty());
    assert!(check_unsafe("kernels/src/arch/x86.rs", "unsafe { z }").is_empty());
    assert_eq!(
        rules(check_reserved("rest", "File::open(\"/proc/meminfo\")")),
        ["only `memory` reads /proc"]
    );
    assert!(check_reserved("memory", "File::open(\"/proc/meminfo\")").is_empty());
    assert_eq!(rules(check_leftovers("let a = 1; // TODO later")), ["leftover mark `TODO`"]);
}
