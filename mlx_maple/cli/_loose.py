"""What lies in the models' folders and in the hub's cache: of which family each file is.

Only headers are read: a family is told by the names and shapes of a file's tensors.
"""

from dataclasses import dataclass
from pathlib import Path

from mlx_maple import model_folders

# Kinds whose files are networks that ``open_model`` tells apart; others change one, or a picture.
TOLD = ("checkpoint", "unet", "vae", "controlnet", "ip_adapter", "clip_vision")
OPTIONS = {
    "checkpoint": "-m",
    "lora": "--lora",
    "embedding": "--embedding",
    "unet": "--unet",
    "vae": "--vae",
    "controlnet": "--controlnet",
    "ip_adapter": "--ip-adapter",
    "clip_vision": "--ip-encoder",
    "upscaler": "--hires-upscaler",
}


@dataclass(frozen=True)
class Loose:
    """One file in the models' folders.

    Attributes:
        kind: one of ``model_folders.KINDS``.
        name: that its option takes.
        path: the file.
        nbytes: its size.
        family: of a checkpoint, a UNet, an autoencoder or a ControlNet, by evidence; "" for other
            kinds, and where it cannot be used.
        fault: why it cannot be used.
    """

    kind: str
    name: str
    path: Path
    nbytes: int
    family: str = ""
    fault: str = ""


def list_loose() -> list[Loose]:
    """Every file of the models' folders, kind by kind in order of name.

    Raises:
        ModelFoldersError: if ``$MAPLE_MODELS`` names a YAML file that cannot be used.
    """
    found: list[Loose] = []
    for kind in model_folders.KINDS:
        for name, path in model_folders.list(kind).items():
            try:
                nbytes = path.stat().st_size
            except OSError:
                continue
            family, fault = family_of(path) if kind in TOLD else ("", "")
            found.append(Loose(kind, name, path, nbytes, family, fault))
    return found


def family_of(path: Path) -> tuple[str, str]:
    """The family of a file or folder, or why it has none."""
    from maple_convert import open_model
    from maple_convert.errors import ConvertError

    try:
        with open_model(path) as model:
            return model.family, ""
    except ConvertError as error:
        return "", error.reason
