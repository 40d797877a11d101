"""Uses a running scoutd as the `openai` and `ollama` clients do: check.py URL RECORDED_REQUESTS

Each check is a function; all run, and the exit status says whether all passed. What is checked is the door:
shapes, streams and numbers that hold for any model, and for scout-nano one request that it is trained for.
"""

import json
import sys
import time
import traceback

import httpx
import ollama
import openai

URL, RECORDED = sys.argv[1:3]
HOME = """You are scout, the assistant of this home.
Now: Saturday 07:01
Devices:
light.san_5eb4: kil room desk lamp, on 10%
scene.dinner: dinner, scene"""
ASK = [{"role": "system", "content": HOME}, {"role": "user", "content": "Scout, activate dinner."}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {"entity_id": {"type": "string"}},
                "required": ["entity_id"],
            },
        },
    }
    for name, description in [("scene.turn_on", "Starts a scene."), ("light.turn_on", "Switches a light on.")]
]
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "string", "maxLength": 20}},
    "required": ["answer"],
    "additionalProperties": False,
}

oai = openai.OpenAI(base_url=URL + "/v1", api_key="sk-0000000000000000000", max_retries=0)
oll = ollama.Client(host=URL)
MODEL = oai.models.list().data[0].id
CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def same_as_alone(text):
    """Greedy answers are the same however they are asked for."""
    alone = oai.chat.completions.create(model=MODEL, messages=ASK, temperature=0, max_tokens=24)
    assert text == (alone.choices[0].message.content or ""), (text, alone)


@check
def openai_models():
    models = oai.models.list().data
    assert models and models[0].id == MODEL and models[0].object == "model"
    assert oai.models.retrieve(MODEL).id == MODEL
    assert httpx.get(URL + "/models").json()["data"][0]["id"] == MODEL
    try:
        oai.models.retrieve("no-such-model")
        raise AssertionError("found")
    except openai.NotFoundError as error:
        assert error.code == "model_not_found", error


@check
def openai_chat():
    answer = oai.chat.completions.create(model=MODEL, messages=ASK, temperature=0, max_tokens=24)
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.finish_reason in ("stop", "length", "tool_calls")
    assert choice.message.content or choice.message.tool_calls, answer
    usage = answer.usage
    assert usage.prompt_tokens > 0 and usage.completion_tokens > 0
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert answer.model_extra["timings"]["predicted_n"] == usage.completion_tokens


@check
def openai_stream():
    stream = oai.chat.completions.create(
        model=MODEL, messages=ASK, temperature=0, max_tokens=24, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0
    assert chunks[-2].choices[0].finish_reason in ("stop", "length", "tool_calls")
    assert all(chunk.usage is None for chunk in chunks[:-1])
    same_as_alone("".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]))


@check
def openai_tools():
    answer = oai.chat.completions.create(model=MODEL, messages=ASK, tools=TOOLS, temperature=0, max_tokens=64)
    calls = answer.choices[0].message.tool_calls or []
    for call in calls:
        assert call.id and call.type == "function", call
        assert isinstance(json.loads(call.function.arguments), dict), call
    if calls:
        assert answer.choices[0].finish_reason == "tool_calls", answer
    stream = oai.chat.completions.create(
        model=MODEL, messages=ASK, tools=TOOLS, temperature=0, max_tokens=64, stream=True
    )
    streamed = {}
    for chunk in stream:
        for call in chunk.choices[0].delta.tool_calls or []:
            entry = streamed.setdefault(call.index, {"id": call.id, "name": "", "arguments": ""})
            entry["name"] += call.function.name or ""
            entry["arguments"] += call.function.arguments or ""
    assert [(c["name"], json.loads(c["arguments"])) for c in streamed.values()] == [
        (call.function.name, json.loads(call.function.arguments)) for call in calls
    ], (streamed, calls)
    if "nano" in MODEL:
        assert [call.function.name for call in calls] == ["scene.turn_on"], answer
        assert json.loads(calls[0].function.arguments) == {"entity_id": "scene.dinner"}, answer
    # The second round: what the tool said goes back.
    if calls:
        messages = ASK + [
            answer.choices[0].message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": calls[0].id, "content": '{"success":true}'},
        ]
        second = oai.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS, temperature=0, max_tokens=32)
        assert second.choices[0].message.content or second.choices[0].message.tool_calls, second


@check
def openai_json():
    for form in (
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": SCHEMA}},
    ):
        try:
            answer = oai.chat.completions.create(
                model=MODEL, messages=ASK, response_format=form, temperature=0, max_tokens=200
            )
        except openai.APIStatusError as error:
            # A daemon that cannot hold a model to a grammar has to say so.
            assert error.status_code == 501 and error.code == "not_supported", error
            NOTES.append(f"response_format {form['type']} is not supported: {error.body['message']}")
            continue
        if answer.choices[0].finish_reason == "stop":
            value = json.loads(answer.choices[0].message.content)
            assert isinstance(value, dict), value
            if form["type"] == "json_schema":
                assert list(value) == ["answer"], value


@check
def openai_logprobs():
    answer = oai.chat.completions.create(
        model=MODEL, messages=ASK, temperature=0, max_tokens=8, logprobs=True, top_logprobs=3
    )
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens or answer.choices[0].finish_reason == "stop"
    for token in tokens:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3, token
        assert token.top_logprobs[0].logprob == token.logprob, "greedy takes the likeliest"
    try:
        oai.chat.completions.create(model=MODEL, messages=ASK, logprobs=True, top_logprobs=21)
        raise AssertionError("accepted")
    except openai.BadRequestError as error:
        assert error.param == "top_logprobs", error


@check
def openai_choices_and_seeds():
    def ask(seed):
        answer = oai.chat.completions.create(model=MODEL, messages=ASK, n=3, seed=seed, temperature=1.5, max_tokens=12)
        return [choice.message.content for choice in answer.choices]

    first = ask(7)
    assert len(first) == 3 and first == ask(7), "a seed repeats its answers"


@check
def openai_completions():
    answer = oai.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=4, temperature=0)
    assert answer.choices[0].finish_reason in ("length", "stop") and answer.usage.completion_tokens <= 4
    answer = oai.completions.create(model=MODEL, prompt=["One", "Two"], max_tokens=2, temperature=0, echo=True)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text.startswith("One") and answer.choices[1].text.startswith("Two")
    pieces = oai.completions.create(model=MODEL, prompt="Once", max_tokens=4, temperature=0, stream=True, echo=True)
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices).startswith("Once")


@check
def openai_scoring():
    """As lm-evaluation-harness scores: tokens in, log-probabilities of prompt and one token out."""
    prompt = [20, 30, 40, 50, 60]
    answer = oai.completions.create(
        model=MODEL, prompt=[prompt], echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234
    )
    scores = answer.choices[0].logprobs
    assert len(scores.tokens) == len(prompt) + 1, scores
    assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
    for token, logprob, top in list(zip(scores.tokens, scores.token_logprobs, scores.top_logprobs))[1:]:
        assert logprob <= 0 and top[token] == logprob and max(top.values()) >= logprob
    only = oai.completions.create(model=MODEL, prompt=[prompt], echo=True, logprobs=1, max_tokens=0)
    alone = only.choices[0].logprobs
    assert len(alone.tokens) == len(prompt) and only.usage.completion_tokens == 0
    for one, other in zip(alone.token_logprobs[1:], scores.token_logprobs[1:]):
        assert abs(one - other) < 1e-3, (alone, scores)


@check
def openai_errors():
    for bad, error_type in [
        (dict(model="no-such-model", messages=ASK), openai.NotFoundError),
        (dict(model=MODEL, messages=[]), openai.BadRequestError),
        (dict(model=MODEL, messages=ASK, n=1000000), openai.BadRequestError),
        (dict(model=MODEL, messages=[{"role": "user", "content": "long " * 200_000}]), openai.BadRequestError),
    ]:
        try:
            oai.chat.completions.create(**bad)
            raise AssertionError(f"accepted: {list(bad)}")
        except error_type as error:
            assert error.body["message"], error
    try:
        oai.embeddings.create(model=MODEL, input="x")
        raise AssertionError("embedded")
    except openai.APIStatusError as error:
        assert error.status_code == 501, error


@check
def ollama_list_show_ps():
    names = [model.model for model in oll.list().models]
    assert f"{MODEL}:latest" in names or MODEL in names, names
    shown = oll.show(MODEL)
    assert "completion" in shown.capabilities and shown.details.quantization_level, shown
    running = oll.ps().models[0]
    assert running.context_length > 0 and running.expires_at is not None, running
    assert httpx.get(URL + "/").text == "Ollama is running"
    assert all(part.isdigit() for part in httpx.get(URL + "/api/version").json()["version"].split("."))


@check
def ollama_chat():
    options = {"temperature": 0, "num_predict": 24, "num_ctx": 1024.0}
    whole = oll.chat(model=MODEL, messages=ASK, options=options)
    assert whole.done and whole.done_reason in ("stop", "length") and whole.eval_count > 0
    assert whole.total_duration >= whole.eval_duration and whole.prompt_eval_count > 0
    lines = list(oll.chat(model=MODEL, messages=ASK, options=options, stream=True, keep_alive="-1.0s"))
    assert lines[-1].done and not any(line.done for line in lines[:-1])
    assert "".join(line.message.content or "" for line in lines) == (whole.message.content or "")
    same_as_alone(whole.message.content or "")


@check
def ollama_tools():
    answer = oll.chat(model=MODEL, messages=ASK, tools=TOOLS, options={"temperature": 0, "num_predict": 64})
    calls = answer.message.tool_calls or []
    for call in calls:
        assert isinstance(call.function.arguments, dict), call
    if "nano" in MODEL:
        assert [call.function.name for call in calls] == ["scene.turn_on"], answer
    if calls:
        messages = ASK + [answer.message, {"role": "tool", "content": '{"success":true}', "tool_name": calls[0].function.name}]
        lines = list(oll.chat(model=MODEL, messages=messages, tools=TOOLS, stream=True, options={"temperature": 0, "num_predict": 32}))
        assert lines[-1].done


@check
def ollama_format():
    for form in ("json", SCHEMA):
        try:
            answer = oll.chat(model=MODEL, messages=ASK, format=form, options={"temperature": 0, "num_predict": 200})
        except ollama.ResponseError as error:
            assert error.status_code == 400, error
            NOTES.append(f"format is not supported: {error.error}")
            continue
        if answer.done_reason == "stop":
            assert isinstance(json.loads(answer.message.content), dict), answer


@check
def ollama_generate():
    options = {"temperature": 0, "num_predict": 12}
    first = oll.generate(model=MODEL, prompt="Scout, activate dinner.", system=HOME, options=options)
    assert first.done and first.context, first
    second = oll.generate(model=MODEL, prompt="Thank you.", context=first.context, options=options)
    assert second.prompt_eval_count > first.prompt_eval_count, "the conversation went on"
    lines = list(oll.generate(model=MODEL, prompt="Once", raw=True, stream=True, options=options))
    assert lines[-1].done and "".join(line.response or "" for line in lines)
    loaded = httpx.post(URL + "/api/generate", json={"model": MODEL, "keep_alive": 0, "prompt": ""}).json()
    assert loaded["done"] and loaded["done_reason"] == "unload", loaded
    try:
        oll.generate(model="no-such-model", prompt="x")
        raise AssertionError("found")
    except ollama.ResponseError as error:
        assert error.status_code == 404 and "try pulling it first" in error.error, error


@check
def what_cannot_be_done_in_ollamas_api_is_refused():
    cases = [
        (501, lambda: oll.embed(model=MODEL, input="x")),
        # A name without an owner is none of the hub's, and the built-in model is not in the store.
        (404, lambda: oll.pull("other")),
        (404, lambda: oll.delete(MODEL)),
    ]
    for status, call in cases:
        try:
            call()
            raise AssertionError("done")
        except ollama.ResponseError as error:
            assert error.status_code == status, error


@check
def a_client_that_leaves_frees_its_place():
    long = dict(model=MODEL, messages=ASK, temperature=1.5, max_tokens=100_000)
    for _ in range(6):
        stream = oai.chat.completions.create(stream=True, **long)
        next(iter(stream))
        stream.close()
    lines = oll.chat(model=MODEL, messages=ASK, options={"temperature": 1.5, "num_predict": -1}, stream=True)
    next(lines)
    lines.close()
    deadline = time.monotonic() + 10
    while running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running() == 0, "requests of clients that have left still run"


def running():
    for line in httpx.get(URL + "/metrics").text.splitlines():
        if line.startswith("scoutd_requests_running"):
            return float(line.split()[-1])
    raise AssertionError("scoutd_requests_running is missing")


@check
def listings_answer_while_it_generates():
    streams = [
        oai.chat.completions.create(model=MODEL, messages=ASK, temperature=1.5, max_tokens=400, stream=True)
        for _ in range(3)
    ]
    worst = 0.0
    for path in ["/api/tags", "/v1/models", "/health", "/readyz", "/api/ps"] * 10:
        began = time.monotonic()
        assert httpx.get(URL + path).status_code == 200, path
        worst = max(worst, time.monotonic() - began)
    for stream in streams:
        stream.close()
    NOTES.append(f"slowest listing while generating: {worst * 1000:.0f} ms")
    assert worst < 5, worst


@check
def home_assistant_replay():
    with open(RECORDED, encoding="utf-8") as lines:
        requests = [json.loads(line) for line in lines]
    for request in requests:
        headers = {k: v for k, v in request["h"].items() if k not in ("Content-Length", "Connection")}
        body = request.get("b")
        if body is not None:
            body["model"] = MODEL
            # The model's context may be smaller than what Home Assistant asks for; its prompts fit 2,600 tokens of
            # a large vocabulary, and scout-nano's is small.
            body["options"]["num_predict"] = 16
        content = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode() if body else None
        answer = httpx.request(request["m"], URL + request["p"], headers=headers, content=content, timeout=300)
        assert answer.status_code == 200, answer.text
        if request["p"] == "/api/chat":
            lines = [json.loads(line) for line in answer.text.splitlines()]
            assert lines[-1]["done"] and all("message" in line for line in lines), lines
        else:
            assert answer.json()["models"][0]["model"]


NOTES = []
failed = []
for function in CHECKS:
    try:
        function()
        print(f"ok      {function.__name__}")
    except Exception:
        failed.append(function.__name__)
        print(f"FAILED  {function.__name__}")
        traceback.print_exc()
for note in NOTES:
    print(f"note    {note}")
print(f"{len(CHECKS) - len(failed)} of {len(CHECKS)} checks passed with openai {openai.__version__} and ollama 0.6.3")
sys.exit(1 if failed else 0)
