"""The report's two files: complete, well-formed, self-contained."""

from __future__ import annotations

import dataclasses
import html.parser
import json

import pytest
from PIL import Image

from tvc.program import Layer, Layout
from tvc.report.cost import plan_costs
from tvc.report.report import write_report

LAYOUT = Layout(
    model_type="llava<b>",
    hidden_size=64,
    vocabulary=100,
    language=(Layer(1000, 4, 2, 16),) * 6,
    vision=(Layer(500, 2, 2, 8),) * 2,
    prefix_tokens=0,
    group=1,
    tiles=1,
    tile_tokens=100,
    visual_tokens=(100,),
    patch_linear=588,
    projector_linear=90,
    head_linear=6400,
    element_size=2,
    sites=(),
)
PLAN = plan_costs(
    LAYOUT, [100, 100, 40, 40, 10, 10], 25, policy="fastv", sites={2: ("language.2",), 4: ("language.4",)}
)
VOID = {"meta", "link", "img", "br", "rect", "line"}


class Page(html.parser.HTMLParser):
    """Checks that tags nest, and collects bars, cells, headings and addresses."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.bars: list[dict[str, str | None]] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]
        if tag == "rect":
            self.bars.append(values)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data.strip())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return write_report(
        folder,
        dataclasses.replace(PLAN, fired=PLAN),
        verification={"passed": True, "comparisons": [{"output": "logits", "difference": 3.25e-7, "allowed": 1e-5}]},
        fusions={"GroupQueryAttention": 6, "SkipLayerNorm": 0},
        timings={"trace": 1.5},
        benchmark=[{"case": "prefill", "median_ms": 12.5}],
        overlay=Image.new("RGB", (8, 8)),
        facts={"target": "ort"},
    )


def test_the_page_nests_and_asks_for_nothing(written):
    page = Page(written[1].read_text())
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert len(page.addresses) == 1
    assert "@import" not in written[1].read_text()


def test_the_bars_are_the_tokens(written):
    bars = Page(written[1].read_text()).bars
    heights = [float(bar["height"]) for bar in bars]
    assert heights[0::2] == [40.0] * 6  # text: 25 of 125
    assert heights[1::2] == [160.0, 160.0, 64.0, 64.0, 16.0, 16.0]
    assert all(float(bar["y"]) >= 0 for bar in bars)


def test_everything_given_is_on_the_page(written):
    words = " ".join(Page(written[1].read_text()).words)
    for text in (
        "fastv",
        "llava<b>",
        "GroupQueryAttention",
        "SkipLayerNorm",
        "3.25e-07",
        "12.5",
        "trace",
        "ort",
        "language.4",
    ):
        assert text in words
    assert "Verified against the untouched model." in words


def test_the_data_is_the_plan(written):
    content = json.loads(written[0].read_text())
    assert content["plan"]["average_visual_tokens"] == 50
    assert content["fusions"] == {"GroupQueryAttention": 6, "SkipLayerNorm": 0}
    assert content["verification"]["comparisons"][0]["output"] == "logits"


def test_names_are_escaped(written):
    assert "llava<b>" not in written[1].read_text()


def test_a_bare_plan_says_that_nothing_was_verified(tmp_path):
    _, page = write_report(tmp_path, PLAN)
    words = " ".join(Page(page.read_text()).words)
    assert "Not verified." in words
    assert "Kept patches" not in words
    assert "least ratio" not in words


def test_a_failed_verification_is_not_called_verified(tmp_path):
    _, page = write_report(tmp_path, PLAN, verification={"passed": False, "comparisons": []})
    assert "Differs from the untouched model." in page.read_text()
