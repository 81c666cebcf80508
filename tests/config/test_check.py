import copy

import pytest
import torch

from dino.config import CONF
from dino.config.check import check, warnings_of
from dino.config.composition import compose

DEFAULT = compose([], "train", CONF)


def changed(**changes) -> dict:
    """The default config with `section__key=value` put in; ... removes a key."""
    config = copy.deepcopy(DEFAULT)
    for path, value in changes.items():
        *sections, key = path.split("__")
        node = config
        for section in sections:
            node = node[section]
        if value is ...:
            del node[key]
        else:
            node[key] = value
    return config


def keys(config: dict, **how) -> list[str]:
    return sorted(sentence.split(":")[0].split("=")[0] for sentence in check(config, **how))


def test_the_default_config_is_sound():
    assert check(DEFAULT) == []
    assert warnings_of(DEFAULT) == []


@pytest.mark.parametrize("value", [0, -1, 1.5, "abc", None, True, [], {}, float("nan"), "", [1, 2]])
@pytest.mark.parametrize("key", ["training.batch_size", "training.epochs", "checkpoint.keep", "log_every_steps"])
def test_a_count_takes_whole_numbers_above_zero_alone(key, value):
    assert key in keys(changed(**{key.replace(".", "__"): value}))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"optimizer__lr": -1}, "optimizer.lr"),
        ({"optimizer__betas": [0.9, 1.5]}, "optimizer"),
        ({"optimizer__foreach": True}, "optimizer.fused"),  # against fused
        ({"optimizer__lr": ...}, "optimizer.lr"),
        ({"optimizer__params": []}, "optimizer.params"),
        ({"loss__student_temp": 0}, "loss.student_temp"),
        ({"loss__out_dim": 7}, "loss.out_dim"),
        ({"head__hidden_dim": 0}, "head.hidden_dim"),
        ({"head__hidden_dim": 10**12}, "head"),
        ({"backbone__depth": "abc"}, "backbone.depth"),
        ({"backbone__depth": 10**9}, "backbone"),
        ({"backbone__patch_size": 7}, "backbone.patch_size"),
        ({"augmentation__global_scale": [0.4]}, "augmentation.global_scale"),
        ({"augmentation__num_local_views": -1}, "augmentation.num_local_views"),
        ({"augmentation__num_local_views": 10**9}, "augmentation.num_local_views"),
        ({"scheduler__min_lr": 1.0}, "scheduler.min_lr"),
        ({"teacher__warmup_temp_epochs": 1000}, "teacher.warmup_temp_epochs"),
        ({"teacher__momentum": 1.01}, "teacher.momentum"),
        ({"evaluator__k": 0}, "evaluator.k"),
        ({"dataset__train__images": "many"}, "dataset.train.images"),
        ({"training__effective_batch": 100}, "training.effective_batch"),
        ({"training__batch_size": 10**9}, "training.batch_size"),
        ({"training__num_workers": 10**6}, "training.num_workers"),
        ({"training": 5}, "training"),
        ({"backbone": ...}, "backbone"),
        ({"seed": ...}, "seed"),
        ({"sede": 1}, "sede"),
        ({"training__epoch": 1}, "training.epoch"),
        ({"device": "gpu"}, "device"),
        ({"device": "cuda:99"}, "device"),
        ({"init_from": "nowhere/at/all"}, "init_from"),
        ({"dataset__root": "/nowhere"}, "dataset.root"),
        ({"dataset__root": None}, "dataset.root"),
        ({"logger": [1]}, "logger"),
    ],
)
def test_one_thing_wrong_is_one_sentence_that_begins_with_its_key(change, key):
    assert keys(changed(**change)) == [key]


def test_every_problem_is_named_whatever_its_kind():
    config = changed(
        optimizer__lr=-1,
        optimizer__betas=[1],
        backbone__patch_size=7,
        loss__student_temp=0,
        training__epochs=0,
        sede=1,
    )
    wrong = [
        "backbone.patch_size",
        "loss.student_temp",
        "optimizer.betas",
        "sede",
        "training.epochs",
    ]
    assert keys(config) == wrong  # and optimizer.lr once the optimizer's types are right
    assert keys(changed(optimizer__lr=-1, backbone__patch_size=7)) == ["backbone.patch_size", "optimizer.lr"]


def test_a_message_that_names_no_argument_shows_what_was_given():
    (sentence,) = check(changed(optimizer__betas=[0.9, 1.5]))
    assert sentence.startswith("optimizer: AdamW: Invalid beta parameter at index 1: 1.5; it was given ")
    assert "betas=[0.9, 1.5]" in sentence


def test_a_sentence_says_what_was_expected_and_got():
    assert check(changed(training__epochs=1.5)) == ["training.epochs=1.5: expected a whole number, 1 or more."]


def test_whole_numbers_do_where_a_number_is_meant():
    assert check(changed(optimizer__weight_decay=0, teacher__final_momentum=1, training__gradient_clip=3)) == []


def test_what_another_machine_may_have_is_not_asked_for_here():
    assert keys(changed(device="cuda:99", init_from="nowhere/at/all"), here=False) == []


def test_ranks_count_in_the_effective_batch(monkeypatch):
    config = changed(training__effective_batch=96, training__batch_size=32)
    assert check(config) == []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "multiple of training.batch_size=32 x 2 processes" in check(config)[0]


def test_checking_leaves_the_random_state_and_the_config_alone():
    state, config = torch.get_rng_state(), changed(optimizer__lr=-1)
    before = copy.deepcopy(config)
    check(config)
    assert config == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("config", [None, [], "x", {}, {"training": None}, {1: 2}])
def test_anything_at_all_is_answered_in_sentences(config):
    assert all(isinstance(sentence, str) and sentence for sentence in check(config))
    assert check(config)


def test_a_mistake_in_a_class_is_not_taken_for_a_wrong_value():
    with pytest.raises(NameError):
        check(changed(evaluator={"_target_": f"{__name__}.Broken"}))


class Broken:
    def __init__(self) -> None:
        undefined_name  # noqa: B018, F821


class NoOutputDim(torch.nn.Module):
    def __init__(self, output_dim: int = 5) -> None:
        super().__init__()
        self.output_dim = output_dim

    def forward(self, images):
        return images.mean(dim=(2, 3))


def test_a_backbone_whose_features_are_not_as_it_says_is_named():
    (sentence,) = check(changed(backbone={"_target_": f"{__name__}.NoOutputDim"}))
    assert sentence.startswith("backbone: NoOutputDim: expected features [2, output_dim=5] of 2 images, got [2, 3]")


def test_a_head_without_what_training_uses_of_it_is_named():
    (sentence,) = check(changed(head={"_target_": "torch.nn.Identity"}))
    assert sentence.startswith("head: Identity has no factors and no last_layer, which training uses")


def test_a_student_no_sharper_than_its_teacher_is_warned_of_and_runs():
    config = changed(loss__student_temp=0.04)
    assert check(config) == []
    assert any("loss.student_temp=0.04 is not above teacher.temp=0.04" in text for text in warnings_of(config))
