from collections import Counter

from vlm_sft_rl.bridges.requests import answer_requests, cut_at


def requests():
    def visuals(document):
        return document["pictures"]

    return [
        ("<image>\nWhat?", {"max_new_tokens": 8, "temperature": 0, "until": ["\n"]}, visuals, 0, "t", "test"),
        ("Why?", {"max_new_tokens": 16, "temperature": 0.7, "do_sample": True}, visuals, 1, "t", "test"),
        ("Who?", {"max_new_tokens": 8, "temperature": 0.7, "do_sample": False}, visuals, 2, "t", "test"),
        ("Where?", {}, visuals, 1, "u", "val"),
    ]


def test_answers_come_back_in_order_grouped_by_settings():
    documents = [{"pictures": ["p0"]}, {"pictures": []}, {"pictures": ["p2", "q2"]}]
    calls, done = [], Counter()

    def answer(settings, images, prompts, names):
        calls.append((settings["max_new_tokens"], settings["temperature"], images, names))
        return [f"{prompt} yes\nand more" for prompt in prompts]

    texts = answer_requests(
        requests(), lambda task, split, i: documents[i], answer, lambda n: done.update(n=n), per_call=1
    )
    assert texts == ["What? yes", "Why? yes\nand more", "Who? yes\nand more", "Where? yes\nand more"]
    assert calls == [
        (8, 0.0, [["p0"]], ["t/test/0"]),
        (8, 0.0, [["p2", "q2"]], ["t/test/2"]),
        (16, 0.7, [None], ["t/test/1"]),
        (512, 0.0, [None], ["u/val/1"]),
    ]
    assert done["n"] == 4


def test_the_first_stop_string_counts():
    assert cut_at("a b\nc", ["\n", " "]) == "a"
    assert cut_at("a b", "b") == "a " and cut_at("a b", None) == "a b" and cut_at("a", ["", "x"]) == "a"
