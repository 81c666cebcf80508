import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dino.head import Factors
from dino.loss.dino import MOST_LOGITS, DinoLoss


def naive_loss(student, teacher, center, views, globals_, student_temp, teacher_temp):
    """The paper's pseudo-code, one pair of views and one image at a time, in plain floats."""
    batch = len(student) // views
    student, teacher, center = student.tolist(), teacher.tolist(), center.flatten().tolist()
    terms = []
    for t in range(globals_):
        for s in range(views):
            if s == t:
                continue
            for image in range(batch):
                target = softmax([(x - c) / teacher_temp for x, c in zip(teacher[t * batch + image], center)])
                output = softmax([x / student_temp for x in student[s * batch + image]])
                terms.append(-sum(p * math.log(q) for p, q in zip(target, output)))
    return sum(terms) / len(terms)


def softmax(values):
    highest = max(values)
    weights = [math.exp(value - highest) for value in values]
    return [weight / sum(weights) for weight in weights]


def random_case(views, globals_=2, batch=3, dim=7, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    loss = DinoLoss(dim, views, globals_, 0.1, 0.05).to(dtype).eval()  # in train mode each call would move the center
    loss.center.copy_(torch.randn(1, dim, generator=generator, dtype=dtype) * 0.1)  # a zero center would hide a sign
    student = torch.randn(views * batch, dim, generator=generator, dtype=dtype) * 0.3
    return loss, student, torch.randn(globals_ * batch, dim, generator=generator, dtype=dtype) * 0.3


@pytest.mark.parametrize(("views", "globals_"), [(2, 2), (3, 2), (8, 2), (10, 2), (4, 1), (5, 3)])
def test_the_loss_is_the_papers_mean_over_pairs_of_different_views(views, globals_):
    loss, student, teacher = random_case(views, globals_, seed=views)
    expected = naive_loss(student, teacher, loss.center, views, globals_, 0.1, 0.07)
    assert loss(student, teacher, teacher_temp=0.07).item() == pytest.approx(expected, abs=1e-6)


def test_without_a_teacher_temperature_the_constructors_holds():
    loss, student, teacher = random_case(4)
    assert loss(student, teacher).item() == pytest.approx(
        naive_loss(student, teacher, loss.center, 4, 2, 0.1, 0.05), abs=1e-6
    )


def test_uniform_outputs_cost_ln_k():
    loss = DinoLoss(16, ncrops=4)
    assert loss(torch.zeros(8, 16), torch.zeros(4, 16)).item() == pytest.approx(math.log(16), rel=1e-6)


def test_a_student_that_agrees_with_a_sharp_teacher_pays_nothing_but_never_less():
    loss = DinoLoss(8, ncrops=3)
    sharp = 40 * torch.nn.functional.one_hot(torch.tensor([5]), 8).float()
    assert 0 <= loss(sharp.repeat(3, 1), sharp.repeat(2, 1)).item() < 1e-6


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.integers(1, 4), st.floats(0.01, 100), st.integers(0, 10**6))
def test_the_loss_is_never_negative(views, batch, scale, seed):
    loss, student, teacher = random_case(views, batch=batch, seed=seed, dtype=torch.float32)
    assert loss(scale * student, scale * teacher).item() >= 0


def test_gradients_are_those_of_finite_differences_and_the_teacher_gets_none_from_forward():
    loss, student, teacher = random_case(4, batch=2, dim=5)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, teacher_temp=0.07), (student,))
    of_factors = factors_of(2, 4, 5)
    assert torch.autograd.gradcheck(lambda *f: loss(Factors(*f), teacher, teacher_temp=0.07), (*of_factors,))


def test_in_train_mode_the_center_moves_by_the_papers_formula_after_the_loss():
    loss, student, teacher = random_case(4)
    before, expected = loss.center.clone(), naive_loss(student, teacher, loss.center, 4, 2, 0.1, 0.05)
    assert loss.train()(student, teacher).item() == pytest.approx(expected, abs=1e-6)
    for k in range(7):
        mean = sum(row[k] for row in teacher.tolist()) / len(teacher)
        assert loss.center[0, k].item() == pytest.approx(0.9 * before[0, k].item() + 0.1 * mean, abs=1e-12)


def test_the_center_stays_in_eval_mode_and_where_the_loop_moves_it_itself():
    loss, student, teacher = random_case(4)
    before = loss.center.clone()
    loss(student, teacher)
    loss.train()(student, teacher, move_center=False)
    assert torch.equal(loss.center, before)
    alone, _, _ = random_case(4)
    alone.train()(student, teacher)
    loss.update_center(teacher)
    assert torch.equal(loss.center, alone.center)


@pytest.mark.parametrize("temp", [0.0, 5.0, -0.04, math.nan])
def test_an_epoch_in_place_of_a_temperature_is_refused(temp):
    """The official loss takes the epoch there: 0 gave NaN, 5 a teacher that is almost uniform."""
    loss, student, teacher = random_case(4)
    with pytest.raises(ValueError, match=r"teacher_temp must be in \(0, 1\]"):
        loss(student, teacher, teacher_temp=temp)
    with pytest.raises(TypeError, match="positional argument"):
        loss(student, teacher, temp)


@pytest.mark.parametrize(("student_temp", "teacher_temp"), [(0.04, 0.07), (0.1, 0.1)])
def test_a_teacher_that_is_not_sharper_than_the_student_is_warned_of(student_temp, teacher_temp):
    with pytest.warns(UserWarning, match="the teacher should be sharper"):
        DinoLoss(64, student_temp=student_temp, teacher_temp=teacher_temp)


def test_the_means_of_equal_parts_move_the_center_as_the_whole_batch_does():
    whole, _, teacher = random_case(4, batch=4)
    parts, _, _ = random_case(4, batch=4)
    whole.update_center(teacher)
    parts.update_center(torch.stack([part.mean(0) for part in teacher.split(2)]))
    torch.testing.assert_close(parts.center, whole.center, rtol=0, atol=1e-12)


def test_the_center_is_in_the_state_dict():
    loss, _, teacher = random_case(4)
    loss.update_center(teacher)
    other = DinoLoss(7, 4).double()
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.center, loss.center)


def test_softmax_and_loss_are_in_fp32_under_autocast_and_for_half_precision_logits():
    loss, student, teacher = random_case(4, dim=64, dtype=torch.float32)
    student, teacher = student.bfloat16(), teacher.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher)
    assert value.dtype == torch.float32
    expected = naive_loss(student.double(), teacher.double(), loss.center.double(), 4, 2, 0.1, 0.05)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def factors_of(images, views, dim, dtype=torch.float64, seed=3):
    generator = torch.Generator().manual_seed(seed)
    bottleneck, weight = (torch.randn(rows, 16, generator=generator, dtype=dtype) for rows in (views * images, dim))
    return Factors(bottleneck.div_(4).requires_grad_(), weight.div_(4).requires_grad_())


@pytest.mark.parametrize("parts", [1, 3, 11])  # of 11, of 4, 4 and 3, and of 1 image
@pytest.mark.parametrize(("views", "globals_"), [(10, 2), (4, 1), (5, 3)])
def test_factors_cost_what_their_product_does_and_so_do_parts_of_the_batch(monkeypatch, parts, views, globals_):
    images = 11
    loss, _, teacher = random_case(views, globals_, batch=images, dim=23)
    factors = factors_of(images, views, 23)
    student = F.linear(*factors).detach().requires_grad_()
    whole = loss(student, teacher, teacher_temp=0.07)
    whole.backward()
    assert whole.item() == pytest.approx(
        naive_loss(student.detach(), teacher, loss.center, views, globals_, 0.1, 0.07), rel=1e-12
    )
    monkeypatch.setattr("dino.loss.dino.MOST_LOGITS", math.ceil(views * images * 23 / parts))
    value = loss(factors, teacher, teacher_temp=0.07)
    value.backward()
    assert value.item() == pytest.approx(whole.item(), rel=1e-12)
    for ours, expected in zip(
        (factors.bottleneck.grad, factors.weight.grad),
        (student.grad @ factors.weight, student.grad.T @ factors.bottleneck),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected.detach(), rtol=0, atol=1e-14)


def test_factors_in_half_precision_have_a_loss_in_fp32():
    loss, _, teacher = random_case(4, dim=64, dtype=torch.float32)
    factors = Factors(*(factor.detach().bfloat16().requires_grad_() for factor in factors_of(3, 4, 64)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(factors, teacher)
    value.backward()
    student = (factors.bottleneck.double() @ factors.weight.double().T).bfloat16().double()
    expected = naive_loss(student, teacher.double(), loss.center.double(), 4, 2, 0.1, 0.05)
    assert value.dtype == torch.float32 and factors.weight.grad.dtype == torch.bfloat16
    assert value.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 1.0), (torch.float16, 2.0**16)])
def test_gradients_in_half_precision_are_those_of_fp64_to_its_rounding(dtype, scale):
    """Without a scaler too: what a logit is told is rounded before pairs and images divide it to some 1e-7."""
    views, images, dim = 10, 64, 4096
    loss, _, teacher = random_case(views, batch=images, dim=dim)
    exact = Factors(*(f.detach().to(dtype).double().requires_grad_() for f in factors_of(images, views, dim)))
    loss(exact, teacher).backward()
    half = Factors(*(f.detach().to(dtype).requires_grad_() for f in exact))
    (scale * loss.float()(half, teacher.float())).backward()
    for ours, expected in zip((f.grad.double() / scale for f in half), (f.grad for f in exact), strict=True):
        assert (ours - expected).norm() < 4 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_k_wide_is_never_whole(dtype):
    """Of the paper's 10 views and 65,536 prototypes neither pass makes a tensor of more than MOST_LOGITS numbers."""
    views, images, dim = 10, 16, 65536
    assert views * images * dim > MOST_LOGITS
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                    largest = max(largest, tensor.numel())
            return out

    loss = DinoLoss(dim, ncrops=views)
    factors = Factors(*(factor.detach().to(dtype).requires_grad_() for factor in factors_of(images, views, dim)))
    with Watch():
        loss(factors, torch.zeros(2 * images, dim, dtype=dtype)).backward()
    assert factors.weight.grad.isfinite().all()
    assert views * dim < largest <= MOST_LOGITS


def test_entropies_tell_uniform_and_one_prototype_from_health():
    loss = DinoLoss(8, ncrops=4)
    uniform = loss.entropies(torch.zeros(8, 8))
    assert [x.item() for x in uniform] == pytest.approx([1, 1])
    constant = loss.entropies(40 * torch.eye(8)[[3] * 8])
    assert [x.item() for x in constant] == pytest.approx([0, 0], abs=1e-6)
    healthy = loss.entropies(40 * torch.eye(8))
    assert [x.item() for x in healthy] == pytest.approx([0, 1], abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"out_dim": 1}, "out_dim must be at least 2"),
        ({"out_dim": 8, "student_temp": 0.0}, r"student_temp must be in \(0, 1\], got 0.0"),
        ({"out_dim": 8, "teacher_temp": -1.0}, r"teacher_temp must be in \(0, 1\]"),
        ({"out_dim": 8, "center_momentum": 1.0}, r"center_momentum must be in \[0, 1\)"),
        ({"out_dim": 8, "ncrops": 1, "n_global_crops": 1}, "ncrops must be at least 2"),
    ],
)
def test_values_that_cannot_work_are_refused_in_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        DinoLoss(**arguments)
