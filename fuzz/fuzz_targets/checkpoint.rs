//! Any bytes as a checkpoint's `config.json` and, behind a zero byte, as the header of a shard: errors or a plan whose
//! tensors come from the shard, never a panic.

#![no_main]

use libfuzzer_sys::fuzz_target;
use scoutd::convert::config::ModelConfig;
use scoutd::convert::mapping::lay_out;
use scoutd::convert::safetensors::{header_len, parse_header};

fuzz_target!(|bytes: &[u8]| {
    let at = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    let (config, header) = (&bytes[..at], bytes.get(at + 1..).unwrap_or(&[]));
    let config = ModelConfig::parse(config);
    if let Ok(config) = &config {
        let factors = config.rope_factors();
        assert!(factors.is_none_or(|factors| factors.len() as u64 == config.head_len / 2));
    }
    if let Some(first) = header.first_chunk::<8>() {
        let bytes = header.len() as u64;
        assert!(header_len(*first, bytes).is_err() || u64::from_le_bytes(*first) + 8 <= bytes);
    }
    // The data behind the header is as long as it says, up to a terabyte.
    let data: u64 = header.iter().map(|&byte| u64::from(byte)).sum();
    for file_bytes in [header.len() as u64 + 8, header.len() as u64 + 8 + data, 1 << 40] {
        let Ok(entries) = parse_header(header, file_bytes) else { continue };
        assert!(entries.values().all(|entry| entry.offset + entry.bytes <= file_bytes));
        let shapes: Vec<(&str, &[u64])> =
            entries.iter().map(|(name, entry)| (name.as_str(), entry.shape.as_slice())).collect();
        if let Ok(config) = &config {
            drop(lay_out(config, &shapes));
        }
    }
});
