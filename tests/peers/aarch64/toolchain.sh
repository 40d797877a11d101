# Cross-building for aarch64 and running the result under qemu, for the scripts beside it.
# Source it after lib.sh: it installs what is missing and defines `cross` and `emulated`.
#
# A rustup toolchain that already has the target builds it. Otherwise Debian's compiler and its arm64 standard library
# do, a pair of one version; a toolchain is never changed.

target=aarch64-unknown-linux-gnu
floor=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml | head -1)
# Its own folder: another compiler would otherwise rebuild everything at each turn.
cross_target=$root/target/cross

packages gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user

if [ -d "$(rustc --print target-libdir --target "$target" 2>/dev/null)" ]; then
  cross_path=$PATH
else
  if ! dpkg --print-foreign-architectures | grep -qx arm64; then
    [ "$(id -u)" = 0 ] || skip "needs: dpkg --add-architecture arm64"
    dpkg --add-architecture arm64
  fi
  packages rustc-web cargo-web libstd-rust-web-dev:arm64
  cross_path=/usr/bin:$PATH
fi
version=$(PATH=$cross_path rustc --version | cut -d ' ' -f 2)
printf '%s\n%s\n' "$floor" "$version" | sort --version-sort --check=quiet \
  || fail "the compiler for $target is $version, older than $floor"
printf 'compiler %s, %s\n' "$version" "$(qemu-aarch64 --version | head -1)"

# cross SUBCOMMAND ARGUMENT...: cargo for the target. Static: the emulator then needs no libraries of the target, and
# a hang of qemu 7.2 with dynamic threads, seen once, cannot occur.
cross() {
  PATH=$cross_path \
  CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
  CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS="-C target-feature=+crt-static" \
    cargo "$1" --locked --quiet --target "$target" --target-dir "$cross_target" "${@:2}"
}

# emulated CPU SECONDS COMMAND...: runs a program of the target as on that processor.
emulated() {
  QEMU_CPU=$1 timeout --kill-after=5 "$2" qemu-aarch64 "${@:3}"
}

# The processors, and the instruction set that must be the one in use on each.
declare -A required=([cortex-a76]=neon-dotprod [cortex-a72]=neon)
