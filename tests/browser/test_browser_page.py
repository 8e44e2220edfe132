"""The page in a real browser: clicks, keys, colours, paper, a phone, 400 layers, hostile names."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from onnx_lowrank import compress, sweep
from onnx_lowrank.report.report import Report
from onnx_lowrank.sweeps import page as pages
from tiny import built, cnn

pytestmark = [pytest.mark.browser, pytest.mark.slow]

BAD = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1"><b>bold</b>'
PHONE, DESKTOP = (390, 844), (1280, 900)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium of the system; none is downloaded."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        if os.environ.get("ONNX_LOWRANK_REQUIRE_BROWSER"):
            pytest.fail("there is no chromium, and it is required here")
        pytest.skip("there is no chromium: install it to run these tests")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report() -> Report:
    with compress(cnn(), 0.6) as result:
        return result.report


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    onnx.save(cnn(), folder / "cnn.onnx")
    sweep(folder / "cnn.onnx", folder / "points", [0.9, 0.7, 0.5, 0.001], recipes=["schatten", "svd"])
    pages.write(folder / "points", folder / "page.html", "onnx-lowrank sweep cnn.onnx points")
    return folder / "page.html"


@pytest.fixture(scope="module")
def many(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a model of 400 layers."""
    layers = tuple(
        replace(row, id=f"block.{n}.{row.id}", name=f"block.{n}.{row.name}", nodes=(f"/block.{n}/{row.id}",))
        for n in range(134)
        for row in report.layers
    )[:400]
    place = tmp_path_factory.mktemp("many") / "many.html"
    place.write_text(replace(report, layers=layers).to_html(), encoding="utf-8")
    return place


@contextmanager
def shown(browser: Any, place: Path, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> Iterator[Any]:
    """A page that is open; at the end it must have written nothing to the console and asked for no file."""
    complaints: list[str] = []
    with ExitStack() as stack:
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, offline=True
        )
        stack.callback(context.close)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request", lambda asked: complaints.append(asked.url) if asked.url != place.as_uri() else None
        )
        page.goto(place.as_uri())
        page.wait_for_selector("html[data-ready]", timeout=20_000)
        yield page
    assert [c for c in complaints if not c.startswith("data:")] == []


def fits(page: Any) -> bool:
    """Whether the page is no wider than the window."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


def drawn(page: Any, place: str) -> int:
    return int(page.locator(f"{place} .main-svg").count())


def test_a_click_on_a_point_shows_its_model_its_plan_and_its_command(browser: Any, swept: Path) -> None:
    with shown(browser, swept) as page:
        assert page.locator("#warnings li").first.inner_text()
        assert "has no model" in page.locator("#warnings").inner_text()
        marks = page.locator("#curve .scatterlayer .trace.scatter").nth(1).locator(".point")
        assert marks.count() == 3
        names = []
        for index in range(3):
            marks = page.locator("#curve .scatterlayer .trace.scatter").nth(1).locator(".point")
            marks.nth(index).hover(force=True)
            box = marks.nth(index).bounding_box()
            page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            names.append(page.locator("#point h2").inner_text())
            plan = page.locator("#point dd").all_inner_texts()
            assert f"{names[-1].removeprefix('Point ')}.plan.json" in plan
            assert f"{names[-1].removeprefix('Point ')}.plan.json" in page.locator("#point code").inner_text()
            assert page.locator("#curve tr.chosen").inner_text().split()[1] in names[-1]
        assert len(set(names)) == 3


def test_the_front_is_marked_by_more_than_a_colour(browser: Any, swept: Path) -> None:
    with shown(browser, swept) as page:
        titles = [title.strip() for title in page.locator("#curve thead th").all_inner_texts()]
        cost, error = titles.index("Parameters"), titles.index("Output error")
        found = page.locator("#curve tbody tr").evaluate_all(
            "(rows, [cost, error]) => rows.map(({cells}) => "
            "[cells[0].innerText.trim(), +cells[cost].innerText, +cells[error].innerText])",
            [cost, error],
        )
        assert len(found) == 6
        for mark, cost, error in found:
            beaten = any(c <= cost and e <= error and (c, e) != (cost, error) for _, c, e in found)
            assert mark[0] == ("○" if beaten else "●")
        page.locator("#curve select").first.select_option("bytes")
        assert "File bytes, share" in page.locator("#curve .xtitle").text_content()


def test_a_layer_is_chosen_by_its_bar_its_row_and_its_node(browser: Any, swept: Path) -> None:
    with shown(browser, swept) as page:
        page.locator("#layers button.name", has_text="conv1").click()
        assert page.locator("#layer h3").first.inner_text() == "conv1"
        assert drawn(page, "#layer .chart") >= 1
        box = page.locator("#budget .nsewdrag").bounding_box()
        page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] - 4)
        assert page.locator("#layer h3").first.inner_text() == "conv2"
        page.locator("#graph .gone button", has_text="n.a").click()
        assert page.locator("#layer h3").first.inner_text() == "conv1"
        assert "‖W − Ŵ‖₂ ≤" in page.locator("#layer dl").inner_text()
        page.locator("#layer summary").click()
        assert "chosen:" in page.locator("#layer details").inner_text()


def test_everything_can_be_reached_by_keys(browser: Any, swept: Path) -> None:
    with shown(browser, swept) as page:
        first = page.locator("#curve button.name").first
        first.focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        wanted = page.locator("#curve button.name").nth(1)
        assert page.locator("#point h2").inner_text() == f"Point {wanted.inner_text()}"
        assert wanted.evaluate("button => button === document.activeElement")
        page.locator("#layers button.name").first.focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Space")
        assert page.locator("#layer h3").first.inner_text() == "conv2"
        page.locator("#layers th button", has_text="params").focus()
        page.keyboard.press("Enter")
        assert page.locator("#layers th[aria-sort]").get_attribute("aria-sort") == "descending"
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_dark_follows_the_system_and_the_switch(browser: Any, swept: Path) -> None:
    back = "getComputedStyle(document.documentElement).backgroundColor"
    ink = "document.querySelector('#curve .xtitle').style.fill"
    with shown(browser, swept, scheme="dark") as page:
        dark, written = page.evaluate(back), page.evaluate(ink)
        page.locator("#theme").click()
        assert page.locator("#theme").inner_text() == "Dark"
        light, rewritten = page.evaluate(back), page.evaluate(ink)
        assert dark != light
        assert written != rewritten
    with shown(browser, swept) as page:
        assert page.evaluate(back) == light
        page.emulate_media(color_scheme="dark")
        assert page.evaluate(back) == dark


def test_a_dark_page_is_printed_on_white(browser: Any, swept: Path) -> None:
    with shown(browser, swept, scheme="dark") as page:
        page.emulate_media(media="print")
        colour = page.locator("#curve .xtitle")
        # The page's policy forbids the evaluation by which playwright waits for a function.
        for _ in range(200):
            if colour.evaluate("title => title.style.fill") == "rgb(28, 36, 48)":
                break
            page.wait_for_timeout(50)
        else:
            pytest.fail("the titles of the chart stay light")
        assert (
            page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
            == "rgb(255, 255, 255)"
        )
        assert not page.locator("#theme").is_visible()
        assert page.locator(".scroll.layers").evaluate("e => e.scrollHeight <= e.clientHeight + 1")
        assert len(page.pdf()) > 20_000


def test_a_phone_shows_all_without_scrolling_sideways(browser: Any, swept: Path, many: Path) -> None:
    for place in (swept, many):
        with shown(browser, place, PHONE) as page:
            assert fits(page)
            page.locator("#layers button.name").nth(2).click()
            assert page.locator("#layer h2").is_visible()
            assert page.evaluate("document.getElementById('layer').getBoundingClientRect().top") < PHONE[1]
            assert fits(page)


def test_400_layers_have_one_table_and_few_charts(browser: Any, many: Path) -> None:
    assert many.stat().st_size < 8_000_000
    with shown(browser, many) as page:
        assert page.locator("#layers tbody tr").count() == 400
        assert page.locator(".js-plotly-plot").count() <= 4
        page.locator("#layers input").fill("block.77.")
        assert page.locator("#layers tbody tr").count() == 3
        page.locator("#layers button.name").first.click()
        assert page.locator("#layer h3").first.inner_text().startswith("block.77.")
        page.locator("#layers input").fill("")
        page.locator("#layers th button", has_text="error").click()
        cells = page.locator("#layers tbody tr td:nth-last-child(2)").all_inner_texts()
        known = [float(cell) for cell in cells if cell != "–"]
        assert known == sorted(known, reverse=True)
        assert cells[len(known) :] == ["–"] * (400 - len(known))


def test_every_kind_of_run_opens(browser: Any, tmp_path: Path) -> None:
    relu = '<ir_version: 8, opset_import: ["": 17]> g (float[N, 4] x) => (float[N, 4] y) { y = Relu (x) }'
    place = tmp_path / "page.html"
    with compress(cnn(), 0.6, dry_run=True) as planned, compress(built(relu, {}), 1) as empty:
        with compress(cnn(), plan=planned.plan) as replayed:
            runs = {"dry run": planned, "No decomposition": replayed, "0 of 0 layers": empty}
        for text, result in runs.items():
            place.write_text(result.report.to_html(), encoding="utf-8")
            with shown(browser, place) as page:
                assert text in page.locator("#page").inner_text()


def test_the_page_of_a_quantized_model_says_so(browser: Any, tmp_path: Path) -> None:
    with compress(cnn(), 0.6, then="int8") as result:
        (tmp_path / "page.html").write_text(result.report.to_html(), encoding="utf-8")
    with shown(browser, tmp_path / "page.html") as page:
        assert page.locator("header p").inner_text().endswith(", then quantized (int8)")
        assert "quantize_dynamic" in page.locator("#quantized").inner_text()
        models = page.locator("#errors td:nth-child(2)").all_inner_texts()
        assert models[3:] == ["after int8", "before int8", "int8 alone"]
        rows = page.locator("#alone tbody tr").all_inner_texts()
        assert [row.split("\t")[0] for row in rows] == ["low-rank alone", "int8 alone", "low-rank, then int8"]


def test_names_of_a_model_are_text(browser: Any, report: Report, tmp_path: Path) -> None:
    layers = tuple(
        replace(row, id=f"{BAD}{n}", name=f"{BAD}{n}", nodes=(BAD,)) for n, row in enumerate(report.layers)
    )
    validation = replace(
        report.validation, outputs=tuple(replace(o, name=BAD, note=BAD) for o in report.validation.outputs)
    )
    hostile = replace(report, model=BAD, layers=layers, warnings=(BAD,), validation=validation, recipe=BAD)
    place = tmp_path / "hostile.html"
    place.write_text(hostile.to_html(BAD), encoding="utf-8")
    with shown(browser, place) as page:
        assert page.locator("h1").inner_text() == BAD
        assert page.locator("#warnings li").inner_text() == BAD
        box = page.locator("#budget .nsewdrag").bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] - 4)
        page.wait_for_selector("#budget .hovertext")
        assert "<b>bold</b>" in page.locator("#budget .hovertext").text_content()
        assert page.evaluate("window.hacked") is None
        assert page.locator("#page img, #page b, #page script").count() == 0


def test_a_script_that_is_not_the_pages_own_does_not_run(
    browser: Any, report: Report, tmp_path: Path
) -> None:
    place = tmp_path / "changed.html"
    text = report.to_html().replace("<noscript>", "<script>window.hacked = 1</script><noscript>")
    place.write_text(text, encoding="utf-8")
    page = browser.new_page()
    page.goto(place.as_uri())
    page.wait_for_selector("html[data-ready]")
    assert page.evaluate("window.hacked") is None
    page.close()
