//! scoutd's own model, part of the program.

/// The name of the built-in model.
pub(super) const NAME: &str = "scout-nano";

/// Bytes at an address that tensors may be read from: a GGUF file counts its alignment from its own beginning.
#[repr(C, align(16384))]
struct Aligned<T: ?Sized>(T);

static FILE: &Aligned<[u8]> = &Aligned(*include_bytes!("../../models/scout-nano-q4_0.gguf"));

/// The GGUF file of the built-in model.
pub(super) fn file() -> &'static [u8] {
    &FILE.0
}
