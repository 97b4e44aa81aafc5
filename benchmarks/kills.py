"""Kill a run again and again at random moments; it must end as if nothing had happened.

    python benchmarks/kills.py --photos 60 --kills 20                     the run's process, SIGKILL
    python benchmarks/kills.py --photos 60 --kills 20 --signal TERM       the same with SIGTERM
    python benchmarks/kills.py --photos 60 --kills 5 --runner dask        a Dask worker of the running run, SIGKILL

A tiny prior with random weights restores portraits, once undisturbed and once killed and started again (a killed worker
needs no new start). At the end: the same bytes, the same manifest (times aside), at most one chunk done again a kill,
no file half written, no process left. Exits with 1 where one of these does not hold.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import psutil
import torch
from PIL import Image
from skimage.data import astronaut

from flows.server import free_port, start_server, stop_server, wait_until_healthy
from rgcp_core.manifest import read_manifest
from rgcp_core.prior import Card, Prior, ScheduleConfig
from rgcp_core.unet import UNet, UNetConfig

RUN = """
import json, sys
from pathlib import Path
from rich.console import Console
from flows.run import run_archive
run_archive(**json.loads(sys.argv[1]), out=Path(sys.argv[2]), console=Console(stderr=True))
"""
TIMES = ["run_id", "started_at", "finished_at", "peak_memory_bytes", "code_version"]  # and seconds_*


def main() -> None:
    """Run the comparison and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=60)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--chunk", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=4, help="fine-tuning steps: how long a face takes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    parser.add_argument("--runner", choices=("local", "dask"), default="local")
    arguments = parser.parse_args()
    random.seed(arguments.seed)

    with tempfile.TemporaryDirectory(prefix="rgcp-kills-") as temporary:
        folder = Path(temporary)
        os.environ.setdefault("PREFECT_HOME", str(folder / "prefect"))
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        server = None
        if "PREFECT_API_URL" not in os.environ:
            port = free_port()
            os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
            server = start_server(port)
            wait_until_healthy(os.environ["PREFECT_API_URL"], server)
        try:
            result = compare(folder, arguments)
        finally:
            if server is not None:
                stop_server(server)
    print(json.dumps(result, indent=1))
    sys.exit(0 if result["holds"] else 1)


def compare(folder: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """The undisturbed run, the disturbed one, and what they have in common."""
    write_tiny_prior(folder / "tiny")
    write_portraits(folder / "in", arguments.photos)
    call = {
        "paths": [str(folder / "in")],
        "prior": str(folder / "tiny"),
        "preset": "fast",
        "chunk": arguments.chunk,
        "runner": arguments.runner,
        "workers": 2 if arguments.runner == "dask" else 1,
        "settings": {
            "album": {"size": 2, "steps": 4},
            "constrain": {"iterations": arguments.iterations},
            "faces": {"detector": "offline", "max_enlargement": 20},
        },
    }
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    run = start(call, undisturbed)
    begin = wait_for_work(run, undisturbed)
    code = run.wait()
    work_seconds = time.monotonic() - begin
    if code != 0:
        raise SystemExit(f"The undisturbed run ended with {code}.")

    disturb = kill_workers if arguments.runner == "dask" else kill_runs
    kills, redone_faces, redone_parts, left_over = disturb(call, killed, arguments, work_seconds)

    pictures = contents(killed / "photos") == contents(undisturbed / "photos")
    a, b = (read_manifest(out) for out in (killed, undisturbed))
    columns = [name for name in a.columns if name not in TIMES and not name.startswith("seconds_")]
    try:
        pd.testing.assert_frame_equal(a[columns], b[columns])
        same_manifest = True
    except AssertionError as error:
        print(error, file=sys.stderr)
        same_manifest = False
    unfinished = [str(path) for path in killed.rglob("*.tmp")]
    result: dict[str, object] = {
        "photos": arguments.photos,
        "faces_restored": int((b.status == "restored").sum()),
        "signal": arguments.signal,
        "runner": arguments.runner,
        "kills": kills,
        "work_seconds_undisturbed": round(work_seconds, 1),
        "same_bytes": pictures,
        "same_manifest": same_manifest,
        "finished_faces_done_again": redone_faces,
        "finished_chunks_done_again": redone_parts,
        "unfinished_files": unfinished,
        "processes_left": left_over,
    }
    most = 2 * arguments.chunk * kills
    result["holds"] = (
        pictures and same_manifest and not unfinished and not left_over and redone_faces <= most and redone_parts == 0
    )
    return result


def kill_runs(
    call: dict[str, object], out: Path, arguments: argparse.Namespace, work_seconds: float
) -> tuple[int, int, int, list[str]]:
    """Start, kill, start again; return kills, finished faces and chunks that were done again, processes left."""
    kills, left_over = 0, []
    faces: dict[Path, int] = {}
    parts: dict[Path, int] = {}
    while True:
        run = start(call, out)
        wait_for_work(run, out)
        if kills < arguments.kills:
            goal = count(out) + random.uniform(0, arguments.photos / (arguments.kills + 1))
            while count(out) < int(goal) and run.poll() is None:
                time.sleep(0.01)
            time.sleep(random.uniform(0, work_seconds / arguments.photos))
            children = psutil.Process(run.pid).children(recursive=True) if run.poll() is None else []
            if run.poll() is None:
                run.send_signal(signal.SIGKILL if arguments.signal == "KILL" else signal.SIGTERM)
                code = run.wait()
                kills += 1
                if arguments.signal == "TERM" and code != 128 + signal.SIGTERM:
                    raise SystemExit(f"A run that got SIGTERM ended with {code}.")
                _, alive = psutil.wait_procs(children, timeout=20)
                left_over += [" ".join(process.cmdline()) for process in alive]
        code = run.wait()
        faces |= stamps(out.glob("faces/*/restored.png"), faces)
        parts |= stamps(out.glob(".rgcp/parts/*.parquet"), parts)
        if code == 0:
            break
    redone_faces = sum(path.stat().st_mtime_ns != stamp for path, stamp in faces.items())
    redone_parts = sum(path.stat().st_mtime_ns != stamp for path, stamp in parts.items())
    return kills, redone_faces, redone_parts, left_over


def kill_workers(
    call: dict[str, object], out: Path, arguments: argparse.Namespace, work_seconds: float
) -> tuple[int, int, int, list[str]]:
    """Kill workers of one run while it goes on; return the same as `kill_runs`."""
    run = start(call, out)
    begin = wait_for_work(run, out)
    own = psutil.Process(run.pid)
    moments = sorted(random.uniform(0, 0.8 * work_seconds) for _ in range(arguments.kills))
    kills = 0
    faces: dict[Path, int] = {}
    children = []
    for moment in moments:
        while time.monotonic() < begin + moment and run.poll() is None:
            time.sleep(0.01)
        workers = []
        while not workers and run.poll() is None:  # a killed one needs seconds to come back
            children = own.children(recursive=True)
            workers = [child for child in children if is_worker(child)]
        if run.poll() is not None:
            break
        faces |= stamps(out.glob("faces/*/restored.png"), faces)
        random.choice(workers).kill()
        kills += 1
    while run.poll() is None:
        children = own.children(recursive=True) or children
        time.sleep(0.5)
    if run.returncode != 0:
        raise SystemExit(f"The run whose workers were killed ended with {run.returncode}.")
    _, alive = psutil.wait_procs(children, timeout=20)
    redone = sum(path.stat().st_mtime_ns != stamp for path, stamp in faces.items())
    return kills, redone, 0, [" ".join(process.cmdline()) for process in alive]


def count(out: Path) -> int:
    """Faces restored so far."""
    return sum(1 for _ in out.glob("faces/*/restored.png"))


def is_worker(process: psutil.Process) -> bool:
    """Whether this is a spawned worker of the cluster."""
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def start(call: dict[str, object], out: Path) -> subprocess.Popen[bytes]:
    """Start a run in a process of its own."""
    return subprocess.Popen([sys.executable, "-c", RUN, json.dumps(call), str(out)], stderr=subprocess.DEVNULL)


def wait_for_work(run: subprocess.Popen[bytes], out: Path) -> float:
    """Wait until the run has the folder; return when that was."""
    note = out / ".rgcp" / "running.json"
    while run.poll() is None:
        try:
            if json.loads(note.read_text())["pid"] == run.pid:
                break
        except (OSError, ValueError):
            pass
        time.sleep(0.01)
    return time.monotonic()


def stamps(paths: object, known: dict[Path, int]) -> dict[Path, int]:
    """When each file that is not known yet was written."""
    return {path: path.stat().st_mtime_ns for path in paths if path not in known}  # type: ignore[attr-defined]


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_tiny_prior(folder: Path) -> None:
    """A network of 16 px with random weights: it restores nothing, but all the code runs."""
    torch.manual_seed(0)
    architecture = UNetConfig(
        image_size=16, model_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=(8,),
        num_head_channels=32, dropout=0.0,
    )  # fmt: skip
    card = Card(
        name="tiny", architecture=architecture, schedule=ScheduleConfig(), crop_window=(0.195, 0.285, 0.835, 0.925),
        sha256="", licence="none", source="random weights",
    )  # fmt: skip
    Prior.from_state_dict(UNet(architecture).state_dict(), card).save(folder)


def write_portraits(folder: Path, count: int) -> None:
    """Portraits of different sizes (NASA's of Eileen Collins, public domain)."""
    folder.mkdir()
    picture = Image.fromarray(astronaut())
    for i in range(count):
        size = 160 + 2 * i
        picture.resize((size, size), Image.Resampling.LANCZOS).save(folder / f"{i:03d}.jpg", quality=90)


if __name__ == "__main__":
    main()
