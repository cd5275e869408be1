"""Who am I, what is mine, and is this card well written."""

from __future__ import annotations

import msgspec
from starlette.responses import JSONResponse, Response

from hubaoti.server import card, words
from hubaoti.server.ask import Ask
from hubaoti.server.problems import BAD_TOKEN, Problem


class _Card(msgspec.Struct):
    content: str


def whoami(ask: Ask) -> Response:
    """The one user that this endpoint has."""
    if not ask.trusted:
        raise Problem(401, BAD_TOKEN)
    token = {"displayName": "local", "role": "write"}
    return JSONResponse(
        {
            "type": "user",
            "id": "1",
            "name": ask.hub.user,
            "fullname": ask.hub.user,
            "email": None,
            "isPro": False,
            "orgs": [],
            "auth": {"type": "access_token", "accessToken": token},
        }
    )


def validate_yaml(ask: Ask, body: bytes) -> Response:
    """Whether a README's front matter can be read; 400 with the reason when it cannot."""
    content = words.json_fields(body, _Card).content
    try:
        card.parse(content[: card.LIMIT])
    except card.BadCard as error:
        errors = [{"message": str(error)}]
        raise Problem(400, str(error), more={"errors": errors, "warnings": []}) from None
    return JSONResponse({"errors": [], "warnings": []})
