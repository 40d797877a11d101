//! The merge loop: joins neighbouring symbols, best rank first, leftmost among equals.
//!
//! One loop serves byte-pair encoding (ranks belong to pairs of tokens) and SentencePiece (ranks
//! belong to the joined text). Short pieces, nearly all of them, are merged by scanning for the best
//! pair: no allocation, and quicker than a heap up to about 48 symbols. Longer pieces use a heap
//! and a linked list, so that a word of a megabyte costs n log n.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::units::TokenId;

/// A run of bytes of the piece that is, so far, one symbol. `token` is `NO_TOKEN` for text that is
/// not in the vocabulary.
#[derive(Clone, Copy, Debug)]
pub(super) struct Symbol {
    pub(super) start: u32,
    pub(super) end: u32,
    pub(super) token: u32,
}

/// What two neighbours would become; the smallest rank is joined first.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Joined {
    pub(super) rank: u32,
    pub(super) token: TokenId,
}

/// Says whether two neighbours may be joined.
pub(super) trait Joins {
    fn join(&self, piece: &[u8], left: &Symbol, right: &Symbol) -> Option<Joined>;
}

/// Buffers of the loop, kept between pieces.
#[derive(Debug, Default)]
pub(super) struct Merger {
    /// In: the symbols that the piece begins as. Out: those that are left.
    pub(super) symbols: Vec<Symbol>,
    pairs: Vec<Option<Joined>>,
    links: Vec<Link>,
    heap: BinaryHeap<Reverse<Candidate>>,
}

impl Merger {
    /// Merges `self.symbols` until no neighbours can be joined.
    pub(super) fn merge(&mut self, piece: &[u8], joins: &impl Joins) {
        if self.symbols.len() <= SCAN_SYMBOLS_MAX {
            self.merge_by_scan(piece, joins);
        } else {
            self.merge_by_heap(piece, joins);
        }
    }

    fn merge_by_scan(&mut self, piece: &[u8], joins: &impl Joins) {
        let Merger { symbols, pairs, .. } = self;
        let join = |symbols: &[Symbol], at: usize| {
            joins.join(piece, symbols.get(at)?, symbols.get(at + 1)?)
        };
        pairs.clear();
        pairs.extend((0..symbols.len()).map(|at| join(symbols, at)));
        loop {
            let best = pairs.iter().enumerate().filter_map(|(at, pair)| Some((at, (*pair)?)));
            // `min_by_key` gives the first of equals: the leftmost.
            let Some((at, joined)) = best.min_by_key(|(_, joined)| joined.rank) else { return };
            symbols[at].end = symbols[at + 1].end;
            symbols[at].token = joined.token.0;
            symbols.remove(at + 1);
            pairs.remove(at + 1);
            pairs[at] = join(symbols, at);
            if at > 0 {
                pairs[at - 1] = join(symbols, at - 1);
            }
        }
    }

    fn merge_by_heap(&mut self, piece: &[u8], joins: &impl Joins) {
        let Merger { symbols, links, heap, .. } = self;
        let count = symbols.len() as u32;
        links.clear();
        links.extend((0..count).map(|at| Link {
            previous: at.wrapping_sub(1),
            next: if at + 1 < count { at + 1 } else { NONE },
        }));
        heap.clear();
        let candidate = |symbols: &[Symbol], left: u32, right: u32| {
            let (l, r) = (&symbols[left as usize], &symbols[right as usize]);
            let Joined { rank, token } = joins.join(piece, l, r)?;
            Some(Reverse(Candidate { rank, left, right, end: r.end, token: token.0 }))
        };
        heap.extend((1..count).filter_map(|right| candidate(symbols, right - 1, right)));
        while let Some(Reverse(best)) = heap.pop() {
            let (left, right) = (best.left as usize, best.right as usize);
            // A candidate is stale once one of its sides was joined with something else.
            let current = links[left].next == best.right && symbols[right].end == best.end;
            if !current {
                continue;
            }
            symbols[left].end = best.end;
            symbols[left].token = best.token;
            let next = links[right].next;
            links[left].next = next;
            links[right] = Link { previous: GONE, next: GONE };
            if next != NONE {
                links[next as usize].previous = best.left;
                heap.extend(candidate(symbols, best.left, next));
            }
            let previous = links[left].previous;
            if previous != NONE {
                heap.extend(candidate(symbols, previous, best.left));
            }
        }
        let mut at = 0;
        symbols.retain(|_| {
            at += 1;
            links[at - 1].next != GONE
        });
        // A long piece is rare: what it needed is not kept.
        *links = Vec::new();
        *heap = BinaryHeap::new();
    }
}

#[derive(Clone, Copy, Debug)]
struct Link {
    previous: u32,
    next: u32,
}

/// Ordered by rank, then by place.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Candidate {
    rank: u32,
    left: u32,
    right: u32,
    end: u32,
    token: u32,
}

/// Marks a symbol without token.
pub(super) const NO_TOKEN: u32 = u32::MAX;
const NONE: u32 = u32::MAX;
const GONE: u32 = u32::MAX - 1;
const SCAN_SYMBOLS_MAX: usize = 48;

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop_assert_eq, proptest};

    use super::{Joined, Joins, Merger, Symbol};
    use crate::units::TokenId;

    /// Joins texts of equal first letters with a rank that only depends on the two lengths.
    struct Toy;

    impl Joins for Toy {
        fn join(&self, piece: &[u8], left: &Symbol, right: &Symbol) -> Option<Joined> {
            let (l, r) = (left.end - left.start, right.end - right.start);
            let same = piece[left.start as usize] == piece[right.start as usize];
            (same || (l + r) % 5 == 2)
                .then_some(Joined { rank: (l * 7 + r * 3) % 11, token: TokenId(l + r) })
        }
    }

    fn symbols(piece: &[u8]) -> Vec<Symbol> {
        (0..piece.len() as u32).map(|at| Symbol { start: at, end: at + 1, token: 1 }).collect()
    }

    proptest! {
        #[test]
        fn heap_and_scan_agree(bits in proptest::collection::vec(any::<bool>(), 0..120)) {
            let piece: Vec<u8> = bits.iter().map(|bit| b'a' + u8::from(*bit)).collect();
            let mut scan = Merger { symbols: symbols(&piece), ..Merger::default() };
            scan.merge_by_scan(&piece, &Toy);
            let mut heap = Merger { symbols: symbols(&piece), ..Merger::default() };
            heap.merge_by_heap(&piece, &Toy);
            let ends = |merger: &Merger| {
                merger.symbols.iter().map(|s| (s.start, s.end, s.token)).collect::<Vec<_>>()
            };
            prop_assert_eq!(ends(&scan), ends(&heap));
        }
    }
}
