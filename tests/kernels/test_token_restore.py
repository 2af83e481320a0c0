"""token_restore: the kernels in the interpreter against float64, and what the contract promises about traffic."""

import pytest
import torch

from mimir_fast.kernels import token_restore
from tests.support.budget import assert_within_budget
from tests.support.interpreter import Sanitizer, interpret

SHAPES = [(2, 49, 12, 32), (1, 4, 1, 7), (3, 5, 5, 48), (5, 1, 1, 128), (2, 9, 2, 1100), (1, 70, 20, 1)]  # B, L, K, E
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(B, L, K, E, dtype=torch.float32, table=None):
    """tokens, mask token (fp32, as parameters are), position table, ids_shuffle."""
    ids = torch.stack([torch.randperm(L) for _ in range(B)])
    return torch.randn(B, 1 + K, E).to(dtype), torch.randn(E), torch.randn(1 + L, E).to(table or dtype), ids


def output_and_gradients(tokens, mask_token, table, ids, impl, upstream):
    tokens, mask_token = (t.detach().requires_grad_() for t in (tokens, mask_token))
    out = token_restore(tokens, mask_token, table, ids, impl=impl)
    return out.detach(), *torch.autograd.grad(out, (tokens, mask_token), upstream.to(out.dtype))


def check(tokens, mask_token, table, ids, upstream):
    exact = (tokens.double(), mask_token.to(tokens.dtype).double(), table.double(), ids)
    truth = output_and_gradients(
        *exact, "reference", upstream.to(torch.promote_types(tokens.dtype, table.dtype)).double()
    )
    eager = output_and_gradients(tokens, mask_token, table, ids, "reference", upstream)
    with interpret(Sanitizer()) as s:
        ours = output_and_gradients(tokens, mask_token, table, ids, "triton", upstream)
        again = output_and_gradients(tokens, mask_token, table, ids, "triton", upstream)
    assert not s.errors
    for name, a, b, c, d in zip(("out", "grad tokens", "grad mask token"), ours, eager, truth, again, strict=True):
        assert a.dtype == b.dtype, name
        assert_within_budget(a, b, c, name)
        assert torch.equal(a, d), name
    assert torch.equal(ours[1], eager[1])  # a copy, row by row


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype):
    B, L, _, E = shape
    check(*inputs(*shape, dtype), torch.randn(B, 1 + L, E))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_tokens_with_an_fp32_table(dtype):
    check(*inputs(3, 20, 5, 24, dtype, torch.float32), torch.randn(3, 21, 24))


@pytest.mark.parametrize("view", ["sliced", "transposed", "expanded", "expanded gradient", "strided ids"])
def test_strided_inputs(view):
    tokens, mask_token, table, ids = inputs(3, 10, 4, 16)
    upstream = torch.randn(3, 11, 16)
    tokens, ids, upstream = {
        "sliced": lambda: (torch.randn(3, 7, 16)[:, 1:6], ids, upstream),
        "transposed": lambda: (tokens.mT.contiguous().mT, ids, upstream.transpose(0, 1).contiguous().transpose(0, 1)),
        "expanded": lambda: (tokens[:1].expand(3, -1, -1), ids, upstream),
        "expanded gradient": lambda: (tokens, ids, torch.randn(()).expand(3, 11, 16)),
        "strided ids": lambda: (tokens, ids.T.contiguous().T, upstream),
    }[view]()
    check(tokens, mask_token, table, ids, upstream)


def test_permuting_the_batch_permutes_output_and_gradient():
    tokens, mask_token, table, ids = inputs(3, 10, 4, 16)
    order, upstream = torch.tensor([2, 0, 1]), torch.randn(3, 11, 16)
    with interpret():
        ours = output_and_gradients(tokens, mask_token, table, ids, "triton", upstream)
        permuted = output_and_gradients(tokens[order], mask_token, table, ids[order], "triton", upstream[order])
    assert all(torch.equal(a[order], b) for a, b in zip(ours[:2], permuted[:2]))
    torch.testing.assert_close(ours[2], permuted[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_traffic_is_the_contracts(dtype):
    tokens, mask_token, table, ids = inputs(4, 49, 12, 128, dtype)
    tokens.requires_grad_()
    with interpret(Sanitizer()) as s:
        out = token_restore(tokens, mask_token, table, ids, impl="triton")
        tiles = 4 * 7  # each reads the mask token, from cache
        assert s.st["load_bytes"] <= tokens.nbytes + ids.nbytes + 4 * table.nbytes + tiles * mask_token.nbytes
        assert s.st["store_bytes"] == out.nbytes
        assert s.used("load") > 0.9
        assert s.used("store") > 0.9
        s.st.clear()
        mask_token.requires_grad_()
        token_restore(tokens, mask_token, table, ids, impl="triton").sum().backward()
    read = tokens.nbytes + ids.nbytes + 4 * table.nbytes + tiles * mask_token.nbytes + out[:, 13:].nbytes
    assert s.st["load_bytes"] <= read
    assert s.st["store_bytes"] == out.nbytes + 4 * 4 * 128  # one fp32 row of the mask token's gradient per image
    assert s.used("load") > 0.9
    assert s.used("store") > 0.9


def test_operator_registration_and_fullgraph_compilation():
    from mimir_fast.kernels.token_restore import kernel

    tokens, mask_token, table, ids = inputs(2, 6, 2, 8)
    leaves = tokens.requires_grad_(), mask_token.requires_grad_()

    def restored(tokens, mask_token):
        return token_restore(tokens, mask_token, table, ids, impl="triton").square()

    with interpret():
        torch.library.opcheck(kernel.token_restore, (tokens, mask_token, table, ids))
        arguments = (torch.randn(2, 7, 8), 2, torch.bfloat16)
        torch.library.opcheck(kernel.token_restore_grad, arguments)
        eager = restored(*leaves)
        compiled = torch.compile(restored, fullgraph=True, backend="aot_eager")(*leaves)
        assert torch.equal(eager, compiled)
        for a, b in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (eager, compiled))):
            assert torch.equal(a, b)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(restored(*leaves), eager)


def test_reference_compiles_fullgraph_and_passes_gradcheck():
    tokens, mask_token, table, ids = inputs(2, 5, 2, 3)
    compiled = torch.compile(token_restore, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tokens, mask_token, table, ids), token_restore(tokens, mask_token, table, ids))
    leaves = tokens.double().requires_grad_(), mask_token.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: token_restore(*t, table.double(), ids), leaves)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"tokens_BKE": torch.randn(3, 3, 8)}, "tokens"),
        ({"tokens_BKE": torch.randn(2, 8, 8)}, "tokens"),
        ({"tokens_BKE": torch.randn(2, 3, 8).double(), "impl": "triton"}, "tokens"),
        ({"mask_token_E": torch.randn(1, 8)}, "mask_token"),
        ({"pos_embed_LE": torch.randn(6, 8)}, "pos_embed"),
        ({"ids_shuffle_BL": torch.zeros(6, dtype=torch.int64)}, "ids_shuffle"),
        ({"impl": "cuda"}, "impl"),
    ],
)
def test_errors_name_the_argument(change, word):
    names = ("tokens_BKE", "mask_token_E", "pos_embed_LE", "ids_shuffle_BL")
    with pytest.raises(ValueError, match=f"^{word}"):
        token_restore(**(dict(zip(names, inputs(2, 6, 2, 8))) | change))
