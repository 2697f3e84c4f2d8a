"""`python docs/picture.py`: draw docs/answer.svg, an answer of the shipped pocket model and how it came about."""

import base64
import html
import io
import random
from pathlib import Path

from vlm_sft_rl import RetrospectiveConfig, generate_retrospective, load_for_inference
from vlm_sft_rl.demos.frame import VERIFIER
from vlm_sft_rl.pocket.render import render
from vlm_sft_rl.pocket.world import draw_scene
from vlm_sft_rl.settings import configured

SEED = 3  # of the scene; most scenes of a dozen show one doubt or none
WIDTH, LINE, LEFT, RIGHT = 720, 34, 250, 700
GREEN, RED, GREY = "#15803d", "#b91c1c", "#475569"
LETTER = 10.4  # pixels of a letter, about
TITLE = "The answer grows; what the model doubts is taken back and drawn anew:"


def main() -> None:
    model, processor, sidecar = load_for_inference(VERIFIER)
    settings = {**sidecar.decoding, "threshold": sidecar.threshold}
    picture = render(draw_scene(random.Random(SEED), 0.5), SEED)
    (answer,) = generate_retrospective(
        model,
        processor,
        [picture],
        ["Describe the image."],
        configured(RetrospectiveConfig, settings, "settings"),
    )
    words = [(answer.text.partition(" a ")[0], GREY, "")]
    for event in answer.trace:
        if event["kind"] in ("accept", "reject"):
            doubt = event["kind"] == "reject"
            repeat = event.get("reason") == "repeat"
            note = "said before" if repeat else f"P(wrong) {event['p_unconfident']:.2f}"
            words.append((event["text"], RED if doubt else GREEN, note))
    Path(__file__).with_name("answer.svg").write_text(drawn(picture, words, answer.text), encoding="utf-8")


def drawn(picture, words: list[tuple[str, str, str]], text: str) -> str:
    """The picture, every phrase in its order, and the answer."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    parts, x, y = [], LEFT, 78
    for phrase, colour, note in words:
        width = max(LETTER * len(phrase), 6.4 * len(note)) + 14
        if x + width > RIGHT:
            x, y = LEFT, y + LINE + 16
        line = ' text-decoration="line-through"' if colour == RED else ""
        parts.append(
            f'<text x="{x}" y="{y}" font-size="19" fill="{colour}"{line}>{html.escape(phrase)}</text>'
        )
        parts.append(f'<text x="{x}" y="{y + 16}" font-size="12" fill="{GREY}">{note}</text>')
        x += width
    height = max(230, y + 84)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">\n'
        f"<title>{html.escape(text)}</title>\n"
        f'<rect width="{WIDTH}" height="{height}" rx="10" fill="#f8fafc"/>\n'
        f'<image x="20" y="20" width="200" height="200" href="data:image/png;base64,{data}"/>\n'
        f'<text x="{LEFT}" y="38" font-size="13" fill="{GREY}">{TITLE}</text>\n'
        + "\n".join(parts)
        + f'\n<text x="{LEFT}" y="{height - 22}" font-size="16" fill="#0f172a">{html.escape(text)}</text>\n</svg>\n'
    )


if __name__ == "__main__":
    main()
