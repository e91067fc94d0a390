"""Bounds what a connection may send beside bodies. The parser would keep headers of any length, from anybody: keys are checked
after it."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
"""What a request line and headers, or the headers after a body, may have beyond the read of the socket that they begin in."""


class HeadLimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol; closes connections whose headers do not end."""

    _num_bytes = 0
    """Since a request began or a part of its body came."""

    def on_message_begin(self) -> None:
        """See `HttpToolsProtocol`."""
        self._num_bytes = 0
        super().on_message_begin()

    def on_body(self, body: bytes) -> None:
        """See `HttpToolsProtocol`."""
        self._num_bytes = 0
        super().on_body(body)

    def data_received(self, data: bytes) -> None:
        """See `HttpToolsProtocol`."""
        self._num_bytes += len(data)
        super().data_received(data)
        if self._num_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            message = f"The headers of a request can have {MAX_HEAD_BYTES} bytes."
            self.logger.warning(message)
            self.send_400_response(message)
