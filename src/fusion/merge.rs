//! Answers taken apart into sentences: merging by selection, and who said what.
//!
//! Small models write worse summaries than the answers they summarize, so a merge copies sentences. A sentence of
//! the answer *is* a sentence of a member: provenance holds by construction.

use std::collections::BTreeSet;

use super::answer::plain;
use crate::chat::{Analysis, SentenceReport};

/// An answer and whose it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Source<'a> {
    /// The member.
    pub(super) id: &'a str,
    /// What it said.
    pub(super) text: &'a str,
}

/// A text made of several answers.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Merged {
    /// The text.
    pub(super) text: String,
    /// Its sentences.
    pub(super) sentences: Vec<SentenceReport>,
    /// What others said against it.
    pub(super) dissent: Vec<SentenceReport>,
}

/// A text in sentences: at line ends, and at `.`, `!`, `?` before a blank unless what stands before is a lone
/// letter or what follows goes on in small letters.
pub(super) fn sentences(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut start = 0;
    let mut push = |from: usize, to: usize| {
        let sentence = text[from..to].trim();
        if !sentence.is_empty() {
            found.push(sentence);
        }
    };
    for (at, c) in text.char_indices() {
        let end = at + c.len_utf8();
        if c == '\n' || (is_end(c) && ends_here(&text[start..at], &text[end..])) {
            push(start, end);
            start = end;
        }
    }
    push(start, text.len());
    found
}

/// A text that was cut off, up to its last whole sentence; all of it if it has none.
pub(super) fn whole_sentences(text: &str) -> &str {
    let ends = text.char_indices().filter(|(at, c)| {
        let rest = &text[at + c.len_utf8()..];
        let number = *c == '.' && text[..*at].ends_with(|c: char| c.is_ascii_digit());
        is_end(*c) && !(number && rest.trim().is_empty()) && ends_here(&text[..*at], rest)
    });
    let line = text.rfind('\n');
    let sentence = ends.map(|(at, c)| at + c.len_utf8()).next_back();
    match sentence.max(line) {
        Some(end) if !text[..end].trim().is_empty() => text[..end].trim_end(),
        _ => text,
    }
}

/// The spine's sentences in their order, with those of others that at least two answers have and the spine has
/// not, each after the neighbour it had. `sources` must be in canonical order.
pub(super) fn extract(sources: &[Source<'_>], spine: usize) -> Merged {
    let answers = taken_apart(sources);
    let clusters = clusters(&answers);
    let own = |cluster: &Cluster| cluster.of.iter().find(|(answer, _)| *answer == spine).copied();
    let mut order: Vec<usize> = Vec::new();
    for index in 0..answers[spine].len() {
        order.extend(clusters.iter().position(|cluster| own(cluster) == Some((spine, index))));
    }
    for (index, cluster) in clusters.iter().enumerate() {
        if own(cluster).is_none() && cluster.support() >= 2 {
            let (answer, sentence) = cluster.of[0];
            let before = (0..sentence).rev().find_map(|earlier| {
                let neighbour = clusters.iter().position(|c| c.of.contains(&(answer, earlier)))?;
                order.iter().position(|placed| *placed == neighbour)
            });
            order.insert(before.map_or(order.len(), |at| at + 1), index);
        }
    }
    let mut merged = Merged::default();
    for &index in &order {
        let cluster = &clusters[index];
        let (answer, sentence) = own(cluster).unwrap_or(cluster.of[0]);
        let part = &answers[answer][sentence];
        if !merged.text.is_empty() {
            merged.text.push_str(if part.begins_line { "\n" } else { " " });
        }
        merged.text.push_str(part.text);
        merged.sentences.push(cluster.report(sources, part.text));
    }
    let all_spine = order.iter().all(|index| own(&clusters[*index]).is_some());
    if all_spine {
        merged.text = sources[spine].text.trim().to_owned();
    }
    merged.dissent = clusters
        .iter()
        .enumerate()
        .filter(|(index, cluster)| !order.contains(index) && cluster.support() == 1)
        .filter(|(_, cluster)| {
            order.iter().any(|placed| cluster.words.contradicts(&clusters[*placed].words))
        })
        .map(|(_, cluster)| cluster.first(sources, &answers))
        .collect();
    merged
}

/// Compares the answers. `sources` must be in canonical order.
pub(super) fn analyse(sources: &[Source<'_>]) -> Analysis {
    let answers = taken_apart(sources);
    let clusters = clusters(&answers);
    let report = |cluster: &Cluster| cluster.first(sources, &answers);
    let mut analysis = Analysis::default();
    let mut contested = BTreeSet::new();
    for (index, one) in clusters.iter().enumerate() {
        for (other_index, other) in clusters.iter().enumerate().skip(index + 1) {
            if one.words.contradicts(&other.words) {
                analysis.contradictions.push((report(one), report(other)));
                contested.extend([index, other_index]);
            }
        }
    }
    for (index, cluster) in clusters.iter().enumerate() {
        let list = match cluster.support() {
            support if support * 2 > sources.len() && support > 1 => &mut analysis.consensus,
            1 if contested.contains(&index) => continue,
            1 => &mut analysis.unique_insights,
            _ => &mut analysis.partial_coverage,
        };
        list.push(report(cluster));
    }
    analysis
}

/// Whose words the sentences of a newly written text are: members that have most of its word triples, or the judge.
pub(super) fn trace(text: &str, sources: &[Source<'_>]) -> Vec<SentenceReport> {
    let triples = |text: &str| -> BTreeSet<Vec<String>> {
        let words: Vec<String> = words(text);
        let width = words.len().clamp(1, 3);
        words.windows(width).map(<[String]>::to_vec).collect()
    };
    let known: Vec<(usize, Vec<String>)> =
        sources.iter().enumerate().map(|(index, source)| (index, words(source.text))).collect();
    sentences(text)
        .into_iter()
        .map(|sentence| {
            let wanted = triples(sentence);
            let from: Vec<String> = known
                .iter()
                .filter(|(_, words)| {
                    let has = |triple: &&Vec<String>| {
                        words.windows(triple.len()).any(|window| window == triple.as_slice())
                    };
                    wanted.iter().filter(has).count() * 10 >= wanted.len() * TRACED_TENTHS
                })
                .map(|(index, _)| sources[*index].id.to_owned())
                .collect();
            let support = from.len() as u32;
            let from = if from.is_empty() { vec!["judge".to_owned()] } else { from };
            SentenceReport { text: sentence.to_owned(), from, support }
        })
        .collect()
}

/// Share of a sentence's word triples, in tenths, that make it a member's.
const TRACED_TENTHS: usize = 6;

/// A sentence in its answer.
struct Part<'a> {
    text: &'a str,
    begins_line: bool,
    words: Words,
}

/// Sentences of several answers that say the same.
struct Cluster {
    /// Answer and sentence, at most one sentence of an answer.
    of: Vec<(usize, usize)>,
    words: Words,
}

/// What a sentence is compared by.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Words {
    plain: BTreeSet<String>,
    numbers: BTreeSet<String>,
    negated: bool,
}

impl Cluster {
    fn support(&self) -> usize {
        self.of.len()
    }

    fn report(&self, sources: &[Source<'_>], text: &str) -> SentenceReport {
        let from = self.of.iter().map(|(answer, _)| sources[*answer].id.to_owned()).collect();
        SentenceReport { text: text.to_owned(), from, support: self.of.len() as u32 }
    }

    fn first(&self, sources: &[Source<'_>], answers: &[Vec<Part<'_>>]) -> SentenceReport {
        let (answer, sentence) = self.of[0];
        self.report(sources, answers[answer][sentence].text)
    }
}

impl Words {
    fn of(sentence: &str) -> Words {
        let mut all = Words { plain: BTreeSet::new(), numbers: BTreeSet::new(), negated: false };
        for word in words(sentence) {
            if word.bytes().any(|b| b.is_ascii_digit()) {
                all.numbers.insert(word);
            } else if NEGATIONS.contains(&word.as_str()) || word.ends_with("n't") {
                all.negated = !all.negated;
            } else {
                all.plain.insert(word);
            }
        }
        all
    }

    /// Whether most of the words are the same.
    fn resembles(&self, other: &Words) -> bool {
        let common = self.plain.intersection(&other.plain).count();
        let all = self.plain.union(&other.plain).count();
        all > 0 && common * 2 >= all
    }

    fn agrees(&self, other: &Words) -> bool {
        let same = self.numbers == other.numbers && self.negated == other.negated;
        let numbers_alone = self.plain.is_empty() && other.plain.is_empty();
        same && (self.resembles(other) || (numbers_alone && !self.numbers.is_empty()))
    }

    fn contradicts(&self, other: &Words) -> bool {
        let numbers =
            self.numbers != other.numbers && !self.numbers.is_empty() && !other.numbers.is_empty();
        self.resembles(other) && (numbers || self.negated != other.negated)
    }
}

const NEGATIONS: [&str; 14] = [
    "not", "no", "never", "none", "cannot", "without", "nicht", "kein", "keine", "nie", "ohne",
    "ne", "pas", "jamais",
];

fn taken_apart<'a>(sources: &[Source<'a>]) -> Vec<Vec<Part<'a>>> {
    sources
        .iter()
        .map(|source| {
            let mut from = 0;
            sentences(source.text)
                .into_iter()
                .map(|text| {
                    let at = source.text[from..].find(text).map_or(from, |at| from + at);
                    let begins_line =
                        source.text[from..at].contains('\n') || source.text[..from].ends_with('\n');
                    from = at + text.len();
                    Part { text, begins_line, words: Words::of(text) }
                })
                .collect()
        })
        .collect()
}

/// Sentences that agree, in the order of the answers.
fn clusters(answers: &[Vec<Part<'_>>]) -> Vec<Cluster> {
    let mut clusters: Vec<Cluster> = Vec::new();
    for (answer, parts) in answers.iter().enumerate() {
        for (sentence, part) in parts.iter().enumerate() {
            let same = clusters.iter_mut().find(|cluster| {
                cluster.of.iter().all(|(other, _)| *other != answer)
                    && cluster.words.agrees(&part.words)
            });
            match same {
                Some(cluster) => cluster.of.push((answer, sentence)),
                None => clusters
                    .push(Cluster { of: vec![(answer, sentence)], words: part.words.clone() }),
            }
        }
    }
    clusters
}

fn words(text: &str) -> Vec<String> {
    text.split(|c: char| c.is_whitespace() || ",;:()[]\"/".contains(c))
        .map(plain)
        .filter(|word| !word.is_empty())
        .collect()
}

fn is_end(c: char) -> bool {
    matches!(c, '.' | '!' | '?' | '。' | '！' | '？')
}

fn ends_here(before: &str, after: &str) -> bool {
    let mut back = before.chars().rev();
    let abbreviation = match (back.next(), back.next()) {
        (Some(c), None) => c.is_uppercase(),
        (Some(c), Some(previous)) => {
            c.is_alphabetic() && (previous == '.' || (c.is_uppercase() && previous == ' '))
        }
        (None, _) => false,
    };
    let wide = before.is_empty();
    let blank = after.is_empty() || after.starts_with(char::is_whitespace);
    let goes_on = after.trim_start().starts_with(char::is_lowercase);
    blank && !goes_on && !abbreviation && !wide
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources<'a>(texts: &[(&'a str, &'a str)]) -> Vec<Source<'a>> {
        texts.iter().map(|(id, text)| Source { id, text }).collect()
    }

    #[test]
    fn sentences_end_where_people_end_them() {
        assert_eq!(
            sentences("It is 3.5 m. J. Smith said so! Really? e.g. this\n- one\n\n- two"),
            ["It is 3.5 m.", "J. Smith said so!", "Really? e.g. this", "- one", "- two"]
        );
        assert_eq!(whole_sentences("One. Two. Thr"), "One. Two.");
        assert_eq!(whole_sentences("It is 3."), "It is 3.");
        assert_eq!(whole_sentences("no end"), "no end");
        assert_eq!(whole_sentences("a line\nand ha"), "a line");
    }

    #[test]
    fn what_two_say_is_added_and_contradictions_are_kept_apart() {
        let texts = sources(&[
            ("a", "The tower is 330 m tall. It stands in Paris."),
            ("b", "The tower is 330 m tall. It was built in 1889."),
            ("c", "The tower is 300 m tall. It was built in 1889. It is made of iron."),
        ]);
        let merged = extract(&texts, 0);
        let expected = "The tower is 330 m tall. It was built in 1889. It stands in Paris.";
        assert_eq!(merged.text, expected);
        let from: Vec<_> = merged.sentences.iter().map(|s| (s.from.join(","), s.support)).collect();
        assert_eq!(from, [("a,b".to_owned(), 2), ("b,c".to_owned(), 2), ("a".to_owned(), 1)]);
        let dissent: Vec<_> = merged.dissent.iter().map(|s| s.text.as_str()).collect();
        assert_eq!(dissent, ["The tower is 300 m tall."]);
        let analysis = analyse(&texts);
        assert_eq!(analysis.consensus.len(), 2);
        assert_eq!(analysis.contradictions.len(), 1);
        let unique: Vec<_> = analysis.unique_insights.iter().map(|s| s.text.as_str()).collect();
        assert_eq!(unique, ["It stands in Paris.", "It is made of iron."]);
        assert!(analysis.blind_spots.is_empty());
    }

    #[test]
    fn a_negation_is_no_agreement() {
        let texts =
            sources(&[("a", "The lamp is on."), ("b", "The lamp is not on."), ("c", "Yes.")]);
        let merged = extract(&texts, 0);
        assert_eq!(merged.text, "The lamp is on.");
        assert_eq!(merged.dissent.len(), 1);
    }

    #[test]
    fn a_merge_without_additions_is_a_copy() {
        let text = "First:\n\n  - a thing\n  - another";
        let texts = sources(&[("a", text), ("b", "Something else entirely.")]);
        assert_eq!(extract(&texts, 0).text, text);
    }

    #[test]
    fn new_words_are_the_judges() {
        let texts = sources(&[("a", "The cat sat on the mat."), ("b", "Dogs bark at night.")]);
        let traced = trace("The cat sat on the mat. Dragons breathe hot fire.", &texts);
        assert_eq!(traced[0].from, ["a"]);
        assert_eq!(traced[1].from, ["judge"]);
    }
}
