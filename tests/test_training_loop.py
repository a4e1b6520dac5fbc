"""The loop: a killed run resumes bitwise, processes share the batch, and what goes wrong leaves a good state behind."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from toy_training import Toy, run

from training import loop
from training.loop import Schedule, learning_rate, train

ROOT = Path(__file__).parent.parent
TOY = str(ROOT / "tests/toy_training.py")
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0"]
LAUNCH += ["--num_processes", "2", "--mixed_precision", "no"]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_MIXED_PRECISION": "no",
    "CUDA_VISIBLE_DEVICES": "",  # `--multi_gpu` names the way of launching; without a card the processes use the CPU
}


def losses(folder, name):
    with (folder / name / "log.csv").open() as file:
        return [row["loss"] for row in csv.DictReader(file)]


def toy(folder, *arguments, launcher=()):
    command = [sys.executable, *launcher, TOY, str(folder), *(arguments or ["0"])]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)


def weights(folder, name, rank=0):
    return torch.load(folder / f"{name}-{rank}.pt")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    assert toy(folder).returncode == 0
    return folder


def test_a_killed_run_resumes_to_the_same_weights(tmp_path, straight):
    log = tmp_path / "dropout/log.csv"
    process = subprocess.Popen([sys.executable, TOY, str(tmp_path), "0.05"], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not log.exists() or len(log.read_text().splitlines()) < 26:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 25 <= len(losses(tmp_path, "dropout")) < 40
    assert toy(tmp_path).returncode == 0
    for name in ("dropout", "plain"):
        assert losses(tmp_path, name) == losses(straight, name)
        resumed, uninterrupted = weights(tmp_path, name), weights(straight, name)
        assert all(torch.equal(resumed[key], uninterrupted[key]) for key in uninterrupted)


def test_two_processes_go_through_the_losses_of_one_and_outlive_the_kill_of_a_worker(tmp_path, straight):
    killed = toy(tmp_path, "0", "25", launcher=LAUNCH)
    assert killed.returncode != 0 and 25 <= len(losses(tmp_path, "plain")) < 40
    resumed = toy(tmp_path, launcher=LAUNCH)
    assert resumed.returncode == 0, resumed.stderr
    both, alone = losses(tmp_path, "plain"), losses(straight, "plain")
    assert len(both) == len(alone) == 40
    assert max(abs(float(a) - float(b)) for a, b in zip(both, alone, strict=True)) < 1e-4
    first, second, single = weights(tmp_path, "plain"), weights(tmp_path, "plain", 1), weights(straight, "plain")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(torch.allclose(first[key], single[key], atol=1e-4) for key in first)
    # what two processes saved, one can take up
    assert run_until(tmp_path, steps=41) == 41


def run_until(folder, steps):
    run(folder, "plain", 0.0, steps=steps)
    return len(losses(folder, "plain"))


def test_what_cannot_be_shared_evenly_is_refused(tmp_path, monkeypatch):
    three = SimpleNamespace(num_processes=3, process_index=1, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="The batch of step 7 has 4 examples, which 3 processes cannot share evenly"):
        loop._share(torch.arange(4), three, 7)
    assert loop._share(list("abcdef"), three, 7) == ["b", "e"]
    monkeypatch.setattr(loop, "make_accelerator", lambda: three)
    with pytest.raises(ValueError, match="3 processes cannot share a batch of 8 evenly: choose a multiple of 3."):
        run(tmp_path, "toy", 0.0)
    assert not (tmp_path / "toy").exists()


def test_learning_rate_warms_up_and_decays():
    schedule = Schedule(steps=100, batch_size=1, learning_rate=1.0, warmup=10)
    assert learning_rate(schedule, 0) == 0.1
    assert learning_rate(schedule, 10) == 1.0
    assert learning_rate(schedule, 100) == pytest.approx(0.02)


def test_a_loss_that_is_not_a_number_stops_the_run_and_leaves_the_last_good_state(tmp_path):
    """Step 25 gets a batch of NaN: the weights stay those after step 24, the checkpoint that of step 20."""
    calls = iter(range(100))
    torch.manual_seed(0)
    toy = Toy()

    def make_batch(indices, generator):
        x = torch.randn(len(indices), 4, generator=generator)
        return (x * float("nan") if next(calls) == 25 else x), x.sum(1, keepdim=True)

    schedule = Schedule(steps=40, batch_size=8, learning_rate=1e-2, save_every=10)
    with pytest.raises(FloatingPointError, match="The loss of toy is nan at step 25.* from the last checkpoint"):
        train("toy", toy, toy.net, make_batch, 100, schedule, runs=tmp_path)
    assert all(torch.isfinite(weight).all() for weight in toy.state_dict().values())
    assert len(losses(tmp_path, "toy")) == 25
    train("toy", toy, toy.net, make_batch, 100, schedule, runs=tmp_path)
    assert len(losses(tmp_path, "toy")) == 40


def test_an_infinite_gradient_of_a_finite_loss_stops_the_run_too(tmp_path):
    toy = Toy()

    def forward(x):
        return {"loss": (toy.net(x) * 0).abs().sqrt().sum()}  # sqrt is 0 at 0, its slope infinite

    toy.forward = forward
    with pytest.raises(FloatingPointError, match="The loss of toy is 0.0 at step 0, its gradient's norm nan"):
        train("toy", toy, toy.net, lambda *_: (torch.ones(2, 4),), 2, Schedule(2, 2, 1e-2), runs=tmp_path)
    assert all(torch.isfinite(weight).all() for weight in toy.state_dict().values())


def test_a_disk_that_fills_leaves_the_checkpoint_before_whole(tmp_path):
    """From step 15 on no file can grow above 3,000 bytes, which ends the second checkpoint as a full disk would."""
    resource = pytest.importorskip("resource")
    limits, calls = resource.getrlimit(resource.RLIMIT_FSIZE), iter(range(100))

    def fill():
        if next(calls) == 15:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))

    try:
        with pytest.raises(OSError, match="The checkpoint of step 20 .* the one before it is whole: make room"):
            run(tmp_path, "toy", 0.0, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in (tmp_path / "toy").iterdir()) == ["checkpoint", "log.csv", "schedule.json"]
    before = (tmp_path / "toy/log.csv").read_text()
    run(tmp_path, "toy", 0.0)
    again = (tmp_path / "toy/log.csv").read_text()
    assert len(losses(tmp_path, "toy")) == 40 and again.splitlines()[:11] == before.splitlines()[:11]


def test_a_checkpoint_of_another_architecture_is_refused_before_it_overwrites_anything(tmp_path):
    run(tmp_path, "toy", 0.0, steps=10)
    wider = Toy()
    wider.net[0], wider.net[2] = torch.nn.Linear(4, 32), torch.nn.Linear(32, 1)
    before = {name: weight.clone() for name, weight in wider.state_dict().items()}
    with pytest.raises(ValueError, match=r"of another architecture \(3 of .* net.0.bias for one\): delete .*toy or"):
        train("toy", wider, wider.net, None, 100, Schedule(20, 8, 1e-2, ema_decay=0.9), runs=tmp_path)
    assert all(torch.equal(weight, before[name]) for name, weight in wider.state_dict().items())


def test_checkpoints_hold_what_is_learned_and_a_sample_changes_nothing(tmp_path):
    """Samples that use up random numbers leave the dropout that follows as it is; frozen weights stay outside."""
    quiet = run(tmp_path, "quiet", 0.5, steps=20)
    loud = run(tmp_path, "loud", 0.5, on_sample=lambda step: torch.rand(7), steps=20)
    assert losses(tmp_path, "quiet") == losses(tmp_path, "loud")
    assert torch.equal(quiet.net[0].weight, loud.net[0].weight)
    saved = load_file(tmp_path / "quiet/checkpoint/model.safetensors")
    assert sorted(saved) == ["net.0.bias", "net.0.weight", "net.2.bias", "net.2.weight"]
    assert not torch.equal(saved["net.0.weight"], quiet.net[0].weight)  # at the end it holds the average


def test_the_average_follows_the_weights(tmp_path):
    """on_sample sees the averaged weights, training goes on with the others."""
    toys = {}
    for name, decay in (("slow", 0.999), ("none", None)):
        toys[name] = run(tmp_path, name, 0.0, ema_decay=decay)
    last = load_file(tmp_path / "slow/checkpoint/model.safetensors")
    assert torch.equal(last["net.0.weight"], toys["none"].net[0].weight)
    assert not torch.equal(toys["slow"].net[0].weight, toys["none"].net[0].weight)
