"""Training resumes after a kill with the same losses, runs on two processes, and every stage works."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from storybook.train import data, sd, sd3
from storybook.train.__main__ import train_all
from storybook.train.loop import Schedule, learning_rate

ROOT = Path(__file__).parent.parent
TOY = str(ROOT / "tests/toy_training.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def losses(folder):
    with (folder / "toy/log.csv").open() as file:
        return [row["loss"] for row in csv.DictReader(file)]


def toy(folder, *launcher):
    subprocess.run([sys.executable, *launcher, TOY, str(folder), "0"], env=ENVIRONMENT, check=True, capture_output=True)
    return losses(folder)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return folder, toy(folder)


def test_a_killed_run_resumes_with_the_same_losses(tmp_path, straight):
    log = tmp_path / "toy/log.csv"
    process = subprocess.Popen([sys.executable, TOY, str(tmp_path), "0.05"], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not log.exists() or len(log.read_text().splitlines()) < 26:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 25 <= len(losses(tmp_path)) < 40
    assert toy(tmp_path) == straight[1]
    resumed, uninterrupted = (torch.load(folder / "toy-0.pt") for folder in (tmp_path, straight[0]))
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)


def test_two_processes_share_the_batch_and_agree(tmp_path, straight):
    """Half the batch each, and gradients averaged: the same weights in both, and the loss falls as with one."""
    both = toy(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert len(both) == 40
    first, second = (torch.load(tmp_path / f"toy-{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert both != straight[1]  # other batches than one process draws
    assert float(both[-1]) < 0.5 * float(both[0])


def test_learning_rate_warms_up_and_decays():
    schedule = Schedule(steps=100, batch_size=1, learning_rate=1.0, warmup=10)
    assert learning_rate(schedule, 0) == 0.1
    assert learning_rate(schedule, 10) == 1.0
    assert learning_rate(schedule, 100) == pytest.approx(0.02)


def test_timesteps_cover_all_slices():
    timesteps = sd.stratified_timesteps(10, torch.Generator().manual_seed(0))
    assert [int(t) // 100 for t in timesteps] == list(range(10))


def test_sigmas_are_logit_normal():
    sigmas = sd3.logit_normal(1000, torch.Generator().manual_seed(0))
    logits = torch.logit(sigmas)
    assert abs(logits.mean()) < 0.01 and abs(logits.std() - 1) < 0.02


def test_the_t5_tokenizer_knows_the_world_and_spells_the_rest():
    tokenizer = sd3.new_t5(16)[1]
    assert tokenizer.tokenize("A red boat") == ["\u2581A", "\u2581red", "\u2581boat"]
    assert tokenizer.unk_token_id not in tokenizer("a zebra, twice").input_ids


def test_every_stage_runs_and_writes_a_folder_that_stock_diffusers_draws_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = ["--pictures", "32", "--steps", "2", "--batch-size", "4"]
    monkeypatch.setattr("storybook.train.judge.WEIGHTS", tmp_path / "models/judge.safetensors")
    train_all(["--size", "64"], few)
    from diffusers import DiffusionPipeline

    for name in ("storybook-sd", "storybook-sd3"):
        pipeline = DiffusionPipeline.from_pretrained(f"models/{name}")
        assert pipeline("a red boat", num_inference_steps=2).images[0].size == (64, 64)
        parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        assert {part.dtype for part in parts} == {torch.float32}
    assert not list(Path("outputs").rglob("*.partial*"))


def test_the_training_pictures_are_rebuilt_from_their_numbers(tmp_path):
    first = data.pictures("train", 8, 32, cache=tmp_path / "a")
    again = data.pictures("train", 8, 32, cache=tmp_path / "b")
    assert (first == again).all()
    assert first.std() > 10


def test_one_caption_in_ten_is_empty_and_pairs_come_twice():
    scenes = data.scenes("fresh", 1000)
    texts = data.captions_for_guidance(scenes, torch.Generator().manual_seed(0))
    assert 70 <= texts.count("") <= 130
    order = data.by_things(scenes)
    assert all(order.count(index) == len(scenes[index].things) for index in range(50))
