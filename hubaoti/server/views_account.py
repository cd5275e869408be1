"""Who am I, what is mine, and is this card well written."""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hubaoti.server import card, words
from hubaoti.server.ask import MAX_BODY, Ask, whole_body
from hubaoti.server.problems import BAD_TOKEN, Problem


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


async def validate_yaml(request: Request) -> Response:
    """Whether a README's front matter can be read; 400 with the reason when it cannot."""
    said = words.json_object(await whole_body(request, MAX_BODY)).get("content")
    content = words.text(said, "content", MAX_BODY)
    try:
        await run_in_threadpool(card.parse, content[: card.LIMIT])
    except card.BadCard as error:
        errors = [{"message": str(error)}]
        raise Problem(400, str(error), more={"errors": errors, "warnings": []}) from None
    return JSONResponse({"errors": [], "warnings": []})
