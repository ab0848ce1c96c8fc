"""Where the ends of a link meet: a store on the sender's loopback, and a door that asks for a secret where others come.

``TCPStore`` listens on all interfaces and lets anybody read and write. Here its server is bound to the loopback. An end
on another machine gets there through a tunnel, of which both sides prove that they know the link's secret, without
saying it, before a byte passes (HMAC-SHA256 of both sides' random numbers). Nothing is encrypted.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

import torch.distributed as dist

from tandem.errors import UserError, first_line
from tandem.parallel.world import LOOPBACK, open_store
from tandem.sync.links import Link

NONCE_BYTES = 32
GREETING_S = 10.0
CHUNK = 1 << 16


class Meeting:
    """One end's way to the store of a link; the sender's end hosts it. ``close`` ends what it has opened.

    Raises UserError where the store cannot be reached.
    """

    def __init__(self, link: Link) -> None:
        self.tunnel: Tunnel | None = None
        secret = link.secret.encode()
        if link.rank == 0:
            server = socket.create_server((LOOPBACK, 0))
            port = server.getsockname()[1]
            self.store = _open(link, port, server)
            if link.host != LOOPBACK:
                self.tunnel = Tunnel(
                    socket.create_server((link.host, 0)),
                    lambda: _dial(LOOPBACK, port),
                    lambda door: greet(door, secret, b"sender"),
                )
            self.port = self.tunnel.port if self.tunnel else port
            return
        self.port = link.port
        if link.host != LOOPBACK:

            def dial() -> socket.socket:
                door = _dial(link.host, link.port)
                greet(door, secret, b"receiver")
                return door

            self.tunnel = Tunnel(socket.create_server((LOOPBACK, 0)), dial, lambda door: None)
        try:
            self.store = _open(link, self.tunnel.port if self.tunnel else link.port, None)
        except UserError:
            self.close()
            raise

    def close(self) -> None:
        if self.tunnel is not None:
            self.tunnel.close()


class Tunnel:
    """Passes every connection to ``server`` on to a new one that ``dial`` makes, once ``admit`` lets it.

    Both may raise OSError, which ends that connection alone. Threads of its own, which end with their connections.
    """

    def __init__(
        self, server: socket.socket, dial: Callable[[], socket.socket], admit: Callable[[socket.socket], None]
    ) -> None:
        self.server, self.dial, self.admit = server, dial, admit
        self.port: int = server.getsockname()[1]
        threading.Thread(target=self._accept, name="tunnel", daemon=True).start()

    def close(self) -> None:
        """No further connections. Those that there are go on until one of their ends closes."""
        # Closing alone does not wake a thread that waits in accept().
        with suppress(OSError):
            self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                came, _ = self.server.accept()
                threading.Thread(target=self._pass_on, args=(came,), name="tunnel", daemon=True).start()

    def _pass_on(self, came: socket.socket) -> None:
        with came, suppress(OSError):
            came.settimeout(GREETING_S)
            self.admit(came)
            came.settimeout(None)
            with self.dial() as away:
                back = threading.Thread(target=_pump, args=(away, came), name="tunnel", daemon=True)
                back.start()
                _pump(came, away)
                back.join()


def greet(door: socket.socket, secret: bytes, role: bytes) -> None:
    """Both ends of a connection show each other that they know the secret. Raises OSError where the other does not."""
    mine = secrets.token_bytes(NONCE_BYTES)
    door.sendall(mine)
    theirs = _read(door, NONCE_BYTES)
    other = {b"sender": b"receiver", b"receiver": b"sender"}[role]
    door.sendall(_proof(secret, role, mine, theirs))
    if not hmac.compare_digest(_read(door, NONCE_BYTES), _proof(secret, other, theirs, mine)):
        raise ConnectionRefusedError("the other end does not know the secret")


def _open(link: Link, port: int, server: socket.socket | None) -> dist.TCPStore:
    try:
        return open_store(LOOPBACK, port, link.timeout, server)
    except (dist.DistError, RuntimeError) as error:
        raise UserError(f"weight sync: no answer from {link.host}:{link.port} ({first_line(error)})") from error


def _dial(host: str, port: int) -> socket.socket:
    door = socket.create_connection((host, port), GREETING_S)
    door.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return door


def _pump(source: socket.socket, target: socket.socket) -> None:
    """Until one of them closes, which the other is then told."""
    with suppress(OSError):
        source.settimeout(None)
        while data := source.recv(CHUNK):
            target.sendall(data)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def _read(door: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = door.recv(count - len(data))
        if not part:
            raise ConnectionResetError("closed while greeting")
        data += part
    return data


def _proof(secret: bytes, role: bytes, mine: bytes, theirs: bytes) -> bytes:
    return hmac.digest(secret, role + mine + theirs, "sha256")
