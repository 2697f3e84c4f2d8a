"""What ships: the wheel, installed where there is no checkout, finds all its files by name."""

import os
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vlm_sft_rl"
SHIPPED = ("recipes", "accelerate_configs", "eval")

pytestmark = pytest.mark.slow


def run(*command, cwd, **environment):
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    # PYTHONPATH stays: the build backend may come from it
    path = os.environ.get("PYTHONPATH", "")
    run(
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        folder,
        cwd=ROOT,
        PYTHONPATH=path,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The python of an environment that has this wheel and the tests' other packages, but not the checkout."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel,
        cwd=folder,
    )  # fmt: skip
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    # a path in a .pth file is searched, but its own .pth files are not read: an editable install does not leak in
    Path(own, "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return python


def shipped_files():
    for path in sorted(PACKAGE.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path, f"vlm_sft_rl/{path.relative_to(PACKAGE).as_posix()}"
    for name in SHIPPED:
        for path in sorted((ROOT / name).rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                yield path, f"vlm_sft_rl/_shipped/{path.relative_to(ROOT).as_posix()}"


def test_every_file_of_the_package_is_in_the_wheel_unchanged(wheel):
    with zipfile.ZipFile(wheel) as archive:
        inside = {name: archive.getinfo(name).file_size for name in archive.namelist()}
    absent = [name for path, name in shipped_files() if inside.get(name) != path.stat().st_size]
    assert absent == []
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in inside)
    ours = [name for name in inside if not name.startswith(("vlm_sft_rl/", "vlm_sft_rl-"))]
    assert ours == []


def test_it_is_the_wheel_that_is_imported(installed, tmp_path):
    where = run(installed, "-c", "import vlm_sft_rl; print(vlm_sft_rl.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(installed.parents[1])


def test_specs_recipes_and_configs_are_found_by_name_from_another_folder(installed, tmp_path):
    names = []
    for kind in SHIPPED:
        for path in sorted((ROOT / kind).rglob("*.yaml")):
            names.append((kind, path.relative_to(ROOT / kind).with_suffix("").as_posix()))
    assert ("eval", "pocket_captions") in names
    code = (
        "from vlm_sft_rl.recipes import find\n"
        "from pathlib import Path\n"
        f"for kind, name in {names!r}:\n"
        "    print(find(kind, name).resolve())\n"
    )
    found = run(installed, "-c", code, cwd=tmp_path).split()
    assert len(found) == len(names)
    assert all(Path(path).is_relative_to(installed.parents[1]) for path in found)


def test_specs_parse_and_reports_render_from_the_wheel(installed, tmp_path):
    code = (
        "from vlm_sft_rl.evaluation.specs import load_spec\n"
        "from vlm_sft_rl.evaluation.report import Text, render_report\n"
        "print(load_spec('pocket_captions').metric)\n"
        "render_report('Title', [Text('Heading', 'Some words.')], 'report.html')\n"
    )
    assert run(installed, "-c", code, cwd=tmp_path).split() == ["chair"]
    assert "Some words." in (tmp_path / "report.html").read_text()


def test_the_command_starts(installed, tmp_path):
    if not (PACKAGE / "cli/app.py").is_file():
        pytest.skip("cli/app.py is not written yet")
    text = run(installed.parent / "vlm-sft-rl", "--help", cwd=tmp_path)
    assert "eval" in text
