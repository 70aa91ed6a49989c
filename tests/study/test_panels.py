import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from bundle.study.panels import finish, grid, legend


@pytest.mark.parametrize("count", [1, 2, 5])
def test_nothing_is_cut_off(count):
    drawn, panels = grid(count)
    for name in ("flips of the first slice", "drift of attention", "temperature"):
        panels[0].plot([0, 1], [0, 1], label=name)
    finish(drawn, panels, count, "epoch", "share of watched cases, of attention")
    legend(drawn)
    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    around = drawn.bbox
    for part in (drawn.legends[0], drawn._supylabel, drawn._supxlabel):
        box = part.get_window_extent(canvas.get_renderer())
        assert around.x0 <= box.x0 < box.x1 <= around.x1, part
        assert around.y0 <= box.y0 < box.y1 <= around.y1, part
