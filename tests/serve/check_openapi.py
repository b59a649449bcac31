"""schemathesis calls every operation of the OpenAPI document, with what fits it and what does not.

Run by `make serve-check`. No answer may be a 5xx, and every answer must be as the document says.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from live import Server

HERE = Path(__file__).resolve().parent
CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance"),
    *("response_schema_conformance",),
)


@pytest.mark.timeout(1800)
def test_no_call_ends_in_a_fault_of_the_server(tmp_path):
    with Server(tmp_path / "data") as server:
        command = [
            *(str(Path(sys.executable).with_name("schemathesis")), "run"),
            f"{server.base}/openapi.json",
            *("--exclude-path", "/api/v1/events"),  # does not end
            *("--phases", "examples,coverage,fuzzing", "--max-examples", "5"),
            *("--checks", ",".join(CHECKS), "--continue-on-failure", "--seed", "7"),
            *("--request-timeout", "60", "--suppress-health-check", "all", "--no-color"),
            *("--report", "ndjson", "--report-ndjson-path", str(tmp_path / "calls.ndjson")),
        ]
        hooks = {"SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(HERE)}
        run = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, **hooks}, capture_output=True, text=True
        )
        print(run.stdout[run.stdout.find("= SUMMARY =") :])
        assert run.returncode == 0, run.stdout[-6000:]
        calls = re.search(r"(\d+) generated", run.stdout)
        assert calls and int(calls[1]) > 1000
        assert "Traceback" not in server.said()
