"""Witnesses: a browser, the numbers that went in, scikit-learn's confusion matrix, and the HTML parser of Python."""

import html
import json
import math
import re
import shutil
import subprocess
import sys
import types
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from elsewhere import cached_elsewhere
from sklearn.metrics import confusion_matrix

from dino.augmentation import DINOTransform, EvalTransform
from dino.backbone.resnet import SmallResNet
from dino.backbone.vit_tiny import ViTTiny
from dino.dataset.encoded import BrokenImage
from dino.evaluator.features import UNREAD, Features, features_of
from dino.evaluator.knn import Measured
from dino.history import History
from dino.report import Course, Pictured, header, write_report
from dino.report.curves import thinned
from dino.report.environment import command_line, environment
from dino.report.learned import class_section, map_section, neighbour_section, one_of_each
from dino.runtime.device import peak_memory

EVIL = '<script>alert("x")</script>&amp;'
CONFIG = {"name": "run", "seed": 0, "backbone": {"_target_": "dino.ViT", "depth": 4}, "logger": {}}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Noise(torch.utils.data.Dataset):
    """Random images, the hardest to compress; image 3 is broken."""

    def __init__(self, images=24, size=40, classes=("cat", EVIL, "dog")):
        self.images, self.size, self.classes = images, size, classes and list(classes)

    def __len__(self):
        return self.images

    def __getitem__(self, index):
        if index == 3:
            raise BrokenImage("3.jpg: cannot be read.", "3.jpg")
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(0, 256, (3, self.size, self.size + 8), dtype=torch.uint8, generator=generator)
        return image, index % len(self.classes) if self.classes else -1


def history_of(steps=30, total=60):
    history = History({"config": CONFIG})
    history.metadata |= {"total_steps": total, "baselines": {"raw_pixels": 0.182, "untrained": 0.446}}
    for i in range(1, steps + 1):
        history.record_iteration(
            i,
            {
                "loss": 7.0 - i / steps,
                "learning_rate": 1e-3,
                "momentum": 0.99,
                "loss_over_ln_k": (7.0 - i / steps) / math.log(1024),
                "gradient_norm": math.nan if i == 2 else 1.0,
                "images_per_second": 100.0 + i,
            },
        )
    history.record_epoch(1, {"iteration": steps // 2, "loss": 6.5, "knn": 0.71, "training_seconds": 60.0})
    history.record_epoch(2, {"iteration": steps, "loss": 6.2, "knn": 0.625, "training_seconds": 120.0})
    return history


def parts(backbone=None, classes=("cat", EVIL, "dog"), size=32, images=24, views=2, **more):
    """What a report shows, by the names that its arguments give to it."""
    torch.manual_seed(0)
    backbone = backbone or ViTTiny(hidden_dim=32, depth=1, heads=2, image_size=32)
    train, val, transform = Noise(images, size + 8, classes), Noise(images, size + 8, classes), EvalTransform(size)
    bank, queries = (features_of(backbone, data, transform) for data in (train, val))
    return {
        "config": {**CONFIG, "backbone": {"_target_": "dino.Other", "width": [1, 2]}},
        "defaults": CONFIG,
        "history": history_of(),
        "notes": (),
        "backbone": backbone,
        "train_set": train,
        "val_set": val,
        "transform": DINOTransform(num_local_views=views, global_size=size, local_size=size // 2),
        "eval_transform": transform,
        "bank": bank,
        "queries": queries,
        "predicted": torch.arange(images) // 2 % len(classes) if classes else None,
    } | more


def written(directory, **shown):
    """The report of `shown`, which is made by `parts`."""

    def chosen(*names):
        return {name: shown[name] for name in names}

    return write_report(
        directory,
        Course(**chosen("config", "defaults", "history", "notes")),
        Pictured(**chosen("train_set", "val_set", "transform", "eval_transform")),
        shown["backbone"],
        Measured({}, **chosen("bank", "queries", "predicted")),
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return written(tmp_path_factory.mktemp("outputs"), **parts(notes=["a <b>sentence</b> to read"]))


class Page(HTMLParser):
    """Tags in order, the text outside of scripts, and every address."""

    VOID = ("meta", "link", "img", "br", "rect")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.addresses, self.ids = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "data", "action")]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def curves_in(text):
    return json.loads(re.search(r'<script type="application/json" id="curves">(.*?)</script>', text)[1])


def test_a_report_of_images_that_lie_on_another_device_is_that_of_those_on_the_cpu(tmp_path):
    shown = parts()
    elsewhere = {split: cached_elsewhere(shown[split]) for split in ("train_set", "val_set")}
    pages = [written(tmp_path, **shown | other).read_text() for other in ({}, elsewhere)]
    pictures = [[uri for uri in Page(page).addresses if uri.startswith("data:")] for page in pages]
    assert pictures[0] == pictures[1] and len(pictures[0]) > 20


def test_the_report_is_one_file_that_needs_no_network_with_every_section(report):
    text = report.read_text()
    page = Page(text)
    assert report.name == "report.html"
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not re.search(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)[\w.]+\.\w", re.sub(r"base64,[^\"]*", "", text))
    sections = ["Curves", "Neighbours", "Attention", "Patches", "Classes", "Map", "Crops", "Settings", "Environment"]
    assert [name for name in page.ids if name != "curves"] == sections
    assert [a for a in page.addresses if a.startswith("#")] == [f"#{name}" for name in sections]


def test_the_head_says_where_the_run_stands_beside_both_baselines(report):
    text = Page(report.read_text()).text
    for words in ("running", "step 30 of 60", "62.5 % k-NN, best 71.0 %", "18.2 % k-NN of raw pixels"):
        assert words in text
    assert "44.6 % k-NN of the untrained backbone" in text
    assert f"6.000 loss, {6 / math.log(1024):.2f} ln K" in text
    assert "2 min of training, about 2 min left" in text
    assert "116 images / s (median)" in text
    assert "GiB peak memory" in text


def test_the_mfu_stands_beside_the_speed_where_it_is_known():
    history = history_of()
    history.record_iteration(31, {"images_per_second": 116.0, "mfu": 0.4125})
    assert "images / s (median), 41.2 % MFU" in header("a", history, 31, 60, "1 GiB", ())


def test_foreign_text_is_escaped_everywhere(report):
    text = report.read_text()
    assert "alert" in text
    assert '<script>alert("x")' not in text and "<b>sentence" not in text
    assert "a <b>sentence</b> to read" in Page(text).text
    assert Page(text).text.count(EVIL) > 3


def test_a_finished_run_is_not_refreshed_and_a_running_one_is(report, tmp_path):
    assert re.search(r"REFRESH = (\d+)", report.read_text())[1] == "30"
    finished = written(tmp_path, **parts(history=history_of(30, total=30))).read_text()
    assert re.search(r"REFRESH = (\d+)", finished)[1] == "0"
    assert "finished step 30 of 30" in Page(finished).text and "of training, about" not in Page(finished).text


def test_the_curves_hold_the_recorded_numbers_over_the_step(report):
    charts = {chart["title"]: chart for chart in curves_in(report.read_text())}
    assert list(charts)[:2] == ["k-NN accuracy", "loss"]
    (knn,) = charts["k-NN accuracy"]["series"]
    assert (knn["x"], knn["y"]) == ([15, 30], [0.71, 0.625])
    assert [line["y"] for line in charts["k-NN accuracy"]["lines"]] == [0.182, 0.446]
    (loss,) = charts["loss"]["series"]
    assert loss["x"] == list(range(1, 31))
    assert loss["y"] == pytest.approx([7 - i / 30 for i in range(1, 31)], rel=1e-4)
    assert [line["y"] for line in charts["loss"]["lines"]] == pytest.approx([math.log(1024)])
    assert charts["gradient norm"]["series"][0]["x"] == [1, *range(3, 31)]  # without the NaN


def test_long_curves_are_thinned_and_keep_their_ends_and_extremes():
    x, y = np.arange(100_000.0), np.random.default_rng(0).normal(size=100_000)
    y[54_321], y[77_777] = 99.0, -99.0
    few_x, few_y = thinned(x, y, most=400)
    assert 390 <= len(few_x) <= 400
    assert (np.diff(few_x) > 0).all()
    assert np.array_equal(few_y, y[few_x.astype(int)])
    assert {0, 54_321, 77_777, 99_999} <= set(few_x.astype(int))
    assert thinned(x[:400], y[:400], most=400)[0] is not None and len(thinned(x[:400], y[:400], most=400)[0]) == 400


def test_a_noisy_curve_is_shown_with_its_running_mean(tmp_path):
    history = History()
    values = np.random.default_rng(0).normal(size=150)
    for i, value in enumerate(values):
        history.record_iteration(i + 1, {"loss": float(value), "learning_rate": 0.1, "momentum": 0.9})
    charts = curves_in(written(tmp_path, **parts(history=history)).read_text())
    faint, mean = next(chart for chart in charts if chart["title"] == "loss")["series"]
    assert faint["faint"] and not mean["faint"] and mean["name"] == "loss (mean of 3)"
    assert mean["x"] == list(range(3, 151))
    assert mean["y"] == pytest.approx([values[i : i + 3].mean() for i in range(148)], rel=1e-3, abs=1e-4)


def test_what_differs_from_the_defaults_stands_in_the_settings(report):
    text = Page(report.read_text()).text
    settings = text[text.index("What differs") : text.index("Environment", text.index("What differs"))]
    changed, every = settings.split("All 5 settings")
    assert changed.endswith("backbone._target_ dino.Other dino.ViT backbone.width [1, 2] – ")
    every_key = "name run seed 0 backbone._target_ dino.Other backbone.width [1, 2] logger {}"
    assert every.strip() == every_key


def test_neighbours_are_the_most_alike_train_images_marked_by_label():
    train, val = Noise(8, classes=("cat", "dog")), Noise(8, classes=("cat", "dog"))
    labels = torch.tensor([0, 1, 0, UNREAD, 0, 1, 0, 1])
    rows = torch.eye(8)[:, [1, 0, 2, 3, 4, 5, 6, 7]]  # train image 1 is most like val image 0
    rows[:, 3] += torch.tensor([0, 0, 0, 9.0, 0, 0, 0, 0])  # broken, and alike to nothing
    section = neighbour_section(
        [(0, val[0][0], 0), (4, val[4][0], 0)],
        train,
        Features(rows, labels),
        Features(torch.eye(8), labels),
        train.classes,
    )
    first = [
        re.findall(r'picture (same|other)".*?title="([^"]*)"', line)[0]
        for line in section.split('<div class="row">')[1:]
    ]
    assert first == [("other", "✗ dog, cosine 1.000"), ("same", "✓ cat, cosine 1.000")]
    assert section.count("✓") + section.count("✗") > 10


def test_the_first_rows_shown_are_of_different_classes_and_can_be_read():
    labels = torch.tensor([0, 0, 0, 1, 1, 2, UNREAD, 2, 0, UNREAD])
    rows = one_of_each(Features(torch.zeros(10, 1), labels), 10)
    assert sorted(rows) == list(range(10))
    assert sorted(labels[rows[:3]].tolist()) == [0, 1, 2]
    assert sorted(labels[rows[3:6]].tolist()) == [0, 1, 2]
    assert labels[rows[-2:]].tolist() == [UNREAD, UNREAD]
    assert rows == one_of_each(Features(torch.zeros(10, 1), labels), 10)


def test_the_confusion_matrix_is_scikit_learns():
    random = np.random.default_rng(0)
    labels, guesses = random.integers(0, 4, 200), random.integers(0, 4, 200)
    unread = torch.from_numpy(np.where(np.arange(200) % 9 == 0, UNREAD, labels))
    shown = class_section(Features(torch.zeros(200, 1), unread), torch.from_numpy(guesses), ["a", "b", "c", "d"])
    kept = unread.numpy() != UNREAD
    theirs = confusion_matrix(labels[kept], guesses[kept])
    ours = np.array([int(count) for count in re.findall(r'transparent\)" title="(\d+)"', shown)]).reshape(4, 4)
    assert np.array_equal(ours, theirs)
    said = dict(re.findall(r'<td>(\w)</td><td><span.*?</span></td><td class="number">([\d.]+) %', shown))
    for i, name in enumerate("abcd"):
        assert said[name] == f"{100 * theirs[i, i] / theirs[i].sum():.1f}"
    wrong = theirs - np.diag(theirs.diagonal())
    i, j = np.unravel_index(wrong.argmax(), wrong.shape)
    assert f"<td>{'abcd'[i]}</td><td>{'abcd'[j]}</td>" in shown.split("Most confused")[1].split("</tr>")[1]


def test_of_many_classes_the_best_and_the_worst_are_shown():
    names = [f"class{i:03d}" for i in range(100)]
    labels = torch.arange(100).repeat(10)
    guesses = torch.where(
        torch.arange(1000) // 10 >= labels, labels, (labels + 1) % 100
    )  # class c: right 100 - c times
    shown = class_section(Features(torch.zeros(1000, 1), labels), guesses, names)
    best, worst = shown.split("Most confused")[0].split("Worst 20")
    assert set(re.findall(r"class\d+", best)) == set(names[:20])
    assert set(re.findall(r"class\d+", worst)) == set(names[80:])
    assert "confusion" not in shown


def test_the_map_puts_classes_that_differ_apart():
    labels = torch.arange(60) % 3
    rows = torch.eye(3)[labels] + 0.05 * torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    shown = map_section(Features(rows, labels), ["a", "b", "c"])
    dots = re.findall(r'cx="(\d+)" cy="(\d+)".*?<title>(\w)</title>', shown)
    places = np.array([[int(x), int(y)] for x, y, _ in dots])
    of = np.array([name for _, _, name in dots])
    assert len(dots) == 60 and "t-SNE" in shown
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1) + 1e9 * np.eye(60)
    assert (of[apart.argmin(1)] == of).all()
    assert map_section(Features(rows, labels), ["a", "b", "c"]) == shown  # the same at every evaluation


def test_umap_makes_the_map_where_it_is_installed(monkeypatch):
    class UMAP:
        def __init__(self, random_state, n_jobs):
            assert (random_state, n_jobs) == (0, 1)

        def fit_transform(self, rows):
            return rows[:, :2]

    module = types.ModuleType("umap")
    module.UMAP, module.__spec__ = UMAP, types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "umap", module)
    assert "UMAP of the features of 60 held-out" in map_section(
        Features(torch.randn(60, 3), torch.zeros(60).long()), ["a"]
    )


@pytest.mark.parametrize(
    "more, gone, said",
    [
        ({"classes": None, "predicted": None}, {"Classes"}, "most alike of the 24 train images, by cosine. "),
        ({"backbone": SmallResNet(width=8)}, set(), "SmallResNet has no attention to show."),
        ({"backbone": torch.nn.Sequential(SmallResNet(width=8))}, {"Patches"}, "Sequential has no attention to show."),
        ({"bank": None, "queries": None, "predicted": None}, {"Neighbours", "Classes", "Map"}, "mean of heads"),
        ({"history": History()}, {"Curves"}, "step 0"),
    ],
    ids=["unlabelled", "resnet", "no tokens", "no features", "no history"],
)
def test_what_there_is_nothing_for_is_left_out(tmp_path, more, gone, said):
    page = Page(written(tmp_path, **parts(**more)).read_text())
    every = {"Curves", "Neighbours", "Attention", "Patches", "Classes", "Map", "Crops", "Settings", "Environment"}
    assert set(page.ids) - {"curves"} == every - gone
    assert said in page.text


def test_a_report_draws_nothing_from_the_generators_and_leaves_the_backbone_as_it_was(tmp_path):
    given = parts(backbone=ViTTiny(hidden_dim=32, depth=1, heads=2, image_size=32).train())
    given["transform"].compile()
    given["backbone"].norm.eval()
    modes = [module.training for module in given["backbone"].modules()]
    before = torch.get_rng_state(), np.random.get_state(legacy=True)
    first = written(tmp_path, **given).read_text()
    after = torch.get_rng_state(), np.random.get_state(legacy=True)
    assert torch.equal(before[0], after[0])
    assert all(np.array_equal(one, other) for one, other in zip(before[1], after[1]))
    assert [module.training for module in given["backbone"].modules()] == modes
    assert given["transform"].compiled
    pictures = re.findall('base64,[^"]*', first)
    assert len(pictures) > 50 and pictures == re.findall('base64,[^"]*', written(tmp_path, **given).read_text())


def test_a_report_of_large_and_many_pictures_stays_below_5_mb(tmp_path):
    backbone = ViTTiny(hidden_dim=48, depth=1, heads=12, patch_size=32, image_size=224)
    path = written(tmp_path, **parts(backbone, size=224, images=12, views=10))
    assert path.stat().st_size < 5e6


def test_a_report_that_fails_leaves_the_one_before(tmp_path):
    path = written(tmp_path, **parts())
    before = path.read_text()
    with pytest.raises(ValueError, match="square patches do not cover"):
        broken = ViTTiny(hidden_dim=32, depth=1, heads=2, image_size=32)
        broken.attention = lambda images: torch.ones(len(images), 2, 8, 8)
        written(tmp_path, **parts(broken))
    assert path.read_text() == before and [*tmp_path.iterdir()] == [path]


def test_the_peak_memory_is_that_of_the_log_and_not_a_parents(monkeypatch):
    parents = types.SimpleNamespace(ru_maxrss=2**40)
    monkeypatch.setattr("resource.getrusage", lambda _: parents)
    own = peak_memory(torch.device("cpu")) / 2**30
    assert float(environment()["peak memory"].removesuffix(" GiB")) == pytest.approx(own, abs=0.1)


def test_the_environment_is_that_of_this_process(monkeypatch):
    facts = environment()
    assert facts["torch"] == torch.__version__
    assert facts["Python"] == sys.version.split()[0]
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", "-m", "dino.train", "name=a b"])
    assert command_line() == "python3 -m dino.train 'name=a b'"


def test_the_commit_is_gits_and_that_of_another_project_is_not_taken(tmp_path, monkeypatch):
    def git(*line):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *line], capture_output=True, text=True, check=True
        ).stdout

    package = tmp_path / "dino"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(sys.modules["dino.report.environment"], "__file__", str(package / "environment.py"))
    assert environment()["commit"] == "none: not run from a checkout"
    (tmp_path / "other").write_text("")
    git("init", "-q")
    git("add", "other")
    git("commit", "-qm", "one")
    assert environment()["commit"] == "none: not run from a checkout"
    git("add", "dino")
    git("commit", "-qm", "two")
    head = git("rev-parse", "HEAD").strip()
    assert environment()["commit"] == head
    (package / "__init__.py").write_text("changed")
    assert environment()["commit"] == f"{head}, 1 files changed since"


# ---- in a browser ---------------------------------------------------------------------------------------------------

# The page stands in a frame of the width of the screen: a window cannot be as narrow as a phone.
OUTSIDE = """<!doctype html><body><iframe srcdoc="{}" style="width:{}px;height:800px;border:0"></iframe>
<pre id="told"></pre><script>onmessage = e => document.getElementById("told").textContent = e.data</script>"""
INSIDE = """<script>
addEventListener("load", () => setTimeout(() => {
  const wide = innerWidth, root = document.documentElement;
  const svg = document.querySelector(".chart svg"), box = svg.getBoundingClientRect();
  const at = (type, x) => svg.dispatchEvent(new PointerEvent(type, {clientX: box.left + x, clientY: box.top + 50}));
  const labels = () => [...svg.querySelectorAll("text")].map(t => t.textContent).join(" ");
  svg.setPointerCapture = () => 0;  // no real pointer is down
  const whole = labels();
  at("pointermove", 1e4);
  const said = document.querySelector(".legend").textContent;
  at("pointerdown", box.width / 2); at("pointermove", box.width * 0.8); at("pointerup", box.width * 0.8);
  const part = labels();
  svg.dispatchEvent(new MouseEvent("dblclick"));
  parent.postMessage(JSON.stringify({
    inner: innerWidth, wide: root.scrollWidth, charts: document.querySelectorAll(".chart path").length, said,
    zoomed: part !== whole, reset: labels() === whole,
    pictures: [...document.images].filter(i => !i.complete || !i.naturalWidth).length,
    over: [...document.querySelectorAll("section > *")].filter(n => n.getBoundingClientRect().right > wide).length,
  }), "*");
}, 300));
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 390, 360])
def test_a_browser_shows_it_without_errors_and_nothing_is_wider_than_the_screen(report, tmp_path, width):
    frame = tmp_path / "frame.html"
    frame.write_text(OUTSIDE.format(html.escape(report.read_text().replace("</body>", INSIDE)), width))
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1400,900",
        "--enable-logging=stderr",
        "--v=0",
    ]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    line = [BROWSER, *options, profile, "--virtual-time-budget=3000", "--dump-dom", frame.as_uri()]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=True)
    assert [said for said in done.stderr.splitlines() if "CONSOLE" in said] == []
    told = json.loads(re.search(r'<pre id="told">(.*?)</pre>', done.stdout)[1])
    assert told["inner"] == width and told["wide"] <= width and told["over"] == 0
    assert told["charts"] >= 6 and told["pictures"] == 0
    assert told["zoomed"] and told["reset"]
    assert "62.5 % at 30" in told["said"] and "18.2 %" in told["said"]
