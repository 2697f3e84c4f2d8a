"""The part of the Hub's API that uploads and downloads of a model use, as a real server on the loopback."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0" * 40
TOKEN = "hf_of_the_test"


class FakeHub:
    """Repositories as maps of file names to bytes, and what was asked of the server.

    Attributes:
        refuses: status with which commits are refused; None: they are taken.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.refuses: int | None = None
        self.address = ""

    def environment(self) -> dict[str, str]:
        """For a process that is to talk to this Hub alone."""
        return {
            "HF_ENDPOINT": self.address,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


@contextmanager
def running():
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, value=b"", status=200, **headers):
            body = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for name, text in {"Content-Length": len(body), **headers}.items():
                self.send_header(name.replace("_", "-"), str(text))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def body(self):
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_GET(self):
            hub.tokens.add(self.headers.get("Authorization"))
            path = self.path.partition("?")[0]
            if path == "/api/whoami-v2":
                return self.answer({"type": "user", "name": "owner", "auth": {}})
            if match := re.fullmatch(r"/api/models/(\w+/[\w.-]+)(/revision/\w+)?", path):
                if match[1] in hub.repositories:
                    return self.answer(
                        {
                            "id": match[1],
                            "modelId": match[1],
                            "sha": COMMIT,
                            "siblings": [{"rfilename": name} for name in hub.repositories[match[1]]],
                        }
                    )
            elif match := re.fullmatch(r"/api/models/(\w+/[\w.-]+)/tree/\w+", path):
                if match[1] in hub.repositories:
                    files = hub.repositories[match[1]]
                    return self.answer(
                        [
                            {"type": "file", "path": name, "size": len(data), "oid": COMMIT}
                            for name, data in files.items()
                        ]
                    )
            elif match := re.fullmatch(r"/(\w+/[\w.-]+)/resolve/\w+/(.+)", path):
                data = hub.repositories.get(match[1], {}).get(match[2])
                if data is not None:
                    tag = hashlib.sha256(data).hexdigest()
                    return self.answer(data, ETag=f'"{tag}"', X_Repo_Commit=COMMIT)
            return self.answer({"error": "not here"}, 404, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

        def do_PUT(self):
            hub.objects[self.path.rpartition("/")[2]] = self.body()
            self.answer()

        def do_POST(self):
            hub.tokens.add(self.headers.get("Authorization"))
            body = self.body()
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'owner'}/{asked['name']}"
                status = 409 if name in hub.repositories else 200
                hub.repositories.setdefault(name, {})
                hub.private.setdefault(
                    name, bool(asked.get("private") or asked.get("visibility") == "private")
                )
                return self.answer({"url": f"{hub.address}/{name}", "name": name}, status)
            if self.path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            if "/preupload/" in self.path:
                modes = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".bin")) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
                return self.answer({"files": modes})
            if self.path.endswith("/info/lfs/objects/batch"):
                objects = [
                    {**item, "actions": {"upload": {"href": f"{hub.address}/objects/{item['oid']}"}}}
                    for item in json.loads(body)["objects"]
                ]
                return self.answer({"transfer": "basic", "objects": objects})
            if match := re.fullmatch(r"/api/models/(\w+/[\w.-]+)/commit/\w+(\?.*)?", self.path):
                if hub.refuses:
                    return self.answer({"error": "no"}, hub.refuses)
                files = hub.repositories[match[1]]
                for line in body.splitlines():
                    entry = json.loads(line)
                    value = entry["value"]
                    if entry["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif entry["key"] == "lfsFile":
                        files[value["path"]] = hub.objects[value["oid"]]
                address = f"{hub.address}/{match[1]}/commit/{COMMIT}"
                return self.answer({"success": True, "commitOid": COMMIT, "commitUrl": address})
            return self.answer({"error": self.path}, 404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
