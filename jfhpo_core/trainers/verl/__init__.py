"""The trainer verl (the paper's own), driven by its command line like OpenRLHF, in an environment of its own.

A run is held after every step until it is judged (`inside/main.py`). What was run, and where: docs/how-to/verl.md.
"""

from __future__ import annotations

from jfhpo_core.trainers.verl.trainer import VerlTrainer

__all__ = ["VerlTrainer"]
