//! Splitting text into the pieces inside which byte pairs are merged.
//!
//! The published patterns contain `\s+(?!\S)`, "white space up to the last but one character before
//! a word", which needs look-ahead and with it a backtracking engine (half the speed, a stack limit
//! on long runs of blanks). Here that alternative is dropped and its effect restored by the
//! *give-back rule*: a match of `\s+` that text follows returns its last character, if it has more
//! than one.

use regex::Regex;

/// How a vocabulary's text is cut into pieces, by the names of `tokenizer.ggml.pre`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Splitter {
    /// GPT-2's pattern; also the meaning given to `default`.
    Gpt2,
    /// Llama 3's pattern, `llama-bpe`.
    Llama3,
    /// O200K, the pattern of GPT-4o and Llama 4.
    O200k,
    /// Each numeric character alone, GPT-2's pattern for the rest.
    SmolLm,
}

impl Splitter {
    /// The names understood in `tokenizer.ggml.pre`, for messages.
    pub const NAMES: &str =
        "`default`, `gpt-2`, `gpt-4o`, `llama-bpe`, `llama-v3`, `llama3`, `llama4`, `smollm`";

    /// The splitter of a `tokenizer.ggml.pre`.
    pub fn from_name(name: &str) -> Option<Splitter> {
        Some(match name {
            "default" | "gpt-2" => Splitter::Gpt2,
            "llama-bpe" | "llama-v3" | "llama3" => Splitter::Llama3,
            "gpt-4o" | "llama4" => Splitter::O200k,
            "smollm" => Splitter::SmolLm,
            _ => return None,
        })
    }

    /// The name to write into `tokenizer.ggml.pre`.
    pub fn name(self) -> &'static str {
        match self {
            Splitter::Gpt2 => "gpt-2",
            Splitter::Llama3 => "llama-bpe",
            Splitter::O200k => "llama4",
            Splitter::SmolLm => "smollm",
        }
    }

    /// The splitter whose published pattern is `pattern`, as it stands in a `tokenizer.json`.
    pub(crate) fn from_pattern(pattern: &str) -> Option<Splitter> {
        [Splitter::Gpt2, Splitter::Llama3, Splitter::O200k].into_iter().find(|splitter| {
            let with_lookahead = splitter.pattern().strip_suffix(r"|\s+");
            pattern.strip_suffix(r"|\s+(?!\S)|\s+") == with_lookahead
        })
    }

    /// Whether a piece that is a token is taken whole, without merging: Llama 3's vocabulary holds
    /// 588 tokens that merging does not reach, and its reference (tiktoken) finds them this way.
    pub(crate) fn takes_whole_pieces(self) -> bool {
        self == Splitter::Llama3
    }

    /// Whether vocabularies of this splitter come from tiktoken, which ranks a merge by its result.
    pub(crate) fn ranks_by_result(self) -> bool {
        matches!(self, Splitter::Llama3 | Splitter::O200k)
    }

    fn pattern(self) -> &'static str {
        match self {
            Splitter::Gpt2 | Splitter::SmolLm => GPT2,
            Splitter::Llama3 => LLAMA3,
            Splitter::O200k => O200K,
        }
    }
}

/// A splitter made ready: the compiled pattern.
#[derive(Clone, Debug)]
pub(crate) struct Pieces {
    splitter: Splitter,
    pattern: Regex,
}

impl Pieces {
    pub(crate) fn new(splitter: Splitter) -> Pieces {
        let pattern = Regex::new(splitter.pattern()).expect("the patterns are constants");
        Pieces { splitter, pattern }
    }

    /// Calls `each` with the pieces of `text`, in order; together they are `text`.
    pub(crate) fn split<'t, E>(
        &self,
        text: &'t str,
        mut each: impl FnMut(&'t str) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.splitter != Splitter::SmolLm {
            return self.split_segment(text, &mut each);
        }
        let mut start = 0;
        for (at, digit) in text.char_indices().filter(|(_, char)| char.is_numeric()) {
            self.split_segment(&text[start..at], &mut each)?;
            start = at + digit.len_utf8();
            each(&text[at..start])?;
        }
        self.split_segment(&text[start..], &mut each)
    }

    fn split_segment<'t, E>(
        &self,
        text: &'t str,
        each: &mut impl FnMut(&'t str) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut at = 0;
        while at < text.len() {
            let Some(found) = self.pattern.find_at(text, at) else {
                return each(&text[at..]);
            };
            // The patterns leave no character out; were one left out, it would be a piece.
            if found.start() > at {
                each(&text[at..found.start()])?;
            }
            let end = found.start() + self.keep(found.as_str(), found.end() < text.len());
            each(&text[found.start()..end])?;
            at = end;
        }
        Ok(())
    }

    /// Bytes of `piece` that stay in it by the give-back rule.
    fn keep(&self, piece: &str, text_follows: bool) -> usize {
        let mut chars = piece.chars();
        let Some(last) = chars.next_back() else { return 0 };
        let gives_back = text_follows
            && last.is_whitespace()
            && !chars.as_str().is_empty()
            && (self.pattern_is_gpt2() || !matches!(last, '\r' | '\n'))
            && chars.all(char::is_whitespace);
        if gives_back { piece.len() - last.len_utf8() } else { piece.len() }
    }

    fn pattern_is_gpt2(&self) -> bool {
        matches!(self.splitter, Splitter::Gpt2 | Splitter::SmolLm)
    }
}

// The published patterns without their alternative `\s+(?!\S)`.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+";
const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
);
const O200K: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+"
);

#[cfg(test)]
mod tests {
    use super::{Pieces, Splitter};

    fn check(splitter: Splitter, text: &str, expected: &[&str]) {
        let mut pieces = Vec::new();
        let done: Result<(), ()> = Pieces::new(splitter).split(text, |piece| {
            pieces.push(piece);
            Ok(())
        });
        assert_eq!(done, Ok(()));
        assert_eq!(pieces, expected, "{splitter:?} on {text:?}");
    }

    #[test]
    fn gives_the_last_blank_back() {
        check(Splitter::Gpt2, "a   b", &["a", "  ", " b"]);
        check(Splitter::Gpt2, "a \n\n b ", &["a", " \n\n", " b", " "]);
        check(Splitter::Gpt2, "a\n\nb", &["a", "\n", "\n", "b"]);
        check(Splitter::Gpt2, "a\u{2003}\u{2003}b", &["a", "\u{2003}", "\u{2003}", "b"]);
        check(Splitter::Llama3, "a   b", &["a", "  ", " b"]);
        check(Splitter::Llama3, "a \n\n  b", &["a", " \n\n", " ", " b"]);
        check(Splitter::Llama3, "a\n\nb  ", &["a", "\n\n", "b", "  "]);
        check(Splitter::O200k, "x \t 1", &["x", " \t", " ", "1"]);
    }

    #[test]
    fn patterns_keep_their_differences() {
        check(Splitter::Gpt2, "DON'T don't 1234", &["DON", "'", "T", " don", "'t", " 1234"]);
        check(Splitter::Llama3, "DON'T don't 1234", &["DON", "'T", " don", "'t", " ", "123", "4"]);
        check(Splitter::O200k, "DON'T aB/c\n", &["DON'T", " a", "B", "/c", "\n"]);
        check(Splitter::O200k, "नमस्ते", &["नमस्ते"]);
        check(Splitter::Gpt2, "नम्", &["नम", "्"]);
        check(Splitter::SmolLm, "a  21½ b", &["a", "  ", "2", "1", "½", " b"]);
    }

    #[test]
    fn published_patterns_are_recognized() {
        let gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
        assert_eq!(Splitter::from_pattern(gpt2), Some(Splitter::Gpt2));
        assert_eq!(Splitter::from_pattern(r"\w+|\s+(?!\S)|\s+"), None);
        assert_eq!(Splitter::from_pattern(r"\s+"), None);
    }
}
