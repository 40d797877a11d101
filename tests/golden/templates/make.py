"""Renders chat templates with jinja2, set up as transformers does it, for `tests/it/templates.rs`.

    python make.py [--more FOLDER] [--out FILE]    # PyPI: jinja2 3.1.6

The templates are the built-in ones (`src/template/builtin`), those of `sources/` here (scout-nano's and SmolLM2's own)
and, with --more, every *.jinja of a folder. A template that refuses a conversation gets "error": true.
"""
import argparse
import json
import re
from datetime import datetime
from pathlib import Path

from jinja2.exceptions import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

HERE = Path(__file__).resolve().parent
NOW = datetime(2026, 3, 9, 17, 5)

WEATHER = {"name": "get_weather", "description": "Says <b>what</b> the \"sky\" does — now & later.",
           "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Město"}, "days": {"type": "integer", "minimum": 1}},
                          "required": ["city"]}}
LIGHT = {"name": "light.turn_on", "description": "Turns a light on.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": LIGHT}]


def call(name, arguments, id="abcdefghi"):
    return {"type": "function", "id": id, "function": {"name": name, "arguments": arguments}}


CONVERSATIONS = [
    {"name": "user", "messages": [{"role": "user", "content": " Hello,\n  world!  "}]},
    {"name": "system", "messages": [{"role": "system", "content": "Be terse. "}, {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": " 4 "},
                                    {"role": "user", "content": "A 'quote', {{ braces }} and {% tags %}"}]},
    {"name": "no prompt", "add_generation_prompt": False,
     "messages": [{"role": "system", "content": ""}, {"role": "user", "content": "ahoj"}, {"role": "assistant", "content": "nazdar 😀"}]},
    {"name": "tools", "tools": TOOLS, "messages": [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "Weather in Brno?"}]},
    {"name": "tools, no system", "tools": TOOLS[:1], "messages": [{"role": "user", "content": "Weather in Brno?"}]},
    {"name": "call and result", "tools": TOOLS, "messages": [
        {"role": "user", "content": "Weather in Brno?"},
        {"role": "assistant", "content": "", "tool_calls": [call("get_weather", {"city": "Brno", "days": 2, "x": [1.5, True, None, {"é": "\n"}]})]},
        {"role": "tool", "content": "{\"sky\": \"clear\"}", "tool_call_id": "abcdefghi", "name": "get_weather"},
        {"role": "assistant", "content": "Clear."}, {"role": "user", "content": "Thanks"}]},
]


def environment():
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise TemplateError(message)

    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = NOW.strftime
    return env


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--more", type=Path, help="a folder with further templates")
    parser.add_argument("--out", type=Path, default=HERE / "rendered.json")
    arguments = parser.parse_args()
    builtin = HERE.parents[2] / "src" / "template" / "builtin"
    folders = [builtin, HERE / "sources"] + ([arguments.more] if arguments.more else [])
    cases = []
    for path in sorted(path for folder in folders for path in folder.glob("*.jinja")):
        source = path.read_text(encoding="utf-8")
        for conversation in CONVERSATIONS:
            context = {"messages": conversation["messages"], "tools": conversation.get("tools"), "bos_token": "<s>", "eos_token": "</s>",
                       "add_generation_prompt": conversation.get("add_generation_prompt", True)}
            case = {"template": path.stem, "source": source, **conversation}
            try:
                # transformers' own tag marks what the assistant said, for training; it writes nothing.
                plain = re.sub(r"(\{%-?\s*)(end)?generation(\s*-?%\})", lambda m: m[1] + ("endif" if m[2] else "if true") + m[3], source)
                case["rendered"] = environment().from_string(plain).render(**context)
            except Exception:  # noqa: BLE001: a template may fail in any way
                case["error"] = True
            cases.append(case)
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    arguments.out.write_text(f"[{lines}]\n", encoding="utf-8")
    print(f"{arguments.out.name}: {len(cases)} cases of {len({case['template'] for case in cases})} templates")


if __name__ == "__main__":
    main()
