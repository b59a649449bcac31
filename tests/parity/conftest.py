"""The parity table: each live comparison leaves its figures here, printed at the end of a run."""

import json
import os
from pathlib import Path

import pytest

_ROWS: list[dict[str, object]] = []


@pytest.fixture
def parity_record(request):
    """Record one row: ``parity_record("UNet t=999, tiny", max_error=…, cosine=…, bar="…")``."""

    def record(name: str, **figures: object) -> None:
        _ROWS.append({"test": request.node.nodeid.split("::")[-1], "name": name, **figures})

    return record


@pytest.fixture(scope="session")
def family_models(tmp_path_factory):
    """The tiny models of every family, ours and diffusers': made once for all who compare them."""
    from test_families_parity import Models

    return Models(tmp_path_factory.mktemp("families"))


def pytest_terminal_summary(terminalreporter) -> None:
    if not _ROWS:
        return
    terminalreporter.section("parity with the reference implementations")
    for row in _ROWS:
        figures = "  ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in row.items()
            if key not in ("test", "name")
        )
        terminalreporter.write_line(f"{row['name']!s:<58} {figures}")
    if path := os.environ.get("MAPLE_PARITY_JSON"):
        Path(path).write_text(json.dumps(_ROWS, indent=1, default=float) + "\n")
