"""Exact match of a pool against its members: accuracy.py --scoutd BINARY --work FOLDER --member NAME=URL ...

Each answer to a held-out home request is asked for with the true conversation before it. Weights come from other requests
than those that are counted. The expectation is computed from each member's own answers: the weighted vote over them.
"""

import argparse
import json
import math
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "models/recipe")]
from corpus import conversation  # noqa: E402

SPLITS = ("seen", "tmpl", "ent", "both")


def questions(count: int, seed: int):
    out = []
    for split in SPLITS:
        rng = random.Random(f"{seed}-{split}")
        for _ in range(count):
            system, turns = conversation(rng, split)
            messages = [{"role": "system", "content": system}] if system else []
            for turn in turns:
                messages.append({"role": "user", "content": turn.user})
                out.append((split, list(messages), turn.answer))
                messages.append({"role": "assistant", "content": turn.answer})
                if turn.result:
                    messages.append({"role": "tool", "content": turn.result})
                    out.append((split, list(messages), turn.reply))
                    messages.append({"role": "assistant", "content": turn.reply})
    return out


def ask(url: str, messages: list, **more) -> dict:
    body = {"messages": messages, "temperature": 0, "max_tokens": 96} | more
    request = urllib.request.Request(url + "/v1/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def text(answer: dict) -> str:
    return answer["choices"][0]["message"]["content"] or ""


def each(items, function, at_once: int):
    with ThreadPoolExecutor(at_once) as workers:
        return list(workers.map(function, items))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Coordinator:
    """A node whose pool are the members; its own model is asked only by name."""

    def __init__(self, a, calibration: dict | None):
        state = a.work / ("state-weighted" if calibration else "state-plain")
        state.mkdir(exist_ok=True)
        for old in state.iterdir():
            old.unlink()
        if calibration:
            (state / "calibration-default.json").write_text(json.dumps(calibration))
        port = free_port()
        members = ", ".join(f'{{name = "{name}", kind = "scoutd", url = "{url}"}}' for name, url in a.members)
        self.process = subprocess.Popen(
            [a.scoutd, "serve", "--listen", f"127.0.0.1:{port}", "--set", "mqtt.enabled=false", "--threads", "1",
             "--set", f"fusion.key_file={a.work}/pool.key", "--set", f"fusion.members=[{members}]"],
            env=os.environ | {"STATE_DIRECTORY": str(state)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 30
        while True:
            try:
                with urllib.request.urlopen(self.url + "/fusion/v1/pool", timeout=5) as answer:
                    pool = json.load(answer)
                if all(member["state"] == "healthy" for member in pool["members"]):
                    self.digests = {member["id"].split("/")[0]: member["digest"] for member in pool["members"]}
                    return
            except OSError:
                pass
            assert time.monotonic() < end, "the pool did not become healthy"
            time.sleep(0.2)

    def fused(self, names, messages, **options) -> dict:
        fusion = {"members": [f"{name}/*" for name in names], "n": len(names), "mode": "best_of",
                  "judge": {"model": "auto", "method": "vote"}, "deadline_ms": 120000} | options
        return ask(self.url, messages, model="fusion", fusion=fusion)

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()


def weight(right: int, asked: int, wrong: float) -> float:
    p = (right + 2) / (asked + 4)
    return max(0.01, math.log(p * wrong / (1 - p)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scoutd", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--member", action="append", required=True)
    parser.add_argument("-n", type=int, default=10, help="conversations of each split, counted")
    parser.add_argument("--calibrate", type=int, default=8, help="conversations of each split for the weights")
    a = parser.parse_args()
    a.members = [tuple(member.split("=", 1)) for member in a.member]
    names = [name for name, _ in a.members]
    learn, test = questions(a.calibrate, 424242), questions(a.n, 987654)

    def alone(items):
        return {name: each(items, lambda q, url=url: text(ask(url, q[1])), 2) for name, url in a.members}

    before, own = alone(learn), alone(test)
    right = {name: sum(got == q[2] for got, q in zip(before[name], learn)) for name in names}
    pairs = Counter()
    for index, (_, _, truth) in enumerate(learn):
        wrong = [before[name][index] for name in names if before[name][index] != truth]
        for one in range(len(wrong)):
            for other in range(one + 1, len(wrong)):
                pairs["all"] += 1
                pairs["equal"] += wrong[one] == wrong[other]
    choices = min(10.0, max(1.0, pairs["all"] / max(pairs["equal"], 1))) if pairs["all"] >= 20 else 2.0
    weights = {name: weight(right[name], len(learn), choices) for name in names}
    print(f"weights from {len(learn)} other answers, {choices:.2f} effective wrong answers:",
          ", ".join(f"{name} {weights[name]:.2f}" for name in names))

    rates = {f"{name} alone": [got == q[2] for got, q in zip(own[name], test)] for name in names}

    def expected(index: int, plain: bool) -> str:
        votes: dict = {}
        for name in names:
            votes[own[name][index]] = votes.get(own[name][index], 0) + (1 if plain else weights[name])
        best = max(votes.values())
        top = [answer for answer, votes_of in votes.items() if votes_of > best - 1e-9]
        return max(top, key=lambda answer: max(weights[name] for name in names if own[name][index] == answer))

    pool = Coordinator(a, None)
    try:
        rates["plain vote"] = each(test, lambda q: text(pool.fused(names, q[1])) == q[2], 2)
        digests = pool.digests
    finally:
        pool.end()
    calibration = {"models": {digests[name]: {"text": {"right": right[name], "asked": len(learn)}} for name in names},
                   "wrong": {"text": dict(pairs)}}
    best = max(names, key=lambda name: sum(rates[f"{name} alone"]))
    pool = Coordinator(a, calibration)
    try:
        rates["weighted vote"] = each(test, lambda q: text(pool.fused(names, q[1])) == q[2], 2)
        rates[f"3 samples of {best}"] = each(test, lambda q: text(pool.fused([best], q[1], n=1, samples=3)) == q[2], 2)
    finally:
        pool.end()
    rates["weighted vote, computed"] = [expected(index, False) == q[2] for index, q in enumerate(test)]

    splits = [q[0] for q in test]
    print(f"\n| {len(test)} answers | " + " | ".join(SPLITS) + " | all |\n|---|" + "---:|" * 5)
    for name, hits in rates.items():
        row = [100 * sum(hit for hit, s in zip(hits, splits) if s == split) / splits.count(split) for split in SPLITS]
        print(f"| {name} | " + " | ".join(f"{rate:.1f}" for rate in row) + f" | {100 * sum(hits) / len(hits):.1f} |")
    members = [sum(rates[f"{name} alone"]) for name in names]
    vote, computed = sum(rates["weighted vote"]), sum(rates["weighted vote, computed"])
    sigma = math.sqrt(len(test) * 0.25)
    print(f"\nweighted vote {vote}, computed from the members' own answers {computed}, best member {max(members)}, "
          f"mean {sum(members) / len(members):.1f}; one sigma is at most {sigma:.1f} answers")
    assert vote >= max(members) - sigma, "the pool is worse than its best member"
    assert abs(vote - computed) <= 3 * sigma, "the vote is not what its members' answers make it"


if __name__ == "__main__":
    main()
