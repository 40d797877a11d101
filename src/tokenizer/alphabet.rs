//! GPT-2's byte alphabet: each byte written as one printable character.
//!
//! Vocabularies of byte-level BPE are text files, so the bytes that are no printable Latin-1
//! character (blanks, control bytes, 0x7F..=0xA0, 0xAD) were moved to U+0100 and up, in order.

/// The character that stands for `byte`.
pub(crate) fn char_of(byte: u8) -> char {
    let shifted = match byte {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => return char::from(byte),
        0x00..=0x20 => 0x100 + u32::from(byte),
        0x7F..=0xA0 => 0x121 + u32::from(byte - 0x7F),
        0xAD => 0x143,
    };
    char::from_u32(shifted).expect("U+0100..=U+0143 are characters")
}

/// The byte that `char` stands for; none for a character outside of the alphabet.
pub(crate) fn byte_of(char: char) -> Option<u8> {
    let byte = match char as u32 {
        code @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => code,
        code @ 0x100..=0x120 => code - 0x100,
        code @ 0x121..=0x142 => code - 0x121 + 0x7F,
        0x143 => 0xAD,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

/// Appends the bytes that `text` stands for. A character outside of the alphabet stands for its
/// own UTF-8 bytes: some vocabularies hold such tokens.
pub(crate) fn push_bytes(text: &str, out: &mut Vec<u8>) {
    for char in text.chars() {
        match byte_of(char) {
            Some(byte) => out.push(byte),
            None => out.extend_from_slice(char.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
}

/// Writes bytes in the alphabet.
pub(crate) fn text_of(bytes: &[u8]) -> String {
    bytes.iter().copied().map(char_of).collect()
}

#[cfg(test)]
mod tests {
    use super::{byte_of, char_of, push_bytes, text_of};

    #[test]
    fn every_byte_comes_back() {
        for byte in 0..=u8::MAX {
            assert_eq!(byte_of(char_of(byte)), Some(byte));
        }
    }

    #[test]
    fn known_characters() {
        assert_eq!(text_of(b" a\n\xAD\x7F"), "ĠaĊŃġ");
        let mut bytes = Vec::new();
        push_bytes("Ġ日", &mut bytes);
        assert_eq!(bytes, " 日".as_bytes());
    }
}
