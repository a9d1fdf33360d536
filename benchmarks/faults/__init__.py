"""Fault injection: searches that are disturbed at random moments, and what must hold after each disturbance.

A search runs in a process of its own, with real checkpoints and a real MLflow store, and is killed, starved of disk or
lied to; then it is started again, until the study is complete. It is compared with the same search undisturbed.
"""
