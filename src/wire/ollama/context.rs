//! `context`: the numbers that carry a conversation from one `/api/generate` to the next.
//!
//! To clients they are opaque. Ollama's are token ids; ours are the turns themselves, as UTF-8 packed three
//! bytes to a number behind a mark, so that the prompt is rendered afresh and no client can smuggle in a
//! control token.

use serde::{Deserialize, Serialize};

use crate::chat::{ChatError, Message, Role};

/// "SCT" and a version: the first number of every context.
const MARK: u32 = 0x0053_4354;

/// Bytes of conversation a context may carry; a longer one loses its oldest turns.
const BYTES_MAX: usize = 1 << 20;

#[derive(Serialize, Deserialize)]
struct Turn(Role, String);

/// Packs the turns.
pub(super) fn pack(messages: &[Message]) -> Vec<u32> {
    let mut turns: Vec<Turn> =
        messages.iter().map(|message| Turn(message.role, message.content.clone())).collect();
    let mut total: usize = turns.iter().map(|turn| turn.1.len()).sum();
    while total > BYTES_MAX && !turns.is_empty() {
        total -= turns.remove(0).1.len();
    }
    let bytes = serde_json::to_vec(&turns).expect("roles and texts serialize");
    let mut numbers = vec![MARK, bytes.len() as u32];
    numbers.extend(bytes.chunks(3).map(|chunk| {
        chunk.iter().enumerate().fold(0, |number, (at, &byte)| number | u32::from(byte) << (8 * at))
    }));
    numbers
}

/// Unpacks what [`pack`] made; an empty list is an empty conversation.
pub(super) fn unpack(numbers: &[u32]) -> Result<Vec<Message>, ChatError> {
    let foreign = || ChatError::invalid("context", "context was not made by this server");
    let (len, packed) = match numbers {
        [] => return Ok(Vec::new()),
        [MARK, len, packed @ ..] => (*len as usize, packed),
        _ => return Err(foreign()),
    };
    if packed.len() != len.div_ceil(3) || packed.iter().any(|&number| number >> 24 != 0) {
        return Err(foreign());
    }
    let mut bytes: Vec<u8> =
        packed.iter().flat_map(|number| number.to_le_bytes().into_iter().take(3)).collect();
    bytes.truncate(len);
    let turns: Vec<Turn> = serde_json::from_slice(&bytes).map_err(|_| foreign())?;
    Ok(turns.into_iter().map(|Turn(role, text)| Message::text(role, text)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conversation_survives() {
        for texts in [vec![], vec!["hi"], vec!["Grüße", "", "日本\u{2028}"]] {
            let messages: Vec<_> =
                texts.iter().map(|text| Message::text(Role::User, *text)).collect();
            assert_eq!(unpack(&pack(&messages)).expect("our own"), messages);
        }
    }

    #[test]
    fn foreign_numbers_are_refused() {
        let good = pack(&[Message::text(Role::User, "hello")]);
        let mut long = good.clone();
        long.push(0);
        let mut big = good.clone();
        big[2] |= 1 << 30;
        let cases = [
            vec![1, 2, 3],
            vec![MARK],
            vec![MARK, 5],
            vec![MARK, u32::MAX],
            long,
            big,
            vec![MARK, 0],
        ];
        for numbers in cases {
            let error = unpack(&numbers).expect_err("foreign").to_string();
            assert_eq!(error, "context was not made by this server", "{numbers:?}");
        }
        assert!(unpack(&[]).expect("empty").is_empty());
    }
}
