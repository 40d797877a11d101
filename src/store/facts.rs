//! What a model file says about itself, read once and kept in the index.

use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::gguf::{Gguf, Mapping};
use crate::model::{self, KvType};

/// A model's own account. Absent is what the file does not say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Facts {
    /// `llama`, `llama4`, …
    pub architecture: Option<String>,
    /// The prevailing format of the weights, as `Q4_0`.
    pub quantization: Option<String>,
    /// Weights, all experts counted.
    pub parameters: Option<u64>,
    /// Longest context it was trained for.
    pub context_tokens: Option<u32>,
    /// SHA-256 of the header (metadata and tensor table), 64 hexadecimal digits.
    pub digest: Option<String>,
    /// Why it cannot be run here, if so.
    pub problem: Option<String>,
}

impl Facts {
    /// Of a file on this disk; only its header is read.
    pub(super) fn of_file(path: &Path) -> Facts {
        let problem = |error: String| Facts { problem: Some(error), ..Facts::default() };
        match Mapping::open(path) {
            Ok(mapping) => match Gguf::parse(mapping.bytes()) {
                Ok(gguf) => Facts {
                    digest: Some(header_digest(&gguf, mapping.bytes())),
                    ..Facts::of_header(&gguf)
                },
                Err(error) => problem(error.to_string()),
            },
            Err(error) => problem(error.to_string()),
        }
    }

    /// Of a header.
    pub(super) fn of_header(gguf: &Gguf) -> Facts {
        let metadata = gguf.metadata();
        let architecture = metadata.str("general.architecture").ok();
        let context = architecture
            .and_then(|architecture| metadata.u32(&format!("{architecture}.context_length")).ok());
        let facts = Facts {
            architecture: architecture.map(str::to_owned),
            context_tokens: context,
            ..Facts::default()
        };
        match model::inspect(gguf, KvType::F16) {
            Ok(spec) => Facts {
                quantization: Some(spec.quantization),
                parameters: Some(spec.parameters),
                ..facts
            },
            Err(error) => Facts { problem: Some(error.to_string()), ..facts },
        }
    }
}

/// SHA-256 over what stands before the tensors' data, in hexadecimal: it names a model without reading gigabytes.
pub fn header_digest(gguf: &Gguf, bytes: &[u8]) -> String {
    let first = gguf.tensors().iter().map(|tensor| tensor.offset as usize).min();
    let header = first.unwrap_or(bytes.len()).min(bytes.len());
    Sha256::digest(&bytes[..header]).iter().map(|byte| format!("{byte:02x}")).collect()
}
