"""The packed wheel is one that pip installs."""

import subprocess
import sys
import zipfile
from pathlib import Path

from tuning.wheel import build_wheel


def test_pip_installs_the_wheel_and_it_is_the_running_code(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        archive.extractall(target)
    probe = "import mpc.errors, importlib.metadata as m; print(mpc.errors.__file__, m.version('mpc-cxr'))"
    out = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(target)!r}); {probe}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert str(target) in out
    import mpc.errors

    assert (target / "mpc" / "errors.py").read_bytes() == Path(mpc.errors.__file__).read_bytes()


def test_the_same_code_is_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    assert build_wheel(tmp_path).read_bytes() == build_wheel(tmp_path / "b").read_bytes()
