"""ComfyUI-Manager for test servers: its package, a channel of its own and a repository to clone, all on this machine.

Nothing reaches the network but the one pip call that fetches the package, and nothing is installed into the host: the
server finds the package on ``PYTHONPATH``, and pip inside the server only pretends (``PIP_DRY_RUN``).
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
from pathlib import Path

import tomllib

from tests.host.comfy import PACK_ROOT, comfy_python

NEEDS = ("GitPython", "gitdb", "smmap", "toml", "chardet")
CHANNEL = "https://channel.invalid/main"
LIST = "custom-node-list.json"


class ManagerUnavailable(RuntimeError):
    """The package of ComfyUI-Manager cannot be had here."""


def project() -> dict:
    return tomllib.loads((PACK_ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def repository_url() -> str:
    """Where users clone the pack from."""
    return project()["project"]["urls"]["Repository"]


def manager_package(comfy_root: Path, folder: Path) -> Path:
    """The folder with the host's own version of ComfyUI-Manager, fetched by pip where ``folder`` has it not yet.

    Raises:
        ManagerUnavailable: with what pip said.
    """
    pins = comfy_root / "manager_requirements.txt"
    pinned = re.search(r"^comfyui[_-]manager==(\S+)", pins.read_text() if pins.exists() else "", re.MULTILINE)
    if pinned is None:
        raise ManagerUnavailable("this ComfyUI names no version of ComfyUI-Manager")
    target = folder / pinned.group(1)
    if not (target / "comfyui_manager").exists():
        command = [
            str(comfy_python(comfy_root)),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(target),
        ]
        command += [f"comfyui-manager=={pinned.group(1)}", *NEEDS]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            shutil.rmtree(target, ignore_errors=True)
            raise ManagerUnavailable(f"pip could not fetch it: {done.stderr.strip()[-500:]}")
    return target


def bare_repository(folder: Path) -> Path:
    """A bare repository with one commit: this working tree as it is."""
    tree, bare = folder / "tree", folder / "pack.git"
    listed = _git(PACK_ROOT, "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    for name in filter(None, listed.split("\0")):
        source = PACK_ROOT / name
        if source.is_file() and not source.is_symlink():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, tree / name)
    _git(tree, "init", "--quiet", "--initial-branch=main")
    _git(tree, "add", "--all")
    _git(tree, "-c", "user.name=test", "-c", "user.email=test@test.invalid", "commit", "--quiet", "-m", "The pack")
    _git(folder, "clone", "--quiet", "--bare", str(tree), str(bare))
    return bare


def environment(package: Path, bare: Path, folder: Path) -> dict[str, str]:
    """For a server: Manager is found, the pack's public address leads to ``bare``, and pip changes nothing."""
    config = folder / "gitconfig"
    config.write_text(f'[url "file://{bare}"]\n\tinsteadOf = {repository_url()}\n[safe]\n\tdirectory = *\n')
    return {
        "PYTHONPATH": str(package),
        "GIT_CONFIG_GLOBAL": str(config),
        "GIT_CONFIG_NOSYSTEM": "1",
        "PIP_DRY_RUN": "1",
        "PIP_NO_INDEX": "1",
    }


def lay_out_manager(base: Path) -> None:
    """Settings and the channel's list, where Manager looks for them under the base directory ``base``."""
    files = base / "user" / "__manager"
    (files / "cache").mkdir(parents=True)
    settings = {
        "channel_url": CHANNEL,
        "network_mode": "offline",
        "security_level": "normal",
        "allow_git_url_install": "True",
        "use_uv": "False",
    }
    (files / "config.ini").write_text("[default]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()))
    (files / "channels.list").write_text(f"default::{CHANNEL}\n")
    about = project()
    entry = {
        "title": about["tool"]["comfy"]["DisplayName"],
        "author": about["tool"]["comfy"]["PublisherId"],
        "description": about["project"]["description"],
        "reference": repository_url(),
        "files": [repository_url()],
        "install_type": "git-clone",
    }
    cached = files / "cache" / f"{_cache_number(f'{CHANNEL}/{LIST}')}_{LIST}"
    cached.write_text(json.dumps({"custom_nodes": [entry]}))


def _cache_number(address: str) -> int:
    """The number that Manager's cache files begin with: the address in base 31, modulo 2**32."""
    return functools.reduce(lambda number, letter: (31 * number + ord(letter)) % 2**32, address, 0)


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout
