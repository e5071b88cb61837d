"""What a user reads on the nodes, over the real server: names, tooltips, few widgets at first sight, two languages."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.host.comfy import PACK_ROOT, ComfyServer
from tests.host.locale_tables import FILES, LOCALES, inputs_of, leaves, node_texts, our_nodes, read

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
CATEGORIES = {"AR Video", "AR Video/tiny"}
VISIBLE = 5
PLACEHOLDER = re.compile(r"\{[^}]*\}|%\w*%?")
SPECIAL = re.compile(r"[{}@|]")
CHINESE = re.compile(r"[\u4e00-\u9fff]")
SAME_IN_CHINESE = {"Latent", "Sigmas", "VAE", "JSON"}
LATIN_WORDS = re.compile(r"[A-Za-z][\w/-]*")


@pytest.fixture(scope="module")
def nodes(server: ComfyServer) -> dict[str, dict[str, Any]]:
    return our_nodes(server)


def widgets(info: dict[str, Any]) -> list[tuple[str, Any, dict[str, Any]]]:
    """Inputs that are drawn as widgets."""
    return [
        (name, kind, options)
        for name, kind, options in inputs_of(info)
        if (isinstance(kind, list) or kind in WIDGETS) and not options.get("forceInput")
    ]


def test_the_nodes_are_those_of_the_frozen_list(nodes: dict[str, dict[str, Any]], golden: Callable[[str], Any]) -> None:
    assert list(nodes) == golden("node_ids")


def test_every_node_is_named_described_and_found_by_other_words(nodes: dict[str, dict[str, Any]]) -> None:
    for node_id, info in nodes.items():
        assert info["category"] in CATEGORIES, node_id
        assert info["display_name"] and not info["display_name"].startswith("ARVA"), node_id
        assert info["description"].endswith("."), node_id
        aliases = info["search_aliases"]
        assert len(aliases) >= 2 and all(alias == alias.lower() for alias in aliases), node_id
        assert info["display_name"].lower() not in aliases, node_id
    names = Counter(info["display_name"] for info in nodes.values())
    assert names.most_common(1)[0][1] == 1, names


def test_display_names_are_nobody_elses(server: ComfyServer, nodes: dict[str, dict[str, Any]]) -> None:
    others = {info["display_name"] for name, info in server.object_info().items() if name not in nodes}
    assert not others & {info["display_name"] for info in nodes.values()}


def test_every_input_and_output_has_a_tooltip(nodes: dict[str, dict[str, Any]]) -> None:
    bare = [path for path, text in leaves(node_texts(nodes)) if not text]
    assert bare == []
    assert all(text.endswith(".") for path, text in leaves(node_texts(nodes)) if path[-1] == "tooltip")


def test_few_widgets_are_visible_and_the_others_are_advanced(nodes: dict[str, dict[str, Any]]) -> None:
    for node_id, info in nodes.items():
        visible = [name for name, _, options in widgets(info) if not options.get("advanced")]
        assert len(visible) <= VISIBLE, (node_id, visible)
    shown = [name for name, _, options in widgets(nodes["ARVASegmentSampler"]) if not options.get("advanced")]
    assert shown == ["seed", "steps", "cfg", "mode", "segment"]
    chosen = [(name, bool(options.get("advanced"))) for name, _, options in widgets(nodes["ARVAAccelerate"])]
    assert chosen == [("quality", False), ("target_db", True)]


def test_defaults_are_allowed_values(nodes: dict[str, dict[str, Any]]) -> None:
    for node_id, info in nodes.items():
        for name, kind, options in widgets(info):
            default = options.get("default")
            if kind in ("INT", "FLOAT"):
                assert options["min"] <= default <= options["max"], (node_id, name)
            elif kind == "COMBO" or isinstance(kind, list):
                choices = kind if isinstance(kind, list) else options["options"]
                assert default in choices and len(set(choices)) == len(choices), (node_id, name)


def test_every_node_has_a_help_page_that_begins_with_its_name(nodes: dict[str, dict[str, Any]]) -> None:
    for node_id, info in nodes.items():
        page = (PACK_ROOT / "web" / "docs" / node_id / "en.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {info['display_name']}\n"), node_id
        pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
        assert pictures, node_id
        for picture in pictures:
            size = (PACK_ROOT / "web" / "docs" / node_id / picture).stat().st_size
            assert 0 < size < 200_000, (node_id, picture)
    documented = {path.name for path in (PACK_ROOT / "web" / "docs").iterdir()}
    assert documented == set(nodes), "help pages of nodes that do not exist"


def test_english_texts_are_the_schemas(nodes: dict[str, dict[str, Any]]) -> None:
    assert read("en", "nodeDefs") == node_texts(nodes), "run python -m tests.host.locale_tables"


@pytest.mark.parametrize("name", FILES)
def test_chinese_has_every_key_and_no_other(name: str) -> None:
    english, chinese = dict(leaves(read("en", name))), dict(leaves(read("zh", name)))
    assert english.keys() == chinese.keys()
    for path, text in english.items():
        assert sorted(PLACEHOLDER.findall(text)) == sorted(PLACEHOLDER.findall(chinese[path])), path
        assert chinese[path].strip() == chinese[path] != "", path
        assert CHINESE.search(chinese[path]) or chinese[path] in SAME_IN_CHINESE, path


def test_texts_hold_no_character_that_the_frontends_messages_reserve() -> None:
    for language in ("en", "zh"):
        for name in FILES:
            assert [path for path, text in leaves(read(language, name)) if SPECIAL.search(text)] == []


def test_choices_named_in_a_tooltip_are_named_in_chinese_too(nodes: dict[str, dict[str, Any]]) -> None:
    """Options of a combo are not translated, so a translated tooltip must name them as they are."""
    chinese, seen = read("zh", "nodeDefs"), 0
    for node_id, info in nodes.items():
        for name, kind, options in widgets(info):
            choices = kind if isinstance(kind, list) else options.get("options", [])
            words = set(LATIN_WORDS.findall(options["tooltip"])) & set(choices)
            translated = chinese[node_id]["inputs"][name]["tooltip"]
            assert all(word in translated for word in words), (node_id, name)
            seen += len(words)
    assert seen > 10


def test_categories_and_types_are_translated(nodes: dict[str, dict[str, Any]]) -> None:
    used = {part for info in nodes.values() for part in info["category"].split("/")}
    sockets = {kind for info in nodes.values() for _, kind, _ in inputs_of(info) if str(kind).startswith("ARVA")}
    for language in ("en", "zh"):
        main = read(language, "main")
        assert main["nodeCategories"].keys() == used
        assert main["dataTypes"].keys() == sockets


def test_settings_and_commands_of_the_frontend_are_translated() -> None:
    code = (PACK_ROOT / "web" / "timeline.js").read_text(encoding="utf-8")
    (setting,) = re.findall(r'const TOASTS = "(.*?)"', code)
    (command, label), (name,) = (
        re.findall(r'id: "(.*?)", label: "(.*?)"', code)[0],
        re.findall(r'name: "(Tell.*?)"', code),
    )
    assert read("en", "settings")[setting.replace(".", "_")]["name"] == name
    assert read("en", "commands")[command.replace(".", "_")]["label"] == label


def test_comfyui_serves_both_languages(server: ComfyServer) -> None:
    served = server.get_json("/i18n")
    for language in sorted(path.name for path in LOCALES.iterdir()):
        assert served[language]["nodeDefs"] == read(language, "nodeDefs")
        assert served[language]["nodeCategories"] == read(language, "main")["nodeCategories"]
