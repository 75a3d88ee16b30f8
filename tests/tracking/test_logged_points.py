"""Which points MLflow has: nothing is asked for where the last step tells it, and no point passes twice."""

from __future__ import annotations

from detr_ray.tracking.mlflow_run import LoggedPoints


class Store:
    """Steps by metric, and which metrics were asked for."""

    def __init__(self, **steps: list[int]) -> None:
        self.steps, self.asked = steps, []

    def points(self) -> LoggedPoints:
        return LoggedPoints({name: max(steps) for name, steps in self.steps.items()}, self.look)

    def look(self, name: str) -> list[int]:
        self.asked.append(name)
        return self.steps[name]


def rows(name: str, *steps: int) -> list[tuple[str, float, int, int]]:
    return [(name, float(step), 0, step) for step in steps]


def test_steps_after_the_last_one_are_new_without_asking() -> None:
    store = Store(loss=[1, 2, 3])
    points = store.points()
    new = points.new_among([*rows("loss", 4, 5), *rows("other", -3, 0)])
    assert [(row[0], row[3]) for row in new] == [("loss", 4), ("loss", 5), ("other", -3), ("other", 0)]
    points.add(new)
    assert points.new_among(rows("loss", 6)) == rows("loss", 6)
    assert store.asked == []


def test_steps_that_begin_again_are_held_against_all_there_are() -> None:
    store = Store(loss=[1, 2, 4, 5], ap=[5])
    points = store.points()
    new = points.new_among(rows("loss", 2, 3, 4, 5, 6))
    assert new == rows("loss", 3, 6), "a step that is missing in between is sent"
    points.add(new)
    assert store.asked == ["loss"], "and only once, for the one metric"
    store.steps["loss"] += [3, 6]
    assert points.new_among(rows("loss", 3, 6, 7)) == rows("loss", 7)


def test_of_several_rows_of_one_point_the_first_stays() -> None:
    first, second = ("loss", 1.0, 10, 7), ("loss", 2.0, 20, 7)
    assert Store().points().new_among([first, second]) == [first]


def test_steps_are_forgotten_once_they_are_passed() -> None:
    store = Store(loss=list(range(1000)))
    points = store.points()
    points.add(points.new_among(rows("loss", 500, 1000)))
    assert not points._steps
