"""Short names for what is on the hub: what ``sd15`` stands for, how large it is, whose licence.

The table is known_models.json, one entry a model; CONTRIBUTING.md says what an entry needs. Sizes
are what is downloaded, rounded, for a 16-bit run and for a float32 run: a repository without a
16-bit variant costs the same in both. An entry names the pages that its facts were read on, and the
facts that none was found for; a test holds sizes to what the networks of a family take.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("known_models.json")

# What each kind of entry is given to, on the command line and in ``load``.
OPTIONS = {
    "model": "-m",
    "vae": "--vae",
    "taesd": "--taesd",
    "lora": "--lora",
    "controlnet": "--controlnet",
    "ip_adapter": "--ip-adapter",
}
# What may be recommended: the defaults of a drawing that a model's name stands for.
SETTINGS = ("width", "height", "steps", "guidance_scale", "sampler", "schedule")


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """One model that has a short name.

    Attributes:
        name: the short name; no path or hub name looks like it.
        hub: "owner/name", "owner/name@revision" or "owner/name:file"; None comes with the package.
        kind: "model", or what goes with one: "vae", "taesd", "lora", "controlnet"
            or "ip_adapter".
        family: of the models that it is, or fits.
        bytes: what a float16 or bfloat16 run downloads.
        bytes_in_float32: what a float32 run downloads.
        license: of the weights, as the hub spells licences.
        note: one line for people.
        settings: that its makers recommend where they are not its family's, some of ``SETTINGS``.
        vae: the name of the autoencoder that it is best drawn with, if it is not its own.
        sources: pages on which its facts were read.
        unverified: facts that no page was found for: "hub", "license", "bytes", "settings".
    """

    name: str
    hub: str | None
    kind: str
    family: str
    bytes: int
    bytes_in_float32: int
    license: str
    note: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    vae: str | None = None
    sources: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()

    @property
    def repo(self) -> str | None:
        """The hub repository, without revision and file."""
        return None if self.hub is None else self.hub.partition(":")[0].partition("@")[0]


@cache
def known_models() -> tuple[KnownModel, ...]:
    """Every model of the table, in its order."""
    return tuple(_known(entry) for entry in json.loads(TABLE.read_text("utf-8")))


def _known(entry: Mapping[str, Any]) -> KnownModel:
    lists = {key: tuple(entry[key]) for key in ("sources", "unverified") if key in entry}
    return KnownModel(**{**entry, **lists})


def find(name: str) -> KnownModel | None:
    """The model with this short name; upper and lower case are one."""
    return next((model for model in known_models() if model.name == name.lower()), None)


def of_repo(repo: str) -> KnownModel | None:
    """The whole model that is in a hub repository, if it is a known one."""
    return next((m for m in known_models() if m.kind == "model" and m.repo == repo), None)
