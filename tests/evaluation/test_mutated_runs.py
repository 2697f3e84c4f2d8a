"""Files of evaluations that were edited, cut off or exchanged: one message that names the file, whichever command reads
them."""

import io
import shutil
from itertools import islice

import pytest
from endpoint_server import EndpointServer
from json_lines import read_lines
from mutations import mutants
from owners_files import write_benchmark
from rich.console import Console
from worlds import SPEC, evaluate, write_checkpoint, write_questions, write_world

from vlm_sft_rl.correction.cost import System
from vlm_sft_rl.correction.study import cost_of_points, where_it_declines
from vlm_sft_rl.errors import UserError, printable
from vlm_sft_rl.evaluation.compare import pair_runs, write_comparison
from vlm_sft_rl.evaluation.pages import update_card
from vlm_sft_rl.evaluation.plots import run_point
from vlm_sft_rl.evaluation.specs import JudgeSettings

YES_NO = SPEC.replace("metric: chair", "metric: yes_no").replace("{vocabulary: [circle, square]}", "{}")
FILES = ("run.json", "samples.jsonl", "summary.json")
COUNT = 13  # mutants of each file for each command


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_checkpoint(folder / "model")
    for name, spec in (("captions", SPEC), ("yes_no", YES_NO)):
        write_world(folder / name)
        (folder / name / "spec.yaml").write_text(spec)
        rows = read_lines(folder / name / "data/questions.jsonl")
        write_questions(folder / name, [row | {"answer": "yes", "category": "c"} for row in rows])
    few = {"local_attempts": 1, "total_attempts": 2}
    run(folder, "captions", "greedy")
    run(folder, "captions", "retrospective", decoder="retrospective", **few)
    run(folder, "yes_no", "correct", decoder="correct", max_new_tokens=3)
    run(folder, "yes_no", "direct")
    return folder


def run(world, name, output, **options):
    place = world / name
    options = {"rounds": 10, **options}
    return evaluate(place / "spec.yaml", world / "model", world / output, place / "data", **options)


def compared(world, folder):
    pairs = pair_runs(folder, world / "retrospective", rounds=10)
    write_comparison(world / "compare.html", pairs)


def priced(world, folder):
    cost_of_points([System("before", folder), System("after", world / "correct")], world / "priced")


# command -> (the run that it reads, what it does with its folder)
COMMANDS = {
    "go on": ("greedy", lambda world, folder: run(world, "captions", folder.name, report=True)),
    "go on, retrospective": (
        "retrospective",
        lambda world, folder: run(
            world, "captions", folder.name, decoder="retrospective", local_attempts=1, total_attempts=2, report=True
        ),
    ),
    "derive": (
        "greedy",
        lambda world, folder: run(
            world, "captions", "derived", decoder="drop", greedy_run=folder, overwrite=True
        ),
    ),
    "compare": ("greedy", compared),
    "card": ("greedy", lambda world, folder: update_card(world / "README.md", [folder])),
    "point": ("greedy", lambda world, folder: run_point(folder)),
    "declines": ("correct", lambda world, folder: where_it_declines([folder], world / "declines")),
    "cost": ("direct", priced),
}  # fmt: skip


def refused_or_done(call, place) -> str | None:
    """The message of a UserError that names the place; None where the call ended well. Anything else is raised."""
    try:
        call()
    except UserError as error:
        message = str(error)
        assert str(place) in message, message
        assert printable(message).isprintable() or "\n" in message
        return message
    return None


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_mutated_file_is_refused_by_one_message_or_does_no_harm(world, command, file):
    source, action = COMMANDS[command]
    content, messages = (world / source / file).read_bytes(), []
    for name, mutant in islice(mutants(content, seed=list(COMMANDS).index(command)), COUNT):
        folder = world / "mutant"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(world / source, folder)
        (folder / file).write_bytes(mutant)
        try:
            messages.append(refused_or_done(lambda folder=folder: action(world, folder), folder))
        except Exception as error:
            error.add_note(f"{command}, {file}: {name}")
            raise
    read = command not in ("go on", "go on, retrospective", "derive") or file != "summary.json"
    read &= (command, file) not in {("card", "run.json"), ("card", "samples.jsonl")}
    read &= (command, file) not in {("point", "run.json"), ("point", "samples.jsonl")}
    assert any(messages) is read


def test_mutated_verdicts_and_their_ledger(world):
    write_benchmark("mm_vet", world / "mm_vet/data")
    shutil.rmtree(world / "judged", ignore_errors=True)
    with EndpointServer(lambda body: "Correctness: 0.5") as server:
        judge = JudgeSettings(server.url, "j")

        def judged(folder):
            options = {"judge": judge, "rounds": 10, "max_new_tokens": 4}
            evaluate("mm_vet", world / "model", folder, world / "mm_vet/data", **options)

        judged(world / "judged")
        shutil.copytree(world / "judged", world / "judged-b", dirs_exist_ok=True)
        for file in ("judgements.jsonl", "judge.jsonl"):
            for name, mutant in islice(mutants((world / "judged" / file).read_bytes()), COUNT):
                folder = world / "mutant"
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(world / "judged", folder)
                (folder / file).write_bytes(mutant)
                try:
                    if file == "judgements.jsonl":
                        refused_or_done(
                            lambda folder=folder: pair_runs(folder, world / "judged-b", rounds=10), folder
                        )
                    else:
                        refused_or_done(lambda folder=folder: judged(folder), folder)
                except Exception as error:
                    error.add_note(f"{file}: {name}")
                    raise


def test_an_answer_of_another_question_is_not_taken(world):
    folder = world / "mutant"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(world / "greedy", folder)
    path = folder / "samples.jsonl"
    for before, after in ((b'["circle"]', b'["square"]'), (b"images/2.png", b"images/1.png")):
        path.write_bytes((world / "greedy/samples.jsonl").read_bytes().replace(before, after, 1))
        with pytest.raises(UserError, match="than the question file: it was edited"):
            run(world, "captions", "mutant")


def test_control_characters_of_answers_are_escaped_on_a_terminal(world):
    summary = run(world, "captions", "greedy")
    from vlm_sft_rl.evaluation.pages import summary_table

    screen = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    screen.print(summary_table(summary | {"model": "a\x1b]0;title\x07\x9b2J"}).terminal())
    shown = screen.file.getvalue()
    assert "a\\u001b]0;title\\u0007\\u009b2J" in shown and "\x1b]0" not in shown and "\x9b" not in shown
