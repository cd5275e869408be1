"""Who am I, what is mine, and is this card well written."""

from __future__ import annotations

import msgspec
from starlette.responses import JSONResponse, Response

from hubaoti.server import card, validation
from hubaoti.server.errors import BAD_TOKEN, ServerError
from hubaoti.server.request import ApiRequest


class _Card(msgspec.Struct):
    content: str


def whoami(ask: ApiRequest) -> Response:
    """Answer with the one user that this endpoint has; 401 without the token."""
    if not ask.trusted:
        raise ServerError(401, BAD_TOKEN)
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


def validate_yaml(ask: ApiRequest, body: bytes) -> Response:
    """Whether a README's front matter can be read; 400 with the reason when it cannot."""
    content = validation.parse_json_fields(body, _Card).content
    try:
        card.parse_card(content[: card.CARD_LIMIT])
    except card.BadCard as error:
        errors = [{"message": str(error)}]
        raise ServerError(400, str(error), more={"errors": errors, "warnings": []}) from None
    return JSONResponse({"errors": [], "warnings": []})
