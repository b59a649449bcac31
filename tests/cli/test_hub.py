"""Hub names, the choice of files, and downloads from a hub on this machine."""

import os
import time

import pytest
from fake_hub import COMMIT

from mlx_maple import hub as hub_module
from mlx_maple.hub import HubError, HubName, choose, fetch, parse_name

SD = "some-one/small.diffusion"
DIFFUSERS = [
    "model_index.json",
    "README.md",
    "safety_checker/model.safetensors",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "sd-pruned.ckpt",
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", HubName("owner/name")),
        ("owner/na.me-1@fp16", HubName("owner/na.me-1", "fp16")),
        ("owner/name@refs/pr/3:a/b.ckpt", HubName("owner/name", "refs/pr/3", "a/b.ckpt")),
        ("owner/name:model.safetensors", HubName("owner/name", file="model.safetensors")),
        ("models/some.ckpt", None),
        ("models/some.SAFETENSORS", None),
        ("./owner/name", None),
        ("/owner/name", None),
        ("a/b/c", None),
        ("name", None),
        ("owner/name:../../etc/passwd", None),
    ],
)
def test_what_reads_as_a_hub_name(text, expected):
    assert parse_name(text) == expected


def test_a_16_bit_run_takes_the_16_bit_variant_where_there_is_one():
    choice = choose(HubName(SD), DIFFUSERS, "float16")
    weights = [f for f in choice.files if "safetensors" in f or f.endswith(".bin")]
    assert weights == [
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert choice.variant == "fp16"
    assert "tokenizer/vocab.json" in choice.files
    assert not any(f.startswith(("safety_checker", "README")) for f in choice.files)


def test_a_float32_run_takes_full_weights_even_where_only_torch_has_them():
    files = [f for f in DIFFUSERS if f != "unet/diffusion_pytorch_model.safetensors"]
    choice = choose(HubName(SD), files, "float32")
    assert "unet/diffusion_pytorch_model.bin" in choice.files
    assert "text_encoder/model.safetensors" in choice.files
    assert choice.variant is None


def test_a_variant_that_is_asked_for_comes_first():
    choice = choose(HubName(SD), DIFFUSERS, "float32", "fp16")
    assert choice.variant == "fp16"
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in choice.files
    assert "vae/diffusion_pytorch_model.safetensors" in choice.files  # has no such variant
    ema = "unet/diffusion_pytorch_model.non_ema.bin"
    assert ema in choose(HubName(SD), [*DIFFUSERS, ema], "float16", "non_ema").files


def test_shards_come_with_their_index():
    files = [f for f in DIFFUSERS if not f.startswith("unet/diffusion")]
    shards = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    other = "unet/diffusion_pytorch_model.non_ema-00001-of-00002.safetensors"
    choice = choose(HubName(SD), [*files, *shards, index, other], "float32")
    assert [f for f in choice.files if f.startswith("unet/d")] == [index, *shards]


def test_a_repository_with_one_checkpoint_needs_no_file_name():
    assert choose(HubName(SD), ["README.md", "a.ckpt"], "float16").single == "a.ckpt"
    with pytest.raises(HubError, match=r"name one as owner/name:file: a\.ckpt, b"):
        choose(HubName(SD), ["a.ckpt", "b.safetensors"], "float16")
    with pytest.raises(HubError, match="no such file"):
        choose(HubName(SD, file="c.ckpt"), ["a.ckpt"], "float16")
    with pytest.raises(HubError, match="no Stable Diffusion model there"):
        choose(HubName(SD), ["README.md", "pytorch_model.onnx"], "float16")
    with pytest.raises(HubError, match="no weights that can be read in vae/"):
        choose(HubName(SD), [f for f in DIFFUSERS if "vae/diff" not in f], "float16")


def test_only_the_needed_files_are_fetched_and_only_once(hub):
    hub.repos[SD] = {file: file.encode() for file in DIFFUSERS}
    seen = []
    path, choice, notes = fetch(HubName(SD), progress=lambda *state: seen.append(state))
    assert hub.fetched() == sorted(choice.files) and not notes
    assert path.name == COMMIT
    assert (path / "model_index.json").read_bytes() == b"model_index.json"
    assert seen[-1][0] == seen[-1][1] == sum(len(file) for file in choice.files)

    count = len(hub.requests)
    assert fetch(HubName(SD)) == (path, choice, [])
    assert len(hub.requests) == count


def test_offline_uses_the_cache_and_says_when_it_cannot(hub, monkeypatch):
    hub.repos[SD] = {file: file.encode() for file in DIFFUSERS}
    with pytest.raises(HubError, match="not in the hub's cache, and the network is not allowed"):
        fetch(HubName(SD), local_files_only=True)
    path, choice, _ = fetch(HubName(SD))
    count = len(hub.requests)
    assert fetch(HubName(SD), local_files_only=True) == (path, choice, [])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch(HubName(SD)) == (path, choice, [])
    assert len(hub.requests) == count
    os.remove(path / "vae/config.json")
    with pytest.raises(
        HubError, match="not complete in the hub's cache, and HF_HUB_OFFLINE is set"
    ):
        fetch(HubName(SD))


def test_an_unreachable_hub_is_one_line_and_a_cached_model_still_loads(hub):
    hub.repos[SD] = {file: file.encode() for file in DIFFUSERS}
    path, choice, _ = fetch(HubName(SD))
    hub.down = True
    again, chosen, notes = fetch(HubName(SD))
    assert (again, chosen) == (path, choice)
    assert "cannot be reached" in notes[0] and "used the copy in the cache" in notes[0]
    with pytest.raises(HubError, match="cannot be reached") as caught:
        fetch(HubName("other/one"))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ((401, "GatedRepo"), "access is gated: accept the terms at http"),
        ((403, "GatedRepo"), "access is gated: accept the terms at http"),
        ((401, "RepoNotFound"), "no such repository, or it is private"),
        ((404, "RepoNotFound"), "no such repository, or it is private"),
        ((403, ""), "refuses access"),
        ((500, ""), "HTTP 500"),
    ],
)
def test_refusals_say_what_to_do(hub, status, words, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the hub library waits between tries
    hub.status[SD] = status
    with pytest.raises(HubError, match=words) as caught:
        fetch(HubName(SD))
    assert "\n" not in str(caught.value) and SD in str(caught.value)


def test_a_missing_revision_is_named(hub):
    hub.repos[SD] = {"a.ckpt": b"a"}
    with pytest.raises(HubError, match="no revision v9"):
        fetch(HubName(SD, "v9"))


@pytest.fixture
def large(hub, monkeypatch):
    """A repository with one file that is large enough to be fetched in parts."""
    monkeypatch.setattr(hub_module, "RESUMED_FROM", 1000)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    data = os.urandom(300_000)
    hub.repos[SD] = {"a.ckpt": data}
    return data


def test_a_broken_connection_is_taken_up_again_within_the_run(hub, large):
    hub.cut["a.ckpt"] = [100_000, 50_000]
    path, _, _ = fetch(HubName(SD))
    assert path.read_bytes() == large
    starts = [first for method, _, first in hub.requests if method == "GET"]
    assert starts == [0, 100_000, 150_000]


def test_a_run_that_was_cut_off_goes_on_where_it_stopped(hub, large):
    hub.cut["a.ckpt"] = [100_000] + [0] * 200  # the connection never comes back
    with pytest.raises(HubError, match="goes on where it stopped"):
        fetch(HubName(SD))
    partial = list((hub_module.folder_of(HubName(SD)) / "blobs").glob("*.incomplete"))
    assert [p.stat().st_size for p in partial] == [100_000]
    hub.cut.clear()
    hub.requests.clear()
    seen = []
    path, _, _ = fetch(HubName(SD), progress=lambda *state: seen.append(state))
    assert path.read_bytes() == large
    assert [r for r in hub.requests if r[0] == "GET"] == [("GET", "a.ckpt", 100_000)]
    assert seen[1][0] > 100_000 and seen[-1][:2] == (300_000, 300_000)
    assert not list(partial[0].parent.glob("*.incomplete"))


def test_a_token_goes_to_the_hub_and_to_no_other_host(hub, large, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.repos[SD]["config.json"] = b"{}"
    fetch(HubName(SD, file="a.ckpt"))
    assert hub.tokens == [("127.0.0.1", "Bearer hf_secret")]
    hub.tokens.clear()
    hub.cdn, hub.commit, hub.repos[SD]["a.ckpt"] = True, "f" * 40, large[::-1]
    path, _, _ = fetch(HubName(SD, file="a.ckpt"))
    assert path.read_bytes() == large[::-1]
    assert hub.tokens == [("localhost", "")]


def test_a_download_that_arrives_damaged_is_not_used(hub, large):
    hub.cut["a.ckpt"] = [100_000] + [0] * 200
    with pytest.raises(HubError):
        fetch(HubName(SD))
    (partial,) = (hub_module.folder_of(HubName(SD)) / "blobs").glob("*.incomplete")
    partial.write_bytes(b"x" * 100_000)
    hub.cut.clear()
    with pytest.raises(HubError, match=r"a\.ckpt arrived damaged"):
        fetch(HubName(SD))
    path, _, _ = fetch(HubName(SD))  # and the next run starts afresh
    assert path.read_bytes() == large
