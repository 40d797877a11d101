//! Which files of a repository are pulled. Pure: file names in, a choice with its reason out.

use super::StoreError;

/// A file of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteFile {
    /// Its path in the repository.
    pub path: String,
    /// Its size, if the hub says it.
    pub bytes: Option<u64>,
    /// Its SHA-256 in lower-case hexadecimal, if the hub says it: of large files it does.
    pub sha256: Option<String>,
}

/// What was chosen, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Choice {
    /// The files, in the order of their parts.
    pub(super) files: Vec<RemoteFile>,
    /// The quantization that the name says, as `Q4_0`.
    pub(super) quantization: Option<String>,
    /// One phrase.
    pub(super) reason: String,
    /// What the model is to be called.
    pub(super) stem: String,
}

/// A model in one file or in numbered parts.
struct Group<'a> {
    /// The path without `.gguf` and without the numbers of parts.
    stem: &'a str,
    quantization: Option<&'static str>,
    files: Vec<&'a RemoteFile>,
    parts: u32,
}

/// Chooses the GGUF file: the one that `part` names, else the first quantization in our order.
///
/// # Errors
/// If there is none, or more than one could be meant.
pub(super) fn choose_gguf(files: &[RemoteFile], part: Option<&str>) -> Result<Choice, StoreError> {
    let groups = groups(files);
    if groups.is_empty() {
        let hint = match files.iter().any(|file| file.path.ends_with(".safetensors")) {
            true => "; it has safetensors: pull them with --safetensors and convert",
            false => "",
        };
        return Err(StoreError::NotFound(format!("the repository has no GGUF file{hint}")));
    }
    let (group, reason) = match part {
        Some(part) => (named(&groups, part)?, "asked for".to_owned()),
        None => preferred(&groups)?,
    };
    if group.files.len() != group.parts as usize {
        let (there, parts) = (group.files.len(), group.parts);
        return Err(StoreError::Hub(format!("{}: {there} of {parts} parts are there", group.stem)));
    }
    Ok(Choice {
        files: group.files.iter().map(|file| (*file).clone()).collect(),
        quantization: group.quantization.map(str::to_owned),
        reason,
        stem: last(group.stem).to_owned(),
    })
}

/// Chooses what `convert` reads: configuration, tokenizer, index and shards of the top folder.
///
/// # Errors
/// If there is no configuration or no shard.
pub(super) fn choose_safetensors(files: &[RemoteFile]) -> Result<Vec<RemoteFile>, StoreError> {
    let has_index = files.iter().any(|file| file.path == "model.safetensors.index.json");
    let wanted = |path: &str| {
        let shard = path.ends_with(".safetensors") && !path.starts_with("consolidated");
        // Beside shards, one merged file would be the same weights again.
        let shard = shard && !(has_index && path == "model.safetensors");
        !path.contains('/') && (shard || CHECKPOINT_FILES.contains(&path))
    };
    let chosen: Vec<RemoteFile> = files.iter().filter(|file| wanted(&file.path)).cloned().collect();
    let has = |end: &str| chosen.iter().any(|file| file.path.ends_with(end));
    if !has(".safetensors") || !has("config.json") {
        let message = "the repository has no config.json with safetensors at its top";
        return Err(StoreError::NotFound(message.to_owned()));
    }
    Ok(chosen)
}

fn groups(files: &[RemoteFile]) -> Vec<Group<'_>> {
    let mut groups: Vec<Group> = Vec::new();
    for file in files {
        let Some(stem) = file.path.strip_suffix(".gguf") else { continue };
        // Projectors of images and importance matrices are no language models.
        let name = last(stem).to_ascii_lowercase();
        if name.starts_with("mmproj") || name.contains("imatrix") {
            continue;
        }
        let (stem, parts) = match split(stem) {
            Some((stem, _, parts)) => (stem, parts),
            None => (stem, 1),
        };
        match groups.iter_mut().find(|group| group.stem == stem && group.parts == parts) {
            Some(group) => group.files.push(file),
            None => groups.push(Group {
                stem,
                quantization: quantization(stem),
                files: vec![file],
                parts,
            }),
        }
    }
    for group in &mut groups {
        group.files.sort_by(|a, b| a.path.cmp(&b.path));
    }
    groups
}

/// `x-00001-of-00003` is part 1 of 3 of `x`.
pub(super) fn split(stem: &str) -> Option<(&str, u32, u32)> {
    let (rest, parts) = stem.rsplit_once("-of-")?;
    let (stem, part) = rest.rsplit_once('-')?;
    let number = |text: &str| {
        let digits = text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| text.parse::<u32>().ok()).flatten()
    };
    let (part, parts) = (number(part)?, number(parts)?);
    (1..=parts).contains(&part).then_some((stem, part, parts))
}

/// The quantization that stands in a file's path: `Q4_K_M` in `model.Q4_K_M` and in `Q4_K_M/model`.
fn quantization(stem: &str) -> Option<&'static str> {
    let upper = stem.to_ascii_uppercase();
    let standalone = |label: &str| {
        upper.match_indices(label).any(|(at, _)| {
            let joins = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
            let after = upper[at + label.len()..].chars().next();
            let before = upper[..at].chars().next_back();
            // `x_Q4_0` is a usual spelling; a label that continues is another label.
            !joins(after) && !before.is_some_and(|c| c.is_ascii_alphanumeric())
        })
    };
    ORDER.iter().chain(OTHERS).copied().find(|label| standalone(label))
}

fn named<'a, 'b>(groups: &'b [Group<'a>], part: &str) -> Result<&'b Group<'a>, StoreError> {
    let stem = part.strip_suffix(".gguf").unwrap_or(part);
    let stem = split(stem).map_or(stem, |(stem, _, _)| stem);
    let by = |matches: &dyn Fn(&Group) -> bool| -> Vec<&'b Group<'a>> {
        groups.iter().filter(|group| matches(group)).collect()
    };
    let found = [
        by(&|group| group.stem == stem),
        by(&|group| last(group.stem).eq_ignore_ascii_case(stem)),
        by(&|group| group.quantization.is_some_and(|label| label.eq_ignore_ascii_case(part))),
    ];
    match found.iter().find(|found| !found.is_empty()).map(Vec::as_slice) {
        Some([group]) => Ok(group),
        Some(several) => Err(ambiguous(format!("several files are {part}"), several)),
        None => {
            let choices = groups.iter().map(shown).collect::<Vec<_>>().join("\n  ");
            Err(StoreError::NotFound(format!("no file is {part}; there are\n  {choices}")))
        }
    }
}

fn preferred<'a, 'b>(groups: &'b [Group<'a>]) -> Result<(&'b Group<'a>, String), StoreError> {
    if let [only] = groups {
        return Ok((only, "the only GGUF file".to_owned()));
    }
    for (rank, label) in ORDER.iter().enumerate() {
        let found: Vec<&Group> =
            groups.iter().filter(|group| group.quantization == Some(label)).collect();
        match found[..] {
            [] => {}
            [group] if rank == 0 => {
                return Ok((group, "4 bits, and the fastest on this kind of processor".to_owned()));
            }
            [group] => {
                let before = ORDER[..rank].join(", ");
                return Ok((group, format!("the first of our order; there is no {before}")));
            }
            _ => return Err(ambiguous(format!("several files are {label}"), &found)),
        }
    }
    let all: Vec<&Group> = groups.iter().collect();
    Err(ambiguous("no file has a quantization that runs here".to_owned(), &all))
}

fn ambiguous(what: String, groups: &[&Group]) -> StoreError {
    StoreError::Ambiguous { what, choices: groups.iter().map(|group| shown(group)).collect() }
}

fn shown(group: &Group) -> String {
    let bytes: Option<u64> = group.files.iter().map(|file| file.bytes).sum();
    let size = bytes.map_or_else(String::new, |bytes| format!(", {}", crate::units::Bytes(bytes)));
    let parts = if group.parts > 1 { format!(" in {} parts", group.parts) } else { String::new() };
    match group.quantization {
        Some(label) => format!("{} ({label}{size}{parts})", group.stem),
        None => format!("{}.gguf ({}{parts})", group.stem, size.trim_start_matches(", ")),
    }
}

fn last(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// What runs here, in the order in which it is taken if nobody says.
const ORDER: &[&str] = &[
    "Q4_0", "Q4_K_M", "Q4_K_S", "Q4_K_L", "Q4_1", "Q5_K_M", "Q5_K_S", "Q6_K", "Q8_0", "BF16",
    "F16", "F32",
];

/// What is recognized and does not run here, or not for certain; taken only if asked for.
const OTHERS: &[&str] = &[
    "Q4_0_4_4", "Q4_0_4_8", "Q4_0_8_8", "Q4_K_XL", "Q5_K_XL", "Q6_K_XL", "Q8_K_XL", "Q6_K_L",
    "Q5_K_L", "Q3_K_XL", "Q2_K_XL", "Q5_0", "Q5_1", "Q2_K", "Q2_K_S", "Q2_K_L", "Q3_K_S", "Q3_K_M",
    "Q3_K_L", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS",
    "IQ3_S", "IQ3_M", "IQ4_XS", "IQ4_NL", "TQ1_0", "TQ2_0", "MXFP4",
];

const CHECKPOINT_FILES: &[&str] = &[
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn files(paths: &[&str]) -> Vec<RemoteFile> {
        let file = |path: &&str| RemoteFile {
            path: (*path).to_owned(),
            bytes: Some(1 << 20),
            sha256: None,
        };
        paths.iter().map(file).collect()
    }

    fn chosen(paths: &[&str], part: Option<&str>) -> Result<Vec<String>, String> {
        let choice = choose_gguf(&files(paths), part).map_err(|error| error.to_string())?;
        Ok(choice.files.into_iter().map(|file| file.path).collect())
    }

    #[test]
    fn labels_in_paths() {
        let cases = [
            ("Llama-3.2-1B-Instruct-Q4_0", Some("Q4_0")),
            ("llama-3.2-1b-instruct-q4_k_m", Some("Q4_K_M")),
            ("model.Q8_0", Some("Q8_0")),
            ("Q6_K/model", Some("Q6_K")),
            ("model-IQ4_XS", Some("IQ4_XS")),
            ("model-Q4_0_4_4", Some("Q4_0_4_4")),
            ("model_bf16", Some("BF16")),
            ("model-f16", Some("F16")),
            ("model-UD-Q4_K_XL", Some("Q4_K_XL")),
            ("model", None),
            ("FQ4_0", None),
        ];
        for (stem, label) in cases {
            assert_eq!(quantization(stem), label, "{stem}");
        }
    }

    #[test]
    fn our_order_decides_if_nobody_says() {
        let all = ["m-F16.gguf", "m-Q4_K_M.gguf", "m-Q4_0.gguf", "m-IQ4_XS.gguf", "README.md"];
        assert_eq!(chosen(&all, None).unwrap(), ["m-Q4_0.gguf"]);
        assert_eq!(chosen(&all[..2], None).unwrap(), ["m-Q4_K_M.gguf"]);
        assert_eq!(
            chosen(&["m-IQ4_XS.gguf", "mmproj-m-F16.gguf"], None).unwrap(),
            ["m-IQ4_XS.gguf"]
        );
        assert!(
            chosen(&["m-IQ4_XS.gguf", "m-Q3_K_S.gguf"], None).unwrap_err().contains("m-Q3_K_S")
        );
        assert!(chosen(&["a-Q4_0.gguf", "b-Q4_0.gguf"], None).unwrap_err().contains("b-Q4_0"));
        assert!(chosen(&["model.safetensors"], None).unwrap_err().contains("--safetensors"));
    }

    #[test]
    fn what_is_asked_for_is_taken() {
        let all = ["m-F16.gguf", "x/m-Q4_K_M.gguf", "m-Q4_0.gguf", "m-IQ4_XS.gguf"];
        for (part, path) in [
            ("f16", "m-F16.gguf"),
            ("Q4_K_M", "x/m-Q4_K_M.gguf"),
            ("x/m-Q4_K_M.gguf", "x/m-Q4_K_M.gguf"),
            ("m-q4_k_m.gguf", "x/m-Q4_K_M.gguf"),
            ("iq4_xs", "m-IQ4_XS.gguf"),
        ] {
            assert_eq!(chosen(&all, Some(part)).unwrap(), [path], "{part}");
        }
        assert!(chosen(&all, Some("Q8_0")).unwrap_err().contains("m-F16"));
    }

    #[test]
    fn models_in_parts() {
        let parts = ["Q4_0/m-Q4_0-00002-of-00002.gguf", "Q4_0/m-Q4_0-00001-of-00002.gguf"];
        assert_eq!(chosen(&parts, None).unwrap(), [parts[1], parts[0]]);
        assert_eq!(chosen(&parts, Some("m-Q4_0")).unwrap(), [parts[1], parts[0]]);
        let one = choose_gguf(&files(&parts), None).unwrap();
        assert_eq!((one.stem.as_str(), one.quantization.as_deref()), ("m-Q4_0", Some("Q4_0")));
        assert!(chosen(&parts[..1], None).unwrap_err().contains("1 of 2 parts"));
        assert_eq!(split("m-00001-of-00000"), None);
        assert_eq!(split("m-1-of-2"), None);
    }

    #[test]
    fn checkpoints() {
        let all = files(&[
            "README.md",
            "config.json",
            "tokenizer.json",
            "model-00001-of-00001.safetensors",
            "model.safetensors.index.json",
            "model.safetensors",
            "original/consolidated.safetensors",
        ]);
        let chosen: Vec<String> =
            choose_safetensors(&all).unwrap().into_iter().map(|file| file.path).collect();
        assert_eq!(chosen.len(), 4, "{chosen:?}");
        assert!(choose_safetensors(&all[..3]).is_err());
    }
}
