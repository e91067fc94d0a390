"""Opening the ports that are listened on."""

from __future__ import annotations

import socket

from stepgraph.errors import ConfigError

_BACKLOG = 2048


def listen(host: str, port: int, setting: str, count: int) -> list[socket.socket]:
    """Open a port, so that whoever is there already is found before anything is loaded. Of several sockets, each gets its share
    of the connections; the last of these only holds the port.

    Raises:
        ConfigError: it cannot be opened.
    """
    first = bind(host, port, setting, shared=False)
    _listen(first, setting)
    if count == 1:
        return [first]
    port = first.getsockname()[1]
    first.close()  # nobody is there: one that would share the port with others could be let in by them
    sockets = [bind(host, port, setting, shared=True) for _ in range(count + 1)]
    for sock in sockets[:-1]:
        _listen(sock, setting)
    return sockets


def bind(host: str, port: int, setting: str, *, shared: bool) -> socket.socket:
    """A socket that has a port, and does not listen yet. `shared`: with others that share it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        raise _cannot(sock, (host, port), setting, error) from error
    return sock


def _listen(sock: socket.socket, setting: str) -> None:
    try:
        sock.listen(_BACKLOG)
    except OSError as error:
        raise _cannot(sock, sock.getsockname(), setting, error) from error


def _cannot(sock: socket.socket, address: tuple[str, int], setting: str, error: OSError) -> ConfigError:
    sock.close()
    host, port = address[:2]
    return ConfigError(
        f"{setting}={port} at host {host} cannot be opened: {error.strerror}; choose a free port, or end what listens there"
    )
