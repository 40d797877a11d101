"""Compare greedy text and likeliest tokens of scoutd and llama-server on the same GGUF files.

Both get token ids, so tokenizers and templates do not matter here. End-of-text tokens are forbidden on both sides, so
that every prompt yields 64 tokens.
"""
import argparse
import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request

TOKENS = 64
SYSTEM = """You are scout, the assistant of this home.
Now: Wednesday 13:02
Devices:
fan.greenhouse_blower: greenhouse blower, on
switch.hall_router: hall router, on
sensor.mudroom_brightness_level: mudroom brightness level, 724 lx
lock.back_door: back door, unlocked
light.kitchen_ceiling: kitchen ceiling light, off
cover.bedroom_blind: bedroom blind, open"""
REQUESTS = [
    "turn on the kitchen ceiling light",
    "is the back door locked?",
    "set the bedroom blind to 40 percent",
    "what is the mudroom brightness level?",
    "lock the back door, please",
    "stop the greenhouse blower",
    "hello, who are you?",
    "set a timer for 12 minutes",
    "which day is it?",
    "switch the hall router off and on again",
    "close the blind in the bedroom",
    "how bright is the garage?",
]


def prompt(request: str) -> str:
    turn = "<|header_start|>{}<|header_end|>\n\n{}<|eot|>".format
    return "<|begin_of_text|>" + turn("system", SYSTEM) + turn("user", request) + "<|header_start|>assistant<|header_end|>\n\n"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def call(port: int, path: str, body=None, timeout=120):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.load(answer)


@contextlib.contextmanager
def server(command: list[str], port: int):
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                call(port, "/health", timeout=2)
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"FAILED: {command[0]} did not become ready")
                time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait()


def ours(binary: str, model: str, port: int, *settings: str):
    command = [binary, "serve", "--model", model, "--set", f"rest.listen=[\"127.0.0.1:{port}\"]", "--set", "mqtt.enabled=false"]
    for setting in settings:
        command += ["--set", setting]
    return server(command, port)


def rival(binary: str, model: str, port: int, *flags: str):
    command = [binary, "-m", model, "--host", "127.0.0.1", "--port", str(port), "-t", "1", "-c", "2048", "-np", "1"]
    return server([*command, "--no-warmup", *flags], port)


def rival_greedy(port: int, ids: list[int], banned: list[int]) -> list[int]:
    body = {"prompt": ids, "n_predict": TOKENS, "temperature": 0, "cache_prompt": False, "return_tokens": True,
            "logit_bias": [[token, False] for token in banned]}
    return call(port, "/completion", body)["tokens"]


def our_greedy(port: int, ids: list[int], banned: list[int]) -> list[str]:
    """The generated tokens as text pieces: the completions API answers in text."""
    body = {"prompt": ids, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1,
            "logit_bias": {str(token): -100 for token in banned}}
    return call(port, "/v1/completions", body)["choices"][0]["logprobs"]["tokens"]


def our_best(port: int, ids: list[int]) -> list[tuple[str, str]]:
    """For each token of `ids`: its text, and the text of what we find likeliest there."""
    body = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
    scored = call(port, "/v1/completions", body)["choices"][0]["logprobs"]
    pairs = []
    for token, own, top in zip(scored["tokens"], scored["token_logprobs"], scored["top_logprobs"]):
        best = token if not top or max(top.values()) <= own else max(top, key=top.get)
        pairs.append((token, best))
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("scoutd", "rival", "f32", "q8", "q4"):
        parser.add_argument(f"--{name}", required=True)
    a = parser.parse_args()
    failed = False

    port, own = free_port(), free_port()
    with rival(a.rival, a.f32, port, "-ctk", "f32", "-ctv", "f32", "-fa", "off"):
        tokenize = lambda text: call(port, "/tokenize", {"content": text, "parse_special": True})["tokens"]
        prompts = [tokenize(prompt(request)) for request in REQUESTS]
        banned = [tokenize(text)[-1] for text in ("<|eot|>", "<|eom|>", "<|end_of_text|>")]
        theirs = [rival_greedy(port, ids, banned) for ids in prompts]
        pieces = [[call(port, "/detokenize", {"tokens": [t]})["content"] for t in answer] for answer in theirs]
    with ours(a.scoutd, a.f32, own, "model.precision=exact", "model.kv=f32"):
        equal = 0
        for request, ids, want in zip(REQUESTS, prompts, pieces):
            got = our_greedy(own, ids, banned)
            equal += got == want
            if got != want:
                at = next((i for i, (x, y) in enumerate(zip(got, want)) if x != y), min(len(got), len(want)))
                print(f"  {request!r}: differs at token {at}: {got[at:at + 3]} instead of {want[at:at + 3]}")
    print(f"F32: {equal} of {len(prompts)} greedy continuations of {TOKENS} tokens equal")
    failed |= equal != len(prompts)

    for name, model in (("Q8_0", a.q8), ("Q4_0", a.q4)):
        with rival(a.rival, model, port):
            theirs = [rival_greedy(port, ids, banned) for ids in prompts]
        same = total = 0
        with ours(a.scoutd, model, own):
            for ids, answer in zip(prompts, theirs):
                for token, best in our_best(own, ids + answer)[len(ids):]:
                    same += token == best
                    total += 1
        share = 100 * same / total
        print(f"{name}: likeliest token equal on {share:.1f} % of {total} positions")
        failed |= share < 95
    if failed:
        sys.exit("FAILED: llama.cpp and scoutd disagree")


if __name__ == "__main__":
    main()
