//! SentencePiece's byte-pair model, as in Llama 2: characters are joined by the score of the result.
//!
//! Inside this module `▁` (U+2581) is a blank: SentencePiece makes no difference between the two.

use super::merge::{Joined, Joins, Merger, NO_TOKEN, Symbol};
use super::texts::{TextTable, Texts};
use super::vocabulary::{TokenKind, Vocabulary};
use super::{PIECE_BYTES_MAX, TokenizerError, excerpt};
use crate::units::TokenId;

/// The rules of a SentencePiece vocabulary.
#[derive(Debug)]
pub(super) struct SentencePiece {
    /// By token: its place in the order of falling scores, equal for equal scores.
    ranks: Vec<u32>,
    /// The token of each byte, for text without token.
    bytes: Box<[u32; 256]>,
    unknown: Option<TokenId>,
    space_prefix: bool,
    /// Whether some token has a blank after another character. If none has, a text may be cut before
    /// its blanks without changing the result.
    crosses_words: bool,
}

impl SentencePiece {
    pub(super) fn new(
        vocabulary: &Vocabulary<'_>,
        scores: &[f32],
        space_prefix: bool,
        kinds: &[TokenKind],
        texts: &Texts,
    ) -> Result<SentencePiece, TokenizerError> {
        let tokens = vocabulary.tokens.len();
        if scores.len() != tokens {
            let (key, count) = ("tokenizer.ggml.scores", scores.len());
            return Err(TokenizerError::EntryCount { key, count, tokens });
        }
        let mut bytes = Box::new([NO_TOKEN; 256]);
        let mut crosses_words = false;
        let mut unknown = vocabulary.unknown;
        for (id, kind) in (0u32..).zip(kinds) {
            let text = texts.get(id).unwrap_or_default();
            match kind {
                TokenKind::Byte => bytes[usize::from(text[0])] = id,
                TokenKind::Normal => crosses_words |= has_inner_blank(text),
                TokenKind::Unknown => unknown = unknown.or(Some(id)),
                _ => {}
            }
        }
        let (ranks, unknown) = (ranks(scores)?, unknown.map(TokenId));
        Ok(SentencePiece { ranks, bytes, unknown, space_prefix, crosses_words })
    }

    pub(super) fn has_space_prefix(&self) -> bool {
        self.space_prefix
    }

    pub(super) fn encode(
        &self,
        text: &str,
        texts: &Texts,
        table: &TextTable,
        merger: &mut Merger,
        tokens: &mut Vec<TokenId>,
    ) -> Result<(), TokenizerError> {
        let mut blanks = String::with_capacity(text.len() + 1);
        if self.space_prefix {
            blanks.push(' ');
        }
        blanks.extend(text.chars().map(|char| if char == BLANK { ' ' } else { char }));
        let mut rest = blanks.as_str();
        while !rest.is_empty() {
            let word = if self.crosses_words { rest.len() } else { first_word(rest) };
            let (piece, after) = rest.split_at(word);
            if piece.len() > PIECE_BYTES_MAX {
                let (bytes, max) = (piece.len(), PIECE_BYTES_MAX);
                return Err(TokenizerError::PieceTooLong { bytes, max });
            }
            self.encode_piece(piece, texts, table, merger, tokens);
            rest = after;
        }
        Ok(())
    }

    fn encode_piece(
        &self,
        piece: &str,
        texts: &Texts,
        table: &TextTable,
        merger: &mut Merger,
        tokens: &mut Vec<TokenId>,
    ) {
        merger.symbols.clear();
        merger.symbols.extend(piece.char_indices().map(|(start, char)| {
            let end = start + char.len_utf8();
            let token = table.get(texts, &piece.as_bytes()[start..end]).unwrap_or(NO_TOKEN);
            Symbol { start: start as u32, end: end as u32, token }
        }));
        merger.merge(piece.as_bytes(), &ByScore { ranks: &self.ranks, texts, table });
        for symbol in &merger.symbols {
            if symbol.token != NO_TOKEN {
                tokens.push(TokenId(symbol.token));
                continue;
            }
            for byte in &piece.as_bytes()[symbol.start as usize..symbol.end as usize] {
                let token = self.bytes[usize::from(*byte)];
                match token {
                    NO_TOKEN => tokens.extend(self.unknown),
                    _ => tokens.push(TokenId(token)),
                }
            }
        }
    }
}

struct ByScore<'a> {
    ranks: &'a [u32],
    texts: &'a Texts,
    table: &'a TextTable,
}

impl Joins for ByScore<'_> {
    fn join(&self, piece: &[u8], left: &Symbol, right: &Symbol) -> Option<Joined> {
        let text = &piece[left.start as usize..right.end as usize];
        let token = self.table.get(self.texts, text)?;
        Some(Joined { rank: self.ranks[token as usize], token: TokenId(token) })
    }
}

/// Appends the bytes that an ordinary token stands for.
pub(super) fn push_bytes(text: &str, out: &mut Vec<u8>) {
    for char in text.chars() {
        let char = if char == BLANK { ' ' } else { char };
        out.extend_from_slice(char.encode_utf8(&mut [0; 4]).as_bytes());
    }
}

/// The byte of a byte token, `<0x0A>`.
pub(super) fn byte_of(id: u32, text: &str) -> Result<u8, TokenizerError> {
    let digits = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits
        .filter(|digits| digits.len() == 2 && digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
        .and_then(|digits| u8::from_str_radix(digits, 16).ok())
        .ok_or_else(|| TokenizerError::ByteToken { id, text: excerpt(text) })
}

/// The length of the first word, with the blanks before it.
fn first_word(text: &str) -> usize {
    let blanks = text.len() - text.trim_start_matches(' ').len();
    text[blanks..].find(' ').map_or(text.len(), |length| blanks + length)
}

fn has_inner_blank(text: &[u8]) -> bool {
    text.windows(2).any(|pair| pair[0] != b' ' && pair[1] == b' ')
}

fn ranks(scores: &[f32]) -> Result<Vec<u32>, TokenizerError> {
    if let Some(id) = (0..).zip(scores).find_map(|(id, score)| score.is_nan().then_some(id)) {
        return Err(TokenizerError::Score { id });
    }
    let mut order: Vec<u32> = (0u32..).take(scores.len()).collect();
    let score = |id: u32| scores[id as usize];
    order.sort_unstable_by(|a, b| score(*b).total_cmp(&score(*a)));
    let mut ranks = vec![0; scores.len()];
    let mut rank = 0;
    for pair in order.windows(2) {
        // Not `total_cmp`: 0 and -0 are one score.
        rank += u32::from(score(pair[0]) != score(pair[1]));
        ranks[pair[1] as usize] = rank;
    }
    Ok(ranks)
}

const BLANK: char = '\u{2581}';
