"""What a stranger and a curious node try: scripts that run inside a container, or against the published port."""

PROBE = """
import http.client, ssl, sys
tls = ssl.create_default_context(cafile="/run/secrets/ca.crt")
for path in sys.argv[1:]:
    one = http.client.HTTPSConnection("proxy", 8443, context=tls, timeout=10)
    one.putrequest("POST", path, skip_host=False)
    one.putheader("Content-Length", "0")
    one.endheaders()
    print(one.getresponse().status, path)
"""
"""A node's POST to each path through the proxy: prints status and path."""

REACH = """
import os, socket, sys
os.environ["RES_OPTIONS"] = "timeout:1 attempts:1"
for place in sys.argv[1:]:
    host, port = place.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
        print(place, "reached")
    except OSError:
        print(place, "-")
"""
"""Which HOST:PORT can be connected to at all."""

RIGHTS = """
import os, resource
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
try:
    open("/app/x", "w"); written = True
except OSError:
    written = False
print(os.getuid(), int(status["CapEff"], 16), int(status["CapBnd"], 16), int(status["NoNewPrivs"]),
      resource.getrlimit(resource.RLIMIT_CORE), written)
"""
"""User, effective and bounding capabilities, no_new_privs, core limit, and whether the image can be written."""

FLOOD = """
import json, os, resource, select, socket, ssl, sys
os.nice(19)  # on one machine with what it attacks: its own work is not theirs
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
host, port, roots = sys.argv[1], int(sys.argv[2]), sys.argv[3]
tls = ssl.create_default_context(cafile=roots)
said = {"passes": 0, "sent": 0, "large": [], "chunked": [], "idle": 0, "slow": 0}
held = {"idle": [], "body": [], "head": []}
POST = b"POST /v1/fleet/push-object HTTP/1.1\\r\\nHost: x\\r\\n"

def secured(text):
    one = tls.wrap_socket(socket.create_connection((host, port), timeout=20), server_hostname="localhost")
    one.sendall(text)
    return one

def status(one):
    try:
        return one.recv(100).split()[1].decode()
    except (OSError, IndexError):
        return "cut off"

def announced():
    try:
        return status(secured(POST + b"Content-Length: 209715200\\r\\n\\r\\n"))
    except OSError:
        return "cut off"

def chunked():
    try:
        one = secured(POST + b"Transfer-Encoding: chunked\\r\\n\\r\\n")
    except OSError:
        return "cut off"
    try:
        for _ in range(200 << 4):
            one.sendall(b"10000\\r\\n" + b"x" * 65536 + b"\\r\\n")
            said["sent"] += 65536
    except OSError:
        pass
    return status(one)

def lives(one, crumb):
    try:
        if crumb:
            one.sendall(crumb)
            return True
        return one.recv(1, socket.MSG_DONTWAIT) != b""
    except BlockingIOError:
        return True
    except OSError:
        one.close()
        return False

def full(kind, number, crumb, make):
    held[kind] = [one for one in held[kind] if lives(one, crumb)]
    for _ in range(number - len(held[kind])):
        try:
            held[kind].append(make())
        except OSError:
            pass
    return len(held[kind])

while not select.select([sys.stdin], [], [], 0)[0]:
    said["large"] = sorted({*said["large"], announced()})
    said["chunked"] = sorted({*said["chunked"], chunked()})
    said["idle"] = full("idle", 1000, b"", lambda: socket.create_connection((host, port), timeout=5))
    body = POST + b"Content-Length: 6000000\\r\\n\\r\\n" + b"x" * 5900000
    said["slow"] = full("body", 8, b"x", lambda: secured(body)) + full("head", 12, b"x", lambda: secured(POST))
    said["passes"] += 1
    if said["passes"] == 1:
        print(flush=True)
print(json.dumps({**said, "seconds": sum(os.times()[:2])}), flush=True)
"""
"""Again and again: 200 MB announced, 200 MB in chunks, 1,000 connections that say nothing, and slow ones.

An empty line when all of it is there for the first time; what it got, and its own seconds of work, when stdin ends.
"""
