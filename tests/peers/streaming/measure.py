#!/usr/bin/env python3
"""Runs scoutd and llama.cpp on one file under one memory limit and compares them; see `run`."""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time

options = argparse.ArgumentParser()
for name in ("scoutd", "rival", "model", "group", "limit-file", "out"):
    options.add_argument("--" + name, required=True)
options.add_argument("--short", action="store_true")
options.add_argument("--runs", type=int, default=3)
options.add_argument("--share", type=float, default=0.40)
args = options.parse_args()

size = os.path.getsize(args.model)
limit = int(size * args.share) // 4096 * 4096
failures = []


def claim(holds, what):
    print(("holds   " if holds else "FAILS   ") + what, flush=True)
    if not holds:
        failures.append(what)


def drop_caches():
    subprocess.run(["sync"], check=True)
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3")


def limited(command, patience=1800):
    """Runs a command inside the group: its output and seconds, or None and how it ended."""
    drop_caches()
    with open(os.path.join(args.group, args.limit_file), "w") as file:
        file.write(str(limit))
    entry = os.path.join(args.group, "cgroup.procs")

    def enter():
        with open(entry, "w") as file:
            file.write(str(os.getpid()))

    start = time.monotonic()
    try:
        done = subprocess.run(command, preexec_fn=enter, capture_output=True, text=True, timeout=patience)
    except subprocess.TimeoutExpired:
        return None, f"nothing after {patience} s"
    seconds = time.monotonic() - start
    if done.returncode != 0:
        print(f"        ended with {done.returncode}: {done.stderr.strip()[-300:]}", flush=True)
        return None, done.returncode
    return done.stdout, seconds


def scoutd(prompt, generate, *more):
    command = [args.scoutd, "bench", "--model", args.model, "--prompt", str(prompt), "--generate", str(generate),
               "--runs", "1", "--json", "--set", f"model.context_tokens={2 * (prompt + generate)}", *more]
    out, _ = limited(command)
    if out is None:
        sys.exit("scoutd was killed or failed")
    return json.loads(out)


def rival(prompt, generate, *more, patience=1800):
    command = [args.rival, "-m", args.model, "-p", str(prompt), "-n", str(generate), "-r", "1", "-t", str(threads),
               "-o", "json", "-lm", "mmap", *more]
    out, how = limited(command, patience)
    if out is None:
        return None, how
    return json.loads(out)[0]["avg_ts"], how


def disk_rate():
    """Plain reads past the cache, 4 MB at a time."""
    drop_caches()
    start = time.monotonic()
    count = min(size >> 22, 256)
    subprocess.run(["dd", f"if={args.model}", "of=/dev/null", "bs=4M", f"count={count}", "iflag=direct", "status=none"],
                   check=True)
    return count * (1 << 22) / (time.monotonic() - start)


def median(values):
    return statistics.median(values)


runs = 1 if args.short else args.runs
prompt, generate = (256, 16) if args.short else (1024, 48)
rate = disk_rate()
print(f"file {size / 1e9:.2f} GB, limit {limit / 1e9:.2f} GB, disk {rate / 1e6:.0f} MB/s past the cache", flush=True)

ours_decode, ours_prefill, reports = [], [], []
theirs_decode, theirs_prefill = [], []
threads = os.cpu_count()
for number in range(runs):
    report = scoutd(prompt, generate, "--set", f"model.threads={threads}")
    reports.append(report)
    ours_decode.append(report["decode_tokens_per_s"]["median"])
    ours_prefill.append(report["prefill_tokens_per_s"]["median"])
    print(f"scoutd     decode {ours_decode[-1]:8.2f}  prefill {ours_prefill[-1]:8.1f} tokens/s", flush=True)
    decode, _ = rival(0, generate, "--repack", "0")
    prefill, _ = rival(prompt, 0, "--repack", "0")
    theirs_decode.append(decode or 0.0)
    theirs_prefill.append(prefill or 0.0)
    print(f"llama.cpp  decode {theirs_decode[-1]:8.2f}  prefill {theirs_prefill[-1]:8.1f} tokens/s (mapped)", flush=True)
default, how = rival(0, generate, patience=300)
print("llama.cpp  as it is by default: " + (f"{default:.2f} tokens/s" if default else f"ended with {how}"), flush=True)

if reports[-1]["experts"] is None:
    sys.exit("FAILED: the model was not streamed: `scoutd plan` says whether it fits into the limit")
decode, prefill = reports[-1]["experts"]["decode"], reports[-1]["experts"]["prefill"]
print(json.dumps({"decode": decode, "prefill": prefill}, indent=1))
one = decode["expert_read_bytes"] / max(decode["expert_uses"] - decode["expert_hits"], 1)
expected = reports[-1]["experts"]["expert_bytes"]
claim(decode["expert_slots"] > 0, "the model streams")
claim(abs(one / expected - 1) <= 0.15, f"bytes read for each miss: {one / 1e6:.2f} MB, an expert has {expected / 1e6:.2f} MB")
swept = prefill["expert_read_bytes"] / (prefill["expert_uses"] - prefill["expert_hits"]) / expected
claim(swept <= 1.05, f"a prompt of {prompt} tokens reads each missing expert once ({swept:.2f} times)")
busy = decode["disk_bytes_per_s"] / rate
if not args.short:
    claim(busy >= 0.85 or decode["wait_share"] < 0.2,
          f"while reading the disk gives {busy * 100:.0f} % of its rate; waited {decode['wait_share'] * 100:.0f} % of the time")
    for what, ours, theirs, factor in (("decode", ours_decode, theirs_decode, 2), ("prefill", ours_prefill, theirs_prefill, 4)):
        ratio = median(ours) / max(median(theirs), 1e-9)
        claim(ratio >= factor, f"{what}: {median(ours):.2f} against {median(theirs):.2f} tokens/s, {ratio:.1f} times (asked: {factor})")
with open(args.out, "w") as file:
    json.dump({"file_bytes": size, "limit_bytes": limit, "disk_bytes_per_s": rate, "scoutd": reports,
               "llama_cpp": {"decode": theirs_decode, "prefill": theirs_prefill, "default_decode": default}}, file)
sys.exit("FAILED: " + "; ".join(failures) if failures else 0)
