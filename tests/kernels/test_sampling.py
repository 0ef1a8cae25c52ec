"""sample: the three implementations against each other, the reference against the definition and the distribution."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from baton.kernels import SamplingTensors, sample, use_backend
from baton.kernels.sampling import sample_ref


def params(
    n: int,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    min_p: float | Sequence[float] = 0.0,
    seed: int | Sequence[int] = 0,
    position: Sequence[int] | None = None,
) -> SamplingTensors:
    def column(value: object, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(value if isinstance(value, list) else [value] * n, dtype=dtype)

    return SamplingTensors(
        temperature=column(temperature, torch.float32),
        top_k=column(top_k, torch.int32),
        top_p=column(top_p, torch.float32),
        min_p=column(min_p, torch.float32),
        seed=column(seed, torch.int64),
        position=torch.arange(n) if position is None else torch.tensor(position),
    )


def rows(p: SamplingTensors, index: list[int]) -> SamplingTensors:
    return SamplingTensors(*(getattr(p, name)[index] for name in p.__slots__))


def num_rows(backend: str) -> int:
    """Enough rows to draw every token that is kept; few where the interpreter takes a second for each."""
    return 80 if backend == "torch" else 3


MIXED = params(
    9,
    temperature=[0.0, 1.0, 0.7, 1.3, 2.0, 0.1, 1.0, 1.0, 0.8],
    top_k=[5, 0, 5, 50, 0, 3, 0, 10_000, 1],
    top_p=[0.9, 1.0, 1.0, 0.9, 0.5, 1.0, 0.95, 0.99, 1.0],
    min_p=[0.0, 0.0, 0.0, 0.05, 0.0, 0.0, 0.1, 0.0, 0.0],
    seed=[1, 2**63 - 1, -1, 4, 5, -(2**63), 7, 8, 9],
)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(1, torch.float32), (300, torch.float32), (300, torch.bfloat16), (2100, torch.bfloat16)],
)
def test_every_parameter_at_once(vocab_size: int, dtype: torch.dtype, backend: str) -> None:
    """A batch in which each row asks for something else. bfloat16 logits have many equal values."""
    logits = (3 * torch.randn(9, vocab_size)).to(dtype)
    with use_backend(backend):
        assert sample(logits, MIXED).tolist() == sample_ref(logits, MIXED).tolist()


def test_large_vocabularies() -> None:
    """Beyond the torch path's candidates: a flat row needs its whole sort, a peaked one does not."""
    logits = torch.stack((torch.randn(5000) * 0.1, torch.randn(5000) * 8, torch.randn(5000)))
    p = params(3, top_k=[0, 0, 3000], top_p=[0.9, 0.9, 0.99])
    with use_backend("torch"):
        assert sample(logits, p).tolist() == sample_ref(logits, p).tolist()


def test_of_equal_logits_the_lowest_tokens_are_kept(backend: str) -> None:
    """Eight equal tokens: top-k keeps the first three, top-p the first half, greedy the first."""
    n = num_rows(backend)
    logits = torch.full((n, 8), 1.5)
    with use_backend(backend):
        top_k = sample(logits, params(n, top_k=3))
        top_p = sample(logits, params(n, top_p=0.5))
        greedy = sample(logits, params(n, temperature=0.0))
    assert torch.equal(top_k, sample_ref(logits, params(n, top_k=3)))
    assert torch.equal(top_p, sample_ref(logits, params(n, top_p=0.5)))
    assert (greedy == 0).all()
    if backend == "torch":
        assert set(top_k.tolist()) == {0, 1, 2}
        assert set(top_p.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_k": 2}, {3, 0}),
        ({"top_p": 0.5}, {3}),
        ({"top_p": 0.51}, {3, 0}),
        ({"min_p": 0.5}, {3, 0}),
        ({"min_p": 0.51}, {3}),
        ({"top_k": 3, "top_p": 0.57}, {3}),  # of the three's weight, the first has 4/7
        ({"top_k": 3, "top_p": 0.58}, {3, 0}),
        ({"top_k": 100}, {0, 1, 2, 3, 4}),
    ],
)
def test_what_each_filter_keeps(filters: dict[str, float], kept: set[int], backend: str) -> None:
    """Probabilities 1/4, 1/16, 1/8, 1/2, 1/16: sums that have no rounding."""
    n = num_rows(backend)
    logits = torch.tensor([2.0, 0.0, 1.0, 3.0, 0.0]).mul(0.6931471805599453).expand(n, 5)
    with use_backend(backend):
        drawn = set(sample(logits, params(n, **filters)).tolist())  # type: ignore[arg-type]
    assert drawn <= kept
    if backend == "torch":
        assert drawn == kept


def test_a_draw_depends_on_its_own_row_only(backend: str) -> None:
    logits = 3 * torch.randn(9, 300)
    with use_backend(backend):
        together = sample(logits, MIXED)
        some = [7, 4, 1]
        assert torch.equal(sample(logits[some], rows(MIXED, some)), together[some])
        assert int(sample(logits[[3]], rows(MIXED, [3]))) == int(together[3])


def test_masked_tokens_are_never_drawn(backend: str) -> None:
    n = num_rows(backend)
    logits = torch.randn(n, 50)
    logits[:, ::2] = -torch.inf
    with use_backend(backend):
        tokens = sample(logits, params(n, temperature=[5.0] * (n - 1) + [0.0], top_p=[0.99, *[1.0] * (n - 1)]))
    assert (tokens % 2 == 1).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_without_finite_logits_name_some_token(value: float, backend: str) -> None:
    """A model that overflowed must not end the process with an index out of range."""
    with use_backend(backend):
        tokens = sample(torch.full((3, 20), value), params(3, temperature=[0.0, 1.0, 1.0], top_p=[1.0, 1.0, 0.9]))
    assert ((tokens >= 0) & (tokens < 20)).all()


def test_tiny_temperatures_are_greedy(backend: str) -> None:
    logits = torch.randn(3, 30)
    with use_backend(backend):
        assert torch.equal(sample(logits, params(3, temperature=1e-30)), logits.argmax(dim=1))


@pytest.mark.parametrize(
    ("p", "probabilities"),
    [
        ({}, [0.5, 0.25, 0.125, 0.0625, 0.0625]),
        ({"temperature": 0.5}, [0.25, 0.0625, 0.015625, 0.00390625, 0.00390625]),
        ({"top_k": 3}, [0.5, 0.25, 0.125, 0.0, 0.0]),
        ({"top_p": 0.8}, [0.5, 0.25, 0.125, 0.0, 0.0]),
        ({"min_p": 0.2}, [0.5, 0.25, 0.125, 0.0, 0.0]),
    ],
)
def test_draws_follow_the_distribution(p: dict[str, float], probabilities: list[float]) -> None:
    """Chi-square of 4,000 fixed draws against the softmax that the parameters describe."""
    n = 4_000
    logits = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625]).log().expand(n, 5).contiguous()
    with use_backend("torch"):
        tokens = sample(logits, params(n, seed=17, **p))  # type: ignore[arg-type]
    expected = torch.tensor(probabilities, dtype=torch.float64)
    expected = expected / expected.sum() * n
    counts = torch.bincount(tokens, minlength=5)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    statistic = float(((counts - expected) ** 2 / expected)[possible].sum())
    assert statistic < 23.5  # 4 degrees of freedom: exceeded once in 10,000
