"""Other people's strategies, by name: thin adapters over their libraries (the extra `peers`), one module per library.

A peer trains one model, by default the target, and its only fidelity is the run length. What it promotes goes on
from its checkpoint. Its object is the held-out score at a rung, maximized. See `jfhpo_core.peers.base`.
"""
