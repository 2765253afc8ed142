"""rope_kv_write: HF's rotation and norm, the cache's slots, what must stay untouched."""

from __future__ import annotations

import pytest
import torch

from tritonhybrid_kernels.errors import KernelArgumentError
from tritonhybrid_kernels.rope_kv_write import rope_kv_write, rope_kv_write_ref

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PATHS = (rope_kv_write, rope_kv_write_ref)
EPS = 1e-5


class Case:
    """Operands of one call, over caches full of NaN."""

    def __init__(
        self,
        device,
        dtype,
        num_tokens=5,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        rotary_dim=None,
        block_size=16,
        table_dtype=None,
    ):
        rotary_dim = head_dim if rotary_dim is None else rotary_dim
        self.q = torch.randn(num_tokens, num_heads, head_dim).to(device, dtype)
        self.k, self.v = torch.randn(2, num_tokens, num_kv_heads, head_dim).to(device, dtype)
        angles = torch.randn(100, rotary_dim // 2).repeat(1, 2) * 3
        self.cos = angles.cos().to(device, table_dtype or dtype)
        self.sin = angles.sin().to(device, table_dtype or dtype)
        self.positions = torch.randint(0, 100, (num_tokens,), device=device)
        self.slots = torch.randperm(8 * block_size)[:num_tokens].to(device)
        shape = (2, 8, block_size, num_kv_heads, head_dim)
        self.k_cache, self.v_cache = torch.full(shape, float("nan")).to(device, dtype)

    def write(self, path, q=None, k=None, **norms):
        path(
            self.q if q is None else q,
            self.k.clone() if k is None else k,
            self.v,
            self.cos,
            self.sin,
            self.positions,
            self.slots,
            self.k_cache,
            self.v_cache,
            norm_eps=EPS,
            **norms,
        )

    def written(self, cache):
        """The cache's rows at the slots that are kept, after checking that no other changed."""
        flat = cache.flatten(0, 1)
        kept = self.slots[self.slots >= 0]
        others = torch.ones(flat.shape[0], dtype=torch.bool, device=flat.device)
        others[kept] = False
        assert flat[others].isnan().all()
        return flat[kept]


def rotate(x, cos, sin, positions):
    """HF's apply_rotary_pos_emb on [T, heads, E], in the dtype of its arguments."""
    if cos is None:
        return x
    rotary_dim = cos.shape[-1]
    cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    head, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = head[..., : rotary_dim // 2], head[..., rotary_dim // 2 :]
    return torch.cat((head * cos + torch.cat((-second, first), -1) * sin, rest), -1)


def norm(x, weight):
    """HF's Qwen3RMSNorm."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("dtype", "num_tokens"),
    [*((dtype, 5) for dtype in DTYPES), (torch.float32, 1), (DTYPES[2], 130)],
)
def test_rotation_has_the_bits_of_hugging_face(device, dtype, num_tokens, path):
    case = Case(device, dtype, num_tokens, block_size=17)
    q = rotate(case.q, case.cos, case.sin, case.positions)
    k = rotate(case.k, case.cos, case.sin, case.positions)
    case.write(path)
    assert torch.equal(case.q, q)
    assert torch.equal(case.written(case.k_cache), k)
    assert torch.equal(case.written(case.v_cache), case.v)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_norms_match_fp64(device, dtype, path, assert_accurate):
    case = Case(device, dtype)
    q_weight, k_weight = torch.randn(2, 64).to(device, dtype)
    tables = (case.cos.double(), case.sin.double(), case.positions)
    exact = [
        rotate(weight.double() * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS), *tables)
        for x, weight in ((case.q.double(), q_weight), (case.k.double(), k_weight))
    ]
    eager = [
        rotate(norm(x, weight), case.cos, case.sin, case.positions)
        for x, weight in ((case.q, q_weight), (case.k, k_weight))
    ]
    case.write(path, q_norm_weight=q_weight, k_norm_weight=k_weight)
    assert_accurate(case.q, exact[0], eager[0])
    assert_accurate(case.written(case.k_cache), exact[1], eager[1])


@pytest.mark.parametrize("path", PATHS)
def test_each_norm_is_optional_by_itself(device, path):
    weight = torch.randn(64, device=device)
    for name in ("q_norm_weight", "k_norm_weight"):
        case = Case(device, torch.float32)
        tables = (case.cos, case.sin, case.positions)
        q = norm(case.q, weight) if name == "q_norm_weight" else case.q
        k = norm(case.k, weight) if name == "k_norm_weight" else case.k
        q, k = rotate(q, *tables), rotate(k, *tables)
        case.write(path, **{name: weight})
        torch.testing.assert_close(case.q, q, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(case.written(case.k_cache), k, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(64, 32), (80, 32), (80, 80), (96, 96), (128, 2), (256, 64)]
)
def test_partial_rotation_leaves_the_rest_of_a_head(device, head_dim, rotary_dim, path):
    case = Case(device, torch.float32, head_dim=head_dim, rotary_dim=rotary_dim)
    q = rotate(case.q, case.cos, case.sin, case.positions)
    k = rotate(case.k, case.cos, case.sin, case.positions)
    case.write(path)
    assert torch.equal(case.q, q)
    assert torch.equal(case.written(case.k_cache), k)
    assert torch.equal(case.written(case.v_cache), case.v)


@pytest.mark.parametrize("path", PATHS)
def test_without_tables_nothing_is_rotated(device, path):
    case = Case(device, torch.bfloat16)
    case.cos = case.sin = None
    q = case.q.clone()
    case.write(path)
    assert torch.equal(case.q, q)
    assert torch.equal(case.written(case.k_cache), case.k)
    assert torch.equal(case.written(case.v_cache), case.v)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp32_tables_round_the_rotation_once(device, dtype, path):
    case = Case(device, dtype, table_dtype=torch.float32)
    q = rotate(case.q, case.cos, case.sin, case.positions).to(dtype)
    k = rotate(case.k, case.cos, case.sin, case.positions).to(dtype)
    case.write(path)
    assert torch.equal(case.q, q)
    assert torch.equal(case.written(case.k_cache), k)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kept", [[], [0], [1, 4]])
def test_tokens_without_a_slot_are_rotated_but_not_written(device, kept, path):
    case = Case(device, torch.float32)
    skipped = torch.ones(5, dtype=torch.bool, device=device)
    skipped[kept] = False
    case.slots[skipped] = -1
    q = rotate(case.q, case.cos, case.sin, case.positions)
    k = rotate(case.k, case.cos, case.sin, case.positions)
    case.write(path)
    assert torch.equal(case.q, q)
    assert torch.equal(case.written(case.k_cache), k[~skipped])
    assert torch.equal(case.written(case.v_cache), case.v[~skipped])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (5, 1), (9, 3), (16, 16)])
def test_any_number_of_heads(device, num_heads, num_kv_heads, path):
    case = Case(device, torch.float32, num_heads=num_heads, num_kv_heads=num_kv_heads)
    q = rotate(case.q, case.cos, case.sin, case.positions)
    k = rotate(case.k, case.cos, case.sin, case.positions)
    case.write(path)
    assert torch.equal(case.q, q)
    assert torch.equal(case.written(case.k_cache), k)
    assert torch.equal(case.written(case.v_cache), case.v)


@pytest.mark.parametrize("path", PATHS)
def test_views_of_a_fused_projection_and_of_a_joint_cache_are_used_in_place(device, path):
    case = Case(device, torch.float32)
    fused = torch.cat((case.q, case.k, case.v), 1)
    untouched = fused[:, 6:].clone()
    case.v = fused[:, 6:]
    joint = torch.stack((case.k_cache, case.v_cache), 1)
    case.k_cache, case.v_cache = joint[:, 0], joint[:, 1]
    q = rotate(case.q, case.cos, case.sin, case.positions)
    k = rotate(case.k, case.cos, case.sin, case.positions)
    case.write(path, q=fused[:, :4], k=fused[:, 4:6])
    assert torch.equal(fused[:, :4], q) and torch.equal(fused[:, 6:], untouched)
    assert torch.equal(case.written(joint[:, 0]), k)
    assert torch.equal(case.written(joint[:, 1]), untouched)


@pytest.mark.parametrize("path", PATHS)
def test_no_tokens_write_nothing(device, path):
    case = Case(device, torch.float32, num_tokens=0)
    case.write(path)
    assert case.k_cache.isnan().all() and case.v_cache.isnan().all()


def test_bad_arguments_are_named(device):
    def broken(match, **changes):
        case = Case(device, torch.float32)
        for name, change in changes.items():
            setattr(case, name, change(getattr(case, name)))
        with pytest.raises(KernelArgumentError, match=match):
            case.write(rope_kv_write)

    broken("slot_mapping must be contiguous", slots=lambda s: s.int())
    broken("positions has the wrong shape", positions=lambda p: p[:1])
    broken("cos and sin come together", sin=lambda s: None)
    broken("the rotated part of a head", cos=lambda c: c[:, :31], sin=lambda s: s[:, :31])
    broken("sin must be laid out as cos", sin=lambda s: s.half())
    broken("the tables must suit q", cos=lambda c: c.half(), sin=lambda s: s.half())
    broken("a block of v_cache must be contiguous", v_cache=lambda c: c.mT.contiguous().mT)
    broken(
        "k_cache has the wrong shape",
        k_cache=lambda c: c[:, :, :1].contiguous(),
        v_cache=lambda c: c[:, :, :1].contiguous(),
    )
    broken("one dtype", v=lambda v: v.half())
    broken("heads of q must follow", q=lambda q: q.repeat(1, 2, 1)[:, ::2])
    case = Case(device, torch.float32)
    with pytest.raises(KernelArgumentError, match="q_norm_weight has the wrong shape"):
        case.write(rope_kv_write, q_norm_weight=torch.ones(63, device=device))
