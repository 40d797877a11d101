"""A server of OpenAI's and Ollama's dialect that answers, or fails in one of the ways of the fault table: stub.py ADDRESS PORT

Commands come as lines on standard input: `mode NAME [TEXT]`. What happens to connections goes to standard output as JSON
lines with the system's monotonic time, which is the same for every process of the machine.
"""

import asyncio
import json
import socket
import sys
import time

ADDRESS, PORT = sys.argv[1], int(sys.argv[2])
MODE = ["good", "on"]
SERVER: list = []


def tell(**event) -> None:
    print(json.dumps(event | {"t": time.monotonic()}), flush=True)


def chunk(delta: dict, finish=None, model: str = "m") -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return b"data: " + json.dumps({"model": model, "choices": [choice]}).encode() + b"\n\n"


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


def plain(status: str, body: bytes = b"", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\n{more}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


def stop(text: str) -> bytes:
    usage = {"choices": [], "usage": {"prompt_tokens": 20, "completion_tokens": 2}}
    return chunk({"content": text}) + chunk({}, "stop") + b"data: " + json.dumps(usage).encode() + b"\n\ndata: [DONE]\n\n"


ANSWERS = {
    "http_500": plain("500 Oops", b"oops"),
    "busy": plain("503 Busy", b"", "Retry-After: 3\r\n"),
    "empty": plain("200 OK", b"", "Content-Type: text/event-stream\r\n"),
    "whitespace": HEAD + chunk({"content": " \n "}, "stop") + b"data: [DONE]\n\n",
    "reasoning_only": HEAD + chunk({"reasoning_content": "let me think"}, "stop") + b"data: [DONE]\n\n",
    "bad_json": HEAD + b'data: {"choices": [\n\n',
    "redirect": plain("302 Found", b"", "Location: http://8.8.8.8/v1/chat/completions\r\n"),
    "reset": HEAD + chunk({"content": "The lamp is"}),
}


async def request(reader: asyncio.StreamReader) -> bytes:
    """Reads a request; its path."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next((line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), b": 0")
    await reader.readexactly(int(length.split(b":")[1]))
    return head.split(b" ")[1]


def ollama(path: bytes, mode: str, text: str) -> bytes:
    if path == b"/api/tags":
        return plain("200 OK", b'{"models":[{"name":"m:latest"}]}')
    model = "somebody-else" if mode == "wrong_model" else "m"
    lines = [{"model": model, "message": {"role": "assistant", "content": text}, "done": False},
             {"model": model, "message": {"content": ""}, "done": True, "done_reason": "stop", "eval_count": 1}]
    body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    return plain("200 OK", body, "Content-Type: application/x-ndjson\r\n")


async def until_closed(reader: asyncio.StreamReader) -> None:
    try:
        while await reader.read(4096):
            pass
    except OSError:
        pass


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    mode, text = MODE
    try:
        path = await request(reader)
        tell(event="asked", mode=mode)
        if path.startswith(b"/api/"):
            writer.write(ollama(path, mode, text))
            await writer.drain()
        elif mode in ANSWERS:
            writer.write(ANSWERS[mode])
            await writer.drain()
            if mode == "reset":
                writer.transport.abort()
        elif mode == "good":
            await asyncio.sleep(0.03)
            writer.write(HEAD + stop(text))
            await writer.drain()
        elif mode == "slow_good":
            writer.write(HEAD + chunk({"content": text[:1]}))
            await writer.drain()
            await until_closed(reader)
        elif mode == "accept_stall":
            await until_closed(reader)
        elif mode == "slow_drip":
            writer.write(HEAD)
            while True:
                writer.write(b": \n")
                await writer.drain()
                await asyncio.sleep(0.05)
        elif mode == "flood":
            writer.write(HEAD)
            piece = chunk({"content": "x" * 65536})
            for _ in range(1600):
                writer.write(piece)
                await writer.drain()
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        tell(event="closed", mode=mode)
        writer.close()


async def listen(backlog: int = 100) -> None:
    SERVER[:] = [await asyncio.start_server(serve, ADDRESS, PORT, backlog=backlog, reuse_address=True)]


def full_queue() -> list:
    """A listener that drops what comes, as a machine that was switched off."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((ADDRESS, PORT))
    listener.listen(0)
    held = [listener]
    while True:
        filler = socket.socket()
        filler.settimeout(0.2)
        held.append(filler)
        try:
            filler.connect((ADDRESS, PORT))
        except OSError:
            return held


async def main() -> None:
    await listen()
    held: list = []
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    tell(event="ready")
    while line := (await lines.readline()).decode().split():
        _, mode, *text = line
        MODE[:] = [mode, text[0] if text else "on"]
        for one in held:
            one.close()
        held.clear()
        if mode in ("refused", "black_hole"):
            for server in SERVER:
                server.close()
            SERVER.clear()
            if mode == "black_hole":
                held = full_queue()
        elif not SERVER:
            await listen()
        tell(event="mode", mode=mode)


asyncio.run(main())
