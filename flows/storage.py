"""Photos and results in object storage, through fsspec: chunk by chunk into a local folder, and from there back.

The tasks know files only. A chunk's photos are fetched before it starts; its results are stored when it is done, its
part of the manifest last: that part says that all the rest is there. Pictures are whole or absent on both sides.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import pyarrow.parquet as pq

from flows.inputs import Chunk, Stamp, expand, photo_names, stamp
from rgcp_core.errors import RgcpError, UserError
from rgcp_core.images import PHOTO_SUFFIXES
from rgcp_core.manifest import PARTS

OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "adl", "oss", "memory"}
"""Where an object appears whole when its upload is over; elsewhere a file is uploaded beside its place and renamed."""
CHANGES = ("ETag", "etag", "md5Hash", "CRC", "mtime", "LastModified", "last_modified", "created")
"""What storages call the sign that a file is another one than before; the first that is given counts."""


def is_url(path: str) -> bool:
    """Whether fsspec is to read this: ``s3://bucket/folder``, ``zip://::file:///scans.zip``."""
    return "://" in path


class Place:
    """A folder in a storage."""

    def __init__(self, url: str) -> None:
        self.url = url
        with self.using():
            self.fs, root = fsspec.url_to_fs(url, use_listings_cache=False)  # a listing of 100,000 is not kept
        self.root = str(root).rstrip("/") or str(root)  # "/" of a file system, "" of an archive
        protocols = [self.fs.protocol] if isinstance(self.fs.protocol, str) else self.fs.protocol
        self.whole_at_once = not OBJECT_STORES.isdisjoint(protocols)

    @contextmanager
    def using(self) -> Iterator[None]:
        """Say of any trouble where it was."""
        try:
            yield
        except RgcpError:
            raise
        except ImportError as error:
            raise UserError(f"{self.url} needs a package that is not installed: {error}.") from error
        except ValueError as error:
            raise UserError(f"{self.url} is no address that fsspec knows: {error}.") from error
        except Exception as error:
            raise RgcpError(
                f"{self.url} cannot be used ({type(error).__name__}: {error}). Put that right and run the same command "
                "again."
            ) from error

    def files(self, folder: str = "") -> Iterator[dict[str, Any]]:
        """All files below a folder, sorted within each; hidden ones are left out, but for the folder itself."""
        path = self._path(folder)
        for entry in sorted(self.fs.ls(path, detail=True), key=lambda entry: str(entry["name"])):
            name = str(entry["name"]).rstrip("/")
            if name == path or PurePosixPath(name).name.startswith("."):  # S3 lists a folder's own mark in it
                continue
            below = name.removeprefix(self.root).lstrip("/")
            if entry["type"] == "directory":
                yield from self.files(below)
            else:
                yield {**entry, "name": below}

    def names(self, folder: str) -> list[str]:
        """Names of all files below a folder, which need not exist."""
        with self.using():
            try:
                return [entry["name"] for entry in self.files(folder)]
            except FileNotFoundError:
                return []

    def get(self, name: str, path: Path) -> None:
        """Fetch a file, whole or not at all; `FileNotFoundError` when it is gone."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        self.fs.get_file(self._path(name), str(temporary))
        temporary.replace(path)

    def put(self, path: Path, name: str) -> None:
        """Store a file, whole or not at all."""
        target = self._path(name)
        with self.using():
            if self.whole_at_once:
                self.fs.put_file(str(path), target)
                return
            self.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            self.fs.put_file(str(path), target + ".tmp")
            self.fs.mv(target + ".tmp", target)

    def remove(self, name: str) -> None:
        """Remove a file that is there."""
        with self.using():
            self.fs.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return "/".join(filter(None, (self.root.rstrip("/"), name))) if self.root != "/" else f"/{name}"


@dataclass
class Transfer:
    """Where a run reads and writes: local folders, and the storage that these stand for, if any.

    All methods do nothing where all is local.
    """

    paths: list[str]
    """What the run takes for its input."""
    out: str
    """What the run takes for its output."""
    source: Place | None = None
    target: Place | None = None
    _stamps: dict[str, Stamp] = field(default_factory=dict)
    _stored: set[str] = field(default_factory=set)

    def begin(self) -> None:
        """Drop photos of a run that was killed, and get the results of earlier runs that this machine lacks."""
        if self.source is not None:
            shutil.rmtree(self.paths[0], ignore_errors=True)
            Path(self.paths[0]).mkdir(parents=True, exist_ok=True)
        if self.target is not None:
            self._stored = {PurePosixPath(name).stem for name in self.target.names(PARTS)}
            for key in sorted(self._stored):
                self._get_part(self.target, key)

    def count(self, base: Path) -> int:
        """How many photos there are."""
        if self.source is None:
            return sum(1 for _ in photo_names(base, expand(self.paths)))
        return sum(1 for _ in _photos(self.source))

    def names(self, base: Path) -> Iterator[str]:
        """Names of all photos, each once."""
        if self.source is None:
            yield from photo_names(base, expand(self.paths))
            return
        for entry in _photos(self.source):
            changed = next((str(entry[key]) for key in CHANGES if entry.get(key) is not None), "")
            self._stamps[entry["name"]] = (int(entry.get("size") or 0), changed)
            yield entry["name"]

    def stamp(self, photo: Path, name: str) -> Stamp:
        """Size and sign of change of a photo, once for each that `names` gave."""
        return stamp(photo) if self.source is None else self._stamps.pop(name)

    def fetch(self, chunk: Chunk) -> None:
        """Get the photos of a chunk that is to be done; one that is gone meanwhile is simply not there."""
        if self.target is not None and chunk.key in self._stored:  # of a chunk that had failures: no longer true
            self.target.remove(_part(chunk.key))
            self._stored.remove(chunk.key)
        if self.source is None:
            return
        with self.source.using():
            for name in chunk.photos:
                with suppress(FileNotFoundError):
                    self.source.get(name, Path(self.paths[0], name))

    def store(self, chunk: Chunk) -> None:
        """Store the results of a chunk that is done, unless they are there, and drop its photos."""
        if self.target is not None and chunk.key not in self._stored:
            out = Path(self.out)
            rows = pq.read_table(out / _part(chunk.key), columns=["output", "unit"])
            photos = [out / name for name in rows["output"].to_pylist() if name]
            faces = [path for unit in rows["unit"].to_pylist() if unit for path in (out / "faces" / unit).rglob("*")]
            for path in dict.fromkeys([*photos, *sorted(faces)]):
                if path.is_file() and path.suffix != ".tmp":
                    self.target.put(path, path.relative_to(out).as_posix())
            self.target.put(out / _part(chunk.key), _part(chunk.key))
            self._stored.add(chunk.key)
        if self.source is not None:
            for name in chunk.photos:
                Path(self.paths[0], name).unlink(missing_ok=True)

    def finish(self, keys: set[str]) -> None:
        """Store what speaks of the run as a whole, and remove the parts of other photos and settings."""
        if self.target is None:
            return
        for path in sorted(Path(self.out).iterdir()):  # the tables, the report, run.json
            if path.is_file():
                self.target.put(path, path.name)
        for key in self._stored - keys:
            self.target.remove(_part(key))

    def _get_part(self, target: Place, key: str) -> None:
        """Get a part of the manifest and the faces that it speaks of, which the report shows; the part last."""
        out = Path(self.out)
        part = out / _part(key)
        if part.exists():
            return
        coming = part.with_name(f"{key}.tmp")
        with target.using():
            target.get(_part(key), coming)
            for unit in pq.read_table(coming, columns=["unit"])["unit"].to_pylist():
                for name in target.names(f"faces/{unit}") if unit else ():
                    target.get(name, out / name)
            coming.replace(part)


def find_storage(paths: Sequence[str], out: str, work: str | None) -> Transfer:
    """Local folders for a run whose input or output may be an address.

    Args:
        paths: local folders and files, or one address.
        out: local folder or address.
        work: local folder for what is under way, needed where there is an address; results stay in it as well.

    Raises:
        UserError: no folder to work in, several addresses, an output inside the input, an address that is none, or
            where nothing is.
        RgcpError: the storage does not answer, or refuses.
    """
    urls = [path for path in paths if is_url(path)]
    if not urls and not is_url(out):
        return Transfer(list(paths), out)
    if work is None:
        raise UserError(f"{urls[0] if urls else out} needs a local folder to work in: name one with --work DIR.")
    if urls and len(paths) > 1:
        raise UserError("Only one address can be restored at a time, and nothing else beside it.")
    transfer = Transfer(list(paths), out)
    folder = Path(work).absolute()
    if urls:
        transfer.source, transfer.paths = Place(urls[0]), [str(folder / "in")]
        (folder / "in").mkdir(parents=True, exist_ok=True)
    if is_url(out):
        transfer.target, transfer.out = Place(out), str(folder / "out")
    source, target = transfer.source, transfer.target
    if source is not None and target is not None and type(source.fs) is type(target.fs):
        a, b = f"{source.root}/", f"{target.root}/"
        if a.startswith(b) or b.startswith(a):
            raise UserError(f"{out} and {urls[0]} lie inside each other. Choose another output.")
    if source is not None:
        with source.using():
            if not source.fs.isdir(source.root):
                raise UserError(f"There is no folder {source.url}.")
    return transfer


def _photos(source: Place) -> Iterator[dict[str, Any]]:
    with source.using():
        for entry in source.files():
            if PurePosixPath(entry["name"]).suffix.lower() in PHOTO_SUFFIXES:
                yield entry


def _part(key: str) -> str:
    return f"{PARTS}/{key}.parquet"
