//! Blocks of weights as they lie in a file, and the checked view of bytes as blocks.
//!
//! Nibbles: the low one of a byte comes first. `d` and its like are IEEE halves.

use std::fmt;

#[cfg(target_endian = "big")]
compile_error!("blocks are read where they lie, and files are little endian");

/// Plain data: `repr(C)`, no padding, every bit pattern is a value.
///
/// # Safety
/// The type must be all of that.
pub unsafe trait Block: Copy + Sync + Send + 'static {}

/// 32 values: `d (q - 8)`, level `j` in the low nibble of `qs[j]`, level `j + 16` in the high one.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct BlockQ4_0 {
    pub d: u16,
    pub qs: [u8; 16],
}

/// 32 values: `d q + m`, nibbles as in [`BlockQ4_0`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct BlockQ4_1 {
    pub d: u16,
    pub m: u16,
    pub qs: [u8; 16],
}

/// 32 values: `d q`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct BlockQ8_0 {
    pub d: u16,
    pub qs: [i8; 32],
}

/// 256 values in 8 groups of 32: `d sc q - dmin m`. Per 64 values 32 bytes: low nibbles are the first 32.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct BlockQ4K {
    pub d: u16,
    pub dmin: u16,
    /// Eight scales and eight minima of six bits each: [`unpack_scales`].
    pub scales: [u8; 12],
    pub qs: [u8; 128],
}

/// As [`BlockQ4K`] with a fifth bit: bit `b` of `qh[j]` belongs to value `32 b + j`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct BlockQ5K {
    pub d: u16,
    pub dmin: u16,
    pub scales: [u8; 12],
    pub qh: [u8; 32],
    pub qs: [u8; 128],
}

/// 256 values in 16 groups of 16: `d sc (q - 32)`, four low bits in `ql`, two high ones in `qh`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct BlockQ6K {
    pub ql: [u8; 128],
    pub qh: [u8; 64],
    pub scales: [i8; 16],
    pub d: u16,
}

// SAFETY: repr(C), integers only, and the sizes below leave no room for padding.
unsafe impl Block for BlockQ4_0 {}
// SAFETY: as above.
unsafe impl Block for BlockQ4_1 {}
// SAFETY: as above.
unsafe impl Block for BlockQ8_0 {}
// SAFETY: as above.
unsafe impl Block for BlockQ4K {}
// SAFETY: as above.
unsafe impl Block for BlockQ5K {}
// SAFETY: as above.
unsafe impl Block for BlockQ6K {}
// SAFETY: every bit pattern is a value.
unsafe impl Block for f32 {}
// SAFETY: every bit pattern is a value.
unsafe impl Block for u16 {}

const _: () = {
    assert!(size_of::<BlockQ4_0>() == 18 && align_of::<BlockQ4_0>() == 2);
    assert!(size_of::<BlockQ4_1>() == 20 && align_of::<BlockQ4_1>() == 2);
    assert!(size_of::<BlockQ8_0>() == 34 && align_of::<BlockQ8_0>() == 2);
    assert!(size_of::<BlockQ4K>() == 144 && align_of::<BlockQ4K>() == 2);
    assert!(size_of::<BlockQ5K>() == 176 && align_of::<BlockQ5K>() == 2);
    assert!(size_of::<BlockQ6K>() == 210 && align_of::<BlockQ6K>() == 2);
};

/// Why bytes are no blocks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CastError {
    Alignment,
    Length,
}

impl fmt::Display for CastError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CastError::Alignment => "bytes are not aligned to the block type",
            CastError::Length => "bytes are not a whole number of blocks",
        })
    }
}

impl std::error::Error for CastError {}

/// Views bytes as blocks.
pub fn blocks_from_bytes<B: Block>(bytes: &[u8]) -> Result<&[B], CastError> {
    check::<B>(bytes)?;
    if bytes.is_empty() {
        return Ok(&[]);
    }
    // SAFETY: length and alignment were checked; every bit pattern of a `Block` is a value.
    Ok(unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len() / size_of::<B>()) })
}

/// Views bytes as blocks to be written.
pub fn blocks_from_bytes_mut<B: Block>(bytes: &mut [u8]) -> Result<&mut [B], CastError> {
    check::<B>(bytes)?;
    if bytes.is_empty() {
        return Ok(&mut []);
    }
    let len = bytes.len() / size_of::<B>();
    // SAFETY: as above, and a `Block` has no padding, so whatever is written are bytes.
    Ok(unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), len) })
}

/// The bytes of blocks.
pub fn bytes_of<B: Block>(blocks: &[B]) -> &[u8] {
    // SAFETY: a `Block` has no padding, so all of its bytes are initialized.
    unsafe { std::slice::from_raw_parts(blocks.as_ptr().cast(), size_of_val(blocks)) }
}

fn check<B: Block>(bytes: &[u8]) -> Result<(), CastError> {
    if !bytes.len().is_multiple_of(size_of::<B>()) {
        return Err(CastError::Length);
    }
    // Nothing lies nowhere: an empty slice may point to any odd place.
    if !bytes.is_empty() && !bytes.as_ptr().cast::<B>().is_aligned() {
        return Err(CastError::Alignment);
    }
    Ok(())
}

/// The eight scales and the eight minima of a [`BlockQ4K`] or [`BlockQ5K`].
#[inline]
pub fn unpack_scales(s: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    let (mut scales, mut minima) = ([0; 8], [0; 8]);
    for j in 0..4 {
        scales[j] = s[j] & 63;
        minima[j] = s[j + 4] & 63;
        scales[j + 4] = (s[j + 8] & 15) | (s[j] >> 6) << 4;
        minima[j + 4] = (s[j + 8] >> 4) | (s[j + 4] >> 6) << 4;
    }
    (scales, minima)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn casts_check_length_and_alignment() {
        let words = [0u64; 8];
        // SAFETY: 64 initialized bytes of an array that outlives the slice.
        let bytes = unsafe { std::slice::from_raw_parts(words.as_ptr().cast::<u8>(), 64) };
        assert_eq!(blocks_from_bytes::<BlockQ4_0>(&bytes[..36]).map(<[_]>::len), Ok(2));
        assert_eq!(blocks_from_bytes::<BlockQ4_0>(&bytes[..35]), Err(CastError::Length));
        assert_eq!(blocks_from_bytes::<BlockQ4_0>(&bytes[1..37]), Err(CastError::Alignment));
        assert_eq!(blocks_from_bytes::<f32>(&bytes[2..34]), Err(CastError::Alignment));
        assert_eq!(blocks_from_bytes::<BlockQ6K>(&[]).map(<[_]>::len), Ok(0));
    }
}
