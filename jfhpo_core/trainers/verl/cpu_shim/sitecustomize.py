"""Python runs this at its start if the folder is on PYTHONPATH: in the trainer, in Ray's workers, in vLLM's engine."""

import on_import
import verl_on_cpu  # noqa: F401  registers its places

on_import.install()
