"""What is refused before any part of the application sees it; controls are let through."""

import asyncio
import base64
import time

import pytest
from starlette.responses import PlainTextResponse, Response
from starlette.testclient import TestClient

from mlx_maple.serve import door as doors
from mlx_maple.serve.app import make_app
from mlx_maple.serve.config import Config, Limits
from mlx_maple.serve.door import COOKIE, Door
from mlx_maple.serve.security import Security

TOKEN = "correct-horse-battery"
SECRET = b"s" * 32
OWN = "127.0.0.1:7860"


async def inside(scope, receive, send):
    """An application that answers with the size of what it got."""
    message = await receive()
    await PlainTextResponse(str(len(message["body"])))(scope, receive, send)


def guarded(config, app=inside):
    return Security(app, config, Door(config.token, lambda: SECRET))


def session_of(token, secret=SECRET):
    """The cookie that a browser gets for a token."""
    response = Response()
    assert Door(token, lambda: secret).open_session("?", token, response, is_secure=False)
    return response.headers["set-cookie"].partition(";")[0].partition("=")[2]


def client_of(tmp_path, base=f"http://{OWN}", **values):
    limits = Limits(upload=1000, body_seconds=0.2)
    config = Config(data=tmp_path, limits=limits, **values)
    return TestClient(guarded(config), base_url=base)


@pytest.fixture
def client(tmp_path):
    return client_of(tmp_path)


@pytest.fixture
def locked(tmp_path):
    return client_of(tmp_path, token=TOKEN)


@pytest.mark.parametrize("host", [OWN, "localhost:7860", "[::1]:7860", "127.0.0.1", "a.localhost"])
def test_own_names_are_answered(client, host):
    assert client.get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:7860",
        "192.168.1.5",
        "127.0.0.1.evil.example",
        "",
        "[::1",
        "a b",
    ],
)
def test_rebinding_is_refused(client, host):
    answer = client.get("/api/v1/system", headers={"host": host})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "forbidden"


def test_a_name_can_be_allowed_and_addresses_are_where_the_network_is(tmp_path):
    wide = client_of(tmp_path, host="0.0.0.0", token=TOKEN, allowed_hosts=("Studio.local",))
    knows = {"authorization": f"Bearer {TOKEN}"}
    for host in ("studio.local:7860", "192.168.1.5:7860", "[fe80::1]:7860"):
        assert wide.get("/", headers={"host": host, **knows}).status_code == 200
    assert wide.get("/", headers={"host": "evil.example", **knows}).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "http://127.0.0.1:7860.evil.example"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"},
    ],
)
def test_pages_of_other_sites_are_refused(client, headers):
    assert client.post("/api/v1/jobs", headers=headers, json={}).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": f"http://{OWN}", "sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},
    ],
)
def test_the_own_page_and_programs_are_answered(client, headers):
    assert client.post("/api/v1/jobs", headers=headers, json={}).status_code == 200


def asked(config, method, path, query=b""):
    """What is sent to a client whose body never comes."""
    sent = []

    async def never():
        await asyncio.sleep(10)

    async def send(message):
        sent.append(message)

    headers = [(b"host", OWN.encode())]
    scope = {"type": "http", "path": path, "method": method, "query_string": query}
    asyncio.run(guarded(config)({**scope, "headers": headers}, never, send))
    return sent


def basic(password):
    return {"authorization": "Basic " + base64.b64encode(f"me:{password}".encode()).decode()}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": f"Bearer {TOKEN}"}, 200),
        ({"authorization": f"Bearer {TOKEN[:-1]}"}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"authorization": f"Bearer {TOKEN}é".encode()}, 401),
        (basic(TOKEN), 200),
        (basic("wrong"), 401),
        ({"authorization": "Basic ???"}, 401),
        ({"x-maple-token": TOKEN}, 200),
        ({"cookie": f"maple_session={session_of(TOKEN)}"}, 200),
        ({"cookie": f"maple_session={TOKEN}"}, 401),
        ({"cookie": f"maple_session={session_of(TOKEN + 'x')}"}, 401),  # of an earlier token
        ({"cookie": f"maple_session={session_of(TOKEN, b'other')}"}, 401),
        ({"cookie": f"maple_session=9{session_of(TOKEN)}"}, 401),  # lengthened
        ({"cookie": "maple_session=; \x7f"}, 401),
    ],
)
def test_the_token(locked, headers, status):
    assert locked.get("/sdapi/v1/options", headers=headers).status_code == status


def test_another_servers_cookies_do_not_hide_ours(locked):
    cookie = f'its[0]=a{{"b": 1; {COOKIE}={session_of(TOKEN)}; x=ä'
    assert locked.get("/", headers={"cookie": cookie.encode("latin-1")}).status_code == 200


def test_an_address_of_many_fields_is_refused(client):
    assert client.get("/?" + "a&" * 40).status_code == 200
    assert client.get("/?" + "a&" * 60).status_code == 400


def test_what_takes_no_token(locked):
    for path in ("/", "/page/main.js", "/api/v1/health", "/api/v1/session"):
        assert locked.get(path).status_code == 200
    for path in ("/page", "/openapi.json", "/api/v1/healthy", "/api/v1/session/x", "/docs"):
        assert locked.get(path).status_code == 401


def test_a_session_ends(locked, monkeypatch):
    cookie = {"cookie": f"{COOKIE}={session_of(TOKEN)}"}
    assert locked.get("/api/v1/system", headers=cookie).status_code == 200
    later = time.time() + doors.SESSION_SECONDS + 1
    monkeypatch.setattr(doors.time, "time", lambda: later)
    assert locked.get("/api/v1/system", headers=cookie).status_code == 401


def test_who_guesses_has_to_wait(locked, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(doors.time, "monotonic", lambda: now[0])
    for number in range(doors.TRIES):
        wrong = {"authorization": f"Bearer wrong-horse-{number:07}"}
        assert locked.get("/api/v1/system", headers=wrong).status_code == 401
    right = {"authorization": f"Bearer {TOKEN}"}
    answer = locked.get("/api/v1/system", headers=right)
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) <= doors.TRY_SECONDS
    assert locked.get("/?token=" + TOKEN).status_code == 429
    # Who is in stays in, and who says nothing is only asked for the token.
    cookie = {"cookie": f"{COOKIE}={session_of(TOKEN)}"}
    assert locked.get("/api/v1/system", headers=cookie).status_code == 200
    assert locked.get("/api/v1/system").status_code == 401
    now[0] += doors.TRY_SECONDS + 1
    assert locked.get("/api/v1/system", headers=right).status_code == 200


@pytest.mark.parametrize(
    ("host", "peer"),
    [
        ("192.168.1.5", "192.168.1.5"),
        ("::ffff:192.168.1.5", "192.168.1.5"),
        ("::1", "::1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::*"),
        ("2001:db8:1:2:ffff::1", "2001:db8:1:2::*"),
        ("fe80::1%eth0", "fe80::*"),
    ],
)
def test_a_machine_is_one_peer(host, peer):
    assert doors.peer_of({"client": (host, 50000)}) == peer


def test_a_browser_brings_the_token_once(locked):
    answer = locked.get(f"/?token={TOKEN}", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and TOKEN not in cookie
    assert locked.get("/openapi.json").status_code == 200


def test_a_redirect_stays_here(tmp_path):
    config = Config(data=tmp_path, token=TOKEN)
    sent = asked(config, "GET", "//evil.example/", f"token={TOKEN}".encode())
    assert dict(sent[0]["headers"])[b"location"] == b"/evil.example/"


def test_signed_addresses(locked):
    path = "/api/v1/pictures/0193f0a1b2c3d4e5f6a7b8c9-0/file"
    door = Door(TOKEN, lambda: SECRET)
    good = door.signed(path)
    assert locked.get(good).status_code == 200
    assert locked.get(good.replace("-0/", "-1/")).status_code == 401  # another picture's
    assert locked.get(good[:-1]).status_code == 401
    past = int(time.time()) - 1
    stale = f"{path}?expires={past}&key={door._signature(path, past)}"
    assert locked.get(stale).status_code == 401


def test_bodies_are_bounded_in_bytes(client):
    assert client.post("/", content=b"x" * 1000).text == "1000"
    assert client.post("/", content=b"x" * 1001).status_code == 413
    answer = client.post("/v1/images/edits", content=iter([b"x" * 600, b"x" * 600]))
    assert answer.status_code == 413 and "error" in answer.json()


def test_bodies_are_bounded_together(tmp_path):
    """What is in memory counts until it is answered."""
    limits = Limits(bodies=100, bodies_each=60)
    waiting = asyncio.Event()

    async def slow(scope, receive, send):
        await waiting.wait()
        await PlainTextResponse("done")(scope, receive, send)

    async def act():
        app = guarded(Config(data=tmp_path, limits=limits), slow)

        async def ask(size, host):
            sent = []

            async def receive():
                return {"type": "http.request", "body": b"x" * size}

            async def send(message):
                sent.append(message)

            scope = {"type": "http", "path": "/api/v1/jobs", "method": "POST", "query_string": b""}
            headers = [(b"host", OWN.encode())]
            await app({**scope, "headers": headers, "client": (host, 1)}, receive, send)
            return sent[0]["status"]

        held = asyncio.create_task(ask(50, "10.0.0.1"))
        await asyncio.sleep(0)
        assert await ask(20, "10.0.0.1") == 503  # more than one's share
        other = asyncio.create_task(ask(50, "10.0.0.2"))
        await asyncio.sleep(0)
        assert await ask(1, "10.0.0.3") == 503  # more than all
        waiting.set()
        assert await held == await other == 200
        assert await ask(60, "10.0.0.1") == 200

    asyncio.run(act())


def test_bodies_are_bounded_in_time(tmp_path):
    config = Config(data=tmp_path, limits=Limits(body_seconds=0.05))
    assert asked(config, "POST", "/api/v1/jobs")[0]["status"] == 408


def test_every_answer_carries_the_policy(client):
    for answer in (client.get("/"), client.get("/", headers={"host": "evil.example"})):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers


def test_answers_to_faults_carry_the_policy_too(tmp_path):
    app = make_app(Config(data=tmp_path / "data"))

    @app.get("/api/v1/fault")
    async def fault():
        raise ZeroDivisionError

    # Without its life: no worker is needed.
    client = TestClient(app, base_url=f"http://{OWN}", raise_server_exceptions=False)
    answer = client.get("/api/v1/fault")
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "failed"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    app.state.studio.store.close()


def test_signing_in_and_out(tmp_path):
    app = make_app(Config(data=tmp_path / "data", token=TOKEN))
    client = TestClient(app, base_url=f"http://{OWN}")
    path = "/api/v1/session"
    assert client.get(path).json() == {"token_needed": True, "signed_in": False}
    foreign = {"origin": "http://evil.example"}
    assert client.post(path, json={"token": TOKEN}, headers=foreign).status_code == 403
    wrong = client.post(path, json={"token": "wrong-horse-battery"})
    assert wrong.status_code == 401 and "set-cookie" not in wrong.headers
    right = client.post(path, json={"token": TOKEN})
    assert right.json() == {"token_needed": True, "signed_in": True}
    cookie = right.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and TOKEN not in cookie
    assert client.get("/openapi.json").status_code == 200  # with the cookie
    assert client.get(path).json()["signed_in"]
    assert client.delete(path).status_code == 204
    assert client.get("/openapi.json").status_code == 401
    app.state.studio.store.close()


def test_another_address_takes_a_token(tmp_path):
    with pytest.raises(ValueError, match="token"):
        Config(host="0.0.0.0", data=tmp_path)
    with pytest.raises(ValueError, match="12 characters"):
        Config(token="short", data=tmp_path)
