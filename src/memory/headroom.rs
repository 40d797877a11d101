//! The number everything is promised from, as a pure function.

use crate::units::Bytes;

/// What we hold that the kernel's "available" does not show yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holdings {
    /// Mapped weights we need that lie in the page cache and are not locked: the kernel counts them as free.
    pub soft: Bytes,
    /// Promised bytes whose pages have not been touched: nobody has taken them yet, but somebody will.
    pub untouched: Bytes,
}

/// Bytes that may still be promised: `available − soft − untouched`. Swap is never added.
///
/// Locked weights are in neither term: the kernel has already taken them off `available`, subtracting them
/// would count them twice.
pub fn headroom(available: Bytes, ours: Holdings) -> Bytes {
    available.saturating_sub(ours.soft).saturating_sub(ours.untouched)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(available: u64, soft: u64, untouched: u64, expected: u64) {
        let ours = Holdings { soft: Bytes(soft), untouched: Bytes(untouched) };
        assert_eq!(headroom(Bytes(available), ours), Bytes(expected));
    }

    #[test]
    fn headroom_subtracts_soft_and_untouched() {
        check(1000, 0, 0, 1000);
        check(1000, 600, 100, 300);
        check(1000, 900, 200, 0);
        check(1000, u64::MAX, u64::MAX, 0);
        check(0, 0, 0, 0);
    }
}
