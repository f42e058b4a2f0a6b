"""A cache in anybody's training loop, `feedfast.open_cache(path).stream(...)`, checked against live teachers."""

from __future__ import annotations

import gc
import shutil
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from small import digits_recipe

import feedfast
from feedfast.data.dataset import open_dataset
from feedfast.data.views import ViewPlan
from feedfast.recipe import Recipe
from feedfast.stages.ensemble import teacher_from_recipe
from feedfast.stages.offline import run_cache
from feedfast_kernels import Codes, Target, as_float, ensemble_kl, normalized_l1, partial_l2

ROWS, VIEWS, BATCH = 200, 2, 32


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Two teachers, float32, so that equality means equality."""
    made = digits_recipe(tmp_path_factory.mktemp("stream"), cache={"codec": "f32"}, seed=3)
    run_cache(made)
    return made


@pytest.fixture(scope="module")
def cache(recipe: Recipe) -> feedfast.stages.open_cache.Cache:
    return feedfast.open_cache(recipe.cache.path)


@pytest.fixture(scope="module")
def coded(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same first teacher in u8, with its pixels stored."""
    folder = tmp_path_factory.mktemp("coded")
    for file in Path(recipe.cache.path).parent.glob("*.*[tz]"):
        shutil.copy(file, folder)
    made = digits_recipe(folder, teachers=1, cache={"images": "stored"}, seed=3)
    run_cache(made)
    return Path(made.cache.path)


def test_four_lines_in_a_loop_of_your_own(recipe: Recipe) -> None:
    """Views and passes by hand, and an optimizer: a plain PyTorch network learns from the teachers' maps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 5, stride=4, padding=2), torch.nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for epoch in range(6):
        cache = feedfast.open_cache(recipe.cache.path)
        for batch in cache.stream(view=epoch % 2, batch_size=BATCH, pass_index=epoch // 2):
            loss = normalized_l1([model(batch.images)], [batch.targets["a"]["final"]], reduction="sum")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert len(losses) == 6 * (ROWS // BATCH)
    assert np.mean(losses[-6:]) < 0.9 * np.mean(losses[:6])


def test_readmes_loop_runs_as_it_is_written(recipe: Recipe) -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (code,) = [block.split("```")[0] for block in text.split("```python\n")[1:] if "open_cache" in block]
    for written, here in (("runs/c100.zarr", recipe.cache.path), ("range(30)", "range(3)"), ("=128", f"={BATCH}")):
        assert code.count(written) == 1, f"README's loop no longer says {written}"
        code = code.replace(written, here)
    torch.manual_seed(0)
    seen, model = [], torch.nn.Conv2d(3, 64, 5, stride=4, padding=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def my_loss(maps: torch.Tensor, labels: torch.Tensor, target: Target) -> torch.Tensor:
        optimizer.zero_grad()
        loss = normalized_l1([maps], [target], reduction="sum")
        loss.backward()
        optimizer.step()
        seen.append((loss.item(), labels.tolist()))
        return loss

    exec(code, {"feedfast": feedfast, "model": model, "my_loss": my_loss})
    epoch = ROWS // BATCH
    assert len(seen) == 3 * epoch
    losses, labels = zip(*seen, strict=True)
    assert np.mean(losses[-epoch:]) < np.mean(losses[:epoch])
    assert labels[:epoch] != labels[epoch : 2 * epoch], "every epoch another view, in another order"


@pytest.mark.parametrize("view", range(VIEWS))
def test_targets_images_labels_and_ids_are_those_of_a_live_run(
    recipe: Recipe, cache: feedfast.stages.open_cache.Cache, view: int
) -> None:
    teachers = {
        spec.name: teacher_from_recipe(spec, recipe.data, (), classes=10, seed=0, device=torch.device("cpu"))
        for spec in recipe.teachers
    }
    data = open_dataset(recipe.data.train, limit=recipe.data.limit)
    order = ViewPlan(3, 16, "pad-crop-flip").order(view, data.ids)
    labels = dict(zip(data.ids.tolist(), data.labels.tolist(), strict=True))
    rows = []
    pixels = cache.stream(view, BATCH, drop_last=False, normalize=False)
    for batch, raw in zip(cache.stream(view, BATCH, drop_last=False), pixels, strict=True):
        rows += batch.rows.tolist()
        assert batch.ids.tolist() == order[batch.rows].tolist()
        assert batch.labels.tolist() == [labels[sample] for sample in batch.ids.tolist()]
        assert (batch.labels.dtype, batch.images.dtype, raw.images.dtype) == (torch.int64, torch.float32, torch.uint8)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in recipe.data.normalization)
        torch.testing.assert_close(
            batch.images, (raw.images.permute(0, 3, 1, 2) / 255 - mean) / std, rtol=1e-5, atol=1e-5
        )
        assert batch.targets.keys() == {"a", "b"}
        for name, teacher in teachers.items():
            live = teacher(raw.images)
            assert batch.targets[name].keys() == live.keys() == {"final", "ofd1", "ofd2", "ofd3", "logits"}
            for tap, values in live.items():
                if tap.startswith("ofd"):  # stored as "ofd+margin" in this recipe
                    values = torch.maximum(values, teacher.margins[tap].view(1, -1, 1, 1))
                assert torch.equal(as_float(batch.targets[name][tap]), values), (name, tap)
    assert rows == list(range(ROWS))


@pytest.mark.parametrize("pass_index", [0, 1])
@pytest.mark.parametrize("start", [1, 3, 6])
def test_a_pass_continues_at_any_batch(cache: feedfast.stages.open_cache.Cache, start: int, pass_index: int) -> None:
    options = {"pass_index": pass_index, "taps": {"a": ["final", "logits"]}, "drop_last": False}
    whole = list(cache.stream(1, BATCH, **options))  # type: ignore[arg-type]
    tail = list(cache.stream(1, BATCH, start_batch=start, **options))  # type: ignore[arg-type]
    assert len(whole) == 7
    assert len(tail) == 7 - start
    for ours, theirs in zip(tail, whole[start:], strict=True):
        assert np.array_equal(ours.rows, theirs.rows)
        assert np.array_equal(ours.ids, theirs.ids)
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
        for tap in ("final", "logits"):
            assert torch.equal(as_float(ours.targets["a"][tap]), as_float(theirs.targets["a"][tap]))
    assert list(cache.stream(1, BATCH, start_batch=7, **options)) == []  # type: ignore[arg-type]


def test_later_passes_mix_the_rows_and_lose_none(cache: feedfast.stages.open_cache.Cache) -> None:
    passes = [
        list(cache.stream(0, BATCH, pass_index=index, drop_last=False, taps={"a": ["final"]})) for index in range(3)
    ]
    orders = [np.concatenate([batch.rows for batch in batches]) for batches in passes]
    assert np.array_equal(orders[0], np.arange(ROWS))
    for number, order in enumerate(orders):
        assert np.array_equal(np.sort(order), np.arange(ROWS))
        assert number == 0 or len(set(order[:BATCH]) - set(range(BATCH))) > BATCH // 4, "the first batch is another one"
    assert not np.array_equal(orders[1], orders[2])
    by_row = {}
    for batches in passes:
        for batch in batches:
            for position, row in enumerate(batch.rows.tolist()):
                content = (batch.ids[position], batch.images[position].numpy().tobytes(),
                           as_float(batch.targets["a"]["final"])[position].numpy().tobytes())  # fmt: skip
                assert by_row.setdefault(row, content) == content, "a row is the same in every pass"


def test_stored_images_are_the_replayed_ones(
    recipe: Recipe, cache: feedfast.stages.open_cache.Cache, coded: Path
) -> None:
    stored = feedfast.open_cache(coded)
    assert stored.manifest.images == "stored"
    for pass_index in (0, 1):
        for ours, theirs in zip(
            stored.stream(1, 48, pass_index=pass_index, drop_last=False),
            cache.stream(1, 48, pass_index=pass_index, drop_last=False),
            strict=True,
        ):
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.labels, theirs.labels)
            assert np.array_equal(ours.ids, theirs.ids)
            assert isinstance(ours.targets["a"]["final"], Codes)
            near, exact = as_float(ours.targets["a"]["final"]), as_float(theirs.targets["a"]["final"])
            assert float((near - exact).norm() / exact.norm()) < 0.015


def test_losses_take_what_a_batch_holds(cache: feedfast.stages.open_cache.Cache, coded: Path) -> None:
    """Codes and float maps go into the same losses, with gradients, and say nearly the same."""
    losses = []
    for source in (cache, feedfast.open_cache(coded)):
        batch = next(source.stream(0, BATCH))
        targets = batch.targets["a"]
        student = torch.full((BATCH, 16, 16, 16), 0.5, requires_grad=True)
        logits = torch.linspace(-1, 1, BATCH * 10).view(BATCH, 10).requires_grad_()
        loss = partial_l2(student, targets["ofd1"], weight=1e-2)
        loss = loss + ensemble_kl(logits, [as_float(targets["logits"])], tau=4.0)
        loss.backward()
        assert student.grad is not None
        assert logits.grad is not None
        assert float(student.grad.abs().sum()) > 0
        assert float(logits.grad.abs().sum()) > 0
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)


def test_keeping_every_batch_keeps_it_right(cache: feedfast.stages.open_cache.Cache) -> None:
    """Buffers are used again only when nobody holds them any more."""
    kept = list(cache.stream(0, 16, drop_last=False))
    for position, batch in enumerate(cache.stream(0, 16, drop_last=False)):
        for name, taps in batch.targets.items():
            for tap, values in taps.items():
                assert torch.equal(as_float(values), as_float(kept[position].targets[name][tap])), (position, name, tap)
        assert torch.equal(batch.images, kept[position].images)


def test_only_the_wanted_targets_are_read(
    recipe: Recipe, cache: feedfast.stages.open_cache.Cache, tmp_path: Path
) -> None:
    assert cache.taps == dict.fromkeys(("a", "b"), ("final", "ofd1", "ofd2", "ofd3", "logits"))
    wanted = {"a": ["final"], "b": ["ofd2", "logits"]}
    batch = next(cache.stream(taps=wanted))
    assert {name: list(taps) for name, taps in batch.targets.items()} == wanted
    assert list(next(cache.stream(taps={"a": "final"})).targets["a"]) == ["final"]  # type: ignore[dict-item]
    alone = list(cache.stream(0, BATCH, taps={}, start_batch=2, drop_last=False))
    assert len(alone) == 5, "pixels and labels alone"
    assert all(batch.targets == {} for batch in alone)
    shutil.copytree(recipe.cache.path, tmp_path / "c.zarr")
    shutil.rmtree(tmp_path / "c.zarr" / "targets" / "b" / "ofd1" / "codes" / "c")
    damaged = feedfast.open_cache(tmp_path / "c.zarr", data=recipe.data.train)
    assert len(list(damaged.stream(taps=wanted))) == 1
    with pytest.raises(feedfast.CacheDamageError, match="targets/b/ofd1/codes"):
        damaged.stream()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"view": 2}, "expected a view below 2, found 2"),
        ({"view": -1}, "expected a view below 2, found -1"),
        ({"taps": {"c": ["final"]}}, "'final' of teacher 'c'"),
        ({"taps": {"a": ["layer9"]}}, "'layer9' of teacher 'a'"),
        ({"batch_size": 0}, "batch_size"),
        ({"start_batch": -1}, "start_batch"),
        ({"pass_index": -1}, "pass_index"),
        ({"device": "tpu"}, "tpu"),
        ({"device": "cuda"}, "cuda"),
    ],
)
def test_a_wrong_request_is_refused_at_once(
    cache: feedfast.stages.open_cache.Cache, options: dict[str, object], words: str
) -> None:
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("asks for a GPU where there is none")
    with pytest.raises(feedfast.RequestError, match=words):
        cache.stream(**options)  # type: ignore[arg-type]


def test_no_cache_and_no_images(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(feedfast.RequestError, match="expected a feedfast cache"):
        feedfast.open_cache(tmp_path)
    with pytest.raises(feedfast.RequestError, match=r"nowhere\.npz"):
        feedfast.open_cache(recipe.cache.path, data="nowhere.npz")
    with pytest.raises(feedfast.CacheMismatchError, match="dataset"):
        feedfast.open_cache(recipe.cache.path, data=str(Path(recipe.data.val[0])))


def test_images_may_lie_elsewhere(recipe: Recipe, tmp_path: Path) -> None:
    moved = shutil.copy(recipe.data.train[0], tmp_path / "moved.npz")
    batch = next(feedfast.open_cache(recipe.cache.path, data=str(moved)).stream())
    assert torch.equal(batch.images, next(feedfast.open_cache(recipe.cache.path).stream()).images)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("feedfast-")]


def test_an_abandoned_pass_ends_its_threads(recipe: Recipe) -> None:
    """A loop left by ``break`` or an exception costs nothing afterwards, and the cache can be streamed again."""
    gc.collect()
    before = len(readers())
    cache = feedfast.open_cache(recipe.cache.path)
    for _ in range(3):
        passing = cache.stream(0, 16)
        assert len(list(islice(passing, 3))) == 3
        assert len(readers()) > before
        del passing
        gc.collect()
        for thread in readers():
            thread.join(timeout=10)
        assert len(readers()) == before
    assert len(list(cache.stream(0, 16))) == ROWS // 16
    for thread in readers():
        thread.join(timeout=10)
    assert len(readers()) == before
