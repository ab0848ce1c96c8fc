"""Real reward servers and judges in processes of their own, some of which misbehave. Run as a script by the tests."""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PLAN: dict[str, Any] = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
"""``fail``: requests that fail first; ``until``: samples, beyond which all do; ``status`` of those; ``few``, ``nan``:
what is wrong with answers; ``version``, ``later``: at first, and of answers; ``delay``: seconds of each answer;
``replies``: what a judge says, the last one again and again."""
SEEN: list[Any] = []
LOCK = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/seen":
            return self.say(200, SEEN)
        limit = PLAN.get("limit", 8)
        return self.say(
            200, {"protocol": PLAN.get("protocol", 1), "version": PLAN.get("version", "v1"), "batch_limit": limit}
        )

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        asked = body.get("samples", body)
        if not asked:
            return self.say(200, {"scores": []})
        with LOCK:
            number = len(SEEN)
            SEEN.append([self.path, self.headers.get("authorization"), body])
        if PLAN.get("hang"):
            threading.Event().wait()
        samples = sum(len(seen.get("samples", ())) for _, _, seen in SEEN[: number + 1])
        if number < PLAN.get("fail", 0) or samples > PLAN.get("until", samples):
            return self.say(PLAN.get("status", 503), {"detail": "not now"})
        time.sleep(PLAN.get("delay", 0.0))
        if "replies" in PLAN:
            replies = PLAN["replies"]
            text = replies[min(number, len(replies) - 1)]
            return self.say(200, {"choices": [{"message": {"role": "assistant", "content": text}}]})
        scores = [float(len(one["completion"])) for one in asked]
        if PLAN.get("few"):
            scores = scores[:-1]
        if PLAN.get("nan"):
            scores[-1] = float("nan")
        answer = {"scores": scores} | ({"version": PLAN["later"]} if "later" in PLAN else {})
        return self.say(200, answer)

    def say(self, status: int, answer: Any) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None: ...


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", PLAN.get("port", 0)), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()
