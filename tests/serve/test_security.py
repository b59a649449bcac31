"""What is refused before any part of the application sees it; controls are let through."""

import asyncio
import base64
import time

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from mlx_maple.serve import security
from mlx_maple.serve.config import Config, Limits
from mlx_maple.serve.security import Security

TOKEN = "correct-horse-battery"
SECRET = b"s" * 32
OWN = "127.0.0.1:7860"


async def inside(scope, receive, send):
    """An application that answers with the size of what it got."""
    message = await receive()
    await PlainTextResponse(str(len(message["body"])))(scope, receive, send)


def client_of(tmp_path, base=f"http://{OWN}", **values):
    limits = Limits(upload=1000, body_seconds=0.2)
    config = Config(data=tmp_path, limits=limits, **values)
    return TestClient(Security(inside, config, lambda: SECRET), base_url=base)


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
    guarded = Security(inside, config, lambda: SECRET)
    asyncio.run(guarded({**scope, "headers": headers}, never, send))
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
        ({"cookie": f"maple_session={security.session_of(TOKEN)}"}, 200),
        ({"cookie": f"maple_session={TOKEN}"}, 401),
        ({"cookie": "maple_session=; \x7f"}, 401),
    ],
)
def test_the_token(locked, headers, status):
    assert locked.get("/sdapi/v1/options", headers=headers).status_code == status


def test_another_servers_cookies_do_not_hide_ours(locked):
    cookie = f'its[0]=a{{"b": 1; {security.COOKIE}={security.session_of(TOKEN)}; x=ä'
    assert locked.get("/", headers={"cookie": cookie.encode("latin-1")}).status_code == 200


def test_an_address_of_many_fields_is_refused(client):
    assert client.get("/?" + "a&" * 40).status_code == 200
    assert client.get("/?" + "a&" * 60).status_code == 400


def test_health_alone_takes_no_token(locked):
    assert locked.get("/api/v1/health").status_code == 200
    assert locked.get("/api/v1/healthy").status_code == 401


def test_a_browser_brings_the_token_once(locked):
    answer = locked.get(f"/?token={TOKEN}", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and TOKEN not in cookie
    assert locked.get("/").status_code == 200


def test_a_redirect_stays_here(tmp_path):
    config = Config(data=tmp_path, token=TOKEN)
    sent = asked(config, "GET", "//evil.example/", f"token={TOKEN}".encode())
    assert dict(sent[0]["headers"])[b"location"] == b"/evil.example/"


def test_signed_addresses(locked):
    path = "/api/v1/pictures/0193f0a1b2c3d4e5f6a7b8c9-0/file"
    good = security.signed(SECRET, path)
    assert locked.get(good).status_code == 200
    assert locked.get(good.replace("-0/", "-1/")).status_code == 401  # another picture's
    assert locked.get(good[:-1]).status_code == 401
    past = int(time.time()) - 1
    stale = f"{path}?expires={past}&key={security._signature(SECRET, path, past)}"
    assert locked.get(stale).status_code == 401


def test_bodies_are_bounded_in_bytes(client):
    assert client.post("/", content=b"x" * 1000).text == "1000"
    assert client.post("/", content=b"x" * 1001).status_code == 413
    answer = client.post("/v1/images/edits", content=iter([b"x" * 600, b"x" * 600]))
    assert answer.status_code == 413 and "error" in answer.json()


def test_bodies_are_bounded_in_time(tmp_path):
    config = Config(data=tmp_path, limits=Limits(body_seconds=0.05))
    assert asked(config, "POST", "/api/v1/jobs")[0]["status"] == 408


def test_every_answer_carries_the_policy(client):
    for answer in (client.get("/"), client.get("/", headers={"host": "evil.example"})):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers


def test_another_address_takes_a_token(tmp_path):
    with pytest.raises(ValueError, match="token"):
        Config(host="0.0.0.0", data=tmp_path)
    with pytest.raises(ValueError, match="12 characters"):
        Config(token="short", data=tmp_path)
