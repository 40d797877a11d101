//! Any bytes as a GGUF file: an error or a file whose every key and tensor can be read, never a panic; and
//! what reads as a model's header stays one through the model's own checks.

#![no_main]

use libfuzzer_sys::fuzz_target;
use scoutd::gguf::Gguf;
use scoutd::model::{KvType, inspect};

fuzz_target!(|bytes: &[u8]| {
    let Ok(gguf) = Gguf::parse(bytes) else { return };
    for tensor in gguf.tensors() {
        assert_eq!(gguf.data(tensor).len() as u64, tensor.bytes);
        assert_eq!(gguf.tensor(&tensor.name), Some(tensor));
    }
    let metadata = gguf.metadata();
    for key in metadata.keys() {
        assert!(metadata.get(key).is_some());
        let counted = metadata.strings(key).map_or(0, |strings| strings.map(str::len).sum());
        assert!(counted <= bytes.len());
        let numbers = metadata.i32s(key).map_or(0, Iterator::count);
        assert!(4 * numbers <= bytes.len());
    }
    if let Ok(spec) = inspect(&gguf, KvType::F16) {
        assert!(spec.layers > 0 && spec.kv_bytes(1) > 0);
    }
});
