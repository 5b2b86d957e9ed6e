"""Which arms are asked for, which cannot run, and what happens to processes that fail or hang."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from salient_eval.bench import drive
from salient_eval.bench.plan import ArmSpec, own_methods, parse_arms, parse_zero, plan

from tests.unit.bench.bench_helpers import settings


def test_arms_and_loops_are_parsed_and_unknown_ones_named() -> None:
    assert parse_arms("peft_lora, peft_adalora@480,salientlora@8+16", [64]) == [
        ("peft_lora", [64]), ("peft_adalora", [480]), ("salientlora", [8, 16]),
    ]  # fmt: skip
    assert {"salientlora", "lora"} <= set(own_methods())
    assert parse_zero("plain,3") == [("plain", 0), ("deepspeed", 3)]
    with pytest.raises(ValueError, match="'salientlor' is unknown.*salientlora"):
        parse_arms("salientlor", [64])
    with pytest.raises(ValueError, match="'4' is none of plain, 0, 1, 2, 3"):
        parse_zero("4")


def test_what_cannot_run_is_left_out_with_a_reason() -> None:
    arms = [("peft_lora", [8]), ("peft_adalora", [8]), ("salientlora", [8])]
    run, left_out = plan(arms, parse_zero("plain,3"), [1, 2], ["none"], settings())
    assert [(s.arm, s.loop, s.gpus) for s in run] == [
        ("peft_lora", "plain", 1), ("peft_adalora", "plain", 1), ("salientlora", "plain", 1),
        ("peft_lora", "deepspeed", 1), ("salientlora", "deepspeed", 1),
        ("peft_lora", "deepspeed", 2), ("salientlora", "deepspeed", 2),
    ]  # fmt: skip
    reasons = {(s.arm, s.loop, s.gpus): reason for s, reason in left_out}
    assert "one process" in reasons["salientlora", "plain", 2]
    assert "ZeRO-3" in reasons["peft_adalora", "deepspeed", 1]


def test_a_spec_survives_its_way_to_the_worker() -> None:
    import json
    from dataclasses import asdict

    spec = ArmSpec(
        arm="salientlora",
        loop="deepspeed",
        zero=2,
        rank=8,
        gpus=2,
        checkpointing="all",
        compiled=True,
        settings=settings(),
    )
    assert ArmSpec.from_dict(json.loads(json.dumps(asdict(spec)))) == spec


def run(worker: Path, text: str, log: Path, monkeypatch: pytest.MonkeyPatch, timeout: float = 30) -> dict[str, object]:
    worker.write_text(text)
    monkeypatch.setattr(drive, "WORKER", worker)
    return drive.run_worker({"probe": {}}, 1, False, True, timeout, log)


def test_worker_results_and_failures_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, log = tmp_path / "w.py", tmp_path / "log"
    write = "import sys, json\nprint('hello')\nopen(sys.argv[2], 'w').write(json.dumps({}))\n"
    assert run(worker, write.format('{"seconds": 1}'), log, monkeypatch) == {"seconds": 1, "exit_status": 0}
    assert log.read_text() == "hello\n"
    with pytest.raises(drive.ArmFailed, match="out of memory"):
        run(worker, write.format('{"error": "out of memory"}') + "sys.exit(1)", log, monkeypatch)
    late = run(worker, write.format('{"seconds": 1}') + "sys.exit(7)", log, monkeypatch)
    assert late == {"seconds": 1, "exit_status": 7}, "what was measured before is kept"
    with pytest.raises(drive.ArmFailed, match="exit status 3"):
        run(worker, "import sys; sys.exit(3)", log, monkeypatch)


def test_a_worker_that_hangs_is_ended_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = tmp_path / "child"
    text = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(child)!r}, 'w').write(str(p.pid))\n"
        "time.sleep(600)\n"
    )
    with pytest.raises(drive.ArmFailed, match="took longer than 4 s"):
        run(tmp_path / "w.py", text, tmp_path / "log", monkeypatch, timeout=4)
    stat = Path(f"/proc/{child.read_text()}/stat")
    for _ in range(50):
        # an orphan that nobody collects yet is as dead as one that is gone
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child of a hanging worker lives on")


def test_compiled_arms_are_those_whose_layers_deepspeed_does_not_gather() -> None:
    arms = parse_arms("salientlora+compile@8,heterolora+compile@8,salientlora@8,peft_lora+compile@8", [8])
    run, left_out = plan(arms, parse_zero("2,3"), [1], ["none"], settings())
    assert [(s.arm, s.zero, s.compiled) for s in run] == [
        ("salientlora", 2, True), ("heterolora", 2, True), ("salientlora", 2, False), ("peft_lora", 2, True),
        ("salientlora", 3, True), ("heterolora", 3, True), ("salientlora", 3, False),
    ]  # fmt: skip
    assert [(s.arm, s.zero, s.compiled) for s, _ in left_out] == [("peft_lora", 3, True)]
    assert run[0].title.endswith("compiled")


def test_own_arms_have_further_options() -> None:
    arms = parse_arms("adalora+compile+unfused@8,lora2+unpacked@8", [8])
    run, _ = plan(arms, parse_zero("2"), [1], ["none"], settings())
    assert [(s.arm, s.compiled, s.speed) for s in run] == [
        ("adalora", True, ("unfused",)), ("lora2", False, ("unpacked",)),
    ]  # fmt: skip
    assert run[0].title.endswith("compiled unfused") and run[0].key()["speed"] == ["unfused"]
    with pytest.raises(ValueError, match="is unknown"):
        parse_arms("peft_lora+unfused", [8])


def test_the_fused_loss_is_an_option_beside_compiled_layers() -> None:
    arms = parse_arms("salientlora+liger+compile@8+16,peft_lora+liger", [8])
    assert arms == [("salientlora+liger+compile", [8, 16]), ("peft_lora+liger", [8])]
    run, left_out = plan(arms, parse_zero("plain,3"), [1], ["none"], settings())
    both = [s for s in run if s.arm == "salientlora" and s.loop == "plain"]
    assert [(s.rank, s.compiled, s.fused_loss) for s in both] == [(8, True, True), (16, True, True)]
    assert both[0].title.endswith("compiled fused loss") and both[0].key()["fused_loss"]
    assert ("peft_lora", "plain") in [(s.arm, s.loop) for s in run]
    reasons = {s.arm: reason for s, reason in left_out}
    assert "a weight that ZeRO-3 has partitioned" in reasons["peft_lora"]
    sharded, _ = plan(parse_arms("salientlora+liger", [8]), parse_zero("3"), [2], ["none"], settings())
    assert [s.fused_loss for s in sharded] == [True], "the base alone is partitioned: the output layer stays whole"
    with pytest.raises(ValueError, match="is unknown.*[+]compile and [+]liger"):
        parse_arms("salientlora+ligre", [8])


def test_unsloth_runs_in_the_plain_loop_only() -> None:
    arms = [("unsloth", [64]), ("unsloth+compile", [64])]
    run, left_out = plan(arms, [("plain", 0), ("deepspeed", 2)], [1], ["none"], settings())
    assert [spec.title for spec in run] == ["unsloth r=64 plain x1 checkpointing=none"]
    reasons = {reason for _, reason in left_out}
    assert reasons == {"Unsloth is timed in the plain loop", "Unsloth brings kernels of its own"}


def test_cuda_graphs_need_compiled_layers() -> None:
    arms = [("peft_lora+compile+graphs", [8]), ("salientlora+graphs", [8])]
    run, left_out = plan(arms, [("plain", 0)], [1], ["none"], settings())
    assert [spec.title for spec in run] == ["peft_lora r=8 plain x1 checkpointing=none compiled graphs"]
    assert [reason for _, reason in left_out] == ["graphs are made of compiled layers"]
