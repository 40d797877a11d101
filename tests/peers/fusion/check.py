"""A pool under fire: members that fail in every way, and what the daemon answers meanwhile.

Every request must be answered before its deadline and 50 ms, each failed member must have a reason of its fault, streams
that are no longer needed must be closed within 100 ms, and in the end nothing may still run.
"""

import argparse
import json
import queue
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent

# What each fault may be called. A member that others made needless is told so instead.
FAULTS = {
    "refused": {"connect_refused"},
    "black_hole": {"connect_timeout"},
    "accept_stall": {"first_byte_timeout", "deadline"},
    "slow_drip": {"deadline", "stall"},
    "reset": {"reset"},
    "http_500": {"http_500"},
    "busy": {"busy"},
    "empty": {"no_text"},
    "whitespace": {"whitespace"},
    "reasoning_only": {"reasoning_only"},
    "bad_json": {"bad_json"},
    "flood": {"too_large"},
    "redirect": {"redirect"},
    "wrong_model": {"wrong_model"},
}
NEEDLESS = {"early_stop", "grace_over"}
DEADLINE_MS = 2500


class Stub:
    """A stub server in a process of its own, and in a network namespace of its own where there are any."""

    def __init__(self, address: str, port: int, namespace: str | None):
        command = [sys.executable, str(HERE / "stub.py"), address, str(port)]
        if namespace:
            command = ["ip", "netns", "exec", namespace, *command]
        self.url = f"http://{address}:{port}"
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.events: "queue.Queue[dict]" = queue.Queue()
        threading.Thread(target=self.read, daemon=True).start()
        self.wait("ready")

    def read(self) -> None:
        for line in self.process.stdout:
            self.events.put(json.loads(line))

    def wait(self, event: str, patience: float = 10) -> dict:
        end = time.monotonic() + patience
        while True:
            found = self.events.get(timeout=max(end - time.monotonic(), 0.001))
            if found["event"] == event:
                return found

    def mode(self, name: str, text: str = "on") -> None:
        self.process.stdin.write(f"mode {name} {text}\n")
        self.process.stdin.flush()
        self.wait("mode")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def call(url: str, body: dict | None = None, method: str | None = None, timeout: float = 30) -> tuple[int, dict]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, method=method)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")


def metric(url: str, name: str) -> float:
    with urllib.request.urlopen(url + "/metrics", timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith(name + " "):
                return float(line.split()[1])
    raise KeyError(name)


class Bench:
    def __init__(self, url: str, stubs: list[Stub]):
        self.url, self.stubs = url, stubs
        self.failures: list[str] = []
        self.times: list[float] = []
        self.requests = 0

    def join(self, names: list[str], kind: str = "openai") -> None:
        """Members anew, so that no breaker remembers what came before."""
        for name, stub in zip(names, self.stubs):
            call(f"{self.url}/fusion/v1/members/{name}", method="DELETE")
            body = {"name": name, "kind": kind, "url": stub.url, "model": "m"}
            status, answer = call(f"{self.url}/fusion/v1/members", body)
            assert status == 200, answer

    def ask(self, names: list[str], **options) -> tuple[int, dict, float]:
        fusion = {"members": [f"{name}/*" for name in names], "n": len(names), "deadline_ms": DEADLINE_MS} | options
        body = {"model": "fusion", "messages": [{"role": "user", "content": "Is the lamp on or off?"}],
                "max_tokens": 16, "temperature": 0, "fusion": fusion}
        began = time.monotonic()
        status, answer = call(self.url + "/v1/chat/completions", body)
        took = time.monotonic() - began
        self.requests += 1
        self.times.append(took)
        return status, answer, took

    def fail(self, what: str) -> None:
        self.failures.append(what)
        print("FAILED:", what, flush=True)


def one(bench: Bench, names: list[str], fault: str, faulty: int) -> None:
    where = f"n={len(names)} f={faulty} {fault}"
    status, answer, took = bench.ask(names)
    if status != 200:
        return bench.fail(f"{where}: status {status}: {answer}")
    if took > DEADLINE_MS / 1000 + 0.05:
        bench.fail(f"{where}: took {took:.3f} s")
    text = answer["choices"][0]["message"]["content"]
    report = answer.get("fusion") or {}
    good = len(names) - faulty
    if not text.strip():
        bench.fail(f"{where}: an empty answer")
    if good and text.strip() != "on":
        bench.fail(f"{where}: {text!r} though {good} members say on")
    if faulty == len(names) and not report.get("degraded"):
        bench.fail(f"{where}: not degraded: {report}")
    bad = set(names[:faulty])
    for member in report.get("members", []):
        name = member["id"].split("/")[0]
        allowed = FAULTS[fault] if name in bad else {None}
        # With nobody good there is nothing that could make a failing member needless.
        needless = NEEDLESS if good else set()
        if name in bad | set(names) and member["reason"] not in allowed | needless:
            bench.fail(f"{where}: {member['id']} is {member['state']} for {member['reason']}")


def matrix(bench: Bench, repeat: int) -> None:
    for n in (3, 5):
        names = [f"s{index}" for index in range(n)]
        for fault in FAULTS:
            # Only Ollama and scoutd name their model faithfully.
            kind = "ollama" if fault == "wrong_model" else "openai"
            for faulty in range(n + 1):
                for index, stub in enumerate(bench.stubs[:n]):
                    stub.mode(fault if index < faulty else "good")
                for _ in range(repeat):
                    bench.join(names, kind)
                    one(bench, names, fault, faulty)
            print(f"n={n} {fault}: {bench.requests} requests, {len(bench.failures)} failures", flush=True)


def early_stop(bench: Bench) -> None:
    """Two agree, the third's stream is closed at once; a client that goes away closes all of them."""
    names = ["s0", "s1", "s2"]
    for index, stub in enumerate(bench.stubs[:3]):
        stub.mode("slow_good" if index == 2 else "good")
    worst = 0.0
    for _ in range(10):
        bench.join(names)
        while not bench.stubs[2].events.empty():
            bench.stubs[2].events.get()
        status, answer, _ = bench.ask(names)
        ended = time.monotonic()
        if status != 200:
            bench.fail(f"early stop: {answer}")
        worst = max(worst, bench.stubs[2].wait("closed")["t"] - ended)
    print(f"early stop: the third's socket closed at most {worst * 1000:.1f} ms after the answer", flush=True)
    if worst > 0.1:
        bench.fail(f"early stop: socket open for {worst:.3f} s")
    for stub in bench.stubs[:3]:
        stub.mode("slow_good")
    worst = 0.0
    for _ in range(5):
        bench.join(names)
        for stub in bench.stubs[:3]:
            while not stub.events.empty():
                stub.events.get()
        host, port = bench.url.removeprefix("http://").split(":")
        body = json.dumps({"model": "fusion", "stream": True, "messages": [{"role": "user", "content": "on?"}],
                           "fusion": {"members": [f"{name}/*" for name in names], "n": 3}}).encode()
        client = socket.create_connection((host, int(port)))
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n\r\n" % (host.encode(), len(body)) + body)
        for stub in bench.stubs[:3]:
            stub.wait("asked")
        client.close()
        gone = time.monotonic()
        for stub in bench.stubs[:3]:
            worst = max(worst, stub.wait("closed")["t"] - gone)
    print(f"client gone: all sockets closed at most {worst * 1000:.1f} ms later", flush=True)
    if worst > 0.1:
        bench.fail(f"client gone: socket open for {worst:.3f} s")


def idle(bench: Bench) -> None:
    for name in ("scoutd_peer_requests_running", "scoutd_requests_running"):
        end = time.monotonic() + 3
        while (value := metric(bench.url, name)) and time.monotonic() < end:
            time.sleep(0.05)
        if value:
            bench.fail(f"{name} is {value} after the last request")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--url", required=True)
    arguments.add_argument("--stub", action="append", required=True, help="ADDRESS:PORT[@NAMESPACE]")
    arguments.add_argument("--repeat", type=int, default=5)
    asked = arguments.parse_args()
    stubs = []
    for place in asked.stub:
        place, _, namespace = place.partition("@")
        address, port = place.split(":")
        stubs.append(Stub(address, int(port), namespace or None))
    bench = Bench(asked.url, stubs)
    try:
        matrix(bench, asked.repeat)
        early_stop(bench)
        idle(bench)
    finally:
        for stub in stubs:
            stub.end()
    times = sorted(bench.times)
    print(f"{bench.requests} requests: median {times[len(times) // 2]:.3f} s, slowest {times[-1]:.3f} s, "
          f"deadline {DEADLINE_MS / 1000:.1f} s; {len(bench.failures)} failures", flush=True)
    sys.exit(bool(bench.failures))


if __name__ == "__main__":
    main()
