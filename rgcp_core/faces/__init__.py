"""Faces in photographs: find them, cut them out as the prior knows them, put them back."""

from .align import Alignment, align_face, crop_face
from .detect import Detector, Face, gate_faces, load_detector
from .paste import paste_face

__all__ = [
    "Alignment",
    "Detector",
    "Face",
    "align_face",
    "crop_face",
    "gate_faces",
    "load_detector",
    "paste_face",
]
