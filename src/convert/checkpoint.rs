//! A Hugging Face checkpoint on disk: its shards, and reading parts of their tensors.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::error::ConvertError;
use super::safetensors::{self, Entry};

/// The tensors of all shards, under the names of the checkpoint.
pub struct Checkpoint {
    shards: Vec<Shard>,
    tensors: HashMap<String, (usize, Entry)>,
}

struct Shard {
    path: PathBuf,
    file: File,
}

impl Checkpoint {
    /// Opens every shard of `dir` and checks that together they are what the index says, if there
    /// is one. Reads headers only.
    pub fn open(dir: &Path) -> Result<Checkpoint, ConvertError> {
        let index_path = dir.join(INDEX);
        let index = if index_path.exists() { Some(Index::read(&index_path)?) } else { None };
        let names = match &index {
            Some(index) => index.weight_map.values().cloned().collect::<BTreeSet<_>>(),
            None => shards_without_index(dir)?,
        };
        let mut checkpoint = Checkpoint { shards: Vec::new(), tensors: HashMap::new() };
        for name in names {
            if Path::new(&name).components().count() != 1 || name.starts_with('.') {
                return Err(ConvertError::Index {
                    path: index_path,
                    reason: format!("shard `{name}` is not a file of this folder"),
                });
            }
            checkpoint.add_shard(&dir.join(name), index.is_some())?;
        }
        if let Some(index) = index {
            index.check(&index_path, &checkpoint)?;
        }
        Ok(checkpoint)
    }

    fn add_shard(&mut self, path: &Path, from_index: bool) -> Result<(), ConvertError> {
        if from_index && !path.exists() {
            return Err(ConvertError::Missing {
                path: path.to_path_buf(),
                reason: format!("{INDEX} names it"),
            });
        }
        let file = File::open(path).map_err(ConvertError::io(path))?;
        let bytes = file.metadata().map_err(ConvertError::io(path))?.len();
        let wrong = |reason| ConvertError::Shard { path: path.to_path_buf(), reason };
        if bytes < 8 {
            return Err(wrong(format!("{bytes} bytes are no safetensors file")));
        }
        let mut first = [0; 8];
        file.read_exact_at(&mut first, 0).map_err(ConvertError::io(path))?;
        let header_len = safetensors::header_len(first, bytes).map_err(wrong)?;
        let mut header = vec![0; header_len as usize];
        file.read_exact_at(&mut header, 8).map_err(ConvertError::io(path))?;
        let shard = self.shards.len();
        for (name, entry) in safetensors::parse_header(&header, bytes).map_err(wrong)? {
            if let Some((other, _)) = self.tensors.get(&name) {
                return Err(ConvertError::Tensor {
                    file: path.to_path_buf(),
                    reason: format!("is also in {}", self.shards[*other].path.display()),
                    tensor: name,
                });
            }
            self.tensors.insert(name, (shard, entry));
        }
        self.shards.push(Shard { path: path.to_path_buf(), file });
        Ok(())
    }

    /// All tensor names, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.tensors.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    pub fn entry(&self, name: &str) -> Option<&Entry> {
        self.tensors.get(name).map(|(_, entry)| entry)
    }

    /// The file that holds a tensor; for messages.
    pub fn file_of(&self, name: &str) -> Option<&Path> {
        self.tensors.get(name).map(|(shard, _)| self.shards[*shard].path.as_path())
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.tensors.values().map(|(_, entry)| entry.bytes).sum()
    }

    /// Fills `out` from byte `from` of the tensor on.
    pub fn read(&self, name: &str, from: u64, out: &mut [u8]) -> Result<(), ConvertError> {
        let (shard, entry) = self.tensors.get(name).ok_or_else(|| ConvertError::Tensor {
            file: PathBuf::new(),
            tensor: name.to_owned(),
            reason: "is not in the checkpoint".to_owned(),
        })?;
        let shard = &self.shards[*shard];
        shard.file.read_exact_at(out, entry.offset + from).map_err(|error| ConvertError::Tensor {
            file: shard.path.clone(),
            tensor: name.to_owned(),
            reason: format!("could not be read: {error}"),
        })
    }

    /// What tells this checkpoint from a changed one: name, length and time of each shard.
    pub fn fingerprint(&self) -> Result<String, ConvertError> {
        let mut text = String::new();
        for shard in &self.shards {
            text += &fingerprint(&shard.path, &shard.file)?;
        }
        Ok(text)
    }
}

/// Name, length and time of change of one source file.
pub(super) fn fingerprint(path: &Path, file: &File) -> Result<String, ConvertError> {
    let info = file.metadata().map_err(ConvertError::io(path))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(format!("{name} {} {}.{:09}\n", info.len(), info.mtime(), info.mtime_nsec()))
}

const INDEX: &str = "model.safetensors.index.json";

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Index {
    fn read(path: &Path) -> Result<Index, ConvertError> {
        let text = std::fs::read(path).map_err(ConvertError::io(path))?;
        serde_json::from_slice(&text).map_err(|error| ConvertError::Index {
            path: path.to_path_buf(),
            reason: error.to_string(),
        })
    }

    /// Both ways: what the index names must be where it says, and nothing else may be there.
    fn check(&self, path: &Path, checkpoint: &Checkpoint) -> Result<(), ConvertError> {
        let lies = |reason| ConvertError::Index { path: path.to_path_buf(), reason };
        for (name, file) in &self.weight_map {
            match checkpoint.file_of(name) {
                None => return Err(lies(format!("tensor `{name}` is not in {file}"))),
                Some(found) if found.file_name().is_none_or(|found| found != file.as_str()) => {
                    let found = found.display();
                    return Err(lies(format!("tensor `{name}` is in {found}, not in {file}")));
                }
                Some(_) => {}
            }
        }
        for name in checkpoint.names() {
            if !self.weight_map.contains_key(name) {
                let file = checkpoint.file_of(name).unwrap_or(Path::new("?")).display();
                return Err(lies(format!("it does not know tensor `{name}` of {file}")));
            }
        }
        Ok(())
    }
}

/// `model.safetensors`, or all `*.safetensors`. Numbered shards (`…-00002-of-00050.safetensors`)
/// must be complete.
fn shards_without_index(dir: &Path) -> Result<BTreeSet<String>, ConvertError> {
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(dir).map_err(ConvertError::io(dir))? {
        let name = entry.map_err(ConvertError::io(dir))?.file_name();
        let name = name.to_string_lossy();
        if name.ends_with(".safetensors") && !name.starts_with('.') {
            names.insert(name.into_owned());
        }
    }
    if names.contains("model.safetensors") {
        return Ok(BTreeSet::from(["model.safetensors".to_owned()]));
    }
    if names.is_empty() {
        return Err(ConvertError::Missing {
            path: dir.join("model.safetensors"),
            reason: "and there are no other *.safetensors (other formats are not read)".to_owned(),
        });
    }
    for name in &names {
        let Some((stem, of)) = numbered(name) else { continue };
        for number in 1..=of {
            let wanted = format!("{stem}-{number:05}-of-{of:05}.safetensors");
            if !names.contains(&wanted) {
                let reason = format!("{name} says there are {of}");
                return Err(ConvertError::Missing { path: dir.join(wanted), reason });
            }
        }
    }
    Ok(names)
}

/// `model-00001-of-00050.safetensors` → ("model", 50)
fn numbered(name: &str) -> Option<(&str, u32)> {
    let (rest, of) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    number.parse::<u32>().ok()?;
    let of = of.parse().ok()?;
    (of <= 99_999).then_some((stem, of))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A shard with one F32 value per tensor.
    fn shard(names: &[&str]) -> Vec<u8> {
        let entries: Vec<String> = names
            .iter()
            .enumerate()
            .map(|(i, name)| {
                let (from, to) = (4 * i, 4 * i + 4);
                format!(r#""{name}":{{"dtype":"F32","shape":[1],"data_offsets":[{from},{to}]}}"#)
            })
            .collect();
        let header = format!("{{{}}}", entries.join(","));
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        for i in 0..names.len() {
            file.extend((i as f32).to_le_bytes());
        }
        file
    }

    fn folder(files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            fs::write(dir.path().join(name), bytes).unwrap();
        }
        dir
    }

    fn refused(files: &[(&str, Vec<u8>)], part: &str) {
        let dir = folder(files);
        let error = Checkpoint::open(dir.path()).err().expect("must be refused").to_string();
        assert!(error.contains(part), "{error}");
    }

    #[test]
    fn sharded_checkpoint_reads() {
        let index = br#"{"metadata":{"total_size":1},"weight_map":{"a":"x.safetensors","b":"x.safetensors","c":"y.safetensors"}}"#;
        let dir = folder(&[
            (INDEX, index.to_vec()),
            ("x.safetensors", shard(&["a", "b"])),
            ("y.safetensors", shard(&["c"])),
        ]);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.names(), ["a", "b", "c"]);
        assert_eq!(checkpoint.bytes(), 12);
        let mut value = [0; 4];
        checkpoint.read("b", 0, &mut value).unwrap();
        assert_eq!(f32::from_le_bytes(value), 1.0);
        assert!(checkpoint.file_of("c").unwrap().ends_with("y.safetensors"));
    }

    #[test]
    fn bad_folders_are_refused_by_name() {
        let index = |map: &str| (INDEX, format!(r#"{{"weight_map":{{{map}}}}}"#).into_bytes());
        refused(&[], "model.safetensors is missing");
        refused(&[index(r#""a":"x.safetensors""#)], "x.safetensors is missing");
        let x = ("x.safetensors", shard(&["a"]));
        refused(
            &[index(r#""a":"x.safetensors","b":"x.safetensors""#), x.clone()],
            "tensor `b` is not in x.safetensors",
        );
        let y = ("y.safetensors", shard(&["b"]));
        refused(
            &[index(r#""a":"y.safetensors","b":"x.safetensors""#), x.clone(), y.clone()],
            "not in y.safetensors",
        );
        let two = ("x.safetensors", shard(&["a", "z"]));
        refused(&[index(r#""a":"x.safetensors""#), two], "does not know tensor `z`");
        refused(&[index(r#""a":"../x.safetensors""#)], "is not a file of this folder");
        refused(&[x.clone(), ("z.safetensors", shard(&["a"]))], "is also in");
        let one = ("model-00001-of-00002.safetensors", shard(&["a"]));
        refused(&[one], "model-00002-of-00002.safetensors is missing");
        let mut short = shard(&["a"]);
        short.pop();
        refused(&[("model.safetensors", short)], "the file has");
        refused(&[("model.safetensors", b"abc".to_vec())], "no safetensors file");
    }
}
