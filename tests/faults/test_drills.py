"""Kills at random moments, damage to any file, full disks: nothing is silent, and nothing gets stuck.

``pytest -m faults tests/faults`` takes minutes. The default suite has a few of each in tests/launcher and tests/dist.
"""

from __future__ import annotations

import random
import resource
import shutil
from collections import Counter
from pathlib import Path

import pytest

from salient_ds.run.export import export_run
from tests.faults import drills
from tests.launcher import runs
from tests.support.spawn import forked

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, tiny_alpaca: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The directory of a run that nothing happened to, and how long it took."""
    folder = tmp_path_factory.mktemp("whole")
    drills.duration(run_file(tmp_path_factory.mktemp("warm"), tiny_llama, tiny_alpaca))  # the imports are done then
    run = runs.write_run(folder, tiny_llama, tiny_alpaca, train={"save_every": 2, "keep_checkpoints": 3})
    return folder / "run", drills.duration(run)


def run_file(folder: Path, model: Path, data: Path, save_every: int = 2) -> Path:
    return runs.write_run(folder, model, data, train={"save_every": save_every, "keep_checkpoints": 3})


def kills(count: int, whole: tuple[Path, float], model: Path, data: Path, folder: Path, seed: int) -> int:
    """Kill one run up to ``count`` times at random moments; it ends as the one that was never killed."""
    reference, seconds = whole
    draw, done = random.Random(seed), 0
    run = run_file(folder, model, data, save_every=1 + seed % 2)
    while done < count and drills.kill_at_random(run, draw, seconds):
        done += 1
    status, output = drills.resume(run)
    assert status == 0 and "Traceback" not in output, output
    assert drills.differences(folder / "run", reference) == []
    assert drills.debris(folder / "run") == []
    return done


def check_damage(
    count: int, whole: tuple[Path, float], model: Path, data: Path, folder: Path, seed: int = 0
) -> Counter[str]:
    """Damage a run, resume it and export it. Counts what came of it: every kind but "silent" and "stuck" is right."""
    reference, _ = whole
    found: Counter[str] = Counter()
    start = drills.interrupted(reference, folder / "start")
    clean = export_run(start, "peft", folder / "clean", base=str(model))
    before = (clean / "adapter_model.safetensors").read_bytes()
    for number, damage in enumerate(drills.damages(start, count, seed)):
        place = folder / str(number)
        run = run_file(place, model, data)
        shutil.copytree(start, place / "run")
        damage.apply(place / "run")
        found["export " + exported(place / "run", place / "out", before)] += 1
        status, output = drills.resume(run)
        assert "Traceback" not in output, (damage, output)
        wrong = drills.differences(place / "run", reference) if not status else []
        named = Path(damage.name).name in output
        if named and f"kept as {Path(damage.name).name}.damaged" in output:
            wrong = [part for part in wrong if part == "adapter"]  # a damaged line of a log is left out aloud
        kind = "stuck" if status else "silent" if wrong else "named" if named else "written anew or of no effect"
        if kind in ("stuck", "silent"):  # an older checkpoint was whole
            print(damage, wrong, output)
        found[kind] += 1
        shutil.rmtree(place)
    return found


def exported(run: Path, target: Path, before: bytes) -> str:
    """What an export of a damaged run comes to."""
    said: list[str] = []
    try:
        export_run(run, "peft", target, say=said.append)
    except (ValueError, OSError, RuntimeError) as error:
        return "refused" if str(run) in str(error) else f"refused without the file: {error}"
    if said:
        return "fell back aloud"
    same = (target / "adapter_model.safetensors").read_bytes() == before
    return "equal" if same else "silent"


@pytest.mark.timeout(3000)
def test_sixty_kills(whole: tuple[Path, float], tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path) -> None:
    done, seed = 0, 0
    while done < 60:
        done += kills(6, whole, tiny_llama, tiny_alpaca, tmp_path / str(seed), seed)
        seed += 1
        print(f"{done} kills in {seed} runs", flush=True)
    print(f"{done} kills in {seed} runs, all equal to the run that was never killed")


@pytest.mark.timeout(3000)
def test_damage_to_all_files(whole: tuple[Path, float], tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path) -> None:
    found = check_damage(64, whole, tiny_llama, tiny_alpaca, tmp_path)
    print(dict(found))
    assert found["silent"] + found["stuck"] + found["export silent"] == 0, found
    assert not [kind for kind in found if "without" in kind], found


def limited(run: Path, arguments: tuple[str, ...], size: int) -> None:
    """Train in a process whose files may not be larger than ``size`` bytes, which is an error of the file system."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    runs.train(run, arguments)


@pytest.mark.parametrize("size", [1_000, 3_000, 20_000, 60_000])
def test_a_disk_that_takes_no_more(
    size: int, whole: tuple[Path, float], tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path
) -> None:
    """One sentence, and the run goes on from where it was once there is room."""
    run = run_file(tmp_path, tiny_llama, tiny_alpaca)
    drills.interrupted(whole[0], tmp_path / "run")
    output = tmp_path / "output"
    assert forked(limited, run, ("--resume", "auto"), size, output=output) != 0
    assert "Traceback" not in output.read_text() and "error: " in output.read_text()
    status, text = drills.resume(run)
    assert status == 0, text
    assert drills.differences(tmp_path / "run", whole[0]) == [] and drills.debris(tmp_path / "run") == []
