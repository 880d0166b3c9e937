"""Caches of an account without a home folder."""

from __future__ import annotations

import getpass
import os
import pwd
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernels import cache
from kernels.cache import PLACES, cache_folder, provide_home
from tests.conftest import TINY_TOML

ROOT = Path(__file__).parents[2]
# Of no account on any machine that runs tests.
NOBODYS_ID = 54321
ASKED = (*PLACES, "CONVFIRST_CACHE", "TORCHINDUCTOR_CACHE_DIR", "HOME", "LOGNAME", "USER", "LNAME", "USERNAME")


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temporary folder of this test; no variable that is asked is set, and those that it sets are removed."""
    for name in ASKED:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    cache._stand_in.cache_clear()
    yield folder
    cache._stand_in.cache_clear()


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("no_account")
def test_without_an_account_caches_are_in_a_temporary_folder_of_the_users_own(temporary: Path) -> None:
    with pytest.warns(UserWarning, match="no home folder to write to: caches are in") as told:
        folders = {cache_folder(), cache_folder()}
    assert len(told) == len(folders) == 1
    assert folders.pop().is_relative_to(temporary)
    (made,) = temporary.iterdir()
    assert made.stat().st_mode & 0o777 == 0o700


@pytest.mark.usefixtures("no_account")
def test_without_an_account_libraries_find_a_place_and_a_name(temporary: Path) -> None:
    with pytest.warns(UserWarning, match="no home folder"):
        provide_home()
    for name in (*PLACES, "TORCHINDUCTOR_CACHE_DIR"):
        assert Path(os.environ[name]).is_relative_to(temporary)
    assert cache_folder() == Path(os.environ["XDG_CACHE_HOME"]) / "convfirst-nas"
    assert getpass.getuser() == f"uid{os.getuid()}"


@pytest.mark.parametrize("home", ["file", "gone"])
def test_a_home_where_nothing_can_be_made_is_none(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    """Root may write anywhere, but below a file nobody can; a folder that is gone is refused by the one above it."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / home))
    real = os.access
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path and real(path, mode))
    with pytest.warns(UserWarning, match="no home folder"):
        provide_home()
    assert Path(os.environ["TRITON_HOME"]).is_relative_to(temporary)


def test_a_home_that_can_be_written_to_is_used_and_nothing_is_told(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        provide_home()
        assert cache_folder() == tmp_path / "home" / ".cache" / "convfirst-nas"
    assert not set(PLACES) & set(os.environ)
    assert list(temporary.iterdir()) == []


@pytest.mark.usefixtures("no_account")
@pytest.mark.parametrize("prepared", ["a link", "open to others", "another user's"])
def test_a_folder_that_another_user_may_have_prepared_is_not_trusted(
    temporary: Path, tmp_path: Path, prepared: str
) -> None:
    place = temporary / f"convfirst-nas-{os.getuid()}"
    if prepared == "a link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        place.symlink_to(tmp_path / "theirs")
    else:
        place.mkdir(mode=0o700)
        if prepared == "open to others":
            place.chmod(0o755)
        elif os.getuid() != 0:
            pytest.skip("only root can give a folder away: a folder of another user was not tested")
        else:
            os.chown(place, NOBODYS_ID, NOBODYS_ID)
    with pytest.warns(UserWarning, match="no home folder"):
        folder = cache_folder()
    assert folder.is_relative_to(temporary)
    assert not folder.is_relative_to(place)


@pytest.mark.slow
def test_a_search_runs_without_an_account() -> None:
    if os.getuid() != 0:
        pytest.skip("only root can be another user: a search without an account was not tested")
    as_nobody = dict(user=NOBODYS_ID, group=NOBODYS_ID, extra_groups=[], cwd="/", capture_output=True, text=True)
    try:
        subprocess.run([sys.executable, "-c", "import torch"], check=True, **as_nobody)  # type: ignore[call-overload]
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("other users cannot run this Python: a search without an account was not tested")
    # Others may not enter pytest's own temporary folders.
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        _search_as_nobody(Path(name), as_nobody)


def _search_as_nobody(tmp_path: Path, as_nobody: dict[str, object]) -> None:
    tmp_path.chmod(0o711)
    (tmp_path / "tiny.toml").write_text(TINY_TOML)
    (tmp_path / "own").mkdir()
    os.chown(tmp_path / "own", NOBODYS_ID, NOBODYS_ID)
    line = f"--budget 1 --proxy-steps 1 --resolution 16 --space {tmp_path}/tiny.toml --device cpu --engine torchscript"
    command = [sys.executable, str(ROOT / "run_search.py"), *line.split(), "--latency-seconds", "0.1"]
    env = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path / "own")}
    done = subprocess.run(
        [*command, "--storage", f"sqlite:///{tmp_path}/own/study.db"], env=env, **as_nobody  # type: ignore[call-overload]
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "budget met: 1 of 1" in done.stdout
    assert "there is no home folder to write to" in done.stderr
