"""A pool of real members, asked as the `openai` and `ollama` clients ask: members.py --url URL --kill PID"""

import argparse
import json
import os
import signal
import time
import urllib.request

import ollama
import openai

arguments = argparse.ArgumentParser(description=__doc__)
arguments.add_argument("--url", required=True)
arguments.add_argument("--kill", type=int, required=True, help="the process of the member pi-c")
asked = arguments.parse_args()
URL = asked.url
OAI = openai.OpenAI(base_url=URL + "/v1", api_key="none", max_retries=0, timeout=120)
OLL = ollama.Client(host=URL, timeout=120)
HOME = """You are scout, the assistant of this home.
Now: Monday 08:15
Devices:
light.kitchen_lamp: kitchen lamp, off
lock.front_door: front door, locked"""
ASK = [{"role": "system", "content": HOME}, {"role": "user", "content": "turn on the kitchen lamp"}]
CALL = '{"name":"light.turn_on","parameters":{"entity_id":"light.kitchen_lamp"}}'


def pool() -> dict:
    with urllib.request.urlopen(URL + "/fusion/v1/pool", timeout=10) as answer:
        return {member["id"]: member for member in json.loads(answer.read())["members"]}


def until(what, patience: float = 30):
    end = time.monotonic() + patience
    while not (found := what()):
        assert time.monotonic() < end, "not in time"
        time.sleep(0.2)
    return found


def all_healthy() -> bool:
    return all(member["state"] == "healthy" for member in pool().values()) and len(pool()) == 4


def fused(model: str = "fusion", **options) -> tuple[str, dict]:
    began = time.monotonic()
    answer = OAI.chat.completions.create(model=model, messages=ASK, temperature=0, max_tokens=40,
                                         extra_body={"fusion": {"deadline_ms": 60000} | options})
    took = time.monotonic() - began
    report = answer.model_extra["fusion"]
    members = ", ".join(f"{m['id']} {m['state']}{' ' + m['reason'] if m['reason'] else ''} {m['ms']} ms" for m in report["members"])
    print(f"{report['mode_used']} in {took:.2f} s, winner {report['winner']}: {members}", flush=True)
    return answer.choices[0].message.content, report


until(all_healthy)
print("members:", ", ".join(pool()))
names = [model.id for model in OAI.models.list().data]
assert "fusion" in names, names

# The two nano files agree, so their answer wins whatever the other models say.
nano = ["local/*", "pi-c/*"]
text, report = fused(members=nano, n=2, answer={"type": "json"})
assert text == CALL, text
assert {m["state"] for m in report["members"]} <= {"ok", "cancelled"}, report
text, report = fused(n=4, quorum=2)
assert text and report["quorum"]["usable"] >= 2, report
text, report = fused("fusion:house", mode="best_of", n=3)
assert text and report["mode_used"] in ("best_of", "vote"), report
receipt = urllib.request.urlopen(f"{URL}/fusion/v1/receipts/{report['id']}", timeout=10).read()
assert json.loads(receipt)["winner"], receipt
# Several samples of one member.
text, report = fused(members=["pi-b/*"], n=1, samples=3)
assert text and sum(m["id"].startswith("pi-b/") for m in report["members"]) == 3, report

pieces = []
for chunk in OAI.chat.completions.create(model="fusion", messages=ASK, temperature=0, max_tokens=40, stream=True,
                                         extra_body={"fusion": {"members": nano, "n": 2}}):
    pieces.append(chunk.choices[0].delta.content or "")
assert "".join(pieces) == CALL, pieces

answer = OLL.chat(model="fusion", messages=ASK, options={"temperature": 0, "num_predict": 40})
assert answer.message.content and answer.done, answer
lines = list(OLL.chat(model="fusion:latest", messages=ASK, options={"temperature": 0, "num_predict": 40}, stream=True))
assert lines[-1].done and "".join(line.message.content for line in lines), lines

# A member is killed: the pool goes on, and knows it.
os.kill(asked.kill, signal.SIGKILL)
for _ in range(3):
    text, report = fused(n=4, quorum=2)
    assert text, report
until(lambda: pool()["pi-c/nano-q8_0"]["state"] in ("open", "left"))
try:
    OAI.chat.completions.create(model="fusion", messages=ASK, extra_body={"fusion": {"judges": "me"}})
    raise AssertionError("an unknown key was accepted")
except openai.BadRequestError as error:
    assert "judges" in str(error), error
print("real members: all as expected")
