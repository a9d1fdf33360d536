"""A disk in memory that can lose power: what is not flushed is torn, or comes in another order than it was written.

The model is that of a journaling file system. The content of a file is sure to be there after `fsync` of the file. A
name in a folder is sure to be there after `fsync` of the folder. Of what is not flushed, a loss of power keeps any
part: of contents any beginning, of names any set in which no change of a folder is kept without those before it. What
is flushed stays when more is appended to the file, and may be lost with the rest when the file is written anew.
"""

from __future__ import annotations

import errno
import fnmatch
import io
import random
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import Any, ClassVar


@dataclass(eq=False)
class File:
    """A file's content, and as much of it as is on the platter.

    Attributes:
        flushed: The content at the last flush.
        safe: So many first bytes of the content are flushed and have not been written again.
    """

    content: bytes = b""
    flushed: bytes = b""
    safe: int = 0
    links: int = 0

    def settle(self) -> None:
        """All of the content is on the platter."""
        self.flushed, self.safe = self.content, len(self.content)


@dataclass(eq=False)
class Folder:
    """A folder's entries, and those that are on the platter."""

    entries: dict[str, File | Folder] = field(default_factory=dict)
    flushed: dict[str, File | Folder] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Change:
    """A change of names that is not flushed: per folder and name what stands there afterwards, None if nothing."""

    parts: tuple[tuple[Folder, str, File | Folder | None], ...]

    def touches(self, folders: set[int]) -> bool:
        return any(id(folder) in folders for folder, _, _ in self.parts)


class Disk:
    """The disk.

    Args:
        point: Called with a name before and after every change; it may raise, which is when the power is lost.
    """

    def __init__(self, point: Callable[[str, Callable[[], Any]], Any]) -> None:
        self.root = Folder()
        self._point = point
        self._changes: list[_Change] = []
        self._files: dict[int, File] = {}

    def find(self, path: PurePosixPath) -> File | Folder:
        """What lies at a path.

        Raises:
            FileNotFoundError: Nothing.
        """
        here: File | Folder = self.root
        for part in path.parts[1:]:
            if not isinstance(here, Folder) or part not in here.entries:
                raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
            here = here.entries[part]
        return here

    def folder(self, path: PurePosixPath) -> Folder:
        """The folder at a path."""
        found = self.find(path)
        if not isinstance(found, Folder):
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(path))
        return found

    def write(self, path: PurePosixPath, content: bytes, append: bool = False) -> None:
        """Write a file, by two calls of the kernel: one for its name, if it is new, and one for its content."""
        parent = self.folder(path.parent)
        found = parent.entries.get(path.name)
        if found is None:
            found = File()
            self._rename(((parent, path.name, found),))
        assert isinstance(found, File)
        file, whole = found, found.content + content if append else content

        def change() -> None:
            file.content = whole
            file.safe = file.safe if append else 0
            self._files[id(file)] = file

        self._point("write", change)

    def make(self, path: PurePosixPath) -> None:
        """Make a folder."""
        self._rename(((self.folder(path.parent), path.name, Folder()),))

    def link(self, path: PurePosixPath, other: PurePosixPath) -> None:
        """Give a file a second name."""
        parent = self.folder(other.parent)
        if other.name in parent.entries:
            raise FileExistsError(errno.EEXIST, "exists", str(other))
        self._rename(((parent, other.name, self.find(path)),))

    def move(self, path: PurePosixPath, other: PurePosixPath) -> None:
        """Rename."""
        node = self.find(path)
        self._rename(((self.folder(path.parent), path.name, None), (self.folder(other.parent), other.name, node)))

    def remove(self, path: PurePosixPath) -> None:
        """Take a name away."""
        self.find(path)
        self._rename(((self.folder(path.parent), path.name, None),))

    def flush(self, path: PurePosixPath) -> None:
        """Flush a file or folder."""
        node = self.find(path)

        def change() -> None:
            if isinstance(node, File):
                node.settle()
                self._files.pop(id(node), None)
            else:
                self._settle({id(node)})

        self._point("flush", change)

    def lose_power(self, draw: random.Random) -> None:
        """Keep what is flushed, and any part of what is not."""
        lost: set[int] = set()
        kept = draw.random()
        for change in self._changes:
            if change.touches(lost) or draw.random() > kept:
                lost |= {id(folder) for folder, _, _ in change.parts}
            else:
                _apply(change, flushed=True)
        self._changes.clear()
        for file in self._files.values():
            file.content = _torn(file, draw)
        self._files.clear()
        _restore(self.root, set())

    def _rename(self, parts: tuple[tuple[Folder, str, File | Folder | None], ...]) -> None:
        change = _Change(parts)

        def apply() -> None:
            for folder, name, node in parts:
                before = folder.entries.get(name)
                if isinstance(before, File):
                    before.links -= 1
                if isinstance(node, File):
                    node.links += 1
            _apply(change, flushed=False)
            self._changes.append(change)

        self._point("rename", apply)

    def _settle(self, folders: set[int]) -> None:
        """Flush the changes of folders, with those that came before them in other folders that they touch."""
        wanted: list[_Change] = []
        for change in reversed(self._changes):
            if change.touches(folders):
                folders = folders | {id(folder) for folder, _, _ in change.parts}
                wanted.append(change)
        for change in reversed(wanted):
            _apply(change, flushed=True)
            self._changes.remove(change)


def _restore(folder: Folder, seen: set[int]) -> None:
    """What is on the platter is what there is."""
    folder.entries = dict(folder.flushed)
    for node in folder.entries.values():
        if isinstance(node, Folder):
            _restore(node, seen)
        else:
            node.links = node.links + 1 if id(node) in seen else 1
            node.settle()
            seen.add(id(node))


def _apply(change: _Change, flushed: bool) -> None:
    for folder, name, node in change.parts:
        entries = folder.flushed if flushed else folder.entries
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


def _torn(file: File, draw: random.Random) -> bytes:
    """What a loss of power leaves of a file that is not flushed: the old content, or a beginning of the new one."""
    if draw.random() < 0.3:
        return file.flushed
    cut = draw.randint(file.safe, len(file.content))
    return file.content[:cut]


class _Handle(io.BytesIO):
    """An open file: what is written reaches the disk when it is flushed or closed."""

    def __init__(self, path: SimulatedPath, mode: str) -> None:
        self.path, self._mode, self._seen = path, mode, 0
        super().__init__(b"" if mode.startswith(("a", "w")) else path.read_bytes())

    def write(self, text: Any) -> int:
        return super().write(text.encode() if isinstance(text, str) else text)

    def flush(self) -> None:
        content = self.getvalue()
        if not self._mode.startswith("r") and len(content) > self._seen:
            self.path.disk.write(self.path, content[self._seen :], append=True)
            self._seen = len(content)

    def fileno(self) -> Any:
        return self.path

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self.flush()


class SimulatedPath(PurePosixPath):
    """As much of `pathlib.Path` as stores and outbox use, on a `Disk`."""

    disk: ClassVar[Disk]

    def absolute(self) -> SimulatedPath:
        return self

    def resolve(self) -> SimulatedPath:
        return self

    def exists(self) -> bool:
        try:
            self.disk.find(self)
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        return self.exists() and isinstance(self.disk.find(self), Folder)

    def is_file(self) -> bool:
        return self.exists() and isinstance(self.disk.find(self), File)

    def is_symlink(self) -> bool:
        return False

    def stat(self) -> Any:
        node = self.disk.find(self)
        if isinstance(node, Folder):
            return SimpleNamespace(st_mode=stat.S_IFDIR, st_size=0, st_nlink=1)
        return SimpleNamespace(st_mode=stat.S_IFREG, st_size=len(node.content), st_nlink=node.links)

    lstat = stat

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        if self.exists():
            if not exist_ok:
                raise FileExistsError(errno.EEXIST, "exists", str(self))
            return
        if parents and not self.parent.exists():
            self.parent.mkdir(parents=True, exist_ok=True)
        self.disk.make(self)

    def iterdir(self) -> Iterator[SimulatedPath]:
        return (self / name for name in sorted(self.disk.folder(self).entries))

    def glob(self, pattern: str) -> list[SimulatedPath]:
        first, _, rest = pattern.partition("/")
        if not self.is_dir():
            return []
        found = [path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, first)]
        return [deeper for path in found for deeper in path.glob(rest)] if rest else found

    def rglob(self, pattern: str) -> list[SimulatedPath]:
        if not self.is_dir():
            return []
        return self.glob(pattern) + [found for path in self.iterdir() for found in path.rglob(pattern)]

    def open(self, mode: str = "r", encoding: str | None = None) -> _Handle:
        if mode.startswith("w") or (mode.startswith("a") and not self.exists()):
            self.disk.write(self, b"")
        return _Handle(self, mode)

    def read_bytes(self) -> bytes:
        node = self.disk.find(self)
        if isinstance(node, Folder):
            raise IsADirectoryError(errno.EISDIR, "a folder", str(self))
        return node.content

    def read_text(self, encoding: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8")

    def write_bytes(self, content: bytes) -> None:
        self.disk.write(self, content)

    def write_text(self, text: str, encoding: str | None = None) -> None:
        self.write_bytes(text.encode(encoding or "utf-8"))

    def unlink(self, missing_ok: bool = False) -> None:
        if missing_ok and not self.exists():
            return
        self.disk.remove(self)

    def rename(self, target: PurePosixPath) -> None:
        self.disk.move(self, target)

    replace = rename


class SimulatedOs:
    """As much of `os` as stores and outbox use."""

    O_RDONLY = 0

    @staticmethod
    def walk(top: SimulatedPath, topdown: bool = True) -> Iterator[tuple[SimulatedPath, list[str], list[str]]]:
        paths = list(SimulatedPath(top).iterdir())
        folders = [path for path in paths if path.is_dir()]
        row = (SimulatedPath(top), [path.name for path in folders], [path.name for path in paths if path.is_file()])
        if topdown:
            yield row
        for path in folders:
            yield from SimulatedOs.walk(path, topdown)
        if not topdown:
            yield row

    @staticmethod
    def open(path: SimulatedPath, _flags: int) -> SimulatedPath:
        path.disk.find(path)
        return path

    @staticmethod
    def close(path: SimulatedPath) -> None:
        pass

    @staticmethod
    def fsync(path: SimulatedPath) -> None:
        path.disk.flush(path)

    @staticmethod
    def link(path: SimulatedPath, other: SimulatedPath) -> None:
        path.disk.link(path, other)


class SimulatedShutil:
    """As much of `shutil` as stores and workers use."""

    @staticmethod
    def rmtree(path: SimulatedPath, **_: bool) -> None:
        if not path.exists():
            return
        for child in list(path.iterdir()):
            if child.is_dir():
                SimulatedShutil.rmtree(child)
            else:
                child.unlink()
        path.disk.remove(path)
