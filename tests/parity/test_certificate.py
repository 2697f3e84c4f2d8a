"""The certificate of models that are right, and of models and collators with one fault each."""

import json
import shutil

import pytest
from tagged_rows import prepared
from training import loaded_trainer
from typer.testing import CliRunner

from vlm_sft_rl.cli.app import app
from vlm_sft_rl.data.collators import VisionCollator
from vlm_sft_rl.decoding import cache, capabilities
from vlm_sft_rl.decoding.cache import RewindBackend
from vlm_sft_rl.demos.frame import VERIFIER
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.load import load_for_inference
from vlm_sft_rl.parity import certificate as parity
from vlm_sft_rl.parity.options import CertifyOptions
from vlm_sft_rl.parity.readings import by_generate
from vlm_sft_rl.parity.rows import sample_rows


@pytest.fixture
def pocket():
    model, processor, _ = load_for_inference(VERIFIER, "cpu")
    return model, processor


def rows(*names: str) -> list[dict]:
    return [row for row in sample_rows(tagged=True) if row["id"] in names]


def begin(pocket, *names: str, collator=None):
    model, processor = pocket
    collator = collator or VisionCollator(processor)
    return parity.begin(model, processor, rows(*names), collator, name="pocket"), collator


def test_the_pocket_model_is_certified(tmp_path):
    result = CliRunner().invoke(app, ["certify", "pocket", "--json", "--output-dir", str(tmp_path)])
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert shown == json.loads((tmp_path / "certificate.json").read_text())
    assert shown["certified"] and not shown["failures"] and not shown["left_out"]
    assert {name: way["verdict"] for name, way in shown["ways"].items()} == {
        name: "refused" if name == "vLLM" and not installed("vllm") else "equal"
        for name in parity.WAYS
        if name != "trainer"
    }
    assert [row["id"] for row in shown["rows"]] == [row["id"] for row in sample_rows(True)]
    assert all("</UN>" in row["answer"] for row in shown["rows"] if row["id"] in ("long", "wide picture"))
    # another picture would be seen
    assert shown["other_pictures"]["least"] > 100 * shown["limits"]["largest"]
    # padding on the left shifts the rows that are shorter than the longest, and nothing else
    shifts = shown["ways"]["trainer, padded left"]["positions_shifted_by"]
    lengths = [len(row["ids"]) for row in shown["rows"]]
    assert shifts == [max(lengths) - length for length in lengths]
    page = (tmp_path / "certificate.html").read_text()
    assert "certified" in page and "http://" not in page and "https://" not in page


def installed(name: str) -> bool:
    return parity.find_spec(name) is not None


def test_a_cached_step_at_a_wrong_position_is_found(pocket, monkeypatch):
    class OneFurther(RewindBackend):
        def add(self, start):
            super().add(start)
            self.offsets = [offset + 1 for offset in self.offsets]

    monkeypatch.setattr(capabilities, "choose_backend", lambda model, copies=1: OneFurther(model))
    certificate, collator = begin(pocket, "short", "long")
    parity.decode_ways(certificate, *pocket)
    parity.train_ways(certificate, *pocket, collator)
    failures = dict(line.split(": ", 1) for line in certificate.failures)
    assert failures.keys() == {"engine", "engine, rewinds", "engine, rewinds in a batch"}
    # the answer's first token is the first that is fed behind the prompt
    start = certificate.cases[0].start
    assert certificate.comparisons["engine"].positions.token == start
    assert failures["engine"].startswith(f"positions differ, row 'short', token {start} (")
    assert certificate.comparisons["engine"].largest > certificate.limits.largest
    # positions are not seen in a batch, log-probabilities are
    assert failures["engine, rewinds in a batch"].startswith("log-probabilities differ, row ")


def test_a_rewind_by_one_slot_too_many_is_found(pocket, monkeypatch):
    class OneShort(RewindBackend):
        def rewind(self, row, length):
            super().rewind(row, length - 1)

    monkeypatch.setattr(capabilities, "choose_backend", lambda model, copies=1: OneShort(model))
    certificate, _ = begin(pocket, "long")
    parity.decode_ways(certificate, *pocket)
    parity.train_ways(certificate, *pocket, VisionCollator(pocket[1]))
    assert {line.split(": ")[0] for line in certificate.failures} == {
        "engine, rewinds",
        "engine, rewinds in a batch",
    }


WORD = 340  # a token of the pocket tokenizer with letters


class Changed(VisionCollator):
    """Writes another token at a place that is counted from the answer's beginning."""

    def __init__(self, processor, place: int, **options):
        super().__init__(processor, **options)
        self.place = place

    def process(self, prepared):
        features, examples = super().process(prepared)
        for ids, example, mask in zip(
            features["input_ids"], examples, features["attention_mask"], strict=True
        ):
            at = example.turns[-1].start + self.place
            for values, start in ((ids, list(mask).index(1)), (example.input_ids, 0)):
                values[start + at] = WORD
            if example.labels[at] != -100:
                example.labels[at] = example.input_ids[at]
        return features, examples


def test_a_changed_token_of_the_prompt_is_found(pocket):
    certificate, collator = begin(pocket, "short", "long", collator=Changed(pocket[1], -6))
    parity.decode_ways(certificate, *pocket)
    parity.train_ways(certificate, *pocket, collator)
    place = certificate.comparisons["generate"].ids
    assert (place.row, place.token) == (0, certificate.cases[0].start - 6)
    assert any(
        line.startswith(f"engine: token ids differ, row 'short', token {place.token}")
        for line in certificate.failures
    )
    assert not certificate.certified


def test_a_changed_token_of_the_answer_is_found(pocket):
    certificate, _ = begin(pocket, "short", "long", collator=Changed(pocket[1], 1))
    # ' Yes': the second token ends the answer of the first row
    assert certificate.strays[1] == certificate.cases[1].start + 1
    assert any("answer's tokens are not its text, row 'long'" in line for line in certificate.failures)


class Refusing(VisionCollator):
    def __call__(self, *args, **settings):
        raise UserError("not today")


def test_a_trainer_that_refuses_is_a_failure_where_the_family_can_be_trained(pocket):
    certificate, _ = begin(pocket, "short")
    parity.decode_ways(certificate, *pocket)
    parity.train_ways(certificate, *pocket, Refusing(pocket[1]))
    assert certificate.reference == "generate" and certificate.failures == ["trainer: not today"]


def test_a_model_that_no_decoder_takes_is_not_certified(pocket, monkeypatch):
    certificate, collator = begin(pocket, "short")
    for way in ("by_generate", "by_engine"):
        monkeypatch.setattr(parity, way, Refusing(pocket[1]))
    parity.decode_ways(certificate, *pocket)
    parity.train_ways(certificate, *pocket, collator)
    assert certificate.failures == ["no way of decoding could be compared"]


def test_an_answer_at_whose_end_decoding_does_not_end_is_found(pocket):
    """The template closes answers by one special token, and generation config and tokenizer end at another."""
    model, processor = pocket
    assert not begin(pocket, "short", "long")[0].endless
    processor.chat_template = processor.chat_template.replace("{{ eos_token }}", "<pad>")
    certificate, _ = begin((model, processor), "short", "long")
    last = len(certificate.cases[0].ids) - 1
    assert certificate.failures[0] == (
        f"collator: decoding does not end where the answer does, row 'short', token {last} ('? ASSISTANT: Yes' "
        "['<pad>'] '')"
    )


def test_rows_are_counted_by_the_tokens_that_are_compared(tmp_path):
    """One last answer has no loss; another holds a token at which `generate` ends."""
    talk = ["Is there a cup?", "Yes", "Is there a cow?", "No</s> cow"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(talk)]
    silent = [*messages[:3], {**messages[3], "content": "No", "weight": 0}]
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"id": i, "messages": m}) + "\n" for i, m in enumerate((silent, messages)))
    )
    certificate = parity.certify(VERIFIER, path, CertifyOptions(device="cpu"))
    assert certificate.tokens[0] == 0 < certificate.tokens[1] < sum(len(c.answer) for c in certificate.cases)
    assert f" {certificate.tokens[1]} tokens in 2 rows" in certificate.table().note
    notes = certificate.notes()
    assert notes["row '0'"].startswith("its last answer has no loss")
    assert notes["engine, rewinds"].startswith("not of every kind")
    generate = certificate.comparisons["generate"]
    assert generate.verdict(certificate.limits) == "log-probabilities differ" and generate.place.value is None
    assert any(line.startswith("generate: ") and "here None" in line for line in certificate.failures)
    parity.write(certificate, tmp_path / "out")


def test_a_name_that_transformers_has_changed_is_found(pocket, monkeypatch):
    """The engine reads keys from a field of the outputs that was renamed once."""
    certificate, _ = begin(pocket, "short")
    monkeypatch.setattr(cache, "CACHE", "keys")
    parity.decode_ways(certificate, *pocket)
    crashed = {name: o for name, o in certificate.outcomes.items() if o.status == "crashed"}
    assert set(crashed) == {"engine", "engine, rewinds", "engine, rewinds in a batch"}
    assert all("keys" in outcome.reason for outcome in crashed.values())


def test_rows_of_ones_own_and_a_row_that_cannot_be_read(tmp_path, pocket):
    picture = rows("short")[0]["images"][0]
    picture.save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "Is there a cup?", "answer": "No"}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    certificate = parity.certify(VERIFIER, tmp_path / "rows.jsonl", CertifyOptions(limit=1, device="cpu"))
    assert certificate.certified and len(certificate.cases) == 1
    assert certificate.notes()["rows"] == "the first 1 of more; --limit takes more"
    (tmp_path / "rows.jsonl").write_text(json.dumps(row | {"image": "b.png"}))
    with pytest.raises(UserError, match=r"b\.png"):
        parity.certify(VERIFIER, tmp_path / "rows.jsonl", CertifyOptions(device="cpu"))


@pytest.mark.parametrize("words", [("--limit", "2"), ("--image-root", ".")])
def test_options_for_rows_are_refused_without_rows(words):
    result = CliRunner().invoke(app, ["certify", "pocket", *words])
    assert isinstance(result.exception, UserError) and f"{words[0]} is about rows" in str(result.exception)


def test_a_prompt_that_training_never_saw_ends_with_status_1(tmp_path):
    """A template may ask for an answer in other words than those in which it writes one, and nothing complains."""
    model = tmp_path / "model"
    shutil.copytree(VERIFIER, model)
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(
        template.replace("{% if add_generation_prompt %} A", "{% if add_generation_prompt %} a")
    )
    rows("short")[0]["images"][0].save(tmp_path / "a.png")
    row = {"id": "cup", "image": "a.png", "question": "Is there a cup?", "answer": "No"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    out = tmp_path / "out"
    arguments = [str(model), str(tmp_path / "rows.jsonl"), "--device", "cpu", "--output-dir", str(out)]
    result = CliRunner().invoke(app, ["certify", *arguments])
    assert result.exit_code == 1 and "not certified" in result.output
    assert "generate: token ids differ, row 'cup', token " in result.output
    shown = json.loads((out / "certificate.json").read_text())
    wrong = {name for name, way in shown["ways"].items() if way["verdict"] == "token ids differ"}
    assert not shown["certified"] and wrong >= {"generate", "engine", "engine, rewinds"}
    assert shown["ways"]["trainer, packed"]["verdict"] == "equal"
    assert "failed" in (out / "certificate.html").read_text()


def test_an_adapter_is_trained_unmerged_and_decoded_merged(tmp_path):
    base = prepared(tmp_path / "base", "llava")
    trainer, _ = loaded_trainer(base, tmp_path, use_peft=True, lora_r=4)
    trainer.train()
    trainer.save_model()
    folder = trainer.args.output_dir
    certificate = parity.certify(folder, rows("short"), CertifyOptions(device="cpu"))
    assert certificate.certified, certificate.failures
    # without the adapter it would say something else
    model, processor, _ = load_for_inference(base, "cpu")
    (plain,) = by_generate(model, processor, certificate.cases, [[0]])
    trained = certificate.outcomes["trainer"].readings
    assert parity.compare(trained, [plain]).largest > 10 * certificate.limits.largest
