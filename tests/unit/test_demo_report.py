"""The demo's figures and its report, from made-up answers: no engine here."""

import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from vllm_msd.demo import compare
from vllm_msd.demo.compare import Comparison
from vllm_msd.demo.engine import Answer
from vllm_msd.demo.report import render
from vllm_msd.demo.world import Sample, sample

PROVENANCE = {
    "date": "2030-01-02 03:04 UTC",
    "command": "vllm-msd demo run",
    "settings": {"num_speculative_tokens": 5, "wide": "350M"},
    "machine": {"processor": "a <fast> one"},
    "versions": {"vllm": "0.32.0"},
}


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


def _comparison(one: Sample, msd: Answer, plain: Answer | None = None) -> Comparison:
    timings = [((10, 1.0), (10, 0.5)), ((10, 3.0), (10, 1.5))]
    return Comparison(one, plain or msd, msd, timings)


@pytest.fixture
def comparisons() -> list[Comparison]:
    nasty = Sample(
        [Image.new("RGB", (4, 4), "red")],
        [
            {
                "role": "user",
                "content": [
                    {"type": "image"},
                    {"type": "text", "text": "1 < 2 & <script>x</script>"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        ],
        "vqa",
        sample("vqa", 0, "test").answer_key,
    )
    first = _answer([" A", " <b>", " bold", " end"], [False, True, True, False])
    second = _answer([" red", " one"], [False, False])
    other = _answer([" blue", " one"], [False, False])
    return [_comparison(nasty, first), _comparison(sample("text", 0, "test"), second, other)]


def test_figures(comparisons):
    found = compare.figures(comparisons)
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
        if tag not in ("meta", "img", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"misplaced </{tag}>"


@pytest.mark.parametrize("with_wide", [True, False])
def test_page_is_whole_escaped_and_self_contained(comparisons, with_wide):
    found = compare.figures(comparisons)
    html = render(comparisons, found, found if with_wide else None, PROVENANCE)
    page = _Page()
    page.feed(html)
    assert page.open == []
    assert "script" not in page.tags and "b" in page.tags
    assert "1 &lt; 2 &amp; &lt;script&gt;" in html and "a &lt;fast&gt; one" in html
    assert page.sources and all(s.startswith("data:image/png;base64,") for s in page.sources)
    assert ("Widened pair" in html) is with_wide
    assert "Acceptance comes from the small pair" in html
    assert not re.search(r"\$[a-z_]+", html), "a placeholder was not filled"


def test_accepted_tokens_are_marked(comparisons):
    found = compare.figures(comparisons)
    html = render(comparisons, found, None, PROVENANCE)
    assert '<p class="answer">A<mark> &lt;b&gt; bold</mark> end</p>' in html
    assert "differs without MSD" in html and "blue one" in html
