"""Exact match of whole answers to held-out home requests, through a running daemon.

Conversations come from the corpus that scout-nano was trained on, in splits it has not seen (`tmpl` new phrasings,
`ent` new names, `both`). Each answer is asked for with the true conversation before it. An answer that is not what the
corpus says is a miss; the rates are compared with those of the checkpoint in NumPy (`reference.json`).
"""
import argparse
import json
import random
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2] / "models/recipe"))
from corpus import conversation  # noqa: E402


def rest(port: int, messages: list[dict]) -> str:
    body = {"messages": messages, "temperature": 0, "max_tokens": 96}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def questions(system: str, turns) -> list[tuple[list[dict], str]]:
    """Every answer of a conversation with the messages before it."""
    messages = [{"role": "system", "content": system}] if system else []
    out = []

    def answer(text: str) -> None:
        out.append((list(messages), text))
        messages.append({"role": "assistant", "content": text})

    for t in turns:
        messages.append({"role": "user", "content": t.user})
        answer(t.answer)
        if t.result:
            messages.append({"role": "tool", "content": t.result})
            answer(t.reply)
    return out


def mqtt_asker(port: int, node: str):
    """A function that asks over MQTT 5, with response topic and correlation data."""
    import queue

    import paho.mqtt.client as mqtt
    from paho.mqtt.packettypes import PacketTypes
    from paho.mqtt.properties import Properties

    answers: "queue.Queue[bytes]" = queue.Queue()
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
    client.on_message = lambda _client, _data, message: answers.put(message.payload)
    client.connect("127.0.0.1", port)
    topic = f"scoutd/{node}/response/evaluate"
    client.subscribe(topic, 1)
    client.loop_start()

    def ask(messages: list[dict]) -> str:
        properties = Properties(PacketTypes.PUBLISH)
        properties.ResponseTopic = topic
        properties.CorrelationData = b"evaluate"
        body = json.dumps({"messages": messages, "temperature": 0, "max_tokens": 96})
        client.publish(f"scoutd/{node}/request/chat", body, 1, properties=properties)
        while True:
            reply = json.loads(answers.get(timeout=300))
            if reply["type"] == "final":
                if reply["status"] != "ok":
                    sys.exit(f"FAILED: {reply}")
                return reply["data"]["text"]

    return ask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True, help="HTTP port of the daemon")
    parser.add_argument("--mqtt-port", type=int, help="ask over MQTT at this port instead")
    parser.add_argument("--node", default="scout", help="the daemon's name on MQTT")
    parser.add_argument("--reference", type=Path, default=HERE / "reference.json")
    parser.add_argument("-n", type=int, help="conversations of each split [default: all of the reference]")
    parser.add_argument("--points", type=float, required=True, help="how much lower the rate may be, in points")
    a = parser.parse_args()
    reference = json.loads(a.reference.read_text())
    count = min(a.n or reference["conversations"], reference["conversations"])
    ask = mqtt_asker(a.mqtt_port, a.node) if a.mqtt_port else lambda messages: rest(a.port, messages)

    # A conversation's questions share their beginning, so they are asked in order; conversations side by side.
    def hits(one) -> str:
        return "".join("1" if ask(messages) == want else "0" for messages, want in questions(*one))

    ours_all = theirs_all = total_all = equal_all = 0
    workers = 1 if a.mqtt_port else 2
    for split, recorded in reference["hits"].items():
        rng = random.Random(f"{reference['seed']}-{split}")
        conversations = [conversation(rng, split) for _ in range(count)]
        with ThreadPoolExecutor(workers) as pool:
            ours = "".join(pool.map(hits, conversations))
        theirs = "".join(recorded[:count])
        equal = sum(x == y for x, y in zip(ours, theirs))
        rate = lambda text: 100 * text.count("1") / len(text)
        print(f"{split:5} {len(ours):5} answers: {rate(ours):5.1f} % exact, checkpoint {rate(theirs):5.1f} %, "
              f"{len(ours) - equal} judged differently")
        ours_all, theirs_all = ours_all + ours.count("1"), theirs_all + theirs.count("1")
        total_all, equal_all = total_all + len(ours), equal_all + equal
    ours_rate, theirs_rate = 100 * ours_all / total_all, 100 * theirs_all / total_all
    print(f"all   {total_all:5} answers: {ours_rate:5.1f} % exact, checkpoint {theirs_rate:5.1f} %, "
          f"{total_all - equal_all} judged differently")
    if ours_rate < theirs_rate - a.points:
        sys.exit(f"FAILED: more than {a.points} points below the checkpoint")


if __name__ == "__main__":
    main()
