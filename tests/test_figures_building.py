# SPDX-License-Identifier: MIT
"""The map of what is built: every part has a box, no box meets another, arrows run one way."""

from itertools import combinations

from drawn import is_whole
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import FancyBboxPatch

from dsv2_ref import figures
from dsv2_ref.exercises.build_it import exercises
from dsv2_ref.figures.building import levels

NAMES = {n: item.right.__name__ for n, item in exercises.items.items()}
NAMES[7] = "attend_absorbed"


def drawn():
    parts = [" ".join(str(n) for n in NAMES if n % 2 == i) for i in range(2)]
    return figures.building_order(NAMES, exercises.needs, dict(zip("ab", parts, strict=True)),
                                  {"a": "#FFFFFF", "b": "#FFE2A8"})


def test_drawn_with_nothing_clipped():
    assert drawn()._repr_png_().startswith(b"\x89PNG") and is_whole(drawn())


def test_every_part_has_a_box_of_its_own_and_its_name_fits():
    figure = drawn()
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    (ax,) = figure.axes
    boxes = [p.get_window_extent(renderer) for p in ax.patches if isinstance(p, FancyBboxPatch)]
    texts = {t.get_text(): t.get_window_extent(renderer) for t in ax.texts}
    assert len(boxes) == len(NAMES)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    for n, name in NAMES.items():
        text = texts[f"{n} {name}"]
        assert any(b.x0 <= text.x0 and text.x1 <= b.x1 and b.y0 <= text.y0 and text.y1 <= b.y1
                   for b in boxes), name
    legend = [texts[" a "], texts[" b "]]
    assert not any(a.overlaps(b) for a in legend for b in boxes)


def test_a_part_stands_behind_those_that_it_calls():
    assert levels({1: (), 2: (1,), 4: (2, 3), 3: ()}) == {1: 0, 2: 1, 3: 0, 4: 2}
    level = levels({n: exercises.needs.get(n, ()) for n in NAMES})
    assert all(level[p] < level[n] for n, parts in exercises.needs.items() for p in parts)


def test_the_title_counts():
    assert drawn().axes[0].get_title("left").startswith("14 parts; 8 of them")
