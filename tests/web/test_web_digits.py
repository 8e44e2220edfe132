"""onnxruntime-web runs a compressed model, in a headless Chromium."""

from __future__ import annotations

import importlib.util
import os
import shutil

import evaluate_digits
import numpy as np
import onnxruntime
import pytest
from serving import PAGE, prepare, served

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
MISSING = [
    name
    for name, found in (
        ("npm", shutil.which("npm")),
        ("Chromium", CHROMIUM),
        ("the package playwright", importlib.util.find_spec("playwright")),
    )
    if not found
]


@pytest.mark.browser
@pytest.mark.skipif(
    bool(MISSING) and not os.environ.get("ONNX_LOWRANK_REQUIRE_BROWSER"),
    reason=f"{' and '.join(MISSING)} not installed",
)
def test_both_models_run_in_the_browser_as_in_python(tmp_path):
    assert not MISSING
    from playwright.sync_api import sync_playwright

    prepare(tmp_path)
    messages = []
    with served(tmp_path) as address, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 900, "height": 700})
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.goto(address)
        page.wait_for_function("window.results !== undefined", timeout=120_000)
        results, verdict = page.evaluate("window.results"), page.text_content("#verdict")
        cells = [row.split("\t") for row in page.inner_text("#models").splitlines()]
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        browser.close()
    assert messages == []
    digits = evaluate_digits.load()
    labels, own = digits.test_labels, []
    for result, name in zip(results, ("original", "compressed"), strict=True):
        session = onnxruntime.InferenceSession(tmp_path / f"{name}.onnx", providers=["CPUExecutionProvider"])
        (wanted,) = session.run(None, {"image": digits.test_images})
        np.testing.assert_allclose(np.array(result["logits"]), wanted, rtol=1e-3, atol=1e-3)
        own.append(wanted.argmax(1))
        assert result["time"] > 0
    agreed = int((own[0] == own[1]).sum())
    assert verdict == f"Both models give the same answer for {agreed} of {len(labels)} digits."
    assert agreed > 0.9 * len(labels)
    assert [row[0] for row in cells] == ["original.onnx", "compressed.onnx"]
    assert [row[2] for row in cells] == [f"{(answer == labels).sum()} of {len(labels)}" for answer in own]
    assert [float(row[3]) for row in cells] == pytest.approx([r["time"] for r in results], abs=6e-4)


def test_the_page_loads_nothing_from_elsewhere():
    assert "http" not in PAGE.read_text(encoding="utf-8")
