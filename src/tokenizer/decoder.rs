//! Tokens to text, one at a time, without ever giving half a character out.

use super::Tokenizer;
use crate::units::TokenId;

/// Holds back the bytes of a character until all have come. Bytes that are not UTF-8 become U+FFFD,
/// one for each maximal ill-formed sequence, as `String::from_utf8_lossy` does.
#[derive(Clone, Debug, Default)]
pub struct Decoder {
    held: Vec<u8>,
    /// Whether blanks that SentencePiece put are taken off: before the text and, as encoding puts
    /// one there too, after each control token.
    drops_blanks: bool,
    at_blank: bool,
}

impl Decoder {
    /// For text that continues other text, such as a reply.
    pub fn new() -> Decoder {
        Decoder::default()
    }

    /// For a text from its start: the blanks that SentencePiece puts are taken off.
    pub fn at_start() -> Decoder {
        Decoder { held: Vec::new(), drops_blanks: true, at_blank: true }
    }

    /// Appends to `out` the text that `token` completes. A control token gives no text and ends a
    /// character that is not complete.
    pub fn push(&mut self, tokenizer: &Tokenizer, token: TokenId, out: &mut String) {
        if tokenizer.is_control(token) {
            self.at_blank = self.drops_blanks;
            return self.finish(out);
        }
        let mut bytes = tokenizer.token_bytes(token);
        if std::mem::take(&mut self.at_blank) && tokenizer.has_space_prefix() {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        self.held.extend_from_slice(bytes);
        let complete = complete_len(&self.held);
        out.push_str(&String::from_utf8_lossy(&self.held[..complete]));
        self.held.drain(..complete);
    }

    /// Appends U+FFFD if a character is not complete.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&String::from_utf8_lossy(&self.held));
        self.held.clear();
    }

    /// Whether bytes of a character are held back.
    pub fn is_holding(&self) -> bool {
        !self.held.is_empty()
    }
}

/// How many bytes of `bytes` are decided: all but a character at the end that may still go on.
fn complete_len(bytes: &[u8]) -> usize {
    let mut from = 0;
    loop {
        match std::str::from_utf8(&bytes[from..]) {
            Ok(_) => return bytes.len(),
            Err(error) => match error.error_len() {
                Some(ill_formed) => from += error.valid_up_to() + ill_formed,
                None => return from + error.valid_up_to(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop_assert_eq, proptest};

    use super::complete_len;

    #[test]
    fn holds_only_what_may_go_on() {
        assert_eq!(complete_len(b"abc"), 3);
        assert_eq!(complete_len("é".as_bytes()), 2);
        assert_eq!(complete_len(b"a\xC3"), 1);
        assert_eq!(complete_len(b"\xF0\x9F\x98"), 0);
        assert_eq!(complete_len(b"\xFFa\xC3("), 4);
        assert_eq!(complete_len(b"\xE2\x28\xF0\x9F"), 2);
    }

    proptest! {
        #[test]
        fn pieces_give_what_the_whole_gives(bytes in proptest::collection::vec(any::<u8>(), 0..24),
                                            cuts in proptest::collection::vec(1usize..5, 24)) {
            let (mut held, mut out, mut at) = (Vec::new(), String::new(), 0);
            for cut in cuts {
                let end = (at + cut).min(bytes.len());
                held.extend_from_slice(&bytes[at..end]);
                let complete = complete_len(&held);
                out.push_str(&String::from_utf8_lossy(&held[..complete]));
                held.drain(..complete);
                at = end;
            }
            out.push_str(&String::from_utf8_lossy(&held));
            prop_assert_eq!(out, String::from_utf8_lossy(&bytes));
        }
    }
}
