import math
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dino.history import History

LN_K = math.log(1024)


@pytest.fixture
def history():
    history = History()
    for i in range(1, 31):
        loss = 7.0 - i / 10
        history.record_iteration(
            i * 10,
            {
                "loss": loss,
                "loss_over_ln_k": loss / LN_K,
                "learning_rate": i * 1e-4,
                "momentum": 0.99 + i * 1e-4,
                "teacher_entropy": 0.9,
                "teacher_entropy_of_mean": 0.95,
                "kl_to_uniform": 0.3,
                "agreement": 0.25,
                "prototypes_in_use": 0.1,
                "rankme": 9.0,
                "gradient_norm": 1.5,
            },
        )
    for epoch, knn in enumerate((0.3, 0.6, 0.7), start=1):
        history.record_epoch(epoch, {"iteration": epoch * 100, "loss": 6.0 - epoch, "knn": knn})
    return history


def line(axes, index=0):
    return axes.get_lines()[index]


@pytest.mark.parametrize("name", ["loss", "learning_rate", "momentum"])
def test_a_curve_shows_the_recorded_numbers_over_the_steps(history, name):
    axes = getattr(history, f"plot_{name}")().axes[0]
    assert line(axes).get_xdata().tolist() == [i * 10 for i in range(1, 31)]
    assert line(axes).get_ydata().tolist() == history.get_metric(name)
    assert axes.get_xlabel() == "step"
    assert axes.get_ylabel() in {"loss", "learning rate", "teacher momentum"}


def test_a_curve_over_epochs_shows_the_epochs_numbers(history):
    axes = history.plot_loss(level="epoch").axes[0]
    assert line(axes).get_xdata().tolist() == [1, 2, 3]
    assert line(axes).get_ydata().tolist() == [5.0, 4.0, 3.0]
    assert axes.get_xlabel() == "epoch"
    assert all(tick == round(tick) for tick in axes.get_xticks())


def test_the_loss_is_shown_beside_ln_k(history):
    axes = history.plot_loss().axes[0]
    dashed = line(axes, 1)
    assert dashed.get_linestyle() == "--"
    assert dashed.get_ydata() == pytest.approx([LN_K, LN_K])
    (right,) = axes.child_axes
    assert right.get_ylabel() == "loss / ln K"
    axes.figure.draw_without_rendering()
    assert right.get_ylim() == pytest.approx([limit / LN_K for limit in axes.get_ylim()])


def test_a_loss_without_its_ratio_to_ln_k_is_plotted_alone():
    history = History()
    history.record_iteration(1, {"loss": 3.0, "learning_rate": 0.1, "momentum": 0.9})
    history.record_iteration(2, {"loss": 2.0, "learning_rate": 0.1, "momentum": 0.9})
    axes = history.plot_loss().axes[0]
    assert len(axes.get_lines()) == 1
    assert axes.child_axes == []


def test_the_knn_plot_has_the_baselines_as_dashed_lines(history):
    history.metadata["baselines"] = {"raw_pixels": 0.179, "untrained": 0.411}
    axes = history.plot("knn", level="epoch").axes[0]
    assert line(axes).get_ydata().tolist() == [0.3, 0.6, 0.7]
    assert [(other.get_linestyle(), other.get_ydata()[0]) for other in axes.get_lines()[1:]] == [
        ("--", 0.179),
        ("--", 0.411),
    ]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "k-NN accuracy",
        "raw pixels: 17.9%",
        "untrained: 41.1%",
    ]


def test_gaps_are_left_out_and_noise_is_smoothed():
    history = History()
    for i in range(200):
        history.record_iteration(
            i, {"loss": math.nan if i == 5 else float(i % 2), "learning_rate": 0.1, "momentum": 0.9}
        )
    raw, smooth = history.plot_loss().axes[0].get_lines()
    assert 5 not in raw.get_xdata()
    assert len(raw.get_xdata()) == 199
    assert np.all(np.abs(np.asarray(smooth.get_ydata()) - 0.5) < 0.35)
    assert smooth.get_xdata()[-1] == 199


def test_everything_recorded_has_its_frame_and_the_collapse_measures_share_one(history):
    figure = history.plot_all()
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "loss",
        "learning rate",
        "teacher momentum",
        "over ln K",
        "share",
        "RankMe of features",
        "gradient norm",
    ]
    for frame, values in ((3, [0.95, 0.9]), (4, [0.25, 0.1])):
        assert [curve.get_ydata()[0] for curve in figure.axes[frame].get_lines()] == values
    assert [axes.get_ylabel() for axes in history.plot_all("epoch").axes] == ["k-NN accuracy", "loss"]


def test_plots_are_written_as_one_image_to_the_file_named(history, tmp_path):
    history.plot_loss(save_path=tmp_path / "new" / "loss.png")
    history.plot_all("epoch", save_path=tmp_path / "all.png")
    history.plot_all(save_path=tmp_path / "no_suffix")
    for path in ("new/loss.png", "all.png", "no_suffix"):
        with Image.open(tmp_path / path) as image:
            pixels = np.asarray(image.convert("L"))
        assert (pixels.min() < 100, pixels.max() > 250) == (True, True), path


def test_nothing_recorded_is_an_error():
    for plot in (History().plot_loss, History().plot_all):
        with pytest.raises(ValueError, match="nothing to plot, no iteration is recorded yet"):
            plot()


def test_plotting_leaves_pyplot_alone_and_recording_loads_no_heavy_package(tmp_path):
    program = f"""
import sys
sys.path[:0] = {sys.path!r}
from dino.history import History
history = History()
history.record_iteration(1, {{"loss": 3.0}})
history.save({str(tmp_path / "history.json")!r})
print({{"matplotlib", "pandas", "torch"}} & set(sys.modules))
history.plot_all()
print("matplotlib" in sys.modules, "matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\nTrue False\n"
