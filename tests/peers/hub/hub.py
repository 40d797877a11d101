"""A hub that serves a folder by the Hugging Face hub's protocol: models, redirects to a second host, ranges, tokens.

usage: hub.py FOLDER [--tls CERTIFICATE KEY] [--token TOKEN] [--slow BYTES_PER_S]

FOLDER/OWNER/NAME/* are the repositories. Prints its address and the second host's, then serves. Files of 1 MiB and more
are "large": they have a SHA-256 and lie on the second host, which refuses whoever shows it a token.
"""

import argparse
import hashlib
import http.server
import json
import pathlib
import re
import ssl
import sys
import threading
import time
import urllib.parse

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=pathlib.Path)
parser.add_argument("--tls", nargs=2)
parser.add_argument("--token")
parser.add_argument("--slow", type=int)
arguments = parser.parse_args()

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
LARGE = 1 << 20
digests = {}


def sha256(path):
    if path not in digests:
        digests[path] = hashlib.sha256(path.read_bytes()).hexdigest()
    return digests[path]


def git_oid(path):
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_file(self, path, etag, **headers):
        data = path.read_bytes()
        status, start, end = 200, 0, len(data)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and self.headers.get("If-Range", etag) == etag:
            start = int(wanted[1])
            end = min(int(wanted[2]) + 1, len(data)) if wanted[2] else len(data)
            if start >= len(data):
                return self.answer(416, Content_Range=f"bytes */{len(data)}")
            status = 206
            headers["Content_Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        self.send_response(status)
        headers |= {"ETag": etag, "Accept_Ranges": "bytes", "Content_Length": str(end - start)}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        step = 65536 if arguments.slow else end - start
        for at in range(start, end, max(step, 1)):
            self.wfile.write(data[at : min(at + step, end)])
            if arguments.slow:
                time.sleep(step / arguments.slow)


class Hub(Handler):
    def do_GET(self):
        if arguments.token and self.headers.get("Authorization") != f"Bearer {arguments.token}":
            return self.answer(401, X_Error_Code="GatedRepo", X_Error_Message="Access to this model is restricted.")
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        if listing := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/([\w.-]+))?", path):
            return self.listing(listing[1], listing[2] or "main", "blobs" in urllib.parse.parse_qs(url.query))
        if tree := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/tree/([\w.-]+)", path):
            return self.tree(*tree.groups())
        if file := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)", path):
            return self.resolve(*file.groups())
        self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

    def repository(self, name, revision):
        folder = arguments.folder / name
        if not folder.is_dir():
            # As the real hub answers strangers about what is not there.
            self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif revision not in ("main", COMMIT):
            self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        else:
            return folder

    def listing(self, name, revision, blobs):
        if not (folder := self.repository(name, revision)):
            return
        siblings = []
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            sibling = {"rfilename": str(path.relative_to(folder))}
            if blobs:
                size = path.stat().st_size
                sibling |= {"size": size, "blobId": git_oid(path)}
                if size >= LARGE:
                    sibling["lfs"] = {"sha256": sha256(path), "size": size, "pointerSize": 134}
            siblings.append(sibling)
        self.answer(200, json.dumps({
            "_id": "1", "id": name, "modelId": name, "sha": COMMIT, "private": False, "gated": False,
            "tags": ["gguf"], "downloads": 0, "siblings": siblings, "cardData": {"license": "apache-2.0"},
        }).encode(), Content_Type="application/json")

    def tree(self, name, revision):
        if not (folder := self.repository(name, revision)):
            return
        entries = []
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            size = path.stat().st_size
            entry = {"type": "file", "path": str(path.relative_to(folder)), "size": size, "oid": git_oid(path)}
            if size >= LARGE:
                entry["lfs"] = {"oid": sha256(path), "size": size, "pointerSize": 134}
            entries.append(entry)
        self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")

    def resolve(self, name, revision, file):
        if not (folder := self.repository(name, revision)):
            return
        path = folder / file
        if not path.is_file():
            return self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", X_Repo_Commit=COMMIT)
        if path.stat().st_size < LARGE:
            return self.send_file(path, f'"{git_oid(path)}"', X_Repo_Commit=COMMIT)
        digest, size = sha256(path), path.stat().st_size
        self.answer(302, Location=f"{second_url}/blobs/{digest}?path={urllib.parse.quote(str(path))}",
                    X_Repo_Commit=COMMIT, X_Linked_Etag=f'"{digest}"', X_Linked_Size=str(size))


class Second(Handler):
    def do_GET(self):
        if self.headers.get("Authorization"):
            return self.answer(400, b"a token came along")
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        path = pathlib.Path(query["path"][0])
        self.send_file(path, f'"{sha256(path)[:32]}"')


def server(address, handler):
    httpd = http.server.ThreadingHTTPServer((address, 0), handler)
    if arguments.tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*arguments.tls)
        httpd.socket = context.wrap_socket(httpd.socket, server_side=True)
    scheme = "https" if arguments.tls else "http"
    return httpd, f"{scheme}://{address}:{httpd.server_port}"


second, second_url = server("127.0.0.2", Second)
hub, hub_url = server("127.0.0.1", Hub)
threading.Thread(target=second.serve_forever, daemon=True).start()
print(hub_url, second_url, flush=True)
try:
    hub.serve_forever()
except KeyboardInterrupt:
    sys.exit(0)
