//! How scoutd nodes of one pool know each other: a shared key that never travels.
//!
//! A request carries an HMAC-SHA-256 over method, host, path, body, the receiver's `boot_id` and a counter. The
//! `boot_id` is drawn when the receiver starts, so nothing recorded before can be played again, and no clock is
//! needed (a Pi without a battery may be years off). The counter rises, and the receiver takes each value once. A
//! request with an old `boot_id` is answered with the present one and may be repeated once. The host keeps a
//! stranger who got himself asked from handing the request on to a real node. Where the asker must know whom it
//! asked (before it sends a prompt to somebody who announced himself), the answer carries a proof too.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

/// The request header that carries the proof.
pub const AUTH_HEADER: &str = "X-Scoutd-Auth";

/// The answer's header that tells the receiver's present `boot_id`.
pub const BOOT_HEADER: &str = "X-Scoutd-Boot-Id";

/// The answer's header that proves that the receiver has the key as well.
pub const PROOF_HEADER: &str = "X-Scoutd-Proof";

/// A pool's shared secret.
#[derive(Clone)]
pub struct PoolKey(Vec<u8>);

/// Why a text is no pool key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyFault {
    /// Nothing there: the pool is off.
    #[error("the pool key is empty")]
    Empty,
    /// Fewer than 128 bits can be in it.
    #[error("the pool key has fewer than 128 bits: 32 hexadecimal digits or 22 other characters")]
    Short,
}

impl PoolKey {
    /// The key in a file's text: its first line, without blanks around it.
    ///
    /// # Errors
    /// If there is none, or it is too short to hold 128 bits.
    pub fn parse(text: &str) -> Result<PoolKey, KeyFault> {
        let line = text.lines().next().unwrap_or("").trim();
        if line.is_empty() {
            return Err(KeyFault::Empty);
        }
        let hexadecimal = line.bytes().all(|byte| byte.is_ascii_hexdigit());
        if line.len() < if hexadecimal { 32 } else { 22 } {
            return Err(KeyFault::Short);
        }
        Ok(PoolKey(line.as_bytes().to_vec()))
    }

    /// A short name for the key, to see whether two nodes have the same; it tells nothing about the key.
    pub fn fingerprint(&self) -> String {
        let tag = self.mac(&[b"scoutd pool fingerprint"]).finalize().into_bytes();
        hex(&tag[..4])
    }

    fn mac(&self, parts: &[&[u8]]) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("any length is a key");
        for part in parts {
            // Lengths keep two different lists of parts from being the same bytes.
            mac.update(&(part.len() as u64).to_le_bytes());
            mac.update(part);
        }
        mac
    }

    /// The proof that belongs to the answer `body` to the request that carried `header`.
    fn answer_mac(&self, header: &str, body: &[u8]) -> Hmac<Sha256> {
        let body: [u8; 32] = Sha256::digest(body).into();
        self.mac(&[b"scoutd-pool-1-answer", header.as_bytes(), &body])
    }

    fn request_mac(
        &self,
        what: &Signed<'_>,
        boot: &str,
        sender: &str,
        counter: u64,
    ) -> Hmac<Sha256> {
        let body: [u8; 32] = Sha256::digest(what.body).into();
        self.mac(&[
            b"scoutd-pool-1",
            what.method.as_bytes(),
            what.host.as_bytes(),
            what.path.as_bytes(),
            &body,
            boot.as_bytes(),
            sender.as_bytes(),
            &counter.to_le_bytes(),
        ])
    }
}

impl fmt::Debug for PoolKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PoolKey(…)")
    }
}

/// What a proof is about.
#[derive(Clone, Copy, Debug)]
pub struct Signed<'a> {
    /// `GET`, `POST`, …
    pub method: &'a str,
    /// The `Host` header.
    pub host: &'a str,
    /// As in the request line, with the query.
    pub path: &'a str,
    /// The whole body.
    pub body: &'a [u8],
}

/// The sending side: one per process, for all receivers.
#[derive(Debug)]
pub struct Signer {
    key: PoolKey,
    name: String,
    counter: AtomicU64,
}

impl Signer {
    /// With a name of its own, drawn now, so that the counter may start at zero.
    pub fn new(key: PoolKey) -> Signer {
        Signer { key, name: random_name(), counter: AtomicU64::new(0) }
    }

    /// The header's value for one request to the receiver that told `boot`.
    pub fn sign(&self, what: &Signed<'_>, boot: &str) -> String {
        let counter = self.counter.fetch_add(1, Ordering::Relaxed) + 1;
        let mac = self.key.request_mac(what, boot, &self.name, counter);
        format!("v1 {} {counter} {}", self.name, hex(&mac.finalize().into_bytes()))
    }

    /// Whether `proof` shows that whoever answered `body` to the request with `header` has the key.
    pub fn believes(&self, header: &str, body: &[u8], proof: &str) -> bool {
        let mac = self.key.answer_mac(header, body);
        unhex(proof).is_some_and(|proof| mac.verify_slice(&proof).is_ok())
    }
}

/// The receiving side.
#[derive(Debug)]
pub struct Gate {
    key: PoolKey,
    state: Mutex<GateState>,
}

#[derive(Debug)]
struct GateState {
    boot: String,
    senders: HashMap<String, Window>,
}

/// Why a proof does not hold; the `boot_id` is what the sender needs for the next try.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the pool key's proof does not hold")]
pub struct Unproven {
    /// The receiver's present one.
    pub boot_id: String,
}

/// Senders remembered; one more, and everybody has to ask for a new `boot_id`.
const SENDERS_MAX: usize = 1024;

impl Gate {
    /// With a fresh `boot_id`.
    pub fn new(key: PoolKey) -> Gate {
        let state = GateState { boot: random_name(), senders: HashMap::new() };
        Gate { key, state: Mutex::new(state) }
    }

    /// What senders have to put into their proofs at present.
    pub fn boot_id(&self) -> String {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).boot.clone()
    }

    /// Whether `header` proves that somebody with the key means this request now, and not before.
    ///
    /// # Errors
    /// If it does not, or if it did before.
    pub fn check(&self, what: &Signed<'_>, header: &str) -> Result<(), Unproven> {
        let proof = Proof::parse(header).ok_or_else(|| self.unproven())?;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mac = self.key.request_mac(what, &state.boot, proof.sender, proof.counter);
        let unproven = Unproven { boot_id: state.boot.clone() };
        // `verify_slice` compares in constant time.
        mac.verify_slice(&proof.mac).map_err(|_| unproven.clone())?;
        // Only holders of the key come this far, so strangers cannot fill the table.
        if !state.senders.contains_key(proof.sender) && state.senders.len() >= SENDERS_MAX {
            state.boot = random_name();
            state.senders.clear();
            return Err(Unproven { boot_id: state.boot.clone() });
        }
        let window = state.senders.entry(proof.sender.to_owned()).or_default();
        if window.take(proof.counter) { Ok(()) } else { Err(unproven) }
    }

    /// Proves to the sender of `header` that we have the key as well.
    pub fn proof(&self, header: &str, body: &[u8]) -> String {
        hex(&self.key.answer_mac(header, body).finalize().into_bytes())
    }

    fn unproven(&self) -> Unproven {
        Unproven { boot_id: self.boot_id() }
    }
}

struct Proof<'a> {
    sender: &'a str,
    counter: u64,
    mac: [u8; 32],
}

impl Proof<'_> {
    fn parse(header: &str) -> Option<Proof<'_>> {
        let mut words = header.split(' ');
        let (version, sender, counter, mac) =
            (words.next()?, words.next()?, words.next()?, words.next()?);
        let plain = (1..=64).contains(&sender.len())
            && sender.bytes().all(|byte| byte.is_ascii_alphanumeric());
        if version != "v1" || words.next().is_some() || !plain {
            return None;
        }
        Some(Proof { sender, counter: counter.parse().ok()?, mac: unhex(mac)? })
    }
}

/// Which counters of one sender were taken: requests overtake each other on parallel connections, so the last 64
/// may still come in any order.
#[derive(Clone, Copy, Debug, Default)]
struct Window {
    highest: u64,
    /// Bit i: `highest - i` was taken.
    taken: u64,
}

impl Window {
    /// Whether `counter` is new; it is not afterwards. Zero is never sent.
    fn take(&mut self, counter: u64) -> bool {
        if counter == 0 {
            return false;
        }
        if counter > self.highest {
            let step = counter - self.highest;
            self.taken = if step < 64 { self.taken << step } else { 0 };
            self.taken |= 1;
            self.highest = counter;
            return true;
        }
        let age = self.highest - counter;
        if age >= 64 || self.taken & (1 << age) != 0 {
            return false;
        }
        self.taken |= 1 << age;
        true
    }
}

/// A name that nobody else has: 128 random bits.
fn random_name() -> String {
    hex(&rand::random::<[u8; 16]>())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let text = text.as_bytes();
    if text.len() != 64 {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks(2)) {
        *byte = (digit(pair[0])? * 16 + digit(pair[1])?) as u8;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "0123456789abcdef0123456789abcdef";
    const ASKED: Signed<'_> =
        Signed { method: "POST", host: "192.168.1.5:11434", path: "/fusion/v1/score", body: b"{}" };

    fn key(text: &str) -> PoolKey {
        PoolKey::parse(text).expect("long enough")
    }

    #[test]
    fn short_keys_are_none() {
        for (text, fault) in [
            ("", KeyFault::Empty),
            ("  \nsecond line that is long enough for a key", KeyFault::Empty),
            ("0123456789abcdef", KeyFault::Short),
            ("not hexadecimal", KeyFault::Short),
        ] {
            assert_eq!(PoolKey::parse(text).err(), Some(fault), "{text:?}");
        }
        assert_eq!(key("aGVsbG8gd29ybGQgaGVsbG8g\n").0, key(" aGVsbG8gd29ybGQgaGVsbG8g ").0);
        assert_eq!(format!("{:?}", key(KEY)), "PoolKey(…)");
    }

    #[test]
    fn a_proof_holds_once_for_exactly_its_request() {
        let (signer, gate) = (Signer::new(key(KEY)), Gate::new(key(KEY)));
        let header = signer.sign(&ASKED, &gate.boot_id());
        for other in [
            Signed { method: "GET", ..ASKED },
            Signed { path: "/fusion/v1/self", ..ASKED },
            Signed { host: "192.168.1.6:11434", ..ASKED },
            Signed { body: b"{ }", ..ASKED },
        ] {
            assert!(gate.check(&other, &header).is_err(), "{other:?}");
        }
        assert_eq!(gate.check(&ASKED, &header), Ok(()));
        assert!(gate.check(&ASKED, &header).is_err(), "replayed");
        assert_eq!(gate.check(&ASKED, &signer.sign(&ASKED, &gate.boot_id())), Ok(()));
    }

    #[test]
    fn other_keys_boots_and_nonsense_prove_nothing() {
        let (signer, gate) = (Signer::new(key(KEY)), Gate::new(key(KEY)));
        let other = Signer::new(key("fedcba9876543210fedcba9876543210"));
        let boot = gate.boot_id();
        let restarted = Gate::new(key(KEY));
        let good = signer.sign(&ASKED, &boot);
        let refused = [
            other.sign(&ASKED, &boot),
            signer.sign(&ASKED, &restarted.boot_id()),
            signer.sign(&ASKED, ""),
            good.replace("v1 ", "v2 "),
            good[..good.len() - 1].to_owned(),
            format!("{good} "),
            String::new(),
            "v1".to_owned(),
            "v1 a 1 zz".to_owned(),
            format!("v1 {} 1 {}", "x".repeat(65), "0".repeat(64)),
            format!("v1 a -1 {}", "0".repeat(64)),
        ];
        for header in refused {
            assert_eq!(gate.check(&ASKED, &header), Err(Unproven { boot_id: boot.clone() }));
        }
        assert_eq!(gate.check(&ASKED, &good), Ok(()), "none of them used the counter up");
    }

    #[test]
    fn answers_are_proved_too() {
        let (signer, gate) = (Signer::new(key(KEY)), Gate::new(key(KEY)));
        let header = signer.sign(&ASKED, &gate.boot_id());
        let proof = gate.proof(&header, b"me");
        assert!(signer.believes(&header, b"me", &proof));
        assert!(!signer.believes(&header, b"somebody else", &proof));
        assert!(!signer.believes(&signer.sign(&ASKED, &gate.boot_id()), b"me", &proof));
        let stranger = Gate::new(key("fedcba9876543210fedcba9876543210"));
        assert!(!signer.believes(&header, b"me", &stranger.proof(&header, b"me")));
        assert!(!signer.believes(&header, b"me", ""));
    }

    #[test]
    fn requests_may_overtake_each_other_but_not_come_twice() {
        let (signer, gate) = (Signer::new(key(KEY)), Gate::new(key(KEY)));
        let boot = gate.boot_id();
        let headers: Vec<String> = (0..70).map(|_| signer.sign(&ASKED, &boot)).collect();
        for header in headers[6..].iter().rev() {
            assert_eq!(gate.check(&ASKED, header), Ok(()));
        }
        for header in &headers {
            assert!(gate.check(&ASKED, header).is_err(), "taken, or too old to know");
        }
    }

    #[test]
    fn too_many_senders_start_a_new_epoch() {
        let gate = Gate::new(key(KEY));
        let first = Signer::new(key(KEY));
        let boot = gate.boot_id();
        let recorded = first.sign(&ASKED, &boot);
        assert_eq!(gate.check(&ASKED, &recorded), Ok(()));
        for _ in 1..SENDERS_MAX {
            let header = Signer::new(key(KEY)).sign(&ASKED, &boot);
            assert_eq!(gate.check(&ASKED, &header), Ok(()));
        }
        let late = Signer::new(key(KEY));
        let told = gate.check(&ASKED, &late.sign(&ASKED, &boot)).expect_err("the table is full");
        assert_ne!(told.boot_id, boot);
        assert_eq!(gate.check(&ASKED, &late.sign(&ASKED, &told.boot_id)), Ok(()));
        assert!(gate.check(&ASKED, &recorded).is_err(), "what was forgotten cannot be replayed");
    }
}
