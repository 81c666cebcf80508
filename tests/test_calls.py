"""The Python calls that the documentation promises, and what each must give; training goes through the same."""

import copy
import importlib.metadata

import PIL.Image
import pytest
import torch

import dino
from dino import (
    DinoLoss,
    DinoModel,
    DinoProjectionHead,
    DINOTransform,
    History,
    clip_gradients,
    collate_multi_crop,
    get_backbone,
    get_dataset,
    get_momentum_schedule,
    load_checkpoint,
    save_checkpoint,
    update_teacher_EMA,
)
from dino.run.checkpoint import STATES
from dino.train import train
from dino.weights.checkpoint_file import read_checkpoint

SMALL = [
    "dataset.train.images=96",
    "dataset.val.images=16",
    "training.batch_size=4",
    "training.max_steps=20",
    "backbone.hidden_dim=32",
    "backbone.depth=1",
    "head.hidden_dim=32",
    "dataset.out_dim=64",
    "device=cpu",
]


class MeanColour(torch.nn.Module):
    """A linear map of an image's mean colour: features of 12."""

    output_dim = 12

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 12)

    def forward(self, images):
        return self.linear(images.mean(dim=(2, 3)))


def small_model(out_dim=64):
    return DinoModel(MeanColour(), DinoProjectionHead(12, hidden_dim=16, bottleneck_dim=8, output_dim=out_dim))


def stepped():
    """Student, teacher, optimizer and loss after one step, so that each has something to keep."""
    student, teacher, loss = small_model(), small_model(), DinoLoss(64, ncrops=2)
    optimizer = torch.optim.AdamW(student.parameters())
    views = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    loss(student(views), teacher(views).detach()).backward()
    optimizer.step()
    return student, teacher, optimizer, loss


def test_every_public_name_is_listed_and_loads():
    for name in dino.__all__:
        assert name in dir(dino) and getattr(dino, name) is not None
    assert dino.__version__ == importlib.metadata.version("dino-train")


def test_a_transform_gives_two_global_and_six_local_views_and_batches_hold_one_view_each():
    transform, image = DINOTransform(num_local_views=6), PIL.Image.new("RGB", (256, 256))
    assert [tuple(view.shape) for view in transform(image)] == [(3, 224, 224)] * 2 + [(3, 96, 96)] * 6
    views, labels = collate_multi_crop([(transform(image), i) for i in range(3)])
    assert [tuple(view.shape) for view in views] == [(3, 3, 224, 224)] * 2 + [(3, 3, 96, 96)] * 6
    assert labels.tolist() == [0, 1, 2]


def test_a_model_gives_projections_and_on_request_features_before_them():
    model, images = small_model(), torch.randn(2, 3, 8, 8)
    features, projections = model(images, return_backbone_features=True)
    assert torch.equal(features, model.backbone(images)) and features.shape == (2, 12)
    assert torch.equal(projections, model(images)) and projections.shape == (2, 64)


@pytest.mark.parametrize("arguments", [{"alpha": 0.9}, {}])
def test_the_teacher_keeps_alpha_of_itself_99_percent_by_default(arguments):
    student, teacher = small_model(), small_model()
    before, alpha = copy.deepcopy(teacher), arguments.get("alpha", 0.99)
    update_teacher_EMA(student, teacher, **arguments)
    for ours, own, then in zip(teacher.parameters(), student.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(ours, alpha * then + (1 - alpha) * own, rtol=0, atol=1e-6)


def test_the_momentum_schedule_is_that_of_training():
    momenta = get_momentum_schedule(0.996, 1.0, epochs=10, steps_per_epoch=5)
    schedule = dino.Schedule(epochs=10, steps_per_epoch=5, effective_batch=8, lr=0.1, weight_decay=0.0)
    assert momenta == [schedule(step).momentum for step in range(50)]
    assert momenta[0] == 0.996 and momenta == sorted(momenta) and 0.9999 < momenta[-1] < 1
    with pytest.raises(ValueError, match="base must be in"):
        get_momentum_schedule(1.5, 1.0, 10, 5)


def test_a_history_is_recorded_saved_plotted_and_put_in_a_table(tmp_path):
    history = History(metadata={"config": {"a": 1}})
    history.record_iteration(0, {"loss": 2.5, "learning_rate": 0.001, "momentum": 0.996})
    history.record_epoch(1, {"loss": 2.3, "learning_rate": 0.001, "momentum": 0.997})
    history.save(tmp_path / "history.json")
    history = History.load(tmp_path / "history.json")
    assert history.metadata["config"] == {"a": 1} and "created_at" in history.metadata
    assert history.get_metric("loss", level="epoch") == [2.3] and history.get_iterations() == [0]
    history.plot_all(level="epoch", save_path=tmp_path / "plots.png")
    with PIL.Image.open(tmp_path / "plots.png") as image:
        assert image.format == "PNG" and image.width > 400
    assert history.to_dataframe(level="epoch").loc[0, "loss"] == 2.3


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_goes_back_into_the_objects_and_the_rest_is_returned(tmp_path):
    parts = stepped()
    path = tmp_path / "new" / "checkpoint.pth"
    save_checkpoint(*parts, path=path, epoch=3, iteration=7, config={"a": 1}, metrics={"loss": 2.0}, note="mine")
    content = torch.load(path, weights_only=True)
    assert torch.equal(content["dino_loss_center"], parts[3].center)
    others = small_model(), small_model(), None, DinoLoss(64, ncrops=2)
    others = others[0], others[1], torch.optim.AdamW(others[0].parameters()), others[3]
    found = load_checkpoint(path, *others)
    kept = {
        "epoch": 3,
        "iteration": 7,
        "config": {"a": 1},
        "metrics": {"loss": 2.0},
        "wandb_run_id": None,
        "note": "mine",
    }
    assert {key: value for key, value in found.items() if key != "timestamp"} == kept
    assert content.keys() == {*STATES, *kept, "timestamp"}
    for one, other in zip(parts, others, strict=True):
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_a_checkpoint_of_another_network_is_refused_and_nothing_is_changed(tmp_path):
    student, teacher, optimizer, loss = stepped()
    save_checkpoint(student, teacher, optimizer, loss, path=tmp_path / "a.pth")
    other = small_model(out_dim=32)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        ValueError, match=r"the student is another \(.*last_layer.* is \[64, 8\] in the file and \[32, 8\]"
    ):
        load_checkpoint(tmp_path / "a.pth", other, teacher, torch.optim.AdamW(other.parameters()), loss)
    torch.testing.assert_close(other.state_dict(), before, rtol=0, atol=0)
    mine, before = small_model(), None
    before = copy.deepcopy(mine.state_dict())
    with pytest.raises(ValueError, match=r"a\.pth does not fit what it is loaded into: .*parameter group"):
        load_checkpoint(tmp_path / "a.pth", mine, teacher, torch.optim.AdamW(mine.backbone.parameters()), loss)
    torch.testing.assert_close(mine.state_dict(), before, rtol=0, atol=0)


def test_a_checkpoint_that_is_missing_or_none_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not there; expected a checkpoint"):
        load_checkpoint(tmp_path / "a.pth", *stepped())
    torch.save({"student_state_dict": {}}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="it has no 'dino_loss_center'"):
        load_checkpoint(tmp_path / "a.pth", *stepped())
    (tmp_path / "a.pth").write_text("none")
    with pytest.raises(ValueError, match="a.pth cannot be read as a checkpoint"):
        load_checkpoint(tmp_path / "a.pth", *stepped())


def test_a_checkpoint_whose_error_has_no_words_is_refused_by_the_kind_of_it(tmp_path, monkeypatch):
    def wordless(path):
        raise EOFError

    (tmp_path / "a.pth").touch()
    monkeypatch.setattr("dino.run.checkpoint.read_checkpoint", wordless)
    with pytest.raises(ValueError, match=r"a\.pth cannot be read as a checkpoint \(EOFError\)"):
        load_checkpoint(tmp_path / "a.pth", *stepped())


def test_what_could_not_be_read_back_without_code_is_not_saved(tmp_path):
    with pytest.raises(
        TypeError, match=r"checkpoint: config.root is a pathlib.*Path, expected a tensor or plain values"
    ):
        save_checkpoint(*stepped(), path=tmp_path / "a.pth", config={"root": tmp_path})
    assert not (tmp_path / "a.pth").exists()


def test_what_wraps_a_model_leaves_no_trace_in_its_checkpoint(tmp_path):
    student, teacher, optimizer, loss = stepped()
    save_checkpoint(torch.compile(student), teacher, optimizer, loss, path=tmp_path / "a.pth")
    load_checkpoint(tmp_path / "a.pth", student, torch.compile(teacher), optimizer, loss)
    assert read_checkpoint(tmp_path / "a.pth")["student_state_dict"].keys() == student.state_dict().keys()


# ---- parts by the names of conf/ ------------------------------------------------------------------------------------


def test_a_backbone_by_name():
    assert get_backbone("resnet18").output_dim == 512
    vit = get_backbone("dino_vits16", drop_path=0.1)
    assert vit.output_dim == 384 and vit.blocks[-1].drop_path == 0.1
    assert get_backbone("timm", model_name="resnet10t").output_dim == 512
    with pytest.raises(ValueError, match="backbone has no option resnet19; did you mean resnet1"):
        get_backbone("resnet19")
    with pytest.raises(ValueError, match="ViTTiny takes no pretrained"):
        get_backbone("vit_tiny", pretrained=True)
    with pytest.raises(ValueError, match="takes no droppath; did you mean drop_path"):
        get_backbone("dino_vits16", droppath=0.1)


def test_a_data_set_by_name(tmp_path):
    for name in ("a.png", "b.png"):
        PIL.Image.new("RGB", (8, 8)).save(tmp_path / name)
    folder = get_dataset("folder", root=tmp_path)
    assert (len(folder), folder[0][1]) == (2, -1)
    textures = get_dataset("textures", split="val", images=20)
    assert len(textures) == 20 and textures[0][0].shape == (3, 64, 64)
    with pytest.raises(ValueError, match="dataset has no option texture; did you mean textures"):
        get_dataset("texture")
    with pytest.raises(ValueError, match="Textures takes no cache"):
        get_dataset("textures", cache="ram")


def test_all_that_is_wrong_with_a_config_is_said_at_once():
    with pytest.raises(ValueError, match="optimizer.weigth_decay=0: .* did you mean weight_decay"):
        dino.compose(["optimizer.weigth_decay=0"])
    config = dino.compose([*SMALL, "training.epochs=1.5", "loss.student_temp=-1"])
    with pytest.raises(ValueError, match=r"(?s)training.epochs=1.5: expected a whole number.*student_temp must be in"):
        dino.build(config)


def test_a_teacher_that_is_not_sharper_than_the_student_is_warned_of_once_in_the_configs_words():
    with pytest.warns(UserWarning, match="loss.student_temp=0.05 is not above teacher.temp=0.07") as caught:
        dino.build(dino.compose([*SMALL, "loss.student_temp=0.05", "teacher.temp=0.07"]))
    assert len(caught) == 1


def test_a_pass_of_the_train_loader_is_an_epoch_and_the_next_one_another():
    parts = dino.build(dino.compose(SMALL))
    loader = parts.train_loader
    assert loader is parts.train_loader and len(loader) == 24
    (views, labels), again = next(iter(loader)), next(iter(loader))
    assert [len(view) for view in views] == [4] * parts.transform.ncrops and labels.shape == (4,)
    assert torch.equal(views[0], again[0][0])  # a pass that is broken off begins again
    epochs = [[(batch[0].clone(), labels) for batch, labels in loader] for _ in range(2)]
    assert [len(epoch) for epoch in epochs] == [24, 24]
    assert not torch.equal(epochs[0][0][0], epochs[1][0][0])
    assert sorted(torch.cat([labels for _, labels in epochs[0]]).tolist()) == sorted(
        label for _, label in parts.train_set
    )
    loader.epoch = 1
    for (view, labels), (other, same) in zip(loader, epochs[1], strict=True):
        assert torch.equal(view[0], other) and torch.equal(labels, same)


def by_hand(overrides, factored):
    """The losses of 20 steps of a loop of one's own."""
    parts, losses = dino.build(dino.compose(overrides)), []
    for step, (views, _) in zip(range(20), parts.train_loader, strict=False):
        now = parts.schedule(step)
        now.apply(parts.optimizer)
        with torch.no_grad():
            teacher = parts.teacher(views[: parts.transform.n_global_crops])
        loss = parts.loss(parts.student(views, factored=factored), teacher, teacher_temp=now.teacher_temp)
        loss.backward()
        clip_gradients(parts.student.parameters(), 3.0)
        parts.optimizer.step()
        parts.optimizer.zero_grad()
        update_teacher_EMA(parts.student, parts.teacher, alpha=now.momentum)
        losses.append(loss.item())
    return losses


def by_train(overrides):
    parts, losses = dino.build(dino.compose(overrides)), []
    train(parts.learner, parts.steps(0), lambda step: losses.append(step.loss.item()))
    return losses


def test_a_loop_of_ones_own_trains_as_the_loop_of_the_project_does():
    overrides = [*SMALL, "precision=fp32"]
    theirs = by_train(overrides)
    assert len(theirs) == len(set(theirs)) == 20
    assert by_hand(overrides, factored=True) == theirs
    # Whole logits are the same numbers, and their gradients are rounded elsewhere, which AdamW passes on.
    assert by_hand(overrides, factored=False) == pytest.approx(theirs, rel=5e-6)
