"""The loop: rounds of build -> train -> evaluate -> sample, each stage in a folder of its own under a manifest.

    OUTPUT/round-0/rows.jsonl train/ test/{greedy,direct,samples,select,refine}/ pool/ metrics.json
    OUTPUT/round-1/…   OUTPUT/summary.json   OUTPUT/report.html   OUTPUT/scaling.csv

Killed at any moment, the same command gives the same result as an uninterrupted run.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import UserError, in_words
from ..graders import UNREADABLE, load_grader
from ..graders.prompts import load_prompts
from ..io import read_json, write_json, write_jsonl
from ..runs import digest, run_stage
from ..shapes import AMOUNT
from .builders import Mixture, build_mixture, build_pairs
from .config import SelfTrainingConfig
from .figures import (
    SHOWN,
    answer_flips,
    by_kind,
    difference,
    group,
    interval,
    majority_right,
    out_of_candidates,
    scaling,
    select_sizes,
)
from .pool import Candidate, build_pool, check_apart, grade_samples, pool_figures, read_questions
from .processes import ServedModel
from .rounds import Rounds, identity, read_figures, write_once
from .sampling import CheckpointSampler, EndpointSampler, read_store, refusals, run_sampling, task

SYSTEMS = ("direct", "greedy", "sample", "majority", "self_select", "self_refine", "pass_at_k")
GRADED = ("direct", "greedy", "samples", "self_select", "self_refine")  # answers that `graded.jsonl` has
# offsets of the stages' random streams within a round
STREAMS = {"pool": 1, "samples": 2}


class SelfTraining(Rounds):
    """One run of R3V's loop.

    Raises UserError: settings or files that cannot be used; before any work.
    """

    config: SelfTrainingConfig

    def read(self) -> None:
        config = self.config
        self.grader = load_grader(config.dataset, config.rules)
        self.pool_grader = load_grader(config.dataset, config.rules, building=True)
        self.prompts = load_prompts(config.dataset, config.prompt_style)
        self.train = read_questions(config.train_questions, self.image_root, self.grader)
        self.test = read_questions(config.test_questions, self.image_root, self.grader)
        check_apart(self.train, self.test, str(config.test_questions))
        self.warmup = (
            read_questions(config.warmup_file, self.image_root, self.grader, fields=("answer", "rationale"))
            if config.warmup_file
            else []
        )
        check_apart(self.warmup, self.test, str(config.warmup_file))
        if config.serve:
            self.engine = None
        self.unanswered: dict[str, int] = {}  # store -> prompts that a server refused
        self._sampler: CheckpointSampler | EndpointSampler | None = None
        self._server: ServedModel | None = None

    @property
    def untrained(self) -> bool:
        """Whether round 0 is the base itself."""
        return self.config.start == "cold" or self.config.variant == "zero_shot"

    def ends_with_dpo(self, round_: int) -> bool:
        if self.config.variant == "star_dpo":
            return round_ == self.config.rounds
        return super().ends_with_dpo(round_)

    def round(self, round_: int) -> dict:
        self.build_and_train(round_)  # on what the rounds before have sampled
        if round_ < self.config.rounds:
            self.sample(round_)
        return self.evaluate(round_)

    def made_with(self, round_: int) -> dict[str, Any]:
        questions = {
            f"{split}_questions": digest(getattr(self, split)) for split in ("train", "test", "warmup")
        }
        return questions | self.config.made_with(round_)

    def figures(self, rounds: list[dict]) -> dict[str, Any]:
        def of_rounds(name: str) -> dict[int, dict]:
            paths = {m["round"]: self.folder(m["round"]) / name for m in rounds}
            return {number: read_json(path) for number, path in paths.items() if path.is_file()}

        unanswered = {"unanswered": self.unanswered} if self.unanswered else {}
        return {
            "variant": self.config.variant,
            "pools": of_rounds("pool.json"),
            "rows": of_rounds("rows.json"),
            **unanswered,
        }

    def build_and_train(self, round_: int) -> None:
        self.claim(round_)
        if round_ == 0 and self.untrained:
            return
        folder = self.folder(round_)
        if not (round_ > 0 and self.config.round_objective == "dpo"):
            mixture = self.mixture(round_)
            rows = folder / "rows.jsonl"
            write_once(rows, mixture.rows)
            write_json(folder / "rows.json", dict(sorted(mixture.counts.items())))
            self.console.print(f"  rows: {in_words(mixture.counts)}")
            self.trainer.train("sft", folder / "train", rows, self.start(round_), self.console)
        if self.ends_with_dpo(round_):
            self._train_dpo(round_)

    def _train_dpo(self, round_: int) -> None:
        folder = self.folder(round_)
        config = self.config
        kinds = ["cot"] if config.variant == "star_dpo" else config.pair_kinds
        pool, weights = self.pool(round_)[0], config.pair_weights
        pairs, counts = build_pairs(self.train, pool, self.prompts, kinds, weights=weights, seed=self.seed)
        self._needs(
            len(pairs), round_, "no question has both a right and a wrong sample, so there is no pair"
        )
        write_once(folder / "pairs.jsonl", pairs)
        write_json(folder / "pairs.json", dict(counts))
        self.console.print(f"  pairs: {in_words(counts)}")
        if config.round_objective != "dpo":
            start = str(folder / "train")
        else:  # the base answers in no form that could be preferred: round 0 stands for it
            start = self.model(round_ - 1 if config.restart_from == "previous" else 0)
        self.trainer.train("dpo", folder / "dpo", folder / "pairs.jsonl", start, self.console)

    def mixture(self, round_: int) -> Mixture:
        """The rows of a round, from the samples of all rounds before."""
        pool, left_out = self.pool(round_)
        settings = self.config.build_settings(self.seed + round_)
        mixture = build_mixture(self.train, pool, self.warmup, self.prompts, settings, self._fits)
        mixture.counts.update({f"{reason} (sample left out)": count for reason, count in left_out.items()})
        if round_ > 0:
            learned = sum(not r["id"].endswith(("/direct", "/warmup")) for r in mixture.rows)
            self._needs(learned, round_, "no sample could be learned from")
        return mixture

    def _needs(self, count: int, round_: int, what: str) -> None:
        if count:
            return
        figures = read_figures(self.folder(round_ - 1) / "pool.json", POOL)
        raise UserError(
            f"round {round_}: {what}. Of {figures['samples']} samples of round {round_ - 1}, {figures['right']:.0%} are "
            f"right and {figures['unreadable']:.0%} have no readable answer. With none right, begin with a warm-up "
            "(`warmup_file`), other prompts or easier questions; with all right there is nothing left to learn: use "
            "harder questions, or a higher `sample_temperature`."
        )

    def pool(self, round_: int) -> tuple[dict[str, list[Candidate]], Counter]:
        """Graded samples of the rounds before `round_`."""
        graded = [c for before in range(round_) for c in self.graded(before)]
        return build_pool(
            graded, deduplicate=self.config.deduplicate, min_chars=self.config.min_rationale_chars
        )

    def graded(self, round_: int) -> list[Candidate]:
        store = read_store(self.folder(round_) / "pool")
        return grade_samples(store, self.train, self.pool_grader, round_=round_)

    def sample(self, round_: int) -> None:
        """Samples of the training questions, for later rounds."""
        prompts = [task(q, self.prompts.ask(q)) for q in self.train]
        n = self.config.samples_now
        self.answers(round_, "pool", prompts, n, self.config.sampling())
        figures = pool_figures(self.graded(round_), len(self.train))
        write_json(self.folder(round_) / "pool.json", figures)
        self.console.print(
            f"  pool: {figures['samples']} samples, {figures['right']:.1%} right, {figures['unreadable']:.1%} without "
            f"a readable answer; questions solved {figures['questions_solved']:.1%}, mixed {figures['questions_mixed']:.1%}"
        )

    def answers(self, round_: int, name: str, tasks: Sequence[dict], n: int, sampling: dict) -> list[dict]:
        """The store of a round under `name`, filled if it is not."""
        folder, model = self.folder(round_) / name, self.model(round_)
        seed = 1_000_003 * self.seed + 101 * round_ + STREAMS.get(Path(name).name, 0)
        config = {
            "model": identity(model),
            "served_by": self.config.serve,
            "engine": self.engine,
            "tasks": digest(list(tasks)),
            "sampling": sampling,
            "seed": seed,
        }
        label = f"round {round_}, {name}"

        def fill() -> None:
            source = self.source(round_, model)
            if self.config.serve or self.workers or self.in_process:
                sampler = self._sampler_of(round_, source)
                run_sampling(
                    folder,
                    tasks,
                    n,
                    config,
                    sampler,
                    sampling=sampling,
                    seed=seed,
                    label=label,
                    workers=self.workers,
                    console=self.console,
                )
            else:
                job = {"n": n, "config": config, "sampling": sampling, "seed": seed, "label": label}
                self.launch(folder, {**job, "job": "sample", "model": source, "tasks": list(tasks)})

        run_stage(folder, {"stage": name, **config, "n": n}, fill)
        lines = read_store(folder)
        if count := len(refusals(lines)):
            self.unanswered[str(folder.relative_to(self.output))] = count
        return lines

    def source(self, round_: int, model: str) -> str:
        if self.config.serve:
            return self.trainer.whole_model(model, self.folder(round_))
        return super().source(round_, model)

    def _sampler_of(self, round_: int, model: str) -> CheckpointSampler | EndpointSampler:
        """One sampler for all stages of a round: the model is loaded, or its server started, once."""
        if self._sampler is None:
            config = self.config
            if config.serve:
                if Path(model).is_dir():  # not a name of the Hub
                    from ..models.vllm_names import for_vllm

                    model = str(for_vllm(model))
                with self.console.status(f"  starting the server of {model}"):
                    self._server = ServedModel(
                        config.serve,
                        model,
                        self.folder(round_) / "serve.log",
                        timeout=config.serve_timeout,
                        concurrency=config.serve_concurrency,
                    )
                self._sampler = EndpointSampler(self._server.client, self.image_root)
            else:
                self._sampler = CheckpointSampler(model, self.image_root, self.options)
        return self._sampler

    def evaluate(self, round_: int) -> dict:
        """Answer and grade; writes `graded.jsonl` and `metrics.json` of the round and returns the latter."""
        answers = self._answer_test(round_)
        columns = zip(self.test, *(answers[name] for name in GRADED), strict=True)
        write_jsonl(
            self.folder(round_) / "graded.jsonl",
            [
                {"id": question["id"], "answer": question["answer"]}
                | {name: _as_json(candidates) for name, candidates in zip(GRADED, row, strict=True)}
                for question, *row in columns
            ],
        )
        metrics = self._measure(round_, answers)
        write_json(self.folder(round_) / "metrics.json", metrics)
        self.console.print(
            "  test: " + ", ".join(f"{name} {metrics[name]['value']:.3f}" for name in SYSTEMS),
            highlight=False,
        )
        return metrics

    def _answer_test(self, round_: int) -> dict[str, Any]:
        """Graded answers to the test questions: those of GRADED, and `selections` by the number of candidates shown."""
        config, prompts, test = self.config, self.prompts, self.test
        greedy_settings = {**config.sampling(), "temperature": 0.0, "top_p": None, "top_k": None}

        def greedy_pass(name: str, texts: Sequence[str]) -> list[Candidate]:
            tasks = [task(q, p) for q, p in zip(test, texts, strict=True)]
            lines = self.answers(round_, f"test/{name}", tasks, 1, greedy_settings)
            return grade_samples(lines, test, self.grader, round_=round_)

        direct = greedy_pass("direct", [prompts.ask_directly(q) for q in test])
        greedy = greedy_pass("greedy", [prompts.ask(q) for q in test])
        tasks = [task(q, prompts.ask(q)) for q in test]
        lines = self.answers(round_, "test/samples", tasks, config.test_samples, config.sampling())
        samples = group(grade_samples(lines, test, self.grader, round_=round_), test)

        def select_of(n: int) -> list[Candidate]:
            texts = [
                prompts.ask_to_select(q, [c.text for c in cs[:n]])
                for q, cs in zip(test, samples, strict=True)
            ]
            return greedy_pass("select" if n == SHOWN else f"select-{n}", texts)

        selections = {n: select_of(n) for n in select_sizes(config.test_samples)}
        refine = greedy_pass(
            "refine", [prompts.ask_to_refine(q, c.text) for q, c in zip(test, greedy, strict=True)]
        )
        select = selections[min(SHOWN, config.test_samples)]
        answers = dict(zip(GRADED, (direct, greedy, samples, select, refine), strict=True))
        return {**answers, "selections": selections}

    def _measure(self, round_: int, answers: dict[str, Any]) -> dict:
        samples, select = answers["samples"], answers["self_select"]
        shown = [candidates[:SHOWN] for candidates in samples]
        values = {
            "direct": [c.right for c in answers["direct"]],
            "greedy": [c.right for c in answers["greedy"]],
            "sample": [sum(c.right for c in cs) / len(cs) for cs in samples],
            "majority": [majority_right(cs) for cs in shown],
            "self_select": [c.right for c in select],
            "self_refine": [c.right for c in answers["self_refine"]],
            "pass_at_k": [float(any(c.right for c in cs)) for cs in shown],
            "out_of_candidates": [out_of_candidates(c, cs) for c, cs in zip(select, shown, strict=True)],
            "unreadable": [c.status == UNREADABLE for c in answers["greedy"]],
        }
        rounds, seed = self.config.bootstrap_rounds, self.seed

        def minus(a: str, b: str) -> dict:
            return difference(values[a], values[b], rounds, seed)

        return {
            "round": round_,
            "n": len(self.test),
            "k": len(shown[0]),
            **{name: interval(v, rounds, seed) for name, v in values.items()},
            "flips": {
                "refine against greedy": answer_flips(values["greedy"], values["self_refine"]),
                "select against greedy": answer_flips(values["greedy"], values["self_select"]),
            },
            "differences": {
                "self_select - majority": minus("self_select", "majority"),
                "self_select - greedy": minus("self_select", "greedy"),
                "self_refine - greedy": minus("self_refine", "greedy"),
            },
            "by_kind": by_kind(self.test, values["greedy"]),
            "scaling": scaling(samples, rounds, seed, answers["selections"]),
        }

    def _fits(self, row: dict) -> bool:
        return self._length is None or self._length(row) <= self.config.max_row_tokens

    @cached_property
    def _length(self):
        """Row -> tokens with its images, or None without a limit."""
        if self.config.max_row_tokens is None:
            return None
        from ..data.chat import load_processor
        from ..data.collators import VisionCollator

        collator = VisionCollator(load_processor(self.base), self.image_root)
        return lambda row: len(collator.encode(row).input_ids)

    def free(self) -> None:
        if self._server is not None:
            self._server.stop()
        if isinstance(self._sampler, CheckpointSampler):
            self._sampler.close()
        self._sampler = self._server = None
        super().free()


POOL = dict.fromkeys(("samples", "right", "unreadable"), AMOUNT)


def _as_json(candidates: Candidate | list[Candidate]) -> list | dict:
    return [c.to_json() for c in candidates] if isinstance(candidates, list) else candidates.to_json()
