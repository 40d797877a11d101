//! The part of a SentencePiece `tokenizer.model` that GGUF needs.
//!
//! The file is a protocol buffer. Field 1 repeats the pieces (1 text, 2 score, 3 type), field 2 is
//! the trainer's settings (3 model type, 40 unknown, 41 bos, 42 eos); the rest is passed over.

/// The pieces in the order of their ids.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Model {
    pub(super) pieces: Vec<Piece>,
    pub(super) unknown: Option<u32>,
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Piece {
    pub(super) text: String,
    pub(super) score: f32,
    /// SentencePiece numbers its types as GGUF does: 1 normal … 6 byte.
    pub(super) kind: i32,
}

/// Reads a model; refuses one that is not of type BPE, which alone `tokenizer.ggml.model` = `llama`
/// means.
pub(super) fn parse(bytes: &[u8]) -> Result<Model, String> {
    if bytes.first() != Some(&0x0a) {
        return Err("no SentencePiece model; of tiktoken's files only the tokenizer.json beside \
                    them is read"
            .to_owned());
    }
    let mut model = Model { pieces: Vec::new(), unknown: Some(0), bos: Some(1), eos: Some(2) };
    let mut fields = Fields(bytes);
    while let Some((number, field)) = fields.next()? {
        match (number, field) {
            (1, Field::Bytes(bytes)) => model.pieces.push(piece(bytes)?),
            (2, Field::Bytes(bytes)) => model.settings(bytes)?,
            _ => {}
        }
    }
    if model.pieces.is_empty() {
        return Err("no pieces".to_owned());
    }
    Ok(model)
}

fn piece(bytes: &[u8]) -> Result<Piece, String> {
    let mut piece = Piece { text: String::new(), score: 0.0, kind: 1 };
    let mut fields = Fields(bytes);
    while let Some((number, field)) = fields.next()? {
        match (number, field) {
            (1, Field::Bytes(text)) => {
                let text = std::str::from_utf8(text).map_err(|_| "a piece is no UTF-8")?;
                text.clone_into(&mut piece.text);
            }
            (2, Field::Fixed32(score)) => piece.score = f32::from_le_bytes(score),
            (3, Field::Varint(kind @ 1..=6)) => piece.kind = kind as i32,
            (3, field) => return Err(format!("a piece has type {field:?}")),
            _ => {}
        }
    }
    Ok(piece)
}

impl Model {
    fn settings(&mut self, bytes: &[u8]) -> Result<(), String> {
        let mut fields = Fields(bytes);
        let mut bpe = false;
        while let Some((number, field)) = fields.next()? {
            // Ids are 32-bit and signed; −1 means none.
            let id = |value| u32::try_from(value).ok().filter(|&id| id <= i32::MAX as u32);
            match (number, field) {
                (3, Field::Varint(kind)) => bpe = kind == 2,
                (40, Field::Varint(value)) => self.unknown = id(value),
                (41, Field::Varint(value)) => self.bos = id(value),
                (42, Field::Varint(value)) => self.eos = id(value),
                _ => {}
            }
        }
        if bpe { Ok(()) } else { Err("not of type BPE".to_owned()) }
    }
}

#[derive(Debug)]
enum Field<'a> {
    Varint(u64),
    Fixed32([u8; 4]),
    Fixed64,
    Bytes(&'a [u8]),
}

/// The fields of a message that are still to come.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn next(&mut self) -> Result<Option<(u64, Field<'a>)>, String> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let key = self.varint()?;
        let field = match key & 7 {
            0 => Field::Varint(self.varint()?),
            1 => {
                self.take(8)?;
                Field::Fixed64
            }
            2 => {
                let len = self.varint()?;
                Field::Bytes(self.take(usize::try_from(len).unwrap_or(usize::MAX))?)
            }
            5 => {
                let bytes = self.take(4)?;
                Field::Fixed32([bytes[0], bytes[1], bytes[2], bytes[3]])
            }
            other => return Err(format!("wire type {other}; is this a SentencePiece model?")),
        };
        Ok(Some((key >> 3, field)))
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err("a number of more than ten bytes".to_owned())
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or("truncated")?;
        self.0 = rest;
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(number: u8, bytes: &[u8]) -> Vec<u8> {
        let mut out = vec![number << 3 | 2, bytes.len() as u8];
        out.extend(bytes);
        out
    }

    fn model() -> Vec<u8> {
        let mut unknown = message(1, b"<unk>");
        unknown.extend([3 << 3, 2]);
        let mut word = message(1, "▁a".as_bytes());
        word.push(2 << 3 | 5);
        word.extend((-1.5_f32).to_le_bytes());
        let mut file = message(1, &unknown);
        file.extend(message(1, &word));
        // Model type 2, bos −1 (ten bytes), eos 1.
        let mut settings = vec![3 << 3, 2, 0xc8, 2];
        settings.extend([0xff; 9]);
        settings.extend([1, 0xd0, 2, 1]);
        file.extend(message(2, &settings));
        file
    }

    #[test]
    fn pieces_and_settings_are_read() {
        let model = parse(&model()).unwrap();
        assert_eq!(model.pieces[0], Piece { text: "<unk>".to_owned(), score: 0.0, kind: 2 });
        assert_eq!(model.pieces[1], Piece { text: "▁a".to_owned(), score: -1.5, kind: 1 });
        assert_eq!((model.unknown, model.bos, model.eos), (Some(0), None, Some(1)));
    }

    #[test]
    fn no_prefix_of_a_model_panics() {
        let model = model();
        for len in 0..model.len() {
            drop(parse(&model[..len]));
        }
        assert!(parse(&model[..model.len() - 1]).unwrap_err().contains("truncated"));
        assert!(parse(b"IQ== 0\n").unwrap_err().contains("tiktoken"));
    }
}
