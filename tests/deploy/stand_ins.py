"""Stand-ins for two official images, made of this machine's own files where no registry can be reached.

They carry the official names, so that the Dockerfiles and the compose file under test stay as they are. They show
that our files work, not that the official images do.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

_WGET = """#!/usr/local/bin/python3
import sys, urllib.request
urllib.request.urlopen(sys.argv[-1], timeout=5)
"""
_NEEDED = [
    "ca-certificates",
    "libssl3",
    "openssl",
    "libffi8",
    "libsqlite3-0",
    "libreadline8",
    "libncursesw6",
    "libuuid1",
    "libexpat1",
    "libbz2-1.0",
    "liblzma5",
    "zlib1g",
    "netbase",
]
_PLACES = [
    "/bin",
    "/sbin",
    "/lib",
    "/lib64",
    "/etc/passwd",
    "/etc/group",
    "/etc/nsswitch.conf",
    "/etc/ssl/certs/ca-certificates.crt",
    "/usr/local/bin",
    "/tmp",
    "/run",
    "/root",
    "/home",
    "/proc",
    "/sys",
    "/dev",
    "/mnt",
    "/opt",
    "/srv",
]
_UNWANTED = {"site-packages", "test", "tests", "idlelib", "tkinter", "__pycache__", "lib2to3"}


def stand_in_python(environment: dict[str, str], folder: Path, name: str) -> str | None:
    """`name` is this machine's Debian, essential packages only, and its CPython under /usr/local. Or why not."""
    if shutil.which("dpkg-query") is None:
        return "this is no Debian"
    if sys.version_info[:2] != (3, 11):
        return f"this is Python {sys.version.split()[0]}, not 3.11"
    _pack(folder / "base.tar")
    path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    imported = [
        "docker",
        "import",
        "-c",
        f"ENV {path} LANG=C.UTF-8",
        str(folder / "base.tar"),
        "fedlora-raw:0",
    ]
    finish = (
        "FROM fedlora-raw:0\n"
        "RUN chmod 1777 /tmp && ldconfig && python3 -m ensurepip >/dev/null\n"
        'CMD ["python3"]\n'
    )
    return _said(imported, environment) or _built(environment, name, finish)


def stand_in_nginx(environment: dict[str, str], folder: Path, name: str) -> str | None:
    """`name` is the Debian package's nginx on the stand-in for Python, with a `wget` of ours. Or why not."""
    context = folder / "nginx"
    context.mkdir()
    for package in ("nginx", "nginx-common"):
        if reason := _said(["apt-get", "download", package], environment, cwd=folder):
            return reason
        (archive,) = folder.glob(f"{package}_*.deb")
        if reason := _said(["dpkg", "-x", str(archive), str(context / "root")], environment):
            return reason
    (context / "wget").write_text(_WGET)
    (context / "wget").chmod(0o755)
    lines = (
        "FROM python:3.11-slim\nCOPY root/usr/sbin/nginx /usr/sbin/nginx\nCOPY root/etc/nginx /etc/nginx\n"
        "COPY wget /usr/bin/wget\nUSER 101:101\n"
    )
    return _built(environment, name, lines, context)


def _built(environment: dict[str, str], name: str, lines: str, context: Path | None = None) -> str | None:
    command = ["docker", "build", "--quiet", "--network=none", "--tag", name, "--file", "-"]
    if context is None:
        return _said([*command[:-2], "-"], environment, given=lines)
    (context / "Dockerfile").write_text(lines)
    return _said([*command[:-2], str(context)], environment)


def _said(
    command: list[str], environment: dict[str, str], given: str = "", cwd: Path | None = None
) -> str | None:
    """None, or what a command said when it failed."""
    done = subprocess.run(command, env=environment, input=given, capture_output=True, text=True, cwd=cwd)
    return None if done.returncode == 0 else f"{' '.join(command[:2])}: {done.stderr.strip()[-500:]}"


def _pack(path: Path) -> None:
    """A tar of the files of the essential packages and of what CPython links to, and of CPython itself."""
    prefix = Path(sys.base_prefix).resolve()
    with tarfile.open(path, "w") as tar:
        seen: set[str] = set()

        def add(source: str, target: str | None = None) -> None:
            name = (target or source).lstrip("/")
            if name and name not in seen and os.path.lexists(source):
                seen.add(name)
                tar.add(source, name, recursive=False)

        for source in sorted(_files_of_packages()):
            for parent in reversed(Path(source).parents):
                add(str(parent))
            add(source)
        library = prefix / "lib" / "python3.11"
        for file in _library(library):
            add(str(file), "/usr/local" + str(file)[len(str(prefix)) :])
        for file in (prefix / "bin" / "python3.11", *(prefix / "lib").glob("libpython3*")):
            add(str(file), "/usr/local" + str(file)[len(str(prefix)) :])
        for link, target in (("python3", "python3.11"), ("python", "python3"), ("pip", "pip3")):
            entry = tarfile.TarInfo(f"usr/local/bin/{link}")
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            tar.addfile(entry)


def _library(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            if path.name not in _UNWANTED and not path.name.startswith("config-"):
                yield from _library(path)
        else:
            yield path


def _files_of_packages() -> set[str]:
    paths = {*_PLACES, *(str(path) for path in Path("/etc/ld.so.conf.d").glob("*"))}
    paths |= {str(path) for path in Path("/etc/alternatives").glob("*")}
    documents = ("/usr/share/doc/", "/usr/share/man/", "/usr/share/locale/", "/usr/share/info/")
    listed = _output("dpkg", "-L", *sorted(_packages()))
    for line in listed.splitlines():
        if line.startswith("/") and not line.startswith(documents) and os.path.lexists(line) and line != "/.":
            paths.add(str(Path(line).parent.resolve() / Path(line).name))
    return paths


def _packages() -> set[str]:
    """The essential packages, what CPython needs, and whatever those depend on, as far as it is installed."""
    form = "-f=${Package}\t${Essential}\t${Priority}\t${Pre-Depends}, ${Depends}\t${Provides}\n"
    depends: dict[str, list[list[str]]] = {}
    provided: dict[str, str] = {}
    wanted = list(_NEEDED)
    for line in _output("dpkg-query", "-W", form).splitlines():
        package, essential, priority, needs, provides = line.split("\t")
        depends[package] = [
            [_bare(name) for name in one.split("|")] for one in needs.split(",") if one.strip()
        ]
        for name in provides.split(","):
            provided.setdefault(_bare(name), package)
        if essential == "yes" or priority == "required":
            wanted.append(package)
    found: set[str] = set()
    while wanted:
        name = wanted.pop()
        package = name if name in depends else provided.get(name)
        if package and package not in found:
            found.add(package)
            known = depends.keys() | provided.keys()
            wanted += [
                next((name for name in names if name in known), names[0]) for names in depends[package]
            ]
    return found


def _bare(name: str) -> str:
    return re.sub(r"[ (:].*", "", name.strip())


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
