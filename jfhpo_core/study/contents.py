"""What the files of a study hold: digests of data, rewards and models, to notice when one of them changes.

Data and rewards count byte by byte, a reward with the modules beside it that it imports. Weights are sampled, since
reading hundreds of gigabytes would take longer than much of a search: their size and `SAMPLES` evenly spread blocks of
each file count. Training changes nearly every block, so a changed model is missed only if it was edited on purpose in
between. A model of the hub counts by the commit that is in the local cache.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from jfhpo_core.study.spec import HubData, StudySpec

SAMPLES = 64
"""Blocks read of each file of weights: the first, which has the header, the last, and others between."""

BLOCK_BYTES = 64 * 1024

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
DESCRIPTIONS = {".json", ".txt", ".model", ".jinja"}
"""Suffixes of the other files of a checkpoint that matter: configuration, tokenizer, chat template."""


def contents(spec: StudySpec) -> dict[str, str]:
    """Digest of everything that the study reads, by field: 'task.heldout', 'task.reward', 'family.1.5B'.

    What cannot be read is left out: other checks say so, and a simulated study needs no files.
    """
    found: dict[str, str | None] = {}
    for field in ("prompts", "heldout"):
        source = getattr(spec.task, field)
        if source is not None and not isinstance(source, HubData):
            found[f"task.{field}"] = _digest(_whole(Path(source)))
    rewards = {path: None for reward in spec.task.rewards for path in _with_imports(Path(reward.file))}
    found["task.reward"] = _digest(block for path in rewards for block in _whole(path))
    for model in spec.family.models:
        found[f"family.{model.name}"] = _model_digest(model.path)
    return {name: digest for name, digest in found.items() if digest is not None}


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Fields whose digests are known and differ."""
    return [name for name in before if name in now and before[name] != now[name]]


def _digest(blocks: Iterator[bytes]) -> str | None:
    """First 16 hex digits of the SHA-256; None if there is nothing to read."""
    total, read = hashlib.sha256(), False
    for block in blocks:
        total.update(block)
        read = True
    return total.hexdigest()[:16] if read else None


def _whole(path: Path) -> Iterator[bytes]:
    if path.is_file():
        yield path.read_bytes()


def _sampled(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    yield f"{path.name} {size}".encode()
    with path.open("rb") as file:
        last = max(0, size - BLOCK_BYTES)
        for start in sorted({last * number // (SAMPLES - 1) for number in range(SAMPLES)}):
            file.seek(start)
            yield file.read(BLOCK_BYTES)


def _with_imports(path: Path) -> Iterator[Path]:
    """A Python file, and the modules beside it that it imports, each once."""
    waiting, seen = [path], {path}
    while waiting:
        file = waiting.pop()
        yield file
        for name in _imported(file):
            for beside in (path.parent / f"{name}.py", path.parent / name / "__init__.py"):
                if beside.is_file() and beside not in seen:
                    seen.add(beside)
                    waiting.append(beside)


def _imported(path: Path) -> list[str]:
    """Names of the modules that a file imports, sorted; none if it is not Python."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return sorted(name.replace(".", "/") for name in names)


def _model_digest(path: str) -> str | None:
    folder = Path(path)
    if folder.is_dir():
        files = sorted(file for file in folder.iterdir() if file.is_file())
        return _digest(
            block
            for file in files
            if file.suffix in WEIGHTS | DESCRIPTIONS
            for block in (_sampled(file) if file.suffix in WEIGHTS else (file.name.encode(), *_whole(file)))
        )
    return _cached_commit(path)


def _cached_commit(name: str) -> str | None:
    """Commit of a model of the hub in the local cache; None if it is not there."""
    try:
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(name, "config.json")
    except (ImportError, ValueError):  # without the client; no name of the hub, but a path that is not there
        return None
    return Path(config).parent.name if isinstance(config, str) else None
