"""An engine's process without an engine: it queues requests and says nothing more of them. It prints what it is told."""

import sys

import zmq
from observed import READY

from stepgraph.server.messages import Accepted, Add, Stop, decode_start, decode_to_engine, encode

start = decode_start(sys.stdin.buffer.readline())
socket = zmq.Context().socket(zmq.PAIR)
socket.connect(start.address)
socket.send(encode(READY))
poller = zmq.Poller()
poller.register(socket)
poller.register(sys.stdin.fileno())
while socket in dict(poller.poll()):  # stdin is closed when whoever started it is gone
    message = decode_to_engine(socket.recv())
    if isinstance(message, Stop):
        break
    print(type(message).__name__, flush=True)
    if isinstance(message, Add):
        socket.send(encode(Accepted(message.group)))
