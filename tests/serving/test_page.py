"""The server's page in a headless Chromium: upload, stream, slider, errors, a phone's width."""

import pytest
from served import Served, scenes


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 375, "height": 800})
    page.complaints, page.addresses = [], []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda request: page.addresses.append(request.url))
    yield page
    page.close()


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "scene.png"
    scenes(4)[3].save(path)
    return str(path)


def test_a_picture_is_described_and_read_again_at_another_threshold(page, served, picture):
    page.goto(served.address)
    page.set_input_files("#file", picture)
    page.click("#ask")
    page.wait_for_selector("#after:not(.hidden)")
    phrases = page.locator("#answer .phrase")
    assert phrases.count() >= 2 and page.inner_text("#state") == "Every phrase verified."
    assert page.locator("#answer .doubt").count() == 0 and page.locator("#answer .gone").count() == 0
    assert "P(wrong)" in phrases.first.get_attribute("title")
    assert page.inner_text("#reread") == "The threshold this answer was written with."
    text = page.inner_text("#answer")
    page.locator("#tau").fill("-3")  # P(wrong) of 0.001 or more is doubted
    assert page.locator("#answer .doubt").count() == phrases.count() and page.inner_text("#answer") == text
    assert f"{phrases.count()} of {phrases.count()} phrases" in page.inner_text("#reread")
    page.locator("#tau").fill("0")
    assert page.locator("#answer .doubt").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert page.complaints == []
    assert all(address.startswith((served.address, "data:")) for address in page.addresses)


def test_doubts_are_struck_out_while_the_answer_grows(page, served, picture):
    page.goto(served.address)
    page.set_input_files("#file", picture)
    # what was shown at any time, not only at the end
    page.evaluate(
        "window.struck = []; new MutationObserver((all) => all.forEach((m) => m.addedNodes.forEach((node) => "
        "node.className === 'gone' && window.struck.push([node.textContent, node.title]))))"
        ".observe(document.getElementById('answer'), { childList: true })"
    )
    page.click("#ask")
    page.wait_for_selector("#after:not(.hidden)")
    struck = page.evaluate("window.struck")
    assert struck and all(text and title for text, title in struck)
    assert page.locator("#history s").count() == len(struck)


def test_what_goes_wrong_is_said_on_the_page(page, served, tmp_path):
    page.goto(served.address)
    page.fill("#question", " ")
    page.click("#ask")
    assert page.inner_text("#error") == "Write a question."
    (tmp_path / "notes.txt").write_text("no picture")
    page.set_input_files("#file", str(tmp_path / "notes.txt"))
    assert "notes.txt is not a picture" in page.inner_text("#error")
    scenes(1)[0].resize((900, 900)).save(tmp_path / "large.png")
    page.set_input_files("#file", str(tmp_path / "large.png"))
    page.wait_for_selector("#drop img")
    page.fill("#question", "What is there?")
    page.click("#ask")
    page.wait_for_function("document.getElementById('error').textContent.includes('200,000 pixels')")
    assert page.is_enabled("#ask")


def test_a_server_with_a_key_asks_for_it(page, verifier, picture):
    served = Served(*verifier, key="secret")
    try:
        page.goto(served.address)
        page.wait_for_selector("#locked:not(.hidden)")
        page.fill("#key", "secret")
        page.press("#key", "Tab")
        page.set_input_files("#file", picture)
        page.click("#ask")
        page.wait_for_selector("#after:not(.hidden)")
        assert page.inner_text("#error") == ""
    finally:
        served.stop()
