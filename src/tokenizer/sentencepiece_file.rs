//! SentencePiece's `tokenizer.model`, a protocol buffer: pieces with score and type, and the few
//! settings that change ids.

use std::borrow::Cow;

use super::import::ImportError;
use super::vocabulary::{Scheme, TokenKind, Vocabulary};

/// Reads the file.
pub(super) fn read(bytes: &[u8]) -> Result<Vocabulary<'static>, ImportError> {
    let mut file = File::default();
    for field in Fields(bytes) {
        match field? {
            (1, Field::Bytes(piece)) => file.piece(piece)?,
            (2, Field::Bytes(settings)) => file.trainer(settings)?,
            (3, Field::Bytes(settings)) => file.normalizer(settings)?,
            _ => {}
        }
    }
    let File { tokens, kinds, scores, space_prefix, bos, eos, padding } = file;
    if tokens.is_empty() {
        return Err(malformed("no pieces"));
    }
    let unknown = kinds.iter().zip(0..).find(|(kind, _)| **kind == TokenKind::Unknown);
    // An id of -1, and any other beyond the pieces, means that there is none.
    let id = |id: u64| u32::try_from(id).ok().filter(|id| (*id as usize) < tokens.len());
    Ok(Vocabulary {
        bos: id(bos),
        eos: id(eos),
        unknown: unknown.map(|(_, id)| id),
        padding: id(padding),
        adds_bos: true,
        ends: Vec::new(),
        scheme: Scheme::SentencePiece { scores, space_prefix },
        tokens,
        kinds,
    })
}

struct File {
    tokens: Vec<Cow<'static, str>>,
    kinds: Vec<TokenKind>,
    scores: Vec<f32>,
    space_prefix: bool,
    bos: u64,
    eos: u64,
    padding: u64,
}

impl Default for File {
    /// The defaults of the format.
    fn default() -> File {
        File {
            tokens: Vec::new(),
            kinds: Vec::new(),
            scores: Vec::new(),
            space_prefix: true,
            bos: 1,
            eos: 2,
            padding: u64::MAX,
        }
    }
}

impl File {
    fn piece(&mut self, bytes: &[u8]) -> Result<(), ImportError> {
        let (mut text, mut score, mut kind) = (None, 0.0, TokenKind::Normal);
        for field in Fields(bytes) {
            match field? {
                (1, Field::Bytes(bytes)) => {
                    let utf8 = std::str::from_utf8(bytes);
                    text = Some(utf8.map_err(|_| malformed("a piece is not UTF-8"))?.to_owned());
                }
                (2, Field::Fixed32(bits)) => score = f32::from_bits(bits),
                (3, Field::Varint(number)) => {
                    let known = i32::try_from(number).ok().and_then(TokenKind::from_number);
                    kind = known.ok_or_else(|| malformed("a piece has an unknown type"))?;
                }
                _ => {}
            }
        }
        self.tokens.push(Cow::Owned(text.ok_or_else(|| malformed("a piece has no text"))?));
        self.scores.push(score);
        self.kinds.push(kind);
        Ok(())
    }

    fn trainer(&mut self, bytes: &[u8]) -> Result<(), ImportError> {
        for field in Fields(bytes) {
            match field? {
                // 1 is the unigram model; 2 the byte pairs that are built in.
                (3, Field::Varint(model)) if model != 2 => {
                    let what = format!("model type {model} (only 2, byte pairs)");
                    return Err(ImportError::NotSupported { file: FILE, what });
                }
                (41, Field::Varint(id)) => self.bos = id,
                (42, Field::Varint(id)) => self.eos = id,
                (43, Field::Varint(id)) => self.padding = id,
                _ => {}
            }
        }
        Ok(())
    }

    fn normalizer(&mut self, bytes: &[u8]) -> Result<(), ImportError> {
        let mut removes_whitespace = true;
        for field in Fields(bytes) {
            match field? {
                (2, Field::Bytes(map)) if !map.is_empty() => {
                    let what = "a normalizer with a character map".to_owned();
                    return Err(ImportError::NotSupported { file: FILE, what });
                }
                (3, Field::Varint(flag)) => self.space_prefix = flag != 0,
                (4, Field::Varint(flag)) => removes_whitespace = flag != 0,
                _ => {}
            }
        }
        if removes_whitespace {
            let what = "a normalizer that removes extra whitespace".to_owned();
            return Err(ImportError::NotSupported { file: FILE, what });
        }
        Ok(())
    }
}

/// A field's value by its wire type; the 8-byte type is skipped.
enum Field<'a> {
    Bytes(&'a [u8]),
    Fixed32(u32),
    Fixed64,
    Varint(u64),
}

/// The fields of a message with their numbers. Ends after the first error.
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Field<'a>), ImportError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field.ok_or_else(|| malformed("neither a tiktoken list nor a SentencePiece model")))
    }
}

impl<'a> Fields<'a> {
    fn field(&mut self) -> Option<(u64, Field<'a>)> {
        let key = self.varint()?;
        let field = match key & 7 {
            0 => Field::Varint(self.varint()?),
            1 => self.take(8).map(|_| Field::Fixed64)?,
            2 => {
                let length = usize::try_from(self.varint()?).ok()?;
                Field::Bytes(self.take(length)?)
            }
            5 => Field::Fixed32(u32::from_le_bytes(self.take(4)?.try_into().ok()?)),
            _ => return None,
        };
        Some((key >> 3, field))
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }
}

fn malformed(reason: &str) -> ImportError {
    ImportError::Malformed { file: FILE, reason: reason.to_owned() }
}

const FILE: &str = "tokenizer.model";

#[cfg(test)]
mod tests {
    use super::read;
    use crate::tokenizer::{Scheme, TokenKind};

    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        [&[number << 3 | 2, bytes.len() as u8], bytes].concat()
    }

    fn piece(text: &str, score: f32, kind: u8) -> Vec<u8> {
        let mut bytes = field(1, text.as_bytes());
        bytes.push(2 << 3 | 5);
        bytes.extend(score.to_le_bytes());
        bytes.extend([3 << 3, kind]);
        field(1, &bytes)
    }

    /// `model_type` BPE; no character map, blank before the text, whitespace kept.
    fn settings() -> Vec<u8> {
        [field(2, &[3 << 3, 2]), field(3, &[3 << 3, 1, 4 << 3, 0])].concat()
    }

    #[test]
    fn reads_pieces_and_settings() {
        let file = [
            piece("<unk>", 0.0, 2),
            piece("<s>", 0.0, 3),
            piece("</s>", 0.0, 3),
            piece("▁a", -1.5, 1),
            settings(),
        ]
        .concat();
        let vocabulary = read(&file).unwrap();
        assert_eq!(vocabulary.tokens, ["<unk>", "<s>", "</s>", "▁a"]);
        assert_eq!(vocabulary.kinds[2..], [TokenKind::Control, TokenKind::Normal]);
        assert_eq!((vocabulary.bos, vocabulary.eos), (Some(1), Some(2)));
        assert_eq!((vocabulary.unknown, vocabulary.padding), (Some(0), None));
        let scores = vec![0.0, 0.0, 0.0, -1.5];
        assert_eq!(vocabulary.scheme, Scheme::SentencePiece { scores, space_prefix: true });
    }

    #[test]
    fn refuses_what_it_cannot_do() {
        let error = |bytes: &[u8]| read(bytes).unwrap_err().to_string();
        let unigram = [piece("a", 0.0, 1), field(2, &[3 << 3, 1])].concat();
        assert!(error(&unigram).contains("model type 1"));
        let map = [piece("a", 0.0, 1), field(3, &[2 << 3 | 2, 1, 0])].concat();
        assert!(error(&map).contains("character map"));
        assert!(error(b"").contains("no pieces"));
        assert!(error(b"\xFF\xFF").contains("neither a tiktoken list"));
        assert!(error(&[10, 200]).contains("neither a tiktoken list"));
    }
}
