"""Importing and exporting weights.

``golden/guided_diffusion.json`` holds parameter names and shapes and some outputs of the real guided-diffusion U-Net
(github.com/openai/guided-diffusion, two small architectures), with the weights of `formula_weights`.
"""

import hashlib
import http.server
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rgcp_core.checkpoints import export_guided_diffusion, import_prior, read_state_dict
from rgcp_core.errors import UserError
from rgcp_core.prior import Prior
from rgcp_core.pull import PINS_FILE, PublicPrior, pull_prior

ROOT = Path(__file__).parents[2]
SEED = ROOT / "../shared/priors/faces64-seed.pt"
FACTS = {"licence": "for tests", "source": "a formula"}


def formula_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Weights that need no random generator, scaled by the root of their fan-in."""
    weights = {}
    for i, (key, shape) in enumerate(shapes.items()):
        count = torch.Size(shape).numel()
        wave = torch.cos(torch.arange(count, dtype=torch.float64) * (0.7 + 0.01 * i) + i)
        weights[key] = (wave / (count / shape[0]) ** 0.5).float().reshape(*shape)
    return weights


def formula_input(size: int) -> tuple[Tensor, Tensor]:
    """(2,3,S,S) and two times."""
    x = torch.sin(torch.arange(2 * 3 * size * size, dtype=torch.float64) * 0.37).float()
    return x.reshape(2, 3, size, size), torch.tensor([3, 700])


def golden(name: str) -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "golden" / "guided_diffusion.json").read_text())[name]


@pytest.fixture(params=["updown", "conv"])
def reference(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """What the real guided-diffusion answered, and a checkpoint file with its keys."""
    known = golden(request.param)
    torch.save(formula_weights(known["shapes"]), tmp_path / "foreign.pt")
    return known, tmp_path / "foreign.pt"


def told(known: dict[str, Any]) -> dict[str, Any]:
    """Only what weights cannot say."""
    names = ("image_size", "num_head_channels", "use_new_attention_order")
    return {**FACTS, "architecture": {name: known["architecture"][name] for name in names}}


def test_guided_diffusion_weights_give_its_numbers(reference: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    known, path = reference
    card = import_prior(path, tmp_path / "prior", told(known))
    for name, value in known["architecture"].items():
        read = getattr(card.architecture, name)
        assert read == (tuple(value) if isinstance(value, list) else value), name
    prior = Prior.load(tmp_path / "prior")
    x, t = formula_input(known["architecture"]["image_size"])
    with torch.no_grad():
        output = prior.network(x, t)
    expected = torch.tensor(known["output"])
    found = output.flatten()[::37]
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert float(output.norm()) == pytest.approx(known["norm"], rel=1e-5)


def test_export_returns_the_same_keys_and_values(reference: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    known, path = reference
    import_prior(path, tmp_path / "prior", told(known))
    export_guided_diffusion(Prior.load(tmp_path / "prior"), tmp_path / "again.pt")
    before, after = torch.load(path, weights_only=True), torch.load(tmp_path / "again.pt", weights_only=True)
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    card = import_prior(tmp_path / "again.pt", tmp_path / "second", {})  # the JSON beside it says the rest
    assert card.architecture == Prior.load(tmp_path / "prior").card.architecture


@pytest.mark.parametrize(
    "wrap", [lambda s: {"ema": s}, lambda s: {"state_dict": {f"module.{key}": s[key] for key in s}}]
)
def test_wrapped_state_dicts_are_unwrapped(wrap: Any, tmp_path: Path) -> None:
    state = {"a.weight": torch.ones(2)}
    torch.save(wrap(state), tmp_path / "w.pt")
    assert list(read_state_dict(tmp_path / "w.pt")) == ["a.weight"]


def edited(path: Path, change: Any) -> Path:
    state = dict(torch.load(path, weights_only=True))
    change(state)
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("middle_block.1.qkv.bias"), "middle_block.1.qkv.bias"),
        (lambda s: s.update({"label_emb.weight": torch.ones(3, 3)}), "label_emb.weight"),
        (lambda s: s.update({"out.2.bias": torch.ones(5)}), "out.2.bias"),
    ],
)
def test_what_cannot_be_mapped_is_refused_by_its_key(change: Any, says: str, tmp_path: Path) -> None:
    known = golden("updown")
    torch.save(formula_weights(known["shapes"]), tmp_path / "foreign.pt")
    edited(tmp_path / "foreign.pt", change)
    with pytest.raises(UserError, match=says):
        import_prior(tmp_path / "foreign.pt", tmp_path / "prior", told(known))
    assert not (tmp_path / "prior").exists()


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"architecture": {"image_size": 16}}, "num_head_channels"),
        ({"architecture": {"image_size": 16, "num_head_channels": 16, "num_res_blocks": 3}}, "num_res_blocks"),
        ({"architecture": {"image_size": 16, "num_head_channels": 16}, "licence": None}, "licence"),
        ({"architecture": {"image_size": 16, "num_head_channels": 16}, "schedule": {"kind": "cosine"}}, "cosine"),
        ({"architecture": {"image_size": 16, "num_head_channels": 16}, "sha256": "0" * 64}, "sha256"),
    ],
)
def test_missing_or_contradicting_facts_are_refused(facts: dict[str, Any], says: str, tmp_path: Path) -> None:
    torch.save(formula_weights(golden("updown")["shapes"]), tmp_path / "foreign.pt")
    with pytest.raises(UserError, match=says):
        import_prior(tmp_path / "foreign.pt", tmp_path / "prior", {**FACTS, **facts})
    assert not (tmp_path / "prior").exists()


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (os.environ["RGCP_TEST_MARK"],))


def test_code_in_a_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RGCP_TEST_MARK", str(tmp_path / "ran"))
    torch.save({"time_embed.0.weight": Malicious()}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"a": Malicious()}))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(UserError, match="without running code"):
            read_state_dict(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"])
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_damaged_files_are_refused(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError):
        read_state_dict(tmp_path / name)


def test_a_full_size_network_imports_in_bounded_memory(tmp_path: Path) -> None:
    """131.7 M parameters of the paper's 256 px network: the peak stays near one copy of the file."""
    from rgcp_core.unet import UNet, UNetConfig

    with torch.device("meta"):
        shapes = {key: value.shape for key, value in UNet(UNetConfig()).state_dict().items()}
    torch.save({key: torch.empty(shape, dtype=torch.float16) for key, shape in shapes.items()}, tmp_path / "full.pt")
    code = """if True:
        import resource, sys
        from pathlib import Path
        from rgcp_core.checkpoints import import_prior
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        before = peak()
        facts = {"licence": "x", "source": "y", "architecture": {"image_size": 256, "num_head_channels": 128}}
        card = import_prior(Path(sys.argv[1]), Path(sys.argv[2]), facts)
        print(peak() - before, card.architecture.num_res_blocks)
    """
    arguments = [sys.executable, "-c", code, str(tmp_path / "full.pt"), str(tmp_path / "prior")]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    grown, blocks = map(int, result.stdout.split())
    size = (tmp_path / "full.pt").stat().st_size // 2**20
    assert blocks == 2
    assert grown < 1.5 * size, f"{grown} MiB for a file of {size} MiB"


@pytest.mark.skipif(not SEED.is_file(), reason="needs ../shared/priors")
def test_the_seed_imports_with_its_own_json(tmp_path: Path) -> None:
    described = json.loads(SEED.with_suffix(".json").read_text())
    card = import_prior(SEED, tmp_path / "seed", {"source": "shared"})
    for name in ("model_channels", "num_res_blocks", "resblock_updown", "use_scale_shift_norm"):
        assert getattr(card.architecture, name) == described["architecture"][name]
    assert list(card.crop_window) == described["crop_window"]
    parameters = sum(value.numel() for value in Prior.load(tmp_path / "seed").network.state_dict().values())
    assert parameters == described["parameters"]


# ---------------------------------------------------------------------------------------------------- diffusers

DDPM = {  # as the published DDPM folders: every difference to guided-diffusion's network at once
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "attention_head_dim": None,
}


@pytest.mark.parametrize("options", [DDPM, {}], ids=["ddpm", "defaults"])
def test_diffusers_folders_give_diffusers_numbers(options: dict[str, Any], tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="the check against diffusers needs diffusers")
    attention = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    model = diffusers.UNet2DModel(
        sample_size=32, block_out_channels=(32, 64, 64), down_block_types=attention[0], up_block_types=attention[1],
        norm_num_groups=32, **options,
    ).eval()  # fmt: skip
    model.load_state_dict(formula_weights({key: value.shape for key, value in model.state_dict().items()}))
    model.save_pretrained(tmp_path / "hub" / "unet")
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "hub" / "scheduler")
    import_prior(tmp_path / "hub", tmp_path / "prior", FACTS)
    x, t = formula_input(32)
    with torch.no_grad():
        expected = model(x, t).sample
        output = Prior.load(tmp_path / "prior").network(x, t)
    assert float((output - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("time_embedding_type", "fourier"),
        ("norm_num_groups", 16),
        ("down_block_types", ["DownBlock2D", "SkipDownBlock2D"]),
        ("up_block_types", ["AttnUpBlock2D", "UpBlock2D"]),
        ("class_embed_type", "timestep"),
        ("a_new_option", True),
    ],
)
def test_diffusers_options_that_cannot_be_mapped_are_named(entry: str, value: Any, tmp_path: Path) -> None:
    config = {
        "_class_name": "UNet2DModel",
        "sample_size": 16,
        "block_out_channels": [32, 32],
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config | {entry: value}))
    name = "SkipDownBlock2D" if entry == "down_block_types" else entry
    with pytest.raises(UserError, match=name):
        import_prior(tmp_path, tmp_path / "prior", FACTS)
    assert not (tmp_path / "prior").exists()


# --------------------------------------------------------------------------------------------------------- pull


class Server(http.server.ThreadingHTTPServer):
    """Serves one file with ranges; the first answer may break off."""

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.break_after, self.ranges = content, len(content), list[str | None]()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/base.pt"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        content, tag = self.server.content, f'"{hashlib.sha256(self.server.content).hexdigest()}"'
        wanted = self.headers.get("Range")
        self.server.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if self.headers.get("If-Range") != tag:
            start = 0
        self.send_response(206 if start else 200)
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : start + self.server.break_after])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    torch.save(formula_weights(golden("updown")["shapes"]), tmp_path / "served.pt")
    served = Server((tmp_path / "served.pt").read_bytes())
    yield served
    served.shutdown()


def public(server: Server, sha256: str | None = None) -> dict[str, PublicPrior]:
    facts = {"architecture": {"image_size": 16, "num_head_channels": 16}}
    return {"tiny": PublicPrior("tiny", server.url, "for tests", "a test", sha256, facts)}


def test_pull_continues_an_interrupted_download(server: Server, tmp_path: Path) -> None:
    server.break_after = 50_000
    with pytest.raises(UserError, match="goes on"):
        pull_prior("tiny", tmp_path / "mine", accept_licence=True, public=public(server))
    server.break_after = len(server.content)
    card = pull_prior("tiny", tmp_path / "mine", accept_licence=True, public=public(server))
    assert server.ranges == [None, "bytes=50000-"]
    assert Prior.load(tmp_path / "mine" / "tiny").card == card
    assert json.loads((tmp_path / "mine" / PINS_FILE).read_text()) == {
        server.url: hashlib.sha256(server.content).hexdigest()
    }
    assert sorted(path.name for path in (tmp_path / "mine").iterdir() if path.suffix != ".lock") == [PINS_FILE, "tiny"]


def test_pull_starts_over_when_the_file_changed_meanwhile(server: Server, tmp_path: Path) -> None:
    whole, server.content = server.content, b"x" * 200_000
    server.break_after = 50_000
    with pytest.raises(UserError, match="goes on"):
        pull_prior("tiny", tmp_path, accept_licence=True, public=public(server))
    server.content, server.break_after = whole, len(whole)
    assert pull_prior("tiny", tmp_path, accept_licence=True, public=public(server)).name == "tiny"


def test_pull_refuses_another_file_than_the_pinned_one(server: Server, tmp_path: Path) -> None:
    pull_prior("tiny", tmp_path, accept_licence=True, public=public(server))
    before = (tmp_path / "tiny" / "card.json").read_bytes()
    server.content += b"tampered"
    server.break_after = len(server.content)
    with pytest.raises(UserError, match="deleted"):
        pull_prior("tiny", tmp_path, accept_licence=True, public=public(server))
    assert (tmp_path / "tiny" / "card.json").read_bytes() == before
    assert not (tmp_path / ".tiny.pt").exists()


def test_pull_refuses_another_file_than_the_published_sum(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sha256"):
        pull_prior("tiny", tmp_path, accept_licence=True, public=public(server, "0" * 64))
    assert not (tmp_path / "tiny").exists()


def test_pull_needs_the_licence_accepted_before_it_connects(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="for tests"):
        pull_prior("tiny", tmp_path, accept_licence=False, public=public(server))
    assert server.ranges == []
