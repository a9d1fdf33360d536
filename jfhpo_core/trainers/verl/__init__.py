"""The trainer verl (the paper's own), driven by its command line like OpenRLHF, in an environment of its own.

Written against the source of verl 0.9.1. Its overrides are checked with verl's own configuration; no training of it has
been run, for want of a GPU. See docs/how-to/verl.md.
"""

from __future__ import annotations

from jfhpo_core.trainers.verl.trainer import VerlTrainer

__all__ = ["VerlTrainer"]
