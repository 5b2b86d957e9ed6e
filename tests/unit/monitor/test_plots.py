"""Heat maps and histories: every rank is where it belongs, in 80 columns, for any architecture."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from salient_ds.monitor.events import AllocationRecord
from salient_ds.monitor.grid import OTHER, build_grids, place_of, short_labels, type_labels
from salient_ds.monitor.heatmap import RAMP, ZERO, ink, shade
from salient_ds.monitor.plots import mean_rank_by_type, render_ranks, save_history_png, save_rank_png

LLAMA = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


def llama(layers: int) -> dict[str, int]:
    """Every rank different, so that a cell can be found again: 100 * layer + type."""
    return {f"model.layers.{n}.{t}": 10 * n + i for n in range(layers) for i, t in enumerate(LLAMA)}


def t5() -> dict[str, int]:
    ranks = {f"encoder.block.{n}.layer.0.SelfAttention.q": n for n in range(3)}
    ranks |= {f"decoder.block.{n}.layer.0.SelfAttention.q": 10 + n for n in range(2)}
    ranks |= {f"decoder.block.{n}.layer.1.EncDecAttention.q": 20 + n for n in range(2)}
    ranks |= {f"decoder.block.{n}.layer.2.DenseReluDense.wi": 30 + n for n in range(2)}
    return ranks | {"lm_head": 7}


def text_of(ranks: dict[str, int], width: int = 80, **more: object) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    console.print(render_ranks(ranks, width, **more))  # type: ignore[arg-type]
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def cells_of(lines: list[str]) -> dict[tuple[str, int], str]:
    """(row label, layer) -> printed cell, over all blocks of columns."""
    found, heads = {}, []
    for line in lines[:-1]:  # without the summary
        label, *rest = line.split()
        if label == "layer":
            heads = [int(item) for item in rest]
        elif len(rest) == len(heads):
            found |= {(label, layer): cell for layer, cell in zip(heads, rest, strict=True)}
    return found


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("model.layers.3.mlp.up_proj", ("model.layers", ("mlp", "up_proj"), 3)),
        ("bert.encoder.layer.3.attention.self.query", ("bert.encoder.layer", ("attention", "self", "query"), 3)),
        ("decoder.block.1.layer.2.DenseReluDense.wi", ("decoder.block", ("layer", "DenseReluDense", "wi"), 1)),
        ("model.layers.0.mlp.experts.5.up", ("model.layers", ("mlp", "experts", "up"), 0)),
        ("lm_head", (OTHER, ("lm_head",), None)),
        ("classifier.0", (OTHER, ("classifier", "0"), None)),
    ],
)
def test_places(path: str, expected: tuple) -> None:
    place = place_of(path)
    assert (place.stack, place.kind, place.layer) == expected


def test_labels_are_short_but_never_shared() -> None:
    kinds = [
        ("attention", "output", "dense"),
        ("intermediate", "dense"),
        ("output", "dense"),
        ("attention", "self", "query"),
    ]
    labels = short_labels(kinds)
    assert list(labels.values()) == ["attention.output.dense", "intermediate.dense", "output.dense", "query"]


def test_grids_of_an_encoder_decoder() -> None:
    encoder, decoder, other = build_grids(t5())
    assert encoder.rows == ("q",) and encoder.layers == (0, 1, 2)
    assert decoder.rows == ("SelfAttention.q", "EncDecAttention.q", "wi") and decoder.layers == (0, 1)
    assert decoder.cells["EncDecAttention.q", 1] == 21 and other.cells["lm_head", 0] == 7
    assert type_labels(t5())["decoder.block.0.layer.0.SelfAttention.q"] == "decoder SelfAttention.q"


def test_experts_share_a_cell() -> None:
    (grid,) = build_grids({f"model.layers.0.mlp.experts.{n}.up": n for n in range(4)})
    assert grid.cells == {("up", 0): 1.5}


@pytest.mark.parametrize("width", [80, 60])
@pytest.mark.parametrize("layers", [1, 2, 32])
def test_every_rank_is_printed_in_its_place(layers: int, width: int) -> None:
    ranks = llama(layers)
    lines = text_of(ranks, width)
    assert max(len(line) for line in lines) <= width
    expected = {(t.split(".")[1], n): str(ranks[f"model.layers.{n}.{t}"]) for n in range(layers) for t in LLAMA}
    assert cells_of(lines) == expected
    assert lines[-1].startswith(f"total rank {sum(ranks.values())} ") and lines[-1].endswith(f"off 1/{len(ranks)}")


def test_32_layers_are_compact() -> None:
    assert len(text_of(llama(32))) <= 2 * 8 + 1
    assert len(text_of(dict.fromkeys(llama(32), 64))) <= 2 * 8 + 1


def test_gaps_and_modules_outside_of_layers() -> None:
    ranks = {"model.layers.0.q": 1, "model.layers.1.k": 2, "lm_head": 3}
    lines = text_of(ranks)
    assert cells_of(lines)["q", 1] == "." and cells_of(lines)["k", 0] == "."
    assert any(line.split() == ["lm_head", "3"] for line in lines)
    assert text_of({}) == ["no adapted modules"]


def test_colour_follows_the_rank() -> None:
    assert shade(0, 10) == ZERO and shade(10, 10) == RAMP[-1] and shade(99, 10) == RAMP[-1]
    light = [int(shade(rank, 10)[1:3], 16) for rank in range(1, 11)]
    assert light == sorted(light, reverse=True) and len(set(light)) == 10
    assert ink(RAMP[0]) == "#000000" and ink(RAMP[-1]) == "#ffffff"


def test_colours_reach_a_terminal() -> None:
    console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system="truecolor", no_color=False)
    console.print(render_ranks({"model.layers.0.q": 0, "model.layers.1.q": 4}))
    red, green, blue = (int(RAMP[-1][i : i + 2], 16) for i in (1, 3, 5))
    assert f"48;2;{red};{green};{blue}" in console.file.getvalue()  # type: ignore[attr-defined]


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


@pytest.mark.parametrize("ranks", [llama(32), t5(), {"lm_head": 3}], ids=["llama", "t5", "head"])
def test_heat_map_png(tmp_path: Path, ranks: dict[str, int]) -> None:
    from matplotlib import image

    width, height = png_size(save_rank_png(ranks, tmp_path / "ranks.png"))
    assert 500 < width < 4000 and 200 < height < 4000
    pixels = (image.imread(tmp_path / "ranks.png")[..., :3] * 255).round().astype(int)
    seen = set((pixels @ [1 << 16, 1 << 8, 1]).flatten().tolist())
    assert int(RAMP[-1][1:], 16) in seen and (int(ZERO[1:], 16) in seen) == (0 in ranks.values())


def history(modules: list[str]) -> list[AllocationRecord]:
    made = []
    for step, rank in ((10, 8), (20, 6), (30, 5)):
        ranks = [rank] * (len(modules) - 1) + [0]
        made.append(
            AllocationRecord(
                step=step, budget=sum(ranks), total_rank=sum(ranks), ranks=ranks, threshold=None, digest="",
                seconds_gather=0, seconds_solve=0, seconds_apply=0, changed=1,
            )
        )  # fmt: skip
    return made


def test_mean_rank_by_type() -> None:
    modules = list(llama(2))
    means = mean_rank_by_type(history(modules)[0], modules)
    assert means["q_proj"] == 8 and means["down_proj"] == 4 and len(means) == 7
    with pytest.raises(ValueError, match="step 10 has 14 ranks for 13 modules"):
        mean_rank_by_type(history(modules)[0], modules[1:])


def test_history_png(tmp_path: Path) -> None:
    modules = list(t5())
    path = tmp_path / "history.png"
    save_history_png(history(modules), modules, path, initial_ranks=[8] * len(modules), last_step=50)
    whole = path.read_bytes()
    assert png_size(path)[0] > 800
    save_history_png(history(modules)[:1], modules, path)
    assert path.read_bytes() != whole
    with pytest.raises(ValueError, match="no allocation event yet"):
        save_history_png([], modules, path)
    with pytest.raises(ValueError, match="nothing to draw"):
        save_rank_png({}, path)


def test_no_window_system_is_touched(tmp_path: Path) -> None:
    """Drawing goes through Agg alone: pyplot, which picks a backend, is not imported by these modules."""
    import salient_ds.monitor

    for path in Path(salient_ds.monitor.__path__[0]).glob("*.py"):
        assert not re.search(r"pyplot|matplotlib\.use", path.read_text()), path.name
