//! The instruction sets that have kernels of their own.

use std::fmt;
use std::str::FromStr;

/// A set of instructions: a name, and a question to the processor.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Isa {
    Scalar,
    Neon,
    NeonDotprod,
    Avx2,
    Avx512Vnni,
}

/// A name that is no instruction set.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct UnknownIsa(pub String);

impl Isa {
    /// All of them, the preferred first.
    pub const ALL: [Isa; 5] =
        [Isa::Avx512Vnni, Isa::NeonDotprod, Isa::Avx2, Isa::Neon, Isa::Scalar];

    /// Whether this processor, and the operating system, run every feature that the kernels of this set enable.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDotprod => {
                std::arch::is_aarch64_feature_detected!("neon")
                    && std::arch::is_aarch64_feature_detected!("dotprod")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => has_avx2(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => {
                has_avx2()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            _ => false,
        }
    }

    /// The sets that this processor runs, the preferred first.
    pub fn available() -> impl Iterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available())
    }

    /// The name in configuration and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Neon => "neon",
            Isa::NeonDotprod => "neon-dotprod",
            Isa::Avx2 => "avx2",
            Isa::Avx512Vnni => "avx512-vnni",
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Isa {
    type Err = UnknownIsa;

    fn from_str(name: &str) -> Result<Isa, UnknownIsa> {
        Isa::ALL
            .into_iter()
            .find(|isa| isa.name() == name)
            .ok_or_else(|| UnknownIsa(name.to_owned()))
    }
}

impl fmt::Display for UnknownIsa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unknown instruction set `{}`; known are", self.0)?;
        for (i, isa) in Isa::ALL.into_iter().enumerate() {
            write!(f, "{} {isa}", if i == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

impl std::error::Error for UnknownIsa {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back() {
        for isa in Isa::ALL {
            assert_eq!(isa.name().parse(), Ok(isa));
        }
        let error = "sse2".parse::<Isa>().expect_err("no such set");
        assert!(error.to_string().contains("`sse2`"), "{error}");
        assert!(error.to_string().ends_with("scalar"), "{error}");
        assert_eq!(Isa::available().last(), Some(Isa::Scalar));
    }
}
