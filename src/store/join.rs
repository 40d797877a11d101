//! A model in numbered parts to one file: what runs here is mapped in one piece.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use super::error::StoreError;
use crate::gguf::{ALIGNMENT_OURS, Gguf, GgufError, GgufHeader, Mapping};

/// Writes the tensors of all `parts` with the keys of the first to `target`, through a temporary name.
///
/// # Errors
/// If a part is no GGUF file or belongs to another model, or the disk refuses.
pub(super) fn join(parts: &[PathBuf], target: &Path) -> Result<(), StoreError> {
    let wrong = |path: &Path, error: &dyn std::fmt::Display| {
        StoreError::Hub(format!("{}: {error}", path.display()))
    };
    let mut mapped = Vec::with_capacity(parts.len());
    for path in parts {
        mapped.push(Mapping::open(path).map_err(|error| wrong(path, &error))?);
    }
    let mut files = Vec::with_capacity(parts.len());
    for (path, mapping) in parts.iter().zip(&mapped) {
        files.push(Gguf::parse(mapping.bytes()).map_err(|error| wrong(path, &error))?);
    }
    let counted: u64 = files.iter().map(|file| file.tensors().len() as u64).sum();
    let announced = files[0].metadata().u64_opt("split.tensors.count").ok().flatten();
    let announced = announced.or_else(|| {
        // Written as a signed number by the usual tool.
        match files[0].metadata().get("split.tensors.count") {
            Some(crate::gguf::Value::I32(count)) => u64::try_from(*count).ok(),
            _ => None,
        }
    });
    if let Some(announced) = announced.filter(|&announced| announced != counted) {
        let message = format!("{counted} tensors in all parts, {announced} are announced");
        return Err(wrong(&parts[0], &message));
    }
    let new = super::download::with_ending(target, ".joining");
    let written = write(&files, &new);
    if let Err(error) = written {
        let _ = fs::remove_file(&new);
        return Err(error);
    }
    fs::rename(&new, target).map_err(StoreError::io(target))?;
    super::index::sync_folder(target)
}

fn write(files: &[Gguf], path: &Path) -> Result<(), StoreError> {
    let failed = |error: GgufError| match error {
        GgufError::Io { source, .. } => StoreError::io(path)(source),
        error => StoreError::Io { path: path.to_owned(), source: std::io::Error::other(error) },
    };
    let mut header = GgufHeader::new(ALIGNMENT_OURS);
    for (key, value) in files[0].metadata().iter() {
        if !key.starts_with("split.") {
            header.value(key, value);
        }
    }
    for tensor in files.iter().flat_map(|file| file.tensors()) {
        header.tensor(&tensor.name, tensor.format, &tensor.shape);
    }
    let out = File::create(path).map_err(StoreError::io(path))?;
    let mut writer = header.start(BufWriter::with_capacity(1 << 20, out)).map_err(failed)?;
    for file in files {
        for tensor in file.tensors() {
            writer.tensor(&tensor.name, file.data(tensor)).map_err(failed)?;
        }
    }
    let out = writer.finish().map_err(failed)?;
    let out = out.into_inner().map_err(|error| StoreError::io(path)(error.into_error()))?;
    out.sync_all().map_err(StoreError::io(path))
}

#[cfg(test)]
mod tests {
    use scoutd_kernels::Format;

    use super::*;

    fn part(dir: &Path, number: u32, tensors: &[&str]) -> PathBuf {
        let mut header = GgufHeader::new(32);
        if number == 1 {
            header.str("general.architecture", "llama").u32("split.tensors.count", 3);
        }
        header.u32("split.no", number - 1);
        for name in tensors {
            header.tensor(name, Format::F32, &[2]);
        }
        let path = dir.join(format!("m-0000{number}-of-00002.gguf"));
        let mut writer = header.start(File::create(&path).unwrap()).unwrap();
        for name in tensors {
            writer.tensor(name, &[number as u8; 8]).unwrap();
        }
        writer.finish().unwrap();
        path
    }

    #[test]
    fn two_parts_become_one_file() {
        let dir = tempfile::tempdir().unwrap();
        let parts = [part(dir.path(), 1, &["a", "b"]), part(dir.path(), 2, &["c"])];
        let target = dir.path().join("m.gguf");
        join(&parts, &target).unwrap();
        let bytes = fs::read(&target).unwrap();
        let gguf = Gguf::parse(&bytes).unwrap();
        let tensors: Vec<(&str, u8)> =
            gguf.tensors().iter().map(|t| (t.name.as_str(), gguf.data(t)[0])).collect();
        assert_eq!(tensors, [("a", 1), ("b", 1), ("c", 2)]);
        assert_eq!(gguf.metadata().str("general.architecture").unwrap(), "llama");
        assert!(gguf.metadata().get("split.no").is_none());

        let error = join(&parts[..1], &target).unwrap_err().to_string();
        assert!(error.contains("3 are announced"), "{error}");
    }
}
