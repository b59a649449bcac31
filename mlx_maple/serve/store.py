"""What outlives the process: jobs, pictures, presets and options in SQLite, pictures as files.

Layout of the data folder:

    history.sqlite3    jobs, pictures, presets, options; write-ahead log
    pictures/          <job>-<index>.png, each with its settings inside
    thumbnails/        made again when they are missing
    inputs/            pictures that jobs start from: waiting ones, and those with pictures
    enlarged/          pictures on their way to who had them enlarged
    lock               held by the server that uses the folder

A picture is written before its row: a file without a row is a picture whose server was killed in
between, and is taken up at the next start. The store is used from one thread at a time.
"""

import fcntl
import io
import json
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from mlx_maple import images
from mlx_maple.images import ImageError

KEPT_JOBS = 2000  # finished jobs without pictures that are remembered
FORGET_EACH = 100  # jobs that end without pictures, between two times that older ones are let go
THUMBNAIL = 256  # pixels
_PICTURE = re.compile(r"([0-9a-f]{24})-(\d{1,3})\.png")
_INPUT = re.compile(r"[0-9a-f]{24}-[a-z_]{1,30}(-\d{1,2})?")

_JSON = ("draw", "outcome", "settings")  # columns that hold it
Row = TypeVar("Row")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, client TEXT NOT NULL, state TEXT NOT NULL, created REAL NOT NULL,
    started REAL, finished REAL, draw TEXT NOT NULL, outcome TEXT NOT NULL DEFAULT '{}');
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, created);
CREATE TABLE IF NOT EXISTS pictures (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, job TEXT NOT NULL,
    place INTEGER NOT NULL, created REAL NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL,
    settings TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS pictures_by_job ON pictures (job, place);
CREATE TABLE IF NOT EXISTS presets (name TEXT PRIMARY KEY, draw TEXT NOT NULL, changed REAL);
CREATE TABLE IF NOT EXISTS options (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


class InUse(Exception):
    """Another server uses the data folder."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A finished picture.

    Attributes:
        id: "<job>-<index>".
        job: that drew it.
        index: in the job, from 0.
        created: seconds since 1970.
        width: in pixels.
        height: likewise.
        settings: as written in its file.
        number: grows with every picture; pages of the history begin after one.
    """

    id: str
    job: str
    index: int
    created: float
    width: int
    height: int
    settings: dict[str, Any]
    number: int = 0


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """What is kept of a job.

    Attributes:
        id: 24 hexadecimal digits that sort by time.
        client: who asked.
        state: queued, running, offered, done, failed or cancelled.
        created: seconds since 1970; so are the next two.
        started: when drawing began.
        finished: when it ended.
        draw: what was asked for, without pictures.
        outcome: notes, timings, error.
    """

    id: str
    client: str
    state: str
    created: float
    started: float | None
    finished: float | None
    draw: dict[str, Any]
    outcome: dict[str, Any]


def new_id() -> str:
    """24 hexadecimal digits: the time in milliseconds, then chance."""
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(6)}"


class Store:
    """The data folder."""

    def __init__(self, folder: Path) -> None:
        """Open it, or make it.

        Raises:
            InUse: another server has it.
            OSError: it cannot be written.
        """
        self.folder = folder
        self.pictures = folder / "pictures"
        self.thumbnails = folder / "thumbnails"
        self.inputs = folder / "inputs"
        self.enlarged = folder / "enlarged"
        for path in (folder, self.pictures, self.thumbnails, self.inputs, self.enlarged):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = open(folder / "lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise InUse(
                f"{folder}: another `maple serve` uses it (--data names a folder)"
            ) from None
        self._db = sqlite3.connect(
            folder / "history.sqlite3", check_same_thread=False, isolation_level=None
        )
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute("PRAGMA busy_timeout=5000")
        self._db.executescript(_SCHEMA)
        self._left_nothing = 0  # jobs, since it was opened

    def close(self) -> None:
        """Let go of the folder."""
        self._db.close()
        self._lock.close()

    # Jobs ------------------------------------------------------------------------------------

    def add_job(self, record: JobRecord) -> None:
        """Keep a new job."""
        self._db.execute(
            "INSERT INTO jobs (id, client, state, created, draw) VALUES (?, ?, ?, ?, ?)",
            (record.id, record.client, record.state, record.created, json.dumps(record.draw)),
        )

    def set_state(self, job: str, state: str, **columns: Any) -> None:
        """Write a job's new state, and its times and outcome where they are given."""
        outcome = columns.pop("outcome", None)
        values = {"state": state, **columns}
        if outcome is not None:
            values["outcome"] = json.dumps(outcome)
        assert values.keys() <= {"state", "started", "finished", "outcome"}
        names = ", ".join(f"{name} = ?" for name in values)
        self._db.execute(f"UPDATE jobs SET {names} WHERE id = ?", (*values.values(), job))

    def job(self, job: str) -> JobRecord | None:
        """One job by its id."""
        found = self._jobs("WHERE id = ?", (job,))
        return found[0] if found else None

    def recent_jobs(self, count: int) -> list[JobRecord]:
        """The last jobs that ended, the newest first."""
        return self._jobs(
            "WHERE state IN ('done', 'failed', 'cancelled') ORDER BY created DESC LIMIT ?", (count,)
        )

    def _jobs(self, where: str, values: Sequence[Any]) -> list[JobRecord]:
        return self._selected(JobRecord, "jobs", where, values)

    def _selected(
        self, kind: type[Row], table: str, where: str, values: Sequence[Any]
    ) -> list[Row]:
        """Rows of a table, whose columns are called as the fields of ``kind``."""
        names = [field.name for field in fields(kind)]  # pyright: ignore[reportArgumentType]
        columns = ", ".join("place" if name == "index" else name for name in names)
        rows = self._db.execute(f"SELECT {columns} FROM {table} {where}", values)
        return [
            kind(
                **{
                    name: json.loads(value) if name in _JSON else value
                    for name, value in zip(names, row, strict=True)
                }
            )
            for row in rows
        ]

    def finish(
        self,
        job: str,
        state: str,
        outcome: Mapping[str, Any],
        pictures: Sequence[Picture],
        started: float | None = None,
    ) -> None:
        """Write the end of a job with its pictures, in one commit."""
        times = {"started": started, "finished": time.time()}
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for picture in pictures:
                self._add_picture(picture)
            self.set_state(job, state, **times, outcome=dict(outcome))
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        for picture in pictures:  # of an earlier try, whose server was killed half way
            self._thumbnail_path(picture).unlink(missing_ok=True)
        if not self.pictures_of(job):  # there may be some of an earlier try
            self.drop_inputs(job)
            self._left_nothing += 1
            if self._left_nothing % FORGET_EACH == 0:
                self._forget()
        if state != "done":
            for path in self.enlarged.glob(f"{job}-*"):
                path.unlink(missing_ok=True)

    def recover(self) -> list[JobRecord]:
        """Put in order what a killed server left; returns the jobs to offer again.

        Pictures without a row are taken up, a job all of whose pictures are there is done, and
        what waited or was being drawn is offered again.
        """
        for folder in (self.pictures, self.thumbnails, self.inputs):
            for path in folder.glob(".*.tmp"):
                path.unlink(missing_ok=True)
        for path in self.enlarged.iterdir():
            path.unlink(missing_ok=True)
        known = {row[0] for row in self._db.execute("SELECT id FROM pictures")}
        for path in sorted(self.pictures.iterdir()):
            match = _PICTURE.fullmatch(path.name)
            if match and path.stem not in known:
                self._take_up(path, match[1], int(match[2]))
        offered = self._jobs("WHERE state IN ('queued', 'running', 'offered') ORDER BY created", ())
        left = []
        for record in offered:
            there = self._db.execute(
                "SELECT count(*) FROM pictures WHERE job = ?", (record.id,)
            ).fetchone()[0]
            if there and there >= (record.draw.get("count") or 1):
                self.set_state(record.id, "done", finished=time.time())
            else:
                self.set_state(record.id, "offered")
                left.append(record)
        wanted = {record.id for record in left}
        wanted |= {row[0] for row in self._db.execute("SELECT job FROM pictures")}
        for path in self.inputs.iterdir():
            if path.name.partition("-")[0] not in wanted:
                path.unlink(missing_ok=True)
        self._forget()
        return [record for record in self._jobs("WHERE state = 'offered' ORDER BY created", ())]

    def _take_up(self, path: Path, job: str, index: int) -> None:
        try:
            settings = asdict(images.read_settings(path).settings)
            width, height = images.open_image(path).size
        except (ImageError, OSError):
            return
        self._add_picture(
            Picture(
                id=path.stem,
                job=job,
                index=index,
                created=path.stat().st_mtime,
                width=width,
                height=height,
                settings=settings,
            )
        )

    def _forget(self) -> None:
        """Let the oldest jobs go that ended and left no picture."""
        self._db.execute(
            "DELETE FROM jobs WHERE state IN ('done', 'failed', 'cancelled') AND id NOT IN "
            "(SELECT job FROM pictures) AND id NOT IN "
            "(SELECT id FROM jobs ORDER BY created DESC LIMIT ?)",
            (KEPT_JOBS,),
        )

    # Pictures that jobs start from -----------------------------------------------------------

    def keep_input(self, job: str, name: str, picture: bytes | Path) -> None:
        """Keep a picture that a job starts from: while it waits, or its pictures are kept.

        One that is here already takes no room again: files of pictures never change.

        Raises:
            FileNotFoundError: its file is gone.
        """
        path = self.input_path(job, name)
        if isinstance(picture, Path):
            try:
                return os.link(picture, path)
            except FileNotFoundError:
                raise
            except OSError:  # a file system without links
                picture = picture.read_bytes()
        images.write_whole(path, picture)

    def input_path(self, job: str, name: str) -> Path:
        """Where a job's "image", "mask", "control-0" lies."""
        return self.inputs / f"{job}-{name}"

    def kept_input(self, name: str) -> Path | None:
        """The file of "<job>-image" and the like, where it is kept."""
        path = self.inputs / name
        return path if _INPUT.fullmatch(name) and path.is_file() else None

    def drop_inputs(self, job: str) -> None:
        """Remove what a job started from."""
        for path in self.inputs.glob(f"{job}-*"):
            path.unlink(missing_ok=True)

    def inputs_of(self, job: str, names: Sequence[str]) -> dict[str, str]:
        """The files of the pictures that a job starts from, by argument, as far as they are kept.

        They are asked for by their names: of many thousand files none is looked for.
        """
        paths = {name: self.input_path(job, name) for name in names}
        return {name: str(path.absolute()) for name, path in paths.items() if path.is_file()}

    # Pictures ----------------------------------------------------------------------------------

    def _add_picture(self, picture: Picture) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO pictures (id, job, place, created, width, height, settings) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                picture.id,
                picture.job,
                picture.index,
                picture.created,
                picture.width,
                picture.height,
                json.dumps(picture.settings),
            ),
        )

    def picture(self, picture: str) -> Picture | None:
        """One picture by its id."""
        found = self._pictures("WHERE id = ?", (picture,))
        return found[0] if found else None

    def pictures_of(self, job: str) -> list[Picture]:
        """A job's pictures in their order."""
        return self._pictures("WHERE job = ? ORDER BY place", (job,))

    def history(self, limit: int, before: int | None, words: str) -> list[Picture]:
        """Pictures with ``words`` in their settings, the newest first, below number ``before``."""
        words = json.dumps(words)[1:-1]  # as the settings are written: in ASCII, with escapes
        pattern = words.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
        return self._pictures(
            "WHERE number < ? AND settings LIKE ? ESCAPE '\\' ORDER BY number DESC LIMIT ?",
            (2**62 if before is None else before, f"%{pattern}%", limit),
        )

    def _pictures(self, where: str, values: Sequence[Any]) -> list[Picture]:
        return self._selected(Picture, "pictures", where, values)

    def picture_path(self, picture: Picture) -> Path:
        """The file of a picture that is in the history."""
        return self.pictures / f"{picture.id}.png"

    def thumbnail(self, picture: Picture) -> Path:
        """A small JPEG of a picture, made when it is first asked for."""
        path = self._thumbnail_path(picture)
        if not path.exists():
            image = images.open_image(self.picture_path(picture)).convert("RGB")
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=85)
            images.write_whole(path, buffer.getvalue())
        return path

    def _thumbnail_path(self, picture: Picture) -> Path:
        return self.thumbnails / f"{picture.id}.jpg"

    def remove_picture(self, picture: Picture) -> None:
        """Take a picture out of the history, and its file off the disk."""
        self.picture_path(picture).unlink(missing_ok=True)
        self._thumbnail_path(picture).unlink(missing_ok=True)
        self._db.execute("DELETE FROM pictures WHERE id = ?", (picture.id,))
        if not self.pictures_of(picture.job):
            self.drop_inputs(picture.job)

    # Presets and options -----------------------------------------------------------------------

    def presets(self) -> list[tuple[str, dict[str, Any], float]]:
        """Name, settings and time of change of each preset, by name."""
        rows = self._db.execute("SELECT name, draw, changed FROM presets ORDER BY name")
        return [(name, json.loads(draw), changed) for name, draw, changed in rows]

    def put_preset(self, name: str, draw: Mapping[str, Any], most: int) -> float | None:
        """Keep a preset; returns when, or None where ``most`` of other names are there already."""
        others = self._db.execute("SELECT count(*) FROM presets WHERE name != ?", (name,))
        if others.fetchone()[0] >= most:
            return None
        now = time.time()
        self._db.execute(
            "INSERT OR REPLACE INTO presets VALUES (?, ?, ?)", (name, json.dumps(dict(draw)), now)
        )
        return now

    def remove_preset(self, name: str) -> bool:
        """Take a preset away; False where there is none."""
        return self._db.execute("DELETE FROM presets WHERE name = ?", (name,)).rowcount > 0

    def options(self) -> dict[str, Any]:
        """All options that were set."""
        rows = self._db.execute("SELECT name, value FROM options")
        return {name: json.loads(value) for name, value in rows}

    def set_options(self, options: Mapping[str, Any]) -> None:
        """Keep options."""
        self._db.executemany(
            "INSERT OR REPLACE INTO options VALUES (?, ?)",
            [(name, json.dumps(value)) for name, value in options.items()],
        )
