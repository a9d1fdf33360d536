from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jfhpo_core.errors import CheckpointError
from jfhpo_core.store import checkpoints
from jfhpo_core.store.checkpoints import MANIFEST, SHARED_BYTES, CheckpointStore
from jfhpo_core.store.retention import size_bytes
from jfhpo_core.study.trial import Checkpoint

KEY = "0123456789abcdef"
FILES = {"model.safetensors": b"weights" * 100, "optimizer/state.bin": b"moments" * 50, "trainer.json": b'{"step": 5}'}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "store")


def write(stage: Path, mark: bytes = b"") -> None:
    for name, content in FILES.items():
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).write_bytes(content + mark)


def committed(store: CheckpointStore, step: int, mark: bytes = b"") -> Checkpoint:
    stage = store.stage(KEY)
    write(stage, mark)
    return store.commit(KEY, stage, step, 16 * step)


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_what_was_committed_verifies_and_is_complete(store: CheckpointStore) -> None:
    checkpoint = committed(store, 5)
    assert (checkpoint.step, checkpoint.prompts) == (5, 80)
    assert checkpoint.path == f"{KEY}/step-00000005"
    assert checkpoint.size_bytes == sum(map(len, FILES.values()))
    assert content(store.verify(checkpoint)) == FILES


def test_equal_content_has_equal_digests(store: CheckpointStore) -> None:
    assert committed(store, 5) == committed(store, 5)
    assert committed(store, 5) != committed(store, 5, b"!")


def test_the_same_step_again_replaces_it(store: CheckpointStore) -> None:
    first, second = committed(store, 5), committed(store, 5, b"new")
    assert content(store.verify(second))["trainer.json"].endswith(b"new")
    assert first.digest != second.digest


def test_a_copied_manifest_is_not_taken_for_content(store: CheckpointStore) -> None:
    start = store.verify(committed(store, 5))
    stage = store.stage(KEY)
    shutil.copytree(start, stage, dirs_exist_ok=True)
    assert content(store.verify(store.commit(KEY, stage, 6, 96))) == FILES


def test_a_stage_on_another_disk_is_copied_and_stays_until_it_is_stored(store: CheckpointStore, tmp_path: Path) -> None:
    local = CheckpointStore(store.root, tmp_path / "disk" / "local")
    left = local.stage(KEY)
    stage = local.stage(KEY)
    assert not left.exists()
    assert stage.parent == tmp_path / "disk" / "local"
    write(stage)
    checkpoint = store.commit(KEY, stage, 5, 80)
    assert content(store.verify(checkpoint)) == content(stage) == FILES
    assert checkpoint == committed(CheckpointStore(tmp_path / "directly"), 5)
    assert store.unfinished() == []


def test_large_files_of_another_disk_are_copied_by_several_threads(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "PARALLEL_BYTES", 1)
    monkeypatch.setattr(checkpoints, "COPIED_BYTES", 3)
    stage = CheckpointStore(store.root, tmp_path / "local").stage(KEY)
    write(stage)
    assert content(store.verify(store.commit(KEY, stage, 5, 80))) == FILES


def test_a_copy_that_was_cut_off_is_made_anew(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = CheckpointStore(store.root, tmp_path / "local").stage(KEY)
    write(stage)

    def full(source: Path, target: Path) -> str:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "copy_file", full)
        with pytest.raises(CheckpointError, match="No space left"):
            store.commit(KEY, stage, 5, 80)
    assert content(store.verify(store.commit(KEY, stage, 5, 80))) == FILES


def test_an_empty_stage_is_refused(store: CheckpointStore) -> None:
    with pytest.raises(CheckpointError, match="wrote no checkpoint"):
        store.commit(KEY, store.stage(KEY), 5, 80)


@pytest.mark.parametrize("target", ["trainer.json", "optimizer", "/etc/hostname"])
def test_a_link_in_the_stage_is_refused(store: CheckpointStore, target: str) -> None:
    stage = store.stage(KEY)
    write(stage)
    (stage / "link").symlink_to(target)
    with pytest.raises(CheckpointError, match="plain files only"):
        store.commit(KEY, stage, 5, 80)


@pytest.mark.parametrize("key", ["", "..", "../0123456789abcde", "0123456789ABCDEF", KEY + "\n", f"{KEY}/x"])
def test_only_trial_keys_become_folders(store: CheckpointStore, key: str) -> None:
    with pytest.raises(CheckpointError, match="not a trial key"):
        store.stage(key)


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", "x/../../elsewhere"])
def test_no_path_leads_out_of_the_store(store: CheckpointStore, path: str) -> None:
    checkpoint = committed(store, 5)
    shutil.copytree(store.root / checkpoint.path, store.root.parent / "elsewhere")
    with pytest.raises(CheckpointError, match="outside the checkpoint store"):
        store.verify(checkpoint.model_copy(update={"path": path}))
    assert (store.root.parent / "elsewhere").is_dir()


def test_a_link_out_of_the_store_is_not_followed(store: CheckpointStore, tmp_path: Path) -> None:
    checkpoint = committed(store, 5)
    folder = store.root / checkpoint.path
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="outside the checkpoint store"):
        store.verify(checkpoint)


def test_a_missing_checkpoint_is_refused(store: CheckpointStore) -> None:
    checkpoint = committed(store, 5)
    shutil.rmtree(store.root / checkpoint.path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        store.verify(checkpoint)


@contextmanager
def two_checkpoints() -> Iterator[tuple[CheckpointStore, Checkpoint, Checkpoint]]:
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder))
        yield store, committed(store, 5), committed(store, 10, b"later")


def refuse(store: CheckpointStore, damaged: Checkpoint, previous: Checkpoint) -> None:
    """The damaged one is refused and set aside, for good; the one before it serves."""
    with pytest.raises(CheckpointError, match="moved to"):
        store.verify(damaged)
    assert not (store.root / damaged.path).exists()
    assert len(list((store.root / "quarantine").iterdir())) == 1
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        store.verify(damaged)
    assert content(store.verify(previous)) == FILES


NAMES = st.sampled_from([*FILES, MANIFEST])


@settings(max_examples=40)  # each of them flushes two checkpoints to the disk
@given(NAMES, st.data())
def test_a_flipped_bit_is_found(name: str, data: st.DataObject) -> None:
    with two_checkpoints() as (store, previous, newest):
        path = store.root / newest.path / name
        raw = bytearray(path.read_bytes())
        position = data.draw(st.integers(0, 8 * len(raw) - 1))
        raw[position // 8] ^= 1 << position % 8
        path.write_bytes(bytes(raw))
        refuse(store, newest, previous)


@settings(max_examples=40)  # each of them flushes two checkpoints to the disk
@given(NAMES, st.data())
def test_a_truncated_file_is_found(name: str, data: st.DataObject) -> None:
    with two_checkpoints() as (store, previous, newest):
        path = store.root / newest.path / name
        os.truncate(path, data.draw(st.integers(0, path.stat().st_size - 1)))
        refuse(store, newest, previous)


@settings(max_examples=40)  # each of them flushes two checkpoints to the disk
@given(NAMES, st.binary(min_size=1, max_size=20))
def test_an_extended_file_is_found(name: str, more: bytes) -> None:
    with two_checkpoints() as (store, previous, newest):
        with (store.root / newest.path / name).open("ab") as file:
            file.write(more)
        refuse(store, newest, previous)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_deleted_file_is_found(name: str) -> None:
    with two_checkpoints() as (store, previous, newest):
        (store.root / newest.path / name).unlink()
        refuse(store, newest, previous)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_file_that_became_a_link_is_found(name: str, tmp_path: Path) -> None:
    with two_checkpoints() as (store, previous, newest):
        path = store.root / newest.path / name
        shutil.move(path, tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
        refuse(store, newest, previous)


def test_a_file_that_does_not_belong_is_found() -> None:
    with two_checkpoints() as (store, previous, newest):
        (store.root / newest.path / "optimizer" / "extra.pkl").write_bytes(b"surprise")
        refuse(store, newest, previous)


def test_another_checkpoint_in_its_place_is_found() -> None:
    with two_checkpoints() as (store, previous, newest):
        shutil.rmtree(store.root / newest.path)
        shutil.copytree(store.root / previous.path, store.root / newest.path)
        refuse(store, newest, previous)


def test_an_unreadable_disk_is_no_verdict(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = committed(store, 5)

    def broken(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "file_digest", broken)
        with pytest.raises(CheckpointError, match="cannot be read"):
            store.verify(checkpoint)
    assert content(store.verify(checkpoint)) == FILES


class Crash(BaseException):
    """The process ends here."""


def interrupt(patch: pytest.MonkeyPatch, countdown: int, error: BaseException) -> None:
    """Let the n-th operation on the disk fail."""
    left = [countdown]

    def failing(original):  # noqa: ANN001, ANN202
        def call(*arguments, **keywords):  # noqa: ANN002, ANN003, ANN202
            left[0] -= 1
            if left[0] == 0:
                raise error
            return original(*arguments, **keywords)

        return call

    patch.setattr(os, "open", failing(os.open))
    patch.setattr(os, "fsync", failing(os.fsync))
    patch.setattr(Path, "write_text", failing(Path.write_text))
    patch.setattr(Path, "rename", failing(Path.rename))
    patch.setattr(Path, "mkdir", failing(Path.mkdir))
    patch.setattr(shutil, "rmtree", failing(shutil.rmtree))


@pytest.mark.parametrize("again", [False, True], ids=["first", "again"])
def test_a_crash_at_any_moment_of_a_commit_leaves_whole_checkpoints_only(tmp_path: Path, again: bool) -> None:
    """Also while a step is committed for the second time; the one before it is never touched."""
    for moment in range(1, 100):
        store = CheckpointStore(tmp_path / str(moment))
        previous = committed(store, 5)
        known = committed(store, 10) if again else None
        stage = store.stage(KEY)
        write(stage, b"later")
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, moment, Crash())
            try:
                store.commit(KEY, stage, 10, 160)
            except Crash:
                crashed = True
            else:
                crashed = False
        assert content(store.verify(previous)) == FILES
        for folder in (store.root / KEY).iterdir():
            assert (folder / MANIFEST).is_file()
            assert content(folder).keys() == FILES.keys()
        # The worker that takes over can commit the step, whatever was left behind.
        final = committed(store, 10, b"later")
        assert content(store.verify(final)) == {name: data + b"later" for name, data in FILES.items()}
        assert known is None or known.digest != final.digest
        assert [path.name for path in (store.root / "staging").iterdir()] == []
        if not crashed:
            break
    assert 10 < moment < 99, "the loop must have met every moment"


def test_a_full_disk_is_an_error_and_no_checkpoint(tmp_path: Path) -> None:
    messages = set()
    for moment in range(1, 100):
        store = CheckpointStore(tmp_path / str(moment))
        previous = committed(store, 5)
        stage = store.stage(KEY)
        write(stage)
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, moment, OSError(errno.ENOSPC, "No space left on device"))
            try:
                store.commit(KEY, stage, 10, 160)
            except CheckpointError as error:
                messages.add(str(error).rpartition(": ")[2])
            else:
                break
        assert content(store.verify(previous)) == FILES
    assert 10 < moment < 99
    assert messages == {"[Errno 28] No space left on device"}


def test_prune_keeps_what_it_is_told(store: CheckpointStore) -> None:
    kept = [committed(store, step) for step in (5, 10, 15, 20)]
    store.prune(KEY, [store.root / kept[1].path, store.root / kept[3].path])
    assert sorted(path.name for path in (store.root / KEY).iterdir()) == ["step-00000010", "step-00000020"]
    assert list((store.root / "staging").iterdir()) == []


def test_prune_survives_another_that_was_faster(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = committed(store, 5), committed(store, 10)
    discard = store._discard

    def raced(folder: Path) -> None:
        discard(folder)
        discard(folder)

    monkeypatch.setattr(store, "_discard", raced)
    store.prune(KEY, [store.root / new.path])
    assert not (store.root / old.path).exists()
    assert content(store.verify(new)) == FILES


def test_a_new_stage_clears_what_the_trials_last_worker_left(store: CheckpointStore) -> None:
    other = store.stage("f" * 16)
    left = store.stage(KEY)
    write(left)
    fresh = store.stage(KEY)
    assert not left.exists()
    assert list(fresh.iterdir()) == []
    assert other.exists()


def large(store: CheckpointStore, key: str, step: int, own: bytes) -> Path:
    """A checkpoint with a tokenizer that all have, and weights of its own."""
    stage = store.stage(key)
    (stage / "tokenizer.json").write_bytes(b"t" * SHARED_BYTES)
    (stage / "model.safetensors").write_bytes(own * SHARED_BYTES)
    return store.root / store.commit(key, stage, step, 16 * step).path


def test_equal_files_are_kept_once(store: CheckpointStore) -> None:
    other = "f" * 16
    first, second = large(store, KEY, 5, b"a"), large(store, other, 5, b"b")
    assert (first / "tokenizer.json").samefile(second / "tokenizer.json")
    assert not (first / "model.safetensors").samefile(second / "model.safetensors")
    assert size_bytes([first, second]) < 3.1 * SHARED_BYTES
    # Deleting one leaves the other whole, deleting both leaves nothing.
    store.delete(first)
    assert (second / "tokenizer.json").read_bytes() == b"t" * SHARED_BYTES
    store.delete(second)
    assert [path for path in store.root.rglob("*") if path.is_file()] == []


def test_a_damaged_shared_file_is_not_passed_on(store: CheckpointStore) -> None:
    first = large(store, KEY, 5, b"a")
    (first / "tokenizer.json").write_bytes(b"x" * SHARED_BYTES)
    second = large(store, "f" * 16, 5, b"b")
    assert (second / "tokenizer.json").read_bytes() == b"t" * SHARED_BYTES


def test_without_hard_links_each_checkpoint_has_its_copy(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr("os.link", refuse)
    first, second = large(store, KEY, 5, b"a"), large(store, "f" * 16, 5, b"b")
    assert not (first / "tokenizer.json").samefile(second / "tokenizer.json")


def test_only_checkpoints_of_the_store_are_deleted(store: CheckpointStore, tmp_path: Path) -> None:
    committed(store, 5)
    (tmp_path / KEY / "step-00000005").mkdir(parents=True)
    for folder in (store.root, store.root / KEY, tmp_path / KEY / "step-00000005", store.root / KEY / "step-00000006"):
        with pytest.raises(CheckpointError, match="no checkpoint of"):
            store.delete(folder)
    assert (store.root / KEY / "step-00000005").is_dir()


def test_threads_hash_what_one_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    files = {name: tmp_path / name for name in FILES}
    alone = checkpoints.file_digests(files)
    monkeypatch.setattr(checkpoints, "PARALLEL_BYTES", 0)
    assert checkpoints.file_digests(files) == alone
    assert alone["trainer.json"] == hashlib.sha256(FILES["trainer.json"]).hexdigest()
