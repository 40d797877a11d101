"""The soak itself: see `run`. Only the standard library."""

import argparse
import http.client
import json
import mmap
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

MIB = 1 << 20
CLIENTS = 4
BACK_S = 5.0


class Cgroup:
    """A memory cgroup of version 2 or 1, made for this run and removed after it."""

    def __init__(self):
        name = f"scoutd-soak-{os.getpid()}"
        if self._has_v2():
            self.v2 = True
            self.path = f"/sys/fs/cgroup/{name}"
            os.mkdir(self.path)
        else:
            self.v2 = False
            self.path = f"/sys/fs/cgroup/memory/{name}"
            os.mkdir(self.path)

    @staticmethod
    def _has_v2():
        try:
            with open("/sys/fs/cgroup/cgroup.controllers") as file:
                if "memory" not in file.read().split():
                    return False
            with open("/sys/fs/cgroup/cgroup.subtree_control", "w") as file:
                file.write("+memory")
            return True
        except OSError:
            return False

    @staticmethod
    def refusal():
        """Why no memory cgroup can be had; None if one can."""
        try:
            group = Cgroup()
            group.limit(256 * MIB)
            group.remove()
            return None
        except OSError as error:
            return f"no memory cgroup can be made here ({error})"

    def _read(self, name):
        with open(f"{self.path}/{name}") as file:
            return file.read()

    def _write(self, name, text):
        with open(f"{self.path}/{name}", "w") as file:
            file.write(str(text))

    def limit(self, size):
        if self.v2:
            self._write("memory.max", size)
            # Swap would hide what the test looks for.
            if os.path.exists(f"{self.path}/memory.swap.max"):
                self._write("memory.swap.max", 0)
        else:
            self._write("memory.limit_in_bytes", size)

    def join(self):
        self._write("cgroup.procs", os.getpid())

    def firm(self):
        """Bytes in use that the kernel cannot simply drop."""
        usage = int(self._read("memory.current" if self.v2 else "memory.usage_in_bytes"))
        prefix = "" if self.v2 else "total_"
        stat = dict(line.split() for line in self._read("memory.stat").splitlines())
        return usage - int(stat[f"{prefix}active_file"]) - int(stat[f"{prefix}inactive_file"])

    def usage(self):
        return int(self._read("memory.current" if self.v2 else "memory.usage_in_bytes"))

    def kills(self):
        text = self._read("memory.events" if self.v2 else "memory.oom_control")
        counts = dict(line.split() for line in text.splitlines())
        return int(counts["oom_kill"])

    def remove(self):
        deadline = time.monotonic() + 10
        while True:
            try:
                return os.rmdir(self.path)
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)


def hog():
    """Takes as many MiB as each line says, forgets all at `0`, answers each line."""
    held = []
    for line in sys.stdin:
        count = int(line)
        if count == 0:
            for piece in held:
                piece.close()
            held.clear()
        for _ in range(count):
            piece = mmap.mmap(-1, MIB)
            for at in range(0, MIB, mmap.PAGESIZE):
                piece[at] = 1
            held.append(piece)
        print("ok", flush=True)


class Hog:
    def __init__(self, group):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--hog"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, preexec_fn=group.join)

    def tell(self, mib):
        self.process.stdin.write(f"{mib}\n")
        self.process.stdin.flush()
        if self.process.stdout.readline() != "ok\n":
            raise AssertionError("the hog is gone")


class Daemon:
    def __init__(self, options, group):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [
            options.scoutd, "serve", "--model", options.model, "--listen", f"127.0.0.1:{self.port}",
            "--set", "mqtt.enabled=false"]
        self.log = open(options.log, "w")
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=self.log, preexec_fn=group.join)
        deadline = time.monotonic() + 60
        while True:
            try:
                if self.get("/readyz")[0] == 200:
                    return
            except OSError:
                pass
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the daemon did not start: see {options.log}")
            time.sleep(0.05)

    def get(self, path):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    def metric(self, name):
        for line in self.get("/metrics")[1].splitlines():
            if line.startswith(f"scoutd_{name} "):
                return float(line.split()[-1])
        return 0.0

    def ask(self, body):
        """(status, text or error, Retry-After) of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        answer = connection.getresponse()
        text = json.loads(answer.read())
        if answer.status == 200:
            return 200, text["choices"][0]["message"]["content"], None
        return answer.status, text["error"], answer.getheader("Retry-After")

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=60)
        self.log.close()
        return code


def requests():
    """Conversations of different lengths, some long enough to need many pages."""
    rooms = ["kitchen", "hall", "study", "garage", "attic", "cellar", "bedroom", "bathroom"]
    found = []
    for index, room in enumerate(rooms):
        devices = "\n".join(
            f"light.{other}_lamp_{n}: {other} lamp {n}, {'on' if (n + index) % 2 else 'off'}"
            for other in rooms for n in range(1 + index % 4 * 3))
        system = f"You are scout, the assistant of this home.\nNow: Monday 08:1{index}\nDevices:\n{devices}"
        for wish in (f"turn on the {room} lamp 0", f"is the {room} lamp 0 on?"):
            messages = [{"role": "system", "content": system}, {"role": "user", "content": wish}]
            found.append({"messages": messages, "temperature": 0, "max_tokens": 96})
    return found


class Clients:
    """Ask without pause; every answer is checked."""

    def __init__(self, daemon, bodies, expected, seed):
        self.daemon, self.bodies, self.expected = daemon, bodies, expected
        self.answers, self.refusals, self.faults = 0, {}, []
        self.lock, self.end = threading.Lock(), threading.Event()
        self.threads = [
            threading.Thread(target=self.run, args=(random.Random(seed + n),)) for n in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    def run(self, chance):
        while not self.end.is_set():
            index = chance.randrange(len(self.bodies))
            try:
                status, answer, retry_after = self.daemon.ask(self.bodies[index])
            except (OSError, ValueError, http.client.HTTPException) as error:
                self.note_fault(f"lost answer: {error!r}")
                return
            if status == 200:
                with self.lock:
                    self.answers += 1
                if answer != self.expected[index]:
                    self.note_fault(f"request {index}: {answer!r} instead of {self.expected[index]!r}")
            elif status == 503 and retry_after is not None and answer.get("code"):
                with self.lock:
                    self.refusals[answer["code"]] = self.refusals.get(answer["code"], 0) + 1
                self.end.wait(0.3)
            else:
                self.note_fault(f"status {status}, Retry-After {retry_after}: {answer}")

    def note_fault(self, fault):
        with self.lock:
            self.faults.append(fault)

    def stop(self):
        self.end.set()
        for thread in self.threads:
            thread.join()


def need(options, bodies, expected):
    """Bytes that the daemon needs at most, with nobody beside it."""
    group = Cgroup()
    try:
        daemon = Daemon(options, group)
        expected.extend(text for _, text, _ in map(daemon.ask, bodies))
        clients = Clients(daemon, bodies, expected, 1)
        most, end = 0, time.monotonic() + 8
        while time.monotonic() < end:
            most = max(most, group.firm() + file_bytes(daemon.process.pid))
            time.sleep(0.02)
        clients.stop()
        if clients.faults:
            raise AssertionError(f"undisturbed, and yet: {clients.faults[0]}")
        daemon.stop()
    finally:
        group.remove()
    return most


def file_bytes(pid):
    """Pages of files that a process has mapped in."""
    with open(f"/proc/{pid}/status") as file:
        for line in file:
            if line.startswith("RssFile:"):
                return int(line.split()[1]) * 1024
    return 0


def cycle(group, limit, hog, daemon, body, chance):
    """Takes memory up to a random share of the limit, holds it, returns it. Seconds until a request is answered."""
    target = limit * chance.choice([0.85, 0.92, 0.96, 0.985])
    pace = chance.choice([1, 2, 4])
    while group.firm() + pace * MIB < target:
        hog.tell(pace)
        if pace < 4:
            time.sleep(0.01)
    time.sleep(chance.choice([0.2, 0.6, 1.5]))
    hog.tell(0)
    start = time.monotonic()
    while True:
        status, answer, _ = daemon.ask(body)
        if status == 200:
            return time.monotonic() - start
        if time.monotonic() - start > 60:
            raise AssertionError(f"no service a minute after the release: {answer}")
        time.sleep(0.05)


def check(condition, what):
    if not condition:
        raise AssertionError(what)


def main(options):
    bodies, expected = requests(), []
    needed = need(options, bodies, expected)
    # The hog's interpreter lives in the same group.
    limit = int(1.5 * needed) + 12 * MIB
    print(f"the daemon needs {needed / MIB:.0f} MiB; the limit is {limit / MIB:.0f} MiB", flush=True)
    chance = random.Random(options.seed)
    group = Cgroup()
    try:
        group.limit(limit)
        daemon, hog = Daemon(options, group), Hog(group)
        clients = Clients(daemon, bodies, expected, options.seed)
        back, rungs, start = [], set(), time.monotonic()
        small = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 1}
        stop = threading.Event()

        def watch():
            while not stop.wait(0.05):
                rungs.add(int(daemon.metric("memory_rung")))
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            for number in range(options.cycles):
                back.append(cycle(group, limit, hog, daemon, small, chance))
                check(not clients.faults, clients.faults[:1])
                check(group.kills() == 0, "the kernel killed")
                if (number + 1) % 25 == 0:
                    print(f"{number + 1} cycles, {clients.answers} answers, refusals {clients.refusals}", flush=True)
                time.sleep(chance.uniform(0.1, 1.0))
        finally:
            stop.set()
            watcher.join()
            clients.stop()
        check(not clients.faults, clients.faults[:1])
        check(group.kills() == 0 and daemon.metric("oom_kills") == 0, "the kernel killed")
        check(daemon.process.poll() is None and hog.process.poll() is None, "somebody has died")
        check(max(back) <= BACK_S, f"service was back only after {max(back):.1f} s")
        check(3 in rungs or 4 in rungs, f"the hog never pressed hard enough: rungs {sorted(rungs)}")
        check(clients.answers > options.cycles, "hardly anything was answered")
        deadline = time.monotonic() + 90
        while daemon.metric("memory_rung") != 0:
            check(time.monotonic() < deadline, "green does not come back")
            time.sleep(0.5)
        acts = [line for line in daemon.get("/metrics")[1].splitlines() if "memory_acts" in line and "#" not in line]
        print("\n".join(acts))
        counts = {line.split('"')[1]: float(line.split()[-1]) for line in acts}
        for act, undo in [("pause", "resume"), ("smaller_pieces", "full_pieces"), ("shorter_line", "full_line")]:
            check(counts.get(act, 0) == counts.get(undo, 0), f"{act} is not undone: {counts}")
        hog.process.stdin.close()
        hog.process.wait()
        check(daemon.stop() == 0, "the daemon did not stop cleanly")
        back.sort()
        print(f"PASSED: {options.cycles} cycles in {time.monotonic() - start:.0f} s, rungs {sorted(rungs)}, "
              f"{clients.answers} answers all as undisturbed, refusals {clients.refusals}, no kill, service back after "
              f"{back[len(back) // 2]:.2f} s (median), {back[-1]:.2f} s (longest)")
    finally:
        for line in open(f"{group.path}/cgroup.procs").read().split():
            os.kill(int(line), signal.SIGKILL)
        group.remove()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--hog", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--scoutd")
    parser.add_argument("--model")
    parser.add_argument("--log")
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    if arguments.hog:
        hog()
    elif arguments.check:
        why = Cgroup.refusal()
        if why:
            print(why)
            sys.exit(1)
    else:
        try:
            main(arguments)
        except AssertionError as error:
            print(f"FAILED: {error}", file=sys.stderr)
            sys.exit(1)
