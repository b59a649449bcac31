"""`maple serve`: the page and the HTTP APIs."""

import argparse
import os
import secrets
import sys
from pathlib import Path

from mlx_maple.cli import DONE, FAULT, USAGE, Failure, _default_model

TOKEN_VARIABLE = "MAPLE_TOKEN"
PACKAGES = ("fastapi", "starlette", "uvicorn", "pydantic", "python_multipart", "h11", "anyio")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "-m",
        "--model",
        metavar="MODEL",
        help="what draws where a request names no model, named as for `maple generate`",
    )
    parser.add_argument(
        "--models",
        metavar="DIR",
        help="a folder of loose model files, as A1111 or ComfyUI keeps it ($MAPLE_MODELS)",
    )
    parser.add_argument("--open", action="store_true", help="show the page in a browser")

    add = parser.add_argument_group("where it listens").add_argument
    add(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="default 127.0.0.1, which only this machine reaches; 0.0.0.0 is every address, and "
        "any but the default asks for a token",
    )
    add("--port", type=int, default=7860, metavar="N", help="default 7860; 0 takes a free one")
    add(
        "--token",
        metavar="TEXT",
        help=f"what every request must know, 12 characters or more; better in ${TOKEN_VARIABLE}, "
        "which other users of the machine do not see. On another --host one is made up and shown "
        "where none is given",
    )
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that browsers may ask for it by, beside addresses and localhost",
    )
    add(
        "--behind-proxy",
        action="store_true",
        help="believe what a proxy on this machine says of whom requests come from "
        "(X-Forwarded-For and -Proto)",
    )

    add = parser.add_argument_group("memory").add_argument
    add(
        "--low-memory",
        action="store_true",
        help="hold one network at a time and decode in stripes: less memory, more time",
    )
    add("--dtype", choices=("float16", "bfloat16", "float32"), help="of weights and activations")
    add("--quantize", type=int, choices=(8, 4), help="bits to keep the weights in")
    add(
        "--idle-unload",
        type=float,
        metavar="SECONDS",
        help="give the models' memory back after so long without a job",
    )

    add = parser.add_argument_group("else").add_argument
    add(
        "--data",
        metavar="DIR",
        help="where pictures and history are kept; default $MAPLE_DATA, else "
        "~/.local/share/mlx-maple",
    )
    add("--verbose", action="store_true", help="log every request")


def run(args: argparse.Namespace) -> int:
    """Serve until it is told to end."""
    try:
        from mlx_maple.serve.app import serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in PACKAGES:
            raise
        raise Failure(
            FAULT,
            f"maple serve needs packages that are not here ({error.name}): "
            'pip install "mlx-maple[serve]"',
        ) from None
    from mlx_maple import model_folders
    from mlx_maple.serve.config import LOOPBACK, Config, data_folder

    if not 0 <= args.port <= 65535:
        raise Failure(USAGE, f"--port must be from 0 to 65535, got {args.port}")
    if args.idle_unload is not None and args.idle_unload <= 0:
        raise Failure(USAGE, f"--idle-unload must be more than 0 seconds, got {args.idle_unload:g}")
    if args.models is not None:
        folder = Path(args.models).expanduser()
        if not folder.is_dir():
            raise Failure(FAULT, f"--models {args.models}: no such folder")
        os.environ["MAPLE_MODELS"] = str(folder.resolve())
    model_folders.folders("checkpoint")  # a YAML file there that cannot be used is told now
    token = args.token if args.token is not None else os.environ.get(TOKEN_VARIABLE) or None
    is_made_up = token is None and args.host not in LOOPBACK
    if is_made_up:
        token = secrets.token_urlsafe(24)
    try:
        config = Config(
            host=args.host,
            port=args.port,
            token=token,
            is_behind_proxy=args.behind_proxy,
            allowed_hosts=tuple(args.allow_host),
            model=_model(args.model),
            low_memory=args.low_memory,
            dtype=args.dtype,
            quantize=args.quantize,
            idle_unload=args.idle_unload,
            data=data_folder() if args.data is None else Path(args.data).expanduser(),
        )
    except ValueError as error:
        raise Failure(USAGE, str(error).rstrip(".")) from None
    if not config.is_local:
        print(
            "maple: everyone who can reach this address and knows the token can draw here; the "
            "connection is not encrypted",
            file=sys.stderr,
        )
    try:
        serve(config, opens=args.open, shows_token=is_made_up, is_verbose=args.verbose)
    except KeyboardInterrupt:
        pass  # the usual end
    return DONE


def _model(name: str | None) -> str | None:
    """The model that draws, a path in full: the worker runs in another folder."""
    source = name if name else _default_model.chosen()[0]
    if source is None:
        return None
    path = Path(source).expanduser() if source.startswith("~") else Path(source)
    return str(path.resolve()) if path.exists() else source
