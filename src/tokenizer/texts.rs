//! The texts of all tokens in one buffer, and the ids by text.

use rustc_hash::FxHasher;
use std::hash::Hasher;

use super::merge::NO_TOKEN;

/// The bytes of each token, one after the other: 200,000 tokens take 2 MB.
#[derive(Debug)]
pub(super) struct Texts {
    bytes: Vec<u8>,
    /// Where each token begins, and the end of the last.
    starts: Vec<u32>,
}

impl Texts {
    pub(super) fn with_capacity(tokens: usize) -> Texts {
        let mut starts = Vec::with_capacity(tokens + 1);
        starts.push(0);
        Texts { bytes: Vec::new(), starts }
    }

    /// Appends the token that `write` writes, and gives its length.
    pub(super) fn push(&mut self, write: impl FnOnce(&mut Vec<u8>)) -> usize {
        let before = self.bytes.len();
        write(&mut self.bytes);
        let end = u32::try_from(self.bytes.len()).expect("tokens and their lengths are bounded");
        self.starts.push(end);
        self.bytes.len() - before
    }

    pub(super) fn shrink(&mut self) {
        self.bytes.shrink_to_fit();
    }

    pub(super) fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// The bytes of a token; none for an id beyond the vocabulary.
    pub(super) fn get(&self, token: u32) -> Option<&[u8]> {
        let at = token as usize;
        let (start, end) = (*self.starts.get(at)?, *self.starts.get(at.checked_add(1)?)?);
        Some(&self.bytes[start as usize..end as usize])
    }
}

/// Ids by text: open addressing over the texts themselves, 4 bytes a place.
#[derive(Debug)]
pub(super) struct TextTable {
    places: Vec<u32>,
}

impl TextTable {
    /// Room for `tokens` entries, at most half full.
    pub(super) fn with_capacity(tokens: usize) -> TextTable {
        TextTable { places: vec![NO_TOKEN; (tokens * 2).next_power_of_two().max(2)] }
    }

    /// Adds a token. The first of two with equal bytes stays.
    pub(super) fn insert(&mut self, texts: &Texts, token: u32) {
        let Some(text) = texts.get(token) else { return };
        let place = self.place(texts, text);
        if self.places[place] == NO_TOKEN {
            self.places[place] = token;
        }
    }

    /// The token with these bytes.
    pub(super) fn get(&self, texts: &Texts, text: &[u8]) -> Option<u32> {
        let token = self.places[self.place(texts, text)];
        (token != NO_TOKEN).then_some(token)
    }

    /// Where `text` is, or the free place where it would be.
    fn place(&self, texts: &Texts, text: &[u8]) -> usize {
        let mask = self.places.len() - 1;
        let mut hasher = FxHasher::default();
        hasher.write(text);
        let mut place = hasher.finish() as usize & mask;
        loop {
            let token = self.places[place];
            if token == NO_TOKEN || texts.get(token) == Some(text) {
                return place;
            }
            place = (place + 1) & mask;
        }
    }
}
