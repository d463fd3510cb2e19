"""The public client: synchronous `Client` and asyncio `AsyncClient`.

    from sparserve.client import Client

    with Client("localhost:50051") as client:
        print(client.generate("The capital of France is", max_tokens=8).text)
        for delta in client.chat_stream([{"role": "user", "content": "Hello!"}], temperature=0.8):
            print(delta.text, end="", flush=True)

A call that the server refuses raises `CallFailed` with the status name, the message, the fields at
fault and what the server said about retrying; a value that cannot be sent raises `InvalidRequest`
with its field. Needs only the protocol: no model code, no torch.
"""

from sparserve.client.asynchronous import AsyncClient
from sparserve.client.plain import Client
from sparserve.client.requests import ChatFields, Fields, make_chat_request, make_request
from sparserve.client.responses import (
    Choice,
    Delta,
    Generation,
    Result,
    Token,
    Tokenization,
    TopToken,
)
from sparserve.errors import CallFailed, InvalidRequest

__all__ = [
    "AsyncClient",
    "CallFailed",
    "ChatFields",
    "Choice",
    "Client",
    "Delta",
    "Fields",
    "Generation",
    "InvalidRequest",
    "Result",
    "Token",
    "Tokenization",
    "TopToken",
    "make_chat_request",
    "make_request",
]
