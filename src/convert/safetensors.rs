//! The header of a safetensors file: which tensor lies where.
//!
//! The crate `safetensors` parses and checks the header, but its reader wants the whole file in
//! memory or mapped. A checkpoint has 218 GB, and mapped pages count as ours, so only the header is
//! read here and tensors are read piece by piece from the file.

use std::collections::HashMap;

pub use safetensors::Dtype;
use safetensors::tensor::Metadata;

/// Where a tensor lies in its file. Shape outermost first, as in PyTorch.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    pub dtype: Dtype,
    pub shape: Vec<u64>,
    /// From the beginning of the file.
    pub offset: u64,
    pub bytes: u64,
}

/// Longest header that is read: the `safetensors` crate's own bound.
pub const HEADER_BYTES_MAX: u64 = 100_000_000;

/// Length of the JSON header, from the first eight bytes of a file of `file_bytes`.
pub fn header_len(first: [u8; 8], file_bytes: u64) -> Result<u64, String> {
    let len = u64::from_le_bytes(first);
    if len > HEADER_BYTES_MAX {
        return Err(format!("header of {len} bytes; is this a safetensors file?"));
    }
    if len + 8 > file_bytes {
        return Err(format!("truncated: header of {len} bytes in a file of {file_bytes}"));
    }
    Ok(len)
}

/// The tensors of a header. Fails if they do not fill a file of `file_bytes` exactly, so a
/// half-downloaded shard is found before anything is converted.
pub fn parse_header(json: &[u8], file_bytes: u64) -> Result<HashMap<String, Entry>, String> {
    let header: Metadata =
        serde_json::from_slice(json).map_err(|error| format!("bad header: {error}"))?;
    let start = json.len() as u64 + 8;
    let needed = start + header.data_len() as u64;
    if needed != file_bytes {
        return Err(format!("the header describes {needed} bytes, the file has {file_bytes}"));
    }
    let entries = header.tensors().into_iter().map(|(name, info)| {
        let (from, to) = info.data_offsets;
        let entry = Entry {
            dtype: info.dtype,
            shape: info.shape.iter().map(|&n| n as u64).collect(),
            offset: start + from as u64,
            bytes: (to - from) as u64,
        };
        (name, entry)
    });
    Ok(entries.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &[u8] = br#"{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},"a":{"dtype":"F32","shape":[1],"data_offsets":[12,16]}}"#;

    #[test]
    fn header_gives_absolute_places() {
        let file_bytes = HEADER.len() as u64 + 8 + 16;
        let entries = parse_header(HEADER, file_bytes).unwrap();
        assert_eq!(entries.len(), 2);
        let b = &entries["b"];
        assert_eq!((b.shape.as_slice(), b.bytes), ([2, 3].as_slice(), 12));
        assert_eq!(b.offset, HEADER.len() as u64 + 8);
        assert_eq!(entries["a"].offset, b.offset + 12);
    }

    #[test]
    fn wrong_headers_are_named() {
        let whole = HEADER.len() as u64 + 24;
        let check = |json: &[u8], bytes, part: &str| {
            let error = parse_header(json, bytes).unwrap_err();
            assert!(error.contains(part), "{error}");
        };
        check(HEADER, whole - 1, "the file has");
        check(b"{", 9, "bad header");
        check(br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, 66, "bad header");
        assert!(header_len(u64::MAX.to_le_bytes(), 100).unwrap_err().contains("safetensors"));
        assert!(header_len(93u64.to_le_bytes(), 100).unwrap_err().contains("truncated"));
        assert_eq!(header_len(92u64.to_le_bytes(), 100), Ok(92));
    }
}
