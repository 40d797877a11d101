//! Keys and values, borrowed from the file.

use std::fmt;

use super::GgufError;
use super::parse::Reader;

/// The type of a value, with the numbers of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueType {
    /// The type with this number.
    pub fn from_number(number: u32) -> Option<ValueType> {
        const ALL: [ValueType; 13] = [
            ValueType::U8,
            ValueType::I8,
            ValueType::U16,
            ValueType::I16,
            ValueType::U32,
            ValueType::I32,
            ValueType::F32,
            ValueType::Bool,
            ValueType::String,
            ValueType::Array,
            ValueType::U64,
            ValueType::I64,
            ValueType::F64,
        ];
        ALL.get(usize::try_from(number).ok()?).copied()
    }

    /// Bytes of one value; `None` for strings and arrays, which carry their length.
    pub fn fixed_bytes(self) -> Option<usize> {
        match self {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => Some(1),
            ValueType::U16 | ValueType::I16 => Some(2),
            ValueType::U32 | ValueType::I32 | ValueType::F32 => Some(4),
            ValueType::U64 | ValueType::I64 | ValueType::F64 => Some(8),
            ValueType::String | ValueType::Array => None,
        }
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ValueType::U8 => "a u8",
            ValueType::I8 => "an i8",
            ValueType::U16 => "a u16",
            ValueType::I16 => "an i16",
            ValueType::U32 => "a u32",
            ValueType::I32 => "an i32",
            ValueType::F32 => "an f32",
            ValueType::Bool => "a bool",
            ValueType::String => "a string",
            ValueType::Array => "an array",
            ValueType::U64 => "a u64",
            ValueType::I64 => "an i64",
            ValueType::F64 => "an f64",
        })
    }
}

/// A value of a key.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'a> {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(&'a str),
    Array(Array<'a>),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl<'a> Value<'a> {
    /// The type of this value.
    pub fn value_type(&self) -> ValueType {
        match self {
            Value::U8(_) => ValueType::U8,
            Value::I8(_) => ValueType::I8,
            Value::U16(_) => ValueType::U16,
            Value::I16(_) => ValueType::I16,
            Value::U32(_) => ValueType::U32,
            Value::I32(_) => ValueType::I32,
            Value::F32(_) => ValueType::F32,
            Value::Bool(_) => ValueType::Bool,
            Value::String(_) => ValueType::String,
            Value::Array(_) => ValueType::Array,
            Value::U64(_) => ValueType::U64,
            Value::I64(_) => ValueType::I64,
            Value::F64(_) => ValueType::F64,
        }
    }

    /// Any integer type, as an `i128` that holds them all.
    fn integer(&self) -> Option<i128> {
        Some(match *self {
            Value::U8(v) => v.into(),
            Value::I8(v) => v.into(),
            Value::U16(v) => v.into(),
            Value::I16(v) => v.into(),
            Value::U32(v) => v.into(),
            Value::I32(v) => v.into(),
            Value::U64(v) => v.into(),
            Value::I64(v) => v.into(),
            _ => return None,
        })
    }
}

impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::F32(v) => write!(f, "{v}"),
            Value::F64(v) => write!(f, "{v}"),
            Value::Bool(v) => write!(f, "{v}"),
            Value::String(v) => f.write_str(v),
            Value::Array(v) => write!(f, "array of {} values", v.len),
            _ => write!(f, "{}", self.integer().unwrap_or_default()),
        }
    }
}

/// An array as it lies in the file. Its bytes were checked when the file was parsed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Array<'a> {
    pub(super) element: ValueType,
    pub(super) len: usize,
    pub(super) bytes: &'a [u8],
}

impl<'a> Array<'a> {
    /// The type of its elements, never an array.
    pub fn element(&self) -> ValueType {
        self.element
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements as they lie in the file: little endian, strings with a length of eight bytes before.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }
}

/// The strings of an array, read from the file as they are asked for.
#[derive(Clone, Debug)]
pub struct Strings<'a> {
    reader: Reader<'a>,
    left: usize,
}

impl<'a> Iterator for Strings<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        self.left = self.left.checked_sub(1)?;
        let bytes = self.reader.string_bytes()?;
        Some(str::from_utf8(bytes).expect("checked when the file was parsed"))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Strings<'_> {}

/// Numbers of an array, read from the file as they are asked for.
#[derive(Clone, Debug)]
pub struct Scalars<'a, T> {
    chunks: std::slice::ChunksExact<'a, u8>,
    read: fn(&[u8]) -> T,
}

impl<T> Iterator for Scalars<'_, T> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        self.chunks.next().map(self.read)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.chunks.size_hint()
    }
}

impl<T> ExactSizeIterator for Scalars<'_, T> {}

/// All keys of a file. Getters without `_opt` fail if the key is missing; both fail if it has another
/// type. Integers are taken from any integer type that holds the value, as converters differ.
#[derive(Clone, Debug, Default)]
pub struct Metadata<'a> {
    entries: Vec<(&'a str, Value<'a>)>,
    /// Indices of `entries`, sorted by key.
    sorted: Vec<u32>,
}

impl<'a> Metadata<'a> {
    pub(super) fn new(entries: Vec<(&'a str, Value<'a>)>) -> Result<Metadata<'a>, GgufError> {
        let mut sorted: Vec<u32> = (0..entries.len() as u32).collect();
        sorted.sort_by_key(|&index| entries[index as usize].0);
        for pair in sorted.windows(2) {
            let key = entries[pair[0] as usize].0;
            if key == entries[pair[1] as usize].0 {
                return Err(GgufError::KeyDuplicate(key.to_owned()));
            }
        }
        Ok(Metadata { entries, sorted })
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value<'a>> {
        let found = self.sorted.binary_search_by_key(&key, |&i| self.entries[i as usize].0).ok()?;
        Some(&self.entries[self.sorted[found] as usize].1)
    }

    /// Keys in the order of the file.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = &'a str> + '_ {
        self.entries.iter().map(|(key, _)| *key)
    }

    /// Keys and values in the order of the file.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&'a str, &Value<'a>)> + '_ {
        self.entries.iter().map(|(key, value)| (*key, value))
    }

    pub fn str(&self, key: &str) -> Result<&'a str, GgufError> {
        self.str_opt(key)?.ok_or_else(|| missing(key))
    }

    pub fn str_opt(&self, key: &str) -> Result<Option<&'a str>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(value)) => Ok(Some(value)),
            Some(other) => Err(wrong(key, "a string", other)),
        }
    }

    pub fn bool(&self, key: &str) -> Result<bool, GgufError> {
        self.bool_opt(key)?.ok_or_else(|| missing(key))
    }

    pub fn bool_opt(&self, key: &str) -> Result<Option<bool>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(other) => Err(wrong(key, "a bool", other)),
        }
    }

    pub fn u32(&self, key: &str) -> Result<u32, GgufError> {
        self.u32_opt(key)?.ok_or_else(|| missing(key))
    }

    pub fn u32_opt(&self, key: &str) -> Result<Option<u32>, GgufError> {
        self.integer(key, "an integer from 0 to 4294967295")
    }

    pub fn u64(&self, key: &str) -> Result<u64, GgufError> {
        self.u64_opt(key)?.ok_or_else(|| missing(key))
    }

    pub fn u64_opt(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.integer(key, "an integer from 0 to 2^64 - 1")
    }

    pub fn f32(&self, key: &str) -> Result<f32, GgufError> {
        self.f32_opt(key)?.ok_or_else(|| missing(key))
    }

    /// An `f32`, or an `f64` rounded to one.
    pub fn f32_opt(&self, key: &str) -> Result<Option<f32>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::F32(value)) => Ok(Some(*value)),
            Some(Value::F64(value)) => Ok(Some(*value as f32)),
            Some(other) => Err(wrong(key, "an f32", other)),
        }
    }

    /// An array of strings.
    pub fn strings(&self, key: &str) -> Result<Strings<'a>, GgufError> {
        let array = self.array(key, "an array of strings", |e| e == ValueType::String)?;
        Ok(Strings { reader: Reader::new(array.bytes), left: array.len })
    }

    /// An array of `i32` or `u32`; larger `u32` wrap, as ggml reads both the same way.
    pub fn i32s(&self, key: &str) -> Result<Scalars<'a, i32>, GgufError> {
        let four = |element| matches!(element, ValueType::I32 | ValueType::U32);
        let array = self.array(key, "an array of i32", four)?;
        let read = |bytes: &[u8]| i32::from_le_bytes(bytes.try_into().expect("chunks of four"));
        Ok(Scalars { chunks: array.bytes.chunks_exact(4), read })
    }

    /// An array of `f32`.
    pub fn f32s(&self, key: &str) -> Result<Scalars<'a, f32>, GgufError> {
        let array = self.array(key, "an array of f32", |element| element == ValueType::F32)?;
        let read = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().expect("chunks of four"));
        Ok(Scalars { chunks: array.bytes.chunks_exact(4), read })
    }

    fn array(
        &self,
        key: &str,
        wanted: &'static str,
        fits: impl Fn(ValueType) -> bool,
    ) -> Result<Array<'a>, GgufError> {
        match self.get(key).ok_or_else(|| missing(key))? {
            Value::Array(array) if fits(array.element) => Ok(*array),
            Value::Array(array) => {
                Err(GgufError::KeyType { key: key.to_owned(), wanted, found: array.element })
            }
            other => Err(wrong(key, wanted, other)),
        }
    }

    fn integer<T: TryFrom<i128>>(
        &self,
        key: &str,
        wanted: &'static str,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let integer = value.integer().ok_or_else(|| wrong(key, wanted, value))?;
        let value = T::try_from(integer).map_err(|_| GgufError::KeyValue {
            key: key.to_owned(),
            wanted,
            value: integer.to_string(),
        })?;
        Ok(Some(value))
    }
}

fn missing(key: &str) -> GgufError {
    GgufError::KeyMissing(key.to_owned())
}

fn wrong(key: &str, wanted: &'static str, found: &Value) -> GgufError {
    GgufError::KeyType { key: key.to_owned(), wanted, found: found.value_type() }
}
