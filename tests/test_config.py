"""Each key of a configuration is typed and placed; what is wrong is named with its line and the nearest right key."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gist_fast.config.load import GuideConfig, SourceConfig, StudentConfig, load_config
from gist_fast.config.schema import argument_hints, loss_settings
from gist_fast.config.yaml_values import describe, read_argument
from gist_fast.runtime.errors import InputError

MINIMAL = """\
student: models/student
guide: mixedbread-ai/mxbai-embed-large-v1
data:
  train: pairs.jsonl
training:
  output_dir: runs/one
"""


@pytest.fixture
def write(tmp_path):
    """Write a configuration into a folder of its own and return its path."""
    (tmp_path / "models" / "student").mkdir(parents=True)

    def to_file(text: str = MINIMAL) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return to_file


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_short_forms_and_paths(write, tmp_path):
    config = load_config(write())
    assert config.student == StudentConfig(path=str(tmp_path / "models" / "student"))
    # Nothing of that name is here, so it is left to the hub.
    assert config.guide == GuideConfig(path="mixedbread-ai/mxbai-embed-large-v1")
    assert config.data.train == SourceConfig(path=str(tmp_path / "pairs.jsonl"))
    assert config.data.eval is None
    assert config.arguments == {"output_dir": str(tmp_path / "runs" / "one")}
    assert config.output_dir == tmp_path / "runs" / "one"
    assert not config.unguided


def test_every_section(write, tmp_path):
    config = load_config(
        write("""\
student: {path: models/student, prompts: "query: ", max_seq_length: 128, model_kwargs: {attn_implementation: sdpa}}
guide:
  path: org/guide
  prompts: {anchor: "q: ", positive: "d: "}
  max_seq_length: 512
data:
  train: {path: org/data, split: "train[:10]", name: en, columns: {anchor: question, positive: answer}}
  eval: {path: ../held_out.csv, columns: [q, a]}
loss: {temperature: 0.02, margin: 5e-2, margin_strategy: relative, contrast_positives: false, mini_batch_size: 32}
training:
  output_dir: /runs
  learning_rate: 1e-5
  eval_strategy: no
  bf16: true
  report_to: [tensorboard]
  lr_scheduler_type: cosine
  lr_scheduler_kwargs: {num_cycles: 2}
evaluation: {queries: q.tsv, corpus: c.tsv, relevant: r.tsv, before: false}
""")
    )
    assert config.student.max_seq_length == 128
    assert config.student.model_kwargs == {"attn_implementation": "sdpa"}
    assert config.data.train == SourceConfig(
        "org/data", split="train[:10]", name="en", columns={"anchor": "question", "positive": "answer"}
    )
    assert config.data.eval == SourceConfig(str(tmp_path.parent / "held_out.csv"), columns=["q", "a"])
    assert config.arguments == {
        "temperature": 0.02,
        "margin": 0.05,
        "margin_strategy": "relative",
        "contrast_positives": False,
        "mini_batch_size": 32,
        "output_dir": "/runs",
        "learning_rate": 1e-5,
        "eval_strategy": "no",
        "bf16": True,
        "report_to": ["tensorboard"],
        "lr_scheduler_type": "cosine",
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "prompts": "query: ",
        "guide_prompts": {"anchor": "q: ", "positive": "d: "},
        "guide_max_length": 512,
    }
    assert config.evaluation.queries == str(tmp_path / "q.tsv")
    assert config.evaluation.before is False


def test_several_evaluations_from_the_file_and_the_command_line(write, tmp_path):
    text = MINIMAL + "evaluation: {triplet: t.csv, sts: {path: s.csv, columns: [a, b, c]}, primary: sts}\n"
    config = load_config(write(text), ["--pair_classification", str(tmp_path / "p.csv")]).evaluation
    assert config.triplet == SourceConfig(str(tmp_path / "t.csv"))
    assert config.sts == SourceConfig(str(tmp_path / "s.csv"), columns=["a", "b", "c"])
    assert config.pair_classification == SourceConfig(str(tmp_path / "p.csv"))
    assert config.primary == "sts"


def test_the_arguments_are_made_and_refuse_in_one_line(write):
    config = load_config(write(), ["--learning_rate", "3e-4", "--use_cpu", "--margin_strategy", "relative"])
    arguments = config.training_arguments(eval_strategy="no")
    assert (arguments.learning_rate, arguments.margin_strategy) == (3e-4, "relative")
    with pytest.raises(InputError, match=r"^training: [^\n]*load_best_model_at_end"):
        load_config(write(), ["--load_best_model_at_end", "--use_cpu"]).training_arguments()


def test_the_guide_may_be_left_out_or_refused(write):
    assert load_config(write(MINIMAL.replace("guide: mixedbread-ai/mxbai-embed-large-v1\n", ""))).unguided is False
    config = load_config(write(MINIMAL.replace("mixedbread-ai/mxbai-embed-large-v1", "null")))
    assert config.guide is None
    assert config.unguided


def test_loss_takes_the_fields_that_concern_the_loss():
    assert {"temperature", "margin", "margin_strategy", "contrast_anchors", "backend"} <= set(loss_settings())
    assert not {"learning_rate", "guide_prompts", "output_dir"} & set(loss_settings())
    assert set(loss_settings()) <= set(argument_hints())


def test_every_argument_s_type_can_be_said():
    # A hint that a newer transformers brings and this cannot describe would fail here, not at the user's.
    for name, hint in argument_hints().items():
        assert describe(hint) or name == "parallelism_config"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("guide:", "giude:", "line 2: unknown key 'giude' (did you mean 'guide'?); known: student, guide, data"),
        ("  train:", "  trian:", "line 4: unknown key 'trian' in data (did you mean 'train'?); known: train, eval."),
        ("  output_dir:", "  outputdir:", "line 6: unknown key 'outputdir' in training (did you mean 'output_dir'?)."),
        ("training:", "loss: {learning_rate: 1}\ntraining:", "unknown key 'learning_rate' in loss (it belongs in tra"),
        (
            "training:",
            "loss: {temperatur: 1}\ntraining:",
            "line 5: unknown key 'temperatur' in loss (did you mean 'tem",
        ),
        ("models/student", "{path: x, promts: y}", "line 1: unknown key 'promts' in student (did you mean 'prompts'?)"),
        ("pairs.jsonl", "{path: x, colums: [a]}", "line 4: unknown key 'colums' in data.train (did you mean 'columns'"),
        ("runs/one", "[1]", "line 6: training.output_dir: expected a text or null, got [1]."),
        ("runs/one", "runs\n  max_steps: soon", "line 7: training.max_steps: expected a whole number, got 'soon'."),
        ("runs/one", "runs\n  max_steps: 2.5", "training.max_steps: expected a whole number, got 2.5."),
        ("runs/one", "runs\n  max_steps: 1e3", "training.max_steps: expected a whole number, got 1000.0 (write 1000)."),
        ("runs/one", "runs\n  bf16: yes", "training.bf16: expected true or false, got 'yes' (write true)."),
        ("runs/one", "runs\n  bf16: 1", "training.bf16: expected true or false, got 1."),
        ("runs/one", "runs\n  learning_rate: true", "training.learning_rate: expected a number, got true."),
        ("runs/one", "runs\n  learning_rate: .inf", "training.learning_rate: expected a number, got inf."),
        (
            "runs/one",
            "runs\n  run_name: 7",
            "training.run_name: expected a text or null, got 7 (quote it to make it a text)",
        ),
        ("runs/one", "runs\n  optim: adamw_torhc", "got 'adamw_torhc' (did you mean 'adamw_torch'?)."),
        (
            "runs/one",
            "runs\n  prompts: {anchor: 3}",
            "training.prompts: expected a text, a mapping (each value a text)",
        ),
        (
            "runs/one",
            "runs\nloss: {temperature: 0}",
            "line 7: loss.temperature: expected a finite float above 0, got 0.",
        ),
        ("runs/one", "runs\nloss: {margin_strategy: relativ}", "(did you mean 'relative'?)"),
        (
            "runs/one",
            "runs\nloss: {backend: cuda}",
            "loss.backend: expected one of 'auto', 'triton', 'tiled', 'reference', got 'cuda'",
        ),
        ("runs/one", "runs\nloss: {mini_batch_size: 0}", "loss.mini_batch_size: expected an int of at least 1, got 0."),
        ("runs/one", "runs\n  margin: 1\nloss: {margin: 1}", "margin stands under both loss and training; keep one"),
        ("runs/one", "runs\nloss: 5", "line 7: loss: expected a mapping, got 5."),
        ("runs/one", "null", "training.output_dir is missing. Add 'training: {output_dir: <folder>}'."),
        (
            "runs/one",
            "runs\nevaluation: {queries: q.tsv}",
            "evaluation lacks corpus, relevant; queries, corpus and rel",
        ),
        ("runs/one", "runs\nevaluation: {batch_size: 3}", "evaluation needs queries, corpus and relevant, or pairs"),
        (
            "runs/one",
            "runs\nevaluation: {queries: q.tsv, corpus: c.tsv, relevant: r.tsv, pairs: b.csv}",
            "evaluation has queries, pairs, both for retrieval; keep one.",
        ),
        (
            "runs/one",
            "runs\nevaluation: {pairs: a.csv, sts: b.csv, primary: st}",
            "line 7: evaluation.primary: expected 'retrieval' or 'sts', got 'st' (did you mean 'sts'?).",
        ),
        ("models/student", "{max_seq_length: 8}", "line 1: student.path is missing; it takes a path or a name."),
        (
            "models/student",
            "{path: x, max_seq_length: 0}",
            "student.max_seq_length: expected an int of at least 3, got 0.",
        ),
        ("student: models/student\n", "", "'student' is missing. Add 'student: <path or hub name of a model>'."),
        (
            "data:\n  train: pairs.jsonl\n",
            "data: pairs.jsonl\n",
            "data: expected a mapping with train, eval, got 'pairs",
        ),
        ("  train: pairs.jsonl", "  train: a\n  train: b", "line 5: 'train' is given twice; keep one."),
        ("  train: pairs.jsonl", "  train: [a", "not well-formed YAML"),
        ("runs/one", "!!python/name:os.system x", "line 6: not well-formed YAML (could not determine a constructor"),
        ("runs/one", "runs\n  prompts: 'p'", "training.prompts and the section student both say it; keep one."),
    ],
)
def test_what_is_wrong_is_named_and_placed(write, old, new, says):
    assert old in MINIMAL
    text = MINIMAL.replace(old, new, 1)
    if "both say it" in says:
        text = text.replace("models/student", "{path: models/student, prompts: 'q'}")
    path = write(text)
    found = message(path)
    assert found.startswith(str(path))
    assert says in found


@pytest.mark.parametrize(("text", "says"), [("", "is empty"), ("just words", "expected a mapping of sections")])
def test_files_that_hold_no_mapping(write, text, says):
    assert says in message(write(text))


def test_files_that_cannot_be_read(tmp_path, write):
    write()
    assert message(tmp_path / "confg.yaml").endswith("no such file (did you mean 'config.yaml'?).")
    assert "cannot be read" in message(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"student: caf\xe9")
    assert "byte 13 is not UTF-8" in message(tmp_path / "latin.yaml")


class TestOverrides:
    def test_forms(self, write):
        config = load_config(
            write(),
            [
                *("--learning_rate", "1e-4"),
                *("--training.max-steps", "7"),
                *("--margin", "-0.1"),
                "--temperature=0.5",
                "--bf16",
                *("--student.max_seq_length", "32"),
                *("--report_to", "[none]"),
                *("--run_name", "12"),
                *("--guide.prompts.anchor", "q: "),
                *("--eval_strategy", "no"),
            ],
        )
        arguments = config.arguments
        assert arguments.pop("output_dir").endswith("one")
        assert arguments == {
            "learning_rate": 1e-4,
            "max_steps": 7,
            "margin": -0.1,
            "temperature": 0.5,
            "bf16": True,
            "report_to": ["none"],
            "run_name": "12",
            "guide_prompts": {"anchor": "q: "},
            "eval_strategy": "no",
        }
        # The short form in the file gives way to a mapping, and keeps its path.
        assert config.student.path.endswith("student")
        assert config.student.max_seq_length == 32

    def test_the_last_one_wins_and_the_file_loses(self, write):
        path = write(MINIMAL + "  learning_rate: 1\n  margin: 0.3\n")
        config = load_config(path, ["--learning_rate", "2", "--learning_rate", "3", "--margin", "0.1"])
        assert config.arguments["learning_rate"] == 3
        # The file has the margin under training; the override goes there too, instead of beside it under loss.
        assert config.arguments["margin"] == 0.1

    def test_paths_typed_are_relative_to_where_one_stands(self, write, tmp_path, monkeypatch):
        here = tmp_path / "elsewhere"
        here.mkdir()
        monkeypatch.chdir(here)
        config = load_config(write(), ["--output_dir", "out", "--train", "x.csv", "--guide", "./guide"])
        assert config.output_dir == here / "out"
        assert config.data.train.path == str(here / "x.csv")
        assert config.guide.path == str(here / "guide")
        assert config.student.path == str(tmp_path / "models" / "student")

    @pytest.mark.parametrize(
        ("overrides", "says"),
        [
            (["--lerning_rate", "1"], "--lerning_rate: no such setting (did you mean '--learning_rate'?)."),
            (["--loss.margn", "1"], "--loss.margn: no such setting (did you mean '--loss.margin'?)."),
            (["--training.nothing_of_the_kind", "1"], "--training.nothing_of_the_kind: no such setting"),
            (["--max_seq_length", "8"], "could be --student.max_seq_length or --guide.max_seq_length; write which."),
            (["--learning_rate"], "--learning_rate: needs a value, as in --learning_rate <value>."),
            (["--learning_rate", "--bf16"], "--learning_rate: needs a value"),
            (["--debug"], "for a traceback: gist-fast --debug train"),
            (["--learning_rate", "fast"], "--learning_rate: training.learning_rate: expected a number, got 'fast'."),
            (
                ["--loss.temperature", "-1"],
                "--loss.temperature: loss.temperature: expected a finite float above 0, got -1.",
            ),
            (["0.1"], "unexpected '0.1'; after the configuration come settings"),
            (["--data", "x.jsonl"], "--data: data: expected a mapping with train, eval, got 'x.jsonl'."),
            (["--data.train.path.x", "y"], "data.train.path"),
        ],
    )
    def test_what_is_wrong(self, write, overrides, says):
        assert says in message(write(), *overrides)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-3", -3),
        ("010", 10),
        ("0x10", 16),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("no", "no"),
        ("true", True),
        ("null", None),
        ("", None),
        ("'1'", "1"),
        ("a: b: c", "a: b: c"),
        ("[1, x]", [1, "x"]),
        ("query: ", "query: "),
        ("a # b", "a # b"),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    assert read_argument(text, "--x").plain() == value


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_number_that_python_writes_is_read_as_that_number(number):
    assert read_argument(repr(number), "--x").plain() == number


def test_a_configuration_is_relative_to_its_own_folder(write, tmp_path):
    relative = os.path.relpath(write(), Path.cwd())
    assert load_config(relative).data.train.path == str(tmp_path / "pairs.jsonl")


class TestSeveralSources:
    TWO = MINIMAL.replace("train: pairs.jsonl", "train:\n    nq: nq.jsonl\n    hub: {path: me/titles, split: train}")

    def test_by_name_in_their_order(self, write, tmp_path):
        config = load_config(write(self.TWO))
        assert config.data.train == {
            "nq": SourceConfig(path=str(tmp_path / "nq.jsonl")),
            "hub": SourceConfig(path="me/titles", split="train"),
        }
        assert list(config.data.train) == ["nq", "hub"]

    def test_one_that_is_written_out_is_still_one(self, write, tmp_path):
        text = MINIMAL.replace("pairs.jsonl", "{path: pairs.jsonl, streaming: true, shuffle_buffer: 100}")
        train = load_config(write(text)).data.train
        assert train == SourceConfig(path=str(tmp_path / "pairs.jsonl"), streaming=True, shuffle_buffer=100)

    def test_from_the_command_line(self, write, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        overrides = [
            "--data.train.nq.columns",
            "{anchor: q}",
            "--data.train.more",
            "./x.csv",
            "--data.train.hub.streaming",
        ]
        train = load_config(write(self.TWO), overrides).data.train
        assert train["nq"] == SourceConfig(path=str(tmp_path / "nq.jsonl"), columns={"anchor": "q"})
        assert train["more"] == SourceConfig(path=str(tmp_path / "x.csv"))
        assert train["hub"].streaming

    def test_prompts_of_each(self, write):
        prompts = "{nq: {anchor: 'q: '}, hub: 't: '}"
        text = self.TWO.replace("models/student", f"{{path: models/student, prompts: {prompts}}}")
        text = text.replace(
            "runs/one", "runs/one\n  max_length: {nq: {anchor: 32}, hub: 64}\n  guide_max_length: {anchor: 9}"
        )
        arguments = load_config(write(text)).arguments
        assert arguments["prompts"] == {"nq": {"anchor": "q: "}, "hub": "t: "}
        assert arguments["max_length"] == {"nq": {"anchor": 32}, "hub": 64}
        assert arguments["guide_max_length"] == {"anchor": 9}

    @pytest.mark.parametrize(
        ("old", "new", "says"),
        [
            ("nq: nq.jsonl", "pth: nq.jsonl", "line 5: unknown key 'pth' in data.train (did you mean 'path'?)"),
            ("nq: nq.jsonl", "path: nq.jsonl", "line 6: unknown key 'hub' in data.train; known: path, split, name"),
            ("nq: nq.jsonl", "nq:", "line 5: data.train.nq: expected a text, got null"),
            ("split: train", "splt: train", "line 6: unknown key 'splt' in data.train.hub (did you mean 'split'?)"),
            (
                "split: train",
                "streaming: yes",
                "data.train.hub.streaming: expected true or false, got 'yes' (write true)",
            ),
            ("split: train", "shuffle_buffer: 5", "line 6: data.train.hub.shuffle_buffer is for streaming: true"),
            ("runs/one", "runs\n  max_length: {nq: soon}", "training.max_length: expected a whole number, a mapping"),
            ("runs/one", "runs\nloss: {max_length: 3}", "unknown key 'max_length' in loss (it belongs in training)"),
        ],
    )
    def test_what_is_wrong(self, write, old, new, says):
        assert old in self.TWO
        assert says in message(write(self.TWO.replace(old, new, 1)))

    def test_no_stream_where_all_texts_are_needed(self, write):
        for name in ("pairs", "triplet", "sts", "pair_classification"):
            text = MINIMAL + f"evaluation: {{{name}: {{path: a.csv, streaming: true}}}}\n"
            assert f"evaluation.{name}.streaming: its texts are needed all at once" in message(write(text))
        assert "data.train is empty" in message(write(MINIMAL.replace("pairs.jsonl", "{}")))
