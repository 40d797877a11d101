"""Uses a running scoutd over MQTT as the house does: check.py SCOUTD [ARGUMENTS OF serve ...]

Each check is a function of a `House`: a broker and a daemon. All run, and the exit status says whether all passed.
What is checked is the door; what the model says is its own affair, so answers are only compared with themselves.
"""

import contextlib
import json
import os
import pathlib
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback

import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

SCOUTD, ARGUMENTS = sys.argv[1], sys.argv[2:]
ROOT = pathlib.Path(__file__).resolve().parents[3]
NODE = "peer"
BASE = f"scoutd/{NODE}"
PATIENCE = 60
LOGIN = ("scoutd", "daemon-password")
KITCHEN = ("kitchen", "kitchen-password")
CHECKS = []


def check(*kinds):
    def add(function):
        CHECKS.append((kinds, function))
        return function

    return add


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def serve(http):
    return [SCOUTD, "serve", "--set", f'rest.listen=["127.0.0.1:{http}"]']


class House:
    """A broker and a daemon on free ports of loopback; `kind` is embedded, mosquitto, v311 or tls."""

    def __init__(self, kind, folder):
        self.kind, self.folder = kind, folder
        self.port, self.http, self.tls_port = free_port(), free_port(), free_port()
        self.broker = self.daemon = None

    @property
    def guarded(self):
        return self.kind != "embedded"

    def start_broker(self):
        if not self.guarded:
            return
        config = self.folder / "mosquitto.conf"
        if not config.exists():
            make_mosquitto(self.folder, self.port, self.tls_port, config)
        self.broker = subprocess.Popen(
            [shutil.which("mosquitto"), "-c", config],
            stdout=open(self.folder / "mosquitto.log", "ab"),
            stderr=subprocess.STDOUT,
        )
        wait_for_port(self.port, self.broker)

    def start_daemon(self):
        settings = {"mqtt.node": NODE}
        if self.kind == "embedded":
            settings["mqtt.listen"] = f"127.0.0.1:{self.port}"
        else:
            (self.folder / "password").write_text(LOGIN[1] + "\n")
            settings["mqtt.username"] = LOGIN[0]
            settings["mqtt.password_file"] = self.folder / "password"
            settings["mqtt.broker"] = f"127.0.0.1:{self.port}"
        if self.kind == "v311":
            settings["mqtt.protocol"] = "3.1.1"
        if self.kind == "tls":
            settings["mqtt.broker"] = f"mqtts://localhost:{self.tls_port}"
            settings["mqtt.ca_file"] = self.folder / "ca.crt"
        command = serve(self.http)
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        self.daemon = subprocess.Popen(
            command + ARGUMENTS,
            stdout=open(self.folder / "scoutd.log", "ab"),
            stderr=subprocess.STDOUT,
            cwd=self.folder,
        )
        if self.kind == "embedded":
            wait_for_port(self.port, self.daemon)
        self.wait_until_online()

    def wait_until_online(self):
        """The daemon answers requests: what `availability` says may be older."""
        with self.client(f"{BASE}/response/#") as client:
            deadline = time.monotonic() + PATIENCE
            while True:
                assert self.daemon.poll() is None, "the daemon ended"
                client.publish(f"{BASE}/request/status", b"{}")
                try:
                    return client.final(f"{BASE}/response/status", timeout=1)
                except queue.Empty:
                    assert time.monotonic() < deadline, "the daemon does not come online"

    def stop(self):
        for process in (self.daemon, self.broker):
            if process and process.poll() is None:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def client(self, *filters, version=paho.MQTTv311, login=LOGIN):
        return Client(self.port, filters, version, login if self.guarded else None)

    def tool(self, name, *arguments, login=LOGIN):
        credentials = ["-u", login[0], "-P", login[1]] if self.guarded else []
        command = [name, "-h", "127.0.0.1", "-p", str(self.port), *credentials, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


def make_mosquitto(folder, port, tls_port, config):
    """The sample configuration and access list, with places of this test put in."""
    os.chmod(folder, 0o755)
    passwords = folder / "passwd"
    for i, (user, password) in enumerate([LOGIN, KITCHEN]):
        create = ["-c"] if i == 0 else []
        subprocess.run(["mosquitto_passwd", "-b", *create, passwords, user, password], check=True, capture_output=True)
    os.chmod(passwords, 0o644)
    make_certificates(folder)
    sample = (ROOT / "etc/mosquitto/scoutd.conf").read_text()
    sample = sample.replace("listener 1883", f"listener {port} 127.0.0.1")
    sample = sample.replace("/etc/mosquitto/passwd", str(passwords))
    sample = sample.replace("/etc/mosquitto/scoutd.acl", str(ROOT / "etc/mosquitto/scoutd.acl"))
    sample = sample.replace("persistence true", "persistence false")
    for line in ["listener 8883", "cafile", "certfile", "keyfile"]:
        sample = sample.replace("#" + line, line)
    sample = sample.replace("listener 8883", f"listener {tls_port} 127.0.0.1")
    sample = sample.replace("/etc/mosquitto/certs", str(folder))
    user = "root" if os.getuid() == 0 else ""
    config.write_text((f"user {user}\n" if user else "") + sample)


def make_certificates(folder):
    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=folder)

    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    openssl("req", "-x509", *new_key, "-days", "2", "-subj", "/CN=test CA", "-keyout", "ca.key", "-out", "ca.crt")
    openssl("req", *new_key, "-subj", "/CN=localhost", "-keyout", "server.key", "-out", "server.csr")
    (folder / "server.ext").write_text("subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\n")
    openssl(
        *("x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2".split()),
        *("-extfile server.ext -out server.crt".split()),
    )


def wait_for_port(port, process):
    deadline = time.monotonic() + PATIENCE
    while True:
        assert process.poll() is None, "it ended while starting"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        assert time.monotonic() < deadline, f"nothing listens on {port}"
        time.sleep(0.05)


class Client:
    """paho, with received messages in a queue."""

    def __init__(self, port, filters, version, login):
        self.messages = queue.Queue()
        self.version, self.lost = version, False
        self.subscribed = queue.Queue()
        self.paho = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=version)
        if login:
            self.paho.username_pw_set(*login)
        self.paho.on_message = lambda _c, _u, message: self.messages.put(message)
        self.paho.on_subscribe = lambda _c, _u, mid, *_: self.subscribed.put(mid)
        self.paho.on_disconnect = lambda *_: setattr(self, "lost", True)
        self.paho.connect("127.0.0.1", port)
        self.paho.loop_start()
        for topic in filters:
            self.paho.subscribe(topic, 1)
            self.subscribed.get(timeout=PATIENCE)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.paho.disconnect()
        self.paho.loop_stop()

    def publish(self, topic, payload, response=None, correlation=None, retain=False):
        properties = None
        if response:
            properties = Properties(PacketTypes.PUBLISH)
            properties.ResponseTopic = response
            properties.CorrelationData = correlation
        if isinstance(payload, dict):
            payload = json.dumps(payload)
        info = self.paho.publish(topic, payload, qos=1, retain=retain, properties=properties)
        info.wait_for_publish(PATIENCE)

    def next(self, timeout=PATIENCE):
        return self.messages.get(timeout=timeout)

    def on(self, topic, timeout=PATIENCE):
        while True:
            message = self.next(timeout)
            if message.topic == topic:
                return message

    def final(self, topic, timeout=PATIENCE):
        while True:
            answer = json.loads(self.on(topic, timeout).payload)
            if answer["type"] == "final":
                return answer


def ask(**fields):
    return {"prompt": "hello, who are you?", "temperature": 0, "max_tokens": 12, **fields}


@check("embedded", "mosquitto", "tls")
def mosquitto_rr_gets_its_answer(house):
    request, response = f"{BASE}/request/chat", f"{BASE}/response/kitchen"
    arguments = ["-V", "5", "-t", request, "-e", response, "-W", "30", "-m", json.dumps(ask())]
    done = house.tool("mosquitto_rr", *arguments, login=KITCHEN)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["type"] == "final" and answer["status"] == "ok", answer
    assert answer["data"]["usage"]["completion_tokens"] > 0, answer


@check("embedded", "mosquitto", "v311", "tls")
def a_311_client_is_paired_by_reply_to_and_id(house):
    with house.client(f"{BASE}/response/kitchen/#", login=KITCHEN) as client:
        topic = f"{BASE}/response/kitchen/1"
        client.publish(f"{BASE}/request/chat", ask(id="a1", reply_to=topic, transaction={"n": 1}))
        answer = client.final(topic)
        assert (answer["id"], answer["status"], answer["transaction"]) == ("a1", "ok", {"n": 1}), answer


@check("embedded", "mosquitto", "tls")
def correlation_data_comes_back_byte_for_byte(house):
    with house.client(f"{BASE}/response/kitchen", version=paho.MQTTv5, login=KITCHEN) as client:
        data = bytes([0, 255, 10, 13, 128])
        client.publish(f"{BASE}/request/chat", ask(), f"{BASE}/response/kitchen", data)
        message = client.next()
        assert message.properties.CorrelationData == data, message.properties
        assert message.properties.ContentType == "application/json"
        assert json.loads(message.payload)["status"] == "ok"


@check("embedded", "mosquitto", "v311", "tls")
def a_stream_is_numbered_and_its_final_whole(house):
    with house.client(f"{BASE}/response/#") as client:
        topic = f"{BASE}/response/stream"
        for _ in range(5):
            client.publish(f"{BASE}/request/chat", ask(reply_to=topic, stream=True, max_tokens=64))
            chunks, answer = read_stream(client, topic)
            assert answer["status"] == "ok" and answer["chunks"] > 0, answer
            text = answer["data"]["text"]
            client.publish(f"{BASE}/request/chat", ask(reply_to=topic, max_tokens=64))
            assert client.final(topic)["data"]["text"] == text, "greedy answers are the same, streamed or not"
            # Chunks are sent at QoS 0, so a busy broker may lose one; it may not lose one every time.
            if len(chunks) == answer["chunks"]:
                assert "".join(chunks) == text, (chunks, answer)
                return
        raise AssertionError("a chunk was lost in every stream")


def read_stream(client, topic):
    """The deltas in order, and the final, which a broker may deliver before chunks of a lower QoS."""
    chunks, answer = [], None
    while answer is None or len(chunks) < answer["chunks"]:
        try:
            message = json.loads(client.on(topic, timeout=PATIENCE if answer is None else 3).payload)
        except queue.Empty:
            if answer is None:
                raise
            break
        if message["type"] == "final":
            answer = message
        elif message["type"] == "chunk":
            assert message["seq"] >= len(chunks), message
            chunks.append(message["delta"])
        else:
            assert message["type"] == "accepted" and not chunks, message
    return chunks, answer


@check("embedded", "mosquitto", "v311")
def bad_payloads_are_answered(house):
    cases = [
        (b"this is not JSON", "not JSON"),
        (b"[1]", "object"),
        (b'{"messages":[]}', "messages"),
        (b'{"prompt":7}', "prompt"),
        (json.dumps({"prompt": "x" * (300 << 10)}).encode(), "payload of"),
        (json.dumps({"prompt": "x", "model": "no-such"}).encode(), "no-such"),
    ]
    with house.client(f"{BASE}/response/#") as client:
        for payload, named in cases:
            client.publish(f"{BASE}/request/chat", payload)
            answer = client.final(f"{BASE}/response/chat")
            assert answer["status"] == "error" and named in answer["error"], answer
        client.publish(f"{BASE}/request/chat", ask())
        assert client.final(f"{BASE}/response/chat")["status"] == "ok"


@check("embedded", "mosquitto", "v311")
def a_cancelled_request_ends_at_once(house):
    with house.client(f"{BASE}/response/#") as client:
        for attempt in range(5):
            # Enough before it that it still waits or runs when its cancel comes.
            names = [f"c{attempt}-{i}" for i in range(8)]
            topic = f"{BASE}/response/cancel-test"
            for name in names:
                client.publish(f"{BASE}/request/chat", ask(id=name, reply_to=topic, max_tokens=256))
            client.publish(f"{BASE}/request/cancel", {"id": names[-1]})
            finals, result = {}, None
            while len(finals) < len(names) or result is None:
                message = client.next()
                answer = json.loads(message.payload)
                if message.topic == topic:
                    finals[answer["id"]] = answer
                elif message.topic == f"{BASE}/response/cancel":
                    result = answer["data"]["result"]
            if result == "cancelled" and finals[names[-1]]["status"] == "error":
                assert finals[names[-1]]["code"] == "cancelled", finals[names[-1]]
                assert finals[names[0]]["status"] == "ok", finals[names[0]]
                return
        raise AssertionError("the request always ended before its cancel")


@check("embedded", "mosquitto", "v311", "tls")
def state_and_availability_are_retained(house):
    done = house.tool("mosquitto_sub", "-t", f"{BASE}/availability", "-C", "1", "-W", "30")
    assert done.stdout.strip() == "online", (done.stdout, done.stderr)
    done = house.tool("mosquitto_sub", "-t", f"{BASE}/state", "-C", "1", "-W", "30", login=KITCHEN)
    state = json.loads(done.stdout)
    assert state["headroom_bytes"] > 0 and state["mqtt_connected"] == 1, state
    done = house.tool("mosquitto_sub", "-t", f"{BASE}/models", "-C", "1", "-W", "30")
    assert json.loads(done.stdout)["models"][0]["default"] is True
    done = house.tool("mosquitto_sub", "-t", f"homeassistant/device/scoutd_{NODE}/config", "-C", "1", "-W", "30")
    if not house.guarded:  # the access list lets the daemon write this, not read it
        assert json.loads(done.stdout)["dev"]["ids"] == [f"scoutd_{NODE}"]


@check("embedded", "mosquitto")
def a_plain_question_is_answered_on_last(house):
    with house.client(f"{BASE}/last") as client:
        done = house.tool("mosquitto_pub", "-q", "1", "-t", f"{BASE}/ask/set", "-m", "hello")
        assert done.returncode == 0, done.stderr
        last = json.loads(client.next().payload)
        assert last["status"] == "ok" and len(last["summary"]) <= 255, last


@check("mosquitto")
def the_access_list_keeps_answers_apart(house):
    with house.client("#", login=KITCHEN) as spy:
        with house.client(f"{BASE}/response/#") as client:
            topic = f"{BASE}/response/bathroom"
            client.publish(f"{BASE}/request/chat", ask(reply_to=topic))
            assert client.final(topic)["status"] == "ok"
        spy.publish(f"{BASE}/request/chat", ask(reply_to=f"{BASE}/response/kitchen"))
        while True:
            message = spy.next()
            assert "bathroom" not in message.topic, message.topic
            if message.topic == f"{BASE}/response/kitchen":
                return


@check("mosquitto", "v311")
def a_restart_of_the_broker_is_survived(house):
    house.broker.terminate()
    house.broker.wait(20)
    house.start_broker()
    house.wait_until_online()
    done = house.tool("mosquitto_sub", "-t", f"{BASE}/availability", "-C", "1", "-W", "30")
    assert done.stdout.strip() == "online", done.stderr


@check("mosquitto", "v311")
def a_killed_daemon_is_declared_offline(house):
    with house.client(f"{BASE}/availability") as client:
        assert client.next().payload == b"online"
        house.daemon.kill()
        house.daemon.wait()
        assert client.next().payload == b"offline"
    house.start_daemon()


@check("embedded")
def a_killed_daemon_takes_its_broker_along_and_comes_back(house):
    with house.client(f"{BASE}/availability") as client:
        assert client.next().payload == b"online"
        house.daemon.kill()
        house.daemon.wait()
        deadline = time.monotonic() + PATIENCE
        while not client.lost:
            assert time.monotonic() < deadline, "the connection stands without a broker"
            time.sleep(0.05)
    house.start_daemon()


@check("embedded")
def a_second_daemon_is_told_that_the_port_is_taken(house):
    command = serve(free_port())
    command += ["--set", f"mqtt.listen=127.0.0.1:{house.port}"] + ARGUMENTS
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=house.folder)
    assert done.returncode != 0
    assert f'mqtt.broker = "127.0.0.1:{house.port}"' in done.stderr + done.stdout, done.stderr


@check("mosquitto", "v311", "tls")
def a_stopped_daemon_says_offline(house):
    with house.client(f"{BASE}/availability") as client:
        assert client.next().payload == b"online"
        house.daemon.send_signal(signal.SIGTERM)
        assert house.daemon.wait(20) == 0
        assert client.next().payload == b"offline"


@check("tls")
def only_the_pinned_authority_is_trusted(house):
    foreign = house.folder / "foreign"
    foreign.mkdir(exist_ok=True)
    make_certificates(foreign)
    log = foreign / "scoutd.log"
    command = serve(free_port()) + ["--set", "mqtt.node=foreign"]
    command += ["--set", f"mqtt.broker=mqtts://localhost:{house.tls_port}", "--set", f"mqtt.ca_file={foreign}/ca.crt"]
    with open(log, "wb") as out:
        daemon = subprocess.Popen(command + ARGUMENTS, stdout=out, stderr=subprocess.STDOUT, cwd=foreign)
        try:
            deadline = time.monotonic() + PATIENCE
            while "invalid peer certificate" not in log.read_text(errors="replace"):
                assert daemon.poll() is None, log.read_text(errors="replace")
                assert time.monotonic() < deadline, log.read_text(errors="replace")
                time.sleep(0.1)
        finally:
            daemon.terminate()
            daemon.wait(20)


@check("embedded", "mosquitto", "v311", "tls")
def nothing_is_left_where_the_daemon_stood(house):
    left = {path.name for path in house.folder.iterdir()}
    assert not any("storage" in name for name in left), left


def main():
    failures = 0
    for kind in ["embedded", "mosquitto", "v311", "tls"]:
        with tempfile.TemporaryDirectory(prefix="scoutd-mqtt-") as folder:
            house = House(kind, pathlib.Path(folder))
            try:
                house.start_broker()
                house.start_daemon()
                for kinds, function in CHECKS:
                    if kind in kinds:
                        failures += not passed(kind, function, house)
            except Exception:
                traceback.print_exc()
                print(f"FAILED {kind}: it did not start")
                failures += 1
            finally:
                house.stop()
                if failures:
                    for name in ["scoutd.log", "mosquitto.log"]:
                        log = house.folder / name
                        if log.exists():
                            print(f"--- {name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-30:]))
    print("all passed" if failures == 0 else f"{failures} failed")
    return failures != 0


def passed(kind, function, house):
    name = function.__name__.replace("_", " ")
    try:
        function(house)
    except Exception:
        traceback.print_exc()
        print(f"FAILED {kind}: {name}")
        return False
    print(f"ok {kind}: {name}")
    return True


sys.exit(main())
