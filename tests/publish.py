"""What the Registry would publish, and what it or a user would refuse in it.

The archive is what git tracks minus what ``.comfyignore`` (gitignore syntax) leaves out. The checks read Python as a
syntax tree, so a word in a comment or a string is no finding.
"""

from __future__ import annotations

import ast
import re
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).absolute().parents[1]
FORBIDDEN_MODULES = {
    "aiohttp", "cloudpickle", "ctypes", "dill", "ftplib", "http", "httpx", "joblib", "marshal", "multiprocessing",
    "pickle", "pty", "requests", "shelve", "smtplib", "socket", "subprocess", "telnetlib", "urllib", "urllib3",
    "webbrowser", "xmlrpc",
}  # fmt: skip
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.putenv", "os.unsetenv", "os.startfile",
    "os.environ.update", "os.environ.setdefault", "os.environ.pop", "os.environ.clear", "os.environ.popitem",
    "torch.load", "torch.hub.load", "torch.utils.cpp_extension.load", "torch.utils.cpp_extension.load_inline",
    "torch.ops.load_library", "np.load", "numpy.load",
}  # fmt: skip
FORBIDDEN_PREFIXES = ("os.exec", "os.spawn", "os.fork", "os.posix_spawn")
TRAINING = {"backward", "optim"}
SCRIPT_LINE, SCRIPT_BYTES = 160, 60_000
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|work|Users|mnt)/\w")


def git(*arguments: str, root: Path = ROOT) -> list[str]:
    """Paths that a git command lists."""
    done = subprocess.run(["git", "-C", str(root), *arguments, "-z"], capture_output=True, check=True)
    return [path for path in done.stdout.decode().split("\0") if path]


def published_files(root: Path = ROOT) -> list[str]:
    """Paths of the archive, sorted."""
    left_out = git("ls-files", "--cached", "--ignored", f"--exclude-from={root / '.comfyignore'}", root=root)
    return sorted(set(git("ls-files", "--cached", root=root)) - set(left_out))


def build_archive(target: Path, root: Path = ROOT) -> list[str]:
    """Writes the archive as a zip file; returns its paths."""
    files = [path for path in published_files(root) if (root / path).is_file()]
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            archive.write(root / path, path)
    return files


def python_findings(source: str) -> list[str]:
    """What the Registry's scan or a careful user would object to, as ``line: what``."""
    return [f"{line}: {what}" for line, what in sorted(set(_findings(ast.parse(source))))]


def _findings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.split(".")[0] in FORBIDDEN_MODULES or "cpp_extension" in name or name in FORBIDDEN_CALLS:
                yield node.lineno, f"imports {name}"
        if isinstance(node, ast.Call):
            name = _dotted(node.func)
            if name in FORBIDDEN_CALLS or name.startswith(FORBIDDEN_PREFIXES):
                yield node.lineno, f"calls {name}"
        changed = isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del)
        if changed and _dotted(node.value) in ("os.environ", "environ"):
            yield node.lineno, "writes os.environ"
        if isinstance(node, ast.Attribute) and node.attr in TRAINING:
            yield node.lineno, f"training: {node.attr}"


def _dotted(node: ast.AST) -> str:
    """``a.b.c`` of a chain of attributes; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def script_findings(source: str) -> list[str]:
    """Signs of bundled, minified or generated JavaScript."""
    longest = max((len(line) for line in source.splitlines()), default=0)
    findings = [f"a line of {longest} characters"] * (longest > SCRIPT_LINE)
    findings += [f"{len(source.encode())} bytes"] * (len(source.encode()) > SCRIPT_BYTES)
    for sign in ("eval(", "new Function", "sourceMappingURL", "__webpack", "importScripts", "document.write("):
        findings += [f"holds {sign}"] * (sign in source)
    return findings


def node_ids(folder: Path) -> list[str]:
    """Every ``node_id`` that the node files name, sorted."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.py"))]
    keywords = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.keyword)]
    return sorted(
        word.value.value for word in keywords if word.arg == "node_id" and isinstance(word.value, ast.Constant)
    )
