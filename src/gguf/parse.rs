//! From bytes to keys and tensors, without copying either.

use scoutd_kernels::Format;

use super::metadata::{Array, Metadata, Value, ValueType};
use super::{ALIGNMENT_DEFAULT, GgufError};

/// A parsed file: its keys, and where its tensors lie.
#[derive(Clone, Debug)]
pub struct Gguf<'a> {
    bytes: &'a [u8],
    version: u32,
    alignment: u64,
    metadata: Metadata<'a>,
    tensors: Vec<TensorInfo>,
    /// Indices of `tensors`, sorted by name.
    sorted: Vec<u32>,
}

/// Where a tensor lies and what it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    pub name: String,
    pub format: Format,
    /// Values in each dimension, the fastest first: `[columns, rows, experts]`. One to four, none zero.
    pub shape: Vec<u64>,
    /// Where its first byte lies in the file.
    pub offset: u64,
    /// Its size in the file.
    pub bytes: u64,
}

impl TensorInfo {
    /// Number of values.
    pub fn values(&self) -> u64 {
        self.shape.iter().product()
    }
}

impl<'a> Gguf<'a> {
    /// Parses a whole file, and checks that every tensor lies inside it.
    ///
    /// # Errors
    /// The first thing that is wrong, with the key or tensor where it is.
    pub fn parse(bytes: &'a [u8]) -> Result<Gguf<'a>, GgufError> {
        Gguf::parse_header(bytes, bytes.len() as u64)
    }

    /// Parses the beginning of a file that has `file_bytes` bytes in all: a file that is elsewhere. What follows
    /// the header need not be there, so [`Gguf::data`] is not for the result.
    ///
    /// # Errors
    /// As [`Gguf::parse`]; a beginning that is too short for the header has its own of these.
    pub fn parse_header(bytes: &'a [u8], file_bytes: u64) -> Result<Gguf<'a>, GgufError> {
        let mut reader = Reader::new(bytes);
        let (version, tensor_count, key_count) = prologue(&mut reader)?;
        let room = |count: u64, each: u64, limit: u64, what| {
            let room = (bytes.len() as u64 / each).min(limit);
            if count > room { Err(GgufError::TooMany { what, count, room }) } else { Ok(count) }
        };
        let key_count = room(key_count, KEY_BYTES_MIN, KEYS_MAX, "keys")?;
        let tensor_count = room(tensor_count, TENSOR_BYTES_MIN, TENSORS_MAX, "tensors")?;

        let mut entries = Vec::with_capacity(key_count as usize);
        for index in 0..key_count {
            entries.push(entry(&mut reader, index)?);
        }
        let metadata = Metadata::new(entries)?;
        let alignment = alignment(&metadata)?;

        let mut tensors = Vec::with_capacity(tensor_count as usize);
        for index in 0..tensor_count {
            tensors.push(tensor(&mut reader, index, alignment)?);
        }
        let data_start = (reader.at as u64).next_multiple_of(alignment);
        place(&mut tensors, data_start, file_bytes)?;
        let sorted = sorted_by_name(&tensors)?;
        refuse_overlap(&tensors)?;
        Ok(Gguf { bytes, version, alignment, metadata, tensors, sorted })
    }

    /// Version of the container, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// What every tensor's offset is a multiple of.
    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    pub fn metadata(&self) -> &Metadata<'a> {
        &self.metadata
    }

    /// Tensors in the order of the file's list.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        let found = self
            .sorted
            .binary_search_by_key(&name, |&index| self.tensors[index as usize].name.as_str())
            .ok()?;
        Some(&self.tensors[self.sorted[found] as usize])
    }

    /// The bytes of a tensor.
    ///
    /// # Panics
    /// If `tensor` comes from another, longer file, or only the header was parsed.
    pub fn data(&self, tensor: &TensorInfo) -> &'a [u8] {
        &self.bytes[tensor.offset as usize..(tensor.offset + tensor.bytes) as usize]
    }
}

/// Reads little-endian values from a slice; `None` where it ends.
#[derive(Clone, Debug)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader { bytes, at: 0 }
    }

    fn take(&mut self, count: u64) -> Option<&'a [u8]> {
        let end = self.at.checked_add(usize::try_from(count).ok()?)?;
        let taken = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N as u64)?.try_into().ok()
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// A length and that many bytes.
    pub(super) fn string_bytes(&mut self) -> Option<&'a [u8]> {
        let length = self.u64()?;
        self.take(length)
    }
}

/// Magic, version, tensor count and key count.
fn prologue(reader: &mut Reader) -> Result<(u32, u64, u64), GgufError> {
    let truncated = || GgufError::Truncated { what: "the header".to_owned() };
    if reader.bytes.is_empty() {
        return Err(GgufError::Empty);
    }
    let magic: [u8; 4] = reader.array().ok_or_else(truncated)?;
    if &magic != b"GGUF" {
        return Err(GgufError::Magic(magic));
    }
    let version = reader.u32().ok_or_else(truncated)?;
    match version {
        2 | 3 => {}
        _ if matches!(version.swap_bytes(), 1..=3) => return Err(GgufError::BigEndian),
        _ => return Err(GgufError::Version(version)),
    }
    let tensor_count = reader.u64().ok_or_else(truncated)?;
    let key_count = reader.u64().ok_or_else(truncated)?;
    Ok((version, tensor_count, key_count))
}

fn entry<'a>(reader: &mut Reader<'a>, index: u64) -> Result<(&'a str, Value<'a>), GgufError> {
    let truncated = || GgufError::Truncated { what: format!("the name of key number {index}") };
    let length = reader.u64().ok_or_else(truncated)?;
    if length == 0 || length > KEY_NAME_MAX {
        return Err(GgufError::KeyName { index, bytes: length });
    }
    let key = str::from_utf8(reader.take(length).ok_or_else(truncated)?)
        .map_err(|_| GgufError::Utf8 { what: format!("the name of key number {index}") })?;
    let truncated = || GgufError::Truncated { what: format!("the value of key `{key}`") };
    let number = reader.u32().ok_or_else(truncated)?;
    let value_type = value_type(key, number)?;
    let value = if value_type == ValueType::Array {
        Value::Array(array(reader, key)?)
    } else {
        scalar(reader, key, value_type)?
    };
    Ok((key, value))
}

fn value_type(key: &str, number: u32) -> Result<ValueType, GgufError> {
    ValueType::from_number(number)
        .ok_or_else(|| GgufError::ValueType { key: key.to_owned(), value_type: number })
}

fn scalar<'a>(
    reader: &mut Reader<'a>,
    key: &str,
    value_type: ValueType,
) -> Result<Value<'a>, GgufError> {
    let end = || GgufError::Truncated { what: format!("the value of key `{key}`") };
    Ok(match value_type {
        ValueType::U8 => Value::U8(u8::from_le_bytes(reader.array().ok_or_else(end)?)),
        ValueType::I8 => Value::I8(i8::from_le_bytes(reader.array().ok_or_else(end)?)),
        ValueType::U16 => Value::U16(u16::from_le_bytes(reader.array().ok_or_else(end)?)),
        ValueType::I16 => Value::I16(i16::from_le_bytes(reader.array().ok_or_else(end)?)),
        ValueType::U32 => Value::U32(u32::from_le_bytes(reader.array().ok_or_else(end)?)),
        ValueType::I32 => Value::I32(i32::from_le_bytes(reader.array().ok_or_else(end)?)),
        ValueType::F32 => Value::F32(f32::from_le_bytes(reader.array().ok_or_else(end)?)),
        ValueType::U64 => Value::U64(u64::from_le_bytes(reader.array().ok_or_else(end)?)),
        ValueType::I64 => Value::I64(i64::from_le_bytes(reader.array().ok_or_else(end)?)),
        ValueType::F64 => Value::F64(f64::from_le_bytes(reader.array().ok_or_else(end)?)),
        ValueType::Bool => match reader.array::<1>().ok_or_else(end)?[0] {
            0 => Value::Bool(false),
            1 => Value::Bool(true),
            value => return Err(GgufError::Bool { key: key.to_owned(), value }),
        },
        ValueType::String => {
            let bytes = reader.string_bytes().ok_or_else(end)?;
            let text = str::from_utf8(bytes)
                .map_err(|_| GgufError::Utf8 { what: format!("the value of key `{key}`") })?;
            Value::String(text)
        }
        ValueType::Array => return Err(GgufError::ArrayNested { key: key.to_owned() }),
    })
}

/// Steps over an array and checks each element, so that its iterators cannot fail.
fn array<'a>(reader: &mut Reader<'a>, key: &str) -> Result<Array<'a>, GgufError> {
    let truncated = || GgufError::Truncated { what: format!("array `{key}`") };
    let number = reader.u32().ok_or_else(truncated)?;
    let element = value_type(key, number)?;
    let count = reader.u64().ok_or_else(truncated)?;
    let len = usize::try_from(count).map_err(|_| truncated())?;
    let start = reader.at;
    match element.fixed_bytes() {
        Some(size) => {
            let total = count.checked_mul(size as u64).ok_or_else(truncated)?;
            let bytes = reader.take(total).ok_or_else(truncated)?;
            if element == ValueType::Bool
                && let Some(&value) = bytes.iter().find(|&&byte| byte > 1)
            {
                return Err(GgufError::Bool { key: key.to_owned(), value });
            }
        }
        None if element == ValueType::Array => {
            return Err(GgufError::ArrayNested { key: key.to_owned() });
        }
        None => {
            for index in 0..count {
                let bytes = reader.string_bytes().ok_or_else(truncated)?;
                if str::from_utf8(bytes).is_err() {
                    let what = format!("element {index} of array `{key}`");
                    return Err(GgufError::Utf8 { what });
                }
            }
        }
    }
    Ok(Array { element, len, bytes: &reader.bytes[start..reader.at] })
}

fn alignment(metadata: &Metadata) -> Result<u64, GgufError> {
    let alignment = metadata.u64_opt("general.alignment")?.unwrap_or(ALIGNMENT_DEFAULT);
    if alignment.is_power_of_two() && alignment <= ALIGNMENT_MAX {
        Ok(alignment)
    } else {
        Err(GgufError::Alignment(alignment))
    }
}

/// One entry of the tensor list. Its offset is still the one of the file, from the data section's start.
fn tensor(reader: &mut Reader, index: u64, alignment: u64) -> Result<TensorInfo, GgufError> {
    let truncated = || GgufError::Truncated { what: format!("the entry of tensor number {index}") };
    let length = reader.u64().ok_or_else(truncated)?;
    if length == 0 || length > TENSOR_NAME_MAX {
        return Err(GgufError::TensorName { index, bytes: length });
    }
    let name = str::from_utf8(reader.take(length).ok_or_else(truncated)?)
        .map_err(|_| GgufError::Utf8 { what: format!("the name of tensor number {index}") })?
        .to_owned();
    let truncated = || GgufError::Truncated { what: format!("the entry of tensor `{name}`") };
    let count = reader.u32().ok_or_else(truncated)?;
    if !(1..=DIMENSIONS_MAX).contains(&count) {
        return Err(GgufError::DimensionCount { tensor: name, count });
    }
    let mut shape = Vec::with_capacity(count as usize);
    for _ in 0..count {
        shape.push(reader.u64().ok_or_else(truncated)?);
    }
    let ggml_type = reader.u32().ok_or_else(truncated)?;
    let offset = reader.u64().ok_or_else(truncated)?;

    let Some(format) = Format::from_ggml(ggml_type) else {
        return Err(GgufError::TensorType { tensor: name, ggml_type });
    };
    if shape.contains(&0) {
        return Err(GgufError::DimensionZero { tensor: name });
    }
    if !offset.is_multiple_of(alignment) {
        return Err(GgufError::Offset { tensor: name, offset, alignment });
    }
    let bytes = tensor_bytes(&name, format, &shape)?;
    Ok(TensorInfo { name, format, shape, offset, bytes })
}

/// Bytes of a tensor of this shape.
pub(super) fn tensor_bytes(name: &str, format: Format, shape: &[u64]) -> Result<u64, GgufError> {
    let (block, block_bytes) = (format.block_len() as u64, format.block_bytes() as u64);
    let columns = shape[0];
    if !columns.is_multiple_of(block) {
        let tensor = name.to_owned();
        return Err(GgufError::RowLength { tensor, columns, format: format.name(), block });
    }
    shape
        .iter()
        .try_fold(1_u64, |product, &dimension| product.checked_mul(dimension))
        .filter(|&values| values <= i64::MAX as u64)
        .and_then(|values| (values / block).checked_mul(block_bytes))
        .ok_or_else(|| GgufError::TensorSize { tensor: name.to_owned() })
}

/// Makes offsets absolute, and checks that each tensor ends within the file.
fn place(tensors: &mut [TensorInfo], data_start: u64, file: u64) -> Result<(), GgufError> {
    for tensor in tensors {
        let start = u128::from(data_start) + u128::from(tensor.offset);
        let end = start + u128::from(tensor.bytes);
        if end > u128::from(file) {
            return Err(GgufError::TensorPastEnd { tensor: tensor.name.clone(), end, file });
        }
        tensor.offset = start as u64;
    }
    Ok(())
}

fn sorted_by_name(tensors: &[TensorInfo]) -> Result<Vec<u32>, GgufError> {
    let mut sorted: Vec<u32> = (0..tensors.len() as u32).collect();
    sorted.sort_by_key(|&index| tensors[index as usize].name.as_str());
    for pair in sorted.windows(2) {
        let name = &tensors[pair[0] as usize].name;
        if *name == tensors[pair[1] as usize].name {
            return Err(GgufError::TensorDuplicate(name.clone()));
        }
    }
    Ok(sorted)
}

fn refuse_overlap(tensors: &[TensorInfo]) -> Result<(), GgufError> {
    let mut by_offset: Vec<&TensorInfo> = tensors.iter().collect();
    by_offset.sort_by_key(|tensor| tensor.offset);
    for pair in by_offset.windows(2) {
        if pair[0].offset + pair[0].bytes > pair[1].offset {
            let (first, second) = (pair[0].name.clone(), pair[1].name.clone());
            return Err(GgufError::Overlap { first, second });
        }
    }
    Ok(())
}

/// A name of one byte after its length, a type, and a value of one byte.
const KEY_BYTES_MIN: u64 = 8 + 1 + 4 + 1;
const KEY_NAME_MAX: u64 = 65_535;
/// Far above any real file (Scout has about 40), so that a hostile large file cannot fill the memory.
const KEYS_MAX: u64 = 65_536;
/// A name of one byte, one dimension, a type and an offset.
const TENSOR_BYTES_MIN: u64 = 8 + 1 + 4 + 8 + 4 + 8;
const TENSOR_NAME_MAX: u64 = 64;
/// Far above any real file (Scout has 628).
const TENSORS_MAX: u64 = 65_536;
const DIMENSIONS_MAX: u32 = 4;
const ALIGNMENT_MAX: u64 = 1 << 20;
