"""What the orchestrator costs a chunk: a load test with ``--device stub``, which runs everything but the network.

    python benchmarks/overhead.py --photos 200 --chunk 4

Prints the seconds of wall clock and of processor time a chunk, and their share of faces that take --face-seconds.
Aligned crops of 64 px are used: finding faces is the work itself, not the cost of organising it.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from flows.inputs import chunks, photo_names
from flows.run import prepare, run_archive


def main() -> None:
    """Run the load test and print what it cost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=200)
    parser.add_argument("--chunk", type=int, default=4)
    parser.add_argument("--prior", default="faces64")
    parser.add_argument("--face-seconds", type=float, default=40.0, help="a face of the preset fast on a CPU")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rgcp-overhead-") as temporary:
        folder = Path(temporary)
        os.environ.setdefault("PREFECT_HOME", str(folder / "prefect"))
        source = folder / "in"
        source.mkdir()
        random = np.random.default_rng(0)
        for i in range(arguments.photos + 1):
            picture = random.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(picture).save(source / f"{i:06d}.png")
        options = {"prior": arguments.prior, "preset": "fast", "framing": "window", "device": "stub"}
        console = Console(quiet=True)
        warm_up = source / f"{arguments.photos:06d}.png"
        run_archive([str(warm_up)], folder / "warm", console, **options)  # imports, the server's first start
        warm_up.unlink()
        job, card = prepare([str(source)], str(folder / "out"), **options)
        number = sum(1 for _ in chunks(job, card, photo_names(job.base, [source]), arguments.chunk))

        wall, processor = time.perf_counter(), cpu_seconds()
        run_archive([str(source)], folder / "out", console, chunk=arguments.chunk, **options)
        wall, processor = time.perf_counter() - wall, cpu_seconds() - processor
    faces_a_chunk = arguments.photos / number
    print(
        json.dumps(
            {
                "photos": arguments.photos,
                "chunks": number,
                "wall_seconds_a_chunk": round(wall / number, 3),
                "processor_seconds_a_chunk": round(processor / number, 3),
                "share_of_wall": round(wall / number / (faces_a_chunk * arguments.face_seconds), 4),
                "share_of_processor": round(processor / number / (faces_a_chunk * arguments.face_seconds), 4),
                "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            },
            indent=1,
        )
    )


def cpu_seconds() -> float:
    """Processor time of this process and of those it waited for."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


if __name__ == "__main__":
    main()
