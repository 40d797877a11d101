//! Token ids against the reference tokenizers.
//!
//! A folder of cases holds a tokenizer file (`NAME.json` or `NAME.model`) and `NAME.jsonl`, a line per
//! text with the ids that the reference gives. A small folder is in the tree; `tests/peers/tokenizers/run`
//! makes a large one from the real vocabularies and names it in `SCOUTD_TOKENIZER_CASES`.

use std::fs;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use scoutd::tokenizer::{Specials, Tokenizer, Vocabulary};
use scoutd::units::TokenId;
use serde::Deserialize;

#[test]
fn ids_are_the_references() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizers");
    assert!(check_folder(&golden) > 0, "no cases in the tree");
}

#[test]
fn ids_are_the_references_on_a_megabyte() {
    let Some(folder) = std::env::var_os("SCOUTD_TOKENIZER_CASES") else {
        println!("not run: SCOUTD_TOKENIZER_CASES is not set (tests/peers/tokenizers/run sets it)");
        return;
    };
    assert!(check_folder(Path::new(&folder)) > 0, "no cases in {folder:?}");
}

#[derive(Deserialize)]
struct Case {
    text: Option<String>,
    /// Bytes that need not be UTF-8; ill-formed ones become U+FFFD, as at every door.
    base64: Option<String>,
    parse: bool,
    ids: Vec<u32>,
}

impl Case {
    fn text(&self) -> String {
        match (&self.text, &self.base64) {
            (Some(text), None) => text.clone(),
            (None, Some(base64)) => {
                let bytes = STANDARD.decode(base64).expect("the case holds base64");
                String::from_utf8_lossy(&bytes).into_owned()
            }
            _ => panic!("a case has either `text` or `base64`"),
        }
    }
}

/// Checks every tokenizer of a folder; gives the number of cases.
fn check_folder(folder: &Path) -> usize {
    let mut count = 0;
    for entry in fs::read_dir(folder).expect("the folder can be read") {
        let path = entry.expect("the folder can be read").path();
        if path.extension().is_some_and(|extension| extension == "jsonl") {
            count += check_cases(&path);
        }
    }
    count
}

fn check_cases(path: &Path) -> usize {
    let tokenizer = read_tokenizer(path);
    let cases = fs::read_to_string(path).expect("the cases can be read");
    let (mut count, mut bytes, mut wrong) = (0, 0, 0);
    for line in cases.lines() {
        let case: Case = serde_json::from_str(line).expect("a case is JSON");
        let text = case.text();
        let specials = if case.parse { Specials::Parse } else { Specials::Text };
        let ids = tokenizer.encode(&text, specials).expect("the text is short enough");
        let expected: Vec<TokenId> = case.ids.iter().copied().map(TokenId).collect();
        if ids != expected {
            wrong += 1;
            report(&tokenizer, &text, &ids, &expected);
        }
        if !case.parse {
            assert_eq!(tokenizer.decode(&ids), text, "decoding does not give the text back");
        }
        (count, bytes) = (count + 1, bytes + text.len());
    }
    println!("{}: {count} cases, {bytes} bytes, {wrong} differ", path.display());
    assert_eq!(wrong, 0, "ids differ from the reference in {}", path.display());
    count
}

fn read_tokenizer(cases: &Path) -> Tokenizer {
    let vocabulary = if let Ok(json) = fs::read(cases.with_extension("json")) {
        Vocabulary::from_tokenizer_json(&json, None)
    } else {
        let model = fs::read(cases.with_extension("model")).expect("a tokenizer beside the cases");
        Vocabulary::from_tokenizer_model(&model)
    };
    Tokenizer::new(&vocabulary.expect("the file is supported")).expect("the vocabulary is sound")
}

fn report(tokenizer: &Tokenizer, text: &str, ids: &[TokenId], expected: &[TokenId]) {
    let at = ids.iter().zip(expected).take_while(|(a, b)| a == b).count();
    let show = |ids: &[TokenId]| -> Vec<String> {
        ids[at..]
            .iter()
            .take(6)
            .map(|id| format!("{}:{:?}", id.0, tokenizer.text_of(*id)))
            .collect()
    };
    let head: String = text.chars().take(60).collect();
    println!("{head:?}… token {at}: {:?}, reference {:?}", show(ids), show(expected));
}
