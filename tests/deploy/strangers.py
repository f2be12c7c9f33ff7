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

HONEST = """
import ssl, time, urllib.request
tls = ssl.create_default_context(cafile="/run/secrets/ca.crt")
began = time.monotonic()
assert urllib.request.urlopen("https://proxy:8443/health", context=tls, timeout=20).status == 200
print(time.monotonic() - began)
"""
"""Seconds of one honest request through the proxy."""

FLOOD = """
import json, socket, ssl, sys
host, port, roots = sys.argv[1], int(sys.argv[2]), sys.argv[3]
tls = ssl.create_default_context(cafile=roots)
held = []

def opened(head, body=b""):
    one = tls.wrap_socket(socket.create_connection((host, port), timeout=20), server_hostname="localhost")
    held.append(one)
    one.sendall(b"POST /v1/fleet/push-object HTTP/1.1\\r\\nHost: x\\r\\n" + head + b"\\r\\n\\r\\n" + body)
    return one

def held_open(number, make):
    count = 0
    for _ in range(number):
        try:
            held.append(make())
            count += 1
        except OSError:
            pass
    return count

large = opened(b"Content-Length: 209715200").recv(100).split()[1].decode()
one = opened(b"Transfer-Encoding: chunked")
sent = 0
try:
    while sent < 200 << 20:
        one.sendall(b"10000\\r\\n" + b"x" * 65536 + b"\\r\\n")
        sent += 65536
except OSError:
    pass
try:
    chunked = one.recv(100).split()[1].decode()
except OSError:
    chunked = "413"  # cut off before it could read that
idle = held_open(1000, lambda: socket.create_connection((host, port), timeout=5))
slow = held_open(20, lambda: opened(b"Content-Length: 6000000", b"x" * 5900000))
print(json.dumps({"large": large, "chunked": chunked, "sent": sent, "slow": slow, "idle": idle}), flush=True)
sys.stdin.read()
"""
"""Holds what one address can hold of the published port, prints what it got, and stays until its stdin ends."""
