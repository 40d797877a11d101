# Shared by the peer scripts: places, packages, Python environments, free ports, the binary.
# Source it: . "$(dirname "$0")/../lib.sh"

root=$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse --show-toplevel)
cd "$root"
# Everything a peer script downloads or builds; ignored by git, kept between runs.
peers=$root/target/peers
mkdir -p "$peers"

fail() { printf 'FAILED: %s\n' "$*" >&2; exit 1; }

# A peer that cannot be had here is a failure in CI and a plain message elsewhere.
skip() {
  printf 'SKIPPED: %s\n' "$*" >&2
  if [ "${CI:-}" = true ]; then exit 1; fi
  exit 0
}

# A kernel or container without what the test measures with: no package helps, so it is said and passes even in CI.
not_here() {
  printf 'NOT RUN HERE: %s\n' "$*" >&2
  exit 0
}

# packages NAME...: installs Debian packages that are missing.
packages() {
  local missing=() name
  for name in "$@"; do
    dpkg-query -W -f '${Status}' "$name" 2>/dev/null | grep -q 'install ok installed' || missing+=("$name")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  [ "$(id -u)" = 0 ] || skip "needs the Debian packages ${missing[*]}: apt-get install ${missing[*]}"
  apt-get update -qq >/dev/null || true
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null \
    || skip "could not install ${missing[*]}"
}

# python_with REQUIREMENT...: makes $python an interpreter of a shared environment that has these packages.
python_with() {
  local venv=$peers/venv
  if [ ! -x "$venv/bin/python" ]; then
    python3 -m venv "$venv" 2>/dev/null || { packages python3 python3-venv; python3 -m venv "$venv"; }
  fi
  python=$venv/bin/python
  "$python" -m pip install --quiet --disable-pip-version-check "$@" || skip "could not install $*"
}

# The release binary, built if it is not up to date; SCOUTD names another one.
scoutd_binary() {
  if [ -n "${SCOUTD:-}" ]; then scoutd=$SCOUTD; return; fi
  cargo build --release --locked --quiet || fail "the release build failed"
  scoutd=$root/target/release/scoutd
}

# free_ports COUNT: prints as many free loopback ports.
free_ports() {
  python3 - "$1" <<'PYTHON'
import socket, sys
sockets = [socket.socket() for _ in range(int(sys.argv[1]))]
for s in sockets:
    s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in sockets))
PYTHON
}

# wait_for_http PORT PATH: waits up to 30 s for a 200.
wait_for_http() {
  python3 - "$1" "$2" <<'PYTHON'
import sys, time, urllib.request
deadline = time.monotonic() + 30
while True:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}{sys.argv[2]}", timeout=2).read()
        sys.exit(0)
    except OSError:
        if time.monotonic() > deadline:
            sys.exit(1)
        time.sleep(0.05)
PYTHON
}
