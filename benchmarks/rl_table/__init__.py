"""A recorded table of real RL trainings: hyperparameters x model size x steps x seeds, and what can be read from it.

`python -m benchmarks.rl_table` lists the commands.
"""
