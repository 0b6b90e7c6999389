# SPDX-License-Identifier: Apache-2.0
"""The emulator's operators beside FFN: ordinary tensor code gives on npu what it gives on CPU.

Both sides run ATen on CPU, so results differ only where torch_npu takes another way to the same value: a
few roundings of float32. What this tests is everything between: each operator's parameters, dtypes,
layouts, and empty tensors.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from process import PACKAGE, run

import ffn_ops.emulator.operators as operators

# torch_npu's own, once for each kind of tensor.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

# Written with ` ; ` between them. Their names: tensors(), torch, F, and `dev`, the device.
EXPRESSIONS = r"""
torch.zeros(2,3,device=dev) ; torch.ones(2,3,device=dev) ; torch.full((2,3),7,device=dev)
torch.full((2,3),1.5,device=dev) ; torch.arange(7,device=dev) ; torch.arange(0,1,0.25,device=dev)
torch.linspace(0,1,5,device=dev) ; torch.eye(3,device=dev) ; torch.eye(3,5,device=dev) ; a.half()
a.int() ; a.to(torch.bfloat16).float() ; i.bool() ; i.double().float() ; t.int() ; a.t().contiguous()
a[:,::2].clone() ; torch.zeros_like(a).copy_(b) ; a.new_zeros(2) ; a+b ; a+1 ; a+r ; i+1.5 ; i+j ; h+a
t+i ; 1-a ; a-b ; a-2 ; i-j ; a*b ; a*2 ; a/b ; a/3 ; i/j ; i//j ; i//2 ; a//0.3 ; i%j ; a%0.7 ; i%3
torch.remainder(a,b) ; torch.fmod(a,0.3) ; torch.div(a,p,rounding_mode="trunc")
torch.div(i,3,rounding_mode="floor") ; torch.floor_divide(i,j) ; a.clone().add_(b) ; a.clone().add_(1)
a.clone().sub_(b) ; a.clone().sub_(1) ; a.clone().mul_(b) ; a.clone().mul_(2) ; a.clone().div_(p)
a.clone().div_(3) ; a.clone().fill_(3) ; a.clone().zero_() ; a.clone().clamp_(-0.5,0.5)
a.clone().clamp_min_(0.) ; a.clone().exp_() ; a.clone().relu_() ; a.clone().pow_(2)
i.clone().floor_divide_(2) ; a.clone().fill_diagonal_(2.) ; torch.add(a,b,alpha=2)
torch.sub(a,b,alpha=2) ; torch.rsub(a,b) ; p**2 ; p**p ; 2**a ; p**0.5 ; i**2 ; torch.pow(2,i.float())
torch.addcmul(a,b,p,value=0.5) ; torch.addcdiv(a,b,p,value=0.5) ; torch.lerp(a,b,0.3) ; torch.lerp(a,b,p)
a.abs() ; i.abs() ; -a ; a.exp() ; p.log() ; p.log2() ; p.log10() ; p.log1p() ; a.expm1() ; p.sqrt()
p.rsqrt() ; p.reciprocal() ; a.sin() ; a.cos() ; a.tan() ; a.tanh() ; a.sinh() ; a.cosh() ; a.atan()
a.erf() ; a.erfc() ; a.floor() ; a.ceil() ; a.round() ; a.trunc() ; a.frac() ; torch.round(a,decimals=2)
a.sign() ; a.sigmoid() ; torch.isnan(a/0) ; torch.isinf(a/0) ; torch.isfinite(a/0)
torch.nan_to_num(a/0) ; torch.isclose(a,a) ; torch.allclose(a,a) ; torch.equal(a,a) ; torch.equal(a,b)
a==b ; a==0 ; a!=b ; a!=0 ; a<b ; a<0 ; a<=b ; a<=0 ; a>b ; a>0 ; a>=b ; a>=0 ; i==j ; t&u ; t|u ; t^u
~t ; ~i ; i&j ; i|j ; i^j ; i&3 ; i|3 ; i^3 ; i<<2 ; torch.logical_and(t,u) ; torch.logical_or(t,u)
torch.logical_not(t) ; torch.logical_xor(t,u) ; torch.where(t,a,b) ; torch.where(t,a,0.)
torch.where(a>0,a,-a) ; torch.where(t) ; a.clamp(-0.5,0.5) ; a.clamp(min=0) ; a.clamp(max=0)
a.clamp(min=b) ; torch.clamp(a,b-1,b+1) ; torch.maximum(a,b) ; torch.minimum(a,b) ; torch.max(a,b)
a.masked_fill(t,0.) ; a.masked_fill(t,torch.tensor(2.,device=dev)) ; a.masked_scatter(t,b)
a.masked_select(t) ; a[t] ; a[a>100] ; torch.nonzero(t) ; torch.nonzero(t,as_tuple=True) ; i.nonzero()
torch.count_nonzero(i) ; torch.unique(i) ; torch.unique(i,return_counts=True)
torch.unique(i,return_inverse=True) ; torch.searchsorted(s,p*8) ; torch.searchsorted(s,p*8,right=True)
torch.bucketize(p*8,s) ; a.sum() ; a.sum(1) ; a.sum(1,keepdim=True) ; a.sum((0,1)) ; i.sum() ; i.sum(0)
t.sum() ; h.sum(dtype=torch.float) ; a.mean() ; a.mean(1) ; h.mean(1) ; a.prod() ; a.prod(1) ; i.prod(1)
a.max() ; a.min() ; i.max() ; a.max(1) ; a.min(1) ; a.amax(1) ; a.amin(0) ; a.amax() ; a.argmax()
a.argmin() ; a.argmax(1) ; a.argmax(1,keepdim=True) ; a.argmin(0) ; t.all() ; t.any() ; t.all(1)
t.any(1) ; t.any(1,keepdim=True) ; i.any() ; a.std() ; a.std(1) ; a.var() ; a.var(1)
a.var(1,unbiased=False) ; torch.var_mean(a,1) ; torch.std_mean(a,1) ; a.norm() ; a.norm(dim=1)
a.norm(p=1,dim=1) ; torch.linalg.vector_norm(a,dim=1) ; F.normalize(a,dim=1) ; a.logsumexp(1)
a.trace() ; a.cumsum(1) ; i.cumsum(0) ; t.cumsum(0) ; a.cummax(1) ; a.cumprod(1) ; torch.bincount(c)
torch.bincount(c,minlength=6) ; a.median() ; a.median(1) ; torch.cat([a,b]) ; torch.cat([a,b],1)
torch.cat([a,z]) ; torch.stack([a,b]) ; torch.stack([a,b],-1) ; a.split([1,2]) ; a.chunk(2,1)
a.repeat(2,3) ; a.expand(2,3,4).contiguous() ; a.repeat_interleave(2) ; a.repeat_interleave(2,0)
a.repeat_interleave(n,0) ; torch.repeat_interleave(n) ; a.flip(0) ; a.flip([0,1]) ; a.roll(1)
a.roll(1,0) ; F.pad(a,(1,2)) ; F.pad(a,(1,2,0,1),value=3.) ; a.tril() ; a.triu(1) ; a.clone().tril_()
torch.diag(a[:,:3]) ; A.permute(2,0,1).contiguous() ; A.transpose(0,1).reshape(3,8)
a.unsqueeze(0).squeeze(0)+1 ; a[0] ; a[k] ; a[:,k] ; a[k,k] ; a[k][:,None] ; a[None,k] ; a[-1,1:3]
A[:,k] ; A[torch.tensor([0,1],device=dev),k[:2]] ; a[[0,2]] ; a.clone().index_put_((k,),b)
a.clone().index_put_((k,k),r[:3],accumulate=True) ; a.clone().__setitem__(k,b)
a.clone().masked_fill_(t,1.) ; a.index_select(0,k) ; a.index_select(1,k) ; a.index_add(0,k,b)
a.index_add(0,k,b,alpha=2) ; a.index_copy(0,k,b) ; a.take(k) ; a.gather(1,k[:,None])
torch.take_along_dim(a,a.argsort(1),1) ; a.scatter(1,k[:,None],1.) ; a.scatter(1,k[:,None],b)
a.scatter_add(1,k[:,None],b) ; a.clone().scatter_(1,k[:,None],5.) ; a.clone().scatter_add_(0,k[None,:],b)
a.scatter_reduce(1,k[:,None],b,"sum") ; F.embedding(k,a) ; F.one_hot(k) ; F.one_hot(k,5) ; a.topk(2)
a.topk(2,largest=False) ; h.topk(2,1) ; a.sort() ; a.sort(0,descending=True) ; i.sort(stable=True)
a.argsort(1) ; a@m ; torch.mm(a,m) ; a@r ; torch.mv(a,r) ; torch.dot(r,s) ; A@B ; torch.bmm(A,B) ; A@m
torch.matmul(A,B) ; torch.addmm(r[:1],a,m) ; torch.addmm(torch.ones(5,device=dev),a,m,beta=2,alpha=3)
torch.addmv(a[:,0],a,r,beta=2,alpha=3) ; torch.baddbmm(torch.ones(2,3,5,device=dev),A,B,beta=2,alpha=3)
torch.einsum("bij,bjk->bik",A,B) ; torch.einsum("ij,kj->ik",a,b) ; torch.outer(r,s) ; F.linear(a,m.t())
F.linear(a,m.t(),torch.ones(5,device=dev)) ; F.linear(A,m.t(),torch.ones(5,device=dev)) ; h@h.t()
f@f.t() ; a.softmax(1) ; h.softmax(-1) ; a.log_softmax(1) ; F.layer_norm(a,(4,))
F.layer_norm(a,(4,),r,s) ; F.layer_norm(h,(4,),r.half(),s.half()) ; F.rms_norm(a,(4,))
F.rms_norm(a,(4,),r) ; F.gelu(a) ; F.silu(a) ; F.relu(a) ; F.leaky_relu(a) ; F.elu(a) ; F.softplus(a)
F.hardtanh(a) ; F.hardswish(a) ; F.mish(a) ; F.glu(a) ; F.sigmoid(a) ; F.tanh(a) ; F.logsigmoid(a)
F.mse_loss(a,b) ; F.l1_loss(a,b) ; F.cross_entropy(a,k) ; F.nll_loss(a.log_softmax(1),k)
F.dropout(a,training=False) ; F.scaled_dot_product_attention(A,A,A) ; F.cosine_similarity(a,b)
torch.meshgrid(k,k,indexing="ij") ; torch.tensor([1,2],device=dev) ; z+1 ; z.sum() ; z.sum(0) ; z@m
torch.cat([z,z]) ; z.softmax(1) ; z[z>0] ; F.gelu(z) ; z.t().contiguous()
F.linear(z,m.t(),torch.ones(5,device=dev)) ; a[:0].index_select(1,k) ; torch.nonzero(z) ; z.bool().any()
a.double().sum().float() ; (a.half()+1).float() ; a.type(torch.int8) ; a.to(torch.uint8)
i.to(torch.int16) ; torch.logaddexp(a,b) ; torch.atan2(a,b) ; torch.xlogy(p,p)
torch.triu_indices(3,3,device=dev)
torch.autograd.grad(F.gelu((x:=a.clone().requires_grad_())@m).sum(),x)[0]
torch.autograd.grad(F.layer_norm(x:=a.clone().requires_grad_(),(4,),r,s).pow(2).sum(),x)[0]
torch.autograd.grad(F.cross_entropy(x:=a.clone().requires_grad_(),k),x)[0]
torch.autograd.grad(F.silu(x:=a.clone().requires_grad_()).softmax(1)[:,0].sum(),x)[0]
torch.autograd.grad(F.embedding(k,x:=a.clone().requires_grad_()).sum(),x)[0]
torch.autograd.grad(F.mse_loss((x:=a.clone().requires_grad_()).tanh().sigmoid().relu(),b),x)[0]
F.grouped_mm(f.repeat(2,4),f.repeat(2,4).expand(2,6,16).transpose(1,2),offs=k[:2].int().flip(0)*3)
a[k[:0]] ; i.double().sum().float()
"""
RANDOM = (
    "a.normal_()",
    "torch.rand(9, device=dev)",
    "torch.randn(9, device=dev)",
    "a.uniform_()",
    "torch.randint(0, 99, (9,), device=dev)",
    "torch.randperm(9, device=dev)",
    "torch.multinomial(p, 2)",
)


def tensors(device: str) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=g)

    made = {
        "a": normal(3, 4), "b": normal(3, 4), "p": torch.rand((3, 4), generator=g) + 0.1, "r": normal(4),
        "m": normal(4, 5), "A": normal(2, 3, 4), "B": normal(2, 4, 5),
        "h": normal(3, 4).half(), "f": normal(3, 4).bfloat16(),
        "i": torch.randint(-9, 9, (3, 4), generator=g), "j": torch.randint(1, 9, (3, 4), generator=g),
        "t": normal(3, 4) > 0, "u": normal(3, 4) > 0, "z": torch.empty(0, 4),
        "k": torch.tensor([2, 0, 1]), "n": torch.tensor([1, 0, 3]), "c": torch.tensor([1, 0, 2, 1, 1]),
        "s": torch.tensor([1.0, 2.0, 4.0, 8.0]),
    }  # fmt: skip
    return {name: t.to(device) for name, t in made.items()} | {"torch": torch, "F": F, "dev": device}


def parts(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [value]


@pytest.mark.parametrize("expression", EXPRESSIONS.replace("\n", " ; ").strip(" ;").split(" ; "))
def test_npu_computes_what_the_cpu_computes(expression: str):
    expected, results = (parts(eval(expression, tensors(device))) for device in ("cpu", "npu"))
    assert len(results) == len(expected)
    for result, value in zip(results, expected, strict=True):
        if not isinstance(value, torch.Tensor):
            assert result == value
            continue
        assert result.device.type == "npu"
        if value.dtype == torch.float64:  # which torch_npu turns into float32
            value = value.float()
        # Sums of up to 12 terms, each step rounded to the result's precision.
        eps = torch.finfo(value.dtype).eps if value.dtype.is_floating_point else 0
        torch.testing.assert_close(result.cpu(), value, rtol=16 * eps, atol=16 * eps, equal_nan=True)


@pytest.mark.parametrize("expression", RANDOM)
def test_random_numbers_follow_the_seed(expression: str):
    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return eval(expression, tensors("npu")).cpu()

    assert torch.equal(draw(1), draw(1))
    if "multinomial" not in expression:  # which has few outcomes
        assert not torch.equal(draw(1), draw(2))


def test_printing():
    values = tensors("npu")
    assert repr(values["i"]) == repr(values["i"].cpu())[:-1] + ", device='npu:0')"
    for name in "ahf":
        assert f"{values[name].cpu().flatten()[0].item():.3g}"[:4] in repr(values[name])
    assert "True" in repr(values["t"])
    assert repr(values["z"]) == "tensor([], device='npu:0', size=(0, 4))"


def test_a_layer_trains():
    layers = {}
    for device in ("cpu", "npu"):
        torch.manual_seed(0)
        layer = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.LayerNorm(16), torch.nn.Linear(16, 3)
        )
        x = torch.randn(5, 8)
        layer, x = layer.to(device), x.to(device)
        F.cross_entropy(layer(x), torch.tensor([0, 1, 2, 0, 1]).to(device)).backward()
        layers[device] = [p.grad.cpu() for p in layer.parameters()]
    for npu, cpu in zip(layers["npu"], layers["cpu"], strict=True):
        torch.testing.assert_close(npu, cpu)


MISSING = {  # what torch_npu has for an operator, beside nothing that is emulated: and the error
    "torch_npu.npu_moe_token_permute(x, torch.zeros(2, 1).int().npu())": "aclnnMoeTokenPermute or ",  # aclnn
    "torch.linalg.cross(x, x)": "aten::linalg_cross is not emulated",  # aclnn, else aclop
    "torch_npu.npu_slice(x, [0, 0], [1, 1])": "npu::npu_slice is not emulated",  # aclop
}


def test_a_missing_operator_is_named_at_its_call(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TASK_QUEUE_ENABLE", raising=False)
    calls = "\n".join(
        f"try:\n    {call}\nexcept RuntimeError as error:\n    print('raised', error)" for call in MISSING
    )
    done = run(
        f"import torch_npu\nx = torch.ones(3, 3).npu()\n{calls}\nprint((x + 1).sum().item())",
        operators=True,
    )
    raised = [line for line in done.stdout.splitlines() if line.startswith("raised")]
    assert len(raised) == len(MISSING), done.stdout + done.stderr
    for line, name in zip(raised, MISSING.values(), strict=True):
        assert line.startswith(f"raised {name}")
    assert done.stdout.endswith("18.0\n")


def test_an_error_of_an_operator_names_it():
    done = run(
        "torch.ones(3).npu().index_select(0, torch.tensor([7]).npu())\ntorch.npu.synchronize()",
        operators=True,
    )
    assert done.returncode != 0
    assert "aclnnIndexSelect: " in done.stdout + done.stderr


def test_without_a_compiler_the_ffn_operators_work(tmp_path: Path):
    (tmp_path / "bin").mkdir()
    done = run(
        "import torch_npu\nx, w = torch.ones(1, 16).half().npu(), torch.ones(16, 16).half().npu()\n"
        "print(torch_npu.npu_ffn(x, w, w, 'relu', inner_precise=1).cpu()[0, 0].item())",
        operators=True, XDG_CACHE_HOME=str(tmp_path), PATH=str(tmp_path / "bin"), CXX="",
    )  # fmt: skip
    assert done.stdout.endswith("256.0\n"), done.stderr
    assert (
        "ffn_ops.emulator: no C++ compiler was found (install g++ or clang++, or name one in CXX); "
        "only the FFN operators work" in done.stderr
    )


BAD_CALLS = [
    ("phase1('aclnnAdd', x, x, dead(scalar), y)", 161002, "alpha was destroyed"),
    ("phase1('aclnnAdd', x, x, POINTER(16), y)", 161002, "alpha was destroyed"),
    ("phase1('aclnnAdd', dead(other), x, scalar, y)", 161002, "self was destroyed"),
    ("phase1('aclnnAdd', x, POINTER(16), scalar, y)", 161002, "other was destroyed"),
    ("phase1('aclnnAmax', x, dead(ints), False, y)", 161002, "dim was destroyed"),
    ("phase1('aclnnCat', dead(tensors), I64(0), y)", 161002, "tensors was destroyed"),
    ("phase1('aclnnCat', (dead(other), tensors)[1], I64(0), y)", 161002, "tensors was destroyed"),
    ("phase1('aclnnCat', POINTER(16), I64(0), y)", 161002, "tensors was destroyed"),
    (
        "phase2('aclnnAdd', 'aclnnSub', x, x, scalar, y)",
        161002,
        "aclnnSub: the executor is one of aclnnAdd",
    ),
    ("failing(lambda: phase2('aclnnAdd', 'aclnnAdd', x, x, scalar, y))", 561000, "injected failure"),
]
BAD_CALLS_PROGRAM = """
import ctypes, os, sys
from ctypes import byref, c_float, c_int, c_uint64, c_void_p as POINTER, c_int64 as I64
from ffn_ops.emulator import CANN, counters, fail_at, library
from ffn_ops.emulator.operators import build
acl, aclnn, operators = library(), ctypes.CDLL(CANN / "libnnopbase.so"), ctypes.CDLL(build())
acl.aclGetRecentErrMsg.restype = ctypes.c_char_p
for call in {calls}:
    if os.fork() == 0:
        break  # and goes on below with this call
    os.wait()
else:
    os._exit(0)
assert acl.aclrtSetDevice(0) == 0
kinds = {}
def made(kind, *arguments):
    create = getattr(aclnn, "aclCreate" + kind)
    create.restype = POINTER
    pointer = POINTER(create(*arguments))
    kinds[pointer.value] = kind
    return pointer
def dead(pointer):
    assert getattr(aclnn, "aclDestroy" + kinds[pointer.value])(pointer) == 0
    return pointer
def tensor():
    memory, dims, two = POINTER(), (I64 * 2)(2, 2), c_uint64(2)
    assert acl.aclrtMalloc(byref(memory), c_uint64(16), 0) == 0
    return made("Tensor", dims, two, 0, None, I64(0), 2, dims, two, memory)
x, y, other = tensor(), tensor(), tensor()
scalar, ints = made("Scalar", byref(c_float(1)), 0), made("IntArray", (I64 * 1)(0), c_uint64(1))
tensors = made("TensorList", (POINTER * 2)(tensor(), other), c_uint64(2))
size, executor = c_uint64(), POINTER()
def phase1(name, *arguments):
    return getattr(operators, name + "GetWorkspaceSize")(*arguments, byref(size), byref(executor))
def phase2(name, run, *arguments):
    assert phase1(name, *arguments) == 0
    return getattr(operators, run)(None, size, executor, None)
def failing(call):
    with fail_at(1, "aclnnAdd"):
        return call()
print(call, eval(call), acl.aclGetRecentErrMsg().decode(), counters()['live_aclOpExecutor'], sep=' | ')
sys.stdout.flush()
os._exit(0)
"""


@pytest.fixture(scope="module")
def answers() -> subprocess.CompletedProcess[str]:
    """A line for each of BAD_CALLS, from a process that it may end: forked, since importing takes seconds."""
    calls = repr([call for call, *_ in BAD_CALLS])
    return run(BAD_CALLS_PROGRAM.replace("{calls}", calls), operators=True)


@pytest.mark.parametrize(("call", "status", "said"), BAD_CALLS)
def test_what_callers_pass_is_alive(
    call: str, status: int, said: str, answers: subprocess.CompletedProcess[str]
):
    """Through the C ABI. No executor is left."""
    lines = [line.split(" | ") for line in answers.stdout.splitlines() if line.startswith(f"{call} | ")]
    assert len(lines) == 1, answers.stdout + answers.stderr[-1000:]
    _, code, message, left = lines[0]
    assert (int(code), left) == (status, "0") and said in message


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path):
    done = run(
        "emulator.enable(operators=True)\nprint(torch.ones(2).npu().cpu())",  # the second time: nothing more
        operators=True, HOME="/proc/x", XDG_CACHE_HOME="/proc",
    )  # fmt: skip
    assert done.stdout.endswith("tensor([1., 1.])\n"), done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("ffn_ops.emulator: ")]
    assert len(said) == 1
    assert said[0].startswith("ffn_ops.emulator: the other operators could not be kept in /proc/ffn_ops: ")
    assert said[0].endswith(
        "(set XDG_CACHE_HOME to a folder that can be written); only the FFN operators work"
    )


def test_the_library_is_built_once_and_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    built = operators.build()  # by --device npu, which this test runs under
    assert built.exists() and torch.__version__ in built.name
    monkeypatch.setenv("CXX", "no-compiler-is-asked-for")
    monkeypatch.setattr(shutil, "which", lambda name: pytest.fail(f"looked for {name}"))
    assert operators.build() == built
    monkeypatch.undo()

    # A compiler that takes its time and writes what it was asked for: of two processes, one calls it.
    fake = tmp_path / "c++"
    fake.write_text(
        '#!/bin/sh\necho x >> "$CALLS"; sleep 0.2\n'
        'while [ $# -gt 0 ]; do if [ "$1" = -o ]; then echo built > "$2"; fi; shift; done\n'
    )
    fake.chmod(0o755)
    calls = tmp_path / "calls"
    cache = tmp_path / "ffn_ops"
    (cache / "tmpkilled").mkdir(parents=True)
    (cache / built.name).write_bytes(built.read_bytes()[:100000])  # cut short: it must be built again
    for age in range(1, 6):
        older = cache / f"operators-{age}.so"
        older.touch()
        os.utime(older, (0, 10 - age))
    code = "from ffn_ops.emulator.operators import build\nprint(build().read_bytes()[:-32].decode())"
    environment = {"XDG_CACHE_HOME": str(tmp_path), "CXX": str(fake), "CALLS": str(calls)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         env=os.environ | {"PYTHONPATH": str(PACKAGE)} | environment)
        for _ in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=100) for process in processes]
    assert [out for out, _ in said] == ["built\n\n"] * 2
    compiling = f"ffn_ops.emulator: compiling the operators for torch {torch.__version__}, once: "
    assert sum(compiling in error for _, error in said) == 1
    assert len(calls.read_text().split()) == operators.GENERATED + 3  # two sources more, and the linking
    assert {path.name for path in cache.iterdir()} == (
        {"lock", built.name} | {f"operators-{age}.so" for age in range(1, operators.KEPT)}
    )


def test_a_failing_compiler_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake = tmp_path / "c++"
    fake.write_text("#!/bin/sh\necho 'file.cc:1: error: no such thing' >&2; exit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(fake))
    with pytest.raises(operators.BuildError, match=r"could not be built .*file.cc:1: error: no such thing"):
        operators.build()
    assert not list(tmp_path.rglob("*.so"))
