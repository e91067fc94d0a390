"""Where engines listen for others, and which places an engine connects to."""

from __future__ import annotations

import ipaddress
import secrets
import socket
from collections.abc import Sequence
from contextlib import closing

from stepgraph.errors import ConfigError

_PREFIX = "@stepgraph-kv-"
"""Of sockets of this machine that have a name and no file, which nobody has to remove. `@` stands for a zero byte, as in `ss`."""
_BACKLOG = 64
_KEEP_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}
"""Seconds without a word after which the other end is asked whether it is there, those between questions, how many of these it
leaves open; and milliseconds for which what was sent may lack a receipt."""


def listen(host: str, port: int | None) -> tuple[socket.socket, str, int]:
    """A socket that listens, and the host and port by which others reach it.

    Args:
        host: an address of this machine.
        port: 0: any; None: a socket of this machine, without a port.

    Raises:
        ConfigError: it cannot listen there.
    """
    if port is None:
        name = _PREFIX + secrets.token_hex(16)
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stream.bind(_address(name))
        stream.listen(_BACKLOG)
        return stream, name, 0
    try:
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        stream = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"kv_transfer_host={host!r}, kv_transfer_port={port}: other engines cannot be listened for there ({error})",
            param="kv_transfer_port",
        ) from error
    return stream, host, stream.getsockname()[1]


def connect(host: str, port: int, timeout_s: float) -> socket.socket:
    """A stream to who listens at (host, port) as `listen` returned them. OSError if nobody does."""
    if host.startswith(_PREFIX):
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            stream.settimeout(timeout_s)
            stream.connect(_address(host))
        except BaseException:
            stream.close()
            raise
        return stream
    stream = socket.create_connection((host, port), timeout=timeout_s)
    set_options(stream)
    return stream


def set_options(stream: socket.socket) -> None:
    """Have a stream of TCP send messages at once, and end soon after the other machine, or the way there, has gone."""
    if stream.family != socket.AF_UNIX:
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):  # not everywhere
                stream.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class AllowedHosts:
    """Hosts that an engine connects to: a request names one, and its author may not be trusted.

    Args:
        peers: names, addresses, and networks such as 10.0.0.0/8; None: this machine alone. Sockets of this machine and user
            are always allowed.

    Raises:
        ConfigError: one of them is none.
    """

    def __init__(self, peers: Sequence[str] | None) -> None:
        self._names: set[str] = set()
        self._networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        for peer in ("localhost", "127.0.0.0/8", "::1") if peers is None else peers:
            try:
                self._networks.append(ipaddress.ip_network(peer))
            except ValueError as error:
                if "/" in peer:
                    raise ConfigError(
                        f"kv_transfer_peers: {peer!r} is not a network ({error}); write e.g. 10.0.0.0/8",
                        param="kv_transfer_peers",
                    ) from error
                self._names.add(peer.lower())
        if peers is None:
            self._names.add(socket.gethostname().lower())
            self._networks += [ipaddress.ip_network(address) for address in _own_addresses()]

    def __contains__(self, host: str) -> bool:
        if host.startswith(_PREFIX) or host.lower() in self._names:
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        return any(address in network for network in self._networks)


def _own_addresses() -> list[str]:
    """Of this machine: those that answers to the outside would come from."""
    found = []
    for family, outside in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        try:
            with closing(socket.socket(family, socket.SOCK_DGRAM)) as stream:
                stream.connect((outside, 9))  # sends nothing
                found.append(stream.getsockname()[0])
        except OSError:  # there is no way out
            continue
    return found


def _address(name: str) -> str:
    return "\0" + name[1:]
