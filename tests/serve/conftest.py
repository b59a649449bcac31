"""A server in this process, with a worker of its own that draws with the tiny model."""

import pytest
from known import BASE, TINY
from starlette.testclient import TestClient

from mlx_maple.serve.app import make_app
from mlx_maple.serve.config import Config, Limits


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """A client of a running server, and the server's insides."""
    folder = tmp_path_factory.mktemp("serve")
    limits = Limits(queued=6, queued_each=4, presets=3)
    app = make_app(Config(model=str(TINY), data=folder / "data", limits=limits))
    with TestClient(app, base_url=BASE, raise_server_exceptions=False) as client:
        yield client, app.state.studio


@pytest.fixture
def client(served):
    return served[0]


@pytest.fixture
def studio(served):
    return served[1]


@pytest.fixture
def finished(client):
    """Waits for a job's end by its events, and returns it."""

    def wait(job: dict) -> dict:
        with client.stream("GET", f"/api/v1/jobs/{job['id']}/events") as stream:
            assert stream.status_code == 200
            for _ in stream.iter_lines():
                pass
        return client.get(f"/api/v1/jobs/{job['id']}").json()

    return wait
