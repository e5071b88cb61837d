"""The archive that the Registry would publish: what is in it, what is not, and what its scan would refuse."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomllib

from tests.publish import (
    MACHINE_PATH,
    ROOT,
    build_archive,
    node_ids,
    published_files,
    python_findings,
    script_findings,
)

MOST_FILES, MOST_MEBIBYTES = 280, 32
KINDS = {".py", ".js", ".css", ".json", ".md", ".toml", ".txt", ".svg", ".png", ".jpg", ".safetensors", ""}
DATA_KINDS = {".safetensors", ".png", ".jpg"}
REQUIRED = (
    "__init__.py", "LICENSE", "README.md", "pyproject.toml", "requirements.txt", "nodes/__init__.py",
    "accel/presets.json", "demo/weights/tiny-codec.safetensors", "demo/weights/diffusion_models/tiny-df.safetensors",
    "web/docs/ARVASegmentSampler/en.md", "locales/en/nodeDefs.json", "locales/zh/nodeDefs.json",
    "subgraphs/Accelerated AR video.json", "workflows/api/tiny_causal.json", "workflows/tiny_causal.jpg",
)  # fmt: skip


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive, unpacked."""
    if not (ROOT / ".git").exists():
        pytest.skip("PUBLISH TESTS SKIPPED: no git checkout, so what would be published is not known")
    folder = tmp_path_factory.mktemp("published")
    build_archive(folder / "pack.zip")
    with zipfile.ZipFile(folder / "pack.zip") as packed:
        packed.extractall(folder / "pack")
    return folder / "pack"


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def files(archive: Path, *suffixes: str) -> list[Path]:
    return sorted(path for path in archive.rglob("*") if path.is_file() and (not suffixes or path.suffix in suffixes))


def test_it_holds_what_the_pack_needs_and_nothing_of_its_workshop(archive: Path) -> None:
    names = [path.relative_to(archive).as_posix() for path in files(archive)]
    assert [name for name in REQUIRED if name not in names] == []
    folders = r"(^|/)(tests?|bench|headless|\.ci|\.github|training|output|__pycache__)/"
    workshop = re.compile(folders + r"|(^|/)train\w*\.py$|Makefile")
    assert [name for name in names if workshop.search(name)] == []
    assert {path.suffix for path in files(archive)} <= KINDS
    assert [name for name in published_files() if (ROOT / name).is_symlink()] == []


def test_its_size_is_bounded(archive: Path) -> None:
    count, size = len(files(archive)), sum(path.stat().st_size for path in files(archive)) / 2**20
    packed = (archive.parent / "pack.zip").stat().st_size / 2**20
    print(f"published: {count} files, {size:.1f} MiB, {packed:.1f} MiB packed")
    assert count <= MOST_FILES and size <= MOST_MEBIBYTES, f"{count} files, {size:.1f} MiB"


def test_its_python_does_nothing_that_the_registry_refuses(archive: Path) -> None:
    found = {
        path.relative_to(archive).as_posix(): findings
        for path in files(archive, ".py")
        if (findings := python_findings(path.read_text(encoding="utf-8")))
    }
    assert found == {}


def test_the_registrys_own_rules_find_nothing(archive: Path) -> None:
    ruff = Path(sys.executable).with_name("ruff")
    command = [str(ruff), "check", "--isolated", "--ignore-noqa", "--select", "S102,S307,E702", str(archive)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_its_javascript_is_written_by_hand(archive: Path) -> None:
    scripts = {path.name: script_findings(path.read_text(encoding="utf-8")) for path in files(archive, ".js", ".mjs")}
    assert {name: findings for name, findings in scripts.items() if findings} == {}


def test_it_names_no_machines_folders(archive: Path) -> None:
    texts = [path for path in files(archive) if path.suffix not in DATA_KINDS]
    assert [path.name for path in texts if MACHINE_PATH.search(path.read_text(encoding="utf-8"))] == []


def test_the_unpacked_library_works_on_its_own(archive: Path) -> None:
    code = (
        "import accel.presets, accel.compare, accel.sampling, demo.generate, demo.__main__;"
        "print(accel.presets.PRESETS.report('fast', 'tiny-df', 'frames'));"
        "print(sum(value.numel() for value in demo.generate.load('tiny-df').parameters()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=archive, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fast, for tiny-df") and int(done.stdout.split()[-1]) > 1e6


def test_node_ids_never_change(archive: Path, golden) -> None:
    """Saved workflows name them. A new node is added to the list; nothing is ever taken out of it."""
    ids = node_ids(archive / "nodes")
    assert ids == golden("node_ids") and len(ids) == len(set(ids))


def test_requirements_agree_and_leave_torch_to_comfyui(archive: Path, project: dict) -> None:
    lines = (archive / "requirements.txt").read_text(encoding="utf-8").splitlines()
    listed = sorted(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    assert listed == sorted(project["project"]["dependencies"])
    names = {re.split(r"[<>=~!\[; ]", line)[0].lower() for line in listed}
    assert not {name for name in names if name.startswith(("torch", "nvidia", "triton", "xformers"))}
    assert not [line for line in listed if "==" in line], "a pin breaks other packs"


def test_pyproject_has_what_the_registry_asks_for(archive: Path, project: dict) -> None:
    about, comfy = project["project"], project["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9_.-]{0,99}", about["name"]) and "comfyui" not in about["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", about["version"])
    assert about["description"] and about["requires-python"].startswith(">=3.")
    assert (archive / about["license"]["file"]).is_file() and (archive / about["readme"]).is_file()
    assert about["urls"]["Repository"].startswith("https://github.com/")
    assert any(line.startswith("Operating System ::") for line in about["classifiers"])
    assert comfy["PublisherId"] and comfy["DisplayName"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    assert "web" not in comfy, "WEB_DIRECTORY is set as well, and every script would load twice"


@pytest.mark.parametrize(
    ("source", "finding"),
    [
        ("import subprocess", "imports subprocess"),
        ("from urllib import request", "imports urllib"),
        ("def f():\n    import http.client as c", "imports http.client"),
        ("from torch.utils.cpp_extension import load", "imports torch.utils.cpp_extension"),
        ("from torch import load", "imports torch.load"),
        ("import ctypes; ctypes.CDLL('x')", "imports ctypes"),
        ("import os\nos.environ['A'] = 'b'", "writes os.environ"),
        ("import os\nos.environ.setdefault('A', 'b')", "calls os.environ.setdefault"),
        ("import os\ndel os.environ['A']", "writes os.environ"),
        ("import os\nos.system('x')", "calls os.system"),
        ("import os\nos.execv('x', [])", "calls os.execv"),
        ("eval('1')", "calls eval"),
        ("exec('1')", "calls exec"),
        ("torch.load('x')", "calls torch.load"),
        ("loss.backward()", "training: backward"),
        ("torch.optim.AdamW(p)", "training: optim"),
    ],
)
def test_the_scan_finds_what_it_looks_for(source: str, finding: str) -> None:
    assert any(found.partition(": ")[2].startswith(finding) for found in python_findings(source))


@pytest.mark.parametrize(
    "source",
    ['"subprocess.run and eval(x) in words"', "import os\nos.environ.get('A')", "model.eval()", "re.compile('x')",
     "from .http import x"],
)  # fmt: skip
def test_the_scan_leaves_harmless_code_alone(source: str) -> None:
    assert python_findings(source) == []


@pytest.mark.parametrize("source", ["x" * 500, "let a = 1;\n" * 9000, "eval('1')", "//# sourceMappingURL=a.js.map"])
def test_the_scan_finds_bundled_javascript(source: str) -> None:
    assert script_findings(source) and not script_findings("export const rows = 4;\n")


def test_the_archive_leaves_out_what_the_ignore_file_names(tmp_path: Path) -> None:
    for name in ("keep.py", "tests/a.py", "demo/train_x.py", "demo/keep.py", "untracked.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / ".comfyignore").write_text("# words\ntests/\ndemo/train*.py\n")
    for command in (["init", "-q"], ["add", "keep.py", "tests", "demo"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    assert published_files(tmp_path) == ["demo/keep.py", "keep.py"]
