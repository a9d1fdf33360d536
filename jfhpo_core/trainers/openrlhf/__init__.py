"""The trainer for clusters: OpenRLHF (Ray, vLLM, DeepSpeed) in an environment of its own, driven by its command line.

This module knows what a study may ask of it and imports nothing heavy; `training` does the work.
"""

from __future__ import annotations

from jfhpo_core.trainers.openrlhf.trainer import OpenRlhfTrainer

__all__ = ["OpenRlhfTrainer"]
