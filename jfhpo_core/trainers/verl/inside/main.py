"""verl's own PPO, `verl.trainer.main_ppo`, held after every step until the driver has judged it. Runs inside verl.

Takes verl's command line. The driver writes a file (its path in `JFHPO_CONTROL`): `released`, the last step after which
the run may go on, and `evaluate`, a step after which the held-out prompts are to be scored at once.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import hydra
import ray

CONTROL_VARIABLE = "JFHPO_CONTROL"

POLL_SECONDS = 0.05


def held(trainer: type[Any]) -> type[Any]:
    """A trainer of verl that waits for the driver before every step."""
    from verl.utils.debug import marked_timer

    class Held(trainer):  # type: ignore[misc]
        def on_step_begin(self) -> None:
            super().on_step_begin()
            done = self.global_steps - 1
            evaluated = False
            with marked_timer("held", self.timing_raw):
                while (control := _control())["released"] < done:
                    if control["evaluate"] == done and not evaluated:
                        self._evaluate(done)
                        evaluated = True
                    time.sleep(POLL_SECONDS)

        def _evaluate(self, step: int) -> None:
            # verl counts the step that begins.
            self.global_steps = step
            timing: dict[str, float] = {}
            with marked_timer("testing", timing):
                scores = self._validate()
            self.logger.log(data={**scores, "timing_s/testing": timing["testing"]}, step=step)
            self.global_steps = step + 1

    return Held


def _control() -> dict[str, Any]:
    control: dict[str, Any] = json.loads(Path(os.environ[CONTROL_VARIABLE]).read_text(encoding="utf-8"))
    return control


@ray.remote
class HeldTaskRunner:
    """verl's task runner with the held trainer."""

    def run(self, config: Any) -> None:
        """Train."""
        from verl.trainer.main_ppo import TaskRunnerV1
        from verl.trainer.ppo.v1 import trainer_base

        trainer_base.TRAINER_REGISTRY["sync"] = held(trainer_base.TRAINER_REGISTRY["sync"])
        TaskRunnerV1.__ray_actor_class__().run(config)


@hydra.main(config_path="pkg://verl.trainer.config", config_name="ppo_trainer", version_base=None)
def main(config: Any) -> None:
    """What verl's own main program does, with another task runner."""
    from verl.trainer.main_ppo import run_ppo
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config
    from verl.utils.device import auto_set_device

    auto_set_device(config)
    validate_config(config=config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    run_ppo(config, task_runner_class=HeldTaskRunner)


if __name__ == "__main__":
    main()
