"""Model management with the real `ollama` client of PyPI.

usage: ollama_client.py URL REPO
"""

import sys

import ollama

client, repo = ollama.Client(host=sys.argv[1]), sys.argv[2]
SERVED = "scout-nano-q4_0:latest"


def names():
    return sorted(model.model for model in client.list().models)


assert names() == [SERVED], names()

# Under another name the same content is another model of the store; `REPO:QUANT` as Ollama's users write it.
lines = list(client.pull(f"hf.co/{repo}:Q4_0", stream=True))
assert lines[0].status == "pulling manifest" and lines[-1].status == "success", lines
try:
    client.pull("house/nothing")
    sys.exit("pulled what is not there")
except ollama.ResponseError as error:
    assert "house/nothing" in str(error), error
assert client.pull(repo).status == "success"

try:
    client.delete("nothing")
    sys.exit("deleted what is not there")
except ollama.ResponseError as error:
    assert error.status_code == 404 and "nothing" in str(error), error
try:
    client.delete("scout-nano-q4_0")
    sys.exit("deleted the served model")
except ollama.ResponseError as error:
    assert error.status_code == 409, error
answer = client.chat(model="scout-nano-q4_0", messages=[{"role": "user", "content": "hello"}], options={"num_predict": 4})
assert answer.message.content
print("the real ollama client manages models")
