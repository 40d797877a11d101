//! Stop strings in a stream of text: what may begin one is held back until it is one or not.

/// Looks for the first of several texts. Each push costs at most (held + pushed) × stops comparisons; what is
/// held is shorter than the longest stop string.
#[derive(Clone, Debug)]
pub(super) struct StopStrings {
    stops: Vec<String>,
    held: String,
    found: bool,
}

impl StopStrings {
    /// Empty stop strings never match.
    pub(super) fn new(stops: &[String]) -> StopStrings {
        let stops = stops.iter().filter(|stop| !stop.is_empty()).cloned().collect();
        StopStrings { stops, held: String::new(), found: false }
    }

    /// Takes in `text` and appends to `out` what certainly comes before any stop string. Returns whether one
    /// was found; from then on nothing comes out.
    pub(super) fn push(&mut self, text: &str, out: &mut String) -> bool {
        if self.found {
            return true;
        }
        if self.stops.is_empty() {
            out.push_str(text);
            return false;
        }
        self.held.push_str(text);
        let first = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(at) = first {
            out.push_str(&self.held[..at]);
            self.held.clear();
            self.found = true;
            return true;
        }
        let safe = self.held.len() - self.possible_beginning();
        out.push_str(&self.held[..safe]);
        self.held.drain(..safe);
        false
    }

    /// The text ends: what was held back was no stop string.
    pub(super) fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }

    /// Bytes at the end of what is held that may begin a stop string.
    fn possible_beginning(&self) -> usize {
        let held = &self.held;
        let begins = |stop: &String| {
            (0..held.len())
                .filter(|&at| held.is_char_boundary(at) && held.len() - at < stop.len())
                .find(|&at| stop.starts_with(&held[at..]))
                .map(|at| held.len() - at)
        };
        self.stops.iter().filter_map(begins).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Pushes `pieces` and returns what came out after each, joined by `|`, with `!` where a stop was found.
    fn check(stops: &[&str], pieces: &[&str], expected: &str) {
        let stops: Vec<String> = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let mut matcher = StopStrings::new(&stops);
        let mut out = String::new();
        for piece in pieces {
            if matcher.push(piece, &mut out) {
                out.push('!');
            }
            out.push('|');
        }
        matcher.finish(&mut out);
        assert_eq!(out, expected);
    }

    #[test]
    fn a_stop_string_is_found_across_pieces() {
        check(&["END"], &["abE", "N", "Dxyz"], "ab||!|");
        check(&["END"], &["abE", "N", "x"], "ab||ENx|");
        check(&["END"], &["abE", "EN", "D"], "ab|E|!|");
        check(&["END"], &["abEN"], "ab|EN");
    }

    #[test]
    fn the_earliest_of_several_counts() {
        check(&["b", "abc"], &["xabc"], "x!|");
        check(&["bc", "c"], &["xa", "bc", "y"], "xa|!|!|");
    }

    #[test]
    fn characters_of_several_bytes_stay_whole() {
        check(&["ürg"], &["aü", "x"], "a|üx|");
        check(&["\u{1F600}!"], &["\u{1F600}", "?"], "|\u{1F600}?|");
    }

    #[test]
    fn without_stop_strings_text_passes() {
        check(&[], &["a", "b"], "a|b|");
        check(&[""], &["a", "b"], "a|b|");
    }

    proptest! {
        #[test]
        fn cut_anywhere_the_text_before_the_stop_comes_out(
            text in "[ab]{0,20}",
            stops in prop::collection::vec("[ab]{1,4}", 0..3),
            cuts in prop::collection::vec(0..21_usize, 0..6),
        ) {
            let mut matcher = StopStrings::new(&stops);
            let mut cuts: Vec<usize> = cuts.into_iter().map(|at| at.min(text.len())).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let mut out = String::new();
            let mut found = false;
            for pair in cuts.windows(2) {
                found = matcher.push(&text[pair[0]..pair[1]], &mut out);
                if found {
                    break;
                }
                // Whatever is out can no longer become part of a stop string.
                let first = stops.iter().filter_map(|stop| text.find(stop.as_str())).min();
                prop_assert!(out.len() <= first.unwrap_or(text.len()));
            }
            matcher.finish(&mut out);
            let first = stops.iter().filter_map(|stop| text.find(stop.as_str())).min();
            // The pieces may end a short stop string before a longer, earlier one is complete.
            if found {
                prop_assert!(first.is_some());
                prop_assert!(text.starts_with(&out));
            } else {
                prop_assert_eq!(first, None);
                prop_assert_eq!(&out, &text);
            }
        }
    }
}
