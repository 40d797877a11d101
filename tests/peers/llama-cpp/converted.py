"""llama.cpp runs checkpoints that were converted here, to the same greedy text.

    converted.py --scoutd BINARY --rival LLAMA_SERVER --work FOLDER CHECKPOINT...

Each checkpoint is converted to F32. llama-server continues prompts of random tokens by 64 tokens, likeliest first; scoutd
then reads prompt and continuation and must find each of these tokens likeliest too, which is equality of the greedy texts
token by token. The token that ends a text is forbidden on both sides.
"""
import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

from compare import TOKENS, call, free_port, ours, rival, rival_greedy

PROMPTS = [4, 37, 110]


def scored(port: int, ids: list[int], start: int, end: str) -> list[bool]:
    """For each token from `start` on, whether we find it likeliest after those before it, apart from the end."""
    body = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 2, "temperature": 0}
    found = call(port, "/v1/completions", body)["choices"][0]["logprobs"]
    likeliest = [max(value for text, value in top.items() if text != end) for top in found["top_logprobs"][start:]]
    return [own == best for own, best in zip(found["token_logprobs"][start:], likeliest, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scoutd", required=True)
    parser.add_argument("--rival", required=True)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    a = parser.parse_args()
    failed = False
    for folder in a.checkpoints:
        model = a.work / f"{folder.name}-f32.gguf"
        subprocess.run([a.scoutd, "convert", folder, "--type", "f32", "--out", model, "--force"], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        inspected = subprocess.run([a.scoutd, "inspect", model, "--json"], check=True, capture_output=True, text=True)
        metadata = json.loads(inspected.stdout)["metadata"]
        vocabulary, eos = metadata["tokenizer.ggml.tokens"]["len"], metadata["tokenizer.ggml.eos_token_id"]
        rng = random.Random(5)
        prompts = [[rng.randrange(vocabulary - 2) for _ in range(count)] for count in PROMPTS]
        port, own = free_port(), free_port()
        with rival(a.rival, str(model), port, "-ctk", "f32", "-ctv", "f32", "-fa", "off"):
            theirs = [rival_greedy(port, ids, [eos]) for ids in prompts]
        with ours(a.scoutd, str(model), own, "model.precision=exact", "model.kv=f32"):
            echo = {"prompt": [0, eos], "max_tokens": 0, "echo": True, "logprobs": 1}
            end = call(own, "/v1/completions", echo)["choices"][0]["logprobs"]["tokens"][1]
            equal = [scored(own, ids + answer, len(ids), end) for ids, answer in zip(prompts, theirs)]
        hits, total = sum(map(sum, equal)), sum(map(len, equal))
        print(f"{folder.name}, converted here: {hits} of {total} greedy tokens of llama.cpp are ours")
        failed |= total != TOKENS * len(PROMPTS) or hits != total
    if failed:
        sys.exit("FAILED: llama.cpp continues a converted file otherwise than scoutd")


if __name__ == "__main__":
    main()
