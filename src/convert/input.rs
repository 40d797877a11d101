//! The source's tensors as bytes: one face for a checkpoint and for a GGUF file.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use scoutd_kernels::Format;

use super::checkpoint::{Checkpoint, fingerprint};
use super::error::ConvertError;
use super::safetensors::Dtype;
use crate::gguf::{Gguf, Mapping};

/// Where tensors are read from, by many threads at once.
pub trait Input: Sync {
    /// How the values of a tensor are held.
    fn format(&self, tensor: &str) -> Result<Format, ConvertError>;

    /// Fills `out` from byte `from` of the tensor on.
    fn read(&self, tensor: &str, from: u64, out: &mut [u8]) -> Result<(), ConvertError>;

    /// The file that holds a tensor; for messages.
    fn file_of(&self, tensor: &str) -> &Path;

    /// Changes when the source changes.
    fn fingerprint(&self) -> Result<String, ConvertError>;
}

impl Input for Checkpoint {
    fn format(&self, tensor: &str) -> Result<Format, ConvertError> {
        match self.entry(tensor).map(|entry| entry.dtype) {
            Some(Dtype::F32) => Ok(Format::F32),
            Some(Dtype::F16) => Ok(Format::F16),
            Some(Dtype::BF16) => Ok(Format::Bf16),
            other => Err(ConvertError::Tensor {
                file: Input::file_of(self, tensor).to_path_buf(),
                tensor: tensor.to_owned(),
                reason: match other {
                    Some(dtype) => format!("has type {dtype:?}; F32, F16 and BF16 are read"),
                    None => "is not in the checkpoint".to_owned(),
                },
            }),
        }
    }

    fn read(&self, tensor: &str, from: u64, out: &mut [u8]) -> Result<(), ConvertError> {
        Checkpoint::read(self, tensor, from, out)
    }

    fn file_of(&self, tensor: &str) -> &Path {
        Checkpoint::file_of(self, tensor).unwrap_or(Path::new("checkpoint"))
    }

    fn fingerprint(&self) -> Result<String, ConvertError> {
        Checkpoint::fingerprint(self)
    }
}

/// A GGUF file to be requantized. Its header is read through the mapping; its tensors through the
/// file, because touched pages of a mapping would count as ours.
pub struct GgufInput<'a> {
    path: &'a Path,
    file: File,
    gguf: Gguf<'a>,
}

impl<'a> GgufInput<'a> {
    /// `mapping` is that of the file at `path`.
    pub fn new(path: &'a Path, mapping: &'a Mapping) -> Result<GgufInput<'a>, ConvertError> {
        let gguf = Gguf::parse(mapping.bytes()).map_err(|error| ConvertError::Config {
            path: path.to_path_buf(),
            reason: error.to_string(),
        })?;
        let file = File::open(path).map_err(ConvertError::io(path))?;
        Ok(GgufInput { path, file, gguf })
    }

    pub fn gguf(&self) -> &Gguf<'a> {
        &self.gguf
    }
}

impl Input for GgufInput<'_> {
    fn format(&self, tensor: &str) -> Result<Format, ConvertError> {
        match self.gguf.tensor(tensor) {
            Some(info) => Ok(info.format),
            None => Err(self.absent(tensor)),
        }
    }

    fn read(&self, tensor: &str, from: u64, out: &mut [u8]) -> Result<(), ConvertError> {
        let info = self.gguf.tensor(tensor).ok_or_else(|| self.absent(tensor))?;
        self.file.read_exact_at(out, info.offset + from).map_err(|error| ConvertError::Tensor {
            file: self.path.to_path_buf(),
            tensor: tensor.to_owned(),
            reason: format!("could not be read: {error}"),
        })
    }

    fn file_of(&self, _tensor: &str) -> &Path {
        self.path
    }

    fn fingerprint(&self) -> Result<String, ConvertError> {
        fingerprint(self.path, &self.file)
    }
}

impl GgufInput<'_> {
    fn absent(&self, tensor: &str) -> ConvertError {
        ConvertError::Tensor {
            file: self.path.to_path_buf(),
            tensor: tensor.to_owned(),
            reason: "is not in the file".to_owned(),
        }
    }
}
