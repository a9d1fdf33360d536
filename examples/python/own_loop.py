"""Tune a training loop of your own by ask and tell: no trainer, no MLflow, no cluster.

Run it by `python examples/python/own_loop.py`.
"""

import math

import jfhpo


def train(learning_rate: float, prompts: int, parameters: int) -> float:
    """Stand-in for a training loop: the score after so many prompts; larger models want smaller learning rates."""
    best = 3e-4 * (parameters / 1e6) ** -0.3
    reached = 1 - math.exp(-prompts / 60)
    return 0.2 + 0.6 * reached * math.exp(-0.5 * math.log10(learning_rate / best) ** 2)


optimizer = jfhpo.Optimizer(
    {
        "study": "my-loop",
        "family": [{"name": "small", "parameters": 1_000_000}, {"name": "large", "parameters": 8_000_000}],
        "target": "large",
        "space": {"learning_rate": {"type": "float", "low": 1e-6, "high": 1e-2, "log": True}},
        "fidelity": {"horizon_prompts": 160, "rungs": 2},
        "budget": {"trial_seconds": 100},
        "seeds": {"training": [0]},
    }
)
sizes = {"small": 1_000_000, "large": 8_000_000}
while (work := optimizer.ask()) is not None:
    rate, prompts = float(work.configuration["learning_rate"]), work.to_prompts
    score = train(rate, prompts, sizes[work.model])
    print(f"{work.model:5} to {prompts:3} prompts with {rate:.2e}: {score:.3f}")
    optimizer.tell(work, score, 0.01, seconds=(prompts - work.from_prompts) * sizes[work.model] / 1e8, base_score=0.2)

best = optimizer.recommend()
assert best is not None
print(f"best learning rate on the target: {best.configuration['learning_rate']:.2e}, expected score {best.mean:.3f}")
