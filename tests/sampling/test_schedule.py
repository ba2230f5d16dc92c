import numpy as np
import pytest

from vstar_engine.sampling.schedule import Schedule, ddim_timesteps


@pytest.mark.parametrize("steps", [d for d in range(1, 1000) if 1000 % d == 0])
def test_divisors_give_the_published_timesteps(steps):
    assert ddim_timesteps(steps).tolist() == [t + 1 for t in range(0, 1000, 1000 // steps)]


def test_every_number_of_steps_is_given_exactly():
    """The published spacing gives 31 timesteps for 30 and leaves the schedule for 3; ours keeps its word for 1 to 1000."""
    for steps in range(1, 1001):
        timesteps = ddim_timesteps(steps)
        assert len(timesteps) == steps
        assert timesteps[0] >= 0
        assert timesteps[-1] <= 999
        assert (np.diff(timesteps) > 0).all()


def test_last_step_keeps_the_first_alpha_and_still_adds_noise():
    schedule = Schedule.ddim(25)
    assert schedule.alpha_prev[0] == pytest.approx(0.99915, abs=1e-6)
    assert schedule.sigma[0] == pytest.approx(0.0206, abs=1e-4)
    assert schedule.scale_prev[0] == 1.0


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_bad_steps(steps):
    with pytest.raises(ValueError, match="1 to 1000"):
        Schedule.ddim(steps)


@pytest.mark.parametrize("timesteps", [[], [1000], [-1, 3], [5, 5], [9, 3]], ids=str)
def test_bad_timesteps(timesteps):
    with pytest.raises(ValueError, match="ascend"):
        Schedule.ddim(timesteps=timesteps)


def test_steps_and_timesteps_exclude_each_other():
    with pytest.raises(ValueError, match="either"):
        Schedule.ddim(4, timesteps=[1, 2])
    with pytest.raises(ValueError, match="either"):
        Schedule.ddim()
