"""Runs the real ComfyUI as a headless server around this pack, so that tests talk to the host users have.

`find_comfy` says where the host is, `ComfyServer` starts it on a loopback port with a throwaway base directory whose
``custom_nodes`` links to this pack: nothing is written into the host or the pack.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp

PACK_NAME = "ar-video-accelerator"
PACK_ROOT = Path(__file__).absolute().parents[2]
MODEL_FOLDERS = ("checkpoints", "diffusion_models", "loras", "text_encoders", "vae")
SERVER_ARGS = ("--cpu", "--use-pytorch-cross-attention", "--disable-api-nodes", "--disable-auto-launch")
START_SECONDS = 300.0
POLL_SECONDS = 0.05


class PromptError(RuntimeError):
    """A prompt was refused or failed. ``details`` holds what the server said: node errors or the execution error."""

    def __init__(self, message: str, details: dict[str, Any]) -> None:
        super().__init__(message)
        self.details = details


class PromptInterrupted(PromptError):
    """The prompt was stopped by `ComfyServer.interrupt`."""


def find_comfy() -> Path | None:
    """The ComfyUI root: ``COMFYUI_PATH``, else the host this pack is installed in, else ``~/comfy/ComfyUI``.

    Raises:
        FileNotFoundError: ``COMFYUI_PATH`` is set to a folder that holds no ComfyUI.
    """
    chosen = os.environ.get("COMFYUI_PATH")
    if chosen:
        root = Path(chosen).expanduser().absolute()
        if not _is_comfy(root):
            raise FileNotFoundError(f"COMFYUI_PATH is {chosen!r}, which holds no ComfyUI (no main.py and comfy/).")
        return root
    hosts = [pack.parents[1] for pack in (PACK_ROOT, PACK_ROOT.resolve()) if pack.parent.name == "custom_nodes"]
    return next((root for root in [*hosts, Path.home() / "comfy" / "ComfyUI"] if _is_comfy(root)), None)


def comfy_python(root: Path) -> Path:
    """The host's own interpreter when it has a ``.venv``, else the one running now."""
    candidates = (root / ".venv" / "bin" / "python", root / ".venv" / "Scripts" / "python.exe")
    return next((path for path in candidates if path.exists()), Path(sys.executable))


def make_base_directory(base: Path, packs: Sequence[Path]) -> list[Path]:
    """Lays out a ComfyUI base directory whose ``custom_nodes`` links to ``packs``; returns the links.

    This pack is linked under its published name, others under their folder's. What is there already stays.
    """
    for folder in MODEL_FOLDERS:
        (base / "models" / folder).mkdir(parents=True, exist_ok=True)
    for folder in ("custom_nodes", "input", "output", "temp", "user"):
        (base / folder).mkdir(exist_ok=True)
    links = []
    for pack in packs:
        link = base / "custom_nodes" / (PACK_NAME if pack == PACK_ROOT else pack.name)
        if not link.is_symlink():
            link.symlink_to(pack.absolute())
        links.append(link)
    return links


def host_environment() -> dict[str, str]:
    """This process's environment without what would leak its packages into the host; one thread, no downloads."""
    leaks = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    inherited = {name: value for name, value in os.environ.items() if name not in leaks}
    return {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **inherited}


class ComfyServer:
    """A headless ComfyUI for the length of a ``with`` block.

    Args:
        root: the ComfyUI checkout.
        packs: custom node packs to link in; this one by default.
        extra_args: further command-line flags for ``main.py``.
        start_seconds: how long the server may take until it answers.
        base: a base directory to use and to keep, for a server that is started again; a throwaway one by default.
        environment: what to set for the server besides this process's environment.
    """

    def __init__(
        self,
        root: Path,
        packs: Sequence[Path] = (PACK_ROOT,),
        extra_args: Sequence[str] = (),
        start_seconds: float = START_SECONDS,
        base: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.root = root
        self.packs = tuple(packs)
        self.extra_args = tuple(extra_args)
        self.start_seconds = start_seconds
        self.kept_base = base
        self.environment = dict(environment or {})
        self.client_id = uuid.uuid4().hex
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._events: list[dict[str, Any]] = []
        self._changed = threading.Condition()

    def __enter__(self) -> ComfyServer:
        self._folder = tempfile.TemporaryDirectory(prefix="comfy-test-", ignore_cleanup_errors=True)
        self.base = (self.kept_base or Path(self._folder.name)).resolve()
        self._process: subprocess.Popen[bytes] | None = None
        self._listener: Listener | None = None
        try:
            if not (self.base / "custom_nodes").exists():
                make_base_directory(self.base, self.packs)
            self._start()
            self._listener = self.listen(self.client_id, self._record)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    @property
    def url(self) -> str:
        return f"http://{self._address}"

    @property
    def output_dir(self) -> Path:
        return self.base / "output"

    @property
    def input_dir(self) -> Path:
        return self.base / "input"

    @property
    def models_dir(self) -> Path:
        """Put a checkpoint into ``models_dir / "diffusion_models"`` and the server lists it at once."""
        return self.base / "models"

    @property
    def events(self) -> list[dict[str, Any]]:
        """Every websocket message so far, oldest first: ``{"type", "data"}``; previews are ``"binary"`` with bytes."""
        with self._changed:
            return list(self._events)

    def events_of(self, prompt_id: str, kind: str | None = None) -> list[dict[str, Any]]:
        """The ``data`` of this prompt's messages, of one ``kind`` or of all."""
        return [
            event["data"]
            for event in self.events
            if isinstance(event["data"], dict)
            and event["data"].get("prompt_id") == prompt_id
            and kind in (None, event["type"])
        ]

    def get(self, path: str) -> bytes:
        """The body of a GET; raises `urllib.error.HTTPError` for what the server refuses."""
        return self._request(path)

    def get_json(self, path: str) -> Any:
        return json.loads(self._request(path))

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        """The schemas of all nodes by id, or of one node (empty when the server lacks it)."""
        return self.get_json(f"/object_info/{node}" if node else "/object_info")

    def queue(self, prompt: dict[str, Any], client_id: str | None = None) -> str:
        """Queues an API-format graph, of this client or another one, and returns its id.

        Raises:
            PromptError: the server refused the graph, or any output node of it.
        """
        try:
            answer = json.loads(self._request("/prompt", {"prompt": prompt, "client_id": client_id or self.client_id}))
        except urllib.error.HTTPError as error:
            answer = json.loads(error.read())
        if answer.get("error") or answer.get("node_errors"):
            raise PromptError(_refusal(answer), answer)
        return answer["prompt_id"]

    def run(self, prompt: dict[str, Any], timeout: float = 120.0) -> dict[str, Any]:
        """Queues an API-format graph, waits for it, and returns its history entry with ``prompt_id`` added.

        Raises:
            PromptError: refused, or failed in a node; `PromptInterrupted` when it was interrupted.
            TimeoutError: not done after ``timeout`` seconds; the prompt is then interrupted.
        """
        return self.wait(self.queue(prompt), timeout)

    def wait(self, prompt_id: str, timeout: float = 120.0) -> dict[str, Any]:
        """Waits for a queued prompt; returns and raises as `run` does."""
        deadline = time.monotonic() + timeout
        while (entry := self.history(prompt_id)) is None:
            self._check_alive()
            if time.monotonic() > deadline:
                self.interrupt(prompt_id)
                raise TimeoutError(f"Prompt {prompt_id} was not done after {timeout:g} s.\n{self._log_tail()}")
            time.sleep(POLL_SECONDS)
        self._wait_for_last_event(prompt_id)
        _raise_failure(entry)
        return {**entry, "prompt_id": prompt_id}

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """The prompt's history entry, or None while it is queued or running."""
        return self.get_json(f"/history/{prompt_id}").get(prompt_id)

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Stops the running prompt (when given, only if it is that one)."""
        self._request("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def delete(self, *prompt_ids: str) -> None:
        """Takes prompts that wait out of the queue; one that runs already goes on."""
        self._request("/queue", {"delete": list(prompt_ids)})

    def listen(self, client_id: str, record: Callable[[dict[str, Any]], None]) -> Listener:
        """A websocket of a client of its own; ``record`` gets its messages, as ``events`` has them."""
        return Listener(f"ws://{self._address}/ws?clientId={client_id}", record)

    def resident_bytes(self) -> int:
        """Main memory that the server's process takes."""
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def kill(self, sign: signal.Signals) -> None:
        """Ends the server's process with a signal and waits for it."""
        self._process.send_signal(sign)
        self._process.wait(30)

    def free(self) -> None:
        """Has the server drop its node cache and unload its models before the next prompt."""
        self._request("/free", {"unload_models": True, "free_memory": True})

    def log(self) -> str:
        """All the server wrote so far, without colour codes."""
        text = self._log_path.read_text(errors="replace") if self._log_path.exists() else ""
        return re.sub(r"\x1b\[[0-9;]*m", "", text)

    def failed_imports(self) -> list[str]:
        """The nodes files and packs that core's loader gave up on; the reasons are in `log`."""
        return re.findall(r"IMPORT FAILED\)?: (.+)", self.log())

    @property
    def _log_path(self) -> Path:
        return self.base / "server.log"

    def _start(self) -> None:
        port = _free_port()
        self._address = f"127.0.0.1:{port}"
        command = [str(comfy_python(self.root)), str(self.root / "main.py"), *SERVER_ARGS]
        command += ["--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(self.base)]
        command += ["--database-url", f"sqlite:///{self.base / 'comfyui.db'}", *self.extra_args]
        environment = {**host_environment(), **self.environment}
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=self.base, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + self.start_seconds
        while not self._answers():
            self._check_alive()
            if time.monotonic() > deadline:
                raise TimeoutError(f"ComfyUI did not answer within {self.start_seconds:g} s.\n{self._log_tail()}")
            time.sleep(POLL_SECONDS)

    def _stop(self) -> None:
        if self._listener is not None:
            self._listener.stop()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._folder.cleanup()

    def _answers(self) -> bool:
        try:
            self._request("/system_stats")
        except OSError:
            return False
        return True

    def post_json(self, path: str, payload: dict[str, Any]) -> bytes:
        """The body of the answer to a POST; raises `urllib.error.HTTPError` for what the server refuses."""
        return self._request(path, payload)

    def _request(self, path: str, payload: dict[str, Any] | None = None) -> bytes:
        body = None if payload is None else json.dumps(payload).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        with self._opener.open(request, timeout=60) as response:
            return response.read()

    def _record(self, event: dict[str, Any]) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()

    def _wait_for_last_event(self, prompt_id: str) -> None:
        """The server sends ``executing`` without a node after it wrote the history."""

        def arrived() -> bool:
            last = {"type": "executing", "data": {"node": None, "prompt_id": prompt_id}}
            return last in self._events

        with self._changed:
            if not self._changed.wait_for(arrived, timeout=10):
                raise TimeoutError(f"The websocket never reported the end of prompt {prompt_id}.\n{self._log_tail()}")

    def _check_alive(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            raise RuntimeError(f"ComfyUI ended with exit code {self._process.returncode}.\n{self._log_tail()}")

    def _log_tail(self, lines: int = 60) -> str:
        return "\n".join(["--- end of the server's log ---", *self.log().splitlines()[-lines:]])


class Listener:
    """Reads the server's websocket on a thread of its own; connected once constructed."""

    def __init__(self, url: str, record: Callable[[dict[str, Any]], None]) -> None:
        self._url = url
        self._record = record
        self._loop = asyncio.new_event_loop()
        self._connected = threading.Event()
        self._thread = threading.Thread(target=self._run, name="comfy-events", daemon=True)
        self._thread.start()
        if not self._connected.wait(30):
            raise TimeoutError(f"No websocket connection to {url}.")

    def stop(self) -> None:
        with suppress(RuntimeError):  # the server has ended, and with it the loop
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(10)

    def _run(self) -> None:
        self._task = self._loop.create_task(self._listen())
        try:
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            pass
        finally:
            self._loop.close()

    async def _listen(self) -> None:
        async with aiohttp.ClientSession() as session, session.ws_connect(self._url, max_msg_size=0) as socket_:
            self._connected.set()
            async for message in socket_:
                if message.type == aiohttp.WSMsgType.TEXT:
                    content = json.loads(message.data)
                    self._record({"type": content["type"], "data": content.get("data")})
                elif message.type == aiohttp.WSMsgType.BINARY:
                    self._record({"type": "binary", "data": message.data})


def _is_comfy(root: Path) -> bool:
    return (root / "main.py").is_file() and (root / "comfy").is_dir()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _refusal(answer: dict[str, Any]) -> str:
    error = answer.get("error") or {}
    lines = [f"The server refused the prompt: {error.get('message', 'an output node is invalid')}"]
    if error.get("details"):
        lines.append(str(error["details"]))
    lines += [
        f"node {node_id} ({found.get('class_type')}): {reason['message']} ({reason.get('details')})"
        for node_id, found in (answer.get("node_errors") or {}).items()
        for reason in found["errors"]
    ]
    return "\n".join(lines)


def _messages(entry: dict[str, Any], kind: str) -> Iterator[dict[str, Any]]:
    return (data for name, data in entry["status"]["messages"] if name == kind)


def _raise_failure(entry: dict[str, Any]) -> None:
    if entry["status"]["status_str"] == "success":
        return
    for details in _messages(entry, "execution_interrupted"):
        raise PromptInterrupted(f"Interrupted in node {details.get('node_id')}.", details)
    details = next(_messages(entry, "execution_error"), {})
    where = f"node {details.get('node_id')} ({details.get('node_type')})"
    what = f"{details.get('exception_type')}: {details.get('exception_message')}"
    raise PromptError(f"{where} failed with {what}\n{''.join(details.get('traceback', []))}", details)
