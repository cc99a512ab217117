"""What the pages show is made of result files: sections, tables, the README's chart."""

import copy
import json
from pathlib import Path

import pytest

from benchmarks.pages import __main__ as pages
from benchmarks.pages import (
    chart,
    decoding,
    identity,
    real_making,
    training,
    training_chart,
    vocabulary,
)

ROOT = Path(__file__).parents[2]


def test_section_is_made_from_the_files(tmp_path):
    facts = {
        "date": "2026-01-01",
        "machine": {"processor": "A", "cores": 2, "memory_gib": 8},
        "versions": {"vllm": "0.32.0"},
        "settings": {"num_speculative_tokens": 5, "wide": "350M", "per_kind": 10},
    }
    found = {
        "requests": 7,
        "identical": 6,
        "by_kind": {"vqa": {"acceptance_length": 3.25}},
        "multimodal": {"acceptance_length": None},
        "speed": {
            "plain_tokens_per_second": 10.0,
            "msd_tokens_per_second": 15.5,
            "speedup": 1.55,
        },
    }
    demo = {**facts, "small": found, "wide": None}
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (folder / "demo.json").write_text(json.dumps(demo))
    section = pages.section("docs/results.md", tmp_path)
    assert "| vqa | 3.25 |" in section
    assert "| small pair, fp32 | 10.00 | 15.50 | 1.55x | 6 of 7 |" in section
    assert "2026-01-01; A, 2 cores, 8 GiB; vllm 0.32.0" in section
    assert (
        "widened to" not in section and "## Trees" not in section and "Losslessness" not in section
    )


def test_section_of_trees():
    drafting = "tree of 7 nodes, depth 4, top-k 2"
    length = {"acceptance_length": 4.5}
    text = decoding.trees(
        "trees.json",
        {
            "date": "2026-01-01",
            "machine": {"cores": 2},
            "versions": {"vllm": "0.32.0"},
            "settings": {"size": "1B", "dtype": "bfloat16"},
            "acceptance": {
                drafting: {"all": length, "multimodal": length, "identical": 6, "requests": 7}
            },
            "speed": {
                "plain_tokens_per_second": 4.0,
                "draftings": {drafting: {**length, "msd_tokens_per_second": 9.0, "speedup": 2.25}},
            },
            "products": {
                "milliseconds_by_rows": {
                    "target": {"1": 50.0, "8": 64.0},
                    "draft": {"1": 2.0, "8": 3.0},
                },
                "milliseconds_per_verification": {"no speculation": 50.0, drafting: 75.0},
            },
            "profile": {
                "drafting": drafting,
                "milliseconds_per_step": {"target": 80.0},
                "drafting_and_settling_share": 0.125,
            },
        },
    )
    assert f"| {drafting} | 4.50 | 4.50 | 6 of 7 |" in text
    assert f"| {drafting} | 4.50 | 9.00 | 2.25x |" in text
    assert "| target, ms | 50.00 | 64.00 |" in text and f"| {drafting} | 75.00 | 60.00 |" in text
    assert "| target | 80.00 |" in text and "12.5% of it" in text


def test_kinds_of_training_stand_under_their_heads():
    def counted(**lengths):
        return {"lengths": {k: [v] for k, v in lengths.items()}, "at_depth": [[0.75, 0.5]]}

    in_vllm = counted(vqa=4.0, chart=2.0, multimodal=3.0, all=3.0)
    offline = counted(chart=2.0, vqa=4.0, multimodal=3.0, all=3.0)
    text = training.training(
        "benchmarks/results/training.json",
        {
            "date": "2026-01-01",
            "machine": {"cores": 2},
            "versions": {"vllm": "0.32.0"},
            "settings": {"num_prompts": 7, "seeds": [0], "steps": 9},
            "summary": {"msd": {"eval": offline, "vllm": in_vllm}},
            "runs": [{"identical": 6, "requests": 7}],
        },
    )
    assert "| draft | with images | chart | vqa |" in text
    assert "| `msd` | 3.00 (3.00 to 3.00) | 2.00 | 4.00 |" in text
    assert "6 of 7 answers" in text


def of_walks():
    """A result file of `benchmarks/training_evidence.py` with walks: a variant that vLLM counted,
    and one that it cannot serve, whose second seed had nothing accepted at depth 2."""

    def counted(length, *at_depth):
        lengths = {"walk": [length], "multimodal": [length], "all": [length]}
        return {"lengths": lengths, "at_depth": list(at_depth)}

    settings = {"num_prompts": 7, "num_walks": 3, "walks": 40, "records": 50}
    return {
        "date": "2026-01-01",
        "machine": {"cores": 2},
        "versions": {"vllm": "0.32.0"},
        "settings": {**settings, "seeds": [0, 1], "steps": 9, "num_speculative_tokens": 2},
        "summary": {
            "three-step": {
                "eval": counted(3.0, [0.75, 0.5], [0.75, 0.5]),
                "vllm": counted(3.0, [0.75, 0.5], [0.75, 0.5]),
            },
            "three-step-dropped": {"eval": counted(2.0, [0.75, 0.5], [0.25])},
        },
        "walks": {
            "requests": 6,
            "sorts": {
                "charts": {"own": [0.75, 0.5], "other": [0.25, 0.0]},
                "signs": {"own": [1.0], "other": [0.5]},
            },
        },
        "runs": [
            {"identical": 10, "requests": 10, "trained_on": "one", "variant": "a", "seed": 0},
            {"identical": None, "requests": 10, "trained_on": "other", "variant": "a", "seed": 1},
        ],
    }


def test_section_of_walks():
    text = training.training_walk("benchmarks/results/training_walk.json", of_walks())
    assert "| charts | own | 75% | 50% |" in text and "| signs | other | 50% | - |" in text
    assert "10 held-out questions; 2 seeds of 9 steps" in text and "10 of 10 answers" in text
    assert "| `three-step-dropped` | 0.50 | 0.25 |" in text
    assert "pictures/training_walk.svg" in text
    assert "Trained, with the seed, on one: a 0; on other: a 1." in text


def test_sections_and_chart_of_the_real_pair(tmp_path):
    facts = {"date": "2026-01-01", "machine": {"cores": 2}, "versions": {"vllm": "0.32.0"}}
    kinds = {"right": 0.75, "random_guess": 0.25, "wrong_image": 0.5}
    target = {
        **facts,
        "settings": {"per_kind": 4},
        "accuracy": {"vqa": kinds, "easy-vqa": {**kinds, "questions": 26}},
        "slots": {"vision": {"all": 0.75}, "answers": {"all": 0.5}},
        "walks": {"sorts": {"signs": {"own": [1.0, 0.75], "other": [0.5, 0.25]}}},
        "perplexity": {"replies": 9, "before": 3.0, "after": 3.06, "change": 0.02},
    }
    text = real_making.target(real_making.TARGET, target)
    assert "| vqa | 0.75 | 0.25 | 0.50 |" in text and "(26 of `easy-vqa`'s own test" in text
    assert "reads 75.0% of held-out slots" in text and "signs 0.75; with another" in text
    assert "3.060 (+2.0%)" in text

    def length(value):
        return {"acceptance_length": value}

    def draft(**seen):
        text = {"all": length(2.5), "kinds": {"chat": length(2.75), "question": length(1.5)}}
        learning = [{"records": 32 * n, "acceptance_length": 1.0 + n} for n in (1, 2)]
        return {"text": text, "minutes": 7.0, "learning": learning, **seen}

    shown = {seen: {"vqa": length(3.0 - n)} for n, seen in enumerate(("own", "other", "grey"))}
    drafts = {
        **facts,
        "settings": {"prompts": 11, "per_kind": 4},
        "variants": {"text": draft(), "final": draft(**shown)},
    }
    text = real_making.drafts(real_making.DRAFTS, drafts)
    assert "| final | 64 | 7 | 2.75 | 1.50 | 2.50 |" in text
    assert "`final` on 4 held-out" in text and "`text` on" not in text
    assert "| vqa | 3.00 | 2.00 | 1.00 |" in text
    content = real_making.content(drafts)
    assert content == {"records": [32, 64], "lengths": [2.0, 3.0]}
    real_making.draw(content, tmp_path / "chart.svg")
    assert chart.shows(tmp_path / "chart.svg", content)


def test_chart_of_training_names_what_vllm_cannot_serve(tmp_path):
    content = training_chart.content(of_walks())
    rows = content["comparisons"]["Visual rows, three steps"]
    assert list(rows) == ["three-step", "three-step-dropped (vllm-msd eval)"]
    assert list(content["comparisons"]) == ["Visual rows, three steps"]  # one variant is no contest
    training_chart.draw(content, tmp_path / "chart.svg")
    assert chart.shows(tmp_path / "chart.svg", content)


def test_section_and_chart_of_draft_vocabularies(tmp_path):
    def draft(size, accepted, speed):
        return {
            "draft_vocab_size": size,
            "acceptance_length": 2.0,
            "accepted_of_whole": accepted,
            "tokens_per_second": 40.0,
            "speedup_over_none": 1.5,
            "speedup_over_whole": speed,
        }

    result = {
        "date": "2026-01-01",
        "machine": {"cores": 2},
        "versions": {"vllm": "0.32.0"},
        "settings": {"num_prompts": 20, "rounds": 2, "max_tokens": 96},
        "drafting": "chain of 5",
        "dtype": "bfloat16",
        "drafts": {"as it comes": draft(8192, 0.97, 1.21), "whole": draft(None, 1.0, 1.0)},
    }
    text = vocabulary.vocabulary("vocabulary.json", result)
    assert "| 8,192 (as it comes) | 2.00 | 97.0% | 40.0 | 1.50x | 1.21x |" in text
    assert "keeps 97.0% of the accepted tokens and decodes 1.21 times as fast" in text
    content = vocabulary.content(result)
    assert content["sizes"] == ["8,192", "all"] and content["speed"] == [1.21, 1.0]
    vocabulary.draw(content, tmp_path / "chart.svg")
    assert chart.shows(tmp_path / "chart.svg", content)


def test_section_of_training_time():
    text = training.training_time(
        "training_time.json",
        {
            "date": "2026-01-01",
            "machine": {"cores": 2},
            "versions": {"vllm": "0.32.0"},
            "settings": {"size": "350M", "dtype": "bfloat16", "batch_size": 8, "threads": 2},
            "cases": [
                {
                    "draft_steps": 1,
                    "seconds": {"data": 1.0, "target": 6.0, "draft": 1.0},
                    "tokens_per_second": 99.0,
                }
            ],
        },
    )
    assert "| drafting steps | data | target | draft | tokens/s |" in text
    assert "| 1 | 12.5% | 75.0% | 12.5% | 99.00 |" in text


def test_section_of_long_runs():
    origin = {"date": "2026-01-01", "machine": {"cores": 2}, "versions": {"vllm": "0.32.0"}}
    counts = {"aborted": 5, "preemptions": 9.0, "accepted": 70, "rejected": 60, "other_children": 8}
    run = {"provenance": origin, "kind": "llava", "requests": 40, "used_blocks": 0, **counts}
    trial = {"wrong_rule": "none", "temperature": 0.7, "top_p": 1.0, "top_k": 6, "min_p": 0.0}
    trials = [{**trial, "draws": 100, "positions": [{"p": 0.5}, {"p": p}]} for p in (0.125, 0.25)]
    text = identity.soak(
        "results/soak.json",
        {
            "identity-v2-async": {
                **run, "runner": "v2", "scheduler": "AsyncScheduler", "mismatches": [{}],
            },
            "draws-v1": {"provenance": origin, "runner": "v1", "trials": trials},
            "soak": {
                **run, "runner": "v1", "mismatches": [], "memory_growth_mib": 1.5,
                "plain_memory_growth_mib": 1.25,
                "curve": {"memory_mib": [900.0, 901.4]},
            },
        },
    )  # fmt: skip
    assert "| V2 | LLaVA, async scheduling | 39 of 40 | 5 | 9 | 70 | 60 | 8 |" in text
    assert "| V1 | MSD | temperature 0.7, top-k 6 | 200 | 0.12 |" in text
    assert "grew by 1.5 MiB of 901 " in text and "speculation by 1.25;" in text
    assert "`results/soak.png`" in text


def test_section_of_odd_inputs():
    origin = {"date": "2026-01-01", "machine": {"cores": 2}, "versions": {"vllm": "0.32.0"}}
    settings = {"seed": 20, "examples": 2000}
    report = {"provenance": {**origin, "settings": settings}, "left_out": 1991}
    report |= {"statuses": {"200": 9, "400": 1.5}, "ended": False, "held": [1, 2]}
    text = identity.faults("faults.json", {"config-fuzz": report})
    outcome = "left out: 1991, statuses 200: 9, statuses 400: 1.50, ended: no, held: 2"
    assert f"| config fuzz | 2000 | 20 | {outcome} |" in text
    assert "`faults.json`, 2026-01-01; 2 cores;" in text


def test_a_page_without_markers_is_refused():
    with pytest.raises(SystemExit, match="markers"):
        pages.updated("nothing here", pages.section("README.md"))


def test_chart_of_other_figures_is_out_of_date(tmp_path):
    demo, trees = map(pages.read, chart.SOURCES)
    content = chart.content(demo, trees)
    other = copy.deepcopy(trees)
    other["speed"]["plain_tokens_per_second"] += 1
    assert not chart.shows(tmp_path / "chart.svg", content)
    chart.draw(content, tmp_path / "chart.svg")
    assert chart.shows(tmp_path / "chart.svg", content)
    assert not chart.shows(tmp_path / "chart.svg", chart.content(demo, other))
