"""A server of the pocket VLM that verifies itself, in this process; its clients are real ones."""

import shutil

import pytest
from served import Served

from vlm_sft_rl.demos.frame import VERIFIER


@pytest.fixture(scope="session")
def verifier():
    from vlm_sft_rl.models.load import load_for_inference

    return load_for_inference(VERIFIER)[:2]


@pytest.fixture(scope="module")
def served(verifier):
    server = Served(*verifier, rows=64, waiting=64, megabytes=0.5, pixels=200_000, new_tokens=256)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as start:
        browser = start.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
