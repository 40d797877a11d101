//! Byte-level byte-pair encoding.

use std::borrow::Cow;

use rustc_hash::FxHashMap;

use super::merge::{Joined, Joins, Merger, NO_TOKEN, Symbol};
use super::split::{Pieces, Splitter};
use super::texts::{TextTable, Texts};
use super::vocabulary::TokenKind;
use super::{PIECE_BYTES_MAX, TokenizerError, check_count, excerpt};
use crate::units::TokenId;

/// The rules of a byte-pair vocabulary.
#[derive(Debug)]
pub(super) struct BytePairs {
    splitter: Splitter,
    pieces: Pieces,
    /// The token of each byte, if it has one.
    bytes: Box<[u32; 256]>,
    pairs: PairTable,
}

impl BytePairs {
    pub(super) fn new(
        splitter: Splitter,
        merges: &[Cow<'_, str>],
        ids: &FxHashMap<&str, u32>,
        kinds: &[TokenKind],
        texts: &Texts,
        table: &TextTable,
    ) -> Result<BytePairs, TokenizerError> {
        let mut bytes = Box::new([NO_TOKEN; 256]);
        for (byte, token) in (0..=u8::MAX).zip(bytes.iter_mut()) {
            *token = table.get(texts, &[byte]).unwrap_or(NO_TOKEN);
        }
        let pairs = PairTable::new(splitter, merges, ids, kinds)?;
        Ok(BytePairs { splitter, pieces: Pieces::new(splitter), bytes, pairs })
    }

    pub(super) fn encode(
        &self,
        text: &str,
        texts: &Texts,
        table: &TextTable,
        merger: &mut Merger,
        tokens: &mut Vec<TokenId>,
    ) -> Result<(), TokenizerError> {
        self.pieces.split(text, |piece| {
            let piece = piece.as_bytes();
            if piece.len() > PIECE_BYTES_MAX {
                let (bytes, max) = (piece.len(), PIECE_BYTES_MAX);
                return Err(TokenizerError::PieceTooLong { bytes, max });
            }
            if self.splitter.takes_whole_pieces()
                && let Some(token) = table.get(texts, piece)
            {
                tokens.push(TokenId(token));
                return Ok(());
            }
            merger.symbols.clear();
            // A byte without token is dropped before merging, so its neighbours may join: the
            // behaviour of `tokenizers`.
            merger.symbols.extend((0u32..).zip(piece).filter_map(|(at, byte)| {
                let token = self.bytes[usize::from(*byte)];
                (token != NO_TOKEN).then_some(Symbol { start: at, end: at + 1, token })
            }));
            merger.merge(piece, &self.pairs);
            tokens.extend(merger.symbols.iter().map(|symbol| TokenId(symbol.token)));
            Ok(())
        })
    }
}

/// By the two tokens of a pair: what joining them gives. 17 bytes a place.
#[derive(Debug)]
struct PairTable(FxHashMap<u64, (u32, u32)>);

impl PairTable {
    fn new(
        splitter: Splitter,
        merges: &[Cow<'_, str>],
        ids: &FxHashMap<&str, u32>,
        kinds: &[TokenKind],
    ) -> Result<PairTable, TokenizerError> {
        if merges.is_empty() {
            return Err(TokenizerError::NoMerges);
        }
        check_count("tokenizer.ggml.merges", merges.len(), MERGES_MAX)?;
        let mut pairs = FxHashMap::with_capacity_and_hasher(merges.len(), Default::default());
        let mut join = String::new();
        let mut before = (0, NO_TOKEN);
        for (at, merge) in merges.iter().enumerate() {
            let malformed = || TokenizerError::Merge { rank: at, text: excerpt(merge) };
            let (left, right) = merge.split_once(' ').ok_or_else(malformed)?;
            join.clear();
            join.push_str(left);
            join.push_str(right);
            let id = |text: &str| ids.get(text).copied().ok_or_else(malformed);
            let (left, right, joined) = (id(left)?, id(right)?, id(&join)?);
            if kinds[joined as usize] == TokenKind::Control {
                return Err(TokenizerError::ControlMerge { rank: at, text: excerpt(&join) });
            }
            // tiktoken ranks a pair by what it makes; its lists name the several splits of one token
            // next to each other, and these are equal in rank.
            let same = splitter.ranks_by_result() && before.1 == joined;
            let rank = if same { before.0 } else { at as u32 };
            before = (rank, joined);
            pairs.entry(key(left, right)).or_insert((rank, joined));
        }
        Ok(PairTable(pairs))
    }
}

impl Joins for PairTable {
    fn join(&self, _piece: &[u8], left: &Symbol, right: &Symbol) -> Option<Joined> {
        let (rank, token) = *self.0.get(&key(left.token, right.token))?;
        Some(Joined { rank, token: TokenId(token) })
    }
}

fn key(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

/// Ten times the list of Llama 4.
const MERGES_MAX: usize = 1 << 22;
