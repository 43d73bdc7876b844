"""Gradient caching changes memory and time, nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

from gist_fast.losses import CachedGISTEmbedLoss, GISTEmbedLoss
from gist_fast.losses.activation_memory import GIB, ActivationMemory, measure_kept
from gist_fast.losses.gradient_cache import GradientCache, _Budget
from gist_fast.losses.guide import TOKENS
from gist_fast.losses.mini_batches import MiniBatches
from gist_fast.runtime.errors import InputError

ROWS = 13


def batch(model, pairs, rows=ROWS, first=0):
    """Features of columns whose texts differ much in length."""
    columns = [list(pairs[c])[first : first + rows] for c in ("anchor", "positive")]
    columns[1] = [" ".join([text] * (1 + 3 * (row % 4))) for row, text in enumerate(columns[1])]
    return [model.preprocess(column) for column in columns]


def gradients(loss, features, model, seed=0, scale=1.0):
    """Value and gradients, in the mode that the model is in."""
    model.zero_grad()
    torch.manual_seed(seed)
    value = loss(features, None)
    (value * scale).backward()
    return value.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(first, second, tolerance):
    assert first[0] == pytest.approx(second[0], rel=tolerance)
    assert first[1].keys() == second[1].keys()
    largest = max(g.abs().max().item() for g in second[1].values())
    for name, expected in second[1].items():
        error = (first[1][name] - expected).abs().max().item()
        assert error <= tolerance * largest, f"{name}: error {error}, largest gradient {largest}"


def assert_equal(first, second):
    assert first[0] == second[0]
    assert first[1].keys() == second[1].keys()
    for name, expected in second[1].items():
        assert torch.equal(first[1][name], expected), name


def cached(student, guide, **kwargs):
    return CachedGISTEmbedLoss(student, guide, temperature=0.1, margin=0.05, **kwargs)


@pytest.mark.parametrize("memory", [0.0, 2e-4, "auto"])
@pytest.mark.parametrize(
    "sizes",
    [{"mini_batch_size": 1}, {"mini_batch_size": 5}, {"mini_batch_size": 64}, {"mini_batch_num_tokens": 60}],
    ids=str,
)
def test_any_mini_batches_give_the_uncached_gradients(memory, sizes, student, guide, pairs):
    student.eval().double(), guide.double()
    loss = cached(student, guide, activation_memory=memory, **sizes)
    expected = gradients(
        GISTEmbedLoss(student, guide, temperature=0.1, margin=0.05), batch(student, pairs), student, scale=0.37
    )
    assert_close(gradients(loss, batch(student, pairs), student, scale=0.37), expected, 1e-12)


@pytest.mark.parametrize("sort", [True, False])
def test_random_numbers_are_replayed(sort, student, guide, pairs):
    """With dropout, second passes give bitwise what the activations of the first would have given."""
    student.train()
    results, after = [], []
    for memory in (0.0, 1.0):
        loss = cached(student, guide, mini_batch_num_tokens=70, activation_memory=memory, sort_by_length=sort)
        results.append(gradients(loss, batch(student, pairs), student))
        after.append(torch.get_rng_state())
    assert_equal(*results)
    assert torch.equal(*after)
    other = gradients(loss, batch(student, pairs), student, seed=1)
    assert other[0] != results[0][0], "no dropout: the test proves nothing"


def test_part_of_the_activations_kept(student, guide, pairs):
    """Whatever is kept, the gradient is the same but for the order of its summands."""
    student.train()
    columns = [MiniBatches(f, max_rows=3) for f in batch(student, pairs)]
    shares = set()
    results = []
    for memory in (0.0, 1.5e-3, 2.5e-3, 3.5e-3, 1.0):  # about 3 to 5 MB in all
        student.zero_grad()
        torch.manual_seed(0)
        cache = GradientCache(student, columns, ActivationMemory(memory))
        embeddings = cache.embed()
        shares.add(cache.kept)
        cache.backward([torch.sin(x.detach()) for x in embeddings], torch.tensor(2.0))
        total = sum(x.sum().item() for x in embeddings)
        results.append((total, {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}))
    assert len(shares) >= 4
    assert {0.0, 1.0} <= shares
    for other in results[1:]:
        assert_close(other, results[0], 1e-5)


def test_the_budget_is_kept(student, pairs):
    """The sum of what is kept stays under the budget, from the first batch on, and a second pass has its room."""
    columns = [MiniBatches(f, max_rows=2) for f in batch(student, pairs)]
    device = torch.device("cpu")
    sizes = {}
    for c, column in enumerate(columns):
        for g, features in enumerate(column):
            with measure_kept(student, device) as kept:
                student(features)
            sizes[c, g] = kept.bytes
    for limit in (0.3, 0.5, 1.2):
        memory = ActivationMemory(limit * sum(sizes.values()) / GIB)
        for _ in range(3):
            cache = GradientCache(student, columns, memory)
            cache.embed()
            held = [sizes[p.column, p.group] for p in cache._mini_batches if p.embedding is not None]
            spare = max(sizes.values()) if cache.kept < 1 else 0
            assert sum(held) + spare <= limit * sum(sizes.values())
            assert (limit > 1) == (cache.kept == 1)
    assert len(held) > 0


def test_measured_activations_are_those_of_the_graph(student, pairs):
    features = batch(student, pairs)[0]
    tokens = features["input_ids"].numel()
    with measure_kept(student, torch.device("cpu")) as kept:
        student(dict(features))
    student.train()
    with torch.no_grad(), measure_kept(student, torch.device("cpu")) as none:
        student(dict(features))
    assert none.bytes == 0
    # Two layers of width 32 keep at least the inputs of their six matrix products.
    assert kept.bytes >= 2 * tokens * 4 * (4 * 32 + 32 + 37)


def test_gradient_accumulation_adds_up(student, guide, pairs):
    student.eval().double(), guide.double()
    parts = [batch(student, pairs, first=first) for first in (0, 20)]
    plain = GISTEmbedLoss(student, guide, temperature=0.1)
    loss = CachedGISTEmbedLoss(student, guide, temperature=0.1, mini_batch_size=4)
    expected = [gradients(plain, [dict(f) for f in part], student)[1] for part in parts]
    student.zero_grad()
    values = [loss(part, None) for part in parts]  # the second forward pass comes before the first backward one
    for value in values:
        (value / 2).backward()
    for name, p in student.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, (expected[0][name] + expected[1][name]) / 2, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("memory", [0.0, 1.0])
@pytest.mark.parametrize("own_guide", [False, True], ids=["guide", "self-guided"])
def test_under_autocast(memory, own_guide, student, guide, pairs):
    """Weights that were cast without a graph must not be met again: every gradient is there, in both passes."""
    student.eval()
    guide = student if own_guide else guide
    plain = GISTEmbedLoss(student, guide, temperature=0.1)
    loss = CachedGISTEmbedLoss(student, guide, temperature=0.1, mini_batch_size=5, activation_memory=memory)
    exact = gradients(plain, batch(student, pairs), student)
    results = []
    for each in (plain, loss):
        student.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = each(batch(student, pairs), None)
        assert value.dtype == torch.float32
        value.backward()
        results.append((value.item(), {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}))
    assert results[0][1].keys() == results[1][1].keys() == exact[1].keys()
    assert_close(results[1], results[0], 0.06)
    assert_close(results[0], exact, 0.06)


def test_replay_under_autocast_is_exact(student, guide, pairs):
    student.train()
    results = []
    for memory in (0.0, 1.0):
        loss = cached(student, guide, mini_batch_size=5, activation_memory=memory)
        student.zero_grad()
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(batch(student, pairs), None)
        value.backward()
        results.append((value.item(), {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}))
    assert_equal(*results)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("memory", [0.0, 1.0])
def test_with_gradient_checkpointing(memory, reentrant, student, guide, pairs):
    student.train()
    loss = cached(student, guide, mini_batch_size=5, activation_memory=memory)
    expected = gradients(loss, batch(student, pairs), student)
    student[0].auto_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # its functions look at their inputs only
        student[0].auto_model.enable_input_require_grads()
    device = torch.device("cpu")
    with measure_kept(student, device) as kept:
        student(batch(student, pairs)[1])
    checkpointed = gradients(loss, batch(student, pairs), student)
    assert_equal(checkpointed, expected)
    student[0].auto_model.gradient_checkpointing_disable()
    with measure_kept(student, device) as whole:
        student(batch(student, pairs)[1])
    assert kept.bytes < whole.bytes / 2


def test_with_lora(student, guide, pairs):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=4, lora_dropout=0.1, target_modules=["query", "value"], init_lora_weights=False)
    student.add_adapter(adapter)
    student.train()
    results = [
        gradients(cached(student, guide, mini_batch_size=5, activation_memory=m), batch(student, pairs), student)
        for m in (0.0, 1.0)
    ]
    assert all("lora" in name for name in results[0][1])
    assert_equal(*results)
    student.eval()
    assert_close(
        gradients(cached(student, guide, mini_batch_size=5), batch(student, pairs), student),
        gradients(GISTEmbedLoss(student, guide, temperature=0.1, margin=0.05), batch(student, pairs), student),
        2e-5,
    )


@pytest.mark.parametrize("memory", [0.0, 1.0])
def test_under_matryoshka(memory, student, guide, pairs):
    student.eval().double(), guide.double()
    results = []
    for inner in (
        GISTEmbedLoss(student, guide, temperature=0.1, margin=0.05),
        cached(student, guide, mini_batch_num_tokens=60, activation_memory=memory),
    ):
        loss = MatryoshkaLoss(student, inner, [32, 16, 5], [1.0, 0.5, 0.3])
        results.append(gradients(loss, batch(student, pairs), student, scale=3.0))
    assert_close(results[1], results[0], 1e-11)


def test_a_learnt_temperature_is_refused_under_matryoshka(student, guide, pairs):
    """Its weights would not reach the temperature's gradient."""
    inner = cached(student, guide, learn_temperature=True)
    loss = MatryoshkaLoss(student, inner, [32, 8], [1.0, 0.3])
    with pytest.raises(InputError, match=r"learn_temperature: a decorator, .* Use matryoshka_dims in its place"):
        loss(batch(student, pairs), None)


def test_float16_gradients_do_not_vanish(student, guide, pairs):
    """The mean over many rows makes gradients by an embedding that float16 cannot hold."""
    student.eval()
    features = batch(student, pairs)
    for f in features:  # longer embeddings have smaller gradients
        f.pop("token_type_ids", None)
    student[0].auto_model.encoder.layer[-1].output.LayerNorm.weight.data.mul_(3e3)
    expected = gradients(GISTEmbedLoss(student, guide, temperature=1.0), [dict(f) for f in features], student)
    loss = CachedGISTEmbedLoss(student, guide, temperature=1.0, mini_batch_size=5)
    loss.compute_dtype = torch.float16
    assert_close(gradients(loss, features, student), expected, 0.02)


def test_a_second_backward_pass_is_refused(student, guide, pairs):
    loss = cached(student, guide, mini_batch_size=5)(batch(student, pairs), None)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_a_loss_that_is_dropped_takes_its_activations_along(student, guide, pairs):
    import gc
    import weakref

    loss = cached(student, guide, mini_batch_size=5, activation_memory=1.0)
    seen = []
    embed = GradientCache.embed
    GradientCache.embed = lambda self: (seen.append(weakref.ref(self)), embed(self))[1]
    try:
        value = loss(batch(student, pairs), None)
    finally:
        GradientCache.embed = embed
    assert seen[0]() is not None
    gc.disable()
    try:
        del value
        assert seen[0]() is None, "a reference cycle keeps the activations until the garbage collector runs"
    finally:
        gc.enable()


def test_copies_of_the_loss_share_nothing(student, guide, pairs):
    loss = cached(student, guide, mini_batch_size=5)
    assert copy.deepcopy(loss).activation_memory is not loss.activation_memory


@pytest.mark.parametrize("value", [-1, "all", True, None])
def test_wrong_memory(value, student, guide):
    with pytest.raises(ValueError, match="activation_memory: expected 'auto', or a number of GiB of at least 0, got "):
        CachedGISTEmbedLoss(student, guide, activation_memory=value)


def test_room_before_anything_was_seen():
    """The first mini-batch is tried; what it took decides about itself and all others."""

    class Column:
        tokens = (10, 5, 5)

    memory = ActivationMemory(1.0)
    room = _Budget(memory, [Column()], budget=100)
    assert room.likely_fits(10)
    assert not room.take(10, 60), "no room for it and for a second pass of the like"
    assert room.likely_fits(5)
    assert room.take(5, 30)
    assert not room.likely_fits(5)
    assert _Budget(memory, [Column()], budget=120).take(10, 60), "all fit, so there is no second pass"


def test_the_guide_reads_mini_batches_of_its_own(student, guide, pairs, monkeypatch):
    monkeypatch.setattr("gist_fast.losses.guide.default_tokens", lambda device: 50)
    texts = [list(pairs[c])[:ROWS] for c in ("anchor", "positive")]
    features = batch(student, pairs)
    for f, column in zip(features, texts, strict=True):
        f[TOKENS] = guide.preprocess(column)
    widths = []
    forward = guide.forward
    guide.forward = lambda f, **kw: (widths.append(tuple(f["input_ids"].shape)), forward(f, **kw))[1]
    loss = GISTEmbedLoss(student, guide)
    inputs = [{TOKENS: f[TOKENS]} for f in features]
    embeddings = loss.guide_embeddings(features, inputs)
    guide.forward = forward
    assert all(rows * width <= 50 for rows, width in widths)
    for column, embedding in zip(texts, embeddings, strict=True):
        torch.testing.assert_close(embedding, guide.encode(column, convert_to_tensor=True, batch_size=1))


def test_weights_do_not_depend_on_the_memory_that_was_free(student, guide, pairs):
    """Part of the activations kept: bitwise the gradients of all or none of them kept."""
    student.train()
    results = []
    for memory in (0.0, 2.5e-3, 1.0):
        loss = cached(student, guide, mini_batch_size=3, activation_memory=memory)
        results.append(gradients(loss, batch(student, pairs), student))
    for other in results[1:]:
        assert_equal(other, results[0])


def test_limits_of_control_groups(tmp_path, monkeypatch):
    from gist_fast.runtime import memory

    (tmp_path / "memory" / "job" / "task").mkdir(parents=True)
    (tmp_path / "memory" / "job" / "memory.limit_in_bytes").write_text("1000\n")
    (tmp_path / "memory" / "job" / "memory.usage_in_bytes").write_text("400\n")
    (tmp_path / "slice").mkdir()
    (tmp_path / "slice" / "memory.max").write_text("max\n")
    processes = tmp_path / "cgroup"
    processes.write_text("4:memory:/job/task\n3:cpu:/\n0::/slice\n")
    groups = memory._control_groups(processes, tmp_path)
    assert tmp_path / "memory" / "job" in groups
    assert tmp_path / "slice" in groups
    assert memory._control_groups(tmp_path / "none") == []
    monkeypatch.setattr(memory, "_control_groups", lambda: groups)
    assert memory.free_memory() == 600
    # What is cached of files makes room for what is asked for.
    (tmp_path / "memory" / "job" / "memory.stat").write_text("inactive_file 7\ntotal_inactive_file 150\n")
    assert memory.free_memory() == 750


@pytest.mark.parametrize("name", ["gather_across_devices", "contrast_anchors", "guide_cache", "sort_by_length"])
def test_a_word_is_no_flag(name, student, guide):
    with pytest.raises(TypeError, match=rf"{name}: expected True or False, got 'no' \(str\)"):
        CachedGISTEmbedLoss(student, guide, **{name: "no"})
