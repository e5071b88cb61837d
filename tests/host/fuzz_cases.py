"""Strategies for the inputs of nodes, made from what the nodes' own schemas say: legal values, edges, and nonsense.

Values are as ``fuzz_worker`` builds them: JSON, and dicts with the key ``$`` for what JSON cannot hold.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

from hypothesis import strategies as st

Described = dict[str, Any]
DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool", "complex64", "float8_e4m3fn")
FILLS = ("randn", "zeros", "half", "nan", "inf", "huge")
PREFIXES = (
    "ar", "folder/ar", "", ".", "..", "/", "../escape", "/arva-escape", "a/../../b", "a\x00b", "CON",
    "nul.txt", "C:\\x", "..\\x", "a" * 300, "folder/" * 200 + "x", "\ud800", "文件/视频", "%year%/%date%", "a\nb",
    " ", "~/x", "ar/", "\u202egnp", "a:b*c?d", "-rf", "é" * 130, "x/\x00/y", "/dev/null", "/dev/null/x", "ar.json/x",
)  # fmt: skip
LONG_TEXT = st.text(st.characters(), max_size=8).map(lambda text: text * 60)
TEXTS = st.one_of(st.sampled_from(PREFIXES), st.text(max_size=40), LONG_TEXT)
ODD_NUMBERS = (
    -1,
    0,
    1,
    2**31,
    2**63,
    2**64,
    -(2**63),
    10**400,
    -1.5,
    0.5,
    1e-320,
    1e300,
    math.nan,
    math.inf,
    -math.inf,
)
NUMBERS = st.one_of(st.sampled_from(ODD_NUMBERS), st.integers(-10, 10**6), st.floats())
TENSOR, WEIRD = {"$": "tensor", "shape": [2]}, {"$": "weird"}
THINGS = (None, True, False, [], {}, [1, 2], ["4", 0], {"a": 1}, "nan", "1", "16.0", WEIRD, TENSOR, {"$": "nested"})
MORE_THINGS = (
    {"$": "bytes", "text": "ar"},
    {"$": "tensor", "values": 0.5},
    {"$": "timeline"},
    {"$": "vae", "kind": "tiny"},
)
NONSENSE = st.one_of(NUMBERS, TEXTS, st.sampled_from(THINGS), st.sampled_from(MORE_THINGS))
SIZES = st.one_of(st.integers(1, 6), st.sampled_from((0, 1, 7, 8)))
RUNS = {
    "steps": (1, 2, 3, 8), "cfg": (1.0, 1.0, 2.0, 0.0), "mode": ("auto", "auto", "auto", "next clip"),
    "shift": (0.0, 3.0), "segment": (4, 4, 6, 16), "overlap": (0, 2), "block": (1, 2, 2), "ar_step": (0, 1, 2),
    "history_noise": (0.0, 0.0, 0.1), "history_guidance": (0.0, 0.0, 0.0, 1.0, 0.5), "every": (1, 2),
    "solver": ("auto", "auto", "euler", "unipc", "re-noise"),
    "coefficients": ("1, 0", "2, 0.5, 0"), "from_segment": (1, 2), "sink": (0, 1), "recent": (0, 1),
    "offload": (0, 0, 1), "budget": (2.0, 4.0, 21.0), "unit": ("latent frames", "latent frames", "GB"),
    "filename_prefix": ("ar", "folder/ar"), "context": (0, 1, 4),
}  # fmt: skip
"""Values that fit each other, of widgets that have to."""


WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def widget(told: Described) -> st.SearchStrategy[Any]:
    """Legal values of a widget, its edges more often than chance has it."""
    kind, low, high = told["type"], told.get("min"), told.get("max")
    edges = [value for value in (low, high, told.get("default")) if value is not None]
    if kind == "INT":
        low, high = 0 if low is None else low, 2**63 if high is None else high
        return st.one_of(st.sampled_from(edges or [low]), st.integers(low, min(high, low + 8)))
    if kind == "FLOAT":
        span = st.floats(low, high, allow_nan=False) if low is not None and high is not None else st.floats(0.0, 10.0)
        return st.one_of(st.sampled_from(edges or [1.0]), span)
    if kind == "BOOLEAN":
        return st.booleans()
    if kind == "COMBO":
        return st.sampled_from(told.get("options") or [""])
    if "prefix" in told["name"]:
        return TEXTS
    words = ("red disc", "blue square", "gravity", "pan", "1", "0.5", "nan", "inf", "1e400", "still", "")
    return st.one_of(st.lists(st.sampled_from(words), max_size=5).map(", ".join), TEXTS)


def fields(**strategies: Any) -> st.SearchStrategy[dict[str, Any]]:
    """A dict with these keys; what is no strategy stays as it is, and ``of`` stands for ``$``."""
    return st.fixed_dictionaries(
        {
            "$" if key == "of" else key: value if isinstance(value, st.SearchStrategy) else st.just(value)
            for key, value in strategies.items()
        }
    )


def tensors(shapes: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Tensors of any dtype and content."""
    dtypes, fills = st.one_of(st.just("float32"), st.sampled_from(DTYPES)), st.sampled_from(("randn", "randn", *FILLS))
    return fields(of="tensor", shape=shapes.map(list), dtype=dtypes, fill=fills)


def floats(shapes: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Tensors of ordinary content."""
    return fields(of="tensor", shape=shapes.map(list), fill=st.sampled_from(("randn", "zeros")))


ANY_SHAPE = st.lists(SIZES, min_size=0, max_size=6)
GOOD_SHAPE = st.tuples(
    st.integers(1, 2), st.just(16), st.sampled_from((2, 4, 4, 6)), st.sampled_from((2, 4, 5)), st.just(4)
)
VIDEO_SHAPE = st.one_of(GOOD_SHAPE, st.tuples(SIZES, st.sampled_from((16, 1, 4, 48)), SIZES, SIZES, SIZES))
WIDE = ([1, 16, 4096, 2, 2], [64, 16, 1, 2, 2], [1, 16, 2, 64, 64], [10**5, 16, 10**5, 10**3, 10**3])
GOOD_LATENT = fields(samples=floats(GOOD_SHAPE))
ODD_LATENT = st.one_of(
    fields(samples=tensors(VIDEO_SHAPE)),
    fields(samples=tensors(ANY_SHAPE)),
    fields(samples=fields(of="tensor", shape=st.sampled_from(WIDE), wide=True)),
    fields(samples=NONSENSE),
    fields(samples=floats(GOOD_SHAPE), noise_mask=st.one_of(tensors(ANY_SHAPE), st.just(WEIRD), st.just("mask"))),
    fields(samples=floats(GOOD_SHAPE), batch_index=st.lists(st.integers(0, 3), min_size=2, max_size=2)),
    st.sampled_from(({}, {"sample": TENSOR}, {"samples": None})),
)
TEXT = {"$": "tensor", "shape": [1, 64, 64], "fill": "randn"}
GOOD_PROMPT = st.sampled_from(([[TEXT, {}]], [[TEXT, {}]], [[TEXT, {}], [TEXT, {"arva_segment": 1}]]))
TEXT_SHAPES = st.sampled_from(([1, 64, 64], [2, 3, 64], [1, 1, 64], [1, 0, 64], [1, 64], [1, 8, 63], [64], []))
OPTIONS = st.sampled_from(({}, {"arva_segment": 1}, {"strength": 0.5}, {"pooled_output": TENSOR}))
BROKEN = ([TEXT], [TEXT, None], [None, {}], TEXT, None, "x", [], [TEXT, {}, {}])
ODD_PROMPT = st.lists(
    st.one_of(st.tuples(tensors(TEXT_SHAPES), OPTIONS).map(list), st.sampled_from(BROKEN)), max_size=3
)
GOOD_IMAGE = floats(st.just([2, 8, 8, 3]))
SIDES = st.sampled_from((1, 2, 8, 13))
IMAGE_SHAPE = st.tuples(st.integers(1, 3), SIDES, SIDES, st.sampled_from((3, 4, 1)))
ODD_IMAGE = st.one_of(
    tensors(st.just([2, 8, 8, 3])), tensors(ANY_SHAPE),
    tensors(IMAGE_SHAPE),
)  # fmt: skip
FALLING = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4, unique=True).map(lambda v: [*sorted(v)[::-1], 0.0])
ODD_LEVELS = st.one_of(
    st.lists(st.one_of(st.floats(), st.floats(-1.0, 2.0)), max_size=5), FALLING.map(lambda v: v[::-1])
)
SHAPED_LEVELS = st.one_of(ODD_LEVELS, st.sampled_from(([[1.0, 0.0]], 1.0, [1.0, 0.0], [1.0, 0.5, 0.5, 0.0])))
GOOD_SIGMAS = fields(of="tensor", values=FALLING)
ODD_SIGMAS = fields(of="tensor", values=SHAPED_LEVELS, dtype=st.sampled_from(DTYPES))
GOOD_TIMELINE = fields(of="timeline", records=st.integers(0, 4))
ODD_TIMELINE = fields(of="timeline", records=3, number=st.sampled_from((math.nan, math.inf, 1e308)))
GOOD_VAE, ODD_VAE = st.just({"$": "vae", "kind": "tiny"}), st.just({"$": "vae", "kind": "image"})
GOOD_MODEL = fields(of="model", kind=st.sampled_from(("frames", "causal")), fuel=st.sampled_from((0, 0, 1, 9, 60)))
ODD_MODEL = fields(of="model", kind=st.sampled_from(("image", "other")))
VALUES = {
    "LATENT": (GOOD_LATENT, ODD_LATENT), "CONDITIONING": (GOOD_PROMPT, ODD_PROMPT), "IMAGE": (GOOD_IMAGE, ODD_IMAGE),
    "SIGMAS": (GOOD_SIGMAS, ODD_SIGMAS), "VAE": (GOOD_VAE, ODD_VAE), "ARVA_TIMELINE": (GOOD_TIMELINE, ODD_TIMELINE),
}  # fmt: skip


class Cases:
    """Strategies of one host's nodes.

    Args:
        nodes: what ``FuzzHost.nodes`` holds.
    """

    def __init__(self, nodes: dict[str, Described]) -> None:
        self.nodes = nodes
        self.chains = [
            name
            for name, told in nodes.items()
            if told["outputs"][:1] == ["MODEL"] and any(one["type"] == "MODEL" for one in told["inputs"])
        ]

    def good(self, told: Described) -> st.SearchStrategy[Any]:
        """What an input is made for."""
        kind, name = told["type"], told["name"]
        fitting = [value for value in RUNS.get(name, ()) if kind != "COMBO" or value in told["options"]]
        if fitting:
            return st.sampled_from(fitting)
        if kind in ("MODEL", "ARVA_STREAM"):
            return self.models if kind == "MODEL" else self.streams
        if kind in ("INT", "FLOAT", "STRING") and "default" in told:
            default = st.just(told["default"])
            return st.one_of(default, default, widget(told)) if kind == "INT" else default
        return VALUES[kind][0] if kind in VALUES else widget(told) if kind in WIDGETS else NONSENSE

    def odd(self, told: Described) -> st.SearchStrategy[Any]:
        """What an input may be given all the same: its edges, what is like it, and anything."""
        if told["type"] in WIDGETS:
            return st.one_of(widget(told), widget(told), NONSENSE)
        if told["type"] == "MODEL":
            return st.one_of(ODD_MODEL, NONSENSE)
        odd = VALUES.get(told["type"], (None, NONSENSE))[1]
        return st.one_of(odd, odd, odd, NONSENSE)

    def inputs(self, node: str) -> st.SearchStrategy[dict[str, Any]]:
        """Inputs of a node: what they are made for, but for up to three; optional ones there or not."""
        told = {one["name"]: one for one in self.nodes[node]["inputs"]}
        needed = {name: self.good(one) for name, one in told.items() if not one["optional"]}
        more = {name: self.good(one) for name, one in told.items() if one["optional"]}
        good = st.fixed_dictionaries(needed, optional=more)
        if not told:
            return good
        change = st.sampled_from(sorted(told)).flatmap(lambda name: st.tuples(st.just(name), self.odd(told[name])))
        changes = st.sampled_from((0, 1, 1, 1, 2, 3)).flatmap(lambda n: st.lists(change, min_size=n, max_size=n))
        return st.builds(lambda given, odd: given | dict(odd), good, changes)

    @cached_property
    def models(self) -> st.SearchStrategy[Any]:
        """A model, often behind one of the pack's own nodes."""
        return st.one_of(GOOD_MODEL, *(self._behind(node, GOOD_MODEL) for node in self.chains))

    @cached_property
    def streams(self) -> st.SearchStrategy[Any]:
        """The output of Stream Segments."""
        return self._behind("ARVAStreamSegments")

    def _behind(self, node: str, model: st.SearchStrategy[Any] | None = None) -> st.SearchStrategy[Any]:
        """The first output of a node that is given what its inputs are made for."""
        told = self.nodes[node]["inputs"]
        inputs = {one["name"]: model if one["type"] == "MODEL" else self.good(one) for one in told}
        return fields(of="node", node=node, inputs=st.fixed_dictionaries(inputs))
