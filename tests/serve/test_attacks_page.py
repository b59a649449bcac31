"""The table of attacks in docs/server.md is the one of the checks, word by word."""

from pathlib import Path

from check_attacks import LOCKED, OPEN, table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "server.md"


def test_the_page_tells_what_is_tried_and_what_it_gets():
    text = PAGE.read_text().partition("<!-- attacks: begin -->\n")[2]
    told = text.partition("<!-- attacks: end -->")[0].splitlines()
    assert told == list(table([*OPEN, *LOCKED]))
