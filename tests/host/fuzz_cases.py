"""Strategies for the inputs of nodes, made from what the nodes' own schemas say: legal values, edges, and nonsense.

Values are as ``fuzz_worker`` builds them: JSON, and dicts with the key ``$`` for what JSON cannot hold.
"""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

Described = dict[str, Any]
DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool", "complex64", "float8_e4m3fn")
FILLS = ("randn", "zeros", "half", "nan", "inf", "huge")
PREFIXES = (
    "ar", "folder/ar", "", ".", "..", "/", "../escape", "/tmp/arva-fuzz-escape", "a/../../b", "a\x00b", "CON", "nul.txt",
    "C:\\x", "..\\x", "a" * 300, "folder/" * 200 + "x", "\ud800", "文件/视频", "%year%/%date%", "a\nb", " ", "~/x", "ar/",
    "\u202egnp", "a:b*c?d", "-rf", "é" * 130, "x/\x00/y", "/dev/null", "/dev/null/x", "ar.json/x",
)  # fmt: skip
TEXTS = st.one_of(st.sampled_from(PREFIXES), st.text(max_size=40), st.text(st.characters(), max_size=8).map(lambda text: text * 60))
NUMBERS = st.one_of(
    st.sampled_from((-1, 0, 1, 2**31, 2**63, 2**64, -(2**63), 10**400, -1.5, 0.5, 1e-320, 1e300, math.nan, math.inf, -math.inf)),
    st.integers(-10, 10**6), st.floats(),
)  # fmt: skip
TENSOR = {"$": "tensor", "shape": [2]}
NONSENSE = st.one_of(
    NUMBERS, TEXTS,
    st.sampled_from((None, True, False, [], {}, [1, 2], ["4", 0], {"a": 1}, "nan", "1", "16.0", {"$": "weird"}, TENSOR)),
    st.sampled_from(({"$": "nested"}, {"$": "bytes", "text": "ar"}, {"$": "tensor", "values": 0.5})),
)  # fmt: skip
SIZES = st.one_of(st.integers(1, 6), st.sampled_from((0, 1, 7, 8)))
WIDE = st.sampled_from(([1, 16, 4096, 2, 2], [64, 16, 1, 2, 2], [1, 16, 2, 64, 64], [10**6, 16, 10**6, 10**4, 10**4]))


def widget(told: Described) -> st.SearchStrategy[Any]:
    """Legal values of a widget, its edges more often than chance has it."""
    kind, low, high = told["type"], told.get("min"), told.get("max")
    if kind == "INT":
        low, high = 0 if low is None else low, 2**63 if high is None else high
        edges = [value for value in (low, high, told.get("default")) if value is not None]
        return st.one_of(st.sampled_from(edges), st.integers(low, min(high, low + 8)), st.integers(low, high))
    if kind == "FLOAT":
        edges = [value for value in (low, high, told.get("default")) if value is not None]
        span = st.floats(low, high, allow_nan=False) if low is not None and high is not None else st.floats(0.0, 10.0)
        return st.one_of(st.sampled_from(edges or [1.0]), span)
    if kind == "BOOLEAN":
        return st.booleans()
    if kind == "COMBO":
        return st.sampled_from(told.get("options") or [""])
    if "prefix" in told["name"]:
        return st.one_of(st.just("ar"), st.sampled_from(PREFIXES), TEXTS)
    words = st.sampled_from(("red disc", "blue square", "gravity", "pan", "1", "0.5", "nan", "inf", "1e400", "still", ""))
    return st.one_of(st.just(told.get("default", "")), st.lists(words, max_size=5).map(", ".join), TEXTS)


def tensors(shapes: st.SearchStrategy[list[int]]) -> st.SearchStrategy[Any]:
    dtypes = st.one_of(st.just("float32"), st.sampled_from(DTYPES))
    return st.fixed_dictionaries(
        {"$": st.just("tensor"), "shape": shapes, "dtype": dtypes, "fill": st.one_of(st.just("randn"), st.sampled_from(FILLS))}
    )


ANY_SHAPE = st.lists(SIZES, min_size=0, max_size=6)
GOOD_VIDEO = st.tuples(st.integers(1, 2), st.just(16), st.integers(1, 6), st.sampled_from((2, 4, 5)), st.sampled_from((2, 4)))
VIDEO = st.one_of(GOOD_VIDEO, GOOD_VIDEO, st.tuples(SIZES, st.sampled_from((16, 1, 4, 48)), SIZES, SIZES, SIZES)).map(list)
WIDE_TENSOR = st.fixed_dictionaries({"$": st.just("tensor"), "shape": WIDE, "wide": st.just(True)})
MASKS = st.one_of(tensors(ANY_SHAPE), st.just({"$": "weird"}), st.just("mask"))
LATENT = st.one_of(
    st.fixed_dictionaries({"samples": tensors(VIDEO)}),
    st.fixed_dictionaries({"samples": tensors(VIDEO)}),
    st.fixed_dictionaries({"samples": st.one_of(tensors(ANY_SHAPE), WIDE_TENSOR, NONSENSE)}),
    st.fixed_dictionaries({"samples": tensors(VIDEO), "noise_mask": MASKS}),
    st.fixed_dictionaries({"samples": tensors(VIDEO), "batch_index": st.lists(st.integers(0, 3), min_size=1, max_size=2)}),
    st.sampled_from(({}, {"sample": TENSOR}, {"samples": None})),
)
TEXT_TENSOR = {"$": "tensor", "shape": [1, 64, 64], "fill": "randn"}
ENTRY = st.one_of(
    st.just([TEXT_TENSOR, {}]),
    st.tuples(tensors(st.sampled_from(([1, 64, 64], [2, 3, 64], [1, 1, 64], [1, 0, 64], [1, 64], [1, 8, 63], [64]))),
              st.sampled_from(({}, {"arva_segment": 1}, {"arva_segment": "x"}, {"arva_segment": -1}, {"strength": 0.5}))).map(list),
    st.sampled_from(([TEXT_TENSOR], [TEXT_TENSOR, None], [None, {}], TEXT_TENSOR, None, "x", [], [TEXT_TENSOR, {}, {}])),
)  # fmt: skip
CONDITIONING = st.one_of(st.just([[TEXT_TENSOR, {}]]), st.lists(ENTRY, max_size=3))
IMAGE_SHAPE = st.one_of(
    st.tuples(st.integers(1, 3), st.sampled_from((1, 2, 8, 13)), st.sampled_from((1, 2, 8, 13)), st.sampled_from((3, 3, 4, 1))),
    st.tuples(st.integers(1, 3), st.just(8), st.just(8), st.just(3)),
).map(list)
IMAGE = st.one_of(tensors(IMAGE_SHAPE), tensors(st.just([2, 8, 8, 3])), tensors(ANY_SHAPE))
FALLING = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4, unique=True).map(lambda v: [*sorted(v, reverse=True), 0.0])
LEVELS = st.one_of(FALLING, FALLING, st.lists(st.one_of(st.floats(), st.floats(-1.0, 2.0)), max_size=5), FALLING.map(lambda v: v[::-1]))
SIGMAS = st.one_of(
    st.fixed_dictionaries({"$": st.just("tensor"), "values": LEVELS, "dtype": st.sampled_from(("float32", "float64", "float16"))}),
    st.fixed_dictionaries({"$": st.just("tensor"), "values": st.sampled_from(([[1.0, 0.0]], 1.0, [1.0, 0.0])), "dtype": st.sampled_from(DTYPES)}),
)  # fmt: skip
TIMELINE = st.fixed_dictionaries({"$": st.just("timeline"), "records": st.integers(0, 4), "number": st.sampled_from((0.5, math.nan, math.inf, 1e308))})
VAE = st.sampled_from(({"$": "vae", "kind": "tiny"}, {"$": "vae", "kind": "tiny"}, {"$": "vae", "kind": "image"}))
MODEL = st.one_of(
    st.fixed_dictionaries({"$": st.just("model"), "kind": st.sampled_from(("frames", "causal")), "fuel": st.sampled_from((0, 0, 1, 9, 60))}),
    st.fixed_dictionaries({"$": st.just("model"), "kind": st.sampled_from(("image", "other", "frames", "causal"))}),
)  # fmt: skip


class Cases:
    """Strategies of one host's nodes.

    Args:
        nodes: what ``FuzzHost.nodes`` holds.
    """

    def __init__(self, nodes: dict[str, Described]) -> None:
        self.nodes = nodes
        self.chains = [name for name, told in nodes.items() if told["outputs"][:1] == ["MODEL"] and self._takes(told)]

    @staticmethod
    def _takes(told: Described) -> bool:
        return any(one["type"] == "MODEL" for one in told["inputs"])

    def value(self, told: Described) -> st.SearchStrategy[Any]:
        """What an input may well be given."""
        kinds = {
            "LATENT": LATENT, "CONDITIONING": CONDITIONING, "IMAGE": IMAGE, "SIGMAS": SIGMAS, "VAE": VAE,
            "ARVA_TIMELINE": TIMELINE, "ARVA_STREAM": st.deferred(self._stream), "MODEL": st.deferred(self.models),
        }  # fmt: skip
        if told["type"] in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
            return widget(told)
        return kinds.get(told["type"], NONSENSE)

    def inputs(self, node: str) -> st.SearchStrategy[dict[str, Any]]:
        """Inputs of a node: mostly legal, up to three of them nonsense, optional ones there or not."""
        told = {one["name"]: one for one in self.nodes[node]["inputs"]}
        legal = {name: self.value(one) for name, one in told.items() if not one["optional"]}
        some = {name: self.value(one) for name, one in told.items() if one["optional"]}
        wrong = st.lists(st.tuples(st.sampled_from(sorted(told)), NONSENSE), max_size=3) if told else st.just([])
        few = st.one_of(st.just([]), st.just([]), wrong)
        return st.builds(lambda given, bad: given | dict(bad), st.fixed_dictionaries(legal, optional=some), few)

    def models(self) -> st.SearchStrategy[Any]:
        """A model, often behind one of the pack's own nodes with legal inputs."""
        return st.one_of(MODEL, *(self._behind(node) for node in self.chains))

    def _behind(self, node: str) -> st.SearchStrategy[Any]:
        told = {one["name"]: MODEL if one["type"] == "MODEL" else self.value(one) for one in self.nodes[node]["inputs"]}
        return st.fixed_dictionaries({"$": st.just("node"), "node": st.just(node), "inputs": st.fixed_dictionaries(told)})

    def _stream(self) -> st.SearchStrategy[Any]:
        told = {one["name"]: self.value(one) for one in self.nodes["ARVAStreamSegments"]["inputs"]}
        told |= {"filename_prefix": st.sampled_from(("ar", "folder/ar", "é" * 40))}
        required = {name: strategy for name, strategy in told.items() if name != "vae"}
        given = st.fixed_dictionaries(required, optional={"vae": VAE})
        return given.map(lambda inputs: {"$": "node", "node": "ARVAStreamSegments", "inputs": inputs})
