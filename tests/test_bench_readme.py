import pytest

from bench import readme
from bench.methods import FEWER_STEPS


def entry(method, budget, ratio, psnr=30.0):
    return {
        "model": "tiny-df", "method": method, "budget": budget, "flop_ratio": ratio, "realised": 1.0, "psnr": psnr,
        "ssim": 0.9, "latent_rel_l2": 0.2,
    }  # fmt: skip


def test_each_row_has_the_nearest_run_with_fewer_steps_and_at_least_its_flops_beside_it():
    found = [
        [entry(FEWER_STEPS, budget, ratio)] for budget, ratio in ((2.0, 1.9), (3.0, 2.8), (4.0, 3.504), (5.0, 4.6))
    ]
    found += [[entry("high", None, 1.85)], [entry("auto", 2.5, 3.2)], [entry("balanced", None, 3.496)]]
    found += [[entry("auto", 4.0, 4.0)]]  # not shown
    told = [
        (group[0]["method"], group[0]["flop_ratio"]) for group in readme.chosen(found, readme.SHOWN["quality.json"])
    ]
    assert told == [("high", 1.85), (FEWER_STEPS, 2.8), ("auto", 3.2), (FEWER_STEPS, 3.504), ("balanced", 3.496)]


def test_a_table_has_the_means_and_names_the_model_once():
    rows = [entry("balanced", None, 3.5, psnr) for psnr in (30.0, 34.0)] + [entry(FEWER_STEPS, 4.0, 3.2, None)]
    lines = readme.made(rows, "quality.json").splitlines()[2:]
    assert lines == [
        "| tiny-df | fewer steps | 3.20x | 1.00 |  | 0.900 | 0.200 |",
        "|  | *balanced* | 3.50x | 1.00 | 32.00 (30.00 to 34.00) | 0.900 | 0.200 |",
    ]


def test_the_readme_has_the_tables_that_were_measured():
    text = readme.README.read_text(encoding="utf-8")
    assert readme.renewed(text) == text


def test_a_readme_without_the_place_for_a_table_is_refused():
    with pytest.raises(ValueError, match="README.md has no <!-- bench/results/quality.json -->"):
        readme.renewed("nothing")
