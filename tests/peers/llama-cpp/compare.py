"""Compare greedy text and likeliest tokens of scoutd and llama-server on the same GGUF files.

Both get token ids, so tokenizers and templates do not matter here. For the greedy texts end-of-text tokens are forbidden
on both sides, so that every prompt yields 64 tokens. The likeliest tokens are compared at every position of
conversations from the model's corpus: text it was made for, where a tie is rare.
"""
import argparse
import contextlib
import json
import random
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "models/recipe"))
from corpus import conversation  # noqa: E402

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


def conversations(count: int) -> list[str]:
    """Whole conversations as the template renders them."""
    turn = "<|header_start|>{}<|header_end|>\n\n{}<|eot|>".format
    texts = []
    for n in range(count):
        system, turns = conversation(random.Random(n), "seen", 4)
        parts = ["<|begin_of_text|>", turn("system", system)]
        for t in turns:
            parts += [turn("user", t.user), turn("assistant", t.answer)]
            if t.result:
                parts += [turn("ipython", t.result), turn("assistant", t.reply)]
        texts.append("".join(parts))
    return texts


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


def rival_best(port: int, ids: list[int]) -> list[str]:
    """The text of what the rival finds likeliest after each beginning of `ids`."""
    body = {"n_predict": 1, "temperature": 0, "cache_prompt": True}
    return [call(port, "/completion", body | {"prompt": ids[:n]})["content"] for n in range(1, len(ids))]


def our_greedy(port: int, ids: list[int], banned: list[int]) -> list[str]:
    """The generated tokens as text pieces: the completions API answers in text."""
    body = {"prompt": ids, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1,
            "logit_bias": {str(token): -100 for token in banned}}
    return call(port, "/v1/completions", body)["choices"][0]["logprobs"]["tokens"]


def our_best(port: int, ids: list[int]) -> list[str]:
    """The text of what we find likeliest after each beginning of `ids`."""
    body = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
    scored = call(port, "/v1/completions", body)["choices"][0]["logprobs"]
    return [max(top, key=top.get) for top in scored["top_logprobs"][1:]]


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

    for name, model in (("F32", a.f32), ("Q8_0", a.q8), ("Q4_0", a.q4)):
        with rival(a.rival, model, port):
            texts = [tokenize(text) for text in conversations(12)]
            theirs = [rival_best(port, ids) for ids in texts]
        with ours(a.scoutd, model, own):
            best = [our_best(own, ids) for ids in texts]
        # llama-server writes control tokens as nothing, so positions where they are likeliest do not count.
        pairs = [(x, y) for one, other in zip(theirs, best) for x, y in zip(one, other) if x and "\ufffd" not in x]
        share = 100 * sum(x == y for x, y in pairs) / len(pairs)
        print(f"{name}: likeliest token equal on {share:.1f} % of {len(pairs)} positions")
        failed |= share < 95
    if failed:
        sys.exit("FAILED: llama.cpp and scoutd disagree")


if __name__ == "__main__":
    main()
