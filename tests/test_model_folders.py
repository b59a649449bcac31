"""Folders of loose files: what they hold by name, in either layout, and nothing outside."""

import os

import pytest

from mlx_maple import model_folders


def put(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MAPLE_MODELS", str(tmp_path))
    return tmp_path


def test_without_the_variable_there_is_nothing(monkeypatch):
    monkeypatch.delenv("MAPLE_MODELS", raising=False)
    assert all(model_folders.list(kind) == {} for kind in model_folders.KINDS)
    assert model_folders.find("lora", "style") is None


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("checkpoint", "Stable-diffusion/sd.ckpt"),
        ("checkpoint", "models/Stable-diffusion/sd.safetensors"),
        ("checkpoint", "checkpoints/sd.safetensors"),
        ("lora", "models/Lora/style.safetensors"),
        ("lora", "loras/style.safetensors"),
        ("embedding", "embeddings/bad.pt"),
        ("vae", "VAE/kl.pt"),
        ("vae", "models/vae/kl.safetensors"),
        ("unet", "unet/q4.gguf"),
        ("unet", "diffusion_models/q4.safetensors"),
        ("controlnet", "ControlNet/canny.pth"),
        ("upscaler", "ESRGAN/x4.pth"),
        ("upscaler", "upscale_models/x4.pth"),
    ],
)
def test_each_kind_has_its_folder_in_either_layout(root, kind, file):
    put(root, file)
    name = file.rpartition("/")[2].partition(".")[0]
    assert model_folders.list(kind) == {name: root / file}
    assert model_folders.find(kind, name) == root / file
    others = [other for other in model_folders.KINDS if other != kind]
    assert all(model_folders.list(other) == {} for other in others)


def test_names_go_with_and_without_suffix_folder_and_capitals(root):
    put(root, "loras/people/Anna.safetensors", "loras/Ink.pt", "loras/Ink.safetensors")
    anna, ink = root / "loras/people/Anna.safetensors", root / "loras/Ink.safetensors"
    for name in ("people/Anna", "Anna", "anna", "Anna.safetensors", "people\\Anna"):
        assert model_folders.find("lora", name) == anna, name
    assert model_folders.find("lora", "Ink") == ink
    assert model_folders.find("lora", "Ink.pt") == root / "loras/Ink.pt"
    assert model_folders.find("lora", "Ink.bin") is None
    assert model_folders.find("lora", "Ann") is None
    assert list(model_folders.list("lora")) == ["Ink", "people/Anna"]


def test_a_name_with_dots_keeps_them(root):
    put(root, "loras/style.v1.5.safetensors")
    assert list(model_folders.list("lora")) == ["style.v1.5"]
    assert model_folders.find("lora", "style.v1.5") == root / "loras/style.v1.5.safetensors"


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/../../secret", "..\\secret", "", " ", "..", "x\0y"]
)
def test_no_name_leads_out(root, name):
    put(root, "secret.safetensors", "loras/a/b.safetensors")
    assert model_folders.find("lora", name) is None


def test_other_files_hidden_ones_and_deep_ones_are_left_out(root):
    put(root, "loras/a.txt", "loras/.b.safetensors", "loras/.git/c.safetensors")
    put(root, "loras/1/2/3/4/d.safetensors", "loras/1/2/3/4/5/e.safetensors")
    assert list(model_folders.list("lora")) == ["1/2/3/4/d"]


def test_a_folder_that_links_to_itself_ends(root):
    put(root, "loras/a.safetensors")
    os.symlink(root / "loras", root / "loras" / "again")
    assert "a" in model_folders.list("lora")


def test_comfyuis_yaml_is_followed(root):
    put(root, "x/models/Lora/one.safetensors", "x/models/LyCORIS/two.safetensors", "y/l/one.pt")
    (root / "extra_model_paths.yaml").write_text(
        "a111:\n  base_path: x\n  checkpoints: models/Stable-diffusion\n"
        "  loras: |\n    models/Lora\n    models/LyCORIS\n"
        f"mine:\n  is_default: true\n  base_path: {root / 'y'}\n  loras: l\n  custom_nodes: n\n"
    )
    found = model_folders.list("lora")
    assert found == {
        "one": root / "y/l/one.pt",  # the default section goes first
        "two": root / "x/models/LyCORIS/two.safetensors",
    }


def test_the_variable_may_name_the_yaml_and_several_places(root, monkeypatch):
    put(root, "a/loras/one.pt", "b/l/two.pt")
    (root / "paths.yaml").write_text("s:\n  base_path: b\n  loras: l\n")
    monkeypatch.setenv("MAPLE_MODELS", os.pathsep.join([str(root / "a"), str(root / "paths.yaml")]))
    assert list(model_folders.list("lora")) == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [", "not YAML at line 1"),
        ("- a", "no sections"),
        ("a: !!python/object/apply:os.system ['touch x']", "not YAML"),
        ("x" * (1 << 20) + "y", "larger than"),
    ],
    ids=["syntax", "list", "code", "large"],
)
def test_a_yaml_that_cannot_be_used_is_named(root, text, reason):
    (root / "extra_model_paths.yaml").write_text(text)
    with pytest.raises(model_folders.ModelFoldersError) as caught:
        model_folders.list("lora")
    assert reason in str(caught.value) and "extra_model_paths.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_strange_sections_do_no_harm(root):
    put(root, "loras/a.pt")
    (root / "extra_model_paths.yaml").write_text("a: 3\nb:\nc:\n  loras: 5\n  base_path: [1]\n")
    assert list(model_folders.list("lora")) == ["a"]


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind must be one of"):
        model_folders.list("loras")
