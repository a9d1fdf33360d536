from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tracking_server
from benchmarks.tracking_server import TrackingServer

PASSWORD = "correct horse battery staple"


@pytest.fixture
def free_port() -> int:
    """A port on which nothing listens."""
    return tracking_server.free_port()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[str]:
    """A server without authentication."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copyfile(empty_database, folder / "mlflow.db")
    server = TrackingServer(folder)
    try:
        server.start()
        yield server.url
    finally:
        server.kill()


@pytest.fixture
def guarded_server(tmp_path: Path, empty_database: Path) -> Iterator[TrackingServer]:
    """A server that asks for user and password: admin, with `PASSWORD`."""
    folder = tmp_path / "guarded"
    folder.mkdir()
    shutil.copyfile(empty_database, folder / "mlflow.db")
    # Checking a password takes a tenth of a second; it is remembered for a while.
    (folder / "auth.ini").write_text(
        "[mlflow]\ndefault_permission = READ\nadmin_username = admin\nauth_cache_ttl_seconds = 600\n"
        f"database_uri = sqlite:///{folder}/auth.db\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    secrets = {
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "of no use elsewhere",
    }
    server = TrackingServer(folder, ["--app-name", "basic-auth"], secrets)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[str]:
    """URI of an empty PostgreSQL database of its own."""
    found = shutil.which("pg_ctl") or next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))), None)
    if found is None:
        pytest.skip("PostgreSQL is not installed (no pg_ctl); on Debian: apt-get install postgresql")
    binaries, data = Path(found).resolve().parent, tmp_path / "postgres"
    # It refuses to run as root.
    user: dict[str, Any] = {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}
    data.mkdir()
    if user:
        shutil.chown(data, "postgres", "postgres")
        for folder in (tmp_path, *tmp_path.parents):
            if folder.owner() == "root" and not folder.stat().st_mode & 0o001:
                folder.chmod(folder.stat().st_mode | 0o011)
    port = tracking_server.free_port()
    run = functools.partial(subprocess.run, check=True, capture_output=True, cwd=data, **user)
    run([binaries / "initdb", "-D", data / "db", "-U", "jfhpo", "--auth", "trust", "--no-sync"])
    settings = f"-c listen_addresses=127.0.0.1 -p {port} -k {data} -c fsync=off"
    run([binaries / "pg_ctl", "-D", data / "db", "-w", "-o", settings, "-l", data / "log", "start"])
    try:
        run([binaries / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "jfhpo", "mlflow"])
        yield f"postgresql://jfhpo@127.0.0.1:{port}/mlflow"
    finally:
        run([binaries / "pg_ctl", "-D", data / "db", "-m", "immediate", "stop"])
