"""Python runs this at its start if the folder is on PYTHONPATH: in the trainer, in Ray's workers, in vLLM's engine."""

import openrlhf_on_cpu

openrlhf_on_cpu.install()
