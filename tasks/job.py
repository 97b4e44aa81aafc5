"""What every task of a run is told, and how a run's folder is laid out.

DIR/photos/<path>              restored photos
DIR/faces/<unit>/              input.png, restored.png, album/NN.png, variance.png, record.json
DIR/manifest.parquet, report.html, run.json
DIR/.rgcp/                     lock, parts of the manifest, constrained weights while they are needed
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from rgcp_core.settings import Settings

Framing = Literal["photos", "window", "ffhq", "centre", "boxes"]
Keep = Literal["none", "albums", "all"]


class Job(BaseModel):
    """One run: its folder and all that decides its pixels. Small, and the same for every task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str = Field(description="Name of this execution.")
    base: Path = Field(description="Folder that the photos' names are relative to.")
    out: Path = Field(description="The run's folder.")
    prior: str = Field(description="Name or folder of the prior.")
    settings: Settings = Field(description="Settings at the prior's size.")
    framing: Framing = Field(
        default="photos",
        description="photos: find the faces. window: crops framed as the prior's own pictures. ffhq: FFHQ squares. "
        "centre: the middle square of a photo, whatever it shows. boxes: the squares that a table names.",
    )
    boxes: Path | None = Field(default=None, description="The table for the framing boxes.")
    person: str | None = Field(
        default=None, description="Known person whose faces get the personal prior; auto: anybody known; none: nobody."
    )
    people: Path | None = Field(default=None, description="Folder of people, where there is a person.")
    people_sha256: str | None = Field(default=None, description="Of all people that faces are compared with.")
    keep: Keep = Field(default="albums", description="Which intermediate results stay on disk.")
    device: str = Field(
        default="auto", description="auto, cpu, cuda, cuda:1 ...; stub restores nothing: for load tests."
    )
    code_version: str = Field(description="Version and git revision, for the manifest.")

    @property
    def stub(self) -> bool:
        """Whether this is a load test: all but the network runs, and the manifest says so."""
        return self.device == "stub"

    @property
    def shows_faces(self) -> bool:
        """Whether the pictures are faces; the identity of anything else is not measured."""
        return self.framing not in ("centre", "boxes")

    def unit_dir(self, unit: str) -> Path:
        """Folder of one face."""
        return self.out / "faces" / unit

    def delta_file(self, unit: str) -> Path:
        """The face's constrained prior, where it is kept (``keep: all``); see `rgcp_core.delta`."""
        return self.unit_dir(unit) / "constrained.delta"

    def weights_file(self, unit: str) -> Path:
        """Where a face's constrained weights wait for its restoration."""
        return self.out / ".rgcp" / "work" / f"{unit}.safetensors"
