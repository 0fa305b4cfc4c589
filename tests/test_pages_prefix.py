"""The pages behind a proxy and under a path, and what they weigh."""

import gzip
import re
import socket
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from playwright.sync_api import expect

import auth
import hub as hub_module
import web
from browsing import live, press
from conftest import PASSWORD, Client, wait_until

PREFIX = "/mission"
MOST = 150_000  # bytes of a page, as transferred


class Proxy:
    """A reverse proxy on a port of its own: what comes under `prefix` goes on to `target`.

    One request per connection; what follows its head is passed on as it is, so that streams and
    sockets go through. strips: whether the prefix is taken away. outside: paths that were asked
    for and do not stand under it.
    """

    def __init__(self, prefix: str = "", strips: bool = True, tells: bool = False):
        self.prefix, self.strips, self.tells = prefix, strips, tells
        self.target = free_port()
        self.outside: list[str] = []
        self.asked: list[str] = []
        self._open: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}{prefix}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def count(self, part: str) -> int:
        """How many requests for paths with `part` are under way."""
        with self._lock:
            return sum(n for path, n in self._open.items() if part in path)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            head, rest = _head(client)
            if not head:
                return
            method, path, *_ = head.split(" ", 2)
            self.asked.append(path)
            if not f"{path}/".startswith(f"{self.prefix}/"):
                self.outside.append(path)
                return _refuse(client, 404)
            self._count(path, 1)
            try:
                self._pass_on(client, self._rewritten(head, path), rest)
            finally:
                self._count(path, -1)

    def _count(self, path: str, change: int) -> None:
        with self._lock:
            self._open[path] += change

    def _rewritten(self, head: str, path: str) -> str:
        inner = (path[len(self.prefix) :] or "/") if self.strips else path
        head = head.replace(path, inner, 1)
        if self.tells:
            head += f"\r\nX-Forwarded-Prefix: {self.prefix}"
        return _closing(head)

    def _pass_on(self, client: socket.socket, head: str, rest: bytes) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self.target))
        except OSError:
            return _refuse(client, 502)
        with server:
            server.sendall(head.encode("latin-1") + b"\r\n\r\n" + rest)
            up = threading.Thread(target=_relay, args=(client, server), daemon=True)
            up.start()
            answer, rest = _head(server)
            if answer:
                client.sendall(_closing(answer).encode("latin-1") + b"\r\n\r\n" + rest)
            _relay(server, client)
            up.join()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


def _head(client: socket.socket) -> tuple[str, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        more = client.recv(65536)
        if not more:
            return "", b""
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    return head.decode("latin-1"), rest


def _closing(head: str) -> str:
    """The head with word that its connection serves this one request, unless it is a socket's."""
    if re.search(r"^upgrade:", head, re.I | re.M):
        return head
    head = re.sub(r"^connection:.*\r\n", "", head + "\r\n", flags=re.I | re.M)
    return head + "Connection: close"


def _refuse(client: socket.socket, status: int) -> None:
    client.sendall(
        f"HTTP/1.1 {status} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
    )


def _relay(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):  # either end that goes takes the other with it
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@pytest.fixture(params=["stripped", "kept", "told"])
def proxy(request):
    made = Proxy(PREFIX, strips=request.param != "kept", tells=request.param == "told")
    yield made
    made.close()


@pytest.fixture
def hub(proxy, start_hub):
    """A hub that is known by the address of the proxy."""
    return start_hub(port=proxy.target, url=proxy.url)


def test_everything_stays_under_the_prefix(shop, proxy, open_browser):
    made = shop.api("POST", "tasks", {"title": "Write the parser"})
    page = open_browser(token=None)
    page.goto(f"{shop.url}/tasks")
    expect(page).to_have_url(f"{shop.url}/login?next={PREFIX}/tasks")
    page.get_by_label("User name").fill("admin")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Sign in").click()
    expect(page).to_have_url(f"{shop.url}/tasks")
    [kept] = page.context.cookies()
    assert kept["path"] == PREFIX
    live(page)
    shop.api("POST", "tasks", {"title": "Test the parser"})
    expect(page.locator("tbody tr")).to_have_count(2)
    page.get_by_role("link", name="Write the parser").click()
    expect(page).to_have_url(f"{shop.url}/tasks/{made['id']}")
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Cancel task").click()
    expect(page.locator(".standing")).to_contain_text("cancelled")
    press(page, "Control+k")
    expect(page.get_by_role("combobox")).to_be_focused()
    page.keyboard.type("test the")
    expect(page.get_by_role("option", name="Test the parser")).to_be_visible()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Test the parser")
    for key, path in {"o": "/", "s": "/sessions", "v": "/servers", "e": "/events"}.items():
        press(page, f"g {key}")
        expect(page).to_have_url(f"{shop.url}{path}")
        links = page.eval_on_selector_all(
            "a[href], form", "all => all.map(a => a.href || a.action)"
        )
        assert links and all(link.startswith(f"{shop.url}/") for link in links)
    page.get_by_role("button", name="Sign out").click()
    expect(page).to_have_url(f"{shop.url}/login")
    assert page.context.cookies() == []
    assert proxy.outside == []


def test_the_address_without_a_slash_is_the_overview(shop, proxy, open_browser):
    page = open_browser()
    page.goto(shop.url)
    expect(page.get_by_role("heading", level=1)).to_have_text("Overview")
    assert proxy.outside == []


def test_an_error_stays_under_the_prefix(shop, proxy, open_browser, problems):
    page = open_browser()
    page.goto(f"{shop.url}/nowhere")
    expect(page.locator("main")).to_contain_text(f"There is nothing at {PREFIX}/nowhere.")
    problems.clear()
    page.get_by_role("link", name="To the overview").click()
    expect(page).to_have_url(f"{shop.url}/")
    assert proxy.outside == []


@pytest.mark.parametrize("proxy", ["stripped"], indirect=True)
def test_a_terminal_works_under_the_prefix(shop, proxy, open_browser, start_agent):
    start_agent(shop, "dev")
    body = {"server_id": "dev", "name": "shell", "command": ["cat"]}
    made = shop.api("POST", "sessions", body)
    page = open_browser()
    page.goto(f"{shop.url}/sessions/{made['id']}")
    expect(page.locator("#terminal-part")).to_have_attribute("data-state", "live")
    page.locator(".xterm-helper-textarea").focus()
    page.keyboard.type("hello there")
    page.keyboard.press("Enter")
    shown = page.locator("#screen-part")
    page.get_by_text("Screen as it was last seen").click()
    expect(shown).to_contain_text("hello there\nhello there")
    page.keyboard.press("Shift+Escape")
    page.get_by_text("Log: all that was printed").click()
    expect(page.locator("#log")).to_contain_text("hello there")
    assert proxy.outside == []


@pytest.mark.parametrize("proxy", ["stripped"], indirect=True)
def test_the_hub_answers_at_its_own_port_too(shop, proxy):
    direct = f"http://127.0.0.1:{proxy.target}"
    assert shop.http.get(f"{direct}/api/v1/health", timeout=10).ok
    answer = shop.http.get(f"{direct}/tasks", timeout=10)
    assert answer.ok
    assert answer.url.startswith(f"{direct}{PREFIX}/login")


def test_the_document_of_the_api_names_no_host(tmp_path):
    """The page /docs calls the address that the browser has, whatever the proxy uses."""
    settings = hub_module.read_settings({"data": tmp_path, "url": "https://host/mission"}, {})
    app = hub_module.create_app(settings)
    assert app.test_client().get("/openapi.json").json["servers"] == [{"url": "/mission"}]


@pytest.mark.parametrize(
    ("origin", "secure"), [("https://localhost", True), ("http://localhost", False), (None, False)]
)
def test_behind_tls_the_cookie_is_for_tls_only(app, world, origin, secure):
    app.config["HUB"]["url"] = "https://localhost"
    auth.create_user(auth.HUB, "vera", PASSWORD, False, {})
    form = {"username": "vera", "password": PASSWORD}
    headers = {"Origin": origin} if origin else {}
    answer = app.test_client().post("/login", data=form, headers=headers)
    assert answer.status_code == 303
    assert ("Secure" in answer.headers["Set-Cookie"]) == secure


# ── what pages weigh ──────────────────────────────────────────────────────────────────────────


def paths(hub) -> list[str]:
    """Every page of a hub with some work, but those with a terminal, a graph or the API's page."""
    tasks = [{"id": f"T{n}", "title": f"Build part {n} of the shop"} for n in range(60)]
    applied = hub.api("POST", "pipelines", {"name": "shop", "tasks": tasks})
    first = next(iter(applied["id_map"].values()))
    hub.register("dev")
    named = ["", "inbox", "tasks", "tasks?view=board", "tasks/new", "pipelines", "servers"]
    named += ["sessions", "events", "projects", "settings", "servers/dev", "pipelines/new"]
    return [f"/{name}" for name in (*named, f"tasks/{first}", f"tasks/{first}/edit")]


@pytest.mark.parametrize("proxy", ["stripped"], indirect=True)
def test_no_page_weighs_more_than_150_kb(shop, open_browser):
    weights = {}
    for path in paths(shop):
        page = open_browser()  # with nothing in its cache
        session = page.context.new_cdp_session(page)
        session.send("Network.enable")
        sizes: list[float] = []
        session.on("Network.loadingFinished", lambda e, s=sizes: s.append(e["encodedDataLength"]))
        page.goto(shop.url + path)
        live(page)
        page.wait_for_load_state("load")
        weights[path] = sum(sizes)
        page.context.close()
    assert all(10_000 < weight < MOST for weight in weights.values()), weights


@pytest.mark.parametrize("proxy", ["stripped"], indirect=True)
def test_a_second_page_fetches_no_file_again(shop, proxy, open_browser):
    page = open_browser()
    page.goto(f"{shop.url}/tasks")
    live(page)
    assert any("/static/" in path for path in proxy.asked)
    proxy.asked.clear()
    page.goto(f"{shop.url}/tasks?q=x")
    live(page)
    assert proxy.asked and not [path for path in proxy.asked if "/static/" in path]


GZIP = {"Accept-Encoding": "gzip, br"}


def versioned(app, name: str) -> str:
    with app.test_request_context():
        return app.url_for("static", filename=name)


def test_a_static_file_is_compressed_and_kept_for_as_long_as_its_address_stands(app, client):
    address = versioned(app, "app.css")
    plain = client.get(address, buffered=True)
    assert "Content-Encoding" not in plain.headers
    for _ in range(2):
        small = client.get(address, headers=GZIP, buffered=True)
        assert small.headers["Content-Encoding"] == "gzip"
        assert gzip.decompress(small.data) == plain.data
        assert len(small.data) < len(plain.data) / 2
        assert "immutable" in small.headers["Cache-Control"]
        assert small.headers["Vary"] == "Accept-Encoding"
    etag = small.headers["ETag"]
    same = client.get("/static/app.css", headers=GZIP | {"If-None-Match": etag}, buffered=True)
    assert same.status_code == 304


@pytest.mark.parametrize(
    "address", ["/static/app.css", "/static/app.css?v=old", "/static/app.css?v="]
)
def test_another_address_of_the_file_is_asked_about_each_time(client, address):
    assert client.get(address, buffered=True).headers["Cache-Control"] == "no-cache"


@pytest.mark.parametrize(
    "address",
    ["/static/nope.css", "/static/nope.css?v=", "/static/%00", "/static/..%2fweb.py?v={}"],
)
def test_what_is_no_file_is_not_kept(app, client, address):
    address = address.format(web._version(Path(app.static_folder).parent / "web.py"))
    answer = client.get(address, buffered=True)
    assert answer.status_code == 404
    assert "immutable" not in answer.headers.get("Cache-Control", "")


def test_a_compressed_page_tells_nothing_by_its_length(app, admin):
    """The size of what is sent varies by itself, more than one letter makes it vary."""
    page = Client(app, admin.headers)
    answers = [page.get("/tasks?q=x", headers=GZIP) for _ in range(20)]
    assert {answer.headers["Content-Encoding"] for answer in answers} == {"gzip"}
    assert len({len(answer.data) for answer in answers}) > 5
    assert all(b"<h1>Tasks</h1>" in gzip.decompress(answer.data) for answer in answers)


def test_answers_of_the_api_are_not_compressed(admin, world):
    for number in range(20):
        admin.post("tasks", {"title": f"Task {number}"})
    assert "Content-Encoding" not in admin.get("tasks", headers=GZIP).headers


def test_the_proxy_of_these_tests_counts(proxy, shop, open_browser):
    page = open_browser()
    page.goto(f"{shop.url}/tasks")
    live(page)
    assert proxy.count("/events/stream") == 1
    page.context.close()
    wait_until(lambda: proxy.count("/events/stream") == 0)
