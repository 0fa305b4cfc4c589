"""What REST, pages and streams share: who calls, whether the request is their own, one shape for
every error, the headers of every answer."""

import gzip
import hashlib
import io
import json
import logging
import math
import secrets
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

from apiflask.exceptions import HTTPError
from flask import Request, current_app, g, render_template, request
from flask.json.provider import DefaultJSONProvider
from werkzeug.exceptions import BadRequest, HTTPException

import auth
import cascade
from models import Forbidden, Refused, Unauthorised, offloop

log = logging.getLogger("orchestratia.web")

COOKIE = "orchestratia"
SAFE = ("GET", "HEAD", "OPTIONS")
KEPT_HEADERS = ("Allow", "Retry-After", "Sec-WebSocket-Version", "Upgrade")  # of an error
STATUS = {
    cascade.IllegalMove: 409,
    cascade.Cycle: 409,
    cascade.BadContract: 422,
    cascade.RuleBroken: 422,
}
CSP = (
    "default-src 'self'; img-src 'self' data:; style-src 'self'; script-src 'self'; "
    "worker-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)


class HubRequest(Request):
    """Old clients send `Content-Type: application/json` with an empty body: that is an empty
    object, not an error."""

    def get_json(self, force=False, silent=False, cache=True):
        if not self.get_data(cache=True):
            return {}
        return super().get_json(force=force, silent=silent, cache=cache)

    def on_json_loading_failed(self, error):
        why = f": {error}" if isinstance(error, ValueError) else ""
        raise BadRequest(f"The request body is not valid JSON{why}. Send a JSON object.")


class HubJSON(DefaultJSONProvider):
    """JSON without NaN and Infinity in either direction, and of whole characters only."""

    sort_keys = False
    ensure_ascii = False

    def loads(self, s, **kwargs):
        return loads(s.decode() if isinstance(s, bytes) else s)


def loads(text: str):
    """What a client's JSON text means. Raises ValueError, or RecursionError when it is too deep."""
    value = _decoder.decode(text)
    if "\\ud" in text or "\\uD" in text:  # may be half of a character, which nothing can show
        value = json.loads(_whole(json.dumps(value, ensure_ascii=False)))
    return value


def _whole(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _no_constant(name: str):
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:30]} is too large a number")
    return value


_decoder = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)


# ── the caller ────────────────────────────────────────────────────────────────────────────────


def caller() -> auth.Caller:
    """Whoever makes this request. Raises Unauthorised."""
    if "caller" not in g:
        g.caller = _recognise()
    return g.caller


def _recognise() -> auth.Caller:
    return replace(_credential(), where=_where())


def _where() -> str:
    """Where the caller is, as others are told who see what was decided."""
    if by_cookie():
        return "on the dashboard"
    line = request.headers.get("User-Agent", "").startswith("orchestratia/")
    return "on the command line" if line else "through the API"


def _credential() -> auth.Caller:
    key = request.headers.get("X-API-Key")
    if key:
        return auth.by_key(key)
    kind, _, token = request.headers.get("Authorization", "").partition(" ")
    if kind.lower() == "bearer" and token:
        return auth.by_key(token) if token.startswith(("orc_", "orcs_")) else auth.by_token(token)
    cookie = request.cookies.get(COOKIE)
    if cookie:
        return auth.by_token(cookie)
    raise Unauthorised(
        "You are not signed in: send a token (Authorization: Bearer) or a key (X-API-Key)."
    )


def person_or_none() -> auth.Caller | None:
    try:
        return caller()
    except Unauthorised:
        return None


def by_cookie() -> bool:
    """Whether the browser's cookie alone identifies the caller, so that other sites could too."""
    kind, _, token = request.headers.get("Authorization", "").partition(" ")
    return not (request.headers.get("X-API-Key") or (kind.lower() == "bearer" and token))


def check_own() -> None:
    """Refuse what another site makes a browser send. Raises Forbidden.

    A request that changes something and names an Origin must name this hub's; one that relies on
    the cookie must bring the CSRF token too. Streams and sockets are checked whatever the method;
    a browser always names the Origin of a socket, so with a cookie and without it there is none.
    """
    origin = request.headers.get("Origin")
    upgrade = request.headers.get("Upgrade", "").lower() == "websocket"
    if upgrade and origin is None and by_cookie() and COOKIE in request.cookies:
        raise Forbidden("A socket opened with the cookie must name its Origin.", code="origin")
    if origin is not None and not is_own_origin(origin):
        raise Forbidden("This request comes from another site and was refused.", code="origin")
    if request.method in SAFE or not by_cookie():
        return
    person = person_or_none()  # with a dead cookie nobody is asked for: the view says so
    given = request.headers.get("X-CSRF-Token") or request.form.get("csrf_token")
    if person and not auth.csrf_matches(person, given):
        raise Forbidden("The form is out of date: reload the page and try again.", code="csrf")


def is_own_origin(origin: str) -> bool:
    """Whether `origin` is the address this hub was asked at, or the one it is known by."""
    known = urlsplit(current_app.config["HUB"]["url"])
    return origin in (
        f"{request.scheme}://{request.host}",
        f"{known.scheme}://{known.netloc}",
    )


def hub_url() -> str:
    """The address agents and people reach this hub at."""
    return current_app.config["HUB"]["url"]


# ── errors ────────────────────────────────────────────────────────────────────────────────────


def wants_json() -> bool:
    return request.path.startswith(("/api", "/ws", "/openapi"))


def answer(status: int, detail: str, code: str, fields: dict | None = None, headers=None):
    """An error in the one shape: JSON under /api, a page or fragment elsewhere."""
    if wants_json():
        return {"detail": detail, "code": code, "fields": fields or {}}, status, headers or {}
    if request.headers.get("HX-Request"):
        return render_template("_error.html", detail=detail, code=code), status, headers or {}
    page = render_template("error.html", detail=detail, code=code, status=status)
    return page, status, headers or {}


def _refused(error: Refused):
    wait = error.fields.get("retry_after")
    headers = {"Retry-After": str(wait)} if wait else {}
    return answer(error.status, str(error), error.code, error.fields, headers)


def _rule_broken(error: cascade.RuleBroken):
    return answer(STATUS[type(error)], str(error), error.code, error.fields)


def _http_error(error: HTTPException):
    if 300 <= (error.code or 500) < 400:
        return error
    where = request.script_root + request.path
    names = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}
    sentences = {
        404: f"There is nothing at {where}.",
        405: f"{request.method} is not possible at {where}.",
        413: "The request is too large for this hub.",
    }
    detail = sentences.get(error.code) or error.description or error.name
    headers = {k: v for k, v in error.get_headers() if k in KEPT_HEADERS}
    return answer(error.code, detail, names.get(error.code, "bad_request"), headers=headers)


def _invalid_request(error: HTTPError):
    """APIFlask's own errors: mostly a body or query that breaks its model."""
    fields = {}
    for place in (error.detail or {}).values():
        if isinstance(place, dict):
            fields |= {name: messages for name, messages in place.items()}
    if not fields:
        return answer(error.status_code, error.message, "bad_request")
    name, messages = next(iter(fields.items()))
    where = "" if name.startswith("_") else f"{name}: "
    return answer(422, f"{where}{messages[0]}.", "invalid", fields)


def _too_deep(_error: RecursionError):
    return answer(422, "The request is nested too deeply: flatten it.", "invalid")


def _broken(error: Exception):
    log.exception("%s %s failed", request.method, request.path)
    return answer(
        500, "Something broke inside the hub; its log says what. Nothing was changed.", "internal"
    )


def _headers(response):
    response.headers.setdefault("Content-Security-Policy", CSP)
    response.headers.setdefault("X-Content-Type-Options", "nosniff")
    response.headers.setdefault("Referrer-Policy", "same-origin")
    response.headers.setdefault("X-Frame-Options", "DENY")
    if request.endpoint != "static":
        response.headers.setdefault("Cache-Control", "no-store")
    elif response.status_code in (200, 304) and _is_current():
        response.headers["Cache-Control"] = f"public, max-age={YEAR_S}, immutable"
    return response


# ── the path of the hub's address ─────────────────────────────────────────────────────────────


class Under:
    """Serves a hub whose address has a path, such as https://host/mission.

    The proxy in front may keep the path in what it passes on or take it away; one that takes it
    away and says so (X-Forwarded-Prefix) is believed about that, about nothing else.
    """

    def __init__(self, app, prefix: str):
        self.app = app
        self.prefix = prefix

    def __call__(self, environ, start_response):
        path = environ.get("PATH_INFO", "")
        taken = environ.get("HTTP_X_FORWARDED_PREFIX", "").rstrip("/") == self.prefix
        if not taken and f"{path}/".startswith(f"{self.prefix}/"):
            environ["PATH_INFO"] = path[len(self.prefix) :] or "/"
        environ["SCRIPT_NAME"] = self.prefix
        return self.app(environ, start_response)


# ── static files and the weight of pages ──────────────────────────────────────────────────────

YEAR_S = 365 * 86400
SMALL = 1000  # bytes that are not worth compressing
COMPRESSED = {
    "text/html",
    "text/css",
    "text/javascript",
    "application/javascript",
    "application/json",
    "image/svg+xml",
}
_compressed: dict[tuple[str, str], bytes] = {}  # (static file, version): its bytes


def _static_file() -> Path:
    return Path(current_app.static_folder) / (request.view_args or {}).get("filename", "")


def _is_current() -> bool:
    """Whether the address says the version that the file has. Only for a file that was found: what
    else a path may lead to is not read."""
    return request.args.get("v", "") == _version(_static_file())


def _version(path: Path) -> str | None:
    """A word that changes with the file; None for what is no file."""
    try:
        return _hashed(path, path.stat().st_mtime_ns) if path.is_file() else None
    except (OSError, ValueError):  # a name no file system takes
        return None


@lru_cache(1000)
def _hashed(path: Path, _mtime: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def _versioned(endpoint: str, values: dict) -> None:
    """The address of a static file changes with it, so that it may be kept for a year."""
    if endpoint == "static" and "filename" in values:
        values["v"] = _version(Path(current_app.static_folder) / values["filename"])


def _compress(response):
    if response.status_code != 200 or response.mimetype not in COMPRESSED:
        return response
    static = request.endpoint == "static"
    if request.path.startswith("/api/") or (response.is_streamed and not static):
        return response  # streams, and programs that ask often for little
    response.vary.add("Accept-Encoding")
    if "gzip" not in request.accept_encodings or response.content_encoding:
        return response
    if request.method == "HEAD" or (response.content_length or 0) < SMALL:
        return response
    if static:
        data = _compressed_file(response)
    else:
        data = _gzipped(response.get_data(), secrets.token_hex(secrets.randbelow(64)))
    response.set_data(data)
    response.content_encoding = "gzip"
    return response


def _compressed_file(response) -> bytes:
    path = _static_file()
    key = str(path), _version(path)
    if key not in _compressed:
        response.direct_passthrough = False
        _compressed[key] = offloop(_gzipped, response.get_data(), "")
    response.close()
    response.direct_passthrough = False
    response.set_etag(response.get_etag()[0], weak=True)  # the same file, in other bytes
    return _compressed[key]


def _gzipped(data: bytes, name: str) -> bytes:
    """`name` goes into the header: one of random length hides from who measures the traffic how
    well what they had shown fits the secrets of the page (BREACH)."""
    into = io.BytesIO()
    with gzip.GzipFile(name, "wb", 6, into, mtime=0) as file:
        file.write(data)
    return into.getvalue()


def init_app(app, prefix: str) -> None:
    app.config["AUTO_SERVERS"] = False  # they would name the scheme and host that the proxy uses
    app.config["SERVERS"] = [{"url": prefix or "/"}]
    if prefix:
        app.wsgi_app = Under(app.wsgi_app, prefix)
    app.request_class = HubRequest
    app.tags = ["Hub", "Work", "Agents"]  # by itself it names one twice that is mounted twice
    app.json = HubJSON(app)
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False  # by a redirect, which old clients turn into a GET
    app.before_request(check_own)
    app.after_request(_headers)
    app.after_request(_compress)
    app.url_defaults(_versioned)
    app.error_processor(_invalid_request)
    app.register_error_handler(Refused, _refused)
    app.register_error_handler(cascade.RuleBroken, _rule_broken)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(RecursionError, _too_deep)
    app.register_error_handler(Exception, _broken)
