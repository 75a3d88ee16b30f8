"""A replica: one process with the model, which answers HTTP requests and combines their images into batches.

Ray Serve, which comes with the extra ``serve``, is imported only here and in `service.py`.
"""

from __future__ import annotations

import asyncio
import importlib.resources
from collections.abc import Awaitable, Callable

from ray import serve
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from detr_ray.model.state_dicts import WeightsError
from detr_ray.prediction import LoadedModel
from detr_ray.prediction.answers import Answer, answers
from detr_ray.prediction.requests import UNSUPPORTED, ImageRequest, Limits, RequestError, from_image, from_json
from detr_ray.runtime.serving.settings import Batching

PAGE = "page.html"
_PAGE_HEADERS = {
    # Nothing is fetched from elsewhere, and no name of a category can become code.
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


class Replica:
    """Answers requests.

    Args:
        load: returns the model; called in the replica's process.
        limits: limits of a request.
        batching: how images become batches.
        device: where the model works. Ray hides no GPU from a replica that has none, so it cannot be found out.
    """

    def __init__(self, load: Callable[[], LoadedModel], limits: Limits, batching: Batching, device: str) -> None:
        self._model = load()
        self._device = self._model.to(device)
        self._limits = limits
        self._most = batching.most
        self._detect.set_max_batch_size(batching.most)
        self._detect.set_batch_wait_timeout_s(batching.wait_s)
        self._page = importlib.resources.files(__package__).joinpath(PAGE).read_text()
        self._routes: dict[str, tuple[str, Callable[[Request], Awaitable[Response]]]] = {
            "/": ("GET", self._show_page),
            "/health": ("GET", self._say_health),
            "/predict": ("POST", self._predict),
        }

    async def __call__(self, request: Request) -> Response:
        """Answers an HTTP request."""
        method, handler = self._routes.get(request.url.path, ("", None))
        if handler is None:
            return _refusal(f"there is no {request.url.path} here; there are {', '.join(self._routes)}", 404)
        if request.method != method:
            return _refusal(f"{request.url.path} takes {method}, not {request.method}", 405)
        try:
            return await handler(request)
        except RequestError as error:
            return _refusal(str(error), error.status)
        except WeightsError as error:  # predictions are not finite
            return _refusal(str(error), 500)
        except ClientDisconnect:
            return _refusal("the client went away", 400)

    async def _show_page(self, request: Request) -> Response:
        return HTMLResponse(self._page, headers=_PAGE_HEADERS)

    async def _say_health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "model": self._model.source})

    async def _predict(self, request: Request) -> Response:
        body = await self._body(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # In a thread: decoding base64 and reading headers takes milliseconds, in which other requests would wait.
        if kind == "application/json":
            asked = await asyncio.to_thread(from_json, body, self._limits)
        elif kind.startswith("image/") or kind == "application/octet-stream":
            asked = await asyncio.to_thread(from_image, body, request.query_params, self._limits)
        else:
            raise RequestError(
                f"Content-Type: is {kind or 'missing'}; send JSON as application/json, an image file as image/... or "
                "application/octet-stream",
                UNSUPPORTED,
            )
        found = await asyncio.gather(*map(self._detect, asked))
        for answer in found:
            if isinstance(answer, Exception):
                raise answer
        return JSONResponse({"predictions": found})

    async def _body(self, request: Request) -> bytes:
        """The body of a request; reading stops if it is too long."""
        declared = request.headers.get("content-length", "")
        if declared.isdecimal():
            self._limits.check_body(int(declared))
        parts, length = [], 0
        async for part in request.stream():
            length += len(part)
            self._limits.check_body(length)
            parts.append(part)
        return b"".join(parts)

    @serve.batch  # type: ignore[untyped-decorator]
    async def _detect(self, asked: list[ImageRequest]) -> list[Answer]:
        """Answers images of one or several requests; in a thread, so that health checks are answered meanwhile."""
        return await asyncio.to_thread(answers, self._model, asked, self._most, self._device)


def _refusal(message: str, status: int) -> Response:
    return JSONResponse({"error": message}, status)
