//! Why a file is no GGUF file, or not one that can be used.

use std::io;
use std::path::PathBuf;

use super::metadata::ValueType;

/// A file that cannot be read as GGUF, or a key that is not what its reader needs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GgufError {
    #[error("alignment of {0} is no power of two up to 1 MiB")]
    Alignment(u64),
    #[error("array `{key}` holds arrays; nested arrays are not supported")]
    ArrayNested { key: String },
    #[error("big-endian GGUF file; only little-endian files are supported")]
    BigEndian,
    #[error("`{key}` is a bool with the value {value}")]
    Bool { key: String, value: u8 },
    #[error("tensor `{tensor}` has {count} dimensions; 1 to 4 are possible")]
    DimensionCount { tensor: String, count: u32 },
    #[error("tensor `{tensor}` has a dimension of zero")]
    DimensionZero { tensor: String },
    #[error("the file is empty")]
    Empty,
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("key `{0}` appears twice")]
    KeyDuplicate(String),
    #[error("key number {index} has a name of {bytes} bytes; 1 to 65535 are possible")]
    KeyName { index: u64, bytes: u64 },
    #[error("key `{0}` is missing")]
    KeyMissing(String),
    #[error("key `{key}` must be {wanted}, and is {found}")]
    KeyType { key: String, wanted: &'static str, found: ValueType },
    #[error("key `{key}` must be {wanted}, and is {value}")]
    KeyValue { key: String, wanted: &'static str, value: String },
    #[error("not a GGUF file: it begins with {0:02x?}")]
    Magic([u8; 4]),
    #[error("{path} is not a regular file but {kind}")]
    NotAFile { path: PathBuf, kind: &'static str },
    #[error(
        "tensor `{tensor}` begins at {offset}, which is no multiple of the alignment of {alignment}"
    )]
    Offset { tensor: String, offset: u64, alignment: u64 },
    #[error("tensors `{first}` and `{second}` overlap")]
    Overlap { first: String, second: String },
    #[error("tensor `{tensor}` has rows of {columns} values; {format} needs a multiple of {block}")]
    RowLength { tensor: String, columns: u64, format: &'static str, block: u64 },
    #[error("{path} changed while it was in use")]
    Replaced { path: PathBuf },
    #[error("tensor `{tensor}` has dimensions whose product is too large")]
    TensorSize { tensor: String },
    #[error("tensor `{0}` appears twice")]
    TensorDuplicate(String),
    #[error("tensor number {index} has a name of {bytes} bytes; 1 to 64 are possible")]
    TensorName { index: u64, bytes: u64 },
    #[error("tensor `{tensor}` has the type {ggml_type}{}", type_name(*ggml_type))]
    TensorType { tensor: String, ggml_type: u32 },
    #[error("tensor `{tensor}` ends at byte {end}, the file at {file}")]
    TensorPastEnd { tensor: String, end: u128, file: u64 },
    #[error("the header claims {count} {what}; the file has room for {room}")]
    TooMany { what: &'static str, count: u64, room: u64 },
    #[error("the file ends within {what}")]
    Truncated { what: String },
    #[error("{what} is not valid UTF-8")]
    Utf8 { what: String },
    #[error("key `{key}` has the value type {value_type}; 0 to 12 are known")]
    ValueType { key: String, value_type: u32 },
    #[error("GGUF version {0}; versions 2 and 3 are supported")]
    Version(u32),
    #[error("writing tensors: {0}")]
    Write(String),
}

/// Names the formats that others write and we do not read, so that the message says what to do.
fn type_name(ggml_type: u32) -> &'static str {
    match ggml_type {
        6 => " (Q5_0), which is not supported; quantize to Q4_0, Q4_K, Q5_K, Q6_K or Q8_0",
        7 => " (Q5_1), which is not supported; quantize to Q4_0, Q4_K, Q5_K, Q6_K or Q8_0",
        10 => " (Q2_K), which is not supported; quantize to Q4_0, Q4_K, Q5_K, Q6_K or Q8_0",
        11 => " (Q3_K), which is not supported; quantize to Q4_0, Q4_K, Q5_K, Q6_K or Q8_0",
        16..=23 | 29 => {
            " (an IQ format), which is not supported; quantize to Q4_0, Q4_K, Q5_K, Q6_K or Q8_0"
        }
        39 => " (MXFP4), which is not supported; quantize to Q4_0, Q4_K, Q5_K, Q6_K or Q8_0",
        _ => ", which is not supported",
    }
}
