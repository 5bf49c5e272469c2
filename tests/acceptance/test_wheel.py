# SPDX-License-Identifier: Apache-2.0
"""What people install: the wheel, in an environment of its own, with nothing of this repository near it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "middleware" / "tideover"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SEND = """
import tideover

@tideover.ai_task(criticality="deferrable")
def tag(ticket_id): ...

print(tideover.__file__)
print(tideover.status(tag.send(81)).state)
"""


@dataclass(frozen=True)
class Installed:
    wheel: Path
    bin: Path
    folder: Path

    def run(self, *command: str, **environment: str) -> str:
        """The output of a program of the new environment, which has no variables of ours."""
        whole = {"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(self.folder), **environment}
        done = subprocess.run(command, cwd=self.folder, env=whole, capture_output=True, text=True, timeout=120, check=False)
        assert 0 == done.returncode, done.stdout + done.stderr
        return done.stdout


def call(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=500, check=False)
    assert 0 == done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Made once, also where several test processes share the work: the first makes it, the others wait."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "wheel"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "work").exists():
            call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
            # with our pip, and without bytecode: a pip of its own, and compiling all that no test loads, cost 8 s of a core
            call(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
            pip = (sys.executable, "-m", "pip", "--python", folder / "venv" / "bin" / "python", "--disable-pip-version-check")
            call(*pip, "install", "-q", "--no-compile", f"{next(folder.glob('*.whl'))}[embedded]")
            (folder / "work").mkdir()
    return Installed(next(folder.glob("*.whl")), folder / "venv" / "bin", folder / "work")


def test_the_wheel_holds_what_it_needs_and_no_more(installed: Installed) -> None:
    """Every Lua script and the markers of typed packages; the two packages and nothing beside them."""
    with zipfile.ZipFile(installed.wheel) as wheel:
        names = set(wheel.namelist())
    scripts = {f"tideover/store/lua/{path.name}" for path in (LIBRARY / "store" / "lua").glob("*.lua")}
    assert scripts
    assert scripts | {"tideover/py.typed", "tideover_worker/py.typed"} <= names
    assert {"tideover", "tideover_worker"} == {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_a_job_can_be_sent(installed: Installed, valkey_url: str, client: redis.Redis) -> None:
    """With the URL in the environment and no file at all."""
    file, state = installed.run("python", "-W", "error", "-c", SEND, TIDEOVER_REDIS_URL=valkey_url).split()
    assert str(ROOT) not in file
    assert "queued" == state
    assert b"1" == client.hget("dramatiq:__tideover__:account", "accepted")


def test_the_command_is_there(installed: Installed) -> None:
    """It says how it is used."""
    assert "Usage: tideover" in installed.run("tideover", "--help")


def test_the_private_server_comes_along(installed: Installed) -> None:
    """The extra `embedded` is all that it takes to have a store."""
    program = (
        "from pathlib import Path\n"
        "from tideover_worker import embedded\n"
        "server = embedded.start(Path('data'))\n"
        "print(server.started, embedded.stop(Path('data')), embedded.find_server())"
    )
    started, stopped, server = installed.run("python", "-c", program).split()
    assert ("True", "True") == (started, stopped)
    assert server.startswith(str(installed.bin.parent))
