//! Numbers as exact decimal texts, without going through floating point.

/// The shortest text of the number that `text` is; `None` if it is none.
pub(super) fn exact(text: &str) -> Option<String> {
    let text = text.trim().replace('\u{2212}', "-");
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(&text)),
    };
    let (mantissa, exponent) = match digits.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().ok()?),
        None => (digits, 0),
    };
    if exponent.unsigned_abs() > EXPONENT_MAX {
        return None;
    }
    let (whole, fraction) = split(mantissa)?;
    let (mut digits, mut point) = (whole.clone() + &fraction, whole.len() as i32 + exponent);
    while point < 0 {
        digits.insert(0, '0');
        point += 1;
    }
    while digits.len() < point as usize {
        digits.push('0');
    }
    let (whole, fraction) = digits.split_at(point as usize);
    let whole = whole.trim_start_matches('0');
    let fraction = fraction.trim_end_matches('0');
    let whole = if whole.is_empty() { "0" } else { whole };
    let zero = whole == "0" && fraction.is_empty();
    let sign = if negative && !zero { "-" } else { "" };
    Some(match fraction {
        "" => format!("{sign}{whole}"),
        fraction => format!("{sign}{whole}.{fraction}"),
    })
}

/// The last number in a text, in its shortest form.
pub(super) fn last_in(text: &str) -> Option<String> {
    let text = text.replace('\u{2212}', "-");
    let mut found = None;
    let mut at = 0;
    while let Some(start) = text[at..].find(|c: char| c.is_ascii_digit()).map(|i| at + i) {
        let tail = &text[start..];
        let len = tail
            .find(|c: char| !(c.is_ascii_digit() || matches!(c, '.' | ',' | 'e' | '+' | '-')))
            .unwrap_or(tail.len());
        at = start + len;
        let before = &text[..start];
        let negative = before.ends_with('-')
            && !before[..before.len() - 1].ends_with(|c: char| c.is_alphanumeric() || c == ')');
        // A sentence's end, or the rest of an expression, is no part of the number.
        let number = (1..=len).rev().find_map(|len| {
            let text = tail[..len].strip_suffix(['.', ',', 'e', '+', '-']);
            if text.is_some() { None } else { Some((len, exact(&tail[..len])?)) }
        });
        if let Some((len, number)) = number {
            at = start + len;
            let negative = negative && number != "0";
            found = Some(if negative { format!("-{number}") } else { number });
        }
    }
    found
}

/// Digits before and after the point. A comma is a separator of thousands before groups of three, else a point.
fn split(mantissa: &str) -> Option<(String, String)> {
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    let (whole, fraction) = match (mantissa.split_once('.'), mantissa.split_once(',')) {
        (Some((whole, fraction)), _) => (whole.to_owned(), fraction),
        (None, Some((whole, fraction))) if fraction.len() != 3 && digits(fraction) => {
            (whole.to_owned(), fraction)
        }
        _ => (mantissa.to_owned(), ""),
    };
    let mut groups = whole.split(',');
    let first = groups.next().unwrap_or("");
    let grouped = whole.contains(',');
    if grouped && (first.is_empty() || first.len() > 3 || groups.any(|group| group.len() != 3)) {
        return None;
    }
    let whole = whole.replace(',', "");
    let empty = whole.is_empty() && fraction.is_empty();
    let fits = whole.len() + fraction.len() <= DIGITS_MAX;
    (fits && !empty && digits(&whole) && digits(fraction)).then(|| (whole, fraction.to_owned()))
}

const EXPONENT_MAX: u32 = 64;
const DIGITS_MAX: usize = 128;
