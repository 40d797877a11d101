"""The requests that `scoutd verify` asks when no others are given: conversations in held-out phrasings, JSON lines.

    python home_requests.py > ../../src/convert/verify/home.jsonl
"""
import json
import random

from corpus import conversation

SEED, SPLIT, COUNT = 7, "tmpl", 80


def main() -> None:
    rng = random.Random(f"{SEED}-{SPLIT}")
    for _ in range(COUNT):
        system, turns = conversation(rng, SPLIT)
        lines = []
        for t in turns:
            line = {"user": t.user, "answer": t.answer}
            if t.result:
                line |= {"result": t.result, "reply": t.reply}
            lines.append(line)
        print(json.dumps({"system": system, "turns": lines}, ensure_ascii=False, separators=(",", ":")))


if __name__ == "__main__":
    main()
