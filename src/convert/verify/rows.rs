//! The reference's distributions on disk, while the other model is not in memory yet.
//!
//! A row keeps the [`KEPT`] likeliest tokens with their log-probabilities in F32; all others together are one
//! entry, the tail. Divergence over the kept tokens and the tail as one is never more than the true one (merging
//! outcomes cannot part two distributions further), and equal to it for vocabularies of up to [`KEPT`] tokens.
//! [`Row::tail`] says how much probability was merged.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;

use crate::units::TokenId;

/// Tokens of a row that are kept one by one.
pub(super) const KEPT: usize = 2048;

/// Bytes of a row for a vocabulary.
pub(super) fn row_bytes(vocab_len: usize) -> usize {
    vocab_len.min(KEPT) * 8 + 12
}

/// The distribution at one position, and the token that stood there.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Row {
    /// The token that came.
    pub(super) token: TokenId,
    /// Its log-probability.
    pub(super) logprob: f32,
    /// Log-probability of all tokens that are not kept, together; minus infinity if there are none.
    pub(super) tail: f32,
    /// Kept tokens with their log-probabilities, likeliest first.
    pub(super) kept: Vec<(TokenId, f32)>,
}

/// Logits to log-probabilities: what is to be taken off, in F64.
pub(super) fn log_sum(logits: &[f32]) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - largest).exp()).sum();
    f64::from(largest) + sum.ln()
}

impl Row {
    /// Of logits at a position where `token` came.
    pub(super) fn new(logits: &[f32], token: TokenId) -> Row {
        let log_sum = log_sum(logits);
        let of = |id: u32| (f64::from(logits[id as usize]) - log_sum) as f32;
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let likelier =
            |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        let kept = order.len().min(KEPT);
        let mut tail = f32::NEG_INFINITY;
        if kept < order.len() {
            order.select_nth_unstable_by(kept, likelier);
            let rest = order[kept..].iter().map(|&id| f64::from(of(id)).exp()).sum::<f64>();
            tail = rest.ln() as f32;
            order.truncate(kept);
        }
        order.sort_unstable_by(likelier);
        let kept = order.into_iter().map(|id| (TokenId(id), of(id))).collect();
        Row { token, logprob: of(token.0), tail, kept }
    }

    /// The likeliest token, the first of equals.
    pub(super) fn top(&self) -> TokenId {
        self.kept.first().map_or(TokenId(0), |(token, _)| *token)
    }
}

/// The likeliest token of logits, the first of equals.
pub(super) fn top(logits: &[f32]) -> TokenId {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    TokenId(best as u32)
}

/// Rows in a file that has no name: whatever happens, nothing of it stays.
pub(super) struct Writer(BufWriter<File>);

/// Reads what a [`Writer`] wrote, in the same order.
pub(super) struct Reader(BufReader<File>);

impl Writer {
    /// A new file in `dir`.
    pub(super) fn create(dir: &Path) -> io::Result<Writer> {
        let path = dir.join(format!(".scoutd-verify-{}", std::process::id()));
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
        std::fs::remove_file(&path)?;
        Ok(Writer(BufWriter::new(file)))
    }

    pub(super) fn write(&mut self, row: &Row) -> io::Result<()> {
        self.0.write_all(&row.token.0.to_le_bytes())?;
        self.0.write_all(&row.logprob.to_le_bytes())?;
        self.0.write_all(&row.tail.to_le_bytes())?;
        for (token, logprob) in &row.kept {
            self.0.write_all(&token.0.to_le_bytes())?;
            self.0.write_all(&logprob.to_le_bytes())?;
        }
        Ok(())
    }

    /// From the beginning.
    pub(super) fn read_back(self) -> io::Result<Reader> {
        let mut file = self.0.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.seek(SeekFrom::Start(0))?;
        Ok(Reader(BufReader::new(file)))
    }
}

impl Reader {
    /// The next row, for a vocabulary of `vocab_len` tokens.
    pub(super) fn next(&mut self, vocab_len: usize) -> io::Result<Row> {
        let token = TokenId(u32::from_le_bytes(self.four()?));
        let (logprob, tail) = (f32::from_le_bytes(self.four()?), f32::from_le_bytes(self.four()?));
        let mut kept = Vec::with_capacity(vocab_len.min(KEPT));
        for _ in 0..vocab_len.min(KEPT) {
            let token = TokenId(u32::from_le_bytes(self.four()?));
            kept.push((token, f32::from_le_bytes(self.four()?)));
        }
        Ok(Row { token, logprob, tail, kept })
    }

    fn four(&mut self) -> io::Result<[u8; 4]> {
        let mut bytes = [0; 4];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits(count: usize) -> Vec<f32> {
        (0..count).map(|id| ((id * 2_654_435_761) % 1000) as f32 / 100.0).collect()
    }

    #[test]
    fn a_row_holds_all_probability() {
        for count in [5, KEPT, KEPT + 1, 3 * KEPT] {
            let logits = logits(count);
            let row = Row::new(&logits, TokenId(3));
            let kept: f64 = row.kept.iter().map(|(_, lp)| f64::from(*lp).exp()).sum();
            let tail = f64::from(row.tail).exp();
            assert!((kept + tail - 1.0).abs() < 1e-5, "{count}: {kept} + {tail}");
            assert_eq!(row.kept.len(), count.min(KEPT));
            assert_eq!(row.tail == f32::NEG_INFINITY, count <= KEPT);
            assert!(row.kept.is_sorted_by(|a, b| a.1 >= b.1));
            assert_eq!(row.top(), top(&logits));
        }
    }

    #[test]
    fn rows_come_back_and_leave_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let rows: Vec<Row> = (0..4).map(|id| Row::new(&logits(7), TokenId(id))).collect();
        let mut writer = Writer::create(dir.path()).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        rows.iter().for_each(|row| writer.write(row).unwrap());
        let mut reader = writer.read_back().unwrap();
        for row in &rows {
            assert_eq!(reader.next(7).unwrap(), *row);
        }
        assert!(reader.next(7).is_err(), "no more");
    }
}
