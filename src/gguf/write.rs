//! Writing a file in one pass: keys and the list of tensors first, then the tensors' bytes in order.

use std::io::{self, Write};

use scoutd_kernels::Format;

use super::metadata::{Value, ValueType};
use super::parse::tensor_bytes;
use super::{ALIGNMENT_OURS, GgufError};

/// The keys and the list of tensors of a file to be written. The alignment is a key of the file,
/// `general.alignment`, and written by itself.
#[derive(Clone, Debug)]
pub struct GgufHeader {
    alignment: u32,
    keys: Vec<u8>,
    key_count: u64,
    tensors: Vec<(String, Format, Vec<u64>)>,
}

impl Default for GgufHeader {
    fn default() -> GgufHeader {
        GgufHeader::new(ALIGNMENT_OURS)
    }
}

impl GgufHeader {
    /// An empty header.
    ///
    /// # Panics
    /// If `alignment` is no power of two.
    pub fn new(alignment: u32) -> GgufHeader {
        assert!(alignment.is_power_of_two(), "alignment of {alignment} is no power of two");
        let mut header =
            GgufHeader { alignment, keys: Vec::new(), key_count: 0, tensors: Vec::new() };
        header.key("general.alignment", ValueType::U32).extend(alignment.to_le_bytes());
        header
    }

    fn key(&mut self, key: &str, value_type: ValueType) -> &mut Vec<u8> {
        self.key_count += 1;
        put_string(&mut self.keys, key);
        self.keys.extend((value_type as u32).to_le_bytes());
        &mut self.keys
    }

    pub fn str(&mut self, key: &str, value: &str) -> &mut GgufHeader {
        put_string(self.key(key, ValueType::String), value);
        self
    }

    pub fn bool(&mut self, key: &str, value: bool) -> &mut GgufHeader {
        self.key(key, ValueType::Bool).push(value.into());
        self
    }

    pub fn u32(&mut self, key: &str, value: u32) -> &mut GgufHeader {
        self.key(key, ValueType::U32).extend(value.to_le_bytes());
        self
    }

    pub fn u64(&mut self, key: &str, value: u64) -> &mut GgufHeader {
        self.key(key, ValueType::U64).extend(value.to_le_bytes());
        self
    }

    pub fn f32(&mut self, key: &str, value: f32) -> &mut GgufHeader {
        self.key(key, ValueType::F32).extend(value.to_le_bytes());
        self
    }

    pub fn strings<S: AsRef<str>>(
        &mut self,
        key: &str,
        values: impl ExactSizeIterator<Item = S>,
    ) -> &mut GgufHeader {
        let out = self.array(key, ValueType::String, values.len());
        values.for_each(|value| put_string(out, value.as_ref()));
        self
    }

    pub fn i32s(&mut self, key: &str, values: &[i32]) -> &mut GgufHeader {
        let out = self.array(key, ValueType::I32, values.len());
        values.iter().for_each(|value| out.extend(value.to_le_bytes()));
        self
    }

    pub fn f32s(&mut self, key: &str, values: &[f32]) -> &mut GgufHeader {
        let out = self.array(key, ValueType::F32, values.len());
        values.iter().for_each(|value| out.extend(value.to_le_bytes()));
        self
    }

    fn array(&mut self, key: &str, element: ValueType, len: usize) -> &mut Vec<u8> {
        let out = self.key(key, ValueType::Array);
        out.extend((element as u32).to_le_bytes());
        out.extend((len as u64).to_le_bytes());
        out
    }

    /// A value as another file holds it. `general.alignment` is passed over: this header has its own.
    pub fn value(&mut self, key: &str, value: &Value) -> &mut GgufHeader {
        if key == "general.alignment" {
            return self;
        }
        let out = self.key(key, value.value_type());
        match value {
            Value::U8(v) => out.extend(v.to_le_bytes()),
            Value::I8(v) => out.extend(v.to_le_bytes()),
            Value::U16(v) => out.extend(v.to_le_bytes()),
            Value::I16(v) => out.extend(v.to_le_bytes()),
            Value::U32(v) => out.extend(v.to_le_bytes()),
            Value::I32(v) => out.extend(v.to_le_bytes()),
            Value::F32(v) => out.extend(v.to_le_bytes()),
            Value::Bool(v) => out.push(u8::from(*v)),
            Value::String(v) => put_string(out, v),
            Value::U64(v) => out.extend(v.to_le_bytes()),
            Value::I64(v) => out.extend(v.to_le_bytes()),
            Value::F64(v) => out.extend(v.to_le_bytes()),
            Value::Array(v) => {
                out.extend((v.element() as u32).to_le_bytes());
                out.extend((v.len() as u64).to_le_bytes());
                out.extend(v.bytes());
            }
        }
        self
    }

    /// Announces a tensor; `shape` has the fastest dimension first.
    pub fn tensor(&mut self, name: &str, format: Format, shape: &[u64]) -> &mut GgufHeader {
        self.tensors.push((name.to_owned(), format, shape.to_vec()));
        self
    }

    /// Writes keys and tensor list to `out`; the tensors must follow in the announced order.
    ///
    /// # Errors
    /// If a shape is impossible, or `out` fails.
    pub fn start<W: Write>(&self, mut out: W) -> Result<GgufWriter<W>, GgufError> {
        let mut head = Vec::with_capacity(24 + self.keys.len() + self.tensors.len() * 96);
        head.extend(b"GGUF");
        head.extend(VERSION.to_le_bytes());
        head.extend((self.tensors.len() as u64).to_le_bytes());
        head.extend(self.key_count.to_le_bytes());
        head.extend(&self.keys);
        let alignment = u64::from(self.alignment);
        let mut pending = Vec::with_capacity(self.tensors.len());
        let mut offset = 0_u64;
        for (name, format, shape) in &self.tensors {
            if shape.is_empty() || shape.contains(&0) {
                return Err(GgufError::DimensionZero { tensor: name.clone() });
            }
            let bytes = tensor_bytes(name, *format, shape)?;
            put_string(&mut head, name);
            head.extend((shape.len() as u32).to_le_bytes());
            shape.iter().for_each(|dimension| head.extend(dimension.to_le_bytes()));
            head.extend(format.ggml_type().to_le_bytes());
            head.extend(offset.to_le_bytes());
            pending.push(Pending { name: name.clone(), bytes });
            offset = offset
                .checked_add(bytes)
                .and_then(|end| end.checked_next_multiple_of(alignment))
                .ok_or_else(|| GgufError::TensorSize { tensor: name.clone() })?;
        }
        out.write_all(&head).map_err(failed)?;
        let mut writer =
            GgufWriter { out, at: head.len() as u64, alignment, pending, next: 0, left: 0 };
        writer.pad()?;
        Ok(writer)
    }
}

/// A file whose header is written, and whose tensors are still to come.
#[derive(Debug)]
pub struct GgufWriter<W: Write> {
    out: W,
    at: u64,
    alignment: u64,
    pending: Vec<Pending>,
    next: usize,
    /// Bytes that the current tensor still lacks.
    left: u64,
}

#[derive(Debug)]
struct Pending {
    name: String,
    bytes: u64,
}

impl<W: Write> GgufWriter<W> {
    /// Begins the next tensor, which must be `name`.
    ///
    /// # Errors
    /// If another one comes next, or the one before is incomplete.
    pub fn begin(&mut self, name: &str) -> Result<(), GgufError> {
        self.refuse_incomplete()?;
        match self.pending.get(self.next) {
            Some(pending) if pending.name == name => {
                self.left = pending.bytes;
                self.next += 1;
                Ok(())
            }
            Some(pending) => {
                Err(GgufError::Write(format!("`{name}` comes where `{}` must", pending.name)))
            }
            None => Err(GgufError::Write(format!("`{name}` was not announced"))),
        }
    }

    /// Adds bytes to the tensor that was begun last.
    ///
    /// # Errors
    /// If they exceed its size, or the output fails.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), GgufError> {
        let Some(left) = self.left.checked_sub(bytes.len() as u64) else {
            let over = bytes.len() as u64 - self.left;
            return Err(GgufError::Write(format!(
                "`{}` has {over} bytes too many",
                self.current()
            )));
        };
        self.out.write_all(bytes).map_err(failed)?;
        self.at += bytes.len() as u64;
        self.left = left;
        if left == 0 { self.pad() } else { Ok(()) }
    }

    /// A whole tensor at once.
    ///
    /// # Errors
    /// As [`GgufWriter::begin`] and [`GgufWriter::append`].
    pub fn tensor(&mut self, name: &str, bytes: &[u8]) -> Result<(), GgufError> {
        self.begin(name)?;
        self.append(bytes)?;
        self.refuse_incomplete()
    }

    /// Ends the file and gives the output back, flushed.
    ///
    /// # Errors
    /// If a tensor is missing or incomplete.
    pub fn finish(mut self) -> Result<W, GgufError> {
        self.refuse_incomplete()?;
        if let Some(missing) = self.pending.get(self.next) {
            return Err(GgufError::Write(format!("`{}` is missing", missing.name)));
        }
        self.out.flush().map_err(failed)?;
        Ok(self.out)
    }

    fn refuse_incomplete(&self) -> Result<(), GgufError> {
        if self.left == 0 {
            return Ok(());
        }
        Err(GgufError::Write(format!("`{}` lacks {} bytes", self.current(), self.left)))
    }

    fn current(&self) -> &str {
        self.next.checked_sub(1).map_or("(none)", |index| self.pending[index].name.as_str())
    }

    fn pad(&mut self) -> Result<(), GgufError> {
        const ZEROS: [u8; 4096] = [0; 4096];
        let mut padding = self.at.next_multiple_of(self.alignment) - self.at;
        self.at += padding;
        while padding > 0 {
            let step = padding.min(ZEROS.len() as u64);
            self.out.write_all(&ZEROS[..step as usize]).map_err(failed)?;
            padding -= step;
        }
        Ok(())
    }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn failed(error: io::Error) -> GgufError {
    GgufError::Write(error.to_string())
}

const VERSION: u32 = 3;
