"""A graph that compares an exact and an accelerated run, and the pictures that the help pages make of it.

    python -m tests.host.help_pictures

runs it on a headless ComfyUI with the embedded ``tiny-df`` for every quality and renews the pictures and tables of the
help pages of Accelerate AR Video and Compare Runs.
"""

from __future__ import annotations

import sys
from typing import Any

from PIL import Image

from accel.presets import QUALITIES
from tests.host.comfy import PACK_ROOT, ComfyServer, find_comfy

DOCS = PACK_ROOT / "web" / "docs"
FRAMES, SHOWN, SCALE, GAP = 28, 7, 2, 4
START, END = "<!-- table -->", "<!-- end of table -->"


def comparison(model: str, frames: int, steps: int, ar_step: int, quality: str, cfg: float = 2.0) -> dict[str, Any]:
    """API-format graph: the same seed with quality exact and with ``quality``, decoded and compared.

    Node ``compare`` is Compare Runs, ``settings`` shows what was set, ``difference`` and ``plot`` save the pictures.
    """
    prompts = {
        "positive": ("ARVATinyPrompt", {"text": "red disc, blue square, gravity, pan"}),
        "negative": ("ARVATinyPrompt", {"text": ""}),
    }
    sampling = {
        "positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0], "seed": 7,
        "steps": steps, "cfg": cfg, "mode": "auto", "segment": 16, "overlap": 4, "block": 4, "ar_step": ar_step,
        "solver": "auto", "shift": 3.0, "history_noise": 0.0,
    }  # fmt: skip
    nodes = prompts | {
        "loader": ("UNETLoader", {"unet_name": model, "weight_dtype": "default"}),
        "latent": ("ARVATinyLatent", {"frames": frames, "width": 64, "height": 64, "batch_size": 1}),
        "codec": ("ARVATinyCodec", {}),
        "settings": ("PreviewAny", {"source": ["accelerate", 1]}),
    }
    for suffix, chosen in (("_exact", "exact"), ("", quality)):
        nodes["accelerate" + suffix] = ("ARVAAccelerate", {"model": ["loader", 0], "quality": chosen})
        nodes["sample" + suffix] = ("ARVASegmentSampler", {"model": ["accelerate" + suffix, 0], **sampling})
        nodes["decode" + suffix] = ("VAEDecode", {"samples": ["sample" + suffix, 0], "vae": ["codec", 0]})
    nodes["compare"] = (
        "ARVACompareRuns",
        {
            "reference": ["decode_exact", 0], "video": ["decode", 0], "gain": 8.0,
            "reference_timeline": ["sample_exact", 1], "timeline": ["sample", 1],
        },
    )  # fmt: skip
    for name, output in (("difference", 0), ("plot", 2)):
        nodes[name] = ("SaveImage", {"images": ["compare", output], "filename_prefix": f"{name}/frame"})
    for name in ("decode_exact", "decode"):
        nodes[f"{name}_saved"] = ("SaveImage", {"images": [name, 0], "filename_prefix": f"{name}/frame"})
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


def images(server: ComfyServer, entry: dict[str, Any], node: str) -> list[Image.Image]:
    """What a SaveImage node saved, in order."""
    saved = entry["outputs"][node]["images"]
    return [Image.open(server.output_dir / one["subfolder"] / one["filename"]) for one in saved]


def sheet(rows: list[list[Image.Image]]) -> Image.Image:
    """Every fourth frame or so of several videos, one row a video."""
    width, height = (SCALE * side for side in rows[0][0].size)
    picture = Image.new("RGB", (SHOWN * (width + GAP) - GAP, len(rows) * (height + GAP) - GAP), "white")
    for row, frames in enumerate(rows):
        for column in range(SHOWN):
            frame = frames[round(column * (len(frames) - 1) / (SHOWN - 1))].resize((width, height), Image.NEAREST)
            picture.paste(frame, (column * (width + GAP), row * (height + GAP)))
    return picture


def with_table(page: str, table: str) -> str:
    """The page with the table between its two marks replaced."""
    before, _, rest = page.partition(START)
    return f"{before}{START}\n\n{table}\n\n{END}{rest.partition(END)[2]}"


def row_of(table: str, name: str) -> str:
    """The last cell of one row of Compare Runs' table."""
    line = next(line for line in table.splitlines() if line.startswith(f"| {name} |"))
    return line.strip("| ").rpartition("|")[2].strip()


def qualities_table(tables: dict[str, str]) -> str:
    """FLOPs and closeness of every quality as Markdown; exact is the reference."""
    lines = ["| quality | fewer FLOPs | PSNR | SSIM |", "|-|-|-|-|", "| exact | 1.00x | equal | 1 |"]
    for quality, table in tables.items():
        lines.append(
            f"| {quality} | " + " | ".join(row_of(table, key) for key in ("FLOP ratio", "PSNR", "SSIM")) + " |"
        )
    return "\n".join(lines)


def renew(node: str, table: str, pictures: dict[str, Image.Image]) -> None:
    """Writes a help page's pictures and the table between its marks."""
    folder = DOCS / node
    for name, picture in pictures.items():
        picture.save(folder / name, optimize=True)
        print(node, name, (folder / name).stat().st_size, "bytes")
    page = folder / "en.md"
    page.write_text(with_table(page.read_text(encoding="utf-8"), table), encoding="utf-8")


def main() -> None:
    root = find_comfy()
    if root is None:
        sys.exit("No ComfyUI found; set COMFYUI_PATH.")
    tables, videos = {}, {}
    with ComfyServer(root) as server:
        for quality in QUALITIES[1:]:
            entry = server.run(comparison("tiny-df.safetensors", FRAMES, 50, 5, quality), 1800)
            (tables[quality],) = entry["outputs"]["compare"]["text"]
            videos["exact"] = images(server, entry, "decode_exact_saved")
            videos[quality] = images(server, entry, "decode_saved")
            print(entry["outputs"]["settings"]["text"][0], tables[quality], sep="\n\n", end="\n\n", flush=True)
        (plot,), difference = images(server, entry, "plot"), images(server, entry, "difference")
        compared = sheet([videos["exact"], videos["fast"], difference]).quantize(128)
        rows = sheet([videos[quality] for quality in QUALITIES]).quantize(128)
        renew("ARVACompareRuns", tables["fast"], {"plot.png": plot.quantize(32), "videos.png": compared})
        renew("ARVAAccelerate", qualities_table(tables), {"qualities.png": rows})


if __name__ == "__main__":
    main()
