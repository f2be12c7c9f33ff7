"""The command that prepares a deployment: certificates and keys."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlora.cli.output import Format, FormatOption, show
from fedlora.errors import ConfigError

if TYPE_CHECKING:
    from fedlora.provision.provision import Kit


def add_to(app: typer.Typer) -> None:
    """The app knows this command."""
    app.command("provision", short_help="Make certificates and keys for a deployment.")(provision)


def provision(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write; made if missing.")],
    nodes: Annotated[
        int | None, typer.Option("--nodes", help="Nodes in all; keys that lie in DIR count.")
    ] = None,
    server_name: Annotated[
        list[str] | None,
        typer.Option("--server-name", metavar="NAME", help="A host name or IP of the server; repeatable."),
    ] = None,
    days: Annotated[int | None, typer.Option("--days", help="Of the server's certificate. [365]")] = None,
    renew: Annotated[bool, typer.Option("--renew", help="A new server certificate, same authority.")] = False,
    node: Annotated[
        str | None,
        typer.Option("--node", metavar="NAME", help="Only this node's key pair, on the node itself."),
    ] = None,
    form: FormatOption = Format.TEXT,
) -> None:
    """Make certificates and keys for a deployment. Giving it again adds what is missing; no key is overwritten."""
    from fedlora.provision import provision as kits

    if node is None:
        kit = kits.provision(
            directory,
            nodes=nodes,
            now=datetime.now(UTC),
            server_names=server_name or [],
            days=days,
            renew=renew,
        )
        value = described(kit)
        show(value, _text(value), form)
        return
    if nodes is not None or server_name or days is not None or renew:
        raise ConfigError(
            "--node makes one key pair and nothing else; leave the other options away, or --node"
        )
    made = kits.provision_node(directory, node)
    value = _one_node(directory, node, made)
    show(value, f"{_files(value['files'])}\n\n  next: {value['next']}", form)


def described(kit: "Kit") -> dict[str, Any]:
    """The kit as one document: every file with its purpose, who gets it, and when it ends."""
    from fedlora.provision.kit import AUTHORITY_KEY
    from fedlora.provision.provision import REGISTER

    names = [path.name for path in kit.directory.iterdir() if not path.name.endswith(".part")]
    files = [
        {
            "file": name,
            "state": ("made" if name in kit.made else "kept") if name in names else "elsewhere",
            "purpose": purpose,
            "recipient": recipient,
            "ends": f"{kit.ends[name]:%Y-%m-%dT%H:%M:%SZ}" if name in kit.ends else None,
        }
        for name, purpose, recipient in _purposes(kit)
        if name in names or name == AUTHORITY_KEY
    ]
    findings = [
        {"code": found.code, "text": found.text, "mend": found.mend, "fatal": found.fatal}
        for found in kit.findings
    ]
    return {
        "directory": str(kit.directory),
        "server_names": list(kit.server_names),
        "nodes": list(kit.nodes),
        "register": str(kit.directory / REGISTER),
        "files": files,
        "findings": findings,
        "notes": list(kit.notes),
    }


def _purposes(kit: "Kit") -> list[tuple[str, str, str]]:
    """(file, what it is for, who must get it), in the order in which one hands them out."""
    both = "SuperLink and proxy"
    rows = [
        ("ca.key", "signs server certificates", "nobody; best kept off the server"),
        ("ca.crt", "--root-certificates, --ssl-ca-certfile", "SuperLink, proxy, every node"),
        ("server.crt", "--ssl-certfile", both),
        ("server.key", "--ssl-keyfile", f"{both}, nobody else"),
        ("superexec.secret", "--superexec-auth-secret-file", "SuperLink and server executor"),
        ("nodes.json", "the nodes to register", "who registers them"),
    ]
    for name in kit.nodes:
        rows.append((f"{name}.key", "--auth-supernode-private-key", f"{name} alone; then remove it here"))
        rows.append((f"{name}.pub", f"flwr supernode register --name {name}", "who registers it"))
    earlier = [name for name in kit.ends if name.startswith("server-")]
    return [
        *rows,
        *((name, "earlier server certificate", "nobody") for name in earlier),
        (".gitignore", "keeps keys out of git", "nobody"),
    ]


def _one_node(directory: Path, name: str, made: Sequence[str]) -> dict[str, Any]:
    from fedlora.provision.node_keys import fingerprint, public_line

    uses = {
        f"{name}.key": ("--auth-supernode-private-key", "this node alone"),
        f"{name}.pub": (f"flwr supernode register --name {name}", "the server's operator"),
    }
    files = [
        {
            "file": file,
            "state": "made" if file in made else "kept",
            "purpose": purpose,
            "recipient": recipient,
            "ends": None,
        }
        for file, (purpose, recipient) in uses.items()
    ]
    line = public_line(directory / f"{name}.pub")
    step = f"send {name}.pub to the server's operator, and compare {fingerprint(line)} by another way"
    return {
        "directory": str(directory),
        "node": name,
        "public_key": line,
        "fingerprint": fingerprint(line),
        "files": files,
        "next": step,
    }


def _text(value: dict[str, Any]) -> str:
    lines = [f"{value['directory']}", _files(value["files"]), ""]
    lines.append(f"  server certificate for {', '.join(value['server_names'])}")
    lines += [f"  {found['code']}: {found['text']}; {found['mend']}" for found in value["findings"]]
    lines += [f"  note: {note}" for note in value["notes"]]
    return "\n".join(lines)


def _files(files: Sequence[dict[str, Any]]) -> str:
    """One line a file, in columns, all to the left."""
    heads = ("file", "state", "for", "who gets it", "ends")
    rows = [
        heads,
        *((f["file"], f["state"], f["purpose"], f["recipient"], (f["ends"] or "-")[:10]) for f in files),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
