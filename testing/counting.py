"""A small real server with a child that counts into a file, for whoever starts, freezes and stops processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sedac.bench.plans import Plan, find_free_port

COUNTER = """
import http.server, pathlib, signal, subprocess, sys, threading, time
path, port = pathlib.Path(sys.argv[1]), int(sys.argv[2])
count = "import pathlib, sys, time, signal\\n"
if "--stubborn" in sys.argv:
    count += "signal.signal(signal.SIGTERM, signal.SIG_IGN)\\n"
count += "number = 0\\nwhile True:\\n    number += 1\\n    pathlib.Path(sys.argv[1]).write_text(str(number))\\n    time.sleep(0.01)\\n"
child = subprocess.Popen([sys.executable, "-c", count, str(path)], start_new_session="--away" in sys.argv)
print("the child is", child.pid, flush=True)
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *args):
        pass
def end(*args):
    if "--stubborn" not in sys.argv:
        child.terminate()
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
http.server.ThreadingHTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""
"""A server that answers, with a child that counts into a file."""


def make_plan(path: Path, *flags: str) -> Plan:
    port = find_free_port()
    return Plan(name=path.name, command=(sys.executable, "-c", COUNTER, str(path), str(port), *flags), environment=dict(os.environ), port=port)
