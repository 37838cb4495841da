# SPDX-License-Identifier: MIT
"""What each picture has to be: nothing of it lies outside."""

from matplotlib.backends.backend_agg import FigureCanvasAgg


def is_whole(figure):
    box = figure.get_tightbbox(FigureCanvasAgg(figure).get_renderer())      # inches
    width, height = figure.get_size_inches()
    return box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
