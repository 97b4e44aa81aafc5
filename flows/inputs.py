"""The photos of a run: a stream of names, cut into chunks that stay what they are when photos come and go."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, NamedTuple

from rgcp_core.errors import UserError
from rgcp_core.images import find_photos
from rgcp_core.prior import Card
from tasks.align import boxes_of
from tasks.device import pick_device
from tasks.job import Job
from tasks.units import stage_key


class Chunk(NamedTuple):
    """Photos that are done together: one run of each task."""

    key: str
    photos: list[str]
    bytes: int

    @property
    def label(self) -> str:
        """What the chunk is called in the UI."""
        more = f" and {len(self.photos) - 1} more" if len(self.photos) > 1 else ""
        return os.fsencode(self.photos[0]).decode("utf-8", "backslashreplace") + more


def expand(paths: Sequence[str]) -> list[Path]:
    """Absolute paths; ``@FILE`` stands for the lines of a file (a flow's parameters cannot hold 20,000 paths)."""
    expanded: list[Path] = []
    for path in paths:
        if path.startswith("@"):
            try:
                lines = Path(path[1:]).read_text(encoding="utf-8").splitlines()
            except OSError as error:
                raise UserError(f"The list {path[1:]} cannot be read: {error.strerror}.") from error
            expanded += [Path(line).absolute() for line in lines if line]
        else:
            expanded.append(Path(path).absolute())
    if not expanded:
        raise UserError("No photos were given: name folders or files.")
    return expanded


def base_folder(inputs: Sequence[Path]) -> Path:
    """Folder that the photos' names are relative to: the one folder given, else what all have in common."""
    folders = [path if path.is_dir() else path.parent for path in inputs]
    return Path(os.path.commonpath(folders))


def photo_names(base: Path, inputs: Sequence[Path]) -> Iterator[str]:
    """Names of all photos below ``base``, each once."""
    names = (_relative(os.path.join(root, name), base) for root, name in find_photos(inputs))
    if len(inputs) == 1:  # a folder does not hold a name twice: nothing to remember
        yield from names
        return
    seen: set[str] = set()
    for name in names:
        if name not in seen:
            seen.add(name)
            yield name


def _relative(path: str, base: Path) -> str:
    return os.path.relpath(path, base).replace(os.sep, "/")


def default_chunk(job: Job) -> int:
    """Photos a chunk: few on a CPU, where a face takes a minute and a kill may cost a chunk; more on an accelerator."""
    return 4 if pick_device(job.device).type == "cpu" else 16


Stamp = tuple[int, int | str]
"""Size and time of change of a file, or what else tells that it is another one."""


def chunks(
    job: Job,
    card: Card,
    names: Iterable[str],
    size: int,
    stamp_of: Callable[[Path, str], Stamp] = lambda path, _: stamp(path),
) -> Iterator[Chunk]:
    """Cut the stream of photos into chunks of about ``size``, at most twice as many.

    Where a chunk ends depends on the photos' own names: a new photo changes the chunk that it falls into, not all
    that follow. A chunk's key changes with its photos, the settings and the prior.
    """
    photos: list[str] = []
    for name in names:
        photos.append(name)
        if ends_a_chunk(name, size) or len(photos) == 2 * size:
            yield _chunk(job, card, photos, stamp_of)
            photos = []
    if photos:
        yield _chunk(job, card, photos, stamp_of)


def ends_a_chunk(name: str, size: int) -> bool:
    """One name in ``size``, whatever the names are like."""
    return int.from_bytes(blake2b(os.fsencode(name), digest_size=8).digest()) % size == 0


def _chunk(job: Job, card: Card, photos: list[str], stamp_of: Callable[[Path, str], Stamp]) -> Chunk:
    stamps = [(name, *stamp_of(job.base / name, name)) for name in photos]
    decisive: list[Any] = [stamps, job.settings.digest(), card.sha256, job.framing, *(["stub"] if job.stub else [])]
    if job.framing == "boxes":
        decisive.append([boxes_of(job, name) for name in photos])
    if job.person is not None:
        decisive.append(["person", job.person, job.people_sha256])
    return Chunk(stage_key("chunk", *decisive), photos, sum(size for _, size, _ in stamps))


def fingerprint(base: Path, inputs: Sequence[Path]) -> str:
    """Changes when a photo comes, goes or is written anew."""
    digest = sha256()
    for name in photo_names(base, inputs):
        digest.update(repr((name, *stamp(base / name))).encode())
    return digest.hexdigest()


def stamp(path: Path) -> Stamp:
    """Size and time of change of a file: enough to see that it is another one without reading it."""
    try:
        status = path.stat()
    except OSError:
        return (0, 0)
    return (status.st_size, status.st_mtime_ns)
