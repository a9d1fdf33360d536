"""The benchmark on data that nobody here made: scan-bench's recorded runs of language and other models.

Nothing of the data lies in the repository: `python -m benchmarks foreign fetch` downloads it.
"""
