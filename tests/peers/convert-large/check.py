"""python check.py SCOUTD CHECKPOINT FOLDER SEED: converts under a memory limit, measures, kills, resumes, compares hashes.

The limit of 2 GB is a memory cgroup where systemd-run can make one (then cached file pages count too), else RLIMIT_DATA,
which counts whatever a process writes to: heap, stacks, private mappings.

What binds is told from the process's own threads: the time they ran and the time they were runnable but had no core
(`/proc/PID/task/*/schedstat`). What is missing from wall time x threads was spent waiting, for the disk above all. This
holds on a busy machine too, where user and system time over wall time does not.
"""

import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

scoutd, source, work, seed = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
LIMIT = 2 << 30
SCOPE = ["systemd-run", "--scope", "--quiet", "-p", f"MemoryMax={LIMIT}", "-p", "MemorySwapMax=0", "--"]
target = work / "model.gguf"
source_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
cores = len(os.sched_getaffinity(0))


def has_scope():
    if shutil.which("systemd-run") is None:
        return False
    return subprocess.run([*SCOPE, "true"], capture_output=True).returncode == 0


scope = SCOPE if has_scope() else []
print("memory limit of 2 GB by", "a cgroup (systemd-run)" if scope else "RLIMIT_DATA: systemd-run makes no scope here")


def direct_rates():
    """Sequential rates of the disk past the page cache, in bytes a second: reading a shard, writing 1 GiB."""
    shard = max(source.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    blocks = min(64, shard.stat().st_size >> 24)

    def rate(*arguments):
        start = time.monotonic()
        subprocess.run(["dd", "bs=16M", *arguments], check=True, capture_output=True)
        return (blocks << 24) / (time.monotonic() - start)

    probe = work / "probe"
    read = rate(f"if={shard}", "of=/dev/null", "iflag=direct", f"count={blocks}")
    write = rate("if=/dev/zero", f"of={probe}", "oflag=direct", "conv=fsync", f"count={blocks}")
    probe.unlink()
    return read, write


class Watched:
    """A running conversion, sampled until it ends or `stop` says so."""

    def __init__(self, *options):
        limit = None if scope else lambda: resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
        command = [*scope, scoutd, "convert", str(source), "--type", "q4_0", "--out", str(target), "--json", *options]
        self.start = time.monotonic()
        self.out = open(work / "report.json", "w+b")
        self.process = subprocess.Popen(command, stdout=self.out, stderr=subprocess.PIPE, preexec_fn=limit)
        self.times = {}  # by thread: seconds it ran, seconds it wanted to and had no core
        self.peak = 0

    def sample(self):
        proc = Path(f"/proc/{self.process.pid}")
        try:
            status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
            self.peak = max(self.peak, int(status["VmHWM"].split()[0]) << 10)
            for task in (proc / "task").iterdir():
                ran, waited, _ = (task / "schedstat").read_text().split()
                self.times[task.name] = (int(ran) / 1e9, int(waited) / 1e9)
        except (OSError, KeyError):
            return  # A thread or the process has just ended.

    def run(self, stop=lambda: False):
        while self.process.poll() is None:
            self.sample()
            if stop():
                self.process.kill()
                self.process.wait()
                return False
            time.sleep(0.05)
        self.wall = time.monotonic() - self.start
        error = self.process.stderr.read().decode()
        assert self.process.returncode == 0, (self.process.returncode, error)
        self.out.seek(0)
        self.report = json.load(self.out)
        self.ran, self.waited = (sum(times) for times in zip(*self.times.values()))
        return True


def sha256():
    digest = hashlib.sha256()
    with open(target, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def gb(count):
    return f"{count / 1e9:.2f} GB"


read, write = direct_rates()
before = resource.getrusage(resource.RUSAGE_CHILDREN)
whole = Watched()
assert whole.run()
after = resource.getrusage(resource.RUSAGE_CHILDREN)
cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
out_bytes = target.stat().st_size
wanted, pieces = sha256(), whole.report["pieces"]
disk_only = source_bytes / read + out_bytes / write + out_bytes / read
threads = whole.report["threads"]
busy = (whole.ran + whole.waited) / (whole.wall * threads)
print(f"source {gb(source_bytes)} in {len(list(source.glob('*.safetensors')))} shards, file {gb(out_bytes)}, {pieces} pieces")
print(f"disk past the cache: reads {read / 1e6:.0f} MB/s, writes {write / 1e6:.0f} MB/s; "
      f"reading the source, writing the file and reading it back would take {disk_only:.0f} s")
print(f"converted in {whole.wall:.0f} s ({source_bytes / whole.wall / 1e6:.0f} MB/s of source), {cpu:.0f} s of processor time on "
      f"{cores} cores: {100 * cpu / whole.wall / cores:.0f} % of what they could give")
print(f"{threads} threads ran {whole.ran:.0f} s and were kept from a core by others {whole.waited:.0f} s: "
      f"{100 * busy:.0f} % of their time; alone it would take {cpu / cores:.0f} s")
print(f"peak resident {whole.peak / 1e6:.0f} MB, cached file pages that are mapped included")
print(f"SHA-256 {wanted}")
fast = whole.wall <= disk_only / 0.6
assert fast or busy >= 0.85, "neither at 60 % of the disk's rate nor bound by the processor"
assert whole.peak <= 1.5e9, "more than 1.5 GB resident"
target.unlink()

rng = random.Random(seed)
points = sorted(rng.uniform(0.05, 0.9) for _ in range(3))
journal = Path(f"{target}.journal")
for number, point in enumerate(points):
    def reached():
        try:
            return len(journal.read_bytes().splitlines()) - 1 >= point * pieces
        except OSError:
            return False
    run = Watched(*["--resume"] * (number > 0))
    assert not run.run(reached), "it finished before it was killed"
    assert not target.exists() and Path(f"{target}.partial").exists()
    print(f"killed with {len(journal.read_bytes().splitlines()) - 1} of {pieces} pieces done")
last = Watched("--resume")
assert last.run()
resumed = last.report["resumed_pieces"]
assert 0 < resumed < pieces
assert sha256() == wanted, "other bytes than the uninterrupted run"
assert sorted(path.name for path in work.iterdir() if path.name.startswith("model.gguf")) == ["model.gguf"]
print(f"resumed with {resumed} of {pieces} pieces: the same SHA-256")
