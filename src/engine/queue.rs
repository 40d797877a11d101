//! The waiting line: by priority, and in turns among the clients of one priority.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::scheduler::Sequence;
use crate::chat::Priority;
use crate::units::SequenceId;

/// Sequences that wait for a slot. A client that sends many of them delays nobody but itself.
#[derive(Debug, Default)]
pub(super) struct WaitingLine {
    ranks: BTreeMap<Priority, VecDeque<Client>>,
    len: usize,
}

#[derive(Debug)]
struct Client {
    name: Arc<str>,
    line: VecDeque<Sequence>,
}

impl WaitingLine {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Puts `sequence` at the end of its client's line and returns how many will start before it if nobody
    /// else comes.
    pub(super) fn push(&mut self, sequence: Sequence) -> usize {
        let before: usize = self
            .ranks
            .iter()
            .filter(|(rank, _)| **rank > sequence.priority)
            .flat_map(|(_, clients)| clients)
            .map(|client| client.line.len())
            .sum();
        let clients = self.ranks.entry(sequence.priority).or_default();
        let index = match clients.iter().position(|client| client.name == sequence.client) {
            Some(index) => index,
            None => {
                let name = Arc::clone(&sequence.client);
                clients.push_back(Client { name, line: VecDeque::new() });
                clients.len() - 1
            }
        };
        // Clients take turns: those in front of this one have had one turn more when its round comes.
        let own = clients[index].line.len();
        let others: usize = clients
            .iter()
            .enumerate()
            .filter(|(other, _)| *other != index)
            .map(|(other, client)| client.line.len().min(own + usize::from(other < index)))
            .sum();
        clients[index].line.push_back(sequence);
        self.len += 1;
        before + own + others
    }

    /// Whose turn it is.
    pub(super) fn front(&self) -> Option<&Sequence> {
        self.ranks.values().rev().find_map(|clients| clients.front()?.line.front())
    }

    /// Takes [`front`](WaitingLine::front) out; its client goes to the back.
    pub(super) fn pop(&mut self) -> Option<Sequence> {
        let clients = self.ranks.values_mut().rev().find(|clients| !clients.is_empty())?;
        let mut client = clients.pop_front()?;
        let sequence = client.line.pop_front()?;
        if !client.line.is_empty() {
            clients.push_back(client);
        }
        self.len -= 1;
        Some(sequence)
    }

    /// Takes one out, wherever it stands.
    pub(super) fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        for clients in self.ranks.values_mut() {
            for index in 0..clients.len() {
                let line = &mut clients[index].line;
                let Some(place) = line.iter().position(|sequence| sequence.id == id) else {
                    continue;
                };
                let sequence = line.remove(place);
                if line.is_empty() {
                    clients.remove(index);
                }
                self.len -= 1;
                return sequence;
            }
        }
        None
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Sequence> {
        self.ranks.values().rev().flatten().flat_map(|client| &client.line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::TokenId;

    fn sequence(id: u64, client: &str, priority: Priority) -> Sequence {
        Sequence {
            id: SequenceId(id),
            client: client.into(),
            priority,
            prompt: vec![TokenId(1)],
            max_tokens: 1,
            scores_from: None,
        }
    }

    fn order(line: &mut WaitingLine) -> Vec<u64> {
        std::iter::from_fn(|| line.pop()).map(|sequence| sequence.id.0).collect()
    }

    #[test]
    fn clients_take_turns() {
        let mut line = WaitingLine::default();
        let pushed = [(1, "a"), (2, "a"), (3, "a"), (4, "b"), (5, "c"), (6, "b")];
        let ahead: Vec<usize> = pushed
            .iter()
            .map(|&(id, client)| line.push(sequence(id, client, Priority::Normal)))
            .collect();
        assert_eq!(ahead, [0, 1, 2, 1, 2, 4]);
        assert_eq!(order(&mut line), [1, 4, 5, 2, 6, 3]);
        assert_eq!(line.len(), 0);
    }

    #[test]
    fn priority_goes_first() {
        let mut line = WaitingLine::default();
        assert_eq!(line.push(sequence(1, "a", Priority::Low)), 0);
        assert_eq!(line.push(sequence(2, "a", Priority::High)), 0);
        assert_eq!(line.push(sequence(3, "b", Priority::Normal)), 1);
        assert_eq!(line.push(sequence(4, "c", Priority::Low)), 3);
        assert_eq!(order(&mut line), [2, 3, 1, 4]);
    }

    #[test]
    fn removal_leaves_the_order() {
        let mut line = WaitingLine::default();
        for (id, client) in [(1, "a"), (2, "b"), (3, "a")] {
            line.push(sequence(id, client, Priority::Normal));
        }
        assert!(line.remove(SequenceId(2)).is_some());
        assert!(line.remove(SequenceId(2)).is_none());
        assert_eq!(order(&mut line), [1, 3]);
    }
}
