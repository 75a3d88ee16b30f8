"""Keys of the section `run`."""

from __future__ import annotations

import pytest
from config_keys.registry import Place, same_weights, shows

from detr_ray.config import ConfigError


@shows("run.name")
def name(place: Place) -> None:
    """The name is the folder, and a run of that name is gone on with."""
    first = place.train("run.name=mine", stop_after=2)
    assert (place.folder / "runs" / "mine" / "run.json").is_file()
    second = place.train("run.name=mine")
    assert first.result is not None and second.result is not None and second.result.run_name == "mine"
    assert len(first.updates) == 2 and len(second.updates) == 2
    unnamed = [place.job().run.name for _ in range(2)]
    assert unnamed[0] != unnamed[1], "without a name, each is a run of its own"


@shows("run.storage")
def storage(place: Place) -> None:
    seen = place.train(f"run.storage={place.folder}/elsewhere", "run.name=a", "train.max_steps=1")
    assert (place.folder / "elsewhere" / "a" / "checkpoints" / "step_00000001" / "model.pt").is_file()
    assert seen.result is not None and seen.result.run_path == f"{place.folder}/elsewhere/a"
    assert not (place.folder / "runs").exists()


@shows("run.seed")
def seed(place: Place) -> None:
    """Weights, the order of images, augmentation and dropout are other ones."""
    one, two, again = (place.job(f"run.seed={value}") for value in (1, 2, 1))
    assert same_weights(one.build_detector().model, again.build_detector().model)
    assert not same_weights(one.build_detector().model, two.build_detector().model)

    def stream(number: int) -> list[tuple[int, bool]]:
        return [(sample.image_id, sample.steps) for sample in place.samples(f"run.seed={number}")]

    assert stream(1) == stream(1) != stream(2)
    assert [image for image, _ in stream(1)] != [image for image, _ in stream(2)]
    assert dict(stream(1)) != dict(stream(2))
    seeds = [place.train(f"run.seed={value}", "train.max_steps=1").training[0].seed for value in (1, 2)]
    assert seeds[0] != seeds[1]
    with pytest.raises(ConfigError):
        place.train("run.name=a", "run.seed=1", stop_after=1)
        place.train("run.name=a", "run.seed=2")


@shows("run.fork_from")
def fork_from(place: Place) -> None:
    """The run begins at another one's checkpoint, and trains from there."""
    donor = place.train("run.name=donor", stop_after=3)
    fork = place.train("run.name=fork", f"run.fork_from={place.folder}/runs/donor", "optim.lr=0.01")
    assert fork.result is not None and fork.result.status == "finished"
    assert len(donor.updates) == 3 and len(fork.updates) == fork.result.step - 3
    after = dict(donor.loop.model.named_parameters())
    assert all(bool((value == after[name]).all()) for name, value in fork.updates[0].weights.items())
    assert fork.updates[0].rates[0] == 0.01
