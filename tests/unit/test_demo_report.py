"""The demo's figures and its report, from made-up answers: no engine here."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image

from vllm_msd.demo.real.run import RealFigures
from vllm_msd.demo.report.page import render
from vllm_msd.demo.report.real import real_section
from vllm_msd.demo.report.tree_picture import tells, tree_svg
from vllm_msd.demo.samples import HeldOutSample, held_out_samples
from vllm_msd.measure import compare
from vllm_msd.measure.compare import PLAIN, Comparison
from vllm_msd.measure.engine import Answer, Drafting, VerifiedTree

PROVENANCE = {
    "date": "2030-01-02 03:04 UTC",
    "command": "vllm-msd demo run",
    "settings": {"wide": "350M", "wide_dtype": "bfloat16"},
    "machine": {"processor": "a <fast> one"},
    "versions": {"vllm": "0.32.0"},
}
DRAFTINGS = {"chain": Drafting(5), "tree": Drafting(8, 3, 2)}
TEXTS = [" the", " red", " blue", " <b>", " dot", " box", " is", " big", " small", "</s>"]
#         root          0: red          1: blue     below blue: <b>, dot        below dot: box
TREE = VerifiedTree([0, 1, 2, 3, 4, 5], [-1, 0, 0, 2, 2, 4], [0, 2, 4], [2, 4, 6], 1)


def _answer(pieces: list[str], accepted: list[bool], drafts: int = 2, seconds: float = 1.0):
    return Answer(
        token_ids=[hash(p) % 1000 for p in pieces],
        pieces=pieces,
        accepted=accepted,
        steps=[(1, 0.1), (len(pieces) - 1, 0.1 + seconds)],
        num_drafts=drafts,
        num_draft_tokens=5 * drafts,
        num_accepted_tokens=sum(accepted),
        accepted_per_position=[sum(accepted), 0, 0, 0, 0],
        finish_reason="stop",
    )


def _comparison(one: HeldOutSample, chain: Answer, plain: Answer | None = None) -> Comparison:
    tree = replace(chain, trees=[TREE])
    fast, slow = (10, 0.5), (10, 1.0)
    timings = [
        {PLAIN: slow, "chain": fast, "tree": slow},
        {PLAIN: (10, 3.0), "chain": (10, 1.5), "tree": (10, 1.5)},
    ]
    return Comparison(one, {PLAIN: plain or chain, "chain": chain, "tree": tree}, timings)


@pytest.fixture
def comparisons() -> list[Comparison]:
    shown, *_, text = held_out_samples(7)
    nasty = HeldOutSample(
        [Image.new("RGB", (4, 4), "red")],
        [
            {
                "role": "user",
                "content": [
                    {"type": "image"},
                    {"type": "text", "text": "1 < 2 & <script>x</script>"},
                ],
            },
        ],
        "vqa",
        "yes",
        shown.answer_key,
    )
    first = _answer([" A", " <b>", " bold", " end"], [False, True, True, False])
    second = _answer([" red", " one"], [False, False])
    other = _answer([" blue", " one"], [False, False])
    return [_comparison(nasty, first), _comparison(text, second, other)]


def test_figures(comparisons):
    found = compare.figures(comparisons, "chain")
    assert (found["requests"], found["identical"], found["tokens"]) == (2, 1, 6)
    assert found["by_kind"]["vqa"]["acceptance_length"] == 2.0  # 2 accepted in 2 verifications
    assert found["by_kind"]["text"]["acceptance_length"] == 1.0
    assert found["multimodal"]["acceptance_length"] == 2.0
    assert found["all"]["acceptance_length"] == 1.5
    assert found["all"]["acceptance_rate_per_position"] == [0.5, 0, 0, 0, 0]
    speed = found["speed"]
    assert speed["plain_tokens_per_second"] == pytest.approx(40 / 8)
    assert speed["speedup"] == pytest.approx(2)
    assert speed["speedup_per_round"] == pytest.approx([2, 2])
    assert compare.figures(comparisons, "tree")["speed"]["speedup_per_round"] == [1, 2]
    assert compare.rates(comparisons, "chain") == pytest.approx([20, 20 / 3])


def test_no_drafts_is_not_an_acceptance_length():
    nothing = compare.acceptance([_answer([" a", " b"], [False, False], drafts=0)])
    assert nothing["acceptance_length"] is None and nothing["verifications"] == 0


def test_answer_times():
    answer = _answer([" a", " b", " c"], [False, True, False], seconds=2.0)
    assert (answer.decode_tokens, answer.prefill_seconds) == (2, 0.1)
    assert answer.decode_seconds == pytest.approx(2.0)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"misplaced </{tag}>"


def _page(comparisons: list[Comparison], names=("chain", "tree"), with_wide=False) -> str:
    draftings = {name: DRAFTINGS[name] for name in names}
    found = {name: compare.figures(comparisons, name) for name in names}
    wide = found if with_wide else None
    return render(comparisons, found, wide, draftings, PROVENANCE, TEXTS.__getitem__)


@pytest.mark.parametrize("with_wide", [True, False])
@pytest.mark.parametrize("names", [("chain",), ("chain", "tree")])
def test_page_is_whole_escaped_and_self_contained(comparisons, names, with_wide):
    html = _page(comparisons, names, with_wide)
    page = _Page()
    page.feed(html)
    assert page.open == []
    assert "script" not in page.tags and "b" in page.tags
    assert "1 &lt; 2 &amp; &lt;script&gt;" in html and "a &lt;fast&gt; one" in html
    assert page.sources and all(s.startswith("data:image/png;base64,") for s in page.sources)
    assert ("Widened pair" in html) is with_wide
    assert ("tree of 8 nodes" in html) is ("tree" in names)
    assert "Acceptance comes from the small pair" in html
    assert not re.search(r"\$[a-z_]+", html), "a placeholder was not filled"


def test_accepted_tokens_are_marked(comparisons):
    html = _page(comparisons)
    assert '<p class="answer">A<mark> &lt;b&gt; bold</mark> end</p>' in html
    assert "differs without MSD: chain, tree" in html and "blue one" in html


def test_tree_is_drawn_with_its_accepted_path(comparisons):
    html = _page(comparisons)
    picture = html[html.index('<svg class="tree"') :]
    picture = picture[: picture.index("</svg>")]
    boxes = re.findall(
        r'<g class="node (\w+)"><title>([^<]+)</title>.*?<text[^>]*>([^<]*)', picture
    )
    assert [(kind, label) for kind, _, label in boxes] == [
        ("root", "the"),
        ("rejected", "red"),
        ("accepted", "blue"),
        ("rejected", "&lt;b&gt;"),
        ("accepted", "dot"),
        ("rejected", "box"),
        ("own", "is"),
    ]
    hints = [hint for _, hint, _ in boxes]
    assert "guess 1 after \u201c the\u201d: rejected, the target said \u201c blue\u201d" in hints[1]
    assert "guess 2 after \u201c the\u201d: accepted" in hints[2]
    assert "rejected, the target said \u201c is\u201d" in hints[5]
    assert len(re.findall('class="edge accepted"', picture)) == 2
    assert "the answer so far was <b>A</b>" in html


def test_tree_below_a_rejected_node_and_the_one_to_show():
    lost = VerifiedTree([0, 1, 2], [-1, 0, 1], [0], [6], 1)
    assert "rejected with the nodes above it" in tree_svg(lost, TEXTS.__getitem__)
    first_guesses = VerifiedTree([0, 1, 2, 3], [-1, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4], 1)
    assert max([lost, first_guesses, TREE], key=tells) is TREE
    assert max([lost, first_guesses], key=tells) is first_guesses


def test_accepted_by_depth_leaves_out_what_a_drafting_cannot_reach(comparisons):
    html = _page(comparisons)
    panel = html[html.index("Accepted by depth") :]
    described = re.search('aria-label="([^"]*)"', panel).group(1)
    assert "Depth 1, chain of 5: 0.50" in described
    assert "Depth 5, chain of 5: 0.00" in described
    assert "Depth 3, tree of 8 nodes" in described and "Depth 4, tree" not in described


def test_real_language_model_has_a_section(comparisons):
    found = compare.figures(comparisons, "chain")
    real = RealFigures(Drafting(5), "bfloat16", comparisons, found, found)
    page = real_section(real)
    assert "1 of 2" in page and "2.00x" in page and "chain of 5" in page
    assert page.count('class="card"') == 2
    assert real_section(None) == ""
    assert "no index &lt;here&gt;" in real_section("no index <here>")
    draftings = {name: compare.figures(comparisons, name) for name in DRAFTINGS}
    whole = render(comparisons, draftings, None, DRAFTINGS, PROVENANCE, TEXTS.__getitem__, real)
    assert "A real language model" in whole
