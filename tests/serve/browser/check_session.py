"""Signing in: what a stranger sees, a wrong token and the right one, by the keyboard alone."""

import pytest
from live import Server

pytestmark = pytest.mark.filterwarnings("ignore")  # of Playwright's own
TOKEN = "a token of tests"
ASKED = "document.querySelector('#sign-in')?.hidden === false"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded")
    with Server(folder / "data", "--token", TOKEN, model=None) as running:
        yield running


@pytest.fixture
def stranger(open_sheet, guarded):
    """A phone that has not signed in."""
    sheet = open_sheet(
        guarded.base,
        until=ASKED,
        viewport={"width": 375, "height": 740},
        has_touch=True,
        is_mobile=True,
    )
    sheet.refusals = {401, 422}
    return sheet


def test_a_stranger_is_asked_and_gets_nothing_else(stranger):
    page = stranger.page
    assert page.is_visible("#token") and not page.is_visible("#prompt")
    assert page.evaluate("document.activeElement.id") == "token"
    assert page.get_attribute("#token", "type") == "password"
    for path in ("/openapi.json", "/api/v1/system", "/api/v1/pictures", "/api/v1/events"):
        assert stranger.context.request.get(path).status == 401, path
    assert stranger.overflow() <= 0
    stranger.check_access("sign-in")


def test_wrong_then_right_with_the_keyboard_alone(stranger, guarded):
    page = stranger.page
    page.keyboard.press("Enter")
    assert page.inner_text("#sign-in-problem")
    page.keyboard.type("not the token at all")
    page.keyboard.press("Enter")
    stranger.until("/not this server/.test(document.querySelector('#sign-in-problem').textContent)")
    assert page.get_attribute("#token", "aria-invalid") == "true"
    assert page.evaluate("document.activeElement.id") == "token"
    assert not page.is_visible("#prompt")
    stranger.check_access("a wrong token")
    page.keyboard.type(TOKEN)  # over the wrong one, which is selected
    page.keyboard.press("Enter")
    stranger.until(stranger.READY)
    assert page.is_visible("#prompt") and not page.is_visible("#token")
    assert TOKEN not in page.url and TOKEN not in page.evaluate("document.cookie")
    assert page.evaluate("JSON.stringify({...localStorage})").find(TOKEN) == -1

    # Previews, events and pictures come by the cookie; it holds after a reload.
    job = stranger.drawn()
    assert job["state"] == "done"
    page.reload()
    stranger.until(stranger.READY)
    page.wait_for_selector(f"[data-picture='{job['pictures'][0]['id']}']")

    # Signed out, it is a stranger's again.
    page.click("#sign-out")
    stranger.until(ASKED)
    assert stranger.context.request.get("/api/v1/system").status == 401


def test_a_session_that_ends_while_the_page_is_open(stranger):
    page = stranger.page
    page.fill("#token", TOKEN)
    page.tap("#sign-in-button")
    stranger.until(stranger.READY)
    page.fill("#prompt", "a leaf that is not forgotten")
    stranger.context.clear_cookies()
    page.fill("#search", "anything")
    stranger.until(ASKED)
    page.fill("#token", TOKEN)
    page.keyboard.press("Enter")
    page.wait_for_selector("#prompt")
    assert page.input_value("#prompt") == "a leaf that is not forgotten"
    page.fill("#search", "")
    assert stranger.drawn("a leaf")["state"] == "done"


def test_who_guesses_has_to_wait(open_sheet, tmp_path):
    with Server(tmp_path / "data", "--token", TOKEN, model=None) as other:
        sheet = open_sheet(other.base, until=ASKED)
        sheet.refusals = {401, 429}
        page = sheet.page
        for number in range(11):
            page.fill("#token", f"guess number {number}")
            with page.expect_response("**/api/v1/session"):
                page.keyboard.press("Enter")
            page.wait_for_selector("#sign-in-button:enabled")
        sheet.until(
            "/wait|later|second/.test(document.querySelector('#sign-in-problem').textContent)"
        )
        sheet.context.close()


def test_without_a_token_nobody_is_asked(sheet):
    assert not sheet.page.is_visible("#sign-in") and not sheet.page.is_visible("#sign-out")
