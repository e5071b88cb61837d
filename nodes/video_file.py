"""A video file that grows piece by piece and can be played at every moment, also after the process was killed.

Each piece is encoded for itself, from its own key frame, and appended as fragments (MP4) or clusters (Matroska) in one
write, so the file always ends where a piece ended, or with a torn piece that players leave out. Going on after a cut
means to cut the file at the end of a known piece.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path

import av
import torch
from torch import Tensor

FORMATS = {"mp4": "mp4", "mkv": "matroska"}
CODEC, QUALITY = "h264", "18"
FRAGMENTS = "frag_keyframe+empty_moov+default_base_moof+frag_discont+skip_trailer"
CLUSTER = b"\x1f\x43\xb6\x75"


class VideoFile:
    """An H.264 video of 8-bit frames.

    Args:
        path: ends in .mp4 or .mkv. fps: frames a second, above 0.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self.rate = path, Fraction(round(fps * 1000), 1000)
        self.kind = path.suffix.removeprefix(".")

    def append(self, images: Tensor, first: int) -> int:
        """Encodes images ``[F, H, W, 3]`` in [0, 1] as frames ``first`` and on; returns the file's size.

        An odd last row or column is left out, which H.264 cannot hold.
        """
        data = self._encode(images, first)
        if first:
            data = data[self._header(data) :]
        with self.path.open("ab" if first else "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            return file.tell()

    def holds(self, size: int) -> bool:
        """Whether the file has at least ``size`` bytes."""
        return self.path.is_file() and self.path.stat().st_size >= size

    def cut(self, size: int) -> None:
        """Leaves the first ``size`` bytes, the end of a piece."""
        with self.path.open("r+b") as file:
            file.truncate(size)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Rewrites the container, not the frames, with its length and its index, so that players can seek at once, and
        with ``metadata``. After that nothing can be appended."""
        partial = self.path.with_name(self.path.stem + ".part" + self.path.suffix)
        options = {"movflags": "faststart+use_metadata_tags"} if self.kind == "mp4" else {}
        try:
            with av.open(str(self.path)) as source, av.open(str(partial), "w", options=options) as target:
                target.metadata.update(metadata)
                stream = target.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(source.streams.video[0]):
                    if packet.dts is not None:
                        packet.stream = stream
                        target.mux(packet)
            os.replace(partial, self.path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def _encode(self, images: Tensor, first: int) -> bytes:
        """The pieces as a file of its own, with time stamps that go on from the frames before."""
        height, width = (side // 2 * 2 for side in images.shape[1:3])
        options = {"live": "1"}
        if self.kind == "mp4":
            options = {"movflags": FRAGMENTS, "avoid_negative_ts": "disabled", "fragment_index": str(first + 1)}
        buffer = io.BytesIO()
        with av.open(buffer, "w", format=FORMATS[self.kind], options=options) as container:
            stream = container.add_stream(CODEC, rate=self.rate, options={"crf": QUALITY, "bf": "0"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for number, image in enumerate(images[:, :height, :width, :3], first):
                pixels = (image * 255.0).clamp(0, 255).to("cpu", torch.uint8)
                frame = av.VideoFrame.from_ndarray(pixels.numpy(), format="rgb24")
                frame.pts, frame.time_base = number, 1 / self.rate
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return buffer.getvalue()

    def _header(self, data: bytes) -> int:
        """Where the header, which only the first piece brings along, ends."""
        if self.kind == "mkv":
            return data.index(CLUSTER, len(CLUSTER))
        return next(start for name, start in boxes(data) if name == b"moof")


def boxes(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Name and place of every top-level box of an MP4 file."""
    start = 0
    while start + 8 <= len(data):
        yield data[start + 4 : start + 8], start
        start += int.from_bytes(data[start : start + 4], "big") or len(data)
