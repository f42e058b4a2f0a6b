"""The benches of the kernels: they run everywhere at tiny sizes, refuse a number to what is wrong, and count right."""

from __future__ import annotations

import csv
import json
import runpy
import signal
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from code_samples import integers

BENCH = Path(__file__).parents[2] / "bench"
CPU = torch.device("cpu")
NAMES = ["connector_partial_l2", "partial_l2", "normalized_l1", "ensemble_kl", "codes", "locality"]
# bytes per element of the first tiny setting, bf16 and u8: forward, backward
HAND_COUNT = {
    "connector_partial_l2": (2 + 2 + 1, 2 + 1 + 2),  # map, map again, code; map, code, gradient
    "partial_l2": (2 + 1, 2 + 1 + 2),  # student, code; student, code, gradient
    "normalized_l1": (2 + 1, 2 + 1 + 2),  # likewise, of every teacher
    "ensemble_kl": (2 + 2 * 2 + 2, 2 + 2),  # student, two teachers, gradient kept; gradient read and written
    "codes": (2 + 1, None),  # map in, code out
    "locality": (2 + 1, 2 + 2),  # student, code; student, gradient
}
COLUMNS = [
    "date", "commit", "gpu", "torch", "triton", "cuda", "operation", "shape", "dtype", "codec", "layout", "variant",
    "direction", "median_ms", "p20_ms", "p80_ms", "bytes", "gbps", "percent_of_copy", "peak_bytes", "note",
]  # fmt: skip


@pytest.fixture
def measure() -> ModuleType:
    import measure

    return measure


def bench_of(name: str) -> Any:
    return __import__(f"bench_{name}")


QUICK = ("connector_partial_l2", "codes")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NAMES])
def test_a_tiny_run_says_everything(
    name: str, measure: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bench, out = bench_of(name), tmp_path / "results.csv"
    committed = {file: file.read_bytes() for file in BENCH.glob("*.csv")}
    assert measure.main(bench.settings, bench.__doc__, ["--tiny", "--device", "cpu", "--out", str(out)]) == 0
    said = capsys.readouterr()
    document = json.loads(said.out)
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS == list(document["rows"][0])
    assert len(rows) == len(document["rows"]) == document["measured"] + document["skipped"]
    planned = {
        (s.operation, s.shape, s.dtype, s.codec, s.layout, variant, direction)
        for s in bench.settings(True)
        for variant in s.variants
        for direction in (("both",) if "graph" in variant else s.directions)
    }
    keys = ("operation", "shape", "dtype", "codec", "layout", "variant", "direction")
    assert {tuple(row[key] for key in keys) for row in rows} == planned
    variants = {row["variant"] for row in rows}
    assert variants >= {"feedfast", "copy", "compile default", "compile max-autotune"}
    assert variants & {"reference eager", "composite eager"}
    for row in document["rows"]:
        compiles, graphs = row["variant"].startswith("compile"), "graph" in row["variant"]
        assert row["note"].startswith("skipped: ") == (row["median_ms"] is None) == (compiles or graphs), row
        if row["median_ms"] is not None:
            assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
            assert row["gbps"] == pytest.approx(row["bytes"] / row["median_ms"] / 1e6)
            assert (row["gpu"], row["cuda"], row["peak_bytes"]) == ("cpu", "", None)
    first = {row["variant"] for row in document["rows"][: len(document["rows"]) // 4]}
    assert first == {"feedfast", "copy"}, "what matters comes first"
    assert {file: file.read_bytes() for file in BENCH.glob("*.csv")} == committed


@pytest.mark.parametrize("name", HAND_COUNT)
def test_bytes_are_those_counted_by_hand(name: str) -> None:
    setting = bench_of(name).settings(True)[0]
    assert (setting.dtype, setting.layout) in (("bf16", "NHWC"), ("bf16", ""))
    work = setting.build(CPU)
    elements = sum(leaf.numel() for leaf in work.leaves if leaf.ndim > 1) or 3 * 16 * 5 * 5
    forward, backward = HAND_COUNT[name]
    counted = {"forward": forward * elements}
    if backward is not None:
        counted |= {"backward": backward * elements, "both": (forward + backward) * elements}
    assert work.bytes == counted


@pytest.mark.parametrize("name", NAMES)
def test_composites_are_one_graph(name: str, measure: Any) -> None:
    """What `torch.compile` is given has no graph break, and its gradients are right when traced."""
    for setting in bench_of(name).settings(True):
        work = setting.build(CPU)
        for variant in {"compile default", "compile gathered"} & set(setting.variants):
            call = measure.compiled(work.calls[variant], None, backend="aot_eager")
            assert measure.wrong(measure.outcome(call, work.leaves), call.expected(), call.tolerance) == ""


def one_setting(measure: Any, **functions: Any) -> tuple[Any, Any]:
    """A bench of the sum of squares of 1000 random values, computed by each of the functions."""

    import inputs

    def build(device: torch.device) -> Any:
        leaf = inputs.random_map((10, 100), torch.float32, "", device, seed=0).requires_grad_()
        calls = {
            name: measure.Call(function, (leaf,), lambda: measure.exact(lambda x: x.square().sum(), [leaf]))
            for name, function in functions.items()
        }
        return measure.Work([leaf], {"forward": 4000, "backward": 8000, "both": 12000}, calls)

    setting = measure.Setting("squares", "10x100", "fp32", "", "", build, (*functions, "copy"))
    return setting, measure.Bench(CPU, tiny=True)


def test_a_wrong_variant_gets_no_number(measure: Any) -> None:
    def nan_gradient(x: torch.Tensor) -> torch.Tensor:
        return x.square().sum() + 0 * (x - x).sqrt().sum()  # 0 in the loss, 0 * inf in the gradient

    setting, bench = one_setting(
        measure,
        feedfast=lambda x: x.square().sum(),
        wrong_loss=lambda x: x.square().sum() * 1.001,
        wrong_gradient=lambda x: x.square().sum() + (x - x.detach())[3, 7],
        nan_gradient=nan_gradient,
        broken=lambda x: x.square().sum() + torch.ones(3)[x.shape[0]],
    )
    rows = measure.run([setting], bench, 0, lambda row: None)
    by_variant = {name: [r for r in rows if r.variant == name] for name in setting.variants}
    assert [r.median_ms is None for r in by_variant["feedfast"]] == [False] * 3
    for name, reason in {
        "wrong_loss": "wrong: result 0 differs in 1 of 1 values (relative 1e-05)",
        "wrong_gradient": "wrong: result 1 differs in 1 of 1000 values (relative 1e-05); at (3, 7)",
        "nan_gradient": "wrong: result 1 differs in 1000 of 1000 values",
        "broken": "failed: IndexError",
    }.items():
        assert [r.direction for r in by_variant[name]] == ["forward", "backward", "both"]
        for row in by_variant[name]:
            assert row.note.startswith(reason)
            assert (row.median_ms, row.gbps, row.percent_of_copy, row.bytes) == (None, None, None, None)


def test_numbers_are_what_they_say(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 ms for 12,000 bytes are 0.006 GB/s; a copy that takes 0.5 ms makes that 25 %."""
    setting, bench = one_setting(measure, feedfast=lambda x: x.square().sum())
    monkeypatch.setattr(measure.Bench, "time", lambda *_: measure.Timing(2.0, 1.5, 2.5))
    monkeypatch.setattr(measure.Bench, "copy", lambda *_: measure.Timing(0.5, 0.5, 0.5))
    rows = {(r.variant, r.direction): r for r in measure.run([setting], bench, 0, lambda row: None)}
    row = rows["feedfast", "both"]
    assert (row.bytes, row.gbps, row.percent_of_copy) == (12000, pytest.approx(0.006), 25.0)
    assert (row.p20_ms, row.median_ms, row.p80_ms) == (1.5, 2.0, 2.5)
    assert rows["copy", "both"].gbps == pytest.approx(0.024)
    assert measure.percentile([4.0, 1.0, 3.0, 2.0, 5.0], 0.2) == pytest.approx(1.8)
    assert measure.percentile([7.0], 0.8) == 7.0


def test_codes_may_differ_only_where_told(measure: Any) -> None:
    codes = torch.arange(10, dtype=torch.uint8)
    other = codes.clone()
    other[4] = 9
    assert measure.wrong([codes], [codes], measure.Tolerance()) == ""
    assert "result 0 differs in 1 of 10" in measure.wrong([other], [codes], measure.Tolerance())
    assert measure.wrong([other], [codes], measure.Tolerance(share=0.1)) == ""
    count, near, far = torch.tensor(1000), torch.tensor(1001), torch.tensor(1100)
    assert measure.wrong([near], [count], measure.Tolerance())
    assert measure.wrong([near], [count], measure.Tolerance(share=0.01)) == ""
    assert measure.wrong([far], [count], measure.Tolerance(share=0.01))
    assert "shape" in measure.wrong([codes[:3]], [codes], measure.Tolerance())


def test_when_the_time_is_up_the_rest_says_so(measure: Any) -> None:
    returned: list[bool] = []

    def slow(x: torch.Tensor) -> torch.Tensor:
        signal.setitimer(signal.ITIMER_REAL, 0.05)  # the time is up here, however slow a machine is before
        time.sleep(30)
        returned.append(True)
        return x.square().sum()

    setting, bench = one_setting(measure, feedfast=lambda x: x.square().sum(), slow=slow, never=slow)
    rows = measure.run([setting], bench, 3600, lambda row: None)
    assert returned == [], "the sleep was interrupted"
    assert [r.median_ms is not None for r in rows if r.variant in ("feedfast", "copy")] == [True] * 6
    late = [r for r in rows if r.variant in ("slow", "never")]
    assert len(late) == 6
    assert {r.note for r in late} == {"skipped: the time budget of 3600 s was spent"}


def test_an_alarm_that_nobody_heard_rings_again(measure: Any) -> None:
    class Finalized:
        def __del__(self) -> None:
            try:
                time.sleep(10)
            except measure.TimeIsUpError:
                heard.append("lost")

    def work() -> None:
        Finalized()
        time.sleep(10)

    heard: list[str] = []
    with measure.alarm(0.1, again=0.2), pytest.raises(measure.TimeIsUpError):
        work()
    assert heard == ["lost"]


def test_on_a_gpu_caches_are_cold_and_the_host_is_ahead(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of things around a timed call, with a GPU that only writes down what it is asked."""
    said: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            said.append("event")

        def elapsed_time(self, _: Event) -> float:
            return 4.0

    properties = SimpleNamespace(L2_cache_size=50 << 20)
    sizes: list[int] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch, "empty", lambda size, **_: sizes.append(4 * size) or torch.zeros(1, dtype=torch.int32))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: said.append("wait" if cycles >= 2e5 else "too short"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: said.append("finish"))
    bench = measure.Bench(torch.device("cuda"), tiny=True)
    assert sizes == [4 * (50 << 20)]
    bench.flush = SimpleNamespace(add_=lambda _: said.append("write"))
    timing = bench.time(lambda _: said.append("run"), lambda: said.append("prepare"))
    once = ["prepare", "write", "wait", "event", "run", "event", "finish"]
    assert said == 4 * once
    assert (timing.median_ms, timing.p20_ms, timing.p80_ms) == (4.0, 4.0, 4.0)
    assert timing.host_us is not None


def test_without_a_gpu_a_bench_says_so(measure: Any, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert measure.main(bench_of("partial_l2").settings, "", []) == 2
    assert "no CUDA GPU" in capsys.readouterr().err


def test_data_is_random_and_not_all_alive() -> None:
    import inputs

    codes = inputs.random_codes((4, 32, 5, 5), "u4", CPU, seed=0)
    low, high = codes.data & 15, codes.data >> 4
    assert (int(low.max()), int(high.max()), int(low.min())) == (14, 14, 0)
    odd = inputs.random_codes((4, 5, 3, 3), "u4", CPU, seed=0)
    assert odd.shape == (4, 5, 3, 3)
    assert int((odd.data[..., -1] >> 4).max()) == 0
    six = integers(inputs.random_codes((4, 5, 3, 3), "u6", CPU, seed=0).data.numpy(), 5, "u6")
    assert (six.min(), six.max()) == (0, 62)
    silent = float((inputs.random_codes((4, 32, 5, 5), "u8", CPU, seed=0).data < 101).float().mean())
    assert 0.3 < silent < 0.5


def test_plots_are_drawn_from_rows(measure: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last of two rows counts, one without a number is no bar, and the copy is a line."""
    import plot_kernels

    about = {"date": "d", "commit": "c", "gpu": "A GPU", "torch": "t", "triton": "r", "cuda": ""}
    what = {"operation": "squares", "shape": "2x3", "dtype": "bf16", "codec": "u8", "layout": "NHWC"}

    def row(variant: str, milliseconds: float | None) -> Any:
        times = dict.fromkeys(("median_ms", "p20_ms", "p80_ms"), milliseconds)
        return measure.Row(**about, **what, variant=variant, direction="forward", bytes=8_000_000, **times)

    file = tmp_path / "results.csv"
    measure.append([row("feedfast", 4.0), row("copy", 1.0)], file)
    measure.append([row("feedfast", 2.0), row("compile default", None)], file)
    assert file.read_text().count("date,commit") == 1
    rows = plot_kernels.read(file)["squares", "A GPU"]
    assert [(r["variant"], r["median_ms"]) for r in rows] == [("copy", "1"), ("feedfast", "2"), ("compile default", "")]
    assert plot_kernels.heights(rows[1], "gbps") == (4.0, 4.0, 4.0)
    assert plot_kernels.heights(rows[1], "ms")[0] == 2.0
    for unit in plot_kernels.UNITS:
        assert plot_kernels.main(["--csv", str(file), "--out", str(tmp_path / unit), "--unit", unit]) == 0
        (picture,) = json.loads(capsys.readouterr().out)["files"]
        assert Path(picture).name == "squares-a-gpu.png"
        assert Path(picture).read_bytes().startswith(b"\x89PNG")
    assert plot_kernels.main(["--csv", str(tmp_path / "none.csv")]) == 2


@pytest.mark.slow
def test_the_cpu_bench_still_runs(capsys: pytest.CaptureFixture[str]) -> None:
    bench = runpy.run_path(str(BENCH / "bench_cpu_losses.py"))
    bench["main"](["--tiny", "--rounds", "1", "--threads", "1"])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])["ns_per_element"]
    assert len(said) == 2 * len(bench["CASES"])
    assert all(row["eager"] > 0 and row["compiled"] > 0 for row in said.values())


def test_the_cpu_bench_compares_before_it_times() -> None:
    bench = runpy.run_path(str(BENCH / "bench_cpu_losses.py"))
    values = iter((torch.ones(4), 1.05 * torch.ones(4)))
    with pytest.raises(SystemExit, match=r"differ by 4.8e-02"):
        bench["measure"]((lambda: next(values), [], 4), 1, "eager")
