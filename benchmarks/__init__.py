"""The benchmark of search strategies: landscapes with known optima, run on simulated clocks.

`python -m benchmarks run` fills `results/`, `python -m benchmarks report` draws and tabulates them for the docs.
"""
