"""Restoration by generation with constrained priors (CVPR 2024), as a library.

The core needs no orchestrator: `Prior.load`, `generate_album`, `constrain_prior` and `restore` are plain calls.
"""

__version__ = "0.1.0"
