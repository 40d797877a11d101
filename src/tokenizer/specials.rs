//! Finding special tokens (control and user-defined ones) in text.

use rustc_hash::FxHashMap;

use super::merge::NO_TOKEN;
use super::vocabulary::TokenKind;
use crate::units::TokenId;

/// A trie over the texts of the special tokens. Searching costs, for each byte that begins one, the
/// length of the longest match; that length is bounded by `Tokenizer`'s check of the texts.
#[derive(Debug, Default)]
pub(super) struct SpecialTrie {
    edges: FxHashMap<(u32, u8), u32>,
    /// By node: what ends there.
    ends: Vec<End>,
    has_user_defined: bool,
}

#[derive(Clone, Copy, Debug)]
struct End {
    token: u32,
    is_control: bool,
    /// Whether the node lies on the way to a control token.
    leads_to_control: bool,
}

/// A special token inside a text.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Found {
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) token: TokenId,
}

impl SpecialTrie {
    pub(super) fn insert(&mut self, text: &str, token: u32, kind: TokenKind) {
        if self.ends.is_empty() {
            self.ends.push(NOTHING);
        }
        let is_control = kind == TokenKind::Control;
        let mut node = 0;
        for byte in text.bytes() {
            let next = self.ends.len() as u32;
            node = *self.edges.entry((node, byte)).or_insert(next);
            if node == next {
                self.ends.push(NOTHING);
            }
            self.ends[node as usize].leads_to_control |= is_control;
        }
        let end = &mut self.ends[node as usize];
        (end.token, end.is_control) = (token, is_control);
        self.has_user_defined |= kind == TokenKind::UserDefined;
    }

    /// The control token whose text is `text`.
    pub(super) fn control(&self, text: &str) -> Option<TokenId> {
        let step = |node, byte| self.edges.get(&(node, byte)).copied();
        let node = text.bytes().try_fold(0, step)?;
        let end = self.ends.get(node as usize)?;
        end.is_control.then_some(TokenId(end.token))
    }

    /// Whether `text` begins with a control token, or is the beginning of one.
    pub(super) fn may_begin_control(&self, text: &str) -> bool {
        let mut node = 0;
        for byte in text.bytes() {
            let Some(next) = self.edges.get(&(node, byte)) else { return false };
            node = *next;
            let end = self.ends[node as usize];
            if end.is_control || !end.leads_to_control {
                return end.is_control;
            }
        }
        node != 0
    }

    /// The first special token at or after `from`, the longest if several begin there. Control
    /// tokens count only if `with_control`.
    pub(super) fn find(&self, text: &str, from: usize, with_control: bool) -> Option<Found> {
        if self.edges.is_empty() || !(with_control || self.has_user_defined) {
            return None;
        }
        let bytes = text.as_bytes();
        (from..bytes.len()).find_map(|start| {
            let (end, token) = self.longest(&bytes[start..], with_control)?;
            Some(Found { start, end: start + end, token: TokenId(token) })
        })
    }

    fn longest(&self, bytes: &[u8], with_control: bool) -> Option<(usize, u32)> {
        let mut node = 0;
        let mut longest = None;
        for (at, byte) in bytes.iter().enumerate() {
            let Some(next) = self.edges.get(&(node, *byte)) else { break };
            node = *next;
            let end = self.ends[node as usize];
            if end.token != NO_TOKEN && (with_control || !end.is_control) {
                longest = Some((at + 1, end.token));
            }
        }
        longest
    }
}

const NOTHING: End = End { token: NO_TOKEN, is_control: false, leads_to_control: false };

#[cfg(test)]
mod tests {
    use super::{Found, SpecialTrie};
    use crate::tokenizer::TokenKind;
    use crate::units::TokenId;

    #[test]
    fn longest_of_the_first() {
        let mut trie = SpecialTrie::default();
        trie.insert("<|a|>", 7, TokenKind::Control);
        trie.insert("<|a|>b", 8, TokenKind::UserDefined);
        trie.insert("<|", 9, TokenKind::UserDefined);
        let found = |start, end, token| Some(Found { start, end, token: TokenId(token) });
        assert_eq!(trie.find("x<|a|>c", 0, true), found(1, 6, 7));
        assert_eq!(trie.find("x<|a|>c", 0, false), found(1, 3, 9));
        assert_eq!(trie.find("x<|a|>b", 0, false), found(1, 7, 8));
        assert_eq!(trie.find("x<|a|>b", 2, true), None);
        assert_eq!(trie.control("<|a|>"), Some(TokenId(7)));
        assert_eq!(trie.control("<|a|>b"), None);
        assert_eq!(trie.control(""), None);
        for (text, may) in
            [("<|a|>x", true), ("<|a", true), ("<", true), ("<x", false), ("", false)]
        {
            assert_eq!(trie.may_begin_control(text), may, "{text}");
        }
        assert_eq!(SpecialTrie::default().control("x"), None);
    }
}
