import pytest
from endpoint_server import EndpointServer
from json_lines import read_lines
from owners_files import write_benchmark
from worlds import evaluate

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.compare import compare
from vlm_sft_rl.evaluation.judge import fill_prompt
from vlm_sft_rl.evaluation.metrics.judged import Clair, HaloQuest, MMHal, MMVet
from vlm_sft_rl.evaluation.specs import JudgeSettings


@pytest.fixture
def run(tmp_path, tagged):
    data = write_benchmark("mmhal_bench", tmp_path / "data")

    def call(output="out", server=None, model="judge", ledger=None, prompt_file=None, **options):
        judge = server and JudgeSettings(server.url, model, ledger=ledger, prompt_file=prompt_file)
        common = {"max_new_tokens": 5, "rounds": 10, "judge": judge}
        return evaluate("mmhal_bench", tagged, tmp_path / output, data, **(common | options))

    return call


def rating(body):
    """4 for the question about the mug, 1 for the other."""
    return f"Fine.\nRating: {4 if 'mug' in body['messages'][0]['content'] else 1}"


def test_verdicts_make_the_score_and_their_maker_is_recorded(run):
    with EndpointServer(rating) as server:
        settings = JudgeSettings(server.url, "big-judge", input_price=10, output_price=30)
        summary = run(judge=settings)
        assert server.calls == 2
        prompts = [body["messages"][0]["content"] for body in server.bodies]
        assert server.bodies[0]["temperature"] == 0 and server.bodies[0]["model"] == "big-judge"
    assert summary["metrics"]["score"]["value"] == 2.5
    assert summary["metrics"]["hallucination_rate"]["value"] == 0.5
    judge = summary["judge"]
    assert judge["model"] == "big-judge" and "{response}" in judge["prompt"]
    assert len(judge["prompt_sha256"]) == 16
    # 100 tokens in and 3 words out each, as the server counts
    assert judge["usage"]["cost"] == pytest.approx((200 * 10 + 6 * 30) / 1e6)
    (prompt,) = (text for text in prompts if "Mug" in text)
    assert "- Mug\n- Coffee cup" in prompt and "A person's answer: The mug is white." in prompt
    assert "{response}" not in prompt


def test_nothing_is_asked_or_paid_for_twice(run, tmp_path):
    with EndpointServer(rating) as server:
        first = run(server=server)
        again = run(server=server)
        assert server.calls == 2 and again["judge"]["usage"]["cached"] == 2
        assert again["metrics"] == first["metrics"]
        run(server=server, model="another")
        assert server.calls == 4
        for output in "ab":
            run(output, server, ledger=tmp_path / "shared.jsonl")
        assert server.calls == 6


def test_answers_first_and_verdicts_later(run, tmp_path):
    with pytest.raises(UserError, match=r"--judge-url.*--answers-only"):
        run()
    assert run(answers_only=True) == {"spec": "mmhal_bench", "n": 2, "answered_now": 2}
    assert not (tmp_path / "out/summary.json").exists()
    with EndpointServer(rating) as server:
        summary = run(server=server)
    assert summary["answered_now"] == 0 and summary["metrics"]["score"]["value"] == 2.5


def test_a_flaky_endpoint_is_survived(run):
    with EndpointServer(rating, fail_rate=0.5, limit_first=1, retry_after="0.05", seed=3) as server:
        summary = run(server=server)
        assert server.calls > 2
    assert summary["metrics"]["unjudged"]["value"] == 0 and summary["judge"]["usage"]["retries"] > 0


def test_what_the_judge_does_not_answer_is_unjudged_and_not_a_zero(run, tmp_path):
    def answer(body):
        return "Rating: 6" if "mug" in body["messages"][0]["content"] else {"choices": None}

    with EndpointServer(answer) as server:
        summary = run(server=server)
    assert summary["metrics"]["score"]["value"] == 6
    assert summary["metrics"]["unjudged"]["value"] == 0.5 and summary["judge"]["usage"]["failed"] == 1
    lines = read_lines(tmp_path / "out/judgements.jsonl")
    assert lines[0]["judgement"] == "Rating: 6" and "choices" in lines[1]["error"]


def test_a_prompt_of_ones_own(run, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("Q {question} T {answer} A {response} {untouched")
    with EndpointServer(lambda body: "Rating: 3") as server:
        summary = run(server=server, prompt_file=path)
        assert server.bodies[0]["messages"][0]["content"].endswith("{untouched")
        assert summary["judge"]["prompt"].startswith("Q {question}")
        path.write_text("{question}")
        with pytest.raises(UserError, match=r"prompt\.txt: the judge's prompt must contain \{response\}"):
            run(server=server, prompt_file=path)


def test_runs_are_compared_by_the_verdicts_of_one_judge(run, tmp_path):
    with EndpointServer(rating) as server:
        run("a", server)
        run("b", server, max_new_tokens=3)
        run("c", server, "other", max_new_tokens=3)
    result = compare(tmp_path / "a", tmp_path / "b", rounds=10)
    assert result["metrics"]["score"]["difference"]["value"] == 0 and result["n"] == 2
    with pytest.raises(UserError, match="judged by different models"):
        compare(tmp_path / "a", tmp_path / "c", rounds=10)


def test_a_judge_where_there_is_nothing_to_judge_is_refused(tagged, tmp_path):
    judge = JudgeSettings("http://localhost:1", "j")
    with pytest.raises(UserError, match="no judge is asked here"):
        evaluate("pope", tagged, tmp_path / "x", tmp_path, judge=judge)


def test_text_of_an_answer_is_no_placeholder():
    sample = {"id": "1", "question": "Why {answer}?", "answer": "{question} {x}"}
    sample["reference"] = {"answer": "because"}
    assert fill_prompt("{question}|{response}|{answer}", sample) == "Why {answer}?|{question} {x}|because"
    with pytest.raises(UserError, match=r"names \{captions\}, which sample '1' does not have"):
        fill_prompt("{captions} {response}", sample)


@pytest.mark.parametrize(
    "metric, reply, score",
    [
        (MMHal(), "Rating: 4", 4),
        (MMHal(), "The Rating: 2 of others is wrong.\n**Rating: 5**", 5),
        (MMHal(), "rating 3.5", None),
        (MMHal(), "good", None),
        (MMHal(), "Rating: 7", None),
        (MMHal(rules="released"), "rating: 2 ... Rating: 5", 0),
        (MMHal(rules="released"), "RATING: 5", 5),
        (MMHal(rules="released"), "good", 0),
        (HaloQuest(), "It does.\nCorrect: yes", 1),
        (HaloQuest(), "**Correct:** No.", 0),
        (HaloQuest(), "Correct: no. I mean Correct: True", 1),
        (HaloQuest(), "It is incorrect", None),
        (Clair(), 'Sure {"score": 85, "reason": "same"}', 0.85),
        (Clair(), '{"score": "high"} score: 20', 0.2),
        (Clair(), '{"score": 850}', None),
        (Clair(), "no", None),
        (MMVet(), "Correctness: 0.7", 0.7),
        (MMVet(), "0.5", 0.5),
        (MMVet(), "1.0.", 1.0),
        (MMVet(), "Correctness: 7", None),
        (MMVet(), "about half", None),
    ],
)
def test_replies_are_read(metric, reply, score):
    assert metric.read(reply) == (None if score is None else pytest.approx(score))


@pytest.mark.parametrize("rules, score", [("ours", 5), ("released", 5)])
def test_a_judge_may_think_aloud(rules, score):
    metric, reference = MMHal(rules=rules), {"answer": "a", "image_content": ["b"]}
    assert metric.sample_counts("<think>Rating: 1?</think>Rating: 5", reference)[0] == score
    assert metric.sample_counts("<think>Rating: 1, or", reference)[3] == 1  # cut off: unjudged


def test_unreadable_replies_do_not_move_the_score():
    references = [{"answer": "a", "image_content": ["b"]}] * 3
    result = MMHal().compute(predictions=["Rating: 6", "Rating: 0", "??"], references=references)
    assert result == pytest.approx({"score": 3.0, "hallucination_rate": 0.5, "unjudged": 1 / 3})
