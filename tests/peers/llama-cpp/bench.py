"""Prefill and decode of scoutd and llama-bench in turns: medians, spread, ratios.

Every pair runs both programs once from their start, each with a warming run that does not count; which one goes first
changes from pair to pair. The ratio is the median of the pairs' ratios, so a change of the machine between pairs does
not enter it.
"""
import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

PHASES = ("prefill", "decode")


def ours(args, model, threads):
    command = [args.scoutd, "bench", "--json", "--runs", "1", "--prompt", str(args.prompt)]
    command += ["--generate", str(args.generate), "--model", model, "--threads", str(threads)]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    rates = [report[f"{phase}_tokens_per_s"]["median"] for phase in PHASES]
    return rates, f"scoutd {report['version']}, {report['isa']}"


def theirs(args, model, threads):
    command = [args.rival, "-o", "json", "-r", "1", "-p", str(args.prompt), "-n", str(args.generate)]
    command += ["-m", model, "-t", str(threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    tests = json.loads(done.stdout)
    prefill = next(test for test in tests if test["n_prompt"])
    decode = next(test for test in tests if test["n_gen"])
    return [prefill["avg_ts"], decode["avg_ts"]], f"llama.cpp {decode['build_commit']}"


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return platform.machine()


def measure(args, model, threads):
    """Rows of the table for one file and number of threads, and what both programs call themselves."""
    pairs, names = [], {}
    for number in range(args.pairs):
        order = [("ours", ours), ("theirs", theirs)]
        pair = {}
        for who, run in order if number % 2 == 0 else reversed(order):
            pair[who], names[who] = run(args, model, threads)
        pairs.append(pair)
        print(f"  {Path(model).name}, {threads} threads, pair {number + 1}: {pair}", file=sys.stderr)
    rows = []
    for index, phase in enumerate(PHASES):
        a, b = ([pair[who][index] for pair in pairs] for who in ("ours", "theirs"))
        ratios = [x / y for x, y in zip(a, b)]
        spread = lambda values: f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})"
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        rows.append(f"| {Path(model).stem} | {threads} | {phase} | {spread(a)} | {spread(b)} | {ratio} |")
    return rows, names


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--scoutd", required=True)
    parser.add_argument("--rival", required=True)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=128)
    parser.add_argument("--record", type=Path)
    parser.add_argument("models", nargs="+")
    args = parser.parse_args()

    rows, names = [], {}
    for model in args.models:
        for threads in args.threads.split(","):
            some, names = measure(args, model, int(threads))
            rows += some
    load = os.getloadavg()[1]
    shown = [arg if "/" not in arg else Path(arg).name for arg in sys.argv[1:]]
    table = [
        f"{datetime.date.today()}, {processor()}, {os.cpu_count()} cores, Linux {platform.release()}, "
        f"load of the last five minutes {load:.1f}. {names['ours']} beside {names['theirs']}, {args.pairs} pairs: "
        "median (least–most).",
        "",
        f"`bench {shlex.join(shown)}`",
        "",
        "| Model | Threads | | scoutd, tokens/s | llama.cpp, tokens/s | Ratio |",
        "|---|---:|---|---:|---:|---:|",
        *rows,
    ]
    print("\n".join(table))
    if args.record:
        with args.record.open("a") as record:
            record.write("\n" + "\n".join(table) + "\n")


main()
