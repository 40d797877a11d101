//! Good files read back as written; bad ones are refused by name.

use scoutd_kernels::Format;

use super::{Gguf, GgufError, GgufHeader, Mapping, Value};

/// A small file with a key of each kind and two tensors.
fn sample() -> Vec<u8> {
    let mut header = GgufHeader::new(32);
    header
        .str("general.architecture", "llama")
        .u32("llama.block_count", 2)
        .u64("a.u64", u64::MAX)
        .f32("a.f32", 0.5)
        .bool("a.bool", true)
        .strings("a.strings", ["", "ä", "long enough"].iter())
        .i32s("a.i32s", &[-1, 7])
        .f32s("a.f32s", &[1.5])
        .tensor("first", Format::F32, &[4, 2])
        .tensor("second", Format::Q8_0, &[32, 1, 3]);
    let mut writer = header.start(Vec::new()).expect("a Vec takes all");
    writer.tensor("first", &[1; 32]).expect("announced");
    writer.begin("second").expect("announced");
    writer.append(&[2; 34]).expect("fits");
    writer.append(&[3; 68]).expect("fits");
    writer.finish().expect("complete")
}

/// The bytes before the data section of `sample` with `edit` applied to them.
#[derive(Default)]
struct Raw {
    bytes: Vec<u8>,
}

impl Raw {
    fn new(tensors: u64, keys: u64) -> Raw {
        Raw::default().bytes(b"GGUF").u32(3).u64(tensors).u64(keys)
    }

    fn bytes(mut self, bytes: &[u8]) -> Raw {
        self.bytes.extend(bytes);
        self
    }

    fn u32(self, value: u32) -> Raw {
        self.bytes(&value.to_le_bytes())
    }

    fn u64(self, value: u64) -> Raw {
        self.bytes(&value.to_le_bytes())
    }

    fn string(self, text: &[u8]) -> Raw {
        self.u64(text.len() as u64).bytes(text)
    }

    fn tensor(self, name: &[u8], shape: &[u64], ggml_type: u32, offset: u64) -> Raw {
        let raw = self.string(name).u32(shape.len() as u32);
        shape.iter().fold(raw, |raw, &d| raw.u64(d)).u32(ggml_type).u64(offset)
    }

    fn data(mut self, bytes: usize) -> Raw {
        self.bytes.resize(self.bytes.len().next_multiple_of(32) + bytes, 0);
        self
    }

    /// Parses, and expects an error whose message is `message`.
    #[track_caller]
    fn refused(self, message: &str) {
        let error = Gguf::parse(&self.bytes).map(|_| ()).expect_err(message);
        assert_eq!(error.to_string(), message);
    }
}

#[test]
fn reads_back_what_was_written() {
    let bytes = sample();
    let gguf = Gguf::parse(&bytes).expect("valid");
    let metadata = gguf.metadata();
    assert_eq!(gguf.version(), 3);
    assert_eq!(gguf.alignment(), 32);
    assert_eq!(metadata.keys().count(), 9);
    assert_eq!(metadata.str("general.architecture").unwrap(), "llama");
    assert_eq!(metadata.u32("llama.block_count").unwrap(), 2);
    assert_eq!(metadata.u64("a.u64").unwrap(), u64::MAX);
    assert_eq!(metadata.f32("a.f32").unwrap(), 0.5);
    assert!(metadata.bool("a.bool").unwrap());
    let strings: Vec<&str> = metadata.strings("a.strings").unwrap().collect();
    assert_eq!(strings, ["", "ä", "long enough"]);
    assert_eq!(metadata.strings("a.strings").unwrap().len(), 3);
    assert_eq!(metadata.i32s("a.i32s").unwrap().collect::<Vec<_>>(), [-1, 7]);
    assert_eq!(metadata.f32s("a.f32s").unwrap().collect::<Vec<_>>(), [1.5]);

    let names: Vec<&str> = gguf.tensors().iter().map(|tensor| tensor.name.as_str()).collect();
    assert_eq!(names, ["first", "second"]);
    let second = gguf.tensor("second").expect("there");
    assert_eq!((second.format, second.shape.as_slice()), (Format::Q8_0, [32, 1, 3].as_slice()));
    assert_eq!((second.values(), second.bytes, second.offset % 32), (96, 102, 0));
    assert_eq!(gguf.data(gguf.tensor("first").expect("there")), [1; 32]);
    assert_eq!(gguf.data(second)[..34], [2; 34]);
    assert_eq!(gguf.data(second)[34..], [3; 68]);
    assert!(gguf.tensor("third").is_none());
}

#[test]
fn copies_values_of_another_file() {
    let bytes = sample();
    let gguf = Gguf::parse(&bytes).expect("valid");
    let mut header = GgufHeader::new(64);
    for (key, value) in gguf.metadata().iter() {
        header.value(key, value);
    }
    let copy = header.start(Vec::new()).and_then(super::GgufWriter::finish).expect("no tensors");
    let copied = Gguf::parse(&copy).expect("valid");
    assert_eq!(copied.alignment(), 64);
    for (key, value) in gguf.metadata().iter().filter(|(key, _)| *key != "general.alignment") {
        assert_eq!(copied.metadata().get(key), Some(value), "{key}");
    }
}

#[test]
fn getters_name_the_key_and_what_it_is() {
    let bytes = sample();
    let gguf = Gguf::parse(&bytes).expect("valid");
    let metadata = gguf.metadata();
    let cases = [
        (metadata.str("none").map(|_| ()), "key `none` is missing"),
        (metadata.strings("none").map(|_| ()), "key `none` is missing"),
        (metadata.str("a.f32").map(|_| ()), "key `a.f32` must be a string, and is an f32"),
        (
            metadata.u32("a.u64").map(|_| ()),
            "key `a.u64` must be an integer from 0 to 4294967295, and is 18446744073709551615",
        ),
        (
            metadata.strings("a.i32s").map(|_| ()),
            "key `a.i32s` must be an array of strings, and is an i32",
        ),
        (
            metadata.f32s("a.bool").map(|_| ()),
            "key `a.bool` must be an array of f32, and is a bool",
        ),
    ];
    for (result, message) in cases {
        assert_eq!(result.expect_err(message).to_string(), message);
    }
    assert_eq!(metadata.u32_opt("none").expect("optional"), None);
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = sample();
    let gguf = Gguf::parse(&bytes).expect("valid");
    let end = gguf.tensors().iter().map(|tensor| tensor.offset + tensor.bytes).max().expect("two");
    for length in 0..end as usize {
        assert!(Gguf::parse(&bytes[..length]).is_err(), "{length} of {} bytes", bytes.len());
    }
    assert!(Gguf::parse(&bytes[..end as usize]).is_ok(), "the last padding may be missing");
}

#[test]
fn every_byte_may_be_anything() {
    let bytes = sample();
    let head = Gguf::parse(&bytes).expect("valid").tensors()[0].offset as usize;
    for at in 0..head {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut changed = bytes.clone();
            changed[at] = value;
            if let Ok(gguf) = Gguf::parse(&changed) {
                gguf.tensors().iter().for_each(|tensor| assert!(!gguf.data(tensor).is_empty()));
                for key in gguf.metadata().keys() {
                    let count = gguf.metadata().strings(key).map_or(0, Iterator::count);
                    assert!(count <= bytes.len());
                }
            }
        }
    }
}

#[test]
fn lying_headers_are_refused_by_name() {
    Raw::default().refused("the file is empty");
    Raw::default().bytes(b"GG").refused("the file ends within the header");
    Raw::default().bytes(b"GGML").refused("not a GGUF file: it begins with [47, 47, 4d, 4c]");
    Raw::default().bytes(b"GGUF").u32(1).refused("GGUF version 1; versions 2 and 3 are supported");
    Raw::default()
        .bytes(b"GGUF")
        .bytes(&3_u32.to_be_bytes())
        .refused("big-endian GGUF file; only little-endian files are supported");
    Raw::new(0, 1).refused("the file ends within the name of key number 0");
    for count in [2, 1 << 31, 1 << 63, u64::MAX] {
        Raw::new(0, count)
            .refused(&format!("the header claims {count} keys; the file has room for 1"));
    }
    Raw::new(u64::MAX, 0)
        .refused("the header claims 18446744073709551615 tensors; the file has room for 0");
    Raw::new(1 << 31, 0)
        .data(1000)
        .refused("the header claims 2147483648 tensors; the file has room for 31");
}

#[test]
fn lying_keys_are_refused_by_name() {
    let key = |name: &[u8]| Raw::new(0, 1).string(name);
    Raw::new(0, 1)
        .u64(0)
        .data(8)
        .refused("key number 0 has a name of 0 bytes; 1 to 65535 are possible");
    Raw::new(0, 1)
        .u64(1 << 63)
        .data(8)
        .refused("key number 0 has a name of 9223372036854775808 bytes; 1 to 65535 are possible");
    Raw::new(0, 1).u64(500).data(8).refused("the file ends within the name of key number 0");
    key(b"\xff\xfe").u32(4).u32(0).refused("the name of key number 0 is not valid UTF-8");
    for number in [13, u32::MAX] {
        key(b"k")
            .u32(number)
            .u32(0)
            .refused(&format!("key `k` has the value type {number}; 0 to 12 are known"));
    }
    key(b"k").u32(8).u64(u64::MAX).refused("the file ends within the value of key `k`");
    key(b"k").u32(8).string(b"\xc3").refused("the value of key `k` is not valid UTF-8");
    key(b"k").u32(7).bytes(&[2]).refused("`k` is a bool with the value 2");
    key(b"k").u32(10).u32(1).refused("the file ends within the value of key `k`");
    key(b"k")
        .u32(9)
        .u32(9)
        .u64(1)
        .u32(4)
        .u64(0)
        .refused("array `k` holds arrays; nested arrays are not supported");
    for count in [5, 1 << 31, 1 << 62, u64::MAX] {
        key(b"k").u32(9).u32(10).u64(count).u64(0).refused("the file ends within array `k`");
        key(b"k").u32(9).u32(8).u64(count).u64(0).refused("the file ends within array `k`");
    }
    key(b"k")
        .u32(9)
        .u32(8)
        .u64(2)
        .string(b"a")
        .string(b"\x80")
        .refused("element 1 of array `k` is not valid UTF-8");
    key(b"k").u32(9).u32(7).u64(2).bytes(&[1, 3]).refused("`k` is a bool with the value 3");
    Raw::new(0, 2)
        .string(b"k")
        .u32(4)
        .u32(0)
        .string(b"k")
        .u32(4)
        .u32(0)
        .refused("key `k` appears twice");
    for alignment in [0, 3, 48, 1 << 31] {
        Raw::new(0, 1)
            .string(b"general.alignment")
            .u32(4)
            .u32(alignment)
            .refused(&format!("alignment of {alignment} is no power of two up to 1 MiB"));
    }
    Raw::new(0, 1)
        .string(b"general.alignment")
        .u32(8)
        .string(b"32")
        .refused("key `general.alignment` must be an integer from 0 to 2^64 - 1, and is a string");
}

#[test]
fn lying_tensors_are_refused_by_name() {
    let one = |name: &[u8], shape: &[u64], ggml_type, offset| {
        Raw::new(1, 0).tensor(name, shape, ggml_type, offset).data(64)
    };
    one(b"", &[4], 0, 0).refused("tensor number 0 has a name of 0 bytes; 1 to 64 are possible");
    one(&[b'n'; 65], &[4], 0, 0)
        .refused("tensor number 0 has a name of 65 bytes; 1 to 64 are possible");
    one(b"\xff", &[4], 0, 0).refused("the name of tensor number 0 is not valid UTF-8");
    one(b"t", &[], 0, 0).refused("tensor `t` has 0 dimensions; 1 to 4 are possible");
    one(b"t", &[1; 5], 0, 0).refused("tensor `t` has 5 dimensions; 1 to 4 are possible");
    Raw::new(1, 0)
        .string(b"t")
        .u32(u32::MAX)
        .data(64)
        .refused("tensor `t` has 4294967295 dimensions; 1 to 4 are possible");
    one(b"t", &[4, 0], 0, 0).refused("tensor `t` has a dimension of zero");
    one(b"t", &[1 << 32, 1 << 32], 0, 0)
        .refused("tensor `t` has dimensions whose product is too large");
    one(b"t", &[u64::MAX], 0, 0).refused("tensor `t` has dimensions whose product is too large");
    one(b"t", &[1 << 62], 0, 0).refused("tensor `t` has dimensions whose product is too large");
    one(b"t", &[48], 2, 0).refused("tensor `t` has rows of 48 values; Q4_0 needs a multiple of 32");
    one(b"t", &[4], 99, 0).refused("tensor `t` has the type 99, which is not supported");
    one(b"t", &[4], u32::MAX, 0)
        .refused("tensor `t` has the type 4294967295, which is not supported");
    one(b"t", &[256], 10, 0).refused(
        "tensor `t` has the type 10 (Q2_K), which is not supported; \
         quantize to Q4_0, Q4_K, Q5_K, Q6_K or Q8_0",
    );
    one(b"t", &[4], 0, 7)
        .refused("tensor `t` begins at 7, which is no multiple of the alignment of 32");
    one(b"t", &[17], 0, 0).refused("tensor `t` ends at byte 132, the file at 128");
    one(b"t", &[4], 0, 64).refused("tensor `t` ends at byte 144, the file at 128");
    one(b"t", &[4], 0, u64::MAX - 31).refused(&format!(
        "tensor `t` ends at byte {}, the file at 128",
        64 + (u128::from(u64::MAX) - 31) + 16
    ));
    let two = |second: &[u8], offset| {
        Raw::new(2, 0).tensor(b"a", &[9], 0, 0).tensor(second, &[4], 0, offset).data(128)
    };
    two(b"a", 64).refused("tensor `a` appears twice");
    two(b"b", 0).refused("tensors `a` and `b` overlap");
    two(b"b", 32).refused("tensors `a` and `b` overlap");
    assert!(Gguf::parse(&two(b"b", 64).bytes).is_ok());
}

#[test]
fn the_writer_keeps_to_what_it_announced() {
    let mut header = GgufHeader::new(32);
    header.tensor("a", Format::F32, &[2]).tensor("b", Format::F32, &[2]);
    let start = || header.start(Vec::new()).expect("a Vec takes all");
    let wrong = start().begin("b").expect_err("a comes first");
    assert_eq!(wrong.to_string(), "writing tensors: `b` comes where `a` must");
    let long = start().tensor("a", &[0; 9]).expect_err("eight bytes");
    assert_eq!(long.to_string(), "writing tensors: `a` has 1 bytes too many");
    let short = start().tensor("a", &[0; 7]).expect_err("eight bytes");
    assert_eq!(short.to_string(), "writing tensors: `a` lacks 1 bytes");
    let mut writer = start();
    writer.tensor("a", &[0; 8]).expect("complete");
    let missing = writer.finish().expect_err("b is missing");
    assert_eq!(missing.to_string(), "writing tensors: `b` is missing");
    let odd = GgufHeader::new(32).tensor("q", Format::Q4K, &[64]).start(Vec::new());
    assert!(matches!(odd, Err(GgufError::RowLength { .. })));
}

#[test]
fn only_regular_files_are_mapped() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let path = folder.path().join("model.gguf");
    let refused = |path: &std::path::Path| Mapping::open(path).expect_err("refused").to_string();
    assert!(refused(&path).contains("No such file"));
    std::fs::write(&path, b"").expect("writable");
    assert_eq!(refused(&path), "the file is empty");
    std::fs::write(&path, sample()).expect("writable");
    let mapping = Mapping::open(&path).expect("a file");
    assert_eq!(mapping.bytes(), sample());
    let gguf = Gguf::parse(mapping.bytes()).expect("valid");
    assert_eq!(gguf.metadata().get("a.bool"), Some(&Value::Bool(true)));

    assert!(refused(folder.path()).ends_with("is not a regular file but a directory"));
    assert!(refused(std::path::Path::new("/dev/zero")).ends_with("but a device"));
    let link = folder.path().join("link.gguf");
    std::os::unix::fs::symlink(&path, &link).expect("a link");
    assert!(refused(&link).contains("a symbolic link"));
    let fifo = folder.path().join("fifo.gguf");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status().expect("coreutils");
    assert!(made.success());
    assert!(refused(&fifo).ends_with("but a pipe"));
}

#[test]
fn a_file_that_changes_is_noticed() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, sample()).expect("writable");
    let mapping = Mapping::open(&path).expect("a file");
    mapping.check_unchanged().expect("untouched");
    let renamed = folder.path().join("other");
    std::fs::write(&renamed, b"new").expect("writable");
    std::fs::rename(&renamed, &path).expect("renamed");
    mapping.check_unchanged().expect("the mapping keeps the old file");

    let mapping = Mapping::open(&path).expect("a file");
    let file = std::fs::OpenOptions::new().write(true).open(&path).expect("writable");
    file.set_len(1).expect("cut");
    assert!(matches!(mapping.check_unchanged(), Err(GgufError::Replaced { .. })));
}
